"""Write docs/families.md from the families themselves: `python scripts/families.py > docs/families.md`."""

from __future__ import annotations

from shardxform.model.families.listing import Listed, listing_of

HEAD = """# Families

What is known of each architecture. `inspect`, `prune`, `verify`, `card` and `push` work for all of them; `score`,
`evaluate`, healing and tuned rounding for those whose blocks are run; `quantize` and `convert` for the formats whose
loaders find the experts. Written by `scripts/families.py` from the entries; [adding one](adding-a-family.md).

Each was run with transformers 5.23, as CI does, and with 5.24, the newest then. An older one lacks classes, and is told
so in one line that names it; what runs no model works without. With 5.0.0 these were run, to the model's own logits:
`deepseek_v2`, `dots1`, `ernie4_5_moe`, `flex_olmo`, `glm4_moe`, `lfm2_moe`, `llama4_text`, `minimax`, `minimax_m2`,
`mixtral`, `olmoe`, `qwen2_moe`, `qwen3_moe`, `qwen3_next` and `solar_open`; `afmoe`, `hunyuan_v1_moe`, `phimoe` and
Granite, whose experts it computes or calls otherwise, are refused.

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
