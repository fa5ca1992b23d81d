"""Files of a point: volumes and file systems of a view, read without a mount, in a process that may do nothing else."""
