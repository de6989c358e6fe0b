"""Saliency: what calibration data says about every expert, and which experts to keep because of it.

    from shardxform.experts import Saliency, choose

    manifest = choose(Saliency.load("saliency.safetensors"), keep=128)

Statistics add up over runs, and one file serves every criterion and every count of experts. Scoring, which runs the
model, is elsewhere; so are pruning and everything else that reads a checkpoint.
"""

from __future__ import annotations

from shardxform.experts.choosing import CRITERIA, Choice, LayerChoice, choose, decide, keep_of_ratio, super_experts
from shardxform.experts.statistics import ExpertStats, Saliency, difference_of_models

__all__ = [
    "CRITERIA",
    "Choice",
    "ExpertStats",
    "LayerChoice",
    "Saliency",
    "choose",
    "decide",
    "difference_of_models",
    "keep_of_ratio",
    "super_experts",
]
