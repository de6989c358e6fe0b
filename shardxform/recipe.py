"""How blocks are tuned: a value that the plan carries, since all of it decides bytes. No numbers here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from shardxform.errors import SchemeError

__all__ = ["BATCH_SIZE", "ITERS", "Inputs", "Recipe"]

Inputs = Literal["quantized", "fp"]

ITERS: Final = 200
BATCH_SIZE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """AutoRound as it is to be run.

    Attributes:
        windows: fingerprint of the token windows.
        data: where they come from, for the record.
        samples, seqlen: how many windows, of how many tokens.
        iters: steps a block.
        batch_size: windows of a step.
        seed: of the order of the windows, together with the block's number.
        inputs: what a block is tuned on: `quantized`, what the tuned blocks before it put out, or `fp`, what the
            16-bit ones do, which makes blocks independent of each other.
        device: kind of device, on which the last bits depend.
        dtype: of the computation, likewise.

    """

    windows: str
    data: Mapping[str, Any]
    samples: int
    seqlen: int
    iters: int = ITERS
    batch_size: int = BATCH_SIZE
    seed: int = 42
    inputs: Inputs = "quantized"
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("iters", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SchemeError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        if self.inputs not in ("quantized", "fp"):
            raise SchemeError(f"inputs: expected quantized or fp, found {self.inputs!r}")

    @property
    def block_tokens(self) -> int:
        """Tokens that go through a block on the way to its tuned weights: its share of the work."""
        forward = 1 if self.inputs == "fp" else 2
        return (self.iters * min(self.batch_size, self.samples) + forward * self.samples) * self.seqlen

    def facts(self) -> dict[str, Any]:
        """Plain data, for the record and for comparison."""
        return {**asdict(self), "data": dict(self.data)}
