"""The server's clock: CLOCK_BOOTTIME plus one offset, fixed once per host boot and shared by all processes.

It never goes back: not when the wall clock is set, not over a restart of ours, and not over a reboot of the
host, because a new offset is never taken below the last time stored. One instant so cuts all disks at one
place.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime_ns, time_ns

from cdpserver.durable import read_json, take_int, take_keys, take_str, write_json
from cdpserver.errors import RefusedError, UsageError

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"

# File names are made of it (open-BOOT.mdb).
_BOOT_ID = re.compile(r"[A-Za-z0-9-]{8,64}")


def boot_id() -> str:
    """The id of this host boot.

    The environment variable CDP_BOOT_ID overrides it. It is for tests only, which so play an unclean reboot
    of the host; all processes of a state directory must be given the same.
    """
    override = os.environ.get("CDP_BOOT_ID")
    if override:
        if not _BOOT_ID.fullmatch(override):
            raise UsageError(
                "CDP_BOOT_ID is not a boot id", hint="8 to 64 letters, digits and '-'; or unset it"
            )
        return override
    with open(BOOT_ID_FILE, encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of one host boot; see docs/format.md, clock.json."""

    boot_id: str
    offset_ns: int
    floor_ns: int

    def now_ns(self) -> int:
        """Nanoseconds since 1970. Asked once per write: one system call through the vDSO and an addition."""
        now = clock_gettime_ns(CLOCK_BOOTTIME) + self.offset_ns
        return now if now > self.floor_ns else self.floor_ns

    @classmethod
    def load(cls, path: Path) -> "Clock":
        """The clock that the service fixed for this boot. RefusedError if it has fixed none yet."""
        clock = _read(path)
        if clock is None or clock.boot_id != boot_id():
            raise RefusedError(
                "the clock is not set for this host boot", hint="start cdpserver once: it sets it"
            )
        return clock

    @classmethod
    def for_reading(cls, path: Path) -> "Clock":
        """The clock for who only reads: that of this boot, else one by the wall, which nobody keeps. CorruptError.

        So history can be read where no service has ever run, from a copy or from read-only media.
        """
        clock = _read(path)
        if clock is not None and clock.boot_id == boot_id():
            return clock
        floor_ns = 0 if clock is None else clock.floor_ns
        return cls(boot_id(), time_ns() - clock_gettime_ns(CLOCK_BOOTTIME), floor_ns)


def _read(path: Path) -> Clock | None:
    """The stored clock of whichever boot; None if there is none; CorruptError."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    take_keys(value, {"boot_id", "offset_ns", "floor_ns"}, path)
    return Clock(
        take_str(value, "boot_id", path),
        # A host whose uptime passes its wall clock (no battery) has a negative offset.
        take_int(value, "offset_ns", path, least=-(1 << 63)),
        take_int(value, "floor_ns", path),
    )


def fix_clock(
    path: Path, last_stored_ns: Callable[[], int], fixing: Callable[[Clock], None] = lambda _: None
) -> tuple[Clock, bool]:
    """The clock for this boot, and whether it was fixed anew. Only the service calls this, before its
    children run.

    In the same boot the stored clock is kept. In another one the offset is taken from the wall clock, but
    never so that the clock would read less than `last_stored_ns()` + 1 (asked only then, since it may scan
    the store); `fixing` is told of the new clock before it is durable. On return the file is durable.
    CorruptError if the file is damaged: then no process of this boot may still use the old offset.
    """
    current = boot_id()
    stored = _read(path)
    if stored is not None and stored.boot_id == current:
        return stored, False
    floor_ns = max(last_stored_ns() + 1, 0)
    uptime_ns = clock_gettime_ns(CLOCK_BOOTTIME)
    clock = Clock(current, max(time_ns(), floor_ns) - uptime_ns, floor_ns)
    fixing(clock)
    write_json(path, {"boot_id": clock.boot_id, "offset_ns": clock.offset_ns, "floor_ns": clock.floor_ns})
    return clock, True


def wall_difference_ns(clock: Clock) -> int:
    """How far the wall clock is ahead of ours (negative: behind). A change between two calls is a jump of the
    wall.
    """
    return time_ns() - clock.now_ns()
