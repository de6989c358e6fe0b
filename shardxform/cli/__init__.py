"""The command line: parse, call the library, print. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
from typing import Any, Final

import click

from shardxform.base import interrupts
from shardxform.cli.console import tell, with_options
from shardxform.errors import ShardxformError, UnknownFamilyError

__all__ = ["main"]

_COMMANDS: Final = {
    "inspect": "Show what a checkpoint is made of, from its headers alone.",
    "compress": "The whole way: score, select, prune and quantize, verify, evaluate, card; resumable.",
    "prune": "Keep the experts that a manifest names; copy everything else byte for byte.",
    "quantize": "Round weights to 4 or 8 bits, tuned on text if wanted, pruned in the same pass by a manifest.",
    "convert": "Write a quantized checkpoint in another format or expert spelling, or in 16 bits.",
    "verify": "Check a checkpoint, and prove it against the source it was made from.",
    "score": "Run a model over calibration data, block by block, and say what every expert did.",
    "select": "Choose the experts to keep from a saliency file; write the keep manifest.",
    "evaluate": "Perplexity of a checkpoint on held-out text, and its distance from a reference.",
    "saliency": "Show saliency files, and add them up.",
    "card": "Make the model card of an output, from its own record.",
    "push": "Publish an output on the hub: verified, resumable, in one commit.",
    "doctor": "Show what this machine has, and which commands that is enough for.",
    "manifest": "Show, check and convert keep manifests.",
    "families": "List the families that are known, and what works for each.",
    "family": "Draft the entry of a family that is not built in, for --family.",
}


class _Lazy(click.Group):
    """A group that imports a command only to run it, and maps the library's errors to exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(f"shardxform.cli.{cmd_name}"), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        for stream in (sys.stdout, sys.stderr):  # a path that is no text must not cost the result of hours
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where an error can still be told
            return result
        except ShardxformError as e:
            message, code = _told(e), e.exit_code
        except KeyboardInterrupt:
            message, code = interrupts.STOPPED, 130
        except OSError as e:
            if e.errno == errno.EPIPE:  # click ends quietly
                raise
            message, code = f"{e.filename or 'output'}: {e.strerror or e}", 1
            _drop_stdout()
        except Exception:
            if not interrupts.asked():
                raise
            message, code = interrupts.STOPPED, 130
        if interrupts.asked() and code != 130:  # what failed because of it
            message, code = interrupts.STOPPED, 130
        if code != 130 or interrupts.say_once():
            tell(f"shardxform: {message}")
        return ctx.exit(code)


def _told(error: ShardxformError) -> str:
    """What a person should read, and do, about an error."""
    way_out = "; --family names the file of another one, and `shardxform family draft` makes one"
    return with_options(str(error)) + (way_out if isinstance(error, UnknownFamilyError) else "")


def _drop_stdout() -> None:
    """Send what is still buffered nowhere: the interpreter would try it again on its way out, and fail again."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from shardxform.cli.doctor import version_lines

        click.echo("\n".join(version_lines()))
        ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version, and those of the libraries that are installed.",
)
def main() -> None:
    """Score, prune, quantize and verify huge Mixture-of-Experts checkpoints on a machine that could never load them.

    What moves or rounds weights takes a few hundred MB of memory; what runs the model holds one decoder block of it.

    SRC and OUT are checkpoint directories: config.json beside .safetensors shards. A command that was interrupted
    goes on where it stopped when it is run again.
    """
