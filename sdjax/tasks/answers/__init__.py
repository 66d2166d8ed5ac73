"""From a text to its answer, and whether two answers are the same."""
