"""`cdp backup restore`: a disk of a backup as an image, as a chain of images, or onto an image that is there.

    --as image   FILE, as `cdp export` writes it
    --as chain   FILE.full-ID.qcow2 <- FILE.ID.qcow2 <- ... <- FILE: each layer holds what the backup of its name held
    --in-place   what differs is written to what is there; --base: FILE stands on an image, and holds what differs from that

A chain is written from the bottom up; a layer has its name when it is whole and durable, so the same command goes on from there.
"""

import contextlib
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver import durable, qemu
from cdpserver.copying.compare import Compared
from cdpserver.copying.plan import chunks
from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.names import format_bytes
from cdpserver.nodes import read_header
from cdpserver.repository.origin import BackupOrigin
from cdpserver.repository.record import FULL, BackedUpDisk, Backup
from cdpserver.repository.repository import Repository
from recovery.bar import moving
from recovery.export import Exported, data_of, serving, tell, verify_same, written
from recovery.opened import alone
from recovery.output import answer, answer_json, say
from recovery.repositories import find_backup, opened_repository, read_key
from recovery.unfinished import Output


@dataclass(frozen=True, slots=True)
class _Source:
    """What is restored: a disk of a backup, and those that it was built on, the oldest first."""

    repository: Repository
    lineage: tuple[Backup, ...]
    disk: BackedUpDisk

    @property
    def backup(self) -> Backup:
        return self.lineage[-1]

    def origin(self, backup: Backup) -> BackupOrigin:
        """The disk as one of them holds it."""
        disk = backup.disk(self.disk.name)
        assert disk is not None
        return BackupOrigin(self.repository, disk)


def restore(options: Namespace) -> None:
    """Interrupted, the same command goes on. NoSpaceError, RefusedError, CorruptError."""
    with opened_repository(options) as repository:
        backup = find_backup(repository, options.id)
        disk = _disk(backup, options.disk)
        source = _Source(repository, lineage(repository, backup, disk.name), disk)
        if options.shape == "chain":
            _check_alone(options, "--as chain", "in_place", "base")
            _chain(options, source)
        elif options.in_place:
            _check_alone(options, "--in-place", "base")
            _in_place(options, source)
        elif options.base is not None:
            _on_base(options, source)
        else:
            tell(options, _image(options, source, backup, format=options.format or "raw"))


def _check_alone(options: Namespace, what: str, *others: str) -> None:
    if given := [f"--{other.replace('_', '-')}" for other in others if getattr(options, other)]:
        raise UsageError(f"{what} does not go with {', '.join(given)}", hint="leave one of them away")


def _disk(backup: Backup, name: str | None) -> BackedUpDisk:
    found = backup.disk(name)
    if found is None:
        there = ", ".join(disk.name for disk in backup.disks)
        raise UsageError(f"backup {backup.id} is of {there}", hint=f"--disk {backup.disks[0].name}")
    return found


def lineage(repository: Repository, backup: Backup, disk: str) -> tuple[Backup, ...]:
    """The full backup that an incremental one was built on, and all between, oldest first: as far as they are there."""
    found = [backup]
    while found[0].kind != FULL and found[0].parent:
        try:
            before = repository.backup(found[0].parent)
        except (NotFoundError, CorruptError):
            break
        mine, theirs = found[0].disk(disk), before.disk(disk)
        if mine is None or theirs is None or mine.size != theirs.size:
            break
        found.insert(0, before)
    return tuple(found)


# -- one image


def _image(options: Namespace, source: _Source, backup: Backup, **more: object) -> dict[str, Any]:
    """As `cdp export` does: sparse, with progress, resumed by the same command, verified. `more` are other options."""

    @contextlib.contextmanager
    def opening(_: object) -> Iterator[Exported]:
        disk = backup.disk(source.disk.name)
        assert disk is not None
        yield Exported(disk.name, f"backup:{backup.id}", disk.seq, disk.time_ns, source.origin(backup))

    mine = Namespace(**{**vars(options), **more, "point": f"backup:{backup.id}/{source.disk.name}"})
    return written(mine, opening)


# -- onto what is there


def _in_place(options: Namespace, source: _Source) -> None:
    """Only blocks that differ are written. Interrupted, the image is neither; the same command makes it whole."""
    output = Output.parse(options.output)
    if output.kind != "nbd" and not output.path.exists():
        raise NotFoundError(f"there is no {output.text}", hint="leave --in-place away")
    if not options.force:
        raise RefusedError(f"what is on {output.text} would be lost", hint="if that is meant: --force")
    with _written_to(output, options.format or "raw") as uri:
        made = _mend(options, source, uri, output.text)
    _answer(options, source, output.text, "overwritten", made)


@contextlib.contextmanager
def _written_to(output: Output, format: str) -> Iterator[str]:
    if output.kind == "nbd":
        yield output.text
        return
    with serving(output.path, "raw" if output.kind == "device" else format, writable=True) as uri:
        yield uri


def _on_base(options: Namespace, source: _Source) -> None:
    """A QCOW2 image that stands on `--base`, and holds what differs from it. It has its name when it is whole."""
    output, base = Output.parse(options.output), Path(options.base)
    if output.kind != "file" or options.format == "raw":
        raise UsageError(
            "what stands on a base image is a QCOW2 file", hint="name a file; leave --format away"
        )
    if output.path.exists() and not options.force:
        raise RefusedError(f"{output.text} is there already", hint="--force replaces it")
    info = qemu.info(base)
    partial = output.partial
    if partial.exists() and (output.side.exists() or not _stands_on(partial, base)):
        if not options.force:
            raise RefusedError(
                f"{partial} is of another restore that was interrupted",
                hint="finish that with its own command, or --force begins anew",
            )
        partial.unlink()
        output.side.unlink(missing_ok=True)
    if not partial.exists():
        qemu.create_overlay(partial, backing=base, format=info.format, size=source.disk.size)
    else:
        say(f"{output.text}: going on; what is there already is compared only")
        qemu.drop_leaks(partial)
    with serving(partial, "qcow2", writable=True) as uri:
        made = _mend(options, source, uri, output.text)
    qemu.check(partial)
    durable.publish(partial, output.path)
    _answer(options, source, output.text, "copied", made)


def _stands_on(image: Path, base: Path) -> bool:
    """Is it a QCOW2 file on that one?"""
    try:
        backing, _ = read_header(image)
    except CorruptError:
        return False
    return bool(backing) and (image.parent / backing).resolve() == base.resolve()


def _mend(options: Namespace, source: _Source, uri: str, name: str) -> Compared:
    """Make what `uri` serves what the backup holds, durably; compare it all once more if that is asked for."""
    origin = source.origin(source.backup)
    there = data_of(uri)
    if there.size != origin.size:
        raise RefusedError(
            f"{name} has {there.size} bytes, and the backup {origin.size}", hint="name an image of that size"
        )
    every = origin.data().union(there)
    with moving(f"restoring {name}", every.bytes) as bar:
        made = origin.compare(
            uri,
            chunks(every, zeros=False),
            lambda done: bar(min(done, every.bytes), every.bytes),
            upto=origin.size,
            mend=True,
        )
    if options.verify:
        with moving(f"comparing {name}", every.bytes) as bar:
            verify_same(origin, uri, name, bar)
    return made


def _answer(options: Namespace, source: _Source, output: str, action: str, made: Compared) -> None:
    result: dict[str, Any] = {
        "point": f"backup:{source.backup.id}/{source.disk.name}",
        "output": output,
        "action": action,
        "size": source.disk.size,
        "compared_bytes": made.bytes,
        "copied_bytes": made.written,
        "verified": bool(options.verify),
    }
    if options.json:
        answer_json(result)
    else:
        answer(
            f"{output}: {result['point']}, {format_bytes(made.written)} of {format_bytes(made.bytes)} differed"
        )


# -- a chain


def _chain(options: Namespace, source: _Source) -> None:
    output = Output.parse(options.output)
    if output.kind != "file" or options.format == "raw":
        raise UsageError("a chain is QCOW2 files", hint="name a file; leave --format away, or say qcow2")
    paths = [_layer_path(output.path, one) for one in source.lineage[:-1]] + [output.path]
    plan = output.path.with_name(f"{output.path.name}.chain.json")
    mine = {"backups": [one.id for one in source.lineage], "disk": source.disk.name}
    resumes = not options.force and _is_mine(plan, mine)
    if not resumes:
        if taken := [path for path in paths if path.exists() and not options.force]:
            raise RefusedError(f"{taken[0]} is there already", hint="--force replaces it")
        for path in paths:
            path.unlink(missing_ok=True)
        durable.write_whole(plan, json.dumps(mine).encode() + b"\n")
    below: Path | None = None
    layers = []
    for number, path in enumerate(paths):
        if not path.exists():
            _write_layer(options, source, number, path, below)
        if options.verify:
            _verify_layer(options, source, number, path)
        backup = source.lineage[number]
        layers.append(
            {"path": str(path), "backup": backup.id, "kind": backup.kind, "bytes": durable.used_bytes(path)}
        )
        below = path
    plan.unlink(missing_ok=True)
    result = {
        "point": f"backup:{source.backup.id}/{source.disk.name}",
        "output": output.text,
        "size": source.disk.size,
        "layers": layers,
        "verified": bool(options.verify),
    }
    if options.json:
        answer_json(result)
    else:
        for layer in layers:
            answer(
                f"{layer['path']}: backup:{layer['backup']}, {layer['kind']}, {format_bytes(int(str(layer['bytes'])))}"
            )


def _layer_path(top: Path, backup: Backup) -> Path:
    stem = top.name.removesuffix(".qcow2")
    return top.with_name(f"{stem}.{'full-' if backup.kind == FULL else ''}{backup.id}.qcow2")


def _is_mine(plan: Path, mine: dict[str, Any]) -> bool:
    """Was this very chain begun there? RefusedError if another one was."""
    try:
        if durable.read_json(plan) == mine:
            return True
    except FileNotFoundError:
        return False
    raise RefusedError(
        f"{plan} is of another chain that was interrupted",
        hint="give its command again, or --force to begin anew",
    )


def _write_layer(options: Namespace, source: _Source, number: int, path: Path, below: Path | None) -> None:
    backup = source.lineage[number]
    disk = backup.disk(source.disk.name)
    assert disk is not None
    if below is None:
        _image(options, source, backup, format="qcow2", output=str(path), verify=False, force=False)
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    delta = f"{backup.id}/{disk.name}@delta:{source.lineage[number - 1].id}"
    with moving(f"restoring {path.name}", 1000) as bar, _served(options, source, delta) as uri:
        qemu.convert_delta(
            uri, partial, backing=below, format="qcow2", progress=lambda done: bar(int(done * 1000), 1000)
        )
    qemu.check(partial)
    partial.chmod(0o600)
    durable.publish(partial, path)


@contextlib.contextmanager
def _served(options: Namespace, source: _Source, name: str) -> Iterator[str]:
    """An export of our own of what a backup changed. The key goes by a file that only we can read, never by argv."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        room = Path(directory)
        parameters = [f"repo={source.repository.place.where}"]
        if (secret := read_key(options)) is not None:
            path = room / "key"
            path.touch(mode=0o600)
            path.write_bytes(secret)
            parameters.append(f"key_file={path}")
        with alone("backup", parameters, room / "nbd"):
            yield f"nbd+unix:///{name}?socket={room / 'nbd'}"


def _verify_layer(options: Namespace, source: _Source, number: int, path: Path) -> None:
    origin = source.origin(source.lineage[number])
    with serving(path, "qcow2") as uri, moving(f"comparing {path.name}") as bar:
        verify_same(origin, uri, str(path), bar)
