"""One run of the command, as the stages see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardxform.compress.folder import SALIENCY, Folder
from shardxform.compress.prepared import Prepared
from shardxform.compress.request import SCORE, Request, Settings

if TYPE_CHECKING:
    from shardxform.experts import Choice

__all__ = ["Job", "choice_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of the command."""

    prepared: Prepared
    settings: Settings
    folder: Folder

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self.prepared.request


def choice_of(job: Job) -> Choice:
    """The experts that stay, by what was scored."""
    from shardxform.experts import Saliency, decide

    pruning = job.request.pruning
    assert pruning is not None
    job.folder.read(SCORE, SALIENCY)  # refuses what another wrote
    saliency = Saliency.load(job.folder.root / SALIENCY)
    return decide(saliency, pruning.kept(saliency.num_experts), pruning.criterion, pruning.protect)
