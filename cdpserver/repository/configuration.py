"""What repo.json says of a repository; it never changes."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver.durable import take_int, take_str
from cdpserver.errors import CorruptError, RefusedError, UsageError
from cdpserver.names import format_size
from cdpserver.repository import format

VERSION = 1
CONFIG = "repo.json"

PLAIN, AES = "none", "aes-256-gcm"

FIELDS = {"version", "id", "chunk_size", "cipher", "salt", "proof", "created_ns", "immutable_ns"}
"""What the file of an older program has, and the head of a stream: anything else is there with a check."""


@dataclass(frozen=True, slots=True)
class Config:
    """What repo.json says; it never changes."""

    id: bytes
    chunk_size: int
    cipher: str
    salt: bytes
    proof: bytes
    created_ns: int
    immutable_ns: int

    def show(self) -> dict[str, Any]:
        """As `cdp repo show` prints it, and as it is stored."""
        return {
            "version": VERSION,
            "id": self.id.hex(),
            "chunk_size": self.chunk_size,
            "cipher": self.cipher,
            "salt": self.salt.hex(),
            "proof": self.proof.hex(),
            "created_ns": self.created_ns,
            "immutable_ns": self.immutable_ns,
        }


def check_chunk_size(size: int) -> int:
    """A power of two within the limits. UsageError."""
    if not format.MIN_CHUNK <= size <= format.MAX_CHUNK or size & (size - 1):
        raise UsageError(
            f"{size} bytes cannot be a chunk's size",
            hint=f"a power of two from {format_size(format.MIN_CHUNK)} to {format_size(format.MAX_CHUNK)}",
        )
    return size


def config_bytes(config: Config) -> bytes:
    """As repo.json holds it."""
    said = config.show()
    return json.dumps({**said, "check": _check(said)}, indent=1).encode() + b"\n"


def _check(said: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def config_from(data: bytes, where: str) -> Config:
    """What repo.json says. CorruptError, RefusedError for one of a newer version."""
    path = Path(CONFIG)
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("it says nothing that can be")
        if set(value) != FIELDS and value.pop("check", None) != _check(value):
            raise ValueError("it is not what was written")
        version = take_int(value, "version", path, least=1)
        if version > VERSION:
            raise RefusedError(
                f"{where} is of version {version}, and this program knows {VERSION}",
                hint="use a newer program",
            )
        config = Config(
            bytes.fromhex(take_str(value, "id", path)),
            take_int(value, "chunk_size", path),
            take_str(value, "cipher", path),
            bytes.fromhex(take_str(value, "salt", path)),
            bytes.fromhex(take_str(value, "proof", path)),
            take_int(value, "created_ns", path),
            take_int(value, "immutable_ns", path),
        )
        check_chunk_size(config.chunk_size)
        if len(config.id) != 16 or config.cipher not in (PLAIN, AES):
            raise ValueError("an id or a cipher that cannot be")
    except (ValueError, AttributeError, UsageError, CorruptError) as error:
        reason = error.message if isinstance(error, CorruptError | UsageError) else str(error)
        raise CorruptError(
            f"{CONFIG} of {where} is damaged: {reason}", hint="put it back from a copy"
        ) from None
    return config
