"""The service's configuration file (TOML) as a frozen value. Every key has a default; an unknown one is
refused.
"""

import difflib
import ipaddress
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cdpserver.errors import NotFoundError, UsageError
from cdpserver.limits import COMMIT_LAG_NS
from cdpserver.names import DURATION_FORMS, format_duration, parse_duration, show

SECOND_NS = 1_000_000_000

MIN_BP_EVERY_NS = 10 * SECOND_NS
"""Cutting and verifying a base point takes seconds; closer ones would only queue."""

MAX_BP_EVERY_NS = 7 * 86_400 * SECOND_NS
"""A week in one interval already is a large index; longer is a forgotten unit."""

MIN_LAG_NS = SECOND_NS
"""A group commit is promised once a second, so a limit below would slow every write."""

MAX_LAG_NS = 3_600 * SECOND_NS
MAX_CONFIG_BYTES = 1 << 20

Address: TypeAlias = tuple[str, int]

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Config:
    """What the operator may choose. `listen` is for QEMU's writes, `listen_export` for points; None: Unix
    sockets only.
    """

    bp_every_ns: int = 20 * 60 * SECOND_NS
    listen: Address | None = None
    listen_export: Address | None = None
    durable_lag_limit_ns: int = COMMIT_LAG_NS


KEYS = ("listen", "listen_export", "bp_every", "durable_lag_limit")


def parse_listen(text: str) -> Address:
    """`127.0.0.1:10809`, `[::1]:10809` or `localhost:10809` as (address, port).

    No other names: what a name stands for could change under a disk's URI.
    """
    if text.startswith("localhost:"):
        text = text.replace("localhost", "127.0.0.1", 1)
    hint = "write ADDRESS:PORT, such as 127.0.0.1:10809, [::1]:10809 or 0.0.0.0:10809"
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UsageError(f"not an address to listen on: {show(text)}", hint=hint)
    v6, v4, digits = match.groups()
    try:
        host = str(ipaddress.IPv6Address(v6) if v6 else ipaddress.IPv4Address(v4))
    except ValueError:
        raise UsageError(f"not an address to listen on: {show(text)}", hint=hint) from None
    if not 0 < int(digits) < 65536:
        raise UsageError(f"not a port: {digits}", hint="ports are 1 to 65535; NBD's own is 10809")
    return host, int(digits)


def load_config(path: Path) -> Config:
    """The configuration in file `path`; UsageError names the file, the key and what it takes."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"there is no configuration file {path}", hint="check --config") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="check --config") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise UsageError(f"{path} is too large for a configuration", hint="check --config")
    try:
        return parse_config(data.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint="write it in TOML") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None


def parse_config(text: str) -> Config:
    """The configuration in the TOML document `text`."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not TOML: {show(str(error))}", hint="a line is: key = 'value'") from None
    for key in table:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"
            raise UsageError(f"unknown key {show(key)}", hint=hint)
    config = Config(
        listen=_address(table, "listen"),
        listen_export=_address(table, "listen_export"),
        bp_every_ns=_duration(
            table, "bp_every", default=Config().bp_every_ns, least=MIN_BP_EVERY_NS, most=MAX_BP_EVERY_NS
        ),
        durable_lag_limit_ns=_duration(
            table, "durable_lag_limit", default=COMMIT_LAG_NS, least=MIN_LAG_NS, most=MAX_LAG_NS
        ),
    )
    if config.listen is not None and config.listen == config.listen_export:
        raise UsageError("listen and listen_export are the same", hint="give them different ports")
    return config


def _text(table: dict[str, Any], key: str, hint: str) -> str:
    value = table[key]
    if not isinstance(value, str):
        raise UsageError(f"{key} is not a text in quotes: {show(str(value))}", hint=hint)
    return value


def _address(table: dict[str, Any], key: str) -> Address | None:
    if key not in table:
        return None
    try:
        return parse_listen(_text(table, key, f"write {key} = '127.0.0.1:10809'"))
    except UsageError as error:
        raise UsageError(f"{key}: {error.message}", hint=error.hint) from None


def _duration(table: dict[str, Any], key: str, *, default: int, least: int, most: int) -> int:
    if key not in table:
        return default
    text = _text(table, key, DURATION_FORMS)
    try:
        span_ns = parse_duration(text)
    except UsageError as error:
        raise UsageError(f"{key}: {error.message}", hint=error.hint) from None
    if not least <= span_ns <= most:
        raise UsageError(
            f"{key} is out of range: {show(text)}",
            hint=f"from {format_duration(least)} to {format_duration(most)}",
        )
    return span_ns
