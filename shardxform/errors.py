"""What can go wrong, as types. Each message says what was expected, what was found, and where.

The command line prints the message on one or two lines and exits with ``exit_code``; nothing here prints.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ExecutionError",
    "FamilyError",
    "Interrupted",
    "ManifestError",
    "OutputError",
    "PlanError",
    "RemoteError",
    "ResumeError",
    "SchemeError",
    "ShardxformError",
    "UnknownFamilyError",
]


class ShardxformError(Exception):
    """Base of every error that is the world's fault rather than this program's."""

    exit_code = 1


class CheckpointError(ShardxformError):
    """The source is no well-formed checkpoint: header, index, config or shard sizes."""


class FamilyError(ShardxformError):
    """The architecture is unknown, or its config contradicts its tensors."""


class UnknownFamilyError(FamilyError):
    """No family knows the architecture."""


class ManifestError(ShardxformError):
    """The keep manifest is malformed or does not fit the checkpoint."""


class SchemeError(ShardxformError):
    """The quantization asked for cannot be written, or no client would load it."""


class PlanError(ShardxformError):
    """What was asked for cannot be planned from this source."""


class OutputError(ShardxformError):
    """The output directory is foreign, inside the source, locked, or out of space."""


class ResumeError(OutputError):
    """The output directory holds work that was started with other inputs."""


class ExecutionError(ShardxformError):
    """A step could not be carried out: bad weights, a source that changed under our feet, an I/O error."""


class RemoteError(ShardxformError):
    """The hub refuses a repository, gives other bytes than it announced, or cannot be reached for too long."""


class Interrupted(ShardxformError):
    """Stopped on request, with all finished steps durable."""

    exit_code = 130
