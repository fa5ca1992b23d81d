"""A guest's file systems are frozen, and thawed whatever becomes of us: a process of its own, `python -m cdpserver.vm.freeze`.

    service ── starts ──► this process ── freeze ──► guest agent        says {"frozen": N} on its standard output
       └── closes its standard input, by will or because it was killed ──► thaw ──► {"thawed": N, ...}

Nobody but this process holds the agent's socket meanwhile (where libvirt holds it, others may ask that), and it ends for nobody:
signals that can be ignored are. It thaws when its input ends, or after HOLD_S at the latest. If it is killed itself, the service
thaws, and if both are, the next service does.
A freeze that the agent does not answer in time may still come to pass, when a hook in the guest lets go: the thaw waits behind.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from cdpserver import messages
from cdpserver.errors import CdpError, RefusedError
from cdpserver.vm.agent import AgentRefusedError, NoAgentError
from cdpserver.vm.guest_agent import GuestAgent, connect

SYNC_S = 3.0
"""An agent that does nothing else answers in milliseconds."""

FREEZE_S = 10.0
"""How long the guest may take to write out what it has and to freeze, its own hooks included."""

HOLD_S = 5.0
"""How long it stays frozen at most: all that is done meanwhile takes milliseconds."""

THAW_S = 10.0
"""How long a thaw is tried; a process started later goes on with that."""

AGAIN_S = 0.5


def freeze(agent: GuestAgent) -> int:
    """How many file systems are frozen; not one of them if this raises RefusedError."""
    if agent.call("guest-fsfreeze-status", within_s=SYNC_S) != "thawed":
        raise RefusedError(
            "somebody else has frozen the guest", hint="let them thaw it: virsh domfsthaw, or a backup's end"
        )
    return int(agent.call("guest-fsfreeze-freeze", within_s=FREEZE_S))


def thaw(address: str, agent: GuestAgent | None = None, *, within_s: float = THAW_S) -> int:
    """How many file systems were thawed; on return none is frozen. CdpError when that could not be made sure."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with contextlib.ExitStack() as stack:
                asked = agent or stack.enter_context(connect(address))
                left = max(deadline - time.monotonic(), AGAIN_S)
                asked.sync(within_s=left)
                count = int(asked.call("guest-fsfreeze-thaw", within_s=left))
                if asked.call("guest-fsfreeze-status", within_s=left) == "thawed":
                    return count
                raise AgentRefusedError("the guest is still frozen after a thaw")
        except CdpError:
            if time.monotonic() > deadline:
                raise
            if agent is not None:
                agent.close()  # QEMU serves one client at a time
                agent = None
            time.sleep(AGAIN_S)


def hold(address: str) -> int:
    """Freeze, wait, thaw; what happens is said line by line. 0 when the guest is known to be thawed."""
    try:
        agent = connect(address)
        agent.sync(within_s=SYNC_S)
    except CdpError as error:
        _say(messages.error_fields(error) | {"touched": False})
        return 0
    began = time.monotonic()
    try:
        _say({"frozen": freeze(agent)})
    except CdpError as error:
        # An agent that refused has thawed what it had frozen; one that is silent may freeze yet.
        _say(messages.error_fields(error) | {"touched": True})
        if isinstance(error, RefusedError) and not isinstance(error, AgentRefusedError):
            return 0
        waited = True
    else:
        waited = _wait(HOLD_S)
    held_s = time.monotonic() - began
    try:
        count = thaw(address, agent)
    except NoAgentError:
        count = 0
    except CdpError as error:
        _say(messages.error_fields(error))
        return error.exit_code
    _say({"thawed": count, "late": not waited, "held_ms": round(held_s * 1000)})
    return 0


def _wait(seconds: float) -> bool:
    """Until the standard input ends or has something; False if that took too long."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready)


def _say(what: dict[str, Any]) -> None:
    """One line, if anybody reads it."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), json.dumps(what).encode() + b"\n")


def main() -> int:
    """The process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("agent", help="as guest_agent.connect takes it")
    parser.add_argument("--thaw", action="store_true")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not options.thaw:
        return hold(options.agent)
    try:
        _say({"thawed": thaw(options.agent)})
    except NoAgentError:
        _say({"gone": True})
    except CdpError as error:
        _say(messages.error_fields(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
