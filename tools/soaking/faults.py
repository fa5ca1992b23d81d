"""What befalls the server: its processes are killed or hang, all at once or one of them; its store is full, or read-only."""

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from random import Random

from cdpserver.errors import CdpError
from tools.kit.processes import FailedError, run, until
from tools.soaking.besieged import KEEPER, LONG_LIVED, SERVICE, Besieged

JOB_S = 20.0
"""How long a strike waits for a job to be there."""


class Faults:
    """Strikes at random. `over` ends it; what is struck comes back before it does."""

    def __init__(self, besieged: Besieged, disks: list[str], *, dice: Random, over: threading.Event) -> None:
        self.done: Counter[str] = Counter()
        self._besieged, self._disks, self._dice, self._over = besieged, disks, dice, over
        strikes: list[tuple[int, Callable[[], str]]] = [
            (6, self._kill_one),
            (4, self._hang_one),
            (3, self._kill_job),
        ]
        strikes += [(1, self._kill_all), (1, self._restart)]
        if besieged.mounted:
            strikes += [(1, self._full), (1, self._read_only)]
        self._strikes = [strike for weight, strike in strikes for _ in range(weight)]

    def strike(self) -> None:
        """One of them; the service answers again on return."""
        what = self._dice.choice(self._strikes)()
        self.done[what] += 1

    def gentle(self) -> None:
        """One that ends no process that lives long."""
        self.done[self._kill_job()] += 1

    # -- processes -------------------------------------------------------------------------------------------

    def _kill_one(self) -> str:
        kind = self._dice.choice(LONG_LIVED)
        if kind == SERVICE:
            self._besieged.kill()
            self._over.wait(self._dice.uniform(0, 2))
            self._besieged.start()
        else:
            self._signal(kind, signal.SIGKILL)
        return f"SIGKILL {kind}"

    def _hang_one(self) -> str:
        kind = self._dice.choice(LONG_LIVED)
        for pid in self._signal(kind, signal.SIGSTOP):
            self._over.wait(self._dice.uniform(0.2, 4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return f"SIGSTOP {kind}"

    def _kill_job(self) -> str:
        """A base point's, retention's, a merge's or the scrub's process; a cut sees to it that there is one."""
        disk = self._dice.choice(self._disks)
        cutting = threading.Thread(target=self._cut, args=(disk,))
        cutting.start()
        with contextlib.suppress(FailedError):
            until(lambda: "job" in self._besieged.processes(), "job", seconds=JOB_S, every_s=0.01)
        self._over.wait(self._dice.uniform(0, 0.2))
        struck = self._signal("job", signal.SIGKILL)
        cutting.join()
        return "SIGKILL job" if struck else "job that was done before it was killed"

    def _cut(self, disk: str) -> None:
        with contextlib.suppress(CdpError):
            self._besieged.client.cut(disk)

    def _kill_all(self) -> str:
        for kind, pids in self._besieged.processes().items():
            for pid in pids:
                if kind != SERVICE:
                    _kill(pid)
        self._besieged.kill()
        self._besieged.start()
        return "SIGKILL everything at once"

    def _restart(self) -> str:
        self._besieged.server.stop()
        self._besieged.start()
        return "restart"

    def _signal(self, kind: str, number: signal.Signals) -> list[int]:
        pids = self._besieged.processes().get(kind, [])[:1]
        return [pid for pid in pids if _kill(pid, number)]

    # -- the store -------------------------------------------------------------------------------------------

    def _full(self) -> str:
        filler = self._besieged.store / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        self._over.wait(self._dice.uniform(1, 6))
        filler.unlink()
        return "store full, and room again"

    def _read_only(self) -> str:
        """The service cannot be left running for that: a file system with open files is not made read-only."""
        besieged = self._besieged
        besieged.server.stop()
        for kind, pids in besieged.processes().items():
            for pid in pids:
                if kind != KEEPER:
                    _kill(pid)
        until(
            lambda: run("mount", "-o", "remount,ro", besieged.store, accept=(0, 32)).returncode == 0,
            "writers' end",
        )
        besieged.refuses_to_start()
        run("mount", "-o", "remount,rw", besieged.store)
        besieged.start()
        return "store read-only, and back"


def _kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
