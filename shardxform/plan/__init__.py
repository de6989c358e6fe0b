"""Everything about an output but the numbers, as a pure value, before the first byte is written."""
