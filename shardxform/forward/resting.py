"""Matrices of a model at rest: in memory, or on a device, as they are stored, and values of them when they are needed.

A block's experts are needed again with every batch. Widening bfloat16, and decoding small floats and integers, cost
little beside what is computed with them; their values would be two to eight times the memory.
"""

# O: output channels, I: input channels, W: words of a row, G: groups of a row, B: bytes of a row, S, T: rows and
# columns of blocks.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from shardxform.formats.decoded import DecodedRows, ScaledRows
from shardxform.formats.encoding import Cut, Rows
from shardxform.formats.fp8 import Fp8
from shardxform.formats.microscaling import Microscaled
from shardxform.formats.packing import values_of
from shardxform.formats.scheme import Grid
from shardxform.model.families.base import ExpertLayout

__all__ = ["Coded", "ExpertValues", "Packed", "PlainMatrix", "Precision", "RestingMatrix", "RoutedExpert"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Where and in what type a model is computed."""

    device: torch.device
    dtype: torch.dtype


class RestingMatrix(Protocol):
    """A 2-D weight at rest, in the form it is stored in."""

    @property
    def shape(self) -> Sequence[int]:
        """[O, I]."""
        ...

    def dense(self, precision: Precision) -> torch.Tensor:
        """Its values [O, I]."""
        ...

    def into(self, out_OI: torch.Tensor) -> None:
        """Put them where they are wanted."""
        ...

    def on(self, precision: Precision) -> RestingMatrix:
        """The same on the device, at rest."""
        ...

    def at_rest(self) -> torch.Tensor:
        """Its values in the dtype that stands for how they are stored."""
        ...


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """Values; `resting` is the dtype they are at rest in, where they were decoded to a wider one to compute with."""

    w_OI: torch.Tensor
    resting: torch.dtype | None = None

    @property
    def shape(self) -> Sequence[int]:
        """[O, I]."""
        return self.w_OI.shape

    def dense(self, precision: Precision) -> torch.Tensor:
        """Its values [O, I]."""
        return self.w_OI.to(precision.device, precision.dtype)

    def into(self, out_OI: torch.Tensor) -> None:
        """Put them where they are wanted."""
        out_OI.copy_(self.w_OI)

    def on(self, precision: Precision) -> RestingMatrix:
        """The same on the device, at rest."""
        return PlainMatrix(self.w_OI.to(precision.device), self.resting)

    def at_rest(self) -> torch.Tensor:
        """Its values in the dtype that stands for how they are stored."""
        return self.w_OI if self.resting is None else self.w_OI.to(self.resting)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of a quantized weight: int32 words and float32 scales."""

    words_OW: torch.Tensor
    scale_OG: torch.Tensor
    grid: Grid

    @property
    def shape(self) -> Sequence[int]:
        """[O, I]."""
        rows, words = self.words_OW.shape
        return rows, words * 32 // self.grid.bits

    def dense(self, precision: Precision) -> torch.Tensor:
        """Its values [O, I]."""
        if self.words_OW.device.type == "cpu":
            values = torch.from_numpy(values_of(self.words_OW.numpy(), self.scale_OG.numpy(), self.grid))
            return values.to(precision.device, precision.dtype)
        bytes_OB = self.words_OW.to(precision.device).view(torch.uint8)  # lowest bits first, on little-endian machines
        if self.grid.bits == 4:
            bytes_OB = torch.stack((bytes_OB & 15, bytes_OB >> 4), dim=-1).flatten(1)
        rows, groups = self.scale_OG.shape
        code_OGS = bytes_OB.view(rows, groups, -1).float() - float(self.grid.zero_code)
        scale_OG = self.scale_OG.to(precision.device)
        return (code_OGS * scale_OG[:, :, None]).view(rows, -1).to(precision.dtype)

    def into(self, out_OI: torch.Tensor) -> None:
        """Put them where they are wanted."""
        out_OI.copy_(self.dense(Precision(out_OI.device, out_OI.dtype)))

    def on(self, precision: Precision) -> RestingMatrix:
        """The same on the device, at rest."""
        return Packed(self.words_OW.to(precision.device), self.scale_OG.to(precision.device), self.grid)

    def at_rest(self) -> torch.Tensor:
        """Its values in the dtype that stands for how they are stored."""
        return self.dense(Precision(self.words_OW.device, torch.bfloat16))


Fill = Callable[[Sequence[Rows], torch.Tensor], None]
"""Decodes rows, one below the other, into a tensor [O, I]."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Codes in memory and their scales; values are made each time they are asked for.

    Attributes:
        rows: one below the other.
        shape: [O, I] of these.
        part: which rows of their transpose are meant; None for themselves.
        resting: the dtype that stands for them.
        fill: decodes them.

    """

    rows: tuple[DecodedRows, ...]
    shape: tuple[int, int]
    part: Cut | None
    resting: torch.dtype
    fill: Fill

    def dense(self, precision: Precision) -> torch.Tensor:
        """Its values [O, I]."""
        w_OI = torch.empty(self.shape, dtype=precision.dtype)
        self.fill(self.rows, w_OI)
        part: torch.Tensor = w_OI if self.part is None else self.part.of(w_OI)
        return part.to(precision.device)

    def into(self, out_OI: torch.Tensor) -> None:
        """Put them where they are wanted."""
        if self.part is None and out_OI.device.type == "cpu":
            self.fill(self.rows, out_OI)
        else:
            out_OI.copy_(self.dense(Precision(out_OI.device, out_OI.dtype)))

    def on(self, precision: Precision) -> RestingMatrix:
        """The same on the device, at rest."""
        if precision.device.type == "cpu":
            return self
        return Sent.of(self, precision.device) or PlainMatrix(self.dense(precision), self.resting)

    def at_rest(self) -> torch.Tensor:
        """Its values in the dtype that stands for how they are stored."""
        return self.dense(Precision(torch.device("cpu"), self.resting))


@dataclass(frozen=True, slots=True)
class Sent:
    """Codes of small floats on a device.

    Attributes:
        codes_OB: bytes, as they are stored.
        table: values of every byte, one or two of them [256, 1 or 2].
        scale_ST: float32.
        block: rows and columns that share a scale.
        coded: the same in memory.

    """

    codes_OB: torch.Tensor
    table: torch.Tensor
    scale_ST: torch.Tensor
    block: tuple[int, int]
    coded: Coded

    @property
    def shape(self) -> Sequence[int]:
        """[O, I]."""
        return self.coded.shape

    @classmethod
    def of(cls, coded: Coded, device: torch.device) -> Sent | None:
        """Send codes; None for those of other kinds.

        Raises:
            ExecutionError: a value is no number.

        """
        rows = coded.rows[0]
        if len(coded.rows) > 1 or not isinstance(rows, ScaledRows) or not isinstance(rows.decoding, Fp8 | Microscaled):
            return None
        found = rows.decoding.table()
        codes_OB = torch.from_numpy(rows.stored(0, rows.count)).to(device)
        scale_ST = torch.from_numpy(np.ascontiguousarray(rows.scales)).to(device)
        height, width = rows.decoding.block_of((rows.codes.spec.shape[0], coded.shape[1]))
        first = rows.first // height  # of a run of rows, the blocks that it is of
        if rows.first % height:
            return None
        table = torch.from_numpy(found).to(device)
        sent = cls(codes_OB, table, scale_ST[first : first - (-rows.count // height)], (height, width), coded)
        if not sent.dense(Precision(device, torch.float32)).isfinite().all():
            coded.dense(Precision(torch.device("cpu"), torch.float32))  # which names it
        return sent

    def dense(self, precision: Precision) -> torch.Tensor:
        """Its values [O, I]."""
        height, width = self.block
        rows, columns = self.coded.shape
        value_OI = self.table[self.codes_OB.long()].view(rows, columns)
        value_OI *= self.scale_ST.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        part: torch.Tensor = value_OI if self.coded.part is None else self.coded.part.of(value_OI)
        return part.to(precision.dtype)

    def into(self, out_OI: torch.Tensor) -> None:
        """Put them where they are wanted."""
        out_OI.copy_(self.dense(Precision(out_OI.device, out_OI.dtype)))

    def on(self, _precision: Precision) -> RestingMatrix:
        """The same on the device, at rest."""
        return self

    def at_rest(self) -> torch.Tensor:
        """Its values in the dtype that stands for how they are stored."""
        return self.coded.at_rest()


class ExpertValues(NamedTuple):
    """One routed expert, as its model computes with it.

    Attributes:
        gate_up_OH: gate and up projection [2I, H], their rows in the order that the model's own gate takes; the up
            projection [I, H] where there is no gate.
        down_HI: down projection.
        gate_up_bias_O, down_bias_H: their biases, or None.

    """

    gate_up_OH: torch.Tensor
    down_HI: torch.Tensor
    gate_up_bias_O: torch.Tensor | None = None
    down_bias_H: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class RoutedExpert:
    """One routed expert at rest: in memory as it is stored, its values made when they are needed.

    Attributes:
        gate_up: both projections as a stack has them, or the gate and the up projection.
        down: the down projection.
        biases: of `gate_up`, part by part, and of `down`; empty where there are none.
        layout: how the family's experts lie.

    """

    gate_up: tuple[RestingMatrix, ...]
    down: RestingMatrix
    biases: tuple[torch.Tensor, ...]
    layout: ExpertLayout

    def on(self, precision: Precision) -> RoutedExpert:
        """The same there, still at rest: every batch needs it, and a block's experts are gigabytes to send."""
        gate_up, biases = (part.on(precision) for part in self.gate_up), (b.to(precision.device) for b in self.biases)
        return RoutedExpert(tuple(gate_up), self.down.on(precision), tuple(biases), self.layout)

    def at_rest(self) -> ExpertValues:
        """The values in the dtype they are stored in; of quantized ones, in the one that stands for it."""
        return self._values(_one([part.at_rest() for part in self.gate_up]), self.down.at_rest(), self.biases)

    def dense(self, precision: Precision) -> ExpertValues:
        """The values to compute with."""
        biases = [bias.to(precision.device, precision.dtype) for bias in self.biases]
        if len(self.gate_up) == 1:
            return self._values(self.gate_up[0].dense(precision), self.down.dense(precision), biases)
        rows = [part.shape[0] for part in self.gate_up]
        both = torch.empty(sum(rows), self.gate_up[0].shape[1], dtype=precision.dtype, device=precision.device)
        for part, place in zip(self.gate_up, torch.split(both, rows), strict=True):
            part.into(place)
        return self._values(both, self.down.dense(precision), biases)

    def _values(self, both: torch.Tensor, down: torch.Tensor, biases: Sequence[torch.Tensor]) -> ExpertValues:
        if self.layout.transposed and len(self.gate_up) == 1:  # only stacks are
            both, down = both.T, down.T
        return ExpertValues(both, down, *((_one(biases[:-1]), biases[-1]) if biases else ()))


def _one(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of gate and up projection together; where these take turns in a stack, the parts are its halves too."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
