"""What other runtimes call the parts of a model, and how they want them laid out: pure data, no numbers are read."""
