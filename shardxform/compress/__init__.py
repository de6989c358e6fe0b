"""The whole way in one call: score, select, prune and quantize in one pass, verify, evaluate.

    from shardxform.compress import Pruning, Request, Settings, compress, prepare

    outcome = compress(prepare(Request(source=..., out=..., pruning=Pruning(keep=128), ...)), Settings())

Every stage is a call of the library that can be made by itself, and gives the same bytes. What a stage gave lies in
OUT.compress with a record of what it was made from: it is not made again, nor mistaken for the result of other inputs.
"""

from __future__ import annotations

from shardxform.compress.driver import Outcome, Watcher, compress
from shardxform.compress.forecast import forecast
from shardxform.compress.prepared import Prepared, prepare
from shardxform.compress.request import Pruning, Request, Settings

__all__ = ["Outcome", "Prepared", "Pruning", "Request", "Settings", "Watcher", "compress", "forecast", "prepare"]
