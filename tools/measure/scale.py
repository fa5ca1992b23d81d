"""Several busy disks at once: workers of ours against as many qemu-nbd as there are disks."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from cdpserver.state import StateDir
from cdpserver.target.placement import worker_of
from tools.kit.processes import FailedError, Process, run, start
from tools.kit.server import Server
from tools.measure import endless, fio
from tools.measure.context import Context
from tools.measure.result import Measure
from tools.measure.servers import qemu_nbds
from tools.measure.writes import fill

DEPTH = 16
QCOW2 = "qemu-nbd on overlays"
RAMP_S = 2.0
"""Sessions are declared in it."""


def scale(context: Context) -> list[Measure]:
    """4 KiB random writes at depth 16 to each disk; IOPS of all, by the number of workers."""
    size = context.sizes.scale_disk
    backing = context.directory / "backing.raw"
    fill(backing, size)
    measures = [
        Measure(f"scale-{count}", f"{count} busy disk{'s' * (count > 1)}", "IOPS", "higher")
        for count in context.sizes.busy_disks
    ]
    for number in range(context.rounds):
        for count, measure in zip(context.sizes.busy_disks, measures, strict=True):
            for workers in range(1, (os.cpu_count() or 1) + 1):
                subject = f"cdpserver, {workers} worker{'s' * (workers > 1)}"
                measure.add(subject, _ours(context, count, workers))
            with _overlays(context, backing, count) as uris:
                measure.add(QCOW2, _figures(*_fio(context, uris)))
            said = ", ".join(f"{name} {found[-1]:,.0f}" for name, found in measure.samples.items())
            context.say(f"scale {number + 1}/{context.rounds}, {count}: {said}")
    backing.unlink()
    return measures


def _ours(context: Context, count: int, workers: int) -> float:
    directory = context.directory / "scale"
    with Server(directory, "--workers", str(workers)) as server:
        for number in range(count):
            server.client.add_disk(f"d{number}", size=context.sizes.scale_disk, vm=None, base=None)
            server.client.synced(f"d{number}", session=None, write_blocking=True)
        held = server.client.disks()
        asked = [endless.Worker(StateDir.open(server.path), number) for number in range(workers)]
        process, output = _fio(context, [disk["uri"] for disk in held])
        try:
            endless.all_synced(
                asked, {disk["name"]: worker_of(disk["id"], workers) for disk in held}, process
            )
            found = _figures(process, output)
        finally:
            process.kill()
            process.wait()
            for worker in asked:
                worker.close()
    run("rm", "-r", directory)
    return found


@contextlib.contextmanager
def _overlays(context: Context, backing: Path, count: int) -> Iterator[list[str]]:
    images = [context.directory / f"overlay{number}.qcow2" for number in range(count)]
    for image in images:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, image)
    with qemu_nbds(images) as servers:
        yield [uri for uri, _ in servers]
    for image in images:
        image.unlink()


def _fio(context: Context, uris: list[str]) -> tuple[Process, Path]:
    """Writes to all of them, for a time; the process and where its figures will be."""
    context.settle()
    job, output = context.directory / "scale.job", context.directory / "scale.json"
    output.unlink(missing_ok=True)
    seconds = context.sizes.load_seconds
    job.write_text(
        endless.job(uris, size=context.sizes.scale_disk, depth=DEPTH, seconds=seconds, ramp_s=RAMP_S)
    )
    command: list[str | Path] = ["fio", "--eta=never", "--output-format=json", f"--output={output}", job]
    return start(command, job.with_suffix(".log")), output


def _figures(process: Process, output: Path) -> float:
    status = process.wait(fio.LONGEST_S)
    text = output.read_text(errors="replace") if output.exists() else ""
    if status or "{" not in text:
        raise FailedError(f"fio ended with status {status}: {text[-500:]}")
    return sum(float(job["write"]["iops"]) for job in json.loads(text[text.index("{") :])["jobs"])
