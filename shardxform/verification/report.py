"""What verification says in the end, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardxform.verification.findings import Problem

__all__ = ["Rounding", "VerifyReport", "WeightError"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    """How far one quantized weight is from the source's.

    Attributes:
        name: of the module, in the current spelling.
        relative_error: norm of the difference over the norm of the weight.
        clipped: weights beyond the range of their codes by more than half a step.
        moved: weights that are not at the nearest code, though near enough.

    """

    name: str
    relative_error: float
    clipped: int
    moved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Quantized weights held against the source's.

    Attributes:
        modules, differing: weights compared, and those among them that are no rounding of the source's.
        exact: whether all were rounded again from the source and are equal bit for bit, words and scales; otherwise
            they are within the bound of `verification.rounding`.
        repacked: whether the source is quantized, and it is its integers and scales that were compared; no errors then.
        weights, clipped, moved: elements in all of them; see `WeightError`.
        relative_error: as `WeightError` has it, over all of them.
        by_weight: one entry each, the worst first.

    """

    modules: int
    differing: int
    exact: bool
    repacked: bool
    weights: int
    clipped: int
    moved: int
    relative_error: float
    by_weight: tuple[WeightError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What verification found.

    Attributes:
        problems: everything that is wrong; empty when the checkpoint is sound.
        warnings: what a person should look at.
        tensors, experts: how many there are, routed experts over all layers.
        unfinished: whether it is the output of a run that was stopped; nothing else was looked at then.
        bytes_scanned: of float tensors and parts of quantized weights that were looked through.
        bytes_compared, tensors_compared, tensors_differing: against the source, byte for byte.
        tensors_derived: those among them that hold no bytes of the source, but what its packed weights dequantize to,
            or its weights rounded again and dequantized.
        tensors_digested: tensors that are, by their digests, the very bytes that shardxform wrote.
        rounding: quantized weights against the source; None when there were none to compare.
        values_compared: tensors of OUT whose values were held against the source in any of these ways, all parts of
            quantized weights counted.
        values_left: how many others there are, by the reason: `healed`, as shardxform.json says; `tuned`, rounded with
            calibration text and dequantized; `unknown` otherwise. Only that they are finite was looked at. Empty
            without a source.
        rederived: weights that were derived from the source a second time and compared, by independent code; None where
            that was not asked for.

    """

    out: Path
    source: str | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    tensors: int
    experts: int
    unfinished: bool
    bytes_scanned: int
    bytes_compared: int
    tensors_compared: int
    tensors_differing: int
    tensors_derived: int
    tensors_digested: int
    rounding: Rounding | None
    values_compared: int
    values_left: Mapping[str, int]
    seconds: float
    peak_rss_bytes: int
    rederived: int | None = None

    @property
    def sound(self) -> bool:
        """Whether there is no problem; warnings do not count."""
        return not self.problems

    @property
    def tensors_healed(self) -> int:
        """Tensors that shardxform.json says were healed."""
        return self.values_left.get("healed", 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        paths = {"out": str(self.out), "source": self.source}
        return {"sound": self.sound, **asdict(self), "tensors_healed": self.tensors_healed, **paths}
