"""Write docs/families.md from the families themselves: `python scripts/families.py > docs/families.md`."""

from __future__ import annotations

from shardxform.model.families.listing import Listed, listing_of

HEAD = """# Families

What is known of each architecture. `inspect`, `prune`, `verify`, `card` and `push` work for all of them; `score`,
`evaluate`, healing and tuned rounding for those whose blocks are run; `quantize` and `convert` for the formats whose
loaders find the experts. Written by `scripts/families.py` from the entries; [adding one](adding-a-family.md).

| model_type | releases | experts | MTP layers | quantized for | run |
|---|---|---|---|---|---|
"""


def row(family: Listed) -> str:
    """One line of the table."""
    cells = (
        ", ".join(f"`{name}`" for name in family.model_types),
        family.releases,
        family.experts,
        "yes" if family.mtp else "",
        ", ".join(family.formats) or f"none: {family.unread}",
        f"no: {family.not_run}" if family.not_run else "yes",
    )
    return "|".join(("", *(f" {cell} " for cell in cells), ""))


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(map(row, listing_of())) + "\n"


if __name__ == "__main__":
    print(page(), end="")
