"""Base images: imported once to a sparse raw file that every disk made from the same, unchanged file shares.

    bases/b1.raw   the image, read-only     bases/b1.json   which file it was: path, size, mtime, inode, digest

`python -m cdpserver.images` imports one in a process of its own.

Invariants: an image without its JSON, or that no timeline stands on, is nobody's and goes (`drop_unused`).
"""

import argparse
import os
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from blake3 import blake3

from cdpserver import durable, messages, qemu, timeline
from cdpserver.durable import take_int, take_keys, take_str
from cdpserver.errors import CdpError, CorruptError, RefusedError, UsageError
from cdpserver.names import format_size, show
from cdpserver.progress import to_stdout
from cdpserver.state import StateDir
from cdpserver.timeline import BackupBase, ImageBase, ImageFile, PointBase, Timeline

_ID = re.compile(r"b([1-9][0-9]{0,8})\.(?:raw|json)")

_PIECE = 1 << 20
"""Bytes of a file that are read at once for its digest."""


@dataclass(frozen=True, slots=True)
class Source:
    """What tells an unchanged image file from another one."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    digest: str = field(default="", compare=False)
    """As ImageFile's."""

    @classmethod
    def of(cls, path: Path) -> "Source":
        """The file as it is now. UsageError for what cannot be read."""
        try:
            real = path.resolve(strict=True)
            found = real.stat()
        except OSError as error:
            raise UsageError(
                f"cannot read image {path}: {error.strerror}", hint="name an image file on the server"
            ) from None
        return cls(str(real), found.st_size, found.st_mtime_ns, found.st_ino)


def check_path(text: str) -> Path:
    """The path of a base image as the API takes it: absolute."""
    if "\0" in text or not os.path.isabs(text):
        raise UsageError(f"not an absolute path: {show(text)}", hint="name the image by its whole path")
    return Path(text)


def find(state: StateDir, source: Source) -> ImageBase | None:
    """The imported image of this very file, if there is one."""
    for path in sorted(state.bases.glob("b*.json")):
        raw = path.with_suffix(".raw")
        if _ID.fullmatch(path.name) and raw.exists() and _read(path) == source:
            return ImageBase(f"bases/{raw.name}")
    return None


def is_noted(raw: Path) -> bool:
    """Is it known which file the image `raw` was imported from?"""
    return _read(raw.with_suffix(".json")) is not None


def made_from(state: StateDir, line: Timeline) -> ImageFile | None:
    """The image file that a disk, or what it is a fork of, was made from, if that is known."""
    base = line.base
    while isinstance(base, PointBase):
        base = timeline.load(state.timeline(base.timeline)).base
    if isinstance(base, BackupBase):
        return base.image
    found = _read((state.path / base.file).with_suffix(".json")) if isinstance(base, ImageBase) else None
    return None if found is None else ImageFile(found.path, found.digest)


def check_same(state: StateDir, image: ImageFile) -> None:
    """Is that file still there? RefusedError, UsageError. It is read, unless it was imported here and did not change since."""
    now = Source.of(Path(image.path))
    imported = [found for path in state.bases.glob("b*.json") if (found := _read(path)) == now]
    if any(one is not None and image.digest in ("", one.digest) for one in imported):
        return
    if not Path(now.path).is_file() or digest_of(Path(now.path)) != image.digest:
        raise RefusedError(
            f"{image.path} is another file than the disk was made from",
            hint="to take it all the same: --base",
        )


def digest_of(path: Path) -> str:
    """BLAKE3 of a file's bytes, hexadecimal. UsageError for what cannot be read."""
    digest, buffer = blake3(), bytearray(_PIECE)
    try:
        with open(path, "rb", buffering=0) as file:
            while length := file.readinto(buffer):
                digest.update(memoryview(buffer)[:length])
    except OSError as error:
        raise UsageError(f"cannot read image {path}: {error.strerror}", hint="name an image file") from None
    return digest.hexdigest()


def _read(path: Path) -> Source | None:
    try:
        value = durable.read_json(path)
        take_keys(value, {"path", "size", "mtime_ns", "inode"} | ({"digest"} & value.keys()), path)
        return Source(
            take_str(value, "path", path),
            take_int(value, "size", path),
            take_int(value, "mtime_ns", path, least=-(1 << 63)),
            take_int(value, "inode", path),
            take_str(value, "digest", path) if "digest" in value else "",
        )
    except (CorruptError, FileNotFoundError):
        return None  # the image is imported once more


def record(state: StateDir, raw: Path, source: Source, digest: str) -> ImageBase:
    """The image `raw` was imported from `source`; on return later disks find it. RefusedError if the file changed meanwhile."""
    if Source.of(Path(source.path)) != source:
        raw.unlink()
        raise RefusedError(f"{source.path} changed while it was imported", hint="stop what writes to it")
    durable.write_json(raw.with_suffix(".json"), asdict(replace(source, digest=digest)))
    return ImageBase(f"bases/{raw.name}")


def free_path(state: StateDir) -> Path:
    """Where the next imported image goes."""
    numbers = [int(match[1]) for name in os.listdir(state.bases) if (match := _ID.fullmatch(name))]
    return state.bases / f"b{max(numbers, default=0) + 1}.raw"


def check_fits(path: Path, size: int) -> qemu.ImageInfo:
    """What the image is. UsageError if it is larger than the disk of `size` bytes that is to stand on it."""
    found = qemu.info(path)
    if found.virtual_size > size:
        raise UsageError(
            f"{path} has {found.virtual_size} bytes, more than the disk's {size}",
            hint=f"ask for --size {format_size(-(-found.virtual_size // (1 << 20)) << 20)}",
        )
    return found


def drop_unfinished(raw: Path) -> None:
    """Remove what a killed import left of the image `raw`."""
    raw.with_name(f"{durable.TEMPORARY}{raw.name}").unlink(missing_ok=True)


def drop_unused(state: StateDir) -> list[str]:
    """Remove imported images that no timeline stands on; their names. Hold off imports meanwhile."""
    used = set()
    for directory in state.timelines.iterdir():
        try:
            base = timeline.load(directory).base
        except CdpError:
            return []  # what a damaged timeline stands on is not known: keep everything
        if isinstance(base, ImageBase):
            used.add(Path(base.file).stem)
    dropped = []
    for path in sorted(state.bases.iterdir()):
        if _ID.fullmatch(path.name) and path.stem not in used:
            durable.remove_tree(path)
            dropped.append(path.name)
    return dropped


def main() -> int:
    """Import an image; the digest of its file, or an error, goes to stdout as JSON."""
    parser = argparse.ArgumentParser(description="import an image as a sparse raw file")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--format", required=True)
    parser.add_argument("--target", type=Path, required=True)
    options = parser.parse_args()

    def work() -> dict[str, str]:
        digest = digest_of(options.source)
        qemu.import_base(options.source, options.target, format=options.format, progress=to_stdout())
        return {"digest": digest}

    return messages.tell(work)


if __name__ == "__main__":
    sys.exit(main())
