"""The journal: segments are the truth."""
