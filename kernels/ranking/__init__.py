"""Score every token of a history for every query segment."""
