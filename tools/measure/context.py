"""What every bench gets: where, how large, how often, and whom to tell."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tools.kit.processes import run
from tools.measure.servers import Ours

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work each bench does."""

    random_disk: int = 2 * GIB
    random_io: int = 256 * MIB
    sequential: int = 768 * MIB
    read_disk: int = 256 * MIB
    read_seconds: float = 2.0
    chain_disk: int = 64 * MIB
    chains: tuple[int, ...] = (1, 32, 72, 128)
    records: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    openings: int = 5
    zero_disk: int = TIB
    remirror: int = 256 * MIB
    disks: tuple[int, ...] = (1, 10, 100)
    rate: int = 2000
    load_seconds: float = 4.0
    idle_disks: tuple[int, ...] = (100, 1000)
    idle_seconds: float = 8.0
    forward_seconds: float = 2.0
    takeovers: int = 3
    small_files: int = 8000
    large_file: int = 512 * MIB
    migrate: int = GIB


QUICK = Sizes(
    random_disk=64 * MIB,
    random_io=16 * MIB,
    sequential=64 * MIB,
    read_disk=16 * MIB,
    read_seconds=0.5,
    chain_disk=4 * MIB,
    chains=(1, 5),
    records=(500, 5_000),
    openings=2,
    zero_disk=16 * GIB,
    remirror=32 * MIB,
    disks=(3,),
    rate=200,
    load_seconds=1.0,
    idle_disks=(5,),
    idle_seconds=1.0,
    forward_seconds=0.3,
    takeovers=1,
    small_files=30,
    large_file=4 * MIB,
    migrate=16 * MIB,
)
"""Enough to see that everything works; the figures say little."""


@dataclass(frozen=True, slots=True)
class Context:
    """One run of the benchmark."""

    directory: Path
    ours: Ours
    rounds: int
    sizes: Sizes
    say: Callable[[str], None] = field(repr=False)
    guestfish: bool = False
    """Does it take part? A virtual machine in software takes half a minute to start."""

    def settle(self) -> None:
        """Nobody's dirty pages are written during somebody else's turn."""
        run("sync", "--file-system", self.directory)
