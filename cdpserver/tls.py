"""TLS of what listens on TCP: the files that it needs, and what nbdkit is told.

    tls.certificates   a directory, as nbdkit and QEMU have it: ca-cert.pem, server-cert.pem, server-key.pem
    tls.psk            a file of lines NAME:KEY, the key in hexadecimal digits, as psktool(1) writes it

With certificates both sides show one of the same CA.
"""

import ipaddress
import re
import ssl
from pathlib import Path

from cdpserver.config_values import Address
from cdpserver.errors import UsageError

CA = "ca-cert.pem"
SERVER = "server-cert.pem"
SERVER_KEY = "server-key.pem"

GUIDE = "docs/security.md has the commands"

_PSK_LINE = re.compile(r"[^:#]+:[0-9A-Fa-f]{32,}")


def refuse_plain(key: str, address: Address | None) -> None:
    """UsageError for an address that would be open to a network without TLS."""
    if address is not None and not ipaddress.ip_address(address[0]).is_loopback:
        raise UsageError(
            f"{key}: {address[0]} is not loopback, and NBD there would be plain, for anybody",
            hint="set tls.certificates or tls.psk (docs/security.md), or listen on 127.0.0.1",
        )


def check_files(certificates: str | None, psk: str | None) -> None:
    """UsageError, naming the key, for files that would not do: a server that cannot have them must not start."""
    if certificates is not None:
        directory = Path(certificates)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_verify_locations(directory / CA)
            context.load_cert_chain(directory / SERVER, directory / SERVER_KEY)
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
