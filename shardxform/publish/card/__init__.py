"""Model cards: what an output's own record and headers say of it, as facts and as a README.md for publishing.

Every figure comes from shardxform.json, from the headers, or from a file that was named; what is not known is left
out. Reads no tensor data. Replaces no README.md but the source's copied one and an earlier card.
"""

from shardxform.publish.card.facts import CardFacts
from shardxform.publish.card.gathering import CardOptions, gather
from shardxform.publish.card.rendering import render
from shardxform.publish.card.writing import MARK, write_card

__all__ = ["MARK", "CardFacts", "CardOptions", "gather", "render", "write_card"]
