"""The source's own card: what its front matter, and the text of its licence, say of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from shardxform.publish.card.facts import Origin

__all__ = ["front_matter_of", "is_model_name", "origin_of"]

_KEY: Final = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]+(.*))?")
_ITEM: Final = re.compile(r"[ \t]*-[ \t]+(.*)")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LICENSE_NAME: Final = re.compile(r"[A-Za-z0-9][\w.+ -]{0,95}", re.ASCII)
_LINK: Final = re.compile(r"https://[\w./~%+:-]{1,200}|LICEN[SC]E[\w.-]{0,40}", re.ASCII)
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|multilingual")
_PLACE: Final = re.compile(r"https://[^/]+/([^/]+/[^/]+)/(?:blob|resolve|raw)/.*")
_LICENSE_TEXTS: Final = (  # near the head of the file, white space folded
    ("apache-2.0", re.compile(r"apache license,? version 2\.0", re.IGNORECASE)),
    ("mit", re.compile(r"(the )?mit license\b|permission is hereby granted, free of charge", re.IGNORECASE)),
)
_HEAD: Final = 2000


def is_model_name(text: object) -> bool:
    """Whether `text` looks like `owner/name` on a hub."""
    return isinstance(text, str) and bool(_HUB_NAME.fullmatch(text)) and ".." not in text


def front_matter_of(card: str) -> dict[str, str | list[str]]:
    """Read the front matter of a card; empty when it has none."""
    lines = card.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    out: dict[str, str | list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.rstrip() in ("---", "..."):
            return out
        item, entry = _ITEM.fullmatch(line), _KEY.fullmatch(line.rstrip())
        if entry:
            key = entry[1]
            out[key] = _value(entry[2] or "")
        elif item and key:
            listed = out[key]
            out[key] = [*(listed if isinstance(listed, list) else []), _scalar(item[1])]
    return {}


def origin_of(card: str, license_text: str, ours: bool) -> Origin:
    """What a card, and the text of a licence file, say of the model.

    A source's own card names in `base_model` what the source was made from, which is not the source; the link to its
    licence does name it, unless that is the base model's.

    Args:
        card: README.md, or empty.
        license_text: the head of LICENSE, or empty.
        ours: whether the card is one of ours, whose `base_model` is the source.

    """
    found = front_matter_of(card)
    link = _matching(found, "license_link", _LINK)
    base = _matching(found, "base_model", _HUB_NAME)
    if not ours:
        place = _PLACE.fullmatch(link)
        base = place[1] if place and is_model_name(place[1]) and place[1] != base else ""
    languages = found.get("language", [])
    codes = [languages] if isinstance(languages, str) else languages
    license_ = _matching(found, "license", _LICENSE) or _license_of(license_text)
    return Origin(
        base_model=base,
        license=license_,
        license_name=_matching(found, "license_name", _LICENSE_NAME),
        license_link=link or ("LICENSE" if license_ == "other" and license_text else ""),
        languages=tuple(code for code in codes if _LANGUAGE.fullmatch(code)),
    )


def _license_of(text: str) -> str:
    """The hub's code of a licence by its text; `other` for a text that is not known, empty for none."""
    head = " ".join(text[:_HEAD].split())
    return next((code for code, pattern in _LICENSE_TEXTS if pattern.search(head)), "other" if head else "")


def _matching(found: Mapping[str, str | list[str]], key: str, pattern: re.Pattern[str]) -> str:
    value = found.get(key, "")
    first = value if isinstance(value, str) else value[0] if len(value) == 1 else ""
    return first if pattern.fullmatch(first) else ""


def _value(text: str) -> str | list[str]:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_scalar(item) for item in text[1:-1].split(",") if item.strip()]
    return _scalar(text)


def _scalar(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0]:
        return text[1:-1]
    return text.split(" #")[0].rstrip()
