"""The directory of results beside an output, and the record of what each was made from.

    OUT.compress/compress.json   for every stage: its inputs, what it found, the SHA-256 of its files
    OUT.compress/lock            held as long as a process works here
    OUT.compress/*.work          hidden states of a stage under way

A file is named in the record, durably, before it is written. So whatever is here and as recorded is ours, however often
a run was killed; anything else is never overwritten or removed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from shardxform.base import computing
from shardxform.base.file_system import LOCK, FileSystem, OwnedDir, items_of
from shardxform.base.strict_json import JsonError, dumps, parse_object, pretty
from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.errors import OutputError, ResumeError
from shardxform.execution.output import difference

__all__ = [
    "CARD",
    "EVALUATE",
    "EVALUATION",
    "KEEP",
    "PICTURES",
    "QUANTIZE",
    "RECORD",
    "SALIENCY",
    "SCORE",
    "SELECT",
    "STAGES",
    "VERIFY",
    "Results",
    "ResultsFolder",
    "StageRecord",
    "changed",
    "file_sha256",
    "following",
    "plain",
    "read_stages",
    "refuse_changed",
    "results_folder",
    "results_of",
    "work_of",
]

SCORE: Final = "score"
SELECT: Final = "select"
QUANTIZE: Final = "quantize"
VERIFY: Final = "verify"
EVALUATE: Final = "evaluate"
CARD: Final = "card"
STAGES: Final = (SCORE, SELECT, QUANTIZE, VERIFY, EVALUATE, CARD)
"""In the order in which they are done."""

RECORD: Final = "compress.json"
SALIENCY: Final = "saliency.safetensors"
KEEP: Final = "keep.json"
EVALUATION: Final = "evaluation.json"
PICTURES: Final = {SELECT: "saliency.png", EVALUATE: "evaluation.png"}
"""Stage -> what is drawn of it, when pictures are asked for."""

_SHOWN: Final = ((SELECT, KEEP), (EVALUATE, EVALUATION), *PICTURES.items())
_FILES: Final = (RECORD, SALIENCY, KEEP, EVALUATION, *PICTURES.values())
_OURS: Final = frozenset({LOCK, *_FILES, *(f"{name}.tmp" for name in _FILES)})
_MADE_FROM: Final = {SELECT: SCORE, QUANTIZE: SELECT, VERIFY: QUANTIZE, EVALUATE: QUANTIZE}
_FORMAT: Final = "shardxform.compress"
_MAX_BYTES: Final = 64 << 20


def results_folder(out: Path) -> Path:
    """Where results lie unless another place is named: beside the output."""
    return out.with_name(out.name + ".compress")


def following(stage: str) -> list[str]:
    """Stages whose results are made from what a stage gives, directly or not; the card looks for itself."""
    out = [later for later, earlier in _MADE_FROM.items() if earlier == stage]
    return [*out, *(name for each in out for name in following(each))]


# -- one process's work in it -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What the record says of one stage.

    Attributes:
        inputs: what its result depends on, by name.
        done: whether it is done, if its files are there.
        files: name -> SHA-256 of what it wrote here.
        facts: what it found.

    """

    inputs: Mapping[str, object]
    done: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class ResultsFolder(OwnedDir):
    """Owns the directory; use as a context manager, which holds its lock."""

    def __init__(self, root: Path, fs: FileSystem | None = None) -> None:
        super().__init__(root, fs or FileSystem())
        self.stages: dict[str, StageRecord] = {}

    def refuse_foreign(self) -> None:
        """Refuse what is not ours, and a damaged record."""
        read_stages(self.root)

    def load(self) -> None:
        """Read the record."""
        self.stages = read_stages(self.root)

    # -- stages -------------------------------------------------------------------------------------------------

    def is_done(self, stage: str) -> bool:
        """Whether a stage is done and all its results are as it wrote them.

        Raises:
            OutputError: one was changed since.

        """
        entry = self.stages.get(stage)
        return entry is not None and entry.done and all(self._holds(stage, n) for n in entry.files if _is_result(n))

    def is_as(self, stage: str, inputs: Mapping[str, object]) -> bool:
        """Whether a stage was begun with these inputs."""
        return stage in self.stages and self.stages[stage].inputs == plain(inputs)

    def begin(self, stage: str, inputs: Mapping[str, object]) -> None:
        """Have a stage begun in the record: what it gave before, and what was made from that, no longer counts."""
        self.forget([name for name in following(stage) if name in self.stages])
        self._remove_files(stage)
        self.stages[stage] = StageRecord(inputs=inputs)
        self._write()

    def put(self, stage: str, files: Mapping[str, bytes], facts: Mapping[str, object] | None = None) -> None:
        """Write the results of a stage that has begun; when all are there it is done."""
        digests = {name: _sha256(data) for name, data in files.items()}
        entry = replace(self.stages[stage], done=True, files=digests, facts=facts or {})
        if entry != self.stages[stage] or not self.is_done(stage):
            self._name_and_write(stage, entry, files)

    def add(self, stage: str, name: str, data: bytes) -> None:
        """Write a further file of a stage that is done, such as a picture."""
        entry = self.stages[stage]
        self._name_and_write(stage, replace(entry, files={**entry.files, name: _sha256(data)}), {name: data})

    def read(self, stage: str, name: str) -> bytes:
        """A result, as the stage wrote it.

        Raises:
            OutputError: it was changed since, or is gone.

        """
        if not self._holds(stage, name):
            raise OutputError(f"{self.root / name}: missing; run the same command again")
        return (self.root / name).read_bytes()

    def forget(self, stages: Iterable[str]) -> None:
        """Remove what stages gave, and their place in the record."""
        for stage in stages:
            self._remove_files(stage)
            self.stages.pop(stage, None)
        self._write()

    # -- files --------------------------------------------------------------------------------------------------

    def _name_and_write(self, stage: str, entry: StageRecord, files: Mapping[str, bytes]) -> None:
        for name in files:
            self._holds(stage, name)  # refuses what is not ours
        self.stages[stage] = entry
        self._write()
        for name, data in files.items():
            self.fs.write_atomic(self.root / name, data, self.root)

    def _remove_files(self, stage: str) -> None:
        entry = self.stages.get(stage)
        for name in entry.files if entry else ():
            if self._holds(stage, name):
                self.fs.remove_if_there(self.root / name)

    def _holds(self, stage: str, name: str) -> bool:
        """Whether a file is there, as a stage wrote it.

        Raises:
            OutputError: it is there, and is another.

        """
        path = self.root / name
        if not os.path.lexists(path):
            return False
        entry = self.stages.get(stage)
        if entry and name in entry.files and entry.files[name] == file_sha256(path):
            return True
        raise OutputError(f"{path}: not as compress wrote it; move it away and run the same command again")

    def _write(self) -> None:
        stages = {stage: asdict(self.stages[stage]) for stage in STAGES if stage in self.stages}
        record = {"format": _FORMAT, "version": 1, "stages": stages}
        self.fs.write_atomic(self.root / RECORD, pretty(record).encode(), self.root)


# -- the record -------------------------------------------------------------------------------------------------------


def read_stages(root: Path) -> dict[str, StageRecord]:
    """What the record of a directory says, by stage; nothing where there is none yet. Changes nothing.

    Raises:
        OutputError: the directory holds what is not ours, or its record is damaged.

    """
    for item in items_of(root, "a directory of compress"):
        ours = item.is_file(follow_symlinks=False) if item.name in _OURS else _is_work(item)
        if not ours:
            raise OutputError(f"{item.path}: not shardxform's; move it away, or name another OUT")
    return _stages(root / RECORD)


def work_of(root: Path, stage: str) -> Path:
    """Where the hidden states of a stage lie while it runs."""
    return root / f"{stage}.work"


def changed(
    stages: Mapping[str, StageRecord], inputs: Mapping[str, Mapping[str, object]], names: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Stages that were made, or begun, with other inputs than these, and the first difference of each.

    What computed a stage counts as long as it is under way. A card is simply written again. `names` are the tensors of
    the source's shards.
    """
    found: dict[str, str] = {}
    for stage, new in inputs.items():
        if stage == CARD or stage not in stages:
            continue
        pair = stages[stage].inputs, plain(new)
        old, now = map(computing.without, pair) if stages[stage].done else pair
        if where := difference(old, now, names, stage):
            found[stage] = where
    return found


def refuse_changed(root: Path, stages: Mapping[str, StageRecord], found: Mapping[str, str]) -> None:
    """Refuse to go on with results of other inputs, as `changed` found them; say what remains if it is forced.

    Raises:
        ResumeError: names the first stage and the first difference.

    """
    gone = {CARD, *found, *(later for stage in found for later in following(stage))}
    kept = [stage for stage, record in stages.items() if stage not in gone and record.done]
    spared = f"which keeps what {', '.join(kept)} gave" if kept else "which makes everything again"
    for stage, where in found.items():
        raise ResumeError(
            f"{root}: '{stage}' was made from other inputs: {where}; name another OUT, or start"
            f" over with `force`, {spared}"
        )


def plain(value: Mapping[str, object]) -> dict[str, Any]:
    """As it comes back from JSON: tuples are lists, keys are text."""
    return parse_object(dumps(value).encode())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; empty for what is no plain file."""
    if not os.path.lexists(path) or not stat.S_ISREG(os.lstat(path).st_mode):
        return ""
    return _sha256(path.read_bytes())


def _stages(path: Path) -> dict[str, StageRecord]:
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise JsonError(f"larger than {_MAX_BYTES} bytes")
        record = parse_object(path.read_bytes())
    except (OSError, JsonError) as e:
        raise OutputError(f"{path}: damaged: {e}; remove {path.parent} and start over") from e
    stages = record.get("stages")
    if (record.get("format"), record.get("version")) != (_FORMAT, 1) or not isinstance(stages, dict):
        raise OutputError(f"{path}: not a record of this version; move {path.parent} away and start over")
    if odd := next((name for name in stages if name not in STAGES), None):
        raise OutputError(f"{path}: stages: {odd!r} is none of {', '.join(STAGES)}; remove {path.parent}")
    return {name: _stage(path, name, value) for name, value in stages.items()}


def _stage(path: Path, stage: str, value: object) -> StageRecord:
    shapes = {"inputs": dict, "done": bool, "files": dict, "facts": dict}
    if not isinstance(value, dict) or any(not isinstance(value.get(key), kind) for key, kind in shapes.items()):
        raise OutputError(f"{path}: stages.{stage}: expected inputs, done, files and facts; remove {path.parent}")
    for name in value["files"]:
        if name not in _FILES:
            raise OutputError(f"{path}: stages.{stage}: names {name!r}, which is no result; remove {path.parent}")
    return StageRecord(**{key: value[key] for key in shapes})


def _is_work(item: os.DirEntry[str]) -> bool:
    return item.name in (f"{SCORE}.work", f"{EVALUATE}.work") and item.is_dir(follow_symlinks=False)


def _is_result(name: str) -> bool:
    """Whether a stage is not done without the file; pictures are drawn when they are asked for."""
    return not name.endswith(".png")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- what lies beside an output ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What `compress` left beside an output, for whoever describes that.

    Only results that are as the record has them, and of the very output that is described, count.

    Attributes:
        folder: the directory of results.
        files: those that can be used.
        why_not: why nothing of it can be; empty when something can.

    """

    folder: Path
    files: tuple[Path, ...] = ()
    why_not: str = ""

    @property
    def manifest(self) -> Path | None:
        """The experts that were chosen."""
        return next((path for path in self.files if path.name == KEEP), None)

    @property
    def evaluations(self) -> tuple[Path, ...]:
        """What was measured."""
        return tuple(path for path in self.files if path.name == EVALUATION)

    @property
    def pictures(self) -> tuple[Path, ...]:
        """What was drawn."""
        return tuple(path for path in self.files if path.suffix == ".png")


def results_of(out: Path) -> Results | None:
    """Look for the directory that `compress` makes beside OUT; None where there is none. Changes nothing.

    An unusable directory is no error: `why_not` says what is wrong with it.

    Raises:
        OutputError: OUT's record is damaged.

    """
    folder = results_folder(Path(os.path.abspath(out)) if out.name in ("", "..") else out)
    if not folder.is_dir():
        return None
    record = read_record(out / PROVENANCE)
    try:
        stages = read_stages(folder)
    except OutputError as e:
        return Results(folder=folder, why_not=str(e))
    made = stages.get(QUANTIZE)
    if made is None or not made.done or record is None or made.facts.get("plan") != record.fingerprint:
        return Results(folder=folder, why_not=f"not of {out} as it is")
    files = tuple(folder / name for stage, name in _SHOWN if _is_whole(folder / name, stages.get(stage)))
    return Results(folder=folder, files=files, why_not="" if files else "no result as it was written")


def _is_whole(path: Path, entry: StageRecord | None) -> bool:
    """Whether a file is as a finished stage wrote it."""
    wanted = entry.files.get(path.name) if entry is not None and entry.done else None
    return wanted is not None and wanted == file_sha256(path)
