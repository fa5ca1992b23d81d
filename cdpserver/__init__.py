"""Continuous data protection for QEMU/KVM disks."""

import os

__version__ = "0.1.0"

# numpy's OpenBLAS makes a thread for each processor when it is loaded: 25 ms of processor time, and we multiply no matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
