"""Trials: a point is run apart from everything, to see whether it works, and nothing of it stays but the result."""
