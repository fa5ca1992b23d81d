"""The service's configuration (TOML) as a frozen value.

One table, KEYS, says of every key what it takes, what it is by default, and why. Reading, the nearest key of
a mistaken one, the ranges, `cdpserver --show-config` and docs/configuration.md all come from it. Whatever is
not in it is refused: a key with a typing mistake would be a default that nobody meant.

The command line goes before the file, the file before the defaults.
"""

import argparse
import difflib
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdpserver import tls
from cdpserver.config_values import (
    Address,
    AddressValue,
    ChoiceValue,
    DurationValue,
    GroupValue,
    Kind,
    NumberValue,
    PathValue,
    ProgramValue,
    SizeValue,
    parse_listen,
)
from cdpserver.errors import NotFoundError, UsageError
from cdpserver.limits import COMMIT_LAG_NS, NBD_CLIENTS
from cdpserver.names import show
from cdpserver.retention.policy import FIELDS as POLICY_FIELDS
from cdpserver.retention.policy import MIN_SIZE_CAP, Layer, Policy, combine
from cdpserver.retention.slots import Rule
from cdpserver.retention.steps import Step

__all__ = ["KEYS", "Address", "Config", "Key", "Settings", "load_config", "parse_config", "parse_listen"]

SECOND_NS = 1_000_000_000

MIN_LAG_NS, MAX_LAG_NS = SECOND_NS, 3_600 * SECOND_NS
"""A group commit is promised once a second, so a limit below would slow every write."""

MAX_WORKERS = 64
"""Each is a process with an interpreter of its own, about 60 MiB; more than the cores only costs memory."""

MIN_LINGER_NS, MAX_LINGER_NS = SECOND_NS, 3_600 * SECOND_NS
"""A client that reconnects does so after a second at the soonest."""

MAX_CONFIG_BYTES = 1 << 20
_DEFAULT = Policy()


@dataclass(frozen=True, slots=True)
class Config:
    """What the operator may choose; KEYS has what each means."""

    listen: Address | None = None
    listen_export: Address | None = None
    listen_api: Address | None = None
    tls_certificates: str | None = None
    tls_psk: str | None = None
    workers: int = 1
    nbd_clients: int = NBD_CLIENTS
    socket_linger_ns: int = 60 * SECOND_NS
    durable_lag_limit_ns: int = COMMIT_LAG_NS
    role_viewer: str | None = None
    role_operator: str | None = None
    role_admin: str | None = None
    store_size_cap: int | None = None
    store_lock_quota: int = 50
    store_prune_every_ns: int = 60 * SECOND_NS
    export_verify: str = "nothing"
    scrub_rate: int | None = 16 << 20
    scrub_every_ns: int = 7 * 86_400 * SECOND_NS
    freeze_before: str | None = None
    freeze_after: str | None = None
    policy_rp_every_ns: int = _DEFAULT.rp_every_ns
    policy_bp_every_ns: int = _DEFAULT.bp_every_ns
    policy_keep_rp: tuple[Step, ...] = _DEFAULT.keep_rp
    policy_keep_bp: tuple[Rule, ...] = _DEFAULT.keep_bp
    policy_max_chain: int = _DEFAULT.max_chain
    policy_size_cap: int | None = _DEFAULT.size_cap
    policy_at_cap: str = _DEFAULT.at_cap
    policy_mark_every_ns: int | None = _DEFAULT.mark_every_ns
    policy_freeze: str = _DEFAULT.freeze
    policy_drill: str | None = _DEFAULT.drill
    policy_drill_command: str | None = _DEFAULT.drill_command
    policy_drill_marker: str | None = _DEFAULT.drill_marker
    policy_drill_check: str | None = _DEFAULT.drill_check
    policy_backup: str | None = _DEFAULT.backup
    policy_backup_to: str | None = _DEFAULT.backup_to
    policy_backup_copy: str | None = _DEFAULT.backup_copy

    @property
    def nbd_tls(self) -> bool:
        """Is NBD over TCP encrypted, and only for who has a certificate or a key?"""
        return self.tls_certificates is not None or self.tls_psk is not None

    @property
    def policy(self) -> Layer:
        """The layer of policies that `[policy]` is: what differs from the defaults."""
        values = {field.name: getattr(self, f"policy_{field.attribute}") for field in POLICY_FIELDS}
        defaults = {field.name: getattr(_DEFAULT, field.attribute) for field in POLICY_FIELDS}
        return Layer("configuration", {k: v for k, v in values.items() if v != defaults[k]})


@dataclass(frozen=True, slots=True)
class Key:
    """One key: `attribute` of Config holds it; with `option` the command line may set it too.

    `section` is the TOML table that it stands in; "" is the top. `absent` says what it means if there is no
    value.
    """

    name: str
    attribute: str
    kind: Kind
    doc: str
    option: bool = False
    section: str = ""
    absent: str = ""

    @property
    def full_name(self) -> str:
        """`SECTION.NAME`, or the name of a key at the top."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def flag(self) -> str:
        """The option of the command line."""
        return f"--{self.full_name.replace('_', '-').replace('.', '-')}"

    @property
    def default(self) -> str:
        """The default as TOML, or what its absence means."""
        value = getattr(Config(), self.attribute)
        return self.absent if value is None else self.kind.write(value)


KEYS = (
    Key(
        "listen",
        "listen",
        AddressValue(),
        "Where QEMU's writes are taken over TCP (NBD). Without [tls] on loopback only, where there is no authentication.",
        option=True,
        absent="Unix sockets only",
    ),
    Key(
        "listen_export",
        "listen_export",
        AddressValue(),
        "Where points are served over TCP (NBD), read-only. Without [tls] on loopback only as well.",
        option=True,
        absent="Unix sockets only",
    ),
    Key(
        "listen_api",
        "listen_api",
        AddressValue(),
        "Where the control API is over TCP: with tls.certificates, and for who has a token (cdp token add).",
        option=True,
        absent="the Unix socket only",
    ),
    Key(
        "workers",
        "workers",
        NumberValue(least=1, most=MAX_WORKERS),
        "How many processes take writes; each disk is with one of them. More than cores is no use.",
        option=True,
    ),
    Key(
        "nbd_clients",
        "nbd_clients",
        NumberValue(least=4, most=4096),
        "How many clients one disk, or its points, may have at once in one process; one more is refused.",
    ),
    Key(
        "socket_linger",
        "socket_linger_ns",
        DurationValue(least=MIN_LINGER_NS, most=MAX_LINGER_NS),
        "How long the sockets outlive a stop of the service, so that a mirror that reconnects finds them.",
    ),
    Key(
        "durable_lag_limit",
        "durable_lag_limit_ns",
        DurationValue(least=MIN_LAG_NS, most=MAX_LAG_NS),
        "How far stable storage may be behind what was acknowledged; past it writes slow down.",
    ),
    Key(
        "certificates",
        "tls_certificates",
        PathValue('"/etc/cdpserver/tls"'),
        "The directory with ca-cert.pem, server-cert.pem and server-key.pem for TCP; clients of NBD need one of that CA.",
        section="tls",
        absent="none",
    ),
    Key(
        "psk",
        "tls_psk",
        PathValue('"/etc/cdpserver/keys.psk"'),
        "The file with a line NAME:KEY for each client of NBD over TCP; NBD then goes by these keys, and by no certificates.",
        section="tls",
        absent="none",
    ),
    Key(
        "viewer",
        "role_viewer",
        GroupValue(),
        "The group whose members may look at everything over the API, and change nothing.",
        section="roles",
        absent="none",
    ),
    Key(
        "operator",
        "role_operator",
        GroupValue(),
        "The group whose members may also make bookmarks, base points and forks, and cancel jobs.",
        section="roles",
        absent="none",
    ),
    Key(
        "admin",
        "role_admin",
        GroupValue(),
        "The group whose members may also add and remove disks; root and cdpserver's own user always may.",
        section="roles",
        absent="none",
    ),
    Key(
        "size_cap",
        "store_size_cap",
        SizeValue(least=MIN_SIZE_CAP),
        "How much room all disks together may take; each disk's policy says what happens then.",
        section="store",
        absent="none",
    ),
    Key(
        "lock_quota",
        "store_lock_quota",
        NumberValue(least=1, most=100),
        "How much of a cap, or of the file system, locked points may hold before new locks are refused, in percent.",
        section="store",
    ),
    Key(
        "prune_every",
        "store_prune_every_ns",
        DurationValue(least=SECOND_NS, most=600 * SECOND_NS),
        "How often the service looks whether history is to be dropped or writes are to be refused.",
        section="store",
    ),
    Key(
        "verify",
        "export_verify",
        ChoiceValue(("nothing", "reads")),
        "Whether what is read of points is verified by its digests: what rotted is EIO then, and is not served.",
        section="export",
    ),
    Key(
        "rate",
        "scrub_rate",
        SizeValue(least=64 << 10),
        "How many bytes a second the scrub may read, which verifies everything at rest in the background.",
        section="scrub",
        absent="no scrub",
    ),
    Key(
        "every",
        "scrub_every_ns",
        DurationValue(least=SECOND_NS, most=366 * 86_400 * SECOND_NS),
        "How long after the end of a disk's round the next one begins.",
        section="scrub",
    ),
    Key(
        "before",
        "freeze_before",
        ProgramValue(),
        "Run as PROGRAM VM BOOKMARK before a guest is frozen; if it fails, the guest is not frozen. It has ten seconds.",
        section="freeze",
        absent="none",
    ),
    Key(
        "after",
        "freeze_after",
        ProgramValue(),
        "The same after the thaw, whatever came of it.",
        section="freeze",
        absent="none",
    ),
    *(
        Key(
            field.name,
            f"policy_{field.attribute}",
            field.kind,
            field.doc,
            section="policy",
            absent=field.absent,
        )
        for field in POLICY_FIELDS
    ),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration in effect, and by a key's full name what set it; what is not named is a default."""

    config: Config
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def collect(cls, path: Path | None, chosen: argparse.Namespace | None = None) -> "Settings":
        """The file at `path`, if any, under what the command line (see `add_options`) chose."""
        values = {} if path is None else _read_file(path)
        sources = dict.fromkeys(values, str(path))
        for key in _optional():
            text = getattr(chosen, key.attribute, None)
            if text is not None:
                values[key.full_name] = key.kind.read_option(key.flag, text)
                sources[key.full_name] = f"the option {key.flag}"
        return cls(_config(values), sources)

    def to_toml(self) -> str:
        """A configuration file with every key, commented, that is read as this very configuration."""
        lines = ["# The configuration in effect; docs/configuration.md has the whole story."]
        for section, keys in _sections():
            lines += ["", f"[{section}]"] if section else []
            for key in keys:
                lines += ["", *self._describe(key)]
        return "\n".join(lines) + "\n"

    def _describe(self, key: Key) -> Iterator[str]:
        source = self.sources.get(key.full_name, "default")
        text = f"{key.doc} It takes {key.kind.takes}; default: {key.default}."
        yield from textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")
        # A path may hold anything, also a line break.
        yield f"# Set by: {source if source.isprintable() else show(source)}."
        value = getattr(self.config, key.attribute)
        absent = value is None and getattr(Config(), key.attribute) is None
        yield f"# {key.name} = {key.kind.example}" if absent else f"{key.name} = {key.kind.write(value)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command line an option for each key that has one. Their texts are read by Settings.collect."""
    for key in _optional():
        metavar = "HOST:PORT" if isinstance(key.kind, AddressValue) else "N"
        parser.add_argument(key.flag, dest=key.attribute, metavar=metavar, help=f"{key.doc} {key.kind.takes}")


def load_config(path: Path) -> Config:
    """The configuration in file `path`; UsageError names the file, the key and what it takes."""
    return Settings.collect(path).config


def parse_config(text: str) -> Config:
    """The configuration in the TOML document `text`."""
    return _config(_read(text))


def _optional() -> list[Key]:
    return [key for key in KEYS if key.option]


def _sections() -> list[tuple[str, list[Key]]]:
    """The keys by section, those at the top first."""
    names = dict.fromkeys(["", *(key.section for key in KEYS)])
    return [(name, [key for key in KEYS if key.section == name]) for name in names]


def _config(values: Mapping[str, Any]) -> Config:
    """The values by the keys' full names, and defaults for the rest."""
    config = Config(**{key.attribute: values[key.full_name] for key in KEYS if key.full_name in values})
    chosen = {name: getattr(config, name) for name in ("listen", "listen_export", "listen_api")}
    tls.check_addresses(chosen, certificates=config.tls_certificates is not None, nbd_tls=config.nbd_tls)
    if problem := combine([config.policy]).problem:
        raise UsageError(f"[policy]: {problem.message}", hint=problem.hint)
    return config


def _read_file(path: Path) -> dict[str, Any]:
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
        return _read(data.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint="write it in TOML") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None


def _read(text: str) -> dict[str, Any]:
    """The checked values of a TOML document, by the keys' full names."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not TOML: {show(str(error))}", hint="a line is: key = 'value'") from None
    known = {key.full_name: key for key in KEYS}
    values = {}
    for name, value in _flat(document):
        if name not in known:
            raise _unknown(name, section=isinstance(value, dict))
        values[name] = known[name].kind.read(name, value)
    return values


def _flat(document: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Full names and values: those of a known section one by one, an unknown section as a whole."""
    sections = {key.section for key in KEYS} - {""}
    for name, value in document.items():
        if name in sections and isinstance(value, dict):
            for inner, inner_value in value.items():
                yield f"{name}.{inner}", inner_value
        else:
            yield name, value


def _unknown(name: str, *, section: bool) -> UsageError:
    """The error for a key or section that nobody reads, with the nearest that somebody does."""
    sections = [f"[{section}]" for section, _ in _sections() if section]
    if section or f"[{name}]" in sections:
        return UsageError(f"unknown section {show(name)}", hint=_nearest(f"[{name}]", sections, "sections"))
    names = [key.full_name for key in KEYS]
    bare = name.rpartition(".")[2]
    if bare != name and bare in names:
        return UsageError(f"unknown key {show(name)}", hint=f"write {bare} above the first [section]")
    sections = sorted(key.section for key in KEYS if key.name == bare and key.section)
    if bare == name and sections:
        hint = " or ".join(f"[{section}]" for section in sections)
        return UsageError(f"unknown key {show(name)}", hint=f"write {name} under {hint}")
    return UsageError(f"unknown key {show(name)}", hint=_nearest(name, names, "keys"))


def _nearest(name: str, known: Sequence[str], what: str) -> str:
    if not known:
        return f"there are no {what}; the known keys are {', '.join(key.full_name for key in KEYS)}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known {what} are {', '.join(known)}"
