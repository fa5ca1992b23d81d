"""The way to a guest's agent, whoever holds its channel: QEMU's socket of it, or libvirt.

An address is a path, or `URI#DOMAIN` where libvirt holds the channel. libvirt's calls can be given no deadline of their own but
for that of the answer: a libvirtd that hangs holds up the process that asks.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from cdpserver.errors import UnreachableError
from cdpserver.vm.agent import Agent, AgentRefusedError, AgentSilentError, NoAgentError
from cdpserver.vm.record import LibvirtDomain, ProtectedVm
from cdpserver.vm.virt import module


class GuestAgent(Protocol):
    """A connection (`vm.agent.Agent`). The context closes it."""

    def sync(self, *, within_s: float) -> None:
        """On return the agent listens, and answers what is asked next. AgentSilentError."""
        ...

    def call(self, command: str, *, within_s: float) -> Any:
        """What the agent returns. AgentRefusedError for its refusal, AgentSilentError when it takes longer."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def address(vm: ProtectedVm) -> str | None:
    """That of a VM's agent; None if none is known, or the service does not reach it."""
    if vm.guest_agent is not None or vm.by:
        return vm.guest_agent
    match vm.connection:
        case LibvirtDomain(uri, domain):
            return f"{uri}#{domain}"
    return None


def connect(address: str) -> GuestAgent:
    """The agent at an address. NoAgentError if its QEMU is gone, UnreachableError."""
    if address.startswith("/"):
        return Agent(Path(address))
    uri, _, domain = address.partition("#")
    return LibvirtAgent(uri, domain)


class LibvirtAgent:
    """The agent of a domain, by libvirt's channel to it."""

    def __init__(self, uri: str, domain: str) -> None:
        """NoAgentError if the domain does not run, AgentSilentError if libvirtd does not answer."""
        self._name = f"{domain} of {uri}"
        libvirt = module("libvirt")
        libvirt.registerErrorHandler(
            lambda *_: None, None
        )  # errors are raised; printed they would be said twice
        self._connection = self._ask(lambda: libvirt.open(uri))
        try:
            self._domain = self._ask(lambda: self._connection.lookupByName(domain))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of libvirt."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self, *, within_s: float) -> None:
        """See GuestAgent. libvirt does that before each command by itself."""
        self.call("guest-ping", within_s=within_s)

    def call(self, command: str, *, within_s: float) -> Any:
        """See GuestAgent."""
        seconds, message = max(1, math.ceil(within_s)), json.dumps({"execute": command})
        ask = module("libvirt_qemu").qemuAgentCommand
        text = self._ask(lambda: ask(self._domain, message, seconds, 0))
        try:
            return json.loads(text)["return"]
        except (ValueError, TypeError, KeyError):
            raise AgentSilentError(f"the guest agent of {self._name} answers what is none") from None

    def _ask(self, ask: Callable[[], Any]) -> Any:
        libvirt = module("libvirt")
        try:
            return ask()
        except libvirt.libvirtError as error:
            raise self._translated(libvirt, error) from None

    def _translated(self, libvirt: Any, error: Any) -> UnreachableError | AgentRefusedError:
        match error.get_error_code():
            case libvirt.VIR_ERR_OPERATION_INVALID | libvirt.VIR_ERR_NO_DOMAIN:
                return NoAgentError(f"{self._name} does not run")
            case libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED | libvirt.VIR_ERR_CONFIG_UNSUPPORTED:
                return AgentRefusedError(
                    f"{self._name} has no guest agent",
                    hint="give the domain a channel org.qemu.guest_agent.0, and run qemu-guest-agent in the guest",
                )
            case libvirt.VIR_ERR_INTERNAL_ERROR if "agent command" in str(error):
                return AgentRefusedError(f"the guest agent of {self._name} refused: {error}")
        return AgentSilentError(f"the guest agent of {self._name} did not answer: {error}")
