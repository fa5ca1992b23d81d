"""The disk's own snapshots of a running VM: QEMU's chain of overlays, made and merged through its monitor."""
