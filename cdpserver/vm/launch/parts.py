"""What a recovered VM is made of besides its operator's command: its disks, and where we meet it. Pure.

    raw  NODE  ──►  nbd  NODE-nbd       a fork or point of ours
    fmt  NODE  ──►  file NODE-file      an image at home

A recovery finds a disk by the export that its node is connected to, so the names are only for people.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

RECONNECT_S = 30
"""How long the VM's requests wait for a server that is being restarted."""

DEFAULT_PORT = 10809

SERIAL_BYTES = 20
"""What virtio-blk has room for."""

Accel: TypeAlias = Literal["tcg", "kvm"]


@dataclass(frozen=True, slots=True)
class Nbd:
    """One of our exports."""

    uri: str


@dataclass(frozen=True, slots=True)
class Image:
    """A file on the host that runs the VM."""

    path: str
    format: Literal["raw", "qcow2"]
    is_device: bool = False


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk, by its short name."""

    name: str
    source: Nbd | Image


@dataclass(frozen=True, slots=True)
class Places:
    """Where a VM's sockets and logs are, all in one directory of its own."""

    directory: Path

    @property
    def qmp(self) -> Path:
        """The monitor that is ours."""
        return self.directory / "qmp.sock"

    @property
    def agent(self) -> Path:
        """The guest agent's port."""
        return self.directory / "agent.sock"

    @property
    def serial(self) -> Path:
        """What an isolated guest writes to its first serial port."""
        return self.directory / "serial.log"

    @property
    def console(self) -> Path:
        """The first serial port of a VM that stays, for whoever wants to connect."""
        return self.directory / "console.sock"

    @property
    def said(self) -> Path:
        """What QEMU itself writes: why it ended."""
        return self.directory / "qemu.log"

    @property
    def pid(self) -> Path:
        """Which process it is."""
        return self.directory / "qemu.pid"


def node(number: int) -> str:
    """The name of the node that a disk's device stands on."""
    return f"recovered{number}"


def blockdevs(number: int, disk: Disk) -> list[str]:
    """The `-blockdev` arguments of a disk."""
    return [word for made in nodes(node(number), disk) for word in ("-blockdev", json.dumps(made))]


def nodes(stem: str, disk: Disk, *, top: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a disk's two nodes, the lower one first; the upper is `top`, or `stem`."""
    match disk.source:
        case Nbd(uri):
            server, export = nbd_server(uri)
            below: dict[str, Any] = {
                "driver": "nbd",
                "node-name": f"{stem}-nbd",
                "server": server,
                "export": export,
                "reconnect-delay": RECONNECT_S,
            }
            driver = "raw"
        case Image(path, driver, is_device):
            kind = "host_device" if is_device else "file"
            below = {"driver": kind, "node-name": f"{stem}-file", "filename": path, "discard": "unmap"}
    over = {"driver": driver, "node-name": top or stem, "file": below["node-name"], "discard": "unmap"}
    return below, over


def serial(disk: Disk) -> str:
    """What the guest reads of a disk's device, as much of its name as there is room for."""
    return disk.name.encode()[:SERIAL_BYTES].decode(errors="ignore")


def nbd_server(uri: str) -> tuple[dict[str, Any], str]:
    """The `server` and `export` of QEMU's NBD driver for one of our URIs."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd":
        return {"type": "inet", "host": parts.hostname, "port": str(parts.port or DEFAULT_PORT)}, export
    return {"type": "unix", "path": parse_qs(parts.query)["socket"][0]}, export


def agent_port(places: Places) -> list[str]:
    """A guest agent's port, in a socket of ours."""
    return [
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=cdp-agent,path={comma(places.agent)},server=on,wait=off"),
        *("-device", "virtserialport,chardev=cdp-agent,name=org.qemu.guest_agent.0"),
    ]


def console(places: Places, *, isolated: bool) -> str:
    """The value of `-serial` for the first port."""
    if isolated:
        return f"file:{places.serial}"
    return f"unix:{comma(places.console)},server=on,wait=off"


def monitor(places: Places) -> list[str]:
    """The monitor that is ours."""
    return ["-qmp", f"unix:{comma(places.qmp)},server=on,wait=off"]


def comma(text: str | Path) -> str:
    """A value among others: QEMU takes two commas for one."""
    return str(text).replace(",", ",,")
