"""Which intermediate channels every expert keeps: the second axis of a keep manifest.

All experts keep equally many, because config.json has one width for them. A choice is a bitmap for every kept expert,
in base64 as JSON has it: lists of numbers would be a hundred times the manifest.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shardxform.ask.experts import show
from shardxform.errors import ManifestError

__all__ = ["Width"]

_KEYS: Final = ("channels", "of", "kept", "mtp_kept")
_MAX: Final = 1 << 20  # channels of an expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Channels that stay.

    Attributes:
        channels: of every expert that stays.
        of: channels that it has.
        kept: decoder block -> for every expert that stays, in its order, a bitmap of the channels that do; the first
            channel is the lowest bit of the first byte.
        mtp_kept: MTP layer -> the same.

    """

    channels: int
    of: int
    kept: Mapping[int, tuple[bytes, ...]]
    mtp_kept: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, value: object, where: str) -> Width:
        """Take parsed JSON.

        Raises:
            ManifestError: malformed, or a bitmap that has not as many channels as it must.

        """
        if (
            not isinstance(value, Mapping)
            or not set(value) <= set(_KEYS)
            or not {"channels", "of", "kept"} <= set(value)
        ):
            raise ManifestError(f"{where}: expected an object with {', '.join(_KEYS)}, found {show(value)}")
        for key in ("channels", "of"):
            if type(value[key]) is not int or not 1 <= value[key] <= _MAX:
                raise ManifestError(f"{where}.{key}: expected a count, found {show(value[key])}")
        if value["channels"] > value["of"]:
            raise ManifestError(f"{where}: {value['channels']} channels of {value['of']} cannot stay")
        counts = value["channels"], value["of"]
        return cls(
            channels=counts[0],
            of=counts[1],
            kept=dict(_layers(value["kept"], f"{where}.kept", counts)),
            mtp_kept=dict(_layers(value.get("mtp_kept", {}), f"{where}.mtp_kept", counts)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is empty is left out."""
        out: dict[str, Any] = {"channels": self.channels, "of": self.of}
        for key, layers in (("kept", self.kept), ("mtp_kept", self.mtp_kept)):
            if layers:
                out[key] = {
                    str(layer): [base64.b64encode(each).decode() for each in bitmaps]
                    for layer, bitmaps in layers.items()
                }
        return out

    def refuse_other(
        self, keep: Mapping[int, tuple[int, ...]], mtp_keep: Mapping[int, tuple[int, ...]], where: str
    ) -> None:
        """Refuse bitmaps of other layers or of another number of experts than stay.

        Raises:
            ManifestError: names the layer.

        """
        for key, ids, bitmaps in (("kept", keep, self.kept), ("mtp_kept", mtp_keep, self.mtp_kept)):
            for layer in sorted({*ids, *bitmaps}):
                wanted, found = len(ids.get(layer, ())), len(bitmaps.get(layer, ()))
                if wanted != found:
                    raise ManifestError(
                        f'{where}: width.{key}["{layer}"]: channels of {found} experts, but {wanted} are kept'
                    )


def _layers(value: object, where: str, counts: tuple[int, int]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    if not isinstance(value, Mapping):
        raise ManifestError(f"{where}: expected an object, found {show(value)}")
    for layer, bitmaps in value.items():
        if not isinstance(layer, str) or not layer.isdecimal() or len(layer) > 6 or not isinstance(bitmaps, list):
            raise ManifestError(f"{where}: expected lists by layer, found {show(layer)}: {show(bitmaps)}")
        yield int(layer), tuple(_bitmap(each, f'{where}["{layer}"][{at}]', counts) for at, each in enumerate(bitmaps))


def _bitmap(value: object, where: str, counts: tuple[int, int]) -> bytes:
    channels, of = counts
    try:
        found = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        found = b""
    bits = int.from_bytes(found, "little")
    if len(found) != -(-of // 8) or bits >> of or bits.bit_count() != channels:
        raise ManifestError(f"{where}: expected a bitmap of {channels} of {of} channels in base64, found {show(value)}")
    return found
