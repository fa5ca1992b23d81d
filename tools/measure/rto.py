"""How long it takes until a VM is back: from the command to each thing that its guest notices, and what a restore would take.

The guest is a boot sector (tools/kit/bootsector.py): firmware reads it, it writes one sector, and says so.

    ours     cdp's request ──► forks ──► QEMU's monitor ──► first read served ──► first write acknowledged
    peer     qemu-img convert of the same point ─────────► QEMU's monitor ──► ...
"""

import contextlib
import time

import nbd

from cdpserver.names import parse_size
from cdpserver.vm.launch import machine
from cdpserver.vm.launch.machine import Machine
from cdpserver.vm.launch.parts import Disk, Image, Places
from tools.kit.bootsector import boot_sector
from tools.kit.processes import FailedError, run, start, stop, until
from tools.kit.qmp import Qmp
from tools.measure.context import Context
from tools.measure.opening import fill
from tools.measure.result import Goal, Measure

DISK_BYTES = parse_size("1G")

LOOK_S = 0.01

PARTS = {
    "export_ms": "disks ready",
    "process_ms": "QEMU runs",
    "read_ms": "first read",
    "rto_ms": "first write",
}


def rto(context: Context) -> list[Measure]:
    """Drills of one point in journals of different lengths, beside converting the point and starting the same VM on the file."""
    lengths = context.sizes.rto_records
    measures = {
        key: Measure(f"rto-{key[:-3]}", f"VM back: {title}", "s", "lower") for key, title in PARTS.items()
    }
    read = measures["read_ms"]
    short, long = (f"{records:,} records" for records in (lengths[0], lengths[-1]))
    read.goals = (
        *(Goal(subject, "", 1.0, "under 1 s") for subject in (short, long)),
        Goal(long, short, 1.5, "flat: at most 1.5x the shortest"),
    )
    with contextlib.ExitStack() as stack:
        points = {}
        for records in lengths:
            name = stack.enter_context(context.ours.disk(DISK_BYTES))
            fill(context, name, records)
            points[f"{records:,} records"] = _bootable(context, name)
        context.settle()
        for _ in range(context.rounds):
            for subject, point in points.items():
                found = context.ours.client.drill({"point": point, "marker": "^RW$", "force": True})
                if found["state"] != "passed":
                    raise FailedError(f"the drill of {point} failed: {found['reason']}")
                for key, measure in measures.items():
                    measure.add(subject, max(found[key] or found["rto_ms"], 1) / 1000)
            for subject, point in points.items():
                for key, seconds in _converted(context, point).items():
                    measures[key].add(f"convert, {subject}", seconds)
    for subject in read.samples:
        context.say(f"rto {subject}: first read {read.median(subject):.2f} s")
    return list(measures.values())


def _bootable(context: Context, name: str) -> str:
    """Put the boot sector on the disk; the point after that."""
    handle = nbd.NBD()
    handle.connect_uri(context.ours.uri(name))
    handle.pwrite(boot_sector().ljust(4096, b"\0"), 0)
    handle.shutdown()
    context.ours.wait_indexed(name)
    return f"{name}@seq:{context.ours.client.disk(name)['last_seq']}"


def _converted(context: Context, point: str) -> dict[str, float]:
    """Seconds from the beginning of the restore to each thing."""
    image = context.directory / "restored.qcow2"
    began = time.perf_counter()
    run(
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-W",
        "-m",
        "8",
        context.ours.server.uri(point),
        image,
    )
    found = {"export_ms": time.perf_counter() - began}
    places = Places(context.directory)
    command = machine.command(
        Machine(), "restored", [Disk("d", Image(str(image), "qcow2"))], places, isolated=True
    )
    process = start(command, context.directory / "restored.log")
    try:
        until(places.qmp.exists, "QEMU's monitor", every_s=LOOK_S)
        with Qmp(places.qmp) as monitor:
            found["process_ms"] = time.perf_counter() - began
            until(lambda: _reads(monitor), "the guest's first read", every_s=LOOK_S)
            found["read_ms"] = time.perf_counter() - began
            until(lambda: "RW" in places.serial.read_text(), "the guest's first write", every_s=LOOK_S)
            found["rto_ms"] = time.perf_counter() - began
    finally:
        stop(process)
        for path in (image, places.qmp, places.agent, places.serial):
            path.unlink(missing_ok=True)
    return found


def _reads(monitor: Qmp) -> bool:
    return any(disk["stats"]["rd_operations"] for disk in monitor.call("query-blockstats"))
