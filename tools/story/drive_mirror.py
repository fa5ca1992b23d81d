"""Literal `drive-mirror` in qemu-system, with nobody to say *synced*: a history all the same, which says what it is worth."""

from pathlib import Path

from cdpserver.names import format_size, format_time
from tools.kit.processes import FailedError, run, until
from tools.kit.server import Cdp, Server
from tools.kit.source import Machine, end_mirror, in_sync, job
from tools.story.protection import same
from tools.story.report import Report

DISK = "vm2/disk0"
SIZE = 64 << 20


def grades_of(server: Server, disk: str) -> set[str]:
    """The grades of all points there are."""
    points = server.client.points(disk, since=None, until=None, kind=None, limit=None)
    return {str(point["grade"]) for point in points}


def tell(report: Report, server: Server, cdp: Cdp, directory: Path) -> None:
    """The second disk's story."""
    report.step("Literal drive-mirror in qemu-system-x86_64, and nobody says synced")
    with Machine(directory, SIZE) as machine:
        machine.io("write -P 0x11 0 8M")
        machine.io("write -P 0x22 32M 4M")
        uri = cdp.json("disk", "add", "disk0", "--vm", "vm2", "--size", format_size(SIZE))["uri"]
        arguments = machine.drive_mirror(uri)
        report.say(f"QMP drive-mirror {arguments}: READY")
        until(lambda: server.client.disk(DISK)["mode"] == "journal", "history from the FLUSH at READY")
        before = job(machine.qmp)["offset"]
        machine.io("write -P 0x33 1M 3M")
        machine.io("write -P 0x44 40M 64k")
        # In background mode the job sees what the guest wrote only some time later.
        written = before + (3 << 20) + (64 << 10)
        until(lambda: job(machine.qmp)["offset"] >= written and in_sync(machine.qmp), "mirror in sync")
        copy = directory / "then.raw"
        run("cp", "--sparse=always", machine.image, copy)
        then = format_time(server.client.status()["time_ns"])
        machine.io("write -P 0x55 0 4M")
        machine.io("write -z 32M 2M")
        end_mirror(machine.qmp)
        grades = until(lambda: grades_of(server, DISK), "point of the second just over")
        cdp("point", "list", DISK)
        if grades != {"unordered"}:
            raise FailedError(f"{DISK} has points that are {grades}: nobody said synced")
        mine = f"{copy.name}, copied then"
        point = cdp("uri", f"{DISK}@{then}")
        report.compare("a point of drive-mirror", mine, "qemu-img compare", lambda: same(copy, point))
        latest = cdp("uri", f"{DISK}@latest")
        image = machine.image
        report.compare(
            "drive-mirror's last state",
            f"{image.name}, its source",
            "qemu-img compare",
            lambda: same(image, latest),
        )
