"""What a model is made of: families as data, the place of every tensor, linear weights."""
