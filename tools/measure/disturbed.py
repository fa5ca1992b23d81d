"""How steady a guest's writes are while the rest of the service works: base points, retention, and ten points that are read.

    guest, fixed rate ──► disk ◄── cut, prune, cut, prune ...
                            ▲
                            └── fio: ten points of the disk, each read at a fixed rate

The same guest alone is the peer, within a round.
"""

import contextlib
import threading
from collections.abc import Iterator

from cdpserver.state import StateDir
from recovery.client import Client
from tools.kit.processes import FailedError, start
from tools.measure import fio
from tools.measure.context import Context
from tools.measure.result import Goal, Measure
from tools.measure.steady import Guest, Steadiness

ALONE, BUSY = "alone", "with cuts, retention, ten exports"
RATE = 1000
EXPORTS = 10
EXPORT_RATE = 100
POLICY = {"bp_every": "10s", "keep_rp": "10s", "keep_bp": "1h"}
"""Of the disturbed guest, as short as may be: from the tenth second on a pass drops intervals and merges base points."""


def steadiness(context: Context) -> list[Measure]:
    """Percentiles of 4 KiB random writes at a fixed rate."""
    title = f"4 KiB write at {RATE:,}/s"
    goal = Goal(BUSY, ALONE, 2.0, "at most 2x alone")
    measures = {
        "p999": Measure("steady-p999", f"{title}, p99.9", "us", "lower", (goal,)),
        "p99": Measure("steady-p99", f"{title}, p99", "us", "lower"),
        "p50": Measure("steady-p50", f"{title}, median", "us", "lower"),
    }
    done: dict[str, float] = {"cuts": 0, "passes": 0, "dropped": 0}
    for number in range(context.rounds):
        for subject in (ALONE, BUSY):
            found = _run(context, busy=subject == BUSY, done=done)
            for key, measure in measures.items():
                measure.add(subject, getattr(found, key))
            context.say(f"steady {number + 1}/{context.rounds} {subject}: p99.9 {found.p999 / 1000:.1f} ms")
    if not done["cuts"] or not done["passes"]:
        raise FailedError("nothing was cut, or no pass was made, while it was measured")
    measures["p999"].notes["meanwhile, in all rounds"] = done
    return list(measures.values())


def _run(context: Context, *, busy: bool, done: dict[str, float]) -> Steadiness:
    ours, size, seconds = context.ours, context.sizes.steady_disk, context.sizes.steady_seconds
    with ours.disk(size) as name, contextlib.ExitStack() as stack:
        if busy:
            ours.client.set_policy(name, POLICY)
        _history(context, name)
        guest = Guest(ours.uri(name), size=size, rate=RATE, seconds=seconds)
        stack.callback(guest.kill)
        ours.declare(name)
        context.settle()
        if busy:
            stack.enter_context(_readers(context, name))
            chores = stack.enter_context(_chores(context, name, done))
        guest.go()
        found = guest.found()
        if busy and chores:
            raise FailedError(f"the other work failed: {chores[0]}")
        return found


def _history(context: Context, name: str) -> None:
    """Something to read, in as many instants as there are exports."""
    ours, size = context.ours, context.sizes.steady_disk
    job = fio.Job("randwrite", 4096, 16, size, io_bytes=size // 4)
    ours.fill(name, job, context.directory)


@contextlib.contextmanager
def _readers(context: Context, name: str) -> Iterator[None]:
    """Ten instants of the disk, read all the while."""
    last = int(context.ours.client.disk(name)["last_seq"])
    lines = ["[global]", "ioengine=nbd", "thread", "rw=randread", "norandommap", "bs=4096", "time_based"]
    lines += [f"size={context.sizes.steady_disk}", f"runtime={fio.LONGEST_S:.0f}", f"rate_iops={EXPORT_RATE}"]
    for number in range(EXPORTS):
        uri = context.ours.server.uri(f"{name}@seq:{last - number * (last // EXPORTS // 2)}")
        lines += [f"[point{number}]", f"uri={uri}"]
    job = context.directory / "readers.job"
    job.write_text("\n".join(lines) + "\n")
    process = start(["fio", "--eta=never", job], job.with_suffix(".log"))
    try:
        yield
        if process.poll() is not None:
            raise FailedError(f"fio ended: {job.with_suffix('.log').read_text(errors='replace')[-500:]}")
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _chores(context: Context, name: str, done: dict[str, float]) -> Iterator[list[Exception]]:
    """Base points are cut and passes made, one after the other; what failed."""
    client, ended = Client(StateDir.open(context.ours.server.path)), threading.Event()
    failed: list[Exception] = []

    def run() -> None:
        try:
            while not ended.is_set():
                client.cut(name)
                done["cuts"] += 1
                done["dropped"] += len(client.prune(name, dry_run=False))
                done["passes"] += 1
        except Exception as error:  # noqa: BLE001 - raised where the figures are used
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield failed
    finally:
        ended.set()
        thread.join()
