"""Perplexity, distances between two models, and their standard errors."""
