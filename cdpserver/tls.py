"""TLS of what listens on TCP: the files that it needs, and what nbdkit is told.

    tls.certificates   a directory, as nbdkit and QEMU have it: ca-cert.pem, server-cert.pem, server-key.pem
    tls.psk            a file of lines NAME:KEY, the key in hexadecimal digits, as psktool(1) writes it

With certificates both sides show one of the same CA.
"""

import ipaddress
import itertools
import re
import ssl
from collections.abc import Mapping
from pathlib import Path

from cdpserver.config_values import Address
from cdpserver.errors import UsageError

CA = "ca-cert.pem"
SERVER = "server-cert.pem"
SERVER_KEY = "server-key.pem"

GUIDE = "docs/security.md has the commands"

_PSK_LINE = re.compile(r"[^:#]+:[0-9A-Fa-f]{32,}")


def check_addresses(chosen: Mapping[str, Address | None], *, certificates: bool, nbd_tls: bool) -> None:
    """UsageError, naming the key, for two of one address, and for one that would be open to a network without TLS.

    `chosen` is by key. NBD may be plain on loopback; the API never is.
    """
    places = {key: place for key, place in chosen.items() if place is not None}
    for first, second in itertools.combinations(places, 2):
        if places[first] == places[second]:
            raise UsageError(f"{first} and {second} are the same", hint="give them different ports")
    if "listen_api" in places and not certificates:
        raise UsageError("listen_api takes TLS", hint="set tls.certificates (docs/security.md)")
    for key, (host, _) in places.items():
        if not nbd_tls and not ipaddress.ip_address(host).is_loopback:
            raise UsageError(
                f"{key}: {host} is not loopback, and NBD there would be plain, for anybody",
                hint="set tls.certificates or tls.psk (docs/security.md), or listen on 127.0.0.1",
            )


def server_context(certificates: str) -> ssl.SSLContext:
    """What the API's clients are shown. They show nothing but a token. OSError for files that will not do."""
    directory = Path(certificates)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(directory / SERVER, directory / SERVER_KEY)
    return context


def check_files(certificates: str | None, psk: str | None) -> None:
    """UsageError, naming the key, for files that would not do: a server that cannot have them must not start."""
    if certificates is not None:
        directory = Path(certificates)
        try:
            server_context(certificates).load_verify_locations(directory / CA)
        except OSError as error:  # ssl.SSLError is one
            raise UsageError(
                f"tls.certificates: {directory} will not do: {error.strerror or error}",
                hint=f"it needs {CA}, {SERVER} and {SERVER_KEY}, readable by cdpserver's user; {GUIDE}",
            ) from None
    if psk is not None:
        _check_psk(Path(psk))


def _check_psk(path: Path) -> None:
    try:
        lines = path.read_text().splitlines()
        open_to_others = path.stat().st_mode & 0o007
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"tls.psk: cannot read {path}: {error}", hint=GUIDE) from None
    if open_to_others:
        raise UsageError(f"tls.psk: {path} is open to everybody", hint=f"chmod o= {path}")
    wrong = [number for number, line in enumerate(lines, 1) if line and not _PSK_LINE.fullmatch(line)]
    if wrong or not any(lines):
        where = f"line {wrong[0]} of {path} is no key" if wrong else f"{path} has no key"
        raise UsageError(f"tls.psk: {where}", hint=f"a line is NAME:KEY, the key in hexadecimal; {GUIDE}")


def nbdkit_arguments(certificates: str | None, psk: str | None) -> list[str]:
    """What makes nbdkit offer TLS. Its plugin sees to it that nobody on TCP goes without: Unix sockets do."""
    if psk is not None:
        return ["--tls=on", f"--tls-psk={psk}"]
    if certificates is not None:
        return ["--tls=on", f"--tls-certificates={certificates}", "--tls-verify-peer"]
    return []
