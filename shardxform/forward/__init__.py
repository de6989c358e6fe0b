"""Running a model that does not fit in memory, one decoder block at a time. Needs torch and transformers."""
