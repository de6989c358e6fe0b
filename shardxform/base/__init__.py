"""What every room stands on: types and names of tensors, headers, strict JSON, files and their effects."""
