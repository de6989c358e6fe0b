"""Entries of families drafted from transformers' own classes; see docs/adding-a-family.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardxform.checkpoint.table import Checkpoint
from shardxform.drafting.entry import entry_text, notes
from shardxform.drafting.facts import entry_facts
from shardxform.errors import FamilyError
from shardxform.model.families import HOMES, use
from shardxform.model.families.outside import family_of_text
from shardxform.model.layout import layout_of

__all__ = ["Draft", "draft", "draft_of"]

_MOST: Final = 20


@dataclass(frozen=True, slots=True)
class Draft:
    """The text of an entry, and what a person must decide, which stands at its top too."""

    text: str
    decide: tuple[str, ...]


def draft(model_type: str) -> Draft:
    """Draft the entry of a model type.

    Raises:
        FamilyError: transformers has no class that an entry could be made from.

    """
    facts = entry_facts(model_type)
    return Draft(entry_text(facts), tuple(notes(facts)))


def draft_of(source: Path) -> Draft:
    """Draft the entry of the model type of a checkpoint, and look for its tensors that the draft lacks.

    Raises:
        CheckpointError: it cannot be read.
        FamilyError: see `draft`.

    """
    checkpoint = Checkpoint.open(source)
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError(f"{checkpoint.where}/config.json: model_type: expected a name, found {model_type!r}")
    facts = entry_facts(model_type)
    facts.decide += _lacking(checkpoint, entry_text(facts))
    return Draft(entry_text(facts), tuple(notes(facts)))


def _lacking(checkpoint: Checkpoint, text: str) -> list[str]:
    """Say which tensors of a checkpoint a draft does not know, layers and experts put together."""
    if checkpoint.config["model_type"] in HOMES:
        return []
    use([family_of_text(text, "the draft")])
    try:
        unknown = layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where).unknown
    except FamilyError as e:
        return [str(e)]
    finally:
        use([])
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in unknown))
    more = f", and {len(kinds) - _MOST} more" if len(kinds) > _MOST else ""
    return [f"tensors of {checkpoint.where} that are not known: {', '.join(kinds[:_MOST])}{more}"] if kinds else []
