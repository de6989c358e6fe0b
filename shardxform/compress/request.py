"""What `compress` is asked for: values only. A `Request` decides bytes; `Settings` do not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shardxform.ask.recipe import Recipe
from shardxform.calibration import Windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import OutputError, PlanError
from shardxform.experts.choosing import DEFAULT, keep_of_ratio
from shardxform.formats.scheme import Scheme
from shardxform.plan.prune import ViewOptions

if TYPE_CHECKING:
    from shardxform.forward.weights import Precision

__all__ = [
    "CARD",
    "EVALUATE",
    "QUANTIZE",
    "SCORE",
    "SELECT",
    "STAGES",
    "VERIFY",
    "Pruning",
    "Request",
    "Settings",
    "folder_of",
]

SCORE: Final = "score"
SELECT: Final = "select"
QUANTIZE: Final = "quantize"
VERIFY: Final = "verify"
EVALUATE: Final = "evaluate"
CARD: Final = "card"
STAGES: Final = (SCORE, SELECT, QUANTIZE, VERIFY, EVALUATE, CARD)
"""In the order in which they are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """Which experts stay.

    Attributes:
        keep: experts of every layer that stay; or
        ratio: the share of them that goes.
        criterion: what they are chosen by, a name of `experts.CRITERIA`.
        protect: keep super experts, whatever their score.

    """

    keep: int | None = None
    ratio: float | None = None
    criterion: str = DEFAULT
    protect: bool = False

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.ratio is None):
            raise PlanError("pruning: expected either a number of experts to keep or a ratio, found both or neither")

    def kept(self, num_experts: int) -> int:
        """Experts of a layer that stay."""
        return self.keep if self.keep is not None else keep_of_ratio(num_experts, self.ratio or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to become of a checkpoint.

    Attributes:
        source: what is compressed.
        out: directory that is written.
        work: where what stages give lies, and hidden states of scoring and evaluating; `<out>.compress` if None.
        scheme: how weights are stored.
        view: what of the source is taken, and how large shards are.
        pruning: which experts stay; None for all.
        score_windows: what experts are scored on; needed to prune.
        tune_windows: what the rounding is tuned on, as `recipe` says; both or neither.
        recipe: how blocks are tuned; None to round to nearest.
        eval_windows: held-out text; None not to evaluate.
        precision: of running the model; needed for all but plain rounding. What is tuned is computed on the same
            device in the type that `recipe` says.

    """

    source: Checkpoint
    out: Path
    scheme: Scheme
    view: ViewOptions = field(default_factory=ViewOptions)
    pruning: Pruning | None = None
    score_windows: Windows | None = None
    tune_windows: Windows | None = None
    recipe: Recipe | None = None
    eval_windows: Windows | None = None
    precision: Precision | None = None
    work: Path | None = None

    def __post_init__(self) -> None:
        if self.out.name in ("", ".."):
            raise OutputError(f"{self.out}: expected the name of a directory, beside which there is room for another")
        if (self.pruning is None) != (self.score_windows is None):
            raise PlanError("pruning: expected a choice and data to score experts on, found one without the other")
        if (self.recipe is None) != (self.tune_windows is None):
            raise PlanError("tuning: expected a recipe and its data, found one without the other")
        if self.runs_model and self.precision is None:
            raise PlanError("precision: expected a device and a type to run the model with, found none")

    @property
    def folder(self) -> Path:
        """Where results and the record of them lie."""
        return self.work or folder_of(self.out)

    @property
    def tuned_in(self) -> Precision | None:
        """Where and in what type blocks are tuned; None where none is."""
        if self.recipe is None or self.precision is None:
            return None
        import torch

        return replace(self.precision, dtype=getattr(torch, self.recipe.dtype))

    @property
    def runs_model(self) -> bool:
        """Whether any stage runs the model, which needs torch."""
        return any(each is not None for each in (self.score_windows, self.tune_windows, self.eval_windows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings that change speed, checks and pictures, never a byte of the output.

    Attributes:
        jobs: steps of rounding, or threads of verifying, at a time.
        device: where weights are rounded.
        force: start over what was made from other inputs, as far as it is ours.
        full_verify: read and compare all data of the output, not headers alone.
        plot: draw the choice of experts and the errors of the blocks.

    """

    jobs: int = 2
    device: str = "cpu"
    force: bool = False
    full_verify: bool = False
    plot: bool = False


def folder_of(out: Path) -> Path:
    """Where results lie unless another place is named: beside the output."""
    return out.with_name(out.name + ".compress")
