"""Publishing an output on a model hub: what of it is uploaded, the upload, and the check that it arrived.

Only finished outputs of shardxform that `verify` finds sound are published, in one commit, so that the hub never shows
half a checkpoint. Nothing here imports huggingface_hub before an upload begins.
"""

from shardxform.publish.contents import Contents, contents_of, is_repo_name
from shardxform.publish.push import Destination, Pushed, Watch, push, verified

__all__ = [
    "Contents",
    "Destination",
    "PublishedFile",
    "Pushed",
    "Watch",
    "contents_of",
    "is_repo_name",
    "push",
    "verified",
]
