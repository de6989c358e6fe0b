"""Ideas for better tuned rounding, by name, which `bench_tuning_ideas.py` tries.

python benchmarks/bench_tuning_ideas.py --only NAME
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Idea:
    """What is done otherwise.

    Attributes:
        tuned: take steps at all.
        search: start from searched scales.
        by_energy: search them by the weights' errors times the energies of their inputs.
        compensated: start offsets from what compensation adds.
        damping: of compensation, in mean energies of the inputs.
        neighbours: compensation takes one of the two codes next to a weight.
        windows: that compensation, or the search by energy, sees.
        rate: first step of offsets and clips, times the number of steps.
        clip_rate: that of clips, in rates.
        shrunk: afterwards, go back toward the start, to three quarters, a half and a quarter of all offsets and clips,
            and keep what the judges find best.
        learn_all: learn from the windows that judge, too, and keep the last state.
        sensitivity: weigh errors by how the model's output depends on a block's channels (Fisher information of
            sampled tokens), this share of it beside a plain one.
        mixed: share of windows whose inputs are those of the 16-bit model.
        damped_gradient: leave out gradients below this share of their row's root mean square.
        momentum: take the sign of a running mean of gradients, of which this share is what it was before.
        beside: learn from windows beside those of the text, too: `pieces` of its windows, `drawn` pieces of which
            half the tokens are any others, or `text`, three times as much of it, which shows what data is worth.
        extension: search by energy as auto-round's `enable_alg_ext` does: 201 scales, inputs not weighted.
        clip: largest clip.
        scales_first: share of the steps before the others in which scales move alone.
        in_turn: all but the down projections first, which are in 16 bits then, and these on what the others put out,
            each in this share of the steps.
        more: rounds of half the steps, of half the size, that may follow as long as the judges' loss falls by 1%.
        left_out: share of a step's errors, the largest, that count nothing, as upstream has it below 4 bits.
        by_channel: count errors of the block's output by its channels' energies, as an imatrix weighs columns.
        healed: round the healed model, to put out what the `original` does, or the `healed` blocks do.
        rounded: round at all.
        against: the idea that this one is compared with.
    """

    tuned: bool = True
    search: bool = True
    by_energy: bool = False
    compensated: bool = False
    damping: float = 0.1
    neighbours: bool = False
    windows: int = 64
    rate: float = 1.0
    clip_rate: float = 1.0
    shrunk: bool = False
    learn_all: bool = False
    sensitivity: float = 0.0
    mixed: float = 0.0
    damped_gradient: float = 0.0
    momentum: float = 0.0
    beside: str = ""
    extension: bool = False
    clip: float = 1.2
    scales_first: float = 0.0
    in_turn: float = 0.0
    more: int = 0
    left_out: float = 0.0
    by_channel: bool = False
    healed: str = ""
    rounded: bool = True
    against: str = "tuned"


_START: Final = Idea(tuned=False, compensated=True)
IDEAS: Final = {
    "tuned": Idea(),
    "rtn": Idea(tuned=False, search=False),
    "rtn --search": Idea(tuned=False),
    "search by energy": Idea(tuned=False, by_energy=True),
    "search by energy, tuned": Idea(by_energy=True),
    "compensated, damping 0.01": Idea(tuned=False, compensated=True, damping=0.01),
    "compensated, damping 0.1": _START,
    "compensated, damping 0.3": Idea(tuned=False, compensated=True, damping=0.3),
    "compensated, next codes": Idea(tuned=False, compensated=True, neighbours=True),
    "compensated, 4 windows, damping 0.01": Idea(tuned=False, compensated=True, damping=0.01, windows=4),
    "compensated, 4 windows, damping 0.3": Idea(tuned=False, compensated=True, damping=0.3, windows=4),
    "compensated, 4 windows, damping 1": Idea(tuned=False, compensated=True, damping=1.0, windows=4),
    "compensated, tuned": Idea(compensated=True),
    "compensated, tuned at a quarter": Idea(compensated=True, rate=0.25),
    "compensated, next codes, tuned at a quarter": Idea(compensated=True, neighbours=True, rate=0.25),
    "steps of 1.6": Idea(rate=1.6),
    "learned from all": Idea(learn_all=True),
    "by sensitivity": Idea(sensitivity=0.8),
    "half the inputs of 16 bits": Idea(mixed=0.5),
    "small gradients left out": Idea(damped_gradient=0.5),
    "shrunk afterwards": Idea(shrunk=True),
    "half the steps' size": Idea(rate=0.5),
    "a quarter of the steps' size": Idea(rate=0.25),
    "a tenth of the steps' size": Idea(rate=0.1),
    "momentum 0.9": Idea(momentum=0.9),
    "momentum 0.7": Idea(momentum=0.7),
    "pieces beside": Idea(beside="pieces"),
    "drawn pieces beside": Idea(beside="drawn"),
    "three times the text beside": Idea(beside="text"),
    "scales first": Idea(scales_first=0.5),
    "search by energy, scales first": Idea(by_energy=True, scales_first=0.5),
    "clips at a quarter": Idea(clip_rate=0.25),
    "clips at a tenth": Idea(clip_rate=0.1),
    "clips fixed": Idea(clip_rate=0.0),
    "search by energy, clips at a quarter": Idea(by_energy=True, clip_rate=0.25),
    "as enable_alg_ext": Idea(by_energy=True, extension=True, clip=2.0),
    "as enable_alg_ext, largest errors left out": Idea(by_energy=True, extension=True, clip=2.0, left_out=0.001),
    "largest errors left out": Idea(left_out=0.001),
    "by energies of channels": Idea(by_channel=True),
    "in turn, half the steps each": Idea(in_turn=0.5),
    "in turn, all steps each": Idea(in_turn=1.0),
    "more steps while the loss falls": Idea(more=4),
    "healed, tuned": Idea(healed="original", against="healed, tuned"),
    "healed, 16 bits": Idea(healed="original", rounded=False, against="healed, tuned"),
    "healed, rtn --search": Idea(healed="original", tuned=False, against="healed, tuned"),
    "healed, tuned to the healed": Idea(healed="healed", against="healed, tuned"),
}
