"""`shardxform compress`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shardxform.ask.recipe import BATCH_SIZE
from shardxform.base.option_names import in_stage
from shardxform.calibration.documents import local_files
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.compress_report import show_forecast, show_outcome
from shardxform.cli.console import Label, count, progress, short, tell
from shardxform.cli.model_options import DATA, data_options, load_data, make_precision, precision_options, require
from shardxform.cli.options import out_argument, read_scheme, run_options, scheme_options, view_options
from shardxform.cli.sources import Source, open_given, source_argument, transfer_options
from shardxform.cli.tune_options import heal_flags, read_tuning, refuse_unpruned
from shardxform.compress.request import CompressOptions, Pruning, Request
from shardxform.errors import PlanError, SchemeError
from shardxform.experts.choosing import CRITERIA, DEFAULT
from shardxform.plan.prune import ViewOptions

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.cli.tune_options import Tuning
    from shardxform.forward.weights import Precision

__all__ = ["command"]

_DATA_KEYS: Final = ("data", "preset", "samples", "seqlen", "seed", "no_pack", "chat_template", "text_key")
_TUNE_SAMPLES, _TUNE_SEQLEN, _TUNE_ITERS = 64, 512, 50  # a quarter of the steps gives nearly all of the gain
_TUNE_KEYS: Final = ("iters", "batch_size", "tune_samples", "tune_seqlen")
_PRESETS: Final = {
    "reference": "NeelNanda/pile-10k, unpacked: experts scored on 256 x 2048; rounding tuned on 64 x 512, 200 steps "
    "of one window"
}


def _compress_options(function: Any) -> Any:  # noqa: ANN401
    """What no other command has, or has with other defaults."""
    for option in (
        click.option("--verbose", "-v", is_flag=True, help="Also print what every stage and every block took."),
        click.option(
            "--work",
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="Directory for what the stages give, and for hidden states of scoring and evaluating.  [default: "
            "OUT.compress]",
        ),
        click.option("--plot", is_flag=True, help="Also draw the choice of experts, and the blocks' errors, as PNG."),
        click.option("--full-verify", is_flag=True, help="Verify all data of OUT against SRC, not headers alone."),
        click.option("--eval-seqlen", type=click.IntRange(2), help="Tokens of such a window.  [default: 2048]"),
        click.option("--eval-samples", type=click.IntRange(1), help="Windows of it.  [default: 256]"),
        click.option(
            "--eval-data",
            metavar="D",
            type=DATA,
            help="Held-out text, as --data: also measure OUT against SRC on it.",
        ),
    ):
        function = option(function)
    return function


def _tune_options(function: Any) -> Any:  # noqa: ANN401
    """How the rounding is tuned; less by default than `quantize` does, so that it ends on a CPU."""
    for option in (
        click.option("--batch-size", type=click.IntRange(1), help=f"Windows of a step.  [default: {BATCH_SIZE}]"),
        click.option("--iters", type=click.IntRange(1), help=f"Steps of tuning a block.  [default: {_TUNE_ITERS}]"),
        click.option(
            "--tune-seqlen",
            type=click.IntRange(2),
            help=f"Tokens of such a window.  [default: --seqlen, or {_TUNE_SEQLEN}]",
        ),
        click.option(
            "--tune-samples",
            type=click.IntRange(1),
            help=f"Windows of --data that the rounding is tuned on.  [default: --samples, or {_TUNE_SAMPLES}]",
        ),
        click.option(
            "--method",
            type=click.Choice(["rtn", "auto-round"]),
            default="auto-round",
            show_default=True,
            help="auto-round: tune the rounding of each block on the data. rtn: round to nearest, in minutes.",
        ),
    ):
        function = option(function)
    return function


@click.command("compress")
@source_argument
@out_argument
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Experts to keep in every layer.")
@click.option(
    "--ratio", type=float, metavar="R", help="Or the share of them to remove, such as 0.5. Neither: all are kept."
)
@click.option(
    "--criterion", type=click.Choice(list(CRITERIA)), help=f"What experts are chosen by.  [default: {DEFAULT}]"
)
@click.option(
    "--protect-super-experts",
    "protect",
    is_flag=True,
    help="Keep experts with outlying activations, whatever they score.",
)
@data_options(samples=256, presets=_PRESETS)
@_tune_options
@heal_flags
@scheme_options
@_compress_options
@precision_options
@view_options
@transfer_options
@run_options
def command(source: Source, out: Path, **given: Any) -> None:  # noqa: ANN401
    """Make OUT of SRC: choose experts, prune, round to 4 bits, verify and measure, each as its own command does.

    score runs SRC over --data, 256 windows of 2048 tokens unless --samples and --seqlen say; select chooses the experts
    that stay, by --keep or --ratio, and without these all stay; quantize writes OUT, pruned and rounded in one pass,
    the rounding tuned on 64 windows of 512 tokens of --data; verify holds OUT against SRC; evaluate measures both,
    with --eval-data. --dry-run predicts memory and disk from headers, and time from a measurement of this machine.

    A model card, OUT/README.md, says what came of it. What the stages gave lies in OUT.compress, and is kept:
    saliency.safetensors, keep.json, evaluation.json.
    Interrupted, the same command goes on where it stopped; a stage that is done is not done again. With other options
    it refuses to go on; --force then makes again what depends on them, and keeps what the other stages gave.
    """
    _refuse_idle(given)
    quiet, as_json, verbose = given["quiet"], given["as_json"], given["verbose"]
    (checkpoint,) = open_given([source], given, out.parent)
    request = _request(checkpoint, out, given)
    options = CompressOptions(**{key: given[key] for key in ("jobs", "device", "force", "full_verify", "plot")})
    from shardxform.compress import compress, plan_compress

    prepared = plan_compress(request, force=options.force)
    if given["dry_run"]:
        show_forecast(prepared, options, as_json=as_json)
        return
    for note in prepared.sketch.notes:
        tell(f"note: {note}")
    watcher = _Watcher(request, Label("compress"))
    with progress(watcher.label, quiet) as on_progress:
        outcome = compress(prepared, options, on_stage=None if quiet else watcher, on_progress=on_progress)
    show_outcome(outcome, source, as_json=as_json, verbose=verbose)


# -- what is asked for ------------------------------------------------------------------------------------------------


def _prunes(given: Mapping[str, Any]) -> bool:
    return given["keep"] is not None or given["ratio"] is not None


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """An option that would do nothing is a misunderstanding."""
    prunes, measures = _prunes(given), given["eval_data"] is not None
    tunes = given["method"] == "auto-round" or given["heal"] is not None
    if given["keep"] is not None and given["ratio"] is not None:
        raise click.UsageError("give either --keep or --ratio")
    refuse_unpruned(given, True if prunes else None, "--keep or --ratio")
    idle: dict[str, tuple[bool, tuple[str, ...]]] = {
        "choosing experts: give --keep or --ratio": (prunes, ("criterion", "protect")),
        "--method auto-round, but the method is rtn": (tunes, _TUNE_KEYS),
        "choosing experts and tuning: give --keep, --ratio or --method auto-round": (prunes or tunes, _DATA_KEYS),
        "measuring OUT: give --eval-data": (measures, ("eval_samples", "eval_seqlen")),
        "choosing experts and measuring: give --keep, --ratio or --eval-data": (prunes or measures, ("plot",)),
    }
    for what, (used, names) in idle.items():
        for name in names:
            if not used and given[name] not in (None, False):
                option = {"protect": "protect-super-experts"}.get(name, name.replace("_", "-"))
                raise SchemeError(f"--{option} is for {what}")
    if (prunes or tunes) and given["data"] is None and given["preset"] is None:
        less = "" if prunes else "; --method rtn needs no text"
        raise click.UsageError(f"Missing option '--data' or '--preset'{less}.")
    for text in filter(None, (given["data"], given["eval_data"])):
        local_files(text)
    if given["plot"]:
        require("matplotlib", extra="plot")


def _request(source: Checkpoint, out: Path, given: Mapping[str, Any]) -> Request:
    prunes, tunes = _prunes(given), given["method"] == "auto-round"
    measures = given["eval_data"] is not None
    precision = _precision(given) if prunes or tunes or measures else None
    tuning = _tuning(source, given) if tunes or given["heal"] else None
    return Request(
        source=source,
        out=out,
        scheme=read_scheme(dict(given), tuned=tunes),
        view=ViewOptions(text_only=given["text_only"], mtp=given["mtp"], max_shard_bytes=given["max_shard_size"]),
        pruning=_pruning(given) if prunes else None,
        score_windows=load_data(source, _data(given)) if prunes else None,
        tune_windows=tuning.windows if tuning else None,
        recipe=tuning.recipe if tuning else None,
        eval_windows=_eval_windows(source, given) if measures else None,
        precision=precision,
        work=given["work"],
    )


def _precision(given: Mapping[str, Any]) -> Precision:
    return make_precision(given["device"], given["dtype"])


def _pruning(given: Mapping[str, Any]) -> Pruning:
    criterion = given["criterion"] or DEFAULT
    return Pruning(keep=given["keep"], ratio=given["ratio"], criterion=criterion, protect=given["protect"])


def _data(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: given[key] for key in _DATA_KEYS}


def _tuning(source: Checkpoint, given: Mapping[str, Any]) -> Tuning | None:
    data = _data(given)
    usual = {"samples": _TUNE_SAMPLES, "seqlen": _TUNE_SEQLEN}
    for key, value in usual.items():
        data[key] = given[f"tune_{key}"] or data[key] or (None if data["preset"] else value)
    steps = given["iters"] or (None if data["preset"] or given["method"] == "rtn" else _TUNE_ITERS)
    asked = {"iters": steps, "batch_size": given["batch_size"], "merge": ()}
    asked |= {"inputs": None, "blocks": None, "dtype": given["dtype"]}
    asked |= {key: given[key] for key in ("heal", "heal_iters", "heal_lr")}
    return read_tuning(given["method"], source, given["device"], {**asked, **data})


def _eval_windows(source: Checkpoint, given: Mapping[str, Any]) -> Windows:
    if given["eval_data"] == given["data"]:
        tell("note: --eval-data is the text that OUT was made with: the figures will flatter it")
    asked = {"data": given["eval_data"], "samples": given["eval_samples"], "seqlen": given["eval_seqlen"]}
    others = dict.fromkeys(("preset", "seed", "text_key"))
    try:
        return load_data(source, {**asked, **others, "no_pack": False, "chat_template": False})
    except PlanError as e:
        raise PlanError(in_stage(str(e), "evaluate")) from e


# -- what is said meanwhile -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Says on stderr which stage begins, and has the progress named after it."""

    request: Request
    label: Label

    def __call__(self, number: int, total: int, stage: str, *, done: bool) -> None:
        self.label.text = f"[{number}/{total}] {stage}"
        tell(f"[{number}/{total}] {stage}: " + ("done already" if done else self._what(stage)))

    def _what(self, stage: str) -> str:
        request = self.request
        if stage == "score":
            return f"{request.source.where} over {_size(request.score_windows)}"
        if stage == "select":
            pruning = request.pruning
            assert pruning is not None
            kept = f"{pruning.keep} experts of each layer stay"
            return f"by {pruning.criterion}, " + (f"{pruning.ratio:g} of the experts go" if pruning.ratio else kept)
        if stage == "quantize":
            return f"{request.out}, {request.scheme.grid.bits} bits, {request.scheme.format}{self._tuned()}"
        if stage == "verify":
            return f"{request.out} against {request.source.where}"
        if stage == "card":
            return f"of {request.out}"  # no README.md: it may be somebody else's, and stay
        return f"{request.out} against {request.source.where} over {_size(request.eval_windows)}"

    def _tuned(self) -> str:
        recipe = self.request.recipe
        if recipe is None:
            return ""
        done = [what for what, asked in (("healed", recipe.heal is not None), ("tuned", recipe.iters > 0)) if asked]
        return f", {' and '.join(done)} on {_size(self.request.tune_windows)}"


def _size(windows: Windows | None) -> str:
    assert windows is not None
    return f"{count(len(windows.ids_NT), 'window')}, {short(windows.ids_NT.size)} tokens"
