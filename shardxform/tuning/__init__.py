"""Tuned rounding (AutoRound) of one decoder block on stacked experts: tensors in, codes and scales out."""
