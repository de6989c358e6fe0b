"""Weight quantization: grids, rounding and the word layouts of the written tensors."""
