"""A file system on an NBD export, mounted by this kernel (as root): nbdfuse, a loop device, mount.

The loop device is always writable, also below a read-only mount: the kernel replays a file system's journal into it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tools.kit.processes import run, start, stop, until


@contextlib.contextmanager
def as_file(uri: str, directory: Path) -> Iterator[Path]:
    """The export as a file."""
    directory.mkdir()
    process = start(["nbdfuse", directory / "disk", uri], directory.with_name(f"{directory.name}.log"))
    file = directory / "disk"
    try:
        until(lambda: process.poll() is not None or file.exists(), f"file {file}")
        yield file
    finally:
        run("fusermount3", "-u", directory, accept=(0, 1))
        stop(process)


@contextlib.contextmanager
def as_loop(file: Path) -> Iterator[str]:
    """The file as a block device."""
    device = run("losetup", "--find", "--show", file).stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(device: str, directory: Path, *options: str) -> Iterator[Path]:
    """The file system on a block device."""
    directory.mkdir()
    run("mount", *options, device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)
