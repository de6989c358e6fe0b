"""What a card says, as values: nothing here reads, computes or words anything. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "BlockError",
    "CardFacts",
    "Change",
    "Data",
    "EvaluationFacts",
    "HealedBlock",
    "HealingFacts",
    "Origin",
    "PruningFacts",
    "QuantizationFacts",
    "StepFacts",
    "TaskFacts",
]


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of the source and of the output; None where the source's is not known."""

    before: int | None
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What the output was made from, and under which licence; empty where nothing says so.

    Attributes:
        base_model: hub name `owner/name`.
        license, license_name, license_link: as in a hub's front matter.
        languages: codes.

    """

    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Text that was cut into `samples` windows of `seqlen` tokens.

    Attributes:
        content: a SHA-256, or a commit of the hub.
        sources: of whose documents alone; empty for all.

    """

    name: str
    samples: int | None = None
    seqlen: int | None = None
    tokens: int | None = None
    content: str = ""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningFacts:
    """Which experts were kept, as far as a manifest says why.

    Attributes:
        criterion: what experts were ranked by, such as `reap`; empty when no manifest was given.
        tokens: that the ranking was made on.
        data: the text of it.
        saliency_kept: per layer, share of the criterion's sum that the kept experts have.
        never_reached_kept: kept experts that no token of the text reached, in all layers.
        channels: of every expert, before and after; None where all of them stayed.

    """

    criterion: str = ""
    tokens: int | None = None
    data: tuple[Data, ...] = ()
    saliency_kept: tuple[float, ...] = ()
    never_reached_kept: int | None = None
    channels: Change | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockError:
    """Squared error of a block's output, rounded to nearest and tuned; None where it was not tuned.

    `ratio_error` is the standard error of tuned / rounded; None where it is not known.
    """

    layer: int
    rounded: float | None
    tuned: float | None
    ratio_error: float | None = None
    never_reached: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealedBlock:
    """Squared error of a block's output as it was pruned and as it is after `iters` steps.

    `what` is empty where no step was taken; `iters` is None in earlier records, which had one number for all. `merged`
    is how far it began on the way to experts that pruned ones are merged into.
    """

    layer: int
    pruned: float | None
    healed: float | None
    what: str
    ratio_error: float | None = None
    iters: int | None = None
    merged: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealingFacts:
    """How the 16-bit weights of pruned blocks were tuned.

    Attributes:
        what: which weights, a name of `recipe.HEALED` or `auto`.
        iters, batch_size: steps a block, windows of a step; no `iters` where each block has its own.
        seconds: time that decided the steps of each block; 0 where none did.
        data: calibration text.
        encoding: how weights were written that the source has in small floats; empty where it has none.
        extra: windows that were made of pieces of the text.
        merge: whether blocks could begin with pruned experts merged into those that stay.
        blocks: in their order.

    """

    what: str
    iters: int | None
    batch_size: int | None
    data: Data | None
    encoding: str = ""
    extra: int = 0
    merge: bool = False
    seconds: int = 0
    blocks: tuple[HealedBlock, ...] = ()

    @property
    def merged(self) -> int:
        """Number of blocks that began on the way to merged experts."""
        return sum(block.merged > 0 for block in self.blocks)

    @property
    def only_merged(self) -> bool:
        """Whether no step of healing was asked for."""
        return self.merge and self.iters == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationFacts:
    """How weights are stored.

    Attributes:
        bits, group_size, format: as in the scheme; a group size of -1 is one scale a row.
        expert_names: `split`, or `fused-indexed`, which current clients refuse.
        modules: how many are quantized.
        g_idx: whether the order of columns is stored, which llama.cpp wants of `gptq`.
        method: `rtn` or `auto-round`; empty where the record does not say.
        search: whether scales were searched.
        data, recipe: calibration text and settings of tuned rounding.
        blocks: errors of tuned blocks.
        judged_apart: whether these are on windows that were not tuned on; None where the record does not say.
        types: of the blocks of a GGUF file.

    """

    bits: int
    group_size: int
    format: str
    expert_names: str
    modules: int
    g_idx: bool = False
    method: str = ""
    search: bool = False
    data: Data | None = None
    recipe: Mapping[str, int | str]
    blocks: tuple[BlockError, ...] = ()
    judged_apart: bool | None = None
    types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """One of the steps by which an output came about.

    Attributes:
        command: the verb.
        place: where `shardxform.json` tells of it.
        nbytes: of all tensors, before and after; None where that is not known.
        experts: routed experts per layer, likewise.
        pruning, healing, quantization: None where nothing was pruned, healed or rounded in it; figures of the
            quantization are those that were asked for.
        target: format that a conversion wrote; empty where the record does not say.
        dropped: parts of its source that were left out.
        made_by: what computed, with versions.

    """

    command: str
    place: str
    nbytes: Change | None = None
    experts: Change | None = None
    pruning: PruningFacts | None = None
    healing: HealingFacts | None = None
    quantization: QuantizationFacts | None = None
    target: str = ""
    dropped: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFacts:
    """What `evaluate --json` measured.

    Attributes:
        perplexity_error: its standard error, as `..._error` are of the other figures; None where it is not known.
        reference, kl, top1: None without a reference, or where they are not finite.
        of_source: whether the reference is known to be what the output was made from, directly or by way of others.
        steps_before: by how many steps the reference had come about then; None where that is not known.
        ratio_error: of `ratio`.
        dtype: that it was computed in; empty where that is not known.
        block_errors: likewise, per block.
        source: the one source of text that the figures are of; empty for all of the text.
        sources: the figures of each, where they were kept apart.

    """

    data: Data
    windows: int
    tokens: int
    perplexity: float | None
    perplexity_error: float | None = None
    reference: float | None = None
    ratio_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    top1_error: float | None = None
    dtype: str = ""
    block_errors: tuple[float | None, ...] = ()
    source: str = ""
    sources: tuple[EvaluationFacts, ...] = ()
    of_source: bool = False
    steps_before: int | None = None

    @property
    def ratio(self) -> float | None:
        """Perplexity over the reference's."""
        return self.perplexity / self.reference if self.perplexity is not None and self.reference else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """One metric of one task that `evaluate --tasks --json` measured.

    Attributes:
        task, metric: as the harness calls them.
        value, error: of the checkpoint, and its standard error; None where it is not known.
        reference, difference_error: of the reference, and the standard error of the difference; likewise.
        shots, documents: None where the harness does not say.
        limited: whether only so many documents of each task were asked.
        harness: its name and version.
        of_source, steps_before: as in `EvaluationFacts`.

    """

    task: str
    metric: str
    value: float
    error: float | None = None
    reference: float | None = None
    difference_error: float | None = None
    shots: int | None = None
    documents: int | None = None
    limited: bool = False
    harness: str = ""
    of_source: bool = False
    steps_before: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Everything a card says.

    Attributes:
        name: of the output directory.
        command: the verb that made it.
        origin: source and licence.
        family, architecture: of the output; `vision` and `bfloat16_only` as in `model.families.base`.
        model_type: in its config.json.
        has_mtp: whether MTP layers are there.
        layers, moe_layers, top_k: of the decoder.
        max_positions: longest context that the config allows; 0 where it does not say.
        experts: routed experts per layer.
        nbytes: of all tensors, without the headers of the shards.
        parameters, active: of the decoder with embeddings and output head, without MTP layers and vision tower; in
            all, and those that one token uses; None where the form of its weights does not tell.
        dropped: parts of the source that were left out.
        steps: how it came about, from the first source on; the last is its own.
        pruning, healing: by all steps; of several that pruned or healed the last, with channels from the first on.
        quantization: how its weights are stored; None where they are not quantized.
        evaluations: in the order given.
        tasks: likewise, a metric each.
        plots: names of pictures beside the card.
        commands: command lines that make the output again.
        source: what they call the first source.
        gguf: names of the files of a model in GGUF; none of another.
        dequantized: the type that quantized weights were turned back into, "bfloat16" or "float16", or nothing.
        encodings: how quantized weights are stored that the source had quantized, most bytes first.
        method: what config.json calls these: its `quant_method`.

    """

    name: str
    command: str
    origin: Origin
    family: str
    architecture: str
    vision: bool
    bfloat16_only: bool
    layers: int
    moe_layers: int
    top_k: int
    max_positions: int
    experts: Change
    nbytes: Change
    parameters: Change | None
    active: Change | None
    dropped: tuple[str, ...] = ()
    steps: tuple[StepFacts, ...] = ()
    pruning: PruningFacts | None = None
    healing: HealingFacts | None = None
    quantization: QuantizationFacts | None = None
    evaluations: tuple[EvaluationFacts, ...] = ()
    tasks: tuple[TaskFacts, ...] = ()
    plots: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    source: str = ""
    dequantized: str = ""
    encodings: tuple[str, ...] = ()
    method: str = ""
    model_type: str = ""
    has_mtp: bool = False
    gguf: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """In which clients are to load it."""
        return self.dequantized or "bfloat16"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
