"""How blocks are healed and tuned: values that the plan carries, since all of it decides bytes. No numbers here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from shardxform.base.constants import CLIP_STEP, HELD_OUT, JUDGES, SHORTER
from shardxform.errors import SchemeError
from shardxform.model.families.base import Role

__all__ = [
    "BATCH_SIZE",
    "HEALED",
    "HEAL_ITERS",
    "ITERS",
    "MAX_EXTRA",
    "ROUTED",
    "Heal",
    "HealedAs",
    "Inputs",
    "Reach",
    "Recipe",
    "Trial",
    "first_steps_told",
    "held_out",
    "split_windows",
]

Inputs = Literal["quantized", "fp"]
What = Literal["auto", "router", "shared", "experts", "moe", "all"]
HealedAs = Literal["source", "16bit"]

ITERS: Final = 200
BATCH_SIZE: Final = 8
HEAL_ITERS: Final = 100
MAX_EXTRA: Final = 1 << 16

HEALED: Final[Mapping[str, frozenset[str]]] = {
    "router": frozenset({"router"}),
    "shared": frozenset({"router", "shared experts"}),
    "experts": frozenset({"routed experts"}),
    "moe": frozenset({"router", "shared experts", "routed experts"}),
    "all": frozenset(get_args(Role)),
}
"""Roles of the weights that healing changes; `shared`, `moe` and `all` change the norm before the experts too."""

ROUTED: Final = "experts"
"""Key of `HEALED`: what merging changes."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to heal a block: what to change, and the first step size, relative to each weight's root mean square.

    `lr` is None where the step size is `part` of that which the amount of data suggests.
    """

    what: str
    lr: float | None = None
    part: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heal:
    """Tuning the 16-bit weights of a pruned block until it resembles the block before pruning.

    Attributes:
        what: which weights; `auto` all, or where these do held-out windows harm the shared ones, block by block.
        iters: steps a block; with `merge` there may be none.
        schedule: steps of each block that is healed, in their order, where they are not `iters` for all.
        seconds: time to spend on all of them, which then decides their steps; 0 for none.
        lr: first step size; None has the amount of data choose, and held-out windows whether it was too large.
        batch_size: windows of a step.
        extra: windows to learn from beside those of the text, made of its pieces; none judges.
        encoding: how weights are written that the source has quantized: as the source has them, or in 16 bits,
            which its quantization config is then told; None where it has none.
        merge: begin on the way to experts that pruned ones were merged into, as far as held-out windows say.

    """

    what: What = "auto"
    iters: int = HEAL_ITERS
    schedule: tuple[int, ...] = ()
    seconds: int = 0
    lr: float | None = None
    batch_size: int = BATCH_SIZE
    extra: int = 0
    encoding: HealedAs | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        for name, least in (("iters", 0 if self.merge else 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise SchemeError(f"heal {name}: expected at least {least}, found {getattr(self, name)}")
        if self.merge and not HEALED[ROUTED] <= HEALED.get(self.widest, HEALED["all"]):
            raise SchemeError(
                f"`merge` changes routed experts, but `heal` {self.what} leaves them as they are; give `heal` auto,"
                " experts, moe or all, or leave it out"
            )
        if any(each < 1 for each in self.schedule):
            raise SchemeError(f"`heal.iters`: expected at least 1 for every block, found {list(self.schedule)}")
        if self.seconds < 0 or (self.seconds and self.schedule):
            raise SchemeError("`heal.seconds`: expected a time above 0 that decides the steps, or the steps, not both")
        if not 0 <= self.extra <= MAX_EXTRA:
            raise SchemeError(f"`heal.extra`: expected at least 0 and at most {MAX_EXTRA:,}, found {self.extra:,}")
        if self.what != "auto" and self.what not in HEALED:
            raise SchemeError(f"heal: expected auto, {', '.join(HEALED)}, found {self.what!r}")
        if self.encoding not in (None, *get_args(HealedAs)):
            raise SchemeError(f"`heal.encoding`: expected {' or '.join(get_args(HealedAs))}, found {self.encoding!r}")
        if self.lr is not None and not 0 < self.lr <= 1:
            raise SchemeError(f"`heal.lr`: expected more than 0 and at most 1, found {self.lr}")

    @property
    def widest(self) -> str:
        """Key of `HEALED`: all that may change."""
        return "all" if self.what == "auto" else self.what

    @property
    def trials(self) -> tuple[Trial, ...]:
        """What is done, one after the other and each in full, until the held-out windows are not worse for it.

        A step that was not given and makes them worse is too large for so little text: many such steps learn it by
        heart. So a part of it follows, and then fewer weights.
        """
        first, *fewer = ("all", "shared") if self.what == "auto" else (self.what,)
        parts = (1.0,) if self.lr else (1.0, 1 / SHORTER)
        return (*(Trial(first, self.lr, part) for part in parts), *(Trial(what, self.lr) for what in fewer))


class Reach(NamedTuple):
    """How far tuning moves offsets and clips at most, in scales."""

    offset: float
    clip: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """AutoRound as it is to be run.

    Attributes:
        windows: fingerprint of the token windows.
        data: where they come from, for the record.
        samples, seqlen: how many windows, of how many tokens.
        iters: steps a block.
        lr: first step of rounding offsets, in scales; None for 1 / iters, as auto-round has it.
        minmax_lr: that of clips; None for a quarter of it.
        batch_size: windows of a step.
        seed: of the order of the windows, together with the block's number.
        inputs: what a block is tuned on: `quantized`, what the tuned blocks before it put out, or `fp`, what the
            16-bit ones do, which makes blocks independent of each other.
        device: kind of device, on which the last bits depend.
        dtype: of the computation, likewise.
        heal: what to do before, or None. With it, `iters` may be 0: rounded to nearest, or not at all.

    """

    windows: str
    data: Mapping[str, Any]
    samples: int
    seqlen: int
    iters: int = ITERS
    lr: float | None = None
    minmax_lr: float | None = None
    batch_size: int = BATCH_SIZE
    seed: int = 42
    inputs: Inputs = "quantized"
    device: str = "cpu"
    dtype: str = "float32"
    heal: Heal | None = None

    def __post_init__(self) -> None:
        for name, least in (("iters", 0 if self.heal else 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SchemeError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        for name in ("lr", "minmax_lr"):
            first = getattr(self, name)
            if first is not None and not (self.iters and 0 < first <= 1):
                raise SchemeError(f"{name}: expected more than 0 and at most 1, with steps to take, found {first}")
        if self.inputs not in ("quantized", "fp"):
            raise SchemeError(f"inputs: expected quantized or fp, found {self.inputs!r}")
        if self.heal and self.heal.seconds and self.inputs == "fp":
            raise SchemeError("`heal.seconds`: expected `inputs` quantized, blocks one after the other, found fp")
        if self.heal and self.samples < 2:
            asked = "heal" if self.heal.iters else "merge"
            raise SchemeError(
                f"`{asked}`: expected at least 2 windows, one of them to judge by, found {self.samples}; give `samples`"
                " 2 or more, and text that fills them, or a smaller `seqlen`"
            )

    @property
    def first_steps(self) -> Reach:
        """How far the first step moves an offset and a clip; 0 without steps."""
        lr = (self.lr or 1 / self.iters) if self.iters else 0.0
        return Reach(lr, self.minmax_lr or CLIP_STEP * lr)

    @property
    def reach(self) -> Reach:
        """How far all steps do, which fall to zero linearly."""
        offset, clip = self.first_steps
        return Reach(offset * (self.iters + 1) / 2, clip * (self.iters + 1) / 2)

    @property
    def learned(self) -> int:
        """Windows of the text that blocks are healed and tuned on; the others judge."""
        return self.samples - held_out(self.samples)

    @property
    def extra(self) -> int:
        """Windows that healing has beside those of the text."""
        return self.heal.extra if self.heal else 0

    @property
    def windows_run(self) -> int:
        """Windows that go through the chains."""
        return self.samples + self.extra

    @property
    def block_tokens(self) -> int:
        """Tokens that go through a block on the way to its tuned weights: its share of the work."""
        windows = self.windows_run * (1 if self.inputs == "fp" else 2)
        windows += self.iters * min(self.batch_size, self.learned)
        return windows * self.seqlen + self.heal_tokens

    @property
    def heal_tokens(self) -> int:
        """Tokens of a block that the steps of healing take."""
        if self.heal is None:
            return 0
        return self.heal.iters * min(self.heal.batch_size, self.learned + self.extra) * self.seqlen

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a step."""
        sizes = [min(self.batch_size, self.learned)] if self.iters else []
        sizes += [min(self.heal.batch_size, self.learned + self.extra)] if self.heal else []
        return max(sizes) * self.seqlen

    def facts(self) -> dict[str, Any]:
        """Plain data, for the record and for comparison."""
        facts = {**asdict(self), "data": dict(self.data)}
        if self.lr is None:
            del facts["lr"]
        if self.iters:  # where a record has none, clips moved as far as offsets
            facts["minmax_lr"] = self.first_steps.clip
        else:
            del facts["minmax_lr"]
        if self.heal is None:
            del facts["heal"]
            return facts
        for name in ("encoding", "extra", "merge", "schedule", "seconds"):
            if not getattr(self.heal, name):
                del facts["heal"][name]
        if self.heal.schedule or self.heal.seconds:
            del facts["heal"]["iters"]
        return facts


def first_steps_told(recorded: Mapping[str, object], iters: int) -> Reach:
    """How far the first of `iters` steps moves an offset and a clip, by the recipe of a record.

    Where that has none, or one that makes no sense, an offset moves by 1 / iters, and a clip as far as an offset.
    """
    lr, minmax_lr = (
        found if type(found) is float and 0 < found <= 1 else None
        for found in (recorded.get("lr"), recorded.get("minmax_lr"))
    )
    offset = lr or 1 / iters
    return Reach(offset, minmax_lr or offset)


def held_out(samples: int) -> int:
    """How many windows judge a block, and are never learned from: an eighth, at least one; of a single window, none."""
    return max(1, samples // HELD_OUT) if samples > 1 else 0


def split_windows(samples: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the windows that are learned from, and of those that judge, each in order; a single one does both."""
    import numpy as np  # no plan needs it

    order_N = np.random.Generator(np.random.PCG64([seed, JUDGES])).permutation(samples)
    judges = held_out(samples)
    return sorted(order_N[judges:].tolist()), sorted(order_N[: judges or 1].tolist())
