"""How runtimes rotate positions: what of it a config says that they do not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["rotation_notes"]


def rotation_notes(text: Mapping[str, object], runtime: str) -> Iterator[str]:
    """Say where a runtime rotates positions by another rule than transformers, and has no key to be told.

    Args:
        text: config of the decoder.
        runtime: its name.

    """
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "yarn":
        return
    if rope.get("truncate") is False:
        yield (
            f"config.json's truncate is false, but {runtime} always takes YaRN's range in whole channels: its logits"
            " differ a little from those of transformers"
        )
