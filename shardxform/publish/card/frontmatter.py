"""The block of YAML at the head of a model card: the few keys that are read from one, and those that are written.

Reads top-level scalars and lists of scalars, which is what hubs' cards have there; anything else is passed over. What
is taken over is matched against what it may look like: a card comes from a stranger, and goes to others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Final

from shardxform.publish.card.facts import Facts, Origin

__all__ = ["front_matter", "is_hub_name", "origin_of", "parse"]

Value = str | list[str]

_KEY: Final = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]+(.*))?")
_ITEM: Final = re.compile(r"[ \t]*-[ \t]+(.*)")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LICENSE_NAME: Final = re.compile(r"[A-Za-z0-9][\w.+ -]{0,95}", re.ASCII)
_LINK: Final = re.compile(r"https://[\w./~%+:-]{1,200}|LICEN[SC]E[\w.-]{0,40}", re.ASCII)
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|multilingual")
_PLACE: Final = re.compile(r"https://[^/]+/([^/]+/[^/]+)/(?:blob|resolve|raw)/.*")
_BARE: Final = re.compile(r"[A-Za-z][\w./+-]*", re.ASCII)
_NOT_TEXT: Final = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})
_LICENSE_TEXTS: Final = (  # near the head of the file, white space folded
    ("apache-2.0", re.compile(r"apache license,? version 2\.0", re.IGNORECASE)),
    ("mit", re.compile(r"(the )?mit license\b|permission is hereby granted, free of charge", re.IGNORECASE)),
)
_HEAD: Final = 2000


def is_hub_name(text: object) -> bool:
    """Whether `text` looks like `owner/name` on a hub."""
    return isinstance(text, str) and bool(_HUB_NAME.fullmatch(text)) and ".." not in text


def parse(card: str) -> dict[str, Value]:
    """Read the front matter of a card; empty when it has none."""
    lines = card.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    out: dict[str, Value] = {}
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
    found = parse(card)
    link = _matching(found, "license_link", _LINK)
    base = _matching(found, "base_model", _HUB_NAME)
    if not ours:
        place = _PLACE.fullmatch(link)
        base = place[1] if place and is_hub_name(place[1]) and place[1] != base else ""
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


def front_matter(facts: Facts) -> str:
    """Lines from `---` to `---`."""
    lines = ["---"]
    for key, value in _entries(facts):
        if isinstance(value, str):
            lines.append(f"{key}: {_yaml(value)}")
        else:
            lines += [f"{key}:", *(f"- {_yaml(item)}" for item in value)]
    return "\n".join([*lines, "---"])


def _entries(facts: Facts) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """Keys that have something to say, in the order in which hubs show them."""
    origin = facts.origin
    entries: Mapping[str, str | tuple[str, ...]] = {
        "language": origin.languages,
        "license": origin.license,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
        "base_model": origin.base_model,
        "base_model_relation": "quantized" if origin.base_model and facts.quantization else "",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if facts.vision else "text-generation",
        "tags": tuple(_tags(facts)),
    }
    yield from ((key, value) for key, value in entries.items() if value)


def _tags(facts: Facts) -> Iterator[str]:
    yield "moe"
    if facts.pruning:
        yield "pruned"
        if re.fullmatch(r"[a-z0-9-]{1,32}", facts.pruning.criterion):
            yield facts.pruning.criterion
    if facts.quantization:
        yield f"int{facts.quantization.bits}"
        yield facts.quantization.format
    yield "shardxform"


def _license_of(text: str) -> str:
    """The hub's code of a licence by its text; `other` for a text that is not known, empty for none."""
    head = " ".join(text[:_HEAD].split())
    return next((code for code, pattern in _LICENSE_TEXTS if pattern.search(head)), "other" if head else "")


def _matching(found: Mapping[str, Value], key: str, pattern: re.Pattern[str]) -> str:
    value = found.get(key, "")
    first = value if isinstance(value, str) else value[0] if len(value) == 1 else ""
    return first if pattern.fullmatch(first) else ""


def _value(text: str) -> Value:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_scalar(item) for item in text[1:-1].split(",") if item.strip()]
    return _scalar(text)


def _scalar(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0]:
        return text[1:-1]
    return text.split(" #")[0].rstrip()


def _yaml(text: str) -> str:
    """A text as YAML has it: bare where that can mean nothing else, else as JSON."""
    bare = _BARE.fullmatch(text) and text.lower() not in _NOT_TEXT
    return text if bare else json.dumps(text, ensure_ascii=False)
