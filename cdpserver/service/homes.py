"""Places on primary storage that recovered disks move to: chosen, prepared, and what lay there before kept beside.

Invariants: what lay there is renamed, never written to, and goes only with `forget`. Whether that has happened is told by the
files: `TARGET.before-ID` is there, or not; a recovery's row says beforehand that it will be.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cdpserver import durable, images, names, qemu, timeline
from cdpserver.errors import CdpError, RefusedError, UsageError
from cdpserver.service.chosen import Chosen
from cdpserver.service.core import Core
from cdpserver.timeline import ImageFile
from cdpserver.vm.recovery.move import RECONNECT_S, nbd_server
from cdpserver.vm.recovery.record import Format, RecoveredDisk, Recovery

RAW_SUFFIXES = (".raw", ".img")


def choose(core: Core, to: str, disk: str, format: Format | None) -> tuple[str, Format]:
    """Where one disk goes, and its format there, of the operator's words: a directory, a file or a block device. UsageError."""
    path = Path(to)
    if not path.is_absolute():
        raise UsageError(f"{names.show(to)} is no absolute path", hint="name it from the root")
    if is_device(path):
        return str(path), format or "raw"
    if path.is_dir():
        chosen = format or "qcow2"
        path /= f"{disk}.{chosen}"
    elif path.parent.is_dir() and path.suffix and not to.endswith("/"):
        chosen = format or ("raw" if path.suffix in RAW_SUFFIXES else "qcow2")
    else:
        raise UsageError(
            f"{names.show(to)} is no directory here",
            hint="make it; for a file, name one that ends in .qcow2, .raw or .img",
        )
    if path.resolve().is_relative_to(core.state.path.resolve()):
        raise UsageError(
            f"{names.show(to)} is in the state directory", hint="name a place on primary storage"
        )
    return str(path), chosen


def check(target: str, *, size: int, overwrite: bool, force: bool) -> bool:
    """Can a disk of this size go there? True if something lies there that is to be kept beside. RefusedError."""
    path = Path(target)
    if is_device(path):
        _check_device(path, size, overwrite=overwrite, force=force)
        return False
    if not os.path.lexists(path):
        return False
    if not overwrite:
        raise RefusedError(
            f"there is {target} already",
            hint="name another place, move it away, or add --overwrite to replace the old VM's disks",
        )
    if not path.is_file():
        raise RefusedError(f"{target} is no file that could be kept aside", hint="name another place")
    check_closed(path)
    return True


def check_closed(path: Path) -> None:
    """RefusedError if a VM of this host runs on it."""
    if qemu.is_open(path):
        raise RefusedError(f"a QEMU has {path} open: the VM runs", hint="shut it down first")


def _check_device(path: Path, size: int, *, overwrite: bool, force: bool) -> None:
    if overwrite:
        raise RefusedError(
            f"{path} is a block device: what is on it could not be kept until the commit",
            hint="recover to another device or a file, without --overwrite",
        )
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise RefusedError(
            f"{path} cannot be taken: {error.strerror}", hint="is it mounted, or in use by another program?"
        ) from None
    try:
        there = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    check_closed(path)
    if there < size:
        raise RefusedError(f"{path} has {there} bytes, the disk {size}", hint="name a larger device")
    if not force:
        raise RefusedError(f"what is on {path} would be lost", hint="if that is meant: --force")


def choose_base(core: Core, chosen: Chosen, base: str | None) -> str:
    """The base image of a chain: the one that is named, else the one that the disk was made from, if that is still there.

    UsageError, NotFoundError, RefusedError for a named one that nothing can stand on.
    """
    if base is not None:
        return _check_base(core, images.check_path(base), chosen.size)
    for id in filter(None, (chosen.entry.id, _backed_up(core, chosen))):
        image = images.made_from(core.state, timeline.load(core.state.timeline(id)))
        if image is not None:
            return _usable(core, chosen, image)
    return ""


def _backed_up(core: Core, chosen: Chosen) -> str:
    """The id of the disk that was backed up, if it is here: not every backup says what its disks were made from."""
    entry = core.catalog.get(chosen.of) if chosen.of else None
    return entry.id if entry is not None else ""


def _usable(core: Core, chosen: Chosen, image: ImageFile) -> str:
    """The image's path if it is still that image and something can stand on it; else nothing, and why not is said."""
    try:
        images.check_same(core.state, image)
        path = _check_base(core, images.check_path(image.path), chosen.size)
    except CdpError as error:
        said = {"disk": chosen.name, "image": image.path, "reason": error.message}
        core.log.emit("recovery.base-not-used", level="warning", **said)
        return ""
    return path


def _check_base(core: Core, path: Path, size: int) -> str:
    if path.resolve().is_relative_to(core.state.path.resolve()):
        raise UsageError(
            f"{names.show(str(path))} is in the state directory", hint="name an image on primary storage"
        )
    if path.is_file() and qemu.is_open(path):
        raise RefusedError(
            f"a QEMU writes to the base image {path}, which must not change", hint="name another image"
        )
    there = qemu.info(path).virtual_size
    if there > size:
        raise UsageError(
            f"the base image {path} has {there} bytes, more than the disk's {size}", hint="name another image"
        )
    return str(path)


def is_device(path: Path) -> bool:
    """Is it a block device?"""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def set_aside(disk: RecoveredDisk, id: str) -> None:
    """Keep what lies at the target beside it, if that has not been done; durable on return. RefusedError if a QEMU has it."""
    aside = Path(disk.aside(id))
    if disk.replaces and not os.path.lexists(aside):
        check_closed(Path(disk.target))
        os.rename(disk.target, aside)
        durable.fsync_dir(aside.parent)


def put_back(disk: RecoveredDisk, id: str) -> None:
    """What was kept beside is at the target again, in place of what is there."""
    if os.path.lexists(aside := disk.aside(id)):
        os.rename(aside, disk.target)
        durable.fsync_dir(Path(aside).parent)


def forget(disk: RecoveredDisk, id: str) -> None:
    """What was kept beside goes for good."""
    Path(disk.aside(id)).unlink(missing_ok=True)


def remove(disk: RecoveredDisk, id: str) -> None:
    """What was made at the target goes; what it replaced is there again."""
    if not is_device(Path(disk.target)):
        Path(disk.target).unlink(missing_ok=True)
    if disk.chain:
        image = Path(disk.point_image)
        for path in (image, image.with_name(f"{durable.TEMPORARY}{image.name}")):
            path.unlink(missing_ok=True)
    put_back(disk, id)


def make_overlay(core: Core, one: Recovery, disk: RecoveredDisk) -> None:
    """The QCOW2 file that a VM starts on, over its point. Belongs to whom its directory does."""
    set_aside(disk, one.id)
    _make_over(disk, core.point_uris(disk.disk, disk.seq))


def make_over_fork(core: Core, disk: RecoveredDisk) -> None:
    """The QCOW2 file that a VM moves to, over its fork for the time being. What an earlier try left goes."""
    for path in (Path(disk.target), Path(disk.point_image)):
        path.unlink(missing_ok=True)
    _make_over(disk, core.disk_uris(core.entry(disk.fork)))


def _make_over(disk: RecoveredDisk, uris: dict[str, str]) -> None:
    server, export = nbd_server(uris.get("uri_unix", uris["uri"]))
    node = {"driver": "nbd", "server": server, "export": export, "reconnect-delay": RECONNECT_S}
    path = Path(disk.target)
    qemu.create_over_nbd(path, node=node, size=disk.size)
    if os.geteuid() == 0 and not is_device(path):
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def errors_said(core: Core, one: Recovery, disk: RecoveredDisk) -> Iterator[None]:
    """What cannot be tidied up stays, and is put on record."""
    try:
        yield
    except OSError as error:
        said = {"recovery": one.id, "file": disk.target, "reason": str(error)}
        core.log.emit("recovery.file-stays", level="warning", **said)
