"""The QCOW2 files around a running disk's chain, read by their headers: what stands on what, in the chain and beside it.

QEMU only knows the chain that it has open. What was left behind by a command that was killed, or set aside, is
found in the directories of the chain's own files. Layout: docs/interop/qcow2.txt of QEMU.
"""

import contextlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.vm.chain.graph import LiveChain
from cdpserver.vm.chain.plan import Branches

_HEADER = struct.Struct(">4sIQI")
"""Magic, version, offset and length of the backing file's name."""

_MAGIC = b"QFI\xfb"

MAX_NAME = 1023
"""Bytes of a backing file's name, by the format."""

MAX_FILES = 4000
"""Of a directory that is looked through; a pool with more has no small number of chains in it."""


def backing_of(path: Path) -> Path | None:
    """What a QCOW2 file stands on; None if on nothing, on no plain file, or if it is no QCOW2 file. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, _, offset, length = _HEADER.unpack(header)
        if magic != _MAGIC or not offset or not 0 < length <= MAX_NAME:
            return None
        file.seek(offset)
        name = os.fsdecode(file.read(length))
    name = name.removeprefix("file:")
    if name.startswith(("json:", "nbd:", "nbd+", "rbd:", "http:", "https:", "ssh:")) or "\0" in name:
        return None
    return Path(os.path.normpath(path.parent / name))


def standing(chain: LiveChain) -> Branches:
    """For every file in the chain's directories those outside the chain that stand on it. RefusedError."""
    own = {layer.path for layer in chain.layers}
    found: dict[Path, list[Path]] = {}
    for path in _beside(path for path in own if path is not None):
        below = None
        with contextlib.suppress(OSError):  # gone since it was listed, or not ours to read
            below = backing_of(path)
        if below is not None and path not in own:
            found.setdefault(below, []).append(path)
    return {below: tuple(sorted(paths)) for below, paths in found.items()}


def check_there(chain: LiveChain) -> None:
    """CorruptError unless every file of the chain is where QEMU opened it and stands on the one below it.

    QEMU goes on with files that were deleted or exchanged under it, until it is stopped.
    """
    for layer, below in zip(chain.layers, (*chain.layers[1:], None), strict=True):
        path = layer.path
        if path is None:
            continue
        try:
            stands_on = backing_of(path)
        except OSError as error:
            raise CorruptError(
                f"{path}, on which {chain.disk} stands, cannot be read: {error.strerror}",
                hint=f"leave the VM running, and save its disk: cdp snapshot live pull VM {chain.active.name} ...",
            ) from None
        if layer.driver == "qcow2" and below is not None and below.path not in (None, stands_on):
            raise CorruptError(
                f"the header of {path} names {stands_on}, while QEMU has {below.path} open below it",
                hint="leave the VM running, and correct the header: qemu-img rebase -u",
            )


def _beside(paths: Iterable[Path]) -> list[Path]:
    found = []
    for directory in sorted({path.parent for path in paths}):
        try:
            with os.scandir(directory) as entries:
                found += [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]
        except OSError as error:
            raise RefusedError(
                f"{directory} cannot be listed: {error.strerror}", hint="run cdp as who may read the images"
            ) from None
        if len(found) > MAX_FILES:
            raise RefusedError(
                f"{directory} has more than {MAX_FILES} files: what stands on the chain cannot be told",
                hint="give the disk a directory of its own",
            )
    return found
