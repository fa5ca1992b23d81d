"""The service goes on as a new program in the same process: an upgrade or a changed configuration, asked for by SIGHUP.

What would not start must not replace what runs, so the new program is tried first, as far as its configuration.
"""

import os
import subprocess
import sys

import trio

TRY_S = 30.0
"""How long the new program may take to show its configuration; normally 0.2 s."""


def command() -> list[str]:
    """The interpreter and its options as they were given: what they name may be a newer version now."""
    return [sys.executable, *sys.orig_argv[1:]]


async def what_is_wrong() -> str:
    """Why the new program would not start; empty when it would."""
    with trio.move_on_after(TRY_S):
        done = await trio.run_process(
            [*command(), "--show-config"],
            stdout=subprocess.DEVNULL,
            capture_stderr=True,
            check=False,
        )
        said = done.stderr.decode(errors="replace").strip()
        # The last line of a traceback says most, and all of an error of ours is one.
        return (said.splitlines() or [f"it ended with {done.returncode}"])[-1] if done.returncode else ""
    return f"it did not show its configuration within {TRY_S:.0f} s"


def go_on() -> None:
    """Become the new program."""
    os.execv(sys.executable, command())
