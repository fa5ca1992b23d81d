"""Does KVM run guests here? /dev/kvm alone says nothing: on a host that emulates a guest's first instructions nothing boots.

A boot sector of 512 bytes counts to 2^27 in real mode and says so through QEMU's debug exit. Where the processor runs it, that
takes a tenth of a second; where the kernel emulates it, minutes.
"""

import subprocess
import tempfile
from pathlib import Path

PROBE_S = 10.0

EXIT_PORT = 0xF4
SAYS = 0x10
STATUS = SAYS << 1 | 1
"""What QEMU's isa-debug-exit makes of it."""

BOOT_SECTOR = (
    bytes.fromhex("66b900000008")  # mov ecx, 2**27
    + bytes.fromhex("6649")  # dec ecx
    + bytes.fromhex("75fc")  # jnz back
    + bytes([0xB0, SAYS, 0xE6, EXIT_PORT])  # mov al, SAYS; out EXIT_PORT, al
    + bytes.fromhex("f4ebfd")  # hlt for ever
).ljust(510, b"\0") + b"\x55\xaa"


def runs_guests(program: str = "qemu-system-x86_64", *, accel: str = "kvm") -> bool:
    """Boot the sector; takes up to PROBE_S. For threads."""
    with tempfile.TemporaryDirectory(prefix="cdp-kvm-") as directory:
        disk = Path(directory) / "probe.img"
        disk.write_bytes(BOOT_SECTOR.ljust(1 << 16, b"\0"))
        command = [
            program,
            *(
                "-accel",
                accel,
                "-m",
                "32",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ),
            *("-drive", f"file={disk},format=raw,if=ide,snapshot=on"),
            *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x}"),
        ]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_S, check=False
            )
        except (subprocess.TimeoutExpired, OSError):
            return False
        return done.returncode == STATUS
