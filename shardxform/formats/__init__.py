"""How numbers of weights are stored: the integer grid, packing, rounding, and what configs say of it."""
