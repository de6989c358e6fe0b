"""A checkpoint as it lies on disk or in a repository: its table, its identity, its record. No tensor data."""
