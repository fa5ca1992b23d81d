"""Rapid recovery: a VM runs from a point at once, and its disks move home while it runs."""
