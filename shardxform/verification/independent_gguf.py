"""A second opinion on a model in GGUF that was pruned: held against its source by the `gguf` package's own reader.

Nothing here is shared with what prunes: which tensors count experts is told by their names, which bytes are an expert's
by the package, and what stays by the manifest. Files on this machine only; an expert is in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from shardxform.errors import CheckpointError
from shardxform.runtimes.gguf.architecture import vocabulary
from shardxform.verification.findings import Findings

__all__ = ["check_gguf_independently"]

_CODE: Final = "independent"
_OF_EXPERTS: Final = re.compile(
    r"blk\.(\d+)\.(?:ffn_(?:gate|up|down|gate_up)_exps\..+|ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:_vl)?(?:\..+)?)"
)
_PIECE: Final = 1 << 24  # elements at a time
_SPLIT: Final = "split."

Lists = Mapping[str, Sequence[int]]


def check_gguf_independently(
    files: Sequence[Path], sources: Sequence[Path], findings: Findings, manifest: Mapping[str, Lists] | None = None
) -> int:
    """Hold every tensor and key of a model against its source and a manifest.

    Args:
        files: of the model.
        sources: files of what was pruned.
        findings: added to; problems only.
        manifest: `keep` and `mtp_keep`, lists of ids by layer; None for what shardxform.json beside the files says.

    Returns:
        the number of tensors that were compared.

    Raises:
        CheckpointError: the source cannot be read by the package, or there is no such package.

    """
    reader = vocabulary().GGUFReader
    try:
        theirs = [reader(path) for path in sources]
    except (OSError, ValueError, KeyError, IndexError) as e:
        raise CheckpointError(f"{sources[0]}: the gguf package cannot read it: {e}") from e
    try:
        ours = [reader(path) for path in files]
        kept = manifest or json.loads((files[0].parent / "shardxform.json").read_bytes())["inputs"]["manifest"]
        layers, arch = _layers_of(theirs)
        differing = list(_differing(_tensors(ours), _tensors(theirs), kept, layers))
        differing += _other_keys(_keys(ours), _keys(theirs), arch, kept["keep"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        findings.problem(_CODE, ".", f"cannot be compared: {e}")
        return 0
    for name, text in differing:
        findings.problem(_CODE, name, text)
    return len(_tensors(ours))


def _tensors(readers: Sequence[Any]) -> dict[str, Any]:
    return {tensor.name: tensor for reader in readers for tensor in reader.tensors}


def _keys(readers: Sequence[Any]) -> dict[str, Any]:
    """What all files say, less what the package makes up, and which of several files each is."""
    found = {name: field for reader in readers for name, field in reader.fields.items()}
    return {name: field for name, field in found.items() if not name.startswith(("GGUF.", _SPLIT))}


def _layers_of(readers: Sequence[Any]) -> tuple[int, str]:
    """Blocks that are no nextn, and the architecture."""
    keys = _keys(readers)
    arch = str(keys["general.architecture"].contents())
    nextn = keys.get(f"{arch}.nextn_predict_layers")
    return int(keys[f"{arch}.block_count"].contents()) - (int(nextn.contents()) if nextn else 0), arch


def _differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], kept: Mapping[str, Lists], layers: int
) -> Iterator[tuple[str, str]]:
    """Tensors that are not what they must be, and how."""
    for name in theirs.keys() ^ ours.keys():
        yield name, "missing: the source has it" if name in theirs else "nothing in the source gives it"
    for name in theirs.keys() & ours.keys():
        one, other, match = ours[name], theirs[name], _OF_EXPERTS.fullmatch(name)
        ids: Sequence[int] = range(len(other.data))
        if match:
            number = int(match[1])
            lists = kept["keep"] if number < layers else kept["mtp_keep"]
            ids = lists[str(number if number < layers else number - layers)]
        found, wanted = list(one.data.shape), [len(ids), *other.data.shape[1:]]
        if (one.tensor_type, found) != (other.tensor_type, wanted):
            yield name, f"{one.tensor_type.name} {found}, expected {other.tensor_type.name} {wanted}"
            continue
        bad = next((new for new, old in enumerate(ids) if not _same(one.data[new], other.data[old])), None)
        if bad is not None:
            yield name, f"{'expert' if match else 'row'} {bad} is not {ids[bad]} of the source"


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Whether two arrays hold the same bytes."""
    mine, its = (np.atleast_1d(each).reshape(-1) for each in (one, other))
    parts = (slice(at, at + _PIECE) for at in range(0, max(len(mine), 1), _PIECE))
    return all(mine[part].tobytes() == its[part].tobytes() for part in parts)


def _other_keys(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], arch: str, keep: Lists
) -> Iterator[tuple[str, str]]:
    """Keys that say something else than the source's; the number of experts must be that of the lists."""
    for key in theirs.keys() | ours.keys():
        values = [each[key].contents() if key in each else None for each in (ours, theirs)]
        if key == f"{arch}.expert_count":
            values[1] = len(next(iter(keep.values())))
        if repr(values[0]) != repr(values[1]):
            yield key, f"{str(values[0])[:60]}, expected {str(values[1])[:60]}"
