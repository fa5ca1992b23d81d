"""QEMU's programs (qemu-img, qemu-nbd), as our functions; no other module starts them.

They run behind guests' writes (`priority`), and die with the thread that called (`setpriv --pdeathsig`): call from a process's
main thread. A failure is a BrokenError, or NoSpaceError, made of the last line that the program said.

Base points are QCOW2 with `extended_l2=on,cluster_size=128k`: a subcluster is then one block of the journal. Measured with
QEMU 7.2, 4,000 scattered 4 KiB writes (15.6 MiB) to a 2 GiB disk over NBD, best of two:

    | options                     | file uses | its length | seconds |
    | (QEMU's default)            | 236 MiB   | 236 MiB    | 0.91    |
    | extended_l2, 64k            | 16.3 MiB  | 236 MiB    | 0.71    |
    | extended_l2, 128k           | 16.3 MiB  | 448 MiB    | 0.69    |
    | extended_l2, 256k           | 32.1 MiB  | 795 MiB    | 0.72    |
    | cluster_size=4k             | 19.6 MiB  | 19.6 MiB   | 0.76    |

512 MiB in one piece: 0.31-0.40 s and 512.5 MiB with each. 128k needs half the table cache of 64k and a sixteenth of that of 4k.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver import durable
from cdpserver.errors import BrokenError, CdpError, CorruptError, NoSpaceError, NotFoundError, RefusedError
from cdpserver.limits import SECTOR
from cdpserver.priority import behind_writes
from cdpserver.progress import Progress, nobody

OPTIONS = "extended_l2=on,cluster_size=128k"

COROUTINES = "8"
"""Requests in flight of a conversion (-m); one connection takes 16."""

INFO_SECONDS = 30.0
"""`qemu-img info` reads a few headers; longer is a hung file system or a hostile chain of backing files."""

NBD_SECONDS = 10.0
"""How long qemu-nbd may take until its socket is there."""

INFO_BYTES = 4 << 20
"""More than this from `qemu-img info` is no description of an image."""

WRITE_LOCK = 100 + 1
"""The byte of a file that QEMU locks while it may write to it (its block/file-posix.c: RAW_LOCK_PERM_BASE, BLK_PERM_WRITE)."""

_FLOCK = struct.Struct("@hhqqi4x")
"""`struct flock`: type, whence, start, length, pid."""

_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What qemu-img says of an image: its format, and its size as a disk in bytes."""

    format: str
    virtual_size: int


def _run(
    arguments: Sequence[str], *, doing: str, cwd: Path | None = None, seconds: float | None = None
) -> bytes:
    """Run a program to its end; its standard output. BrokenError, NoSpaceError."""
    try:
        done = subprocess.run(
            [*behind_writes(), *DIES_WITH_US, *arguments],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=seconds,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise BrokenError(
            f"cannot run {error.filename}", hint="run tools/setup: a package is missing"
        ) from None
    except subprocess.TimeoutExpired:
        raise BrokenError(
            f"{doing} did not end in {seconds:.0f} s", hint="look at the store's disk"
        ) from None
    if done.returncode:
        raise _failed(doing, done.stderr, done.returncode)
    return done.stdout


def _run_told(arguments: Sequence[str], *, doing: str, progress: Progress, cwd: Path | None = None) -> None:
    """As `_run`, for a program that says `(12.34/100%)` again and again."""
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                [*behind_writes(), *DIES_WITH_US, *arguments],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError as error:
            raise BrokenError(
                f"cannot run {error.filename}", hint="run tools/setup: a package is missing"
            ) from None
        with process:
            assert process.stdout is not None
            try:
                while said := os.read(process.stdout.fileno(), 65536):
                    if percents := _PERCENT.findall(said):
                        progress(float(percents[-1]) / 100)
            except BaseException:
                process.kill()  # a Ctrl-C: nobody waits for what it would still write
                raise
        if process.returncode:
            stderr.seek(0)
            raise _failed(doing, stderr.read(), process.returncode)


def _failed(doing: str, stderr: bytes, status: int) -> CdpError:
    lines = stderr.decode(errors="replace").strip().splitlines()
    last = lines[-1].strip()[:300] if lines else f"exit status {status}"
    if os.strerror(errno.ENOSPC) in last or os.strerror(errno.EDQUOT) in last:
        return NoSpaceError(f"{doing}: {last}", hint="free space on the store's file system, then try again")
    return BrokenError(f"{doing}: {last}", hint="the events and the log say more: events.jsonl")


def info(path: Path, format: str | None = None) -> ImageInfo:
    """Format and size of an image file; without `format` it is probed. NotFoundError, RefusedError if we cannot take it."""
    if not path.is_file():
        raise NotFoundError(f"there is no image file {path}", hint="name a disk image file by its path")
    chosen = ["-f", format] if format else []
    command = ["qemu-img", "info", *chosen, "--output=json", str(path.absolute())]
    said = _run(command, doing=f"reading {path.name}", seconds=INFO_SECONDS)
    try:
        value = json.loads(said[:INFO_BYTES])
        found = ImageInfo(str(value["format"]), int(value["virtual-size"]))
        data_file = value.get("format-specific", {}).get("data", {}).get("data-file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenError(f"qemu-img info said nothing of use about {path.name}: {error!r}") from None
    if data_file:
        raise RefusedError(
            f"{path.name} keeps its data in another file",
            hint="make one image of it: qemu-img convert -O qcow2",
        )
    return found


def create_overlay(path: Path, *, backing: Path, format: str, size: int, subclusters: bool = True) -> None:
    """An empty QCOW2 file on `backing`, which is named relative to it; without `subclusters` as QEMU makes it."""
    relative = os.path.relpath(backing, path.parent)
    options = ["-o", OPTIONS] if subclusters else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, "-b", relative, "-F", format]
    _run([*command, path.name, str(size)], doing=f"creating {path.name}", cwd=path.parent)


def create_over_nbd(path: Path, *, node: Mapping[str, Any], size: int) -> None:
    """An empty QCOW2 file over what a raw NBD `node` (as QEMU's `blockdev-add` takes it) reads; nobody connects to that yet."""
    backing = json.dumps({"driver": "raw", "file": dict(node)})
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", f"json:{backing}"]
    _run([*command, str(path.absolute()), str(size)], doing=f"creating {path.name}")


def is_untouched(path: Path) -> bool:
    """Has nobody the QCOW2 file open for writing, and holds it nothing itself?"""
    try:
        return not any(True for _ in own_parts(path, locked=True))
    except CdpError:
        return False


def is_open(path: Path) -> bool:
    """Has a QEMU of this host the image, of whatever format, open for writing? False if it is not there. BrokenError.

    Asked of the lock itself: `qemu-img info` of a raw image meets none.
    """
    if not path.exists():
        return False
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, WRITE_LOCK, 1, 0)
    with durable.io_errors("look at", path), path.open("rb", buffering=0) as file:
        held: int = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0]
    return held != fcntl.F_UNLCK


def create_image(path: Path, *, size: int) -> None:
    """An empty QCOW2 file as QEMU makes it."""
    _run(
        ["qemu-img", "create", "-q", "-f", "qcow2", path.name, str(size)],
        doing=f"creating {path.name}",
        cwd=path.parent,
    )


def drop_leaks(path: Path) -> None:
    """Give room back that a QCOW2 file lost when its writer was killed. CorruptError if more than that is wrong with it."""
    try:
        _run(
            ["qemu-img", "check", "-q", "-r", "leaks", "-f", "qcow2", str(path.absolute())],
            doing=f"checking {path.name}",
        )
    except BrokenError as error:
        raise CorruptError(error.message, hint="--force writes it anew") from None


def convert_delta(uri: str, path: Path, *, backing: Path, format: str, progress: Progress = nobody) -> None:
    """Write the delta export `uri` as a QCOW2 file over `backing`, which is named relative to it.

    Holes of the export are left to the backing file. The file is not durable yet.
    """
    relative = os.path.relpath(backing, path.parent)
    command = ["qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2", "-o", OPTIONS]
    command += ["-B", relative, "-F", format, "-W", "-m", COROUTINES, uri, path.name]
    _run_told(command, doing=f"writing {path.name}", progress=progress, cwd=path.parent)


def copy(path: Path, to: Path) -> None:
    """Copy a file as it is, sharing its blocks where the file system can. Not durable yet."""
    command = ["cp", "--reflink=auto", "--sparse=always", str(path.absolute()), str(to.absolute())]
    _run(command, doing=f"copying {path.name}")


def rebase(path: Path, backing: str, *, format: str, progress: Progress = nobody) -> None:
    """Let a QCOW2 file stand on `backing` (named relative to it; empty for none), and hold what it held: differences are copied.

    Zeros that it must hold now become zero clusters; without detect-zeroes they would be written out.
    """
    image = f"driver=qcow2,file.driver=file,file.filename={path.name},detect-zeroes=on"
    of_format = ["-F", format] if backing else []
    command = ["qemu-img", "rebase", "-p", "--image-opts", "-b", backing, *of_format, image]
    _run_told(command, doing=f"merging into {path.name}", progress=progress, cwd=path.parent)


def check(path: Path) -> None:
    """CorruptError unless qemu-img finds a QCOW2 file whole."""
    try:
        _run(["qemu-img", "check", "-q", "-f", "qcow2", str(path.absolute())], doing=f"checking {path.name}")
    except BrokenError as error:
        raise CorruptError(error.message, hint="it is written anew") from None


def check_unused(path: Path) -> None:
    """RefusedError if a QCOW2 file is open anywhere on this host, by QEMU's lock on its images, or cannot be opened."""
    try:
        info(path, "qcow2")
    except BrokenError as error:
        raise RefusedError(
            f"{path.name} cannot be opened for itself: {error.message}", hint="end what has it open"
        ) from None


def copy_export(uri: str, target: Path, *, format: str, progress: Progress = nobody) -> None:
    """Write an NBD export to the new file `target`, durable on return; a QCOW2 file is checked before it has its name."""
    command = ["qemu-img", "convert", "-p", "-f", "raw", "-O", format, "-W", "-m", COROUTINES]
    temporary = target.with_name(f"{durable.TEMPORARY}{target.name}")
    try:
        _run_told(
            [*command, uri, str(temporary.absolute())], doing=f"writing {target.name}", progress=progress
        )
        if format == "qcow2":
            check(temporary)
        durable.publish(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def own_parts(image: Path, *, locked: bool = False) -> Iterator[tuple[int, int, int]]:
    """(start, end, place) of what a QCOW2 file holds itself, without its backing file: bytes of the disk, and where they
    are in the file, or -1 for zeros. BrokenError, with `locked` also while somebody writes to it; CorruptError.
    """
    options = {
        "driver": "qcow2",
        "backing": None,
        "file": {"driver": "file", "filename": str(image.absolute())},
    }
    said = _run(
        ["qemu-img", "map", *([] if locked else ["-U"]), "--output=json", f"json:{json.dumps(options)}"],
        doing=f"mapping {image.name}",
    )
    for part in json.loads(said):
        if not part["present"]:
            continue
        start, end = part["start"], part["start"] + part["length"]
        if part["zero"]:
            yield start, end, -1
        elif "offset" in part:
            yield start, end, part["offset"]
        else:
            raise CorruptError(
                f"{image.name} holds bytes that are compressed or encrypted",
                hint="no base point of ours does",
            )


def import_base(source: Path, target: Path, *, format: str, progress: Progress = nobody) -> None:
    """Copy the image `source` with its backing files to the sparse raw file `target`, durable on return.

    `format` is what `info` said: an image whose content changes meanwhile is not probed again.
    """
    command = ["qemu-img", "convert", "-p", "-f", format, "-O", "raw", "-W", "-m", COROUTINES]
    temporary = target.with_name(f"{durable.TEMPORARY}{target.name}")
    try:
        command += [str(source.absolute()), str(temporary.absolute())]
        _run_told(command, doing=f"importing {source.name}", progress=progress)
        size = temporary.stat().st_size
        if size % SECTOR:
            os.truncate(temporary, size + SECTOR - size % SECTOR)
        temporary.chmod(0o400)
        durable.publish(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def serve(
    path: Path,
    at: Path,
    *,
    format: str = "qcow2",
    depth: bool = False,
    clients: int = 2,
    writable: bool = False,
) -> Iterator[str]:
    """Serve an image on a Unix socket of its own for as long as the context lasts; the URI.

    With `depth` it also says in which file of the chain a block is (`qemu:allocation-depth`). What is written is durable, and the
    image whole, after an NBD FLUSH: the server is killed at the end.
    """
    at.unlink(missing_ok=True)
    command = [
        "qemu-nbd",
        *(["--discard=unmap"] if writable else ["-r"]),
        "-f",
        format,
        "-e",
        str(clients),
        "-t",
        "-k",
        str(at.absolute()),
        *(["-A"] if depth else []),
        str(path.absolute()),
    ]
    server = subprocess.Popen(
        [*behind_writes(), *DIES_WITH_US, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A terminal's Ctrl-C is for who started us, who may still have something to flush.
        start_new_session=True,
    )
    try:
        _wait_for_socket(server, at, path)
        yield f"nbd+unix:///?socket={at.absolute()}"
    finally:
        server.kill()
        server.communicate()
        at.unlink(missing_ok=True)


def _wait_for_socket(server: "subprocess.Popen[bytes]", at: Path, path: Path) -> None:
    deadline = time.monotonic() + NBD_SECONDS
    while not _answers(at):
        if server.poll() is not None:
            assert server.stderr is not None
            raise _failed(f"serving {path.name}", server.stderr.read(), server.returncode)
        if time.monotonic() > deadline:
            raise BrokenError(f"qemu-nbd did not serve {path.name} in {NBD_SECONDS:.0f} s")
        time.sleep(0.01)


def _answers(path: Path) -> bool:
    # The file is there a moment before somebody listens.
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
