"""What is done to a chunk on its way into a repository and back: its id, compression, authenticated encryption.

Encryption: AES-256-GCM with a random nonce (12 bytes, before the ciphertext), the entry's id, kind and length as associated data,
so that a chunk put in the place of another one is refused. Ids are then keyed, and tell nobody what is stored.
Threads: any; each has a compressor of its own, and all the work is done in C with the GIL released.
"""

import os
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.repository.format import COMPRESSED, ENCRYPTED, ID_SIZE, MAX_CHUNK, PAGE_IDS, ZERO_ID, Kind

if TYPE_CHECKING:
    from backports import zstd

LEVEL = 1
HASH_LOG, MIN_MATCH = 16, 5
"""Of zstd: its quickest strategy, with a table of 256 KiB instead of 64 and matches from 5 bytes on. Figures: docs/backup.md."""

SCRYPT_N = 1 << 15
"""32 MiB and about 0.1 s for each guess of a weak key."""

NONCE = 12
TAG = 16
CONTEXT = struct.Struct("<B32sI")

_IDS = "cdpserver repository chunk ids v1"
_DATA = "cdpserver repository encryption v1"
_PROOF = "cdpserver repository key check v1"


@dataclass(frozen=True, slots=True)
class Keys:
    """Derived from the operator's key and the repository's salt."""

    ids: bytes
    data: bytes
    proof: bytes
    """Kept in repo.json: says whether a key is the right one, and nothing else."""


def derive_keys(secret: bytes, salt: bytes) -> Keys:
    """From what the operator's key file holds. RefusedError for an empty one."""
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    if not secret.strip():
        raise RefusedError("the key is empty", hint="head -c 32 /dev/urandom | base64 makes a good one")
    master = Scrypt(salt=salt, length=32, n=SCRYPT_N, r=8, p=1).derive(secret.strip())
    return Keys(*(blake3(master, derive_key_context=c).digest() for c in (_IDS, _DATA, _PROOF)))


class Sealer:
    """Plain where `keys` is None."""

    def __init__(self, keys: Keys | None) -> None:
        self._keys = keys
        self._cipher = None
        if keys is not None:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._cipher = AESGCM(keys.data)
        self._own = threading.local()

    def id(self, content: bytes | bytearray | memoryview) -> bytes:
        """The content's id. Never that of zeros: whoever reads knows these."""
        key = self._keys.ids if self._keys is not None else None
        digest = blake3(content, key=key).digest() if key is not None else blake3(content).digest()
        assert digest != ZERO_ID
        return digest

    def seal(self, id_: bytes, kind: Kind, content: bytes | bytearray | memoryview) -> tuple[bytes, int]:
        """(stored bytes, codec)."""
        codec = 0
        stored = self._compress(content)
        if len(stored) < len(content):
            codec = COMPRESSED
        else:
            stored = bytes(content)
        if self._cipher is not None:
            nonce = os.urandom(NONCE)
            context = CONTEXT.pack(kind, id_, len(content))
            stored = nonce + self._cipher.encrypt(nonce, stored, context)
            codec |= ENCRYPTED
        return stored, codec

    def open(self, id_: bytes, kind: Kind, codec: int, raw: int, stored: bytes) -> bytes:
        """The content, compared with its id. CorruptError."""
        try:
            content = self._opened(id_, kind, codec, raw, stored)
        except CorruptError:
            raise
        except Exception as error:  # noqa: BLE001 - zstd and cryptography have error types of their own
            raise CorruptError(f"chunk {id_.hex()[:16]} is damaged: {type(error).__name__}") from None
        if len(content) != raw or self.id(content) != id_:
            raise CorruptError(f"chunk {id_.hex()[:16]} is not what was stored")
        return content

    def seal_named(self, id_: bytes, name: str, content: bytes) -> tuple[int, bytes]:
        """(codec, stored bytes) of an object that has a name, which it is bound to."""
        stored = self._compress(content)
        if self._cipher is None:
            return COMPRESSED, stored
        nonce = os.urandom(NONCE)
        return COMPRESSED | ENCRYPTED, nonce + self._cipher.encrypt(nonce, stored, id_ + name.encode())

    def open_named(self, id_: bytes, name: str, codec: int, stored: bytes) -> bytes:
        """What `seal_named` made. CorruptError."""
        from backports import zstd

        try:
            if codec != (COMPRESSED if self._cipher is None else COMPRESSED | ENCRYPTED):
                raise ValueError("not as this repository stores it")
            if self._cipher is not None:
                stored = self._cipher.decrypt(stored[:NONCE], stored[NONCE:], id_ + name.encode())
            return bytes(zstd.decompress(stored))
        except Exception as error:  # noqa: BLE001 - zstd and cryptography have error types of their own
            raise CorruptError(f"{name} is damaged: {type(error).__name__}") from None

    def _compress(self, content: bytes | bytearray | memoryview) -> bytes:
        """One frame, which says how long its content is."""
        compressor: zstd.ZstdCompressor | None = getattr(self._own, "compressor", None)
        if compressor is None:
            compressor = self._own.compressor = _compressor()
        compressor.set_pledged_input_size(len(content))
        return compressor.compress(content, compressor.FLUSH_FRAME)

    def _opened(self, id_: bytes, kind: Kind, codec: int, raw: int, stored: bytes) -> bytes:
        from backports import zstd

        if bool(codec & ENCRYPTED) != (self._cipher is not None):
            raise CorruptError(f"chunk {id_.hex()[:16]} is not stored as this repository stores chunks")
        if self._cipher is not None:
            stored = self._cipher.decrypt(stored[:NONCE], stored[NONCE:], CONTEXT.pack(kind, id_, raw))
        if not codec & COMPRESSED:
            return stored
        size = zstd.get_frame_info(stored).decompressed_size
        if size != raw or raw > max(MAX_CHUNK, PAGE_IDS * ID_SIZE):
            raise CorruptError(f"chunk {id_.hex()[:16]} has another length than its entry says")
        return bytes(zstd.decompress(stored))


def _compressor() -> "zstd.ZstdCompressor":
    """One that is used again and again: to make one costs as much as a tenth of what it does for a chunk."""
    from backports import zstd

    parameter = zstd.CompressionParameter
    return zstd.ZstdCompressor(
        options={
            parameter.compression_level: LEVEL,
            parameter.hash_log: HASH_LOG,
            parameter.min_match: MIN_MATCH,
        }
    )
