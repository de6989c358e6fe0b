"""Channels that experts keep, as the second opinion reads and cuts them: from the manifest and the names of experts.

Nothing here is shared with what plans and writes outputs; see `independent`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shardxform.verification.definitions import Narrowed, PackedWeight

__all__ = ["Channels"]

_INNER: Final = ("gate_proj", "up_proj", "w1", "w3")  # a channel is a row of these
_OUTER: Final = ("down_proj", "w2")  # and a column of these
_WIDTHS: Final = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
"""What configs call the number of channels of routed experts: the first that says as many as they have."""
_SHARED: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""What they call the number of shared experts, each as wide as a routed one where no other key says how wide."""
_OF_SHARED: Final = (".shared_experts.gate_proj.weight", ".shared_mlp.gate_proj.weight")

Kept = Mapping[str, Sequence[tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Channels:
    """Channels that stay.

    Attributes:
        count, of: of every expert in the output, and in the source.
        kept, mtp_kept: by layer, of each expert by its number in the output, ids of its channels, ascending.

    """

    count: int
    of: int
    kept: Kept
    mtp_kept: Kept

    @classmethod
    def read(cls, manifest: Mapping[str, Any]) -> Channels | None:
        """Take what a manifest says under `width`; None where it says nothing.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: that is no choice of channels of the experts that it keeps.

        """
        width = manifest.get("width")
        if not width:
            return None
        count, of = width["channels"], width["of"]
        if type(count) is not int or type(of) is not int or not 0 < count <= of:
            raise ValueError(f"width: {count!r} channels of {of!r}")
        lists = []
        for key, ids in (("kept", manifest.get("keep") or {}), ("mtp_kept", manifest.get("mtp_keep") or {})):
            found = {
                layer: [_ids_of(each, count, of, f"width.{key}, layer {layer}, expert {at}") for at, each in of_layer]
                for layer, of_layer in ((layer, [*enumerate(texts)]) for layer, texts in width.get(key, {}).items())
            }
            for layer in {**ids, **found}:
                if len(ids.get(layer, ())) != len(found.get(layer, ())):
                    raise ValueError(
                        f"width.{key}, layer {layer}: channels of {len(found.get(layer, ()))} experts, but"
                        f" {len(ids.get(layer, ()))} are kept"
                    )
            lists.append(found)
        return cls(count, of, *lists)

    def cut(self, name: str, weight: PackedWeight, layer: str, expert: int, *, mtp: bool) -> PackedWeight:
        """What stays of one weight of an expert.

        Args:
            name: what stands for it among those of the expert, `gate_proj.weight` for one.
            weight: of the source.
            layer: number of its decoder block, or of its MTP layer.
            expert: its number in the output.
            mtp: whether it is of an MTP layer.

        Raises:
            ValueError: the manifest has no channels of that expert, or was made for experts of another width; or the
                weight is of a kind whose channels are not known here.

        """
        lists = (self.mtp_kept if mtp else self.kept).get(layer, ())
        if expert >= len(lists):
            raise ValueError(f"{weight.name}: the manifest says nothing of its channels")
        part, _, last = name.partition(".")
        inner = part in _INNER
        if last not in ("weight", "bias") or not (inner or part in _OUTER):
            raise ValueError(f"{weight.name}: how channels are taken out of it is not derived")
        if last == "bias" and not inner:
            return weight
        axis = 0 if inner else 1
        found = weight.shape[axis] if axis < len(weight.shape) else 0
        if found != self.of:
            raise ValueError(f"{weight.name}: {found} channels, but the manifest is of experts of {self.of}")
        return Narrowed.of(weight, lists[expert], axis)

    def wrong_counts(
        self, source: Mapping[str, Any], out: Mapping[str, Any], weights: Mapping[str, PackedWeight]
    ) -> list[str]:
        """Say which numbers of a config of the decoder are not those of what stays.

        Args:
            source: the config of what was pruned.
            out: that of the output.
            weights: of the source; of shared experts all channels stay.

        """
        wrong = []
        key = next((key for key in _WIDTHS if source.get(key) == self.of), "")
        if not key:
            wrong.append(f"the source's has no number of {self.of} channels")
        elif out.get(key) != self.count:
            wrong.append(f"{key} is {out.get(key)}, but experts keep {self.count} channels")
        key = next((key for key in _SHARED if type(source.get(key)) is int), "")
        rows = {weight.shape[0] for name, weight in weights.items() if name.endswith(_OF_SHARED)}
        sized = any("shared" in key and "size" in key and source[key] for key in source)
        if key and not sized and rows == {source[key] * self.of}:
            told = out.get(key)
            if type(told) is not int or {told * self.count} != rows:
                wrong.append(f"{key} is {told}, but shared experts have {min(rows)} channels, of {self.count} each")
        return wrong


def _ids_of(text: str, count: int, of: int, where: str) -> tuple[int, ...]:
    """Ids in a bitmap in base64, whose first bit is the lowest of the first byte."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    ids = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
    if len(packed) != -(-of // 8) or len(ids) != count or ids[-1] >= of:
        raise ValueError(f"{where}: no bitmap of {count} of {of} channels")
    return tuple(ids.tolist())
