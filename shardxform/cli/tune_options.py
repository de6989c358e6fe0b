"""Options of healing and of tuned rounding, and what they come to: the recipe of the plan and the tuner of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shardxform.ask.manifest import Manifest
from shardxform.ask.recipe import BATCH_SIZE, HEAL_ITERS, HEALED, ITERS, Heal, Recipe
from shardxform.calibration import DataOptions, Windows
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.model_options import data_options, dtype_option, load_data, make_precision
from shardxform.errors import SchemeError
from shardxform.plan.plan import Plan
from shardxform.plan.prune import ViewOptions
from shardxform.plan.view import pruned_view

if TYPE_CHECKING:
    from shardxform.execution.options import StepTuner
    from shardxform.forward.weights import Precision

__all__ = ["Tuning", "heal_flags", "heal_options", "open_tuner", "read_tuning", "refuse_unpruned", "tune_options"]

_KEYS: Final = ("iters", "batch_size", "inputs", "blocks", "merge", "dtype")
_HEAL_KEYS: Final = ("heal", "heal_iters", "heal_lr")
_DATA_KEYS: Final = ("data", "samples", "seqlen", "seed", "preset", "no_pack", "chat_template", "text_key")
_SAMPLES: Final = 128  # auto-round's
_REFERENCE: Final = DataOptions(data="NeelNanda/pile-10k", samples=64, seqlen=512, seed=42, pack=False)


class _Healed(click.Choice[str]):
    """What to heal; the value may be left out, so a path that follows the option is taken for it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ANN401
        if value not in self.choices:
            named = ", ".join(map(str, self.choices))
            self.fail(f"{value!r} is none of {named}: put --heal after SRC and OUT, or write --heal=auto", param, ctx)
        return super().convert(value, param, ctx)


class _Blocks(click.ParamType[range]):
    """`0-9` or `7`: decoder blocks, the last one included."""

    name = "blocks"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, _, last = str(value).partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            self.fail(f"expected decoder blocks such as 0-9, found {value!r}", param, ctx)
        return range(int(first), int(last or first) + 1)


def tune_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of tuned rounding; refused where nothing is tuned."""
    for option in (
        click.option(
            "--merge",
            metavar="PART",
            multiple=True,
            type=click.Path(path_type=Path),
            help="Take over the blocks that the same command with --blocks has tuned in PART; repeatable.",
        ),
        click.option(
            "--blocks",
            type=_Blocks(),
            help="Tune these decoder blocks only, such as 0-9, and others elsewhere; needs --inputs fp.",
        ),
        click.option(
            "--inputs",
            type=click.Choice(["quantized", "fp"]),
            help="Tune a block on what the tuned blocks before it put out, or on what the 16-bit ones do, which makes "
            "blocks independent.  [default: quantized]",
        ),
        click.option("--iters", type=click.IntRange(1), help=f"Steps a block.  [default: {ITERS}]"),
    ):
        function = option(function)
    return function


def heal_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of healing alone."""
    for option in (
        click.option(
            "--heal-lr",
            type=click.FloatRange(0, 1, min_open=True),
            help="First step of healing, as a part of a weight matrix's root mean square.  [default: by the amount of "
            "data, and tried]",
        ),
        click.option(
            "--heal-iters", type=click.IntRange(0), help=f"Steps of healing a block.  [default: {HEAL_ITERS}]"
        ),
        click.option(
            "--heal",
            type=_Healed(["auto", *HEALED]),
            is_flag=False,
            flag_value="auto",
            help="After pruning, tune each block's 16-bit weights on --data until it does what the unpruned block did: "
            "the router, the shared experts too, all MoE weights, or the whole block; auto: held-out windows choose.  "
            "[alone: auto; then put it after SRC and OUT, or write --heal=auto]",
        ),
    ):
        function = option(function)
    return function


def heal_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of healing, and those that it shares with tuned rounding: data, batch size, type of the computation."""
    for option in (
        dtype_option("bfloat16, but float32 on a CPU without instructions for it"),
        click.option("--batch-size", type=click.IntRange(1), help=f"Windows of a step.  [default: {BATCH_SIZE}]"),
    ):
        function = option(function)
    presets = {"reference": "NeelNanda/pile-10k, 64 x 512, unpacked, 200 steps of one window"}
    return data_options(samples=_SAMPLES, presets=presets)(heal_flags(function))


class Tuning:
    """What was asked for, with its data read.

    Attributes:
        windows: calibration data.
        recipe: what the plan records.
        blocks, parts: see `RunOptions`.

    """

    def __init__(self, windows: Windows, recipe: Recipe, given: Mapping[str, Any], precision: Precision) -> None:
        self.windows = windows
        self.recipe = recipe
        self.precision = precision
        self.blocks: range | None = given.get("blocks")
        self.parts: tuple[Path, ...] = given.get("merge", ())


def refuse_unpruned(given: Mapping[str, Any], pruned_by: object, options: str) -> None:
    """Refuse --heal where nothing is pruned, before data are asked for; `options` say how to prune.

    Raises:
        UsageError: names what is missing, the data included.

    """
    if given["heal"] is None or given["heal_iters"] == 0 or pruned_by is not None:
        return
    text = "" if given["data"] or given["preset"] else ", and --data or --preset"
    raise click.UsageError(f"--heal: nothing is pruned, so there is nothing to heal; give {options}{text}.")


def read_tuning(
    method: str | None, source: Path | Checkpoint, device: str, given: dict[str, Any], *, here: bool = True
) -> Tuning | None:
    """Take the options of tuning and healing out of `given`; None when neither is asked for.

    `here` says whether this machine is to compute, and must have the device.

    Raises:
        SchemeError: options that need another one.

    """
    options: dict[str, Any] = {key: given.pop(key) for key in _KEYS if key in given}
    healing = {key: given.pop(key) for key in _HEAL_KEYS}
    data = {key: given.pop(key) for key in _DATA_KEYS}
    tunes, heal = method == "auto-round", _heal(healing, options)
    if not tunes:
        _refuse_idle({key: value for key, value in options.items() if key not in ("batch_size", "dtype")}, "auto-round")
    if not tunes and heal is None and healing["heal_iters"] != 0:
        elsewhere = None if method or device == "cpu" else device  # rounding has a device too
        _refuse_idle({**options, **data, "device": elsewhere}, "auto-round" if method else "healing")
    if not tunes and heal is None:
        return None
    if options.get("blocks") is not None and options["blocks"] is not None and options["inputs"] != "fp":
        raise SchemeError("--blocks needs --inputs fp: else a block is tuned on what the blocks before it put out")
    reference = data["preset"] == "reference"
    seed = data["seed"]
    windows = load_data(source, data, samples=_SAMPLES, presets={"reference": _REFERENCE})
    precision = make_precision(device, options["dtype"], tunes=True, here=here)
    chosen = {key: options[key] for key in ("iters", "batch_size", "inputs") if options.get(key) is not None}
    if reference:
        chosen.setdefault("batch_size", 1)
    if not tunes:
        chosen["iters"] = 0
    recipe = Recipe(
        windows=windows.fingerprint,
        data=windows.provenance,
        samples=int(windows.ids_NT.shape[0]),
        seqlen=int(windows.ids_NT.shape[1]),
        seed=42 if seed is None else seed,
        device=precision.device.type,
        dtype=str(precision.dtype).removeprefix("torch."),
        heal=heal,
        **chosen,
    )
    return Tuning(windows, recipe, options, precision)


@contextlib.contextmanager
def open_tuner(
    tuning: Tuning, source: Checkpoint, manifest: Manifest | None, options: ViewOptions, plan: Plan
) -> Iterator[StepTuner]:
    """Make the tuner of a plan.

    Raises:
        SchemeError: blocks that the plan does not tune.

    """
    import torch

    from shardxform.plan.steps import TuneBlock
    from shardxform.tuning.session import Tuner, TunerOptions

    layers = [step.layer for step in plan.steps if isinstance(step, TuneBlock)]
    if tuning.blocks is not None and (not layers or tuning.blocks[-1] > layers[-1]):
        raise SchemeError(f"--blocks: there is no block {tuning.blocks[-1]} to tune; the last one is {layers[-1]}")
    view = pruned_view(source, manifest, text_only=options.text_only, mtp=options.mtp).checkpoint
    settings = TunerOptions(precision=tuning.precision, threads=torch.get_num_threads())
    original = source if tuning.recipe.heal else None
    with Tuner(view, tuning.windows, layers, settings, original) as tuner:
        yield tuner


def _heal(given: Mapping[str, Any], options: Mapping[str, Any]) -> Heal | None:
    """What to heal; None without --heal, and with --heal-iters 0, which leaves blocks as they were pruned.

    Raises:
        SchemeError: options of healing without --heal.

    """
    if given["heal"] is None:
        for key in ("heal_iters", "heal_lr"):
            if given[key] is not None:
                raise SchemeError(f"--{key.replace('_', '-')} is for --heal")
        return None
    if given["heal_iters"] == 0:
        return None
    chosen = {"iters": given["heal_iters"], "lr": given["heal_lr"], "batch_size": options["batch_size"]}
    return Heal(what=given["heal"], **{key: value for key, value in chosen.items() if value is not None})


def _refuse_idle(options: Mapping[str, Any], wanted: str) -> None:
    """An option that would do nothing is a misunderstanding."""
    needed = "--method auto-round, but the method is rtn" if wanted == "auto-round" else "--heal, which is not given"
    for name, value in options.items():
        if value not in (None, False, ()):
            raise SchemeError(f"--{name.replace('_', '-')} is for {needed}")
