"""How fast a recovered VM's disk moves home, against `qemu-img convert` from qemu-nbd on the same chain; and how long the guest's
own reads take meanwhile.

A qemu-storage-daemon is the VM. The time is that from the service's meeting it to its last step, as the recovery's events say.
The peer has no guest that reads.
"""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import nbd

from tools.kit.processes import FailedError, listens, run, start, stop, until
from tools.kit.source import nbd_server
from tools.measure.context import MIB, Context
from tools.measure.result import Goal, Measure
from tools.measure.servers import qemu_nbd

BLOCK = 4096
PARTS = 4
"""Files of the chain."""

CONVERT = "qemu-img convert"
MODES = ("mirror", "stream")

LONGEST_S = 600.0


def migrate(context: Context) -> list[Measure]:
    """MB/s of a migration, and the 99th percentile of 4 KiB reads at depth 1 during it."""
    size = context.sizes.migrate
    goals = tuple(Goal(mode, CONVERT, 0.8, "at least 0.8x") for mode in MODES)
    speed = Measure("migrate", f"migration of {size // MIB} MiB", "MB/s", "higher", goals)
    latency = Measure("migrate-read", "4 KiB random read of the guest meanwhile, p99", "ms", "lower")
    with context.ours.disk(size, declared=False) as name:
        newest = _fill(context, name)
        context.settle()
        for _ in range(context.rounds):
            speed.add(CONVERT, size / _convert(context, newest) / 1e6)
            for mode in MODES:
                seconds, p99_ms = _recover(context, name, mode)
                speed.add(mode, size / seconds / 1e6)
                latency.add(mode, p99_ms)
    for mode in MODES:
        context.say(f"migrate, {mode}: {speed.ratio(mode, CONVERT):.2f} of qemu-img convert's rate")
    return [speed, latency]


def _fill(context: Context, name: str) -> Path:
    """A quarter of the disk in each file of a chain, whose newest is the point."""
    ours, size = context.ours, context.sizes.migrate
    for part in range(PARTS):
        client = nbd.NBD()
        client.connect_uri(ours.uri(name))
        for place in range(part * MIB, size, PARTS * MIB):
            client.pwrite(random.Random(place).randbytes(MIB), place)
        client.shutdown()
        until(lambda: ours.client.disk(name)["clients"] == 0, "end of the writer")
        ours.declare(name)
        newest = ours.cut(name)
    return newest


def _convert(context: Context, newest: Path) -> float:
    """Seconds of the peer."""
    target, socket = context.directory / "converted.qcow2", context.directory / "qemu-nbd.sock"
    with qemu_nbd(newest, socket, "-r") as uri:
        began = time.monotonic()
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, target)
        seconds = time.monotonic() - began
    target.unlink()
    return seconds


def _recover(context: Context, name: str, mode: str) -> tuple[float, float]:
    """(seconds of a migration, p99 of the guest's reads in ms)."""
    client, home = context.ours.client, context.directory / "home"
    home.mkdir()
    begun = client.start_recovery(
        {
            "point": f"{name}@latest",
            "to": str(home),
            "qmp": str(home / "vm.qmp"),
            "mode": mode,
            "protect": False,
        }
    )
    id, disk = begun["id"], begun["disks"][0]
    with _vm(home, disk["target"] if mode == "stream" else begun["uri"]) as uri, _reads(uri, context) as took:
        until(lambda: client.recovery(id)["state"] in ("done", "failed"), "end of it", seconds=LONGEST_S)
        found = client.recovery(id)
    if found["state"] != "done":
        raise FailedError(f"the migration failed: {found['reason']}")
    client.change_recovery(id, "commit")
    client.remove_fork(disk["fork"])
    run("rm", "-r", home)
    times = {event["event"]: datetime.fromisoformat(event["time"]) for event in found["events"]}
    took.sort()
    p99_ms = took[len(took) * 99 // 100] * 1000
    return (times["pivoted"] - times["connected"]).total_seconds(), p99_ms


@contextlib.contextmanager
def _vm(home: Path, disk: str) -> Iterator[str]:
    """A VM on a fork or a file; the URI at which its guest reads."""
    socket, log = home / "vm.nbd", home / "vm.log"
    if disk.startswith("/"):
        nodes = ["--blockdev", f"qcow2,node-name=d0,file.driver=file,file.filename={disk}"]
    else:
        server, export = nbd_server(disk)
        nodes = [
            *(
                "--blockdev",
                f"nbd,node-name=n0,server.type=unix,server.path={server['path']},export={export}",
            ),
            *("--blockdev", "raw,node-name=d0,file=n0"),
        ]
    command: list[str | Path] = ["qemu-storage-daemon", *nodes]
    command += ["--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"]
    command += ["--export", "nbd,id=e0,node-name=d0,name=d0,writable=on"]
    command += [
        "--chardev",
        f"socket,id=m,path={home / 'vm.qmp'},server=on,wait=off",
        "--monitor",
        "chardev=m",
    ]
    process = start(command, log)
    try:
        listens(process, home / "vm.qmp", log)
        yield f"nbd+unix:///d0?socket={socket}"
    finally:
        stop(process)


@contextlib.contextmanager
def _reads(uri: str, context: Context) -> Iterator[list[float]]:
    """The seconds of each read of a guest that reads one block after the other."""
    took: list[float] = []
    end = threading.Event()

    def read() -> None:
        client = nbd.NBD()
        client.connect_uri(uri)
        chance = random.Random(1)
        while not end.is_set():
            began = time.perf_counter()
            client.pread(BLOCK, chance.randrange(context.sizes.migrate // BLOCK) * BLOCK)
            took.append(time.perf_counter() - began)
        client.shutdown()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield took
    finally:
        end.set()
        thread.join()
