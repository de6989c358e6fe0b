"""One progress over all stages, each weighed by the time that it usually takes compared with the others."""

from __future__ import annotations

from collections.abc import Mapping

from shardxform.base.progress import OnProgress, Progress

__all__ = ["Overall"]


class Overall:
    """Maps the progress of stages into one."""

    def __init__(self, weights: Mapping[str, int], on_progress: OnProgress | None) -> None:
        self._weights = dict(weights)
        self._on_progress = on_progress
        self._done = dict.fromkeys(weights, 0)
        self._resumed = dict.fromkeys(weights, 0)

    def found(self, stage: str) -> None:
        """A stage was done already; told with what is done next, if anything is."""
        self._done[stage] = self._resumed[stage] = self._weights[stage]

    def made(self, stage: str) -> None:
        """A stage is done now."""
        self._done[stage] = self._weights[stage]
        self._tell()

    def of(self, stage: str) -> OnProgress | None:
        """What a stage reports to; None when nobody listens."""
        return (lambda p: self._update(stage, p)) if self._on_progress else None

    def _update(self, stage: str, p: Progress) -> None:
        weight = self._weights[stage]
        self._done[stage] = weight * min(p.done, p.total) // max(p.total, 1)
        self._resumed[stage] = weight * min(p.resumed, p.total) // max(p.total, 1)
        self._tell(p.at)

    def _tell(self, at: str = "") -> None:
        if self._on_progress:
            done, total, resumed = (sum(d.values()) for d in (self._done, self._weights, self._resumed))
            self._on_progress(Progress(done, total, resumed, "work", at))
