"""Options of the command line that several commands have, in groups: each is declared once, by a field. See `flags`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, get_args

import click

from shardxform.ask.recipe import BATCH_SIZE, HEAL_ITERS, ITERS, MAX_EXTRA, ROUTED, Heal, HealedAs, Inputs, What
from shardxform.cli.flags import (
    ADDRESS,
    AT_LEAST_1,
    AT_LEAST_2,
    BLOCKS,
    DATA,
    GGUF_TYPE,
    NAMES,
    PATH,
    SIZE,
    SOURCE,
    STEPS,
    TIME,
    Flags,
    Healed,
    Source,
    command,
    given,
    option,
    refuse_idle,
)
from shardxform.errors import SchemeError
from shardxform.formats.scheme import PRESETS, ExpertNames, Format, Grid, ScaleGrid, Scheme, usual_group_size
from shardxform.model.families import in_use
from shardxform.plan.view import DEFAULT_GGUF_BYTES, DEFAULT_SHARD_BYTES, GgufOptions, MtpMode, ViewOptions

if TYPE_CHECKING:
    from shardxform.calibration.options import DataOptions

__all__ = [
    "DATA",
    "FIRST_CLIP_STEP",
    "FIRST_STEP",
    "PATH",
    "SOURCE",
    "BatchFlags",
    "ComputeFlags",
    "DryFlags",
    "FamilyFlags",
    "Flags",
    "GgufFlags",
    "GgufTypeFlags",
    "HealEncodingFlags",
    "HealFlags",
    "HealOnlyRequest",
    "HealRequest",
    "HubFlags",
    "JobFlags",
    "JsonFlags",
    "Method",
    "PruneFlags",
    "QuietFlags",
    "RayFlags",
    "RoundingFlags",
    "SchemeFlags",
    "Source",
    "SpellingFlags",
    "TextFlags",
    "TransferFlags",
    "TuneRequest",
    "ViewFlags",
    "WorkFlags",
    "WriteFlags",
    "command",
    "given",
    "option",
    "out_argument",
    "refuse_idle",
    "source_argument",
]

Method = Literal["rtn", "auto-round"]

_DEFAULT_JOBS: Final = min(4, os.cpu_count() or 1)
_SEQLEN, _SEED = 2048, 42


source_argument = click.argument("source", metavar="SRC", type=SOURCE)
out_argument = click.argument("out", metavar="OUT", type=PATH)


# -- what an output holds, and how it is stored -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneFlags(Flags, heading="What OUT holds"):
    """By which manifest experts are taken out."""

    manifest: Path | None = option(
        "Experts to keep, in any of the forms that manifests/ lists.", "-m", metavar="FILE", first=True
    )
    any_source: bool = option(
        "Prune by a manifest that was chosen on another checkpoint, such as the model that SRC was tuned from.",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewFlags(Flags, heading="What OUT holds"):
    """Which tensors an output holds beside the experts."""

    text_only: bool = option("Drop the vision tower and write the text-only class.", default=False)
    mtp: MtpMode = option(
        "Multi-token-prediction layers: keep prunes them by the manifest's mtp_keep, drop removes them, "
        "auto keeps them when that list is there or nothing is pruned.",
        default="auto",
    )

    def view(self, output: WriteFlags, gguf: GgufOptions | None = None) -> ViewOptions:
        """What the library calls it, with shards as large as the output's options say."""
        size = output.shard_bytes(gguf=gguf is not None)
        return ViewOptions(text_only=self.text_only, mtp=self.mtp, max_shard_bytes=size, gguf=gguf)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpellingFlags(Flags, heading="How weights are stored"):
    """How the parts of quantized experts are called."""

    expert_names: ExpertNames = option(
        "split: experts.{id}.gate_proj; fused-indexed: experts.gate_up_proj.{id}, which current clients refuse.",
        default="split",
    )
    g_idx: bool = option("Also write the identity g_idx, which llama.cpp wants of gptq.", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFlags(Flags, heading="How weights are stored"):
    """What a GGUF file is beside what it holds."""

    pre_tokenizer: str | None = option(
        "llama.cpp's name of the way in which text is split, where the tokenizer does not tell it; for GGUF.",
        metavar="NAME",
    )

    def read(self, *, gguf: bool) -> GgufOptions | None:
        """What the library calls it; None for other formats.

        Raises:
            SchemeError: options of GGUF for another format.

        """
        if not gguf:
            refuse_idle(self, wanted="GGUF")
            return None
        return GgufOptions(pre_tokenizer=self.pre_tokenizer or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTypeFlags(GgufFlags):
    """The same for weights that no scheme rounds."""

    gguf_type: str | None = option(
        "Round weights as llama-quantize does for files of this type, such as Q4_K_M; for GGUF.  [default: as in SRC]",
        type=GGUF_TYPE,
        metavar="TYPE",
    )

    def read(self, *, gguf: bool) -> GgufOptions | None:
        """As of all GGUF files."""
        found = GgufFlags.read(self, gguf=gguf)
        return replace(found, kind=self.gguf_type or "") if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeFlags(SpellingFlags):
    """Which weights are rounded, to what, and how clients find them."""

    scheme: Literal["W4A16", "W8A16"] = option("Bits of the weights.", default="W4A16", first=True)
    format: Format = option("How clients find the weights.", default="auto-round", first=True)
    group_size: Literal["128", "64", "32", "-1"] | None = option(
        "Input columns that share a scale; -1 for one scale per row.  [default: 128; for mlx and gguf 32]"
    )
    search: bool | None = option(
        "Search each group's scale for the least squared weight error; helps at 4 bits, not at 8.  [default: "
        "with auto-round, as its start]",
        "--search/--no-search",
    )
    scale_grid: ScaleGrid = option(
        "bf16: scales exact in bfloat16 and float16, so that every client computes the same; fp16: auto-round's.",
        default="bf16",
    )
    keep_16bit: tuple[str, ...] = option(
        "Leave modules that match as they are; repeatable.", default=(), metavar="PATTERN"
    )
    also_quantize: tuple[str, ...] = option(
        "Quantize modules that match although they would stay as they are; repeatable.", default=(), metavar="PATTERN"
    )
    requantize: bool = option(
        "Round anew weights that SRC holds in as few bits or fewer; else integers stay as they are, where --scheme and "
        "--group-size are theirs, and other such sources are refused.",
        default=False,
    )

    def read(self, *, tuned: bool) -> Scheme:
        """The scheme; `tuned` rounding starts from searched scales unless told otherwise."""
        grid = Grid(
            bits=PRESETS[self.scheme],
            group_size=int(self.group_size or usual_group_size(self.format)),
            scale_grid=self.scale_grid,
            search=tuned if self.search is None else self.search,
        )
        return Scheme(
            grid=grid,
            format=self.format,
            expert_names=self.expert_names,
            g_idx=self.g_idx,
            keep_16bit=self.keep_16bit,
            quantize=self.also_quantize,
            requantize=self.requantize,
        )


# -- what is tuned, and on which text ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HealFlags(Flags, heading="Healing"):
    """How pruned blocks are made to do what the unpruned ones did."""

    heal: What | None = option(
        "After pruning, tune each block's 16-bit weights on --data until it does what the unpruned block did: "
        "the router, the shared experts too, the routed experts, all MoE weights, or the whole block; auto: the whole "
        "block, or the shared experts where that is worse.  [alone: auto; then put it after SRC and OUT, or write "
        "--heal=auto]",
        type=Healed(list(get_args(What))),
        is_flag=False,
        flag_value="auto",
        first=True,
    )
    heal_iters: tuple[int, ...] | None = option(
        f"Steps of healing a block, or of each that is healed, with commas between them.  [default: {HEAL_ITERS}]",
        type=STEPS,
        multiple=False,
        metavar="N[,N]",
    )
    heal_time: int | None = option(
        "Instead of steps, the time to heal all blocks in, such as 90m or 2h: more of it goes to blocks whose held-out "
        "error falls more.",
        type=TIME,
    )
    heal_lr: float | None = option(
        "First step of healing, as a part of a weight matrix's root mean square.  [default: by the amount of data]",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="R",
    )
    heal_extra: int | None = option(
        "Windows to heal on beside those of --data, made of pieces of it and of tokens from the whole vocabulary: for "
        "little text.  [default: none]",
        type=click.IntRange(0, MAX_EXTRA),
    )

    merge: bool = option(
        "Begin with pruned experts merged into those that stay (REAM), in each block as far as held-out windows of "
        "--data say; alone: that and nothing more.",
        default=False,
    )

    def read(self, batch_size: int | None) -> Heal | None:
        """What to heal and to merge; None without either, and with --heal-iters 0, which leaves blocks as pruned.

        Raises:
            SchemeError: options of healing without --heal.

        """
        if self.heal is None:
            refuse_idle(self, "heal_iters", "heal_time", "heal_lr", "heal_extra", wanted="--heal")
        if self.heal_iters is not None and self.heal_time is not None:
            raise SchemeError("--heal-time decides how many steps there are; leave out --heal-iters")
        if not self.asked or self.none:
            return None
        given = self.heal_iters or (HEAL_ITERS if self.heal else 0,)
        return Heal(
            what=self.heal or ROUTED,
            merge=self.merge,
            iters=given[0] if len(given) == 1 else HEAL_ITERS,
            schedule=given if len(given) > 1 else (),
            seconds=self.heal_time or 0,
            lr=self.heal_lr,
            batch_size=batch_size or BATCH_SIZE,
            extra=self.heal_extra or 0,
        )

    @property
    def asked(self) -> bool:
        """Whether pruned blocks are to be changed."""
        return self.heal is not None or self.merge

    @property
    def none(self) -> bool:
        """Whether no step is asked for, and no merging, which leaves blocks as they were pruned."""
        return self.heal_iters == (0,) and not self.merge


@dataclass(frozen=True, slots=True, kw_only=True)
class HealEncodingFlags(HealFlags):
    """How pruned blocks are healed, and written where nothing is rounded."""

    heal_encoding: HealedAs | None = option(
        "How healed weights are written that SRC has quantized: rounded to what they are in SRC, or in 16 bits, as the "
        "quantization config then says.  [default: source]"
    )

    def read(self, batch_size: int | None) -> Heal | None:
        """What to heal, and how it is written; as of `HealFlags`."""
        if not self.asked:
            refuse_idle(self, "heal_encoding", wanted="--heal or --merge")
        heal = HealFlags.read(self, batch_size)
        return replace(heal, encoding=self.heal_encoding) if heal else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFlags(Flags, heading="Tuning"):
    """How many windows a step of healing or tuning sees."""

    batch_size: int | None = option(f"Windows of a step.  [default: {BATCH_SIZE}]", type=AT_LEAST_1)


FIRST_STEP: Final[Any] = option(
    "First step of rounding offsets, in scales; those after it fall to zero.  [default: 1 / --iters]",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="R",
)

FIRST_CLIP_STEP: Final[Any] = option(
    "First step of scales, each in parts of itself.  [default: a quarter of --lr]",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="R",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingFlags(BatchFlags):
    """How weights are rounded."""

    method: Method = option(
        "rtn: round to nearest, without data. auto-round: tune the rounding of each block on calibration data, --data.",
        default="rtn",
        first=True,
    )
    iters: int | None = option(f"Steps a block.  [default: {ITERS}]", type=AT_LEAST_1)
    lr: float | None = FIRST_STEP
    minmax_lr: float | None = FIRST_CLIP_STEP
    inputs: Inputs | None = option(
        "Tune a block on what the tuned blocks before it put out, or on what the 16-bit ones do, which makes "
        "blocks independent.  [default: quantized]",
    )
    blocks: range | None = option(
        "Tune these decoder blocks only, such as 0-9, and others elsewhere; needs --inputs fp.", type=BLOCKS
    )
    join: tuple[Path, ...] = option(
        "Take over the blocks that the same command with --blocks has tuned in PART; repeatable.",
        default=(),
        metavar="PART",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFlags(Flags, heading="Text"):
    """Which text, and how it is cut into windows."""

    usual_samples: ClassVar[int] = 256

    data: str | None = option(
        "Text: .jsonl, .json, .txt, .md or .parquet file, a directory of them, or a hub data set owner/name.",
        metavar="D",
        type=DATA,
        first=True,
    )
    samples: int | None = option(f"Windows.  [default: {usual_samples}]", type=AT_LEAST_1)
    seqlen: int | None = option(f"Tokens of a window.  [default: {_SEQLEN}]", type=AT_LEAST_2)
    seed: int | None = option(f"Where data are sampled.  [default: {_SEED}]", type=click.IntRange(0))
    no_pack: bool = option(
        "One document a window, cut at --seqlen, shorter ones passed over, in an order that --seed gives.",
        default=False,
    )
    chat_template: bool = option("Documents are conversations: render the chat template.", default=False)
    text_key: str | None = option("Field or column of the documents.  [default: text]", metavar="KEY")
    text_sources: tuple[str, ...] | None = option(
        "Take only the documents whose field `source` is one of these.  [default: all]",
        metavar="NAME[,NAME]",
        type=NAMES,
        multiple=False,
    )

    def read(self) -> DataOptions:
        """What the library calls it; the text must be named.

        Raises:
            PlanError: numbers that no data could satisfy.

        """
        from shardxform.calibration.options import DataOptions  # most commands read no text

        return DataOptions(
            data=self.data or "",
            samples=self.samples or self.usual_samples,
            seqlen=self.seqlen or _SEQLEN,
            seed=_SEED if self.seed is None else self.seed,
            pack=not self.no_pack,
            chat_template=self.chat_template,
            text_key=self.text_key or "",
            sources=self.text_sources or (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningTextFlags(TextFlags):
    """The text that blocks are healed and tuned on."""

    usual_samples: ClassVar[int] = 128  # auto-round's

    samples: int | None = option(f"Windows.  [default: {usual_samples}]", type=AT_LEAST_1)


# -- the machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFlags(Flags, heading="Machine"):
    """Where and in what type numbers are computed."""

    device: str = option(
        "Where the model is computed, and weights are rounded, to the same bits everywhere: cpu, or a torch device "
        "such as cuda:0.",
        default="cpu",
    )
    dtype: Literal["auto", "float32", "bfloat16"] | None = option(
        "Of the computation; auto: float32 on the CPU, bfloat16 elsewhere, and for healing and tuning on a CPU that "
        "has instructions for it.  [default: auto]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFlags(Flags, heading="Machine"):
    """How much is done at a time."""

    jobs: int | None = option(
        f"Steps at a time; the bytes are the same.  [default: {_DEFAULT_JOBS}]", "-j", type=click.IntRange(1, 64)
    )

    @property
    def count(self) -> int:
        """How many, whether given or not."""
        return self.jobs or _DEFAULT_JOBS


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFlags(Flags, heading="Family"):
    """Families that are not built in."""

    family: tuple[Path, ...] = option(
        "Also know the family of this file, which is executed: name only what you would run. `shardxform family draft` "
        "makes one; repeatable.",
        default=(),
        metavar="FILE.py",
    )

    def load(self) -> None:
        """Have them known, and none that was named before.

        Raises:
            FamilyError: see `family_files.load_files`.

        """
        if self.family or in_use():
            from shardxform.model.family_files import load_files  # most commands need none

            load_files(self.family)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFlags(Flags, heading="Machine"):
    """How a repository of the hub is read."""

    connections: int | None = option(
        "Requests at a time to the hub, where a checkpoint is there.  [default: 4]", type=click.IntRange(1, 64)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFlags(HubFlags):
    """How a repository of the hub is read by a command that runs the model."""

    cache_limit: int | None = option(
        "Most disk that what was fetched of the hub takes while the model is run; what is only copied or rounded "
        "takes none.  [default: 10GB]",
        type=SIZE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RayFlags(Flags, heading="Machine"):
    """On which machines steps are done."""

    ray: str | None = option(
        "Do the steps on a Ray cluster: at HOST:PORT; auto, the one that this machine belongs to; by itself, one of "
        "this machine alone. All machines share the file system of SRC and OUT. The bytes are the same.",
        metavar="[HOST:PORT|auto]",
        is_flag=False,
        flag_value="local",
        type=ADDRESS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkFlags(Flags, heading="Machine"):
    """Where hidden states lie."""

    work: Path | None = option("Directory for hidden states while the command runs; removed at its end.", metavar="DIR")


# -- what several commands take together ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HealRequest(Flags):
    """What is asked of a command that heals."""

    rounding: BatchFlags
    healing: HealFlags
    text: TuningTextFlags
    computation: ComputeFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class HealOnlyRequest(HealRequest):
    """What is asked of a command that rounds nothing."""

    healing: HealEncodingFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest(HealRequest):
    """What is asked of a command that tunes the rounding too."""

    rounding: RoundingFlags


# -- what is printed and written --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFlags(Flags, heading="Output"):
    """How the result is printed."""

    as_json: bool = option("Print the result as JSON on stdout.", "--json", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuietFlags(JsonFlags):
    """Output of a command that shows progress."""

    quiet: bool = option("No progress on stderr.", "-q", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryFlags(QuietFlags):
    """Output of a command that takes long, or writes."""

    dry_run: bool = option("Say what would be done and what it takes; nothing is written.", default=False, first=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFlags(DryFlags):
    """Output of a command that writes a checkpoint."""

    force: bool = option(
        "Start over in an OUT that shardxform made from other inputs. Never touches files it did not write.",
        default=False,
    )
    max_shard_size: int | None = option(
        "Most tensor data in one shard, in decimal units.  [default: 5GB; of GGUF 48GB]", type=SIZE
    )

    def shard_bytes(self, *, gguf: bool) -> int:
        """Most tensor data in one shard, whether given or not."""
        return self.max_shard_size or (DEFAULT_GGUF_BYTES if gguf else DEFAULT_SHARD_BYTES)
