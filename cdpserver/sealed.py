"""Export names with their disk's secret, `SECRET~NAME`, as TCP with TLS wants them: who may open one disk opens no other.

    nbd.key (the state directory's) + uuid of a timeline ──keyed BLAKE3──► its secret, 32 hexadecimal digits

Nothing is stored for a disk. A fork has a timeline, and so a secret, of its own; a new `nbd.key` makes all of them anew.
A secret is in no list and no event: `cdp disk uri`, `cdp uri` and the controllers of mirrors are told it.
"""

import re
import secrets

import blake3

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.state import StateDir

KEY_BYTES = 32
SECRET_BYTES = 16
_SEALED = re.compile(rf"([0-9a-f]{{{2 * SECRET_BYTES}}})~(.*)", re.DOTALL)


def make_key(state: StateDir) -> None:
    """Give the state directory a new key, for nobody but its owner; durable. For the service, before its children are."""
    durable.write_whole(state.nbd_key, secrets.token_bytes(KEY_BYTES), 0o600)


def load_key(state: StateDir) -> bytes:
    """The key. CorruptError for what cannot be one."""
    with durable.unreadable(state.nbd_key):
        key = state.nbd_key.read_bytes()
    if len(key) != KEY_BYTES:
        raise CorruptError(
            f"{state.nbd_key} has {len(key)} bytes, not {KEY_BYTES}",
            hint="remove it and start cdpserver: every disk gets a new secret, and mirrors connect anew",
        )
    return key


def secret_of(key: bytes, uuid: bytes) -> str:
    """The secret of the timeline with this uuid."""
    return blake3.blake3(uuid, key=key).hexdigest(SECRET_BYTES)


def seal(export: str, secret: str) -> str:
    """The export name with the secret; `unseal` is its reverse."""
    return f"{secret}~{export}"


def unseal(text: str) -> tuple[str, str]:
    """(secret, export name) of what a client asked for; without a secret "" stands for it. Nothing is checked."""
    match = _SEALED.fullmatch(text)
    return (match[1], match[2]) if match else ("", text)
