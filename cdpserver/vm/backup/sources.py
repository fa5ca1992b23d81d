"""Running VMs that CDP does not protect and that the service backs up: where each is found, and how it is frozen.

    sources.json    VM -> {"qmp" or "libvirt" and "domain", "disks", "freeze", "agent", "or_crash"}

When that happens is in the VM's policy, as for one that is protected. Without this file nothing is lost but what it says;
`cdp backup source add` says it again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver import durable
from cdpserver.durable import corrupt_json
from cdpserver.errors import UsageError
from cdpserver.names import check_name, show
from cdpserver.vm.connect import check_here
from cdpserver.vm.record import Connection, LibvirtDomain, QmpSocket

FILE = "sources.json"

MAX_SOURCES = 10_000
"""The file is written anew with each change."""

KEYS = {"qmp", "libvirt", "domain", "disks", "freeze", "agent", "or_crash"}


@dataclass(frozen=True, slots=True)
class LiveSource:
    """One VM. `disks` are those that are named, else all; `agent` is its guest agent's socket, else libvirt's."""

    vm: str
    connection: Connection
    disks: tuple[str, ...] = ()
    freeze: bool = False
    agent: str | None = None
    or_crash: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As the file, the CLI and the API show it, but for the name."""
        at = self.connection
        return {
            "qmp": at.path if isinstance(at, QmpSocket) else None,
            "libvirt": at.uri if isinstance(at, LibvirtDomain) else None,
            "domain": at.domain if isinstance(at, LibvirtDomain) else None,
            "disks": list(self.disks),
            "freeze": self.freeze,
            "agent": self.agent,
            "or_crash": self.or_crash,
        }

    @property
    def agent_address(self) -> str | None:
        """Whom to ask for the guest to be frozen (vm/guest_agent.py), if it is to be."""
        if not self.freeze:
            return None
        at = self.connection
        return f"{at.uri}#{at.domain}" if self.agent is None and isinstance(at, LibvirtDomain) else self.agent


def checked(vm: str, said: Mapping[str, Any]) -> LiveSource:
    """What an operator says of a VM: the keys of `as_dict`. UsageError."""
    qmp, libvirt = said.get("qmp"), said.get("libvirt")
    if (qmp is None) == (libvirt is None):
        raise UsageError("one way to its QEMU is needed", hint="give --qmp PATH or --libvirt URI")
    if qmp is not None and said.get("domain") is not None:
        raise UsageError("--domain goes with --libvirt", hint="leave it away")
    connection = QmpSocket(qmp) if qmp is not None else LibvirtDomain(str(libvirt), said.get("domain") or vm)
    check_here(connection, vm)
    agent, freeze = said.get("agent"), bool(said.get("freeze"))
    if not freeze and (agent is not None or said.get("or_crash")):
        raise UsageError("--agent and --or-crash go with --freeze", hint="add --freeze, or leave them away")
    if freeze and agent is None and qmp is not None:
        raise UsageError("which guest agent?", hint="add --agent with the path of its socket")
    if agent is not None and not str(agent).startswith("/"):
        raise UsageError(f"not an absolute path: {show(str(agent))}", hint="give the path from the root")
    disks = tuple(str(disk) for disk in said.get("disks") or ())
    return LiveSource(check_name(vm), connection, disks, freeze, agent, bool(said.get("or_crash")))


def load(state_dir: Path) -> dict[str, LiveSource]:
    """By VM. CorruptError for a file that says something else."""
    path = state_dir / FILE
    found = {}
    for vm, said in durable.read_objects(path, KEYS).items():
        try:
            found[vm] = checked(vm, said)
        except (UsageError, TypeError, AttributeError) as error:
            raise corrupt_json(path, f"{show(vm)}: {error}") from None
    return found


def save(state_dir: Path, known: Mapping[str, LiveSource]) -> None:
    """Durable on return."""
    durable.write_json(state_dir / FILE, {vm: one.as_dict() for vm, one in sorted(known.items())})
