"""The host's own commands around a freeze: `[freeze] before` and `after` of the configuration."""

import os
import signal
import subprocess

import trio

from cdpserver.errors import RefusedError

HOOK_S = 10.0
"""After which such a command is killed."""

SAID = 300
"""Characters of what a command said that are repeated."""


async def run(program: str | None, vm: str, bookmark: str) -> None:
    """Run `program VM BOOKMARK`. RefusedError if it fails, or takes too long."""
    if program is None:
        return
    try:
        with trio.fail_after(HOOK_S):
            done = await trio.run_process(
                [program, vm, bookmark],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                capture_stderr=True,
                check=False,
                start_new_session=True,
                deliver_cancel=_kill,
            )
    except trio.TooSlowError:
        raise RefusedError(
            f"{program} {vm} {bookmark} took more than {HOOK_S:.0f} s",
            hint="mend it, or take it out of [freeze]",
        ) from None
    except OSError as error:
        raise RefusedError(
            f"{program} cannot be run: {error.strerror}", hint="mend it, or take it out of [freeze]"
        ) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-SAID:]
        raise RefusedError(
            f"{program} {vm} {bookmark} failed with {done.returncode}: {said}",
            hint="mend it, or take it out of [freeze]",
        )


async def _kill(process: trio.Process) -> None:
    """It and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
