"""How much of the store locked points hold, and how much they may: locks must not fill it unseen."""

import os
from collections.abc import Iterable

from cdpserver.config import Config
from cdpserver.errors import RefusedError
from cdpserver.names import format_bytes
from cdpserver.state import StateDir

WARNING_PERCENT = 80
"""Share of the quota at which a warning is said."""


def quota_bytes(state: StateDir, config: Config) -> int:
    """What locked points may hold: `lock_quota` percent of the store's cap, or of its file system."""
    room = config.store_size_cap
    if room is None:
        found = os.statvfs(state.path)
        room = found.f_blocks * found.f_frsize
    return room * config.store_lock_quota // 100


def check_quota(locked: Iterable[int], quota: int) -> None:
    """RefusedError when locked points hold their quota already."""
    held = sum(locked)
    if held >= quota:
        raise RefusedError(
            f"locked points hold {format_bytes(held)}, and {format_bytes(quota)} is their quota",
            hint="give some back: cdp point locks, cdp point unlock; or raise lock_quota in [store]",
        )
