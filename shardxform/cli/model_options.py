"""Options of the commands that run the model over token windows, and what they come to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from shardxform.calibration import PRESETS, DataOptions, Windows
from shardxform.calibration.documents import local_files
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import tell
from shardxform.errors import OutputError, PlanError

if TYPE_CHECKING:
    from shardxform.forward.weights import Precision

__all__ = [
    "DATA",
    "SCORE_PRESETS",
    "data_options",
    "device_options",
    "dtype_option",
    "load_data",
    "make_precision",
    "precision_options",
    "refuse_no_data",
    "refuse_unwritable",
    "require",
    "sources_option",
]

SCORE_PRESETS: Final = {"reference": "NeelNanda/pile-10k, 256 x 2048, unpacked"}
_DATA_KEYS: Final = ("data", "samples", "seqlen", "seed", "text_key")
_SOURCE_KEYS: Final = ("sources", "by_source")  # which not every command has


class _Data(click.types.StringParamType):
    """A file, a folder or a data set of the hub, as it is given; the shell completes the former two."""

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Have the shell complete names of files and folders."""
        return [CompletionItem(incomplete, type="file")]


DATA: Final = _Data()


def data_options(*, samples: int, presets: Mapping[str, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Which text, and how it is cut into windows; `samples` by default, `presets` with what they stand for."""
    told = "; ".join(f"{name}: {what}" for name, what in presets.items())
    options = (
        click.option("--text-key", metavar="KEY", help="Field or column of the documents.  [default: text]"),
        click.option("--chat-template", is_flag=True, help="Documents are conversations: render the chat template."),
        click.option(
            "--no-pack",
            is_flag=True,
            help="One document a window, cut at --seqlen, shorter ones passed over, in an order that --seed gives.",
        ),
        click.option("--seed", type=click.IntRange(0), help="Where data are sampled.  [default: 42]"),
        click.option("--seqlen", type=click.IntRange(2), help="Tokens of a window.  [default: 2048]"),
        click.option("--samples", type=click.IntRange(1), help=f"Windows.  [default: {samples}]"),
        click.option("--preset", type=click.Choice(sorted(presets)), help=f"{told}."),
        click.option(
            "--data",
            metavar="D",
            type=DATA,
            help="Text: .jsonl, .json, .txt, .md or .parquet file, a directory of them, or a hub data set owner/name.",
        ),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in options:
            function = option(function)
        return function

    return decorate


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names with commas between them."""
    return None if value is None else tuple(name.strip() for name in value.split(","))


sources_option: Final = click.option(
    "--sources",
    metavar="NAME[,NAME]",
    callback=_names,
    help="Take only the documents whose field `source` is one of these.  [default: all]",
)


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where and in what type the model is computed, and where hidden states lie meanwhile."""
    work = click.option(
        "--work",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Directory for hidden states while the command runs; removed at its end.",
    )
    return precision_options(work(function))


def precision_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where and in what type the model is computed."""
    device = click.option(
        "--device", default="cpu", show_default=True, help="Where the model is computed: cpu, cuda, cuda:1."
    )
    return device(dtype_option("float32 on the CPU, bfloat16 elsewhere")(function))


def dtype_option(auto: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """In what type the model is computed; `auto` says what that means when the user says nothing."""
    help_text = f"Of the computation; auto: {auto}.  [default: auto]"
    return click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help=help_text)


def load_data(
    source: Path | Checkpoint,
    given: dict[str, Any],
    *,
    samples: int = 256,
    presets: Mapping[str, DataOptions] = PRESETS,
    against: Checkpoint | None = None,
) -> Windows:
    """Take the data options out of `given`, and read what they name with the tokenizer of the checkpoint.

    A model that is run on the same windows, `against`, must read the same ids in the text.

    Raises:
        RemoteError: the tokenizer is on the hub, which does not give it.
        CheckpointError: the tokenizer is none, or not the model's; see `calibration.load_windows`.
        PlanError: no data named, or none found, or two models that read it otherwise; see there too.

    """
    refuse_no_data(given)
    chosen = {key: value for key in _DATA_KEYS if (value := given.pop(key)) is not None}
    preset, no_pack, chat = given.pop("preset"), given.pop("no_pack"), given.pop("chat_template")
    require("transformers")
    base = presets[preset] if preset else DataOptions(data=chosen["data"], samples=samples)
    chosen |= {key: value for key in _SOURCE_KEYS if (value := given.pop(key, None))}
    options = replace(base, **chosen, pack=base.pack and not no_pack, chat_template=base.chat_template or chat)
    from shardxform.calibration import load_windows

    for checkpoint in (source, against):
        if isinstance(checkpoint, Checkpoint):
            checkpoint.bring()
    root = source.root if isinstance(source, Checkpoint) else source
    windows = load_windows(root, options, against.root if against else None)
    for note in windows.notes:
        tell(f"note: {note}")
    return windows


def refuse_no_data(given: Mapping[str, Any]) -> None:
    """Refuse a command line that names no text, or text that is not there, before anything takes time.

    Raises:
        PlanError: what is there is no data.

    """
    if given["preset"] is None and given["data"] is None:
        raise click.UsageError("Missing option '--data' or '--preset'.")
    if given["data"] is not None:
        local_files(given["data"])


def refuse_unwritable(path: Path) -> None:
    """Refuse a name for a result that could not be written at the end of hours of work.

    Raises:
        OutputError: a directory, or a name in a directory that is missing or may not be written to.

    """
    if path.is_dir():
        raise OutputError(f"{path}: expected the name of a file, found a directory")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: no directory {path.parent} to write it to")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the directory {path.parent} is not writable")


def make_precision(device: str, dtype: str | None, *, tunes: bool = False, here: bool = True) -> Precision:
    """Find the device.

    Args:
        device: as torch names it.
        dtype: float32 or bfloat16; auto, or None, is bfloat16 on accelerators, and for tuning on a CPU that multiplies
            it: half the time (benchmarks/README.md) for results as good (docs/quantization.md).
        tunes: whether it is to tune, rather than to measure.
        here: whether this machine must have the device, rather than those of a cluster.

    Raises:
        PlanError: torch or transformers is not installed, or there is no such device here.

    """
    require("torch", "transformers")
    import torch
    from transformers.utils import logging

    from shardxform.forward.weights import Precision

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        place = torch.device(device)
        if here:
            torch.zeros(1, dtype=torch.float64, device=place).item()  # sums over tokens are
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as e:
        raise PlanError(f"--device {device}: {str(e).splitlines()[0]}") from e
    if dtype in ("auto", None):
        dtype = "bfloat16" if place.type != "cpu" or (tunes and _cpu_multiplies_bfloat16()) else "float32"
    return Precision(place, getattr(torch, dtype))


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; without them products in bfloat16 are slower than in float32."""
    import torch

    can: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def require(*libraries: str, extra: str = "models") -> None:
    """Refuse to go on without libraries that only some commands need.

    Raises:
        PlanError: names what is missing and how to get it.

    """
    for name in libraries:
        if find_spec(name) is None:
            raise PlanError(f"this command needs {name}: pip install 'shardxform[{extra}]'")
