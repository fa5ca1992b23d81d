"""Files of a point: the first listing, a walk, and a large file, beside the host's kernel on nbdfuse, and guestfish.

Each round has a new instant. The mount is set up as one would by hand: nbdfuse, a loop device, `mount -o ro`. guestfish takes
its part with --guestfish, where Debian's libguestfs-tools and a kernel package are installed.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tools.kit.mount import as_file, as_loop, mounted
from tools.kit.processes import FailedError, run, until, why_no_mount
from tools.kit.server import BIN
from tools.measure.context import MIB, Context
from tools.measure.result import Goal, Measure

CDP, API_NEW, API_OPEN = "cdp file", "API, a new point", "API, the point open"
LOOP, GUESTFISH = "nbdfuse, loop mount", "guestfish"
GET = "cdp file get"

GUESTFS = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
"""KVM is not tried: a device of that name need not work."""


def files(context: Context) -> list[Measure]:
    """Against an ext4 with many small files in a hundred directories and one large file."""
    with_guestfish, with_loop = context.guestfish, not why_no_mount()
    ls, walk, read = _measures(with_loop=with_loop, with_guestfish=with_guestfish)
    size = _image_size(context)
    image = _image(context, size)
    try:
        with context.ours.disk(size, declared=False) as name:
            run("nbdcopy", image, context.ours.uri(name))
            context.ours.declare(name)
            for number in range(context.rounds):
                context.settle()
                context.ours.client.mark(name, f"round-{number}")
                point = f"{name}@seq:{context.ours.client.place(f'{name}@latest')['seq']}"
                _ready(context)
                _ours(context, point, ls, walk, read)
                uri = context.ours.server.uri(point)
                if with_loop:
                    _loop(context, uri, ls, walk, read)
                if with_guestfish:
                    _guestfish(context, uri, ls, walk, read)
                context.say(f"files: round {number + 1} of {context.rounds}")
    finally:
        image.unlink()
    return [ls, walk, read]


def _measures(*, with_loop: bool, with_guestfish: bool) -> tuple[Measure, Measure, Measure]:
    listing = [Goal(CDP, "", 1.0, "under 1 s")]
    reading = []
    if with_guestfish:
        listing.append(Goal(CDP, GUESTFISH, 0.2, "at least 5x faster than guestfish"))
    if with_loop:
        reading.append(Goal(GET, LOOP, 0.5, "half the loop mount"))
    return (
        Measure("files-ls", "`ls /` of a point, from nothing", "s", "lower", tuple(listing)),
        Measure("files-walk", "all files, by name", "s", "lower"),
        Measure("files-read", "a large file to a file", "MiB/s", "higher", tuple(reading)),
    )


def _image_size(context: Context) -> int:
    return context.sizes.large_file + 32 * 1024 * context.sizes.small_files // 4 + 64 * MIB


def _image(context: Context, size: int) -> Path:
    tree, image = context.directory / "files-tree", context.directory / "files.img"
    dice = Random(1)
    for number in range(context.sizes.small_files):
        folder = tree / f"d{number % 100}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{number}").write_bytes(dice.randbytes(dice.choice((100, 2000, 9000))))
    with open(tree / "large", "wb") as file:
        for _ in range(context.sizes.large_file // MIB):
            file.write(dice.randbytes(MIB))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image, f"{size // 1024}k")
    shutil.rmtree(tree)
    return image


def _ready(context: Context) -> None:
    """The service has a process loaded for the next point: a session that holds none, and whose parser is shut in."""
    state = os.fsencode(context.ours.server.path)
    until(lambda: any(map(_is_spare, _sessions(state))), "session that is loaded")


def _sessions(state: bytes) -> Iterator[Path]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"cdpserver.files.session" in words and state in words:
                yield path.parent


def _is_spare(process: Path) -> bool:
    with contextlib.suppress(OSError):
        held = (os.readlink(link) for link in (process / "fd").iterdir())
        if any("/timelines/" in path for path in held):
            return False
        children = (process / "task" / process.name / "children").read_text().split()
        statuses = [Path(f"/proc/{child}/status").read_text() for child in children]
        return any("NoNewPrivs:\t1" in status for status in statuses)
    return False


# --- the subjects


def _ours(context: Context, point: str, ls: Measure, walk: Measure, read: Measure) -> None:
    client = context.ours.client

    def page() -> None:
        client.ask("files", {"point": point, "path": "/", "page_size": 1000})

    def cdp(*arguments: str | Path) -> Callable[[], None]:
        return lambda: _run(str(BIN / "cdp"), "file", *map(str, arguments), state=context.ours.server.path)

    ls.add(API_NEW, _timed(page))
    ls.add(API_OPEN, _timed(page))
    # Another instant, of which nothing is open yet.
    client.mark(point.partition("@")[0], f"again-{time.monotonic_ns()}")
    newer = f"{point.partition('@')[0]}@latest"
    _ready(context)
    ls.add(CDP, _timed(cdp("ls", newer, "/")))
    walk.add(CDP, _timed(cdp("find", newer, "/")))
    with _folder(context) as folder:
        read.add(GET, _rate(context, cdp("get", point, "/large", "--output", folder)))
    with _folder(context) as folder, open(folder / "large", "wb") as out:
        command = [str(BIN / "cdp"), "file", "cat", point, "/large"]
        read.add(
            "cdp file cat", _rate(context, lambda: _run(*command, state=context.ours.server.path, out=out))
        )


def _loop(context: Context, uri: str, ls: Measure, walk: Measure, read: Measure) -> None:
    started = time.perf_counter()
    with (
        _folder(context) as folder,
        as_file(uri, folder / "nf") as file,
        as_loop(file) as device,
        mounted(device, folder / "mnt", "-o", "ro") as top,
    ):
        os.listdir(top)
        ls.add(LOOP, time.perf_counter() - started)
        walk.add(LOOP, _timed(lambda: _run("find", str(top))))
        read.add(LOOP, _rate(context, lambda: _run("cp", str(top / "large"), str(folder / "large"))))


def _guestfish(context: Context, uri: str, ls: Measure, walk: Measure, read: Measure) -> None:
    """A virtual machine a question, as on the command line; the walk and the file are timed within one."""
    with _folder(context) as folder, as_file(uri, folder / "nf") as file:
        start = ("guestfish", "--ro", "--format=raw", "-a", str(file), "-m", "/dev/sda")
        ls.add(GUESTFISH, _timed(lambda: _run(*start, "ls", "/")))
        script = f"time find /\ntime download /large {folder / 'large'}\n"
        done = subprocess.run(
            start,
            input=script,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **GUESTFS},
        )
        times = [
            float(line.removeprefix("elapsed time: ").split()[0])
            for line in done.stdout.splitlines()
            if line.startswith("elapsed time: ")
        ]
        if done.returncode or len(times) != 2:
            raise FailedError(f"guestfish: {done.stderr.strip()[-1000:]}")
        walk.add(GUESTFISH, times[0])
        read.add(GUESTFISH, context.sizes.large_file / MIB / times[1])


# --- timing


def _run(*command: str, state: Path | None = None, out: Any = subprocess.DEVNULL) -> None:
    environment = {**os.environ, **GUESTFS} | ({} if state is None else {"CDP_STATE_DIR": str(state)})
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, check=False, env=environment
    )
    if done.returncode:
        raise FailedError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()[-1000:]}")


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _rate(context: Context, work: Callable[[], None]) -> float:
    return context.sizes.large_file / MIB / _timed(work)


@contextlib.contextmanager
def _folder(context: Context) -> Iterator[Path]:
    folder = context.directory / "files"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
