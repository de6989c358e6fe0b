"""How a checkpoint came about: the steps that records of our outputs tell of, from the first source on.

An output made from an output of ours carries on what its source's record says, as `inputs.history`: a list of steps,
each with what was asked for, the identity of what it was made from, and what was found. A record is believed of a
source that it fits: by the headers of all shards, by config.json and the tokenizer's files, by its own checksum, and,
when the source's values are first looked at, by the digests of its tensors. What stands in it may be a stranger's: it
is bounded here, and escaped where it is shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shardxform.base.digests import CHUNK_BYTES, Chunk, digest_chunks, tensor_digest
from shardxform.base.file_system import FileSystem
from shardxform.base.strict_json import Fields, dumps
from shardxform.checkpoint.identity import Identity, config_sha256, whole_marks
from shardxform.checkpoint.record import PROVENANCE, Record, RecordError, read_written
from shardxform.checkpoint.sidecars import is_document
from shardxform.checkpoint.table import CONFIG, INDEX, Checkpoint, Shard
from shardxform.errors import CheckpointError, PlanError

__all__ = [
    "HISTORY",
    "NO_PAST",
    "Past",
    "made_before",
    "past_of",
    "put_together",
    "refuse_way",
    "steps_of",
    "steps_since",
    "steps_to_carry",
]

HISTORY: Final = "history"
"""Where records have it among their inputs."""

_VERSION: Final = 1
_ORIGIN: Final = "origin"  # earlier records of converted outputs: the step before, without a name
_OF_ORIGIN: Final = ("facts", "manifest", "options", "recipe", "scheme", "source", "summary")
_VERBS: Final = ("prune", "quantize", "convert")
_ASKED: Final = ("options", "manifest", "scheme", "recipe", "target", "family", "made_by")
_COUNTS: Final = ("bytes_before", "experts_before", "experts_after")
_FOUND: Final = ("dropped", "chosen")
_QUANTIZED: Final = ("quantization_config", "compression_config", "quantization")  # keys of a config
_HALVES: Final = ("bf16", "fp16")  # targets that round values
_CLOCK: Final = "seconds"  # of a block, in records of the first versions; no record has a clock
_MOST_STEPS: Final = 32
_MOST_BYTES: Final = 64 << 20  # of all steps, mostly marks of values; a record is read up to four times that
_MOST_BLOCKS: Final = 4096
_MOST_VALUES: Final = 1 << 21  # of a step; keep lists of 100 layers of 512 experts are 51,200
_MOST_DEPTH: Final = 12
_MOST_TEXT: Final = 1 << 22  # characters; channels that stay are bitmaps
_ONE_OF_A_KIND: Final = 64 << 20  # bytes of a tensor that stands for all whose names differ by numbers alone
_NUMBER: Final = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What is known of how a source was made.

    Attributes:
        steps: from the first source on; none of a source that is no output of ours.
        digests: of the source's tensors, by its record.
        note: why its record is not believed; empty where it is, or there is none.

    """

    steps: tuple[Mapping[str, Any], ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    note: str = ""

    @property
    def stated(self) -> dict[str, Any]:
        """What an output made from the source records of it, among its inputs."""
        return {HISTORY: {"version": _VERSION, "steps": list(self.steps)}} if self.steps else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of it."""
        return (self.note,) if self.note else ()

    def refuse_other(self, root: Path, shards: Sequence[Shard], identity: Identity, where: str) -> None:
        """Refuse values that are not those of the record: every small tensor, and one of each kind of larger ones.

        Args:
            root: the source, whose shards are here.
            shards: of it.
            identity: of it.
            where: what it is called.

        Raises:
            CheckpointError: names the tensor; or a shard cannot be read.

        """
        if not self.digests:
            return
        marks = whole_marks(identity, shards)
        other = (name for name, mark in marks.items() if not self.digests.get(name, "").startswith(mark.hex()))
        name = next(other, "") or next(self._other_kinds(root, shards, marks), "")
        if name:
            raise CheckpointError(
                f"{where}: tensor '{name}' is not as its {PROVENANCE} has it: damaged, or changed since; see"
                f" `shardxform verify`, or move {PROVENANCE} away to take the checkpoint as it is"
            )

    def _other_kinds(self, root: Path, shards: Sequence[Shard], seen: Mapping[str, bytes]) -> Iterator[str]:
        """Tensors, one of each kind, that have another digest than the record's."""
        kinds, fs = {_NUMBER.sub("#", name) for name in seen}, FileSystem()
        for number, shard in enumerate(shards):
            for entry in shard.entries:
                name, nbytes = entry.spec.name, entry.end - entry.begin
                kind = _NUMBER.sub("#", name)
                if kind in kinds or not 0 < nbytes <= _ONE_OF_A_KIND:
                    continue
                kinds.add(kind)
                start = shard.data_start + entry.begin
                chunks = [
                    Chunk(name, at // CHUNK_BYTES, number, start + at, min(CHUNK_BYTES, nbytes - at))
                    for at in range(0, nbytes, CHUNK_BYTES)
                ]
                try:
                    found = digest_chunks(chunks, lambda at: root / shards[at].name, fs)
                except (OSError, EOFError) as e:
                    raise CheckpointError(f"{root / shard.name}: {e}") from e
                if tensor_digest([bytes.fromhex(each) for each in found]) != self.digests.get(name):
                    yield name


NO_PAST: Final = Past()
"""That of a source that nobody says anything of."""


def past_of(source: Checkpoint) -> Past:
    """Read the record of a source, where it is an output of ours, from headers and small files alone."""
    path = source.file(PROVENANCE)
    if not path.exists():
        return NO_PAST
    try:
        record = read_written(path)
        if why := _misfit(record, source):
            raise RecordError(why)
        return Past(steps=steps_to_carry(record), digests=record.digests or {})
    except RecordError as e:
        return Past(note=f"{PROVENANCE} is not believed: {e}; how the source was made is not carried on")


def steps_to_carry(record: Record) -> tuple[Mapping[str, Any], ...]:
    """Steps that an output of this record was made by, itself the last, as another one's record carries them on.

    Raises:
        RecordError: the history is none, or too much.

    """
    facts, summary = record.facts, record.summary
    own = {**record.inputs, "facts": {"blocks": facts.get("blocks", [])}, "summary": summary}
    steps = (*_earlier(record.inputs), _step(own, "inputs"))
    if len(steps) > _MOST_STEPS or len(dumps(steps)) > _MOST_BYTES:
        raise RecordError(f"more than {_MOST_STEPS} steps before it, or {_MOST_BYTES >> 20} MiB of them")
    return steps


def steps_of(record: Record) -> tuple[Fields, ...]:
    """The same for whoever reads single values; the last has all that the record says of its own step.

    Raises:
        RecordError: see `steps_to_carry`.

    """
    own = {**record.inputs, "facts": record.facts, "summary": record.summary}
    return tuple(map(Fields, (*_earlier(record.inputs), own)))


def made_before(inputs: Mapping[str, object]) -> Mapping[str, Any] | None:
    """Inputs of the step before, which made what a converted output was converted from; None of any other.

    Conversions change no value: the step is the last one that is none.
    """
    if isinstance(found := inputs.get(_ORIGIN), Mapping):
        return found
    history = inputs.get(HISTORY)
    steps = history.get("steps") if isinstance(history, Mapping) else None
    if inputs.get("command") != "convert" or not isinstance(steps, list):
        return None
    made = [step for step in steps if isinstance(step, Mapping) and step.get("command") != "convert"]
    return {key: value for key, value in made[-1].items() if key in _OF_ORIGIN} if made else None


def steps_since(source: Checkpoint, inputs: Mapping[str, Any], facts: object) -> list[Mapping[str, Any]]:
    """Steps that led from a source to an output of these inputs; none where none of them names it, by its headers."""
    try:
        steps = [*_earlier(inputs), {**inputs, "facts": facts}]
    except RecordError:
        return []
    config, heads = config_sha256(source.config), {s.name: (s.nbytes, s.header_sha256) for s in source.shards}
    for number in range(len(steps) - 1, -1, -1):
        known = Identity.from_dict(steps[number].get("source"))
        if known and known.config == config and heads == {n: (s.nbytes, s.header) for n, s in known.shards.items()}:
            return steps[number:]
    return []


def refuse_way(source: Checkpoint, record: Record | None) -> None:
    """Refuse a source that an output was not made from itself, but by way of others, conversions apart.

    Raises:
        PlanError: says in which steps.

    """
    steps = steps_since(source, record.inputs, None) if record else []
    made = [str(step.get("command")) for step in steps if step.get("command") != "convert"]
    if len(made) > (0 if len(steps) > 1 and _is_quantized(source.config) else 1):
        raise PlanError(
            f"`independent`: OUT was made from {source.where} in several steps ({', '.join(made)}), which the second"
            " opinion does not derive; give what OUT was made from itself as `source`"
        )


def _is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config declares quantized weights, of the model or of its decoder."""
    homes = (config, *(inner for inner in config.values() if isinstance(inner, Mapping)))
    return any(home.get(key) for home in homes for key in _QUANTIZED)


def put_together(source: Checkpoint, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Inputs of one command that does what steps did one after the other.

    Raises:
        CheckpointError: two of them pruned, healed or rounded, or one worked on what a conversion or rounding left.

    """
    told = list(map(Fields, steps))
    if not _are_one(told):
        verbs = ", ".join(str(step.get("command")) for step in steps)
        raise CheckpointError(
            f"{source.where}: OUT was made from it in {len(steps)} steps ({verbs}), which are not proved at once; give"
            " what OUT was made from itself as `source`, and verify that against what it was made from"
        )
    made = [step for step in told if step.get("command") != "convert"] or told
    converted = [step for step in told if step.get("command") == "convert"]
    blocks: dict[int, dict[str, Any]] = {}
    for step in told:
        for block in step.section("facts").sections("blocks"):
            if (layer := block.whole("layer")) is not None:
                blocks[layer] = {**blocks.get(layer, {}), **dict(block.items())}
    rounded = [step for step in steps if step.get("command") == "quantize"]
    out = {
        "command": "convert" if converted else "quantize" if rounded else "prune",
        "manifest": next((step["manifest"] for step in steps if step.get("manifest")), {}),
        "scheme": next((step["scheme"] for step in rounded if step.get("scheme")), {}),
        "recipe": {key: value for step in told for key, value in step.section("recipe").items()},
        "target": dict(converted[-1].section("target").items()) if converted else {},
        "options": {
            **dict(made[-1].section("options").items()),
            "text_only": any(step.section("options").flag("text_only") for step in told),
            "mtp": _mtp_of(told),
        },
        "facts": {"blocks": [blocks[layer] for layer in sorted(blocks)]},
        "source": steps[0].get("source"),
    }
    return {key: value for key, value in out.items() if value or key == "manifest"}


def _mtp_of(steps: Sequence[Fields]) -> str:
    """What became of MTP layers: left out by any of the steps, or what the one that prunes made of them."""
    modes = [(step.section("options").text("mtp"), bool(step.section("manifest", "keep"))) for step in steps]
    if any(mode == "drop" for mode, _ in modes):
        return "drop"
    return next((mode for mode, prunes in modes if prunes and mode), "auto")


def _are_one(steps: Sequence[Fields]) -> bool:
    """Whether one command gives what steps do, which each start from what the one before has written.

    Integers that another format holds are the same ones, so that experts may go before and after. What is rounded, to a
    grid or to 16 bits, is not what was read any more: nothing but its way into another format is known to follow.
    """
    prunes = [number for number, step in enumerate(steps) if step.section("manifest", "keep")]
    rounds = [number for number, step in enumerate(steps) if step.get("command") == "quantize" or _kind_of(step)]
    heals = [number for number, step in enumerate(steps) if step.section("recipe", "heal")]
    if any(len(each) > 1 for each in (prunes, rounds, heals)):
        return False
    converts = [number for number, step in enumerate(steps) if step.get("command") == "convert"]
    halves = [number for number in converts if steps[number].section("target").text("format") in _HALVES]
    if any(number < other for number in converts for other in (*rounds, *heals)):
        return False
    if any(number < other for number in halves for other in converts):
        return False
    if _is_gguf(steps[-1]) and (halves or any("mlx" in _formats(step) for step in steps)):
        return False
    return not any(_is_gguf(step) for step in steps[:-1])


def _kind_of(step: Fields) -> str:
    """The kind of GGUF that weights were rounded for; empty where they were not."""
    return step.section("options", "gguf").text("kind")


def _is_gguf(step: Fields) -> bool:
    """Whether a step wrote GGUF, out of safetensors."""
    return bool(step.section("options", "gguf")) or "gguf" in _formats(step)


def _formats(step: Fields) -> tuple[str, str]:
    """What a step rounded to, and converted to."""
    return step.section("scheme").text("format"), step.section("target").text("format")


# -- of a record ------------------------------------------------------------------------------------------------------


def _misfit(record: Record, source: Checkpoint) -> str:
    """Say in what a record is not of a source as it is; empty where it is."""
    shards = {shard.name: shard for shard in source.shards}
    if shards.keys() != record.shards.keys():
        return f"it is of other files, {next(iter(record.shards), 'none')} among them"
    for name, shard in shards.items():
        recorded = record.shards[name]
        found = (shard.nbytes, shard.data_start, shard.header_sha256)
        if found != (recorded.nbytes, recorded.head_bytes, recorded.head_sha256):
            return f"{name} holds other tensors than it says"
    digest = record.files.get(CONFIG)
    if digest is not None and hashlib.sha256(source.file(CONFIG).read_bytes()).hexdigest() != digest:
        return f"{CONFIG} was changed since"
    return "" if source.remote else _changed_file(record, source)


def _changed_file(record: Record, source: Checkpoint) -> str:
    """Say which of a tokenizer's files, templates and the like is not as the record has it; documents may change."""
    told = {name for name, digest in record.files.items() if digest is not None and not is_document(name)}
    found = {sidecar.name for sidecar in source.sidecars if not is_document(sidecar.name)}
    for name in sorted((told ^ found) - {CONFIG, INDEX}):
        return f"{name} was {'removed' if name in told else 'added'} since"
    try:
        digests = ((name, hashlib.sha256(source.file(name).read_bytes()).hexdigest()) for name in sorted(told & found))
        return next((f"{name} was changed since" for name, digest in digests if digest != record.files[name]), "")
    except OSError as e:
        return str(e.strerror)


def _earlier(inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Steps before an output's own."""
    if isinstance(inputs.get(_ORIGIN), Mapping):
        origin = inputs[_ORIGIN]
        verb = "quantize" if origin.get("scheme") else "prune"
        return (_step({"command": verb, **origin}, f"inputs.{_ORIGIN}"),)
    if HISTORY not in inputs:
        return ()
    history, place = Fields(inputs[HISTORY]), f"inputs.{HISTORY}"
    if history.get("version") != _VERSION:
        raise RecordError(f"{place}.version: expected {_VERSION}; a later shardxform reads it")
    steps = history.get("steps")
    if not isinstance(steps, list) or not 0 < len(steps) <= _MOST_STEPS:
        raise RecordError(f"{place}.steps: expected a list of 1 to {_MOST_STEPS}")
    return tuple(_step(step, f"{place}.steps[{number}]") for number, step in enumerate(steps))


def _step(value: object, place: str) -> Mapping[str, Any]:
    """One step, checked and bounded: what is not known of steps is left out.

    Raises:
        RecordError: names the key.

    """
    if not isinstance(value, Mapping) or value.get("command") not in _VERBS:
        raise RecordError(f"{place}.command: expected one of {', '.join(_VERBS)}")
    summary, blocks = Fields(value.get("summary")), Fields(value.get("facts")).sections("blocks")
    counts = {key: summary.whole(key) for key in _COUNTS if summary.whole(key) is not None}
    out: dict[str, Any] = {
        "command": value["command"],
        **{key: value[key] for key in _ASKED if isinstance(value.get(key), Mapping) and value[key]},
        "summary": counts | {key: summary.get(key) for key in _FOUND if summary.section(key)},
    }
    if blocks:
        told = (dict(block.items()) for block in blocks if block.whole("layer") is not None)
        out["facts"] = {"blocks": [{key: each[key] for key in each if key != _CLOCK} for each in told]}
    if len(blocks) > _MOST_BLOCKS or not _is_bounded(out):
        raise RecordError(f"{place}: more than a step can be")
    source = Fields(value.get("source"))
    if known := Identity.from_dict(value.get("source")):
        sidecars = source.section("sidecars")
        out["source"] = {**known.to_dict(), "sidecars": {key: sidecars.text(key) for key, _ in sidecars.items()}}
    return out


def _is_bounded(value: object) -> bool:
    """Whether a value is no deeper, longer and larger than a step can be."""
    level, count = [value], 0
    for _ in range(_MOST_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, Mapping | list)
            for child in (each.values() if isinstance(each, Mapping) else each)
        ]
        count += len(level)
        if count > _MOST_VALUES or any(isinstance(each, str) and len(each) > _MOST_TEXT for each in level):
            return False
        if not level:
            return True
    return False
