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
    latency_io: int = 64 * MIB
    first_copy: int = 4 * GIB
    sequential: int = 768 * MIB
    read_disk: int = 256 * MIB
    read_seconds: float = 2.0
    chain_disk: int = 64 * MIB
    chains: tuple[int, ...] = (1, 32, 72, 128)
    records: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    rto_records: tuple[int, ...] = (10_000, 1_000_000)
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
    steady_disk: int = GIB
    steady_seconds: float = 20.0
    changed: int = GIB
    lengths: tuple[int, ...] = (300, 3_000, 30_000, 300_000)
    cut_blocks: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    prune_intervals: tuple[int, ...] = (1, 10, 100)
    memory_disks: tuple[int, ...] = (1, 10, 100, 1000)
    most_peers: int = 100
    busy_disks: tuple[int, ...] = (1, 2, 4, 8)
    scale_disk: int = GIB
    chunk_disk: int = 512 * MIB
    chunk_sizes: tuple[int, ...] = (MIB // 16, MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
    chunk_steps: int = 6
    backup_disk: int = GIB


QUICK = Sizes(
    random_io=128 * MIB,
    latency_io=32 * MIB,
    first_copy=GIB,
    sequential=384 * MIB,
    read_disk=128 * MIB,
    read_seconds=1.0,
    chain_disk=32 * MIB,
    chains=(1, 32),
    records=(10_000, 100_000),
    zero_disk=TIB,
    remirror=128 * MIB,
    load_seconds=2.0,
    steady_disk=256 * MIB,
    steady_seconds=12.0,
    changed=256 * MIB,
    lengths=(300, 3_000, 30_000),
    cut_blocks=(10, 1_000, 10_000),
    prune_intervals=(1, 10),
    memory_disks=(1, 10),
    scale_disk=512 * MIB,
    chunk_disk=256 * MIB,
    chunk_steps=3,
    backup_disk=256 * MIB,
)
"""The rows of docs/performance.md in a few minutes, except what takes long by its nature."""

SMOKE = Sizes(
    random_disk=64 * MIB,
    random_io=16 * MIB,
    latency_io=32 * MIB,
    first_copy=64 * MIB,
    sequential=64 * MIB,
    read_disk=16 * MIB,
    read_seconds=0.5,
    chain_disk=4 * MIB,
    chains=(1, 5),
    records=(500, 5_000),
    rto_records=(500, 5_000),
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
    steady_disk=16 * MIB,
    steady_seconds=1.0,
    changed=8 * MIB,
    lengths=(100,),
    cut_blocks=(10,),
    prune_intervals=(1,),
    memory_disks=(2,),
    busy_disks=(2,),
    scale_disk=16 * MIB,
    chunk_disk=16 * MIB,
    chunk_sizes=(MIB // 16, MIB),
    chunk_steps=2,
    backup_disk=16 * MIB,
)
"""Enough to see that everything works; the figures say nothing."""


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
