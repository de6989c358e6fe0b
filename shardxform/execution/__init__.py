"""Doing a plan: steps, their journal, and the output directory in the order in which it becomes a checkpoint."""
