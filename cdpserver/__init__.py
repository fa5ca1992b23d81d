"""Continuous data protection for QEMU/KVM disks."""

__version__ = "0.1.0"
