"""Running VMs: talking to QEMU, and what is desired of them."""
