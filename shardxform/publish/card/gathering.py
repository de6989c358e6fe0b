"""Gathering what a card says: an output's record and headers, a manifest, evaluations, and the source's own card.

A record that contradicts the files beside it is refused; of what it does not say, nothing is said. What comes from the
card of a stranger is matched against what it may look like, since it goes to others. Changes nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from shardxform.ask.manifest import Manifest
from shardxform.base.file_system import not_a_directory, read_given
from shardxform.base.strict_json import Fields, JsonError, parse_object
from shardxform.base.tensors import BLOCKS
from shardxform.calibration.options import MAX_SOURCES, is_source
from shardxform.checkpoint.gguf import GgufModel, open_gguf
from shardxform.checkpoint.history import steps_of
from shardxform.checkpoint.identity import Identity, identify, names_of
from shardxform.checkpoint.record import PROVENANCE, Record, RecordError, read_record
from shardxform.checkpoint.table import Checkpoint, find_gguf
from shardxform.errors import ManifestError, OutputError, PlanError
from shardxform.execution.output import WORK, is_ours
from shardxform.formats.config_names import declarations
from shardxform.formats.stored import Stored
from shardxform.model.layout import layout_of
from shardxform.plan.inspection import Parameters, encoding_names, parameters_of, stored_of
from shardxform.publish.card.facts import (
    CardFacts,
    Change,
    Data,
    EvaluationFacts,
    Origin,
    QuantizationFacts,
    StepFacts,
    TaskFacts,
)
from shardxform.publish.card.origin import is_model_name, origin_of
from shardxform.publish.card.reproduction import commands
from shardxform.publish.card.steps import (
    NOT_TOLD,
    data_of,
    dequantized_by,
    gather_steps,
    is_pruned_by,
    rounded_by,
    summed_up,
)
from shardxform.publish.card.writing import is_card, picture_name, read_readme
from shardxform.runtimes import as_family
from shardxform.runtimes.gguf.slabs import Slabs, slabs_of

__all__ = ["CardOptions", "gather", "read_evaluation", "read_tasks"]

_LICENSES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_HEAD_BYTES: Final = 4096
_HUB: Final = re.compile(r"hf://([^@]+)@[0-9a-f]{40}", re.ASCII)
_MAX_BYTES: Final = 16 << 20  # of an evaluation
_MOST_TASKS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """What a card is made from, beside the output.

    Attributes:
        base_model: hub name of the source; empty to take it from the source's card or config.
        manifest: the keep manifest that the output was pruned by, for the reasons that it gives.
        evaluations: files that hold what `evaluate` printed as JSON.
        plots: pictures to show, as PNG.

    """

    base_model: str = ""
    manifest: Path | None = None
    evaluations: Sequence[Path] = ()
    plots: Sequence[Path] = ()


def gather(out: Path, options: CardOptions | None = None) -> CardFacts:
    """Read everything that is known of an output of shardxform.

    Raises:
        OutputError: OUT is no finished output of shardxform, or not as it was written; a picture is none.
        CheckpointError, FamilyError: OUT cannot be read.
        ManifestError: the manifest is malformed, or not the one that OUT was pruned by.
        PlanError: an evaluation is malformed, of another checkpoint, or against another than OUT's source; the base
            model's name is none.

    """
    options = options or CardOptions()
    if options.base_model and not is_model_name(options.base_model):
        raise PlanError(f"`base_model`: expected a hub name such as owner/name, found {options.base_model!r}")
    record = _record(out)
    if first := find_gguf(out):
        return _gather_gguf(out, options, record, open_gguf(first))
    checkpoint = as_family(Checkpoint.open(out))
    stored = stored_of(checkpoint)
    layout = stored.layout if stored else layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where)
    manifest = _manifest(options.manifest, record, out)
    steps = gather_steps(record, checkpoint.nbytes, layout.num_experts, manifest)
    (pruning, healing), before, top_k = summed_up(steps), _experts_before(steps), layout.top_k
    width = pruning.channels if pruning else None
    total, active = _parameter_changes(parameters_of(checkpoint), width, before, layout.num_experts, top_k)
    origin = _origin(out, checkpoint, record, options.base_model)
    origins, source, name = _origins(record), _source_name(record, origin), out.resolve().name or "OUT"
    return CardFacts(
        name=name,
        command=record.asked.text("command"),
        origin=origin,
        family=layout.family.name,
        architecture=layout.wrapper.architecture,
        model_type=Fields(layout.config).text("model_type"),
        has_mtp=layout.has_mtp,
        vision=layout.wrapper.vision and layout.has_vision,
        bfloat16_only=layout.family.bfloat16_only,
        layers=layout.num_layers,
        moe_layers=len(layout.moe_layers),
        top_k=top_k,
        max_positions=Fields(layout.text).whole("max_position_embeddings") or 0,
        experts=Change(before, layout.num_experts),
        nbytes=Change(_bytes_before(steps), checkpoint.nbytes),
        parameters=total,
        active=active,
        dropped=_dropped(steps),
        steps=steps,
        pruning=pruning,
        healing=healing,
        quantization=_quantization(steps, stored) if stored else None,
        evaluations=tuple(
            read_evaluation(path, checkpoint, origins) for path in options.evaluations if not _has_tasks(path)
        ),
        tasks=tuple(
            each for path in options.evaluations if _has_tasks(path) for each in read_tasks(path, checkpoint, origins)
        ),
        plots=_plots(options.plots),
        commands=commands(record, source, name),
        source=source,
        dequantized="" if stored else dequantized_by(steps),
        encodings=() if stored else encoding_names(checkpoint),
        method=Fields(next((each for _, each in declarations(checkpoint.config)), {})).text("quant_method"),
    )


def _gather_gguf(out: Path, options: CardOptions, record: Record, model: GgufModel) -> CardFacts:
    """The same of an output in GGUF, which has no config: sizes are the file's own, names those that are recorded."""
    slabs, table = slabs_of(model.metadata, model.table.tensors, model.where), model.table
    manifest, told = _manifest(options.manifest, record, out), Fields(record.summary)
    steps = gather_steps(record, table.nbytes, slabs.num_experts, manifest)
    (pruning, healing), before = summed_up(steps), _experts_before(steps)
    width, rounded = pruning.channels if pruning else None, rounded_by(steps)
    origin = _origin(out, table, record, options.base_model)
    origins, source, name = _origins(record), _source_name(record, origin), out.resolve().name or "OUT"
    counts = _parameters_of(model, slabs)
    total, active = _parameter_changes(counts, width, before, slabs.num_experts, slabs.top_k)
    context = model.metadata.get(f"{slabs.arch}.context_length")
    positions = context.value if context is not None else 0
    texts = [path for path in options.evaluations if not _has_tasks(path)]
    return CardFacts(
        name=name,
        command=record.asked.text("command"),
        origin=origin,
        family=told.text("family"),
        architecture=told.text("architecture"),
        has_mtp=slabs.nextn > 0,
        vision=False,
        bfloat16_only=False,
        layers=slabs.num_layers,
        moe_layers=len(slabs.moe_layers),
        top_k=slabs.top_k,
        max_positions=positions if isinstance(positions, int) else 0,
        experts=Change(before, slabs.num_experts),
        nbytes=Change(_bytes_before(steps), table.nbytes),
        parameters=total,
        active=active,
        dropped=_dropped(steps),
        steps=steps,
        pruning=pruning,
        healing=healing,
        quantization=_in_blocks(rounded, model) if rounded else None,
        evaluations=tuple(read_evaluation(path, table, origins) for path in texts),
        plots=_plots(options.plots),
        commands=commands(record, source, name),
        source=source,
        gguf=tuple(shard.name for shard in table.shards),
    )


def _parameters_of(model: GgufModel, slabs: Slabs) -> Parameters:
    """Parameters of a file, those of blocks that predict further tokens apart."""
    shared = routed = router = apart = 0
    for name, ref in model.table.tensors.items():
        count, block = math.prod(ref.spec.shape), slabs.homes.get(name)
        parts = name.split(".")
        if parts[0] == "blk" and int(parts[1]) >= slabs.num_layers:
            apart += count
        elif block is None:
            shared += count
        elif "_exps." in name:
            routed += count // slabs.num_experts
        else:
            router += count // slabs.num_experts
    return Parameters(shared=shared, routed=routed, router=router, apart=apart, reached=routed)


def _in_blocks(rounded: QuantizationFacts, model: GgufModel) -> QuantizationFacts:
    """How weights are stored in blocks, of what the record says of their rounding."""
    tensors = [ref.spec for ref in model.table.tensors.values() if ref.spec.dtype in BLOCKS]
    return replace(
        rounded,
        bits=rounded.bits or 4,
        group_size=rounded.group_size or 32,
        format="gguf",
        modules=sum(math.prod(spec.shape[:-2]) for spec in tensors),
        types=tuple(sorted({spec.dtype for spec in tensors})),
    )


def _record(out: Path) -> Record:
    """The record of a finished output, held against the headers of its shards."""
    if not out.is_dir():
        raise OutputError(f"{out}: {not_a_directory(out)}; expected an output of shardxform")
    if os.path.lexists(out / WORK):
        raise OutputError(f"{out}: unfinished; run the command that writes it again, then make the card")
    record = read_record(out / PROVENANCE)
    if record is None:
        raise OutputError(
            f"{out}: no {PROVENANCE} that can be read; expected an output of shardxform, which says how it was made"
        )
    for name, shard in record.shards.items():
        if name not in record.files or "/" in name or not is_ours(out / name, None, shard):
            raise OutputError(f"{out / name}: not as {PROVENANCE} has it; see `shardxform verify`")
    try:
        steps_of(record)
    except RecordError as e:
        raise OutputError(f"{out / PROVENANCE}: {e}") from e
    return record


def _manifest(path: Path | None, record: Record, out: Path) -> Manifest | None:
    """The manifest given, which must be one that was used: its reasons are published as OUT's."""
    if path is None:
        return None
    manifest = Manifest.load(path)
    pruned = [step for step in steps_of(record) if step.section("manifest", "keep")]
    if not pruned:
        raise ManifestError(f"{path}: {out} was not pruned by a manifest, says its {PROVENANCE}")
    if any(is_pruned_by(step, manifest) for step in pruned):
        return manifest
    recorded = pruned[-1].section("manifest", "keep")
    for layer, ids in manifest.keep.items():
        if recorded.get(str(layer)) != list(ids):
            raise ManifestError(f'{path}: keep["{layer}"]: not what {out} was pruned by, says its {PROVENANCE}')
    raise ManifestError(f"{path}: {len(manifest.keep)} layers, but {out} was pruned in {len(recorded)}")


def _experts_before(steps: Sequence[StepFacts]) -> int | None:
    """Experts per layer of the first source; None where nobody knows."""
    first, last = steps[0].experts, steps[-1].experts
    before, after = (first and first.before), (last.after if last else 0)
    return before if before and before >= after else None


def _bytes_before(steps: Sequence[StepFacts]) -> int | None:
    """Bytes of all tensors of the first source, as every command counts them."""
    return steps[0].nbytes.before if steps[0].nbytes else None


def _dropped(steps: Sequence[StepFacts]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each for step in steps for each in step.dropped))


def _origins(record: Record) -> list[Identity | None]:
    """What each step was made from; None where the record does not tell."""
    return [Identity.from_dict(step.get("source")) for step in steps_of(record)]


def _repository(record: Record) -> str:
    """Where the first source was read from, `hf://owner/name@commit`, if it was on the hub."""
    found = steps_of(record)[0].section("source").text("repository")
    match = _HUB.fullmatch(found)
    return found if match and is_model_name(match[1]) else ""


def _source_name(record: Record, origin: Origin) -> str:
    """What the first source is called in commands."""
    return _repository(record) or origin.base_model or "SRC"


def _parameter_changes(
    counts: Parameters | None, width: Change | None, before: int | None, after: int, top_k: int
) -> tuple[Change | None, Change | None]:
    """Parameters in all and of a token, of the source and of the output; None where they cannot be counted.

    Args:
        counts: of the output.
        width: channels of every expert; one of the source has as many times more in all of its matrices.
        before: experts of the source, where that is known.
        after: experts of the output.
        top_k: experts per token.

    """
    if counts is None:
        return None, None
    was = counts
    if width and width.before:
        routed, reached = (each * width.before // width.after for each in (counts.routed, counts.reached))
        was = replace(counts, routed=routed, reached=reached)
    total = Change(was.total(before) if before else None, counts.total(after))
    return total, Change(was.active(before, top_k) if before else None, counts.active(after, top_k))


def _quantization(steps: Sequence[StepFacts], stored: Stored) -> QuantizationFacts:
    """How weights are stored, as the headers have it, and how they came about, as the record has it."""
    return replace(
        rounded_by(steps) or NOT_TOLD,
        bits=stored.scheme.grid.bits,
        group_size=stored.scheme.grid.group_size,
        format=stored.scheme.format,
        expert_names="fused-indexed" if "fused-indexed" in stored.spellings else "split",
        modules=len(stored.modules),
        g_idx=stored.scheme.g_idx,
    )


def _origin(out: Path, checkpoint: Checkpoint, record: Record, base_model: str) -> Origin:
    """Whom the weights are from: as told, by an earlier card, by the record, by the source's card or the config."""
    card = read_readme(out)
    found = origin_of(card, _license_text(out), ours=is_card(card))
    config_name = checkpoint.config.get("_name_or_path")
    guessed = config_name if isinstance(config_name, str) and is_model_name(config_name) else ""
    repository = _repository(record).removeprefix("hf://").partition("@")[0]
    told = (found.base_model, repository) if is_card(card) else (repository, found.base_model)
    return replace(found, base_model=next(filter(None, (base_model, *told, guessed)), ""))


def _license_text(out: Path) -> str:
    for name in _LICENSES:
        path = out / name
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                return file.read(_HEAD_BYTES).decode("utf-8", "replace")
    return ""


def _plots(paths: Sequence[Path]) -> tuple[str, ...]:
    names = tuple(picture_name(path) for path in paths)
    for name in names:
        if names.count(name) > 1:
            raise OutputError(f"{name}: two pictures of this name; they would lie in one directory")
    return names


# -- evaluations -------------------------------------------------------------------------------------------------------


def read_evaluation(path: Path, checkpoint: Checkpoint, origins: Sequence[Identity | None] = ()) -> EvaluationFacts:
    """Read one evaluation.

    Args:
        path: what `evaluate --json` printed.
        checkpoint: what it must be of.
        origins: what that was made from, directly or by way of another; its reference must be one of them.

    Raises:
        PlanError: it cannot be read, is no evaluation, or not one of this checkpoint with these values, or was held
            against something else than its source.
        CheckpointError: a shard cannot be read.

    """
    value = _object(path)
    data = data_of(value.section("data"))
    if data is None:
        raise _malformed(path, "data")
    found = _figures(path, value, data)
    errors, sources = _errors(path, value.section("against")), _sources(path, value, data)
    _refuse_other(path, value, checkpoint)
    before = _refuse_other_reference(path, value.section("against"), checkpoint, origins)
    of_source = before is not None
    return replace(found, block_errors=errors, sources=sources, of_source=of_source, steps_before=before)


def _has_tasks(path: Path) -> bool:
    """Whether an evaluation is of tasks, and not of text."""
    return "tasks" in _object(path)


def read_tasks(path: Path, checkpoint: Checkpoint, origins: Sequence[Identity | None] = ()) -> Iterator[TaskFacts]:
    """Read one evaluation on tasks, a metric each.

    Raises:
        PlanError, CheckpointError: as `read_evaluation`.

    """
    value = _object(path)
    _refuse_other(path, value, checkpoint)
    before = _refuse_other_reference(path, value.section("against"), checkpoint, origins)
    tasks = value.section("tasks")
    listed, harness = tasks.get("results"), tasks.text("harness")
    if not isinstance(listed, dict) or len(listed) > _MOST_TASKS or not harness.isprintable():
        raise _malformed(path, "tasks")
    for name, each in listed.items():
        task = Fields(each)
        metrics = task.get("metrics")
        if not isinstance(metrics, dict) or not all(map(is_source, (name, *metrics))):
            raise _malformed(path, f"tasks.results.{name[:40]!r}")
        for metric, found in metrics.items():
            figures = Fields(found)
            figure = _known(path, figures, "value")
            if figure is None:
                raise _malformed(path, f"tasks.results.{name}.{metric}.value")
            yield TaskFacts(
                task=name,
                metric=metric,
                value=figure,
                error=_error(path, figures, "standard_error"),
                reference=_known(path, figures, "reference"),
                difference_error=_error(path, figures, "difference_standard_error"),
                shots=task.whole("shots"),
                documents=task.whole("documents"),
                limited=tasks.whole("limit") is not None,
                harness=harness,
                of_source=before is not None,
                steps_before=before,
            )


def _refuse_other(path: Path, value: Fields, checkpoint: Checkpoint) -> None:
    """Refuse figures of another checkpoint, or that do not say of which values they are."""
    measured = Identity.from_dict(value.get("identity"))
    if measured is None:
        why = "says nothing of the values that it is of, as earlier versions did not" if "fingerprint" in value else ""
        raise PlanError(f"{path}: {why or 'identity: missing or malformed'}; evaluate {checkpoint.where} again")
    here = identify(checkpoint)
    if not checkpoint.config:  # of GGUF: the config that it was run with is the source's
        here = replace(here, config=measured.config)
    where = measured.difference(here, names_of(checkpoint.shards))
    if not where and not measured.is_comparable(here):
        where = "it was read in another way, so that its values cannot be compared"
    if where:
        raise PlanError(f"{path}: an evaluation of another checkpoint than {checkpoint.where}: {where}")


def _refuse_other_reference(
    path: Path, against: Fields, checkpoint: Checkpoint, origins: Sequence[Identity | None]
) -> int | None:
    """Refuse a reference that is none of the origins: its figures would not say what making the output has cost.

    Returns:
        which of them it is; None where that is not recorded, or not comparable.

    """
    reference = Identity.from_dict(against.get("identity"))
    known = {number: origin for number, origin in enumerate(origins) if origin is not None}
    if reference is None or not known:
        return None
    where = {number: reference.difference(origin) for number, origin in known.items()}
    if all(where.values()):
        raise PlanError(
            f"{path}: its reference is not what {checkpoint.where} was made from: {where[max(where)]};"
            f" evaluate it again, --against its source"
        )
    same = (number for number, told in where.items() if not told and reference.is_comparable(known[number]))
    return next(same, None)


def _figures(path: Path, value: Fields, data: Data, source: str = "") -> EvaluationFacts:
    """The figures of an evaluation, or of one source in it."""
    windows, tokens = value.whole("windows"), value.whole("tokens")
    if not windows or not tokens:
        raise _malformed(path, "windows" if not windows else "tokens")
    against = value.section("against")
    top1 = _known(path, against, "top1_agreement")
    if top1 is not None and top1 > 1:
        raise PlanError(f"{path}: top1_agreement: expected a share from 0 to 1, found {top1}")
    return EvaluationFacts(
        data=data,
        windows=windows,
        tokens=tokens,
        perplexity=_known(path, value, "perplexity"),
        perplexity_error=_error(path, value, "perplexity_standard_error"),
        reference=_known(path, against, "perplexity") if against else None,
        ratio_error=_error(path, against, "perplexity_ratio_standard_error"),
        kl=_known(path, against, "kl"),
        kl_error=_error(path, against, "kl_standard_error"),
        top1=top1,
        top1_error=_error(path, against, "top1_standard_error"),
        dtype=value.text("dtype"),
        source=source,
    )


def _sources(path: Path, value: Fields, data: Data) -> tuple[EvaluationFacts, ...]:
    """The figures of every source, in the order of the file."""
    listed = value.get("sources") if "sources" in value else {}
    if not isinstance(listed, dict) or len(listed) > MAX_SOURCES or not all(map(is_source, listed)):
        raise PlanError(f"{path}: sources: expected at most {MAX_SOURCES} names, each with its figures")
    return tuple(_figures(path, Fields(listed[name]), data, name) for name in listed)


def _malformed(path: Path, what: str) -> PlanError:
    return PlanError(f"{path}: {what}: missing or malformed; expected the output of `shardxform evaluate --json`")


def _object(path: Path) -> Fields:
    try:
        data = read_given(path, _MAX_BYTES)
        if len(data) > _MAX_BYTES:
            raise PlanError(f"{path}: more than {_MAX_BYTES} bytes, which is no evaluation")
        return Fields(parse_object(data))
    except OSError as e:
        raise PlanError(f"{path}: {e.strerror}") from e
    except JsonError as e:
        raise PlanError(f"{path}: {e}") from e


def _known(path: Path, value: Fields, key: str) -> float | None:
    """A figure; None where the evaluation says that it is not finite, or has none."""
    if value.get(key) is None:
        return None
    found = value.number(key)
    if found is None:
        raise PlanError(f"{path}: {key}: expected a number, found {str(value.get(key))[:60]!r}")
    return found


def _error(path: Path, value: Fields, key: str) -> float | None:
    """A standard error; None of a single window, and in evaluations of earlier versions."""
    found = _known(path, value, key)
    if found is not None and found < 0:
        raise PlanError(f"{path}: {key}: expected no negative number, found {found}")
    return found


def _errors(path: Path, against: Fields) -> tuple[float | None, ...]:
    listed = against.get("block_errors") if "block_errors" in against else []
    if not isinstance(listed, list):
        raise PlanError(f"{path}: block_errors: expected a list")
    return tuple(_known(path, Fields({"block_errors": error}), "block_errors") for error in listed)
