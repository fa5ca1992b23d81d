"""Chains of base points: what a disk's files stand on, what needs them, and how they are merged."""
