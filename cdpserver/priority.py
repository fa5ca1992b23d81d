"""What must not take the processor from guests' writes: base points, retention, scrubbing, backups, QEMU's programs for them."""

import os

NICE = 10
"""Beside a worker that wants all of a processor it gets about a tenth. The kernel takes the priority of its I/O from that."""


def behind_writes() -> list[str]:
    """What goes before a command, so that it runs at NICE: no lower where this process does already."""
    return ["nice", "-n", str(max(0, NICE - os.getpriority(os.PRIO_PROCESS, 0)))]
