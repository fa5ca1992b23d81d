"""A guest of 512 bytes: firmware reads it from the disk, it writes to the disk, and says so on the serial port.

It shows what a guest needs of a disk, its first read and its first write, in the half second that firmware takes.
"""

SECTOR = 512

SERIAL = 0x3F8
WRITTEN = 1
"""The sector that it writes, a copy of itself."""


def boot_sector(*, before: str = "R", after: str = "W", resets: bool = False) -> bytes:
    """Says `before`, writes, says `after` if that was acknowledged, and halts; or resets the machine."""
    code = _say(before)
    # INT 13h, AH=03h: write AL sectors from ES:BX to cylinder 0, sector CL (from 1) of drive DL.
    code += bytes.fromhex("b80103") + bytes([0xB9, WRITTEN + 1, 0x00]) + bytes.fromhex("bb007c ba8000 cd13")
    said = _say(f"{after}\n")
    code += bytes([0x72, len(said)]) + said  # jc: not a word if it failed
    code += bytes.fromhex("b0fee664") if resets else b""  # the keyboard controller's reset line
    return (code + bytes.fromhex("f4ebfd")).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _say(text: str) -> bytes:
    code = bytes([0xBA]) + SERIAL.to_bytes(2, "little")  # mov dx, SERIAL
    for letter in text.encode("ascii"):
        code += bytes([0xB0, letter, 0xEE])  # mov al, letter; out dx, al
    return code
