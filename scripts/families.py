"""Write docs/families.md from the families themselves: `python scripts/families.py > docs/families.md`."""

from __future__ import annotations

from shardxform.model.families import HOMES
from shardxform.model.families.listing import Listed, listing_of
from shardxform.runtimes.gguf.architectures import KINDS

HEAD = """# Families

What is known of each architecture. `inspect`, `prune`, `verify`, `card` and `push` work for all of them; `score`,
`evaluate`, healing and tuned rounding for those whose blocks are run; `quantize` and `convert` for the formats whose
loaders find the experts; under GGUF is llama.cpp's name of those that are [written so](gguf.md#families). Written by
`scripts/families.py` from the entries; [adding one](adding-a-family.md).

Each was run with transformers 5.24, as CI does, and scored with 5.23, 5.18, 5.12, 5.6 and 5.1 as well: where one of
these runs a family, it gives the same scores. What an older one lacks is told in one line, and what runs no model works
without. From 5.18 on all are run but `bailing_hybrid`, `beam`, `flint` and `kolibri1`, which came later. 5.12 runs 29
of the 51 that are run at all, 5.6 25 and 5.1 20: they lack classes, compute Granite's experts in a way of their own, or
refuse configs as newer ones write them (layer types of Nemotron-H and GLM-5, head sizes of latent attention).
`mistral4` needs 5.15: before that, its class leaves out a factor.

| model_type | releases | experts | MTP layers | quantized for | GGUF | run |
|---|---|---|---|---|---|---|
"""


def row(family: Listed) -> str:
    """One line of the table."""
    cells = (
        ", ".join(f"`{name}`" for name in family.model_types),
        family.releases,
        family.experts,
        "yes" if family.mtp else "",
        ", ".join(family.formats) or f"none: {family.unread}",
        f"`{kind.name}`" if (kind := KINDS.get(HOMES[family.model_types[0]])) else "",
        f"no: {family.not_run}" if family.not_run else "yes",
    )
    return "|".join(("", *(f" {cell} " for cell in cells), ""))


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(map(row, listing_of())) + "\n"


if __name__ == "__main__":
    print(page(), end="")
