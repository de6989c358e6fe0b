"""What calibration data is asked for, and what comes of it: values only.

`DataOptions` refuses numbers that no data could satisfy; whether the data exist and suffice is found in reading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardxform.errors import PlanError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MAX_SOURCES", "MAX_TOKENS", "SOURCE", "SOURCE_NAME", "DataOptions", "Windows", "is_source"]

MAX_TOKENS: Final = 1 << 30
"""Tokens of all windows together: 4 GiB of ids, which are held in memory."""
MAX_SOURCES: Final = 100
"""Sources that are kept apart."""
SOURCE: Final = "source"
"""Field of a record that names where its document comes from."""
SOURCE_NAME: Final = "a name of 1 to 100 characters that can be shown"
"""What `is_source` expects, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Which data, and how they are cut into windows.

    Attributes:
        data: a `.jsonl`, `.json`, `.txt`, `.md` or `.parquet` file, a directory of such files, which are read in the
            order of their names, or a hub data set `owner/name`, or `owner/name/PREFIX` for the files of it whose
            path begins with PREFIX. What exists as a path is never looked for on the hub.
        samples: windows asked for; fewer are given, with a note, where the data hold no more.
        seqlen: tokens of a window.
        seed: chooses the documents where `pack` is false. Packing takes documents in their order, whatever the seed.
        pack: join the documents, each followed by the end-of-text token, and cut the stream from its start; what
            remains is dropped. Otherwise a window is the start of one document, documents are taken in the order
            `numpy.random.Generator(PCG64(seed)).permutation` gives, and two kinds are passed over, as auto-round
            does: those of fewer than `seqlen` tokens, and those whose window is its last token for more than half.
        chat_template: documents are conversations, rendered with the checkpoint's chat template.
        text_key: field or column that holds the documents; empty for `text`, else `content`, or with `chat_template`
            for whichever of `messages` and `conversations` there is.
        sources: take the documents alone whose field `source` is one of these; empty for all. The windows are those of
            data in which there are no others.
        by_source: keep the sources apart: `samples` windows of each, those that `sources` alone would give, in the
            order of their names. A source that does not fill one window is left out, with a note, unless it is one
            of `sources`.

    """

    data: str
    samples: int = 256
    seqlen: int = 2048
    seed: int = 42
    pack: bool = True
    chat_template: bool = False
    text_key: str = ""
    sources: tuple[str, ...] = ()
    by_source: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise PlanError("`data`: expected a path or the name of a hub data set, found an empty one")
        for name, value, least in (("samples", self.samples, 1), ("seqlen", self.seqlen, 2), ("seed", self.seed, 0)):
            if value < least:
                raise PlanError(f"`{name}`: expected at least {least}, found {value}")
        if self.samples * self.seqlen > MAX_TOKENS:
            raise PlanError(
                f"`samples`: expected at most {MAX_TOKENS:,} tokens in all windows, "
                f"found {self.samples:,} x {self.seqlen:,}"
            )
        for name in self.sources:
            if not is_source(name):
                raise PlanError(f"`sources`: expected {SOURCE_NAME}, found {name[:40]!r}")
        if len(self.sources) > MAX_SOURCES:
            raise PlanError(f"`sources`: expected at most {MAX_SOURCES}, found {len(self.sources):,}")


def is_source(name: str) -> bool:
    """Whether a source may have this name: it is shown to people, on terminals and in tables."""
    return 0 < len(name) <= 100 and name.isprintable() and name == name.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Token ids to run a model on.

    Attributes:
        ids_NT: [N, T] int32. Every window is full: what does not fill one is dropped.
        fingerprint: sha256 over the shape and the ids, and which sources were chosen or kept apart.
        provenance: where they come from, without paths: what JSON can hold, in a fixed order.
        notes: what the user should be told, a line each.
        rows: which windows are of which source, in the order of the windows; empty unless sources were kept apart.
        lengths: tokens of each window, falling, where they are not all full; what follows them in a row means nothing.

    """

    ids_NT: NDArray[np.int32]
    fingerprint: str
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    rows: tuple[tuple[str, range], ...] = ()
    lengths: tuple[int, ...] = ()
