"""A `cdpserver` process of our own in a state directory of its own, and `cdp` for it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from cdpserver.errors import UnreachableError
from cdpserver.state import StateDir
from recovery.client import Client
from tools.kit.processes import FailedError, Process, start, stop, until

BIN = Path(sys.executable).parent
Talk = Callable[[str], None]


class Server:
    """`cdpserver` in the foreground, from its start to its end."""

    def __init__(self, state_dir: Path, *arguments: str) -> None:
        self.path = state_dir
        self.log = state_dir.with_name(f"{state_dir.name}.log")
        self.process: Process = start([BIN / "cdpserver", "--state-dir", state_dir, *arguments], self.log)
        try:
            until(self._answers, "answer of cdpserver")
        except BaseException:
            stop(self.process)
            raise
        self.client = Client(StateDir.open(state_dir))

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise FailedError(f"cdpserver ended: {self.log.read_text(errors='replace')[-2000:]}")
        try:
            return bool(Client(StateDir(self.path)).status())
        except UnreachableError:
            return False

    def child(self, name: str) -> int | None:
        """The pid of the target, the export or the indexer; None while there is none."""
        pid = self.client.status()["children"][name]["pid"]
        return pid if isinstance(pid, int) else None

    def uri(self, point: str) -> str:
        """The absolute URI of `DISK@WHEN`."""
        return str(self.client.place(point)["uri"])

    def stop(self) -> int:
        """SIGTERM; the exit status. Once is enough."""
        return stop(self.process, 30.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Cdp:
    """The command `cdp` as a person types it, for one state directory."""

    def __init__(self, state_dir: Path, talk: Talk) -> None:
        self._environment = {**os.environ, "CDP_STATE_DIR": str(state_dir)}
        self._talk = talk

    def __call__(self, *arguments: str) -> str:
        """Run a command and show it with its answer; the answer."""
        self._talk(f"$ cdp {' '.join(arguments)}")
        answer = self._run(arguments)
        for line in answer.splitlines():
            self._talk(f"    {line}")
        return answer.strip()

    def json(self, *arguments: str) -> Any:
        """Run a command and show it; the answer for programs."""
        self._talk(f"$ cdp {' '.join(arguments)}")
        return json.loads(self._run((*arguments, "--json")))

    def _run(self, arguments: Sequence[str]) -> str:
        done = subprocess.run(
            [BIN / "cdp", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=self._environment,
        )
        if done.returncode:
            said = done.stderr.strip()
            raise FailedError(f"cdp {' '.join(arguments)}: exit status {done.returncode}: {said}")
        return done.stdout
