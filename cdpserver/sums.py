"""Sums: digests of the blocks of a file that is never changed in place, so that what rots in it is found.

Records have digests of their own; base images and base points have none. The sums of a file are written when it is published, or
made by a scrub that first sees it: from its first block on, in as many turns as that takes. They say nothing of a file of another
length or time of change, and can be removed: then the file is taken as it is at the next scrub. Sums that are damaged are not as
none: whether the file is what it was cannot be told, and nobody makes others of what is there now before somebody has looked.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from cdpserver import durable
from cdpserver.errors import CorruptError

DIRECTORY = "sums"
"""In a timeline; the sums of an imported image are beside it, `bases/ID.sums`."""

BLOCK = 1 << 20
"""Bytes that have one digest."""

DIGEST_SIZE = 16
HEAD = struct.Struct("<8sQQ")
"""Magic, length and time of change (ns) of the file; then a digest for each block, or the first ones; and BLAKE3 of all that."""

MAGIC = b"cdpsums1"
CHECK_SIZE = 32


def sums_path(path: Path) -> Path:
    """Where the sums of a file of a timeline, or of an imported image, are."""
    if path.parent.name == "bases":
        return path.with_suffix(".sums")
    return path.parent / DIRECTORY / path.name


def write(path: Path, *, spend: Callable[[int], None] = lambda _: None) -> int:
    """Read a file and keep its sums; bytes read. FileNotFoundError."""
    with open(path, "rb") as file:
        head = _head(file.fileno())
        digests = []
        while part := file.read(BLOCK):
            digests.append(digest(part))
            spend(len(part))
        return os.fstat(file.fileno()).st_size if _keep(path, file.fileno(), head, digests) else 0


def extend(
    path: Path, *, takes: Callable[[int], bool], spend: Callable[[int], None] = lambda _: None
) -> None:
    """Make the sums of the blocks that have none yet, until `takes` does not want one. FileNotFoundError, CorruptError."""
    with open(path, "rb") as file:
        head = _head(file.fileno())
        digests = _held(path, head) or []
        had = len(digests)
        for number in range(had, -(-os.fstat(file.fileno()).st_size // BLOCK)):
            if not takes(number):
                break
            part = os.pread(file.fileno(), BLOCK, number * BLOCK)
            digests.append(digest(part))
            spend(len(part))
        if len(digests) > had:
            _keep(path, file.fileno(), head, digests)


def _keep(path: Path, fd: int, head: bytes, digests: list[bytes]) -> bool:
    """Write sums, durably; not those of a file that was not at rest after all, or that another one has replaced."""
    if _head(fd) != head or not os.path.samestat(os.fstat(fd), os.stat(path)):
        return False
    target = sums_path(path)
    target.parent.mkdir(mode=0o755, exist_ok=True)
    data = head + b"".join(digests)
    durable.write_whole(target, data + blake3(data).digest())
    return True


def read(path: Path) -> list[bytes] | None:
    """The digests of a file's (first) blocks; None where there are none, or none of this very file. CorruptError."""
    try:
        with open(path, "rb") as file:
            return _held(path, _head(file.fileno()))
    except FileNotFoundError:
        return None


def _held(path: Path, head: bytes) -> list[bytes] | None:
    try:
        data = sums_path(path).read_bytes()
    except FileNotFoundError:
        return None
    body = data[:-CHECK_SIZE]
    if len(body) < HEAD.size or blake3(body).digest() != data[-CHECK_SIZE:]:
        raise CorruptError(
            f"the sums of {path.name} are damaged, so whether it is what it was cannot be told",
            hint=f"compare {path.name} with a copy of it, or a base point with the journal (cdp check DISK --full); "
            f"then remove {sums_path(path)}, and the scrub makes it anew of what is there",
        )
    if body[: HEAD.size] != head:
        return None
    return [body[at : at + DIGEST_SIZE] for at in range(HEAD.size, len(body), DIGEST_SIZE)]


def read_one(path: Path, number: int) -> bytes | None:
    """The digest of one block of a file, without reading all of them: so nothing says whether the digest itself rotted."""
    try:
        with open(sums_path(path), "rb") as held, open(path, "rb") as file:
            if os.pread(held.fileno(), HEAD.size, 0) != _head(file.fileno()):
                return None
            place = HEAD.size + number * DIGEST_SIZE
            if place + DIGEST_SIZE > os.fstat(held.fileno()).st_size - CHECK_SIZE:
                return None
            return os.pread(held.fileno(), DIGEST_SIZE, place)
    except FileNotFoundError:
        return None


def wrong(
    path: Path, *, takes: Callable[[int], bool], spend: Callable[[int], None] = lambda _: None
) -> Iterator[int]:
    """Numbers, from 0, of the blocks that `takes` wants and that are not as they were. None without sums. CorruptError."""
    digests = read(path)
    if digests is None:
        return
    with open(path, "rb") as file:
        for number, wanted in enumerate(digests):
            if takes(number):
                try:
                    part = os.pread(file.fileno(), BLOCK, number * BLOCK)
                except OSError:
                    part = b""  # the device cannot read it
                spend(len(part))
                if digest(part) != wanted:
                    yield number


def digest(part: bytes) -> bytes:
    """Of a block."""
    return blake3(part).digest(DIGEST_SIZE)


def _head(fd: int) -> bytes:
    found = os.fstat(fd)
    return HEAD.pack(MAGIC, found.st_size, found.st_mtime_ns)
