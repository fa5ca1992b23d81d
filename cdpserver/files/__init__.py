"""Files of a point: volumes and file systems of a view, read without a mount, in a process that may do nothing else."""

PREVIEW_BYTES = 4096
MAX_PREVIEW = 64 << 10
"""Bytes of a file's head that are shown: as many as are wanted by default, and at most."""

DAMAGED = "the file system is damaged there, or was being written: try another instant"
"""The hint where one file cannot be read."""
