"""A worker that hangs while a copy is under way: no write of the guest waits beyond the bound, none fails, and all arrives."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, Self

import pytest

from tests.judged import BOUND_S, Lateness
from tests.test_protect import disk, guest, protect
from tests.test_protect_resync import SIZE, anchored, rewritten_while_nobody_looked, same, source
from tests.test_service import Server, until
from tools.kit.source import Source

pytestmark = pytest.mark.real

CLIENT_S = 0.5
"""What plays the guest is a thread of the test's own, and has to get its turn."""


class Writes:
    """Writes of a guest, one after the other, here and there, and how long each of them took."""

    def __init__(self, made: Source) -> None:
        self._made = made
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count = 0
        self.longest_s = 0.0
        self.error: BaseException | None = None

    def _run(self) -> None:
        dice = random.Random(1)
        try:
            with guest(self._made) as handle:
                while not self._over.wait(0.01):
                    began = time.monotonic()
                    handle.pwrite(dice.randbytes(4096), dice.randrange(SIZE // 4096) * 4096)
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
                    self.count += 1
        except BaseException as error:  # noqa: BLE001 - the test says it
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize("method", ["full", "bitmap"])
def test_a_worker_that_hangs_while_a_copy_is_under_way(short_path: Path, method: str) -> None:
    state = short_path / "state"
    with source(short_path) as made:
        if method == "bitmap":
            rewritten_while_nobody_looked(made, state)
        with Server(state) as server, Writes(made) as writes:
            if method == "full":
                protect(server, made)
            worker = server.pids()["target-0"]

            def copying() -> dict[str, Any] | None:
                found: dict[str, Any] = disk(server)["resync"] or {}
                return found if found.get("under_way") and found["method"] == method else None

            until(copying, "copy")
            with Lateness() as late:
                os.kill(worker, signal.SIGSTOP)
                assert copying(), "it hangs in the midst of it"
                before = writes.count
                until(lambda: server.events("target.hung"), "notice of it")
                until(lambda: writes.count > before + 20, "writes that go on")
            anchored(server)
            assert writes.error is None
            print(
                f"{method}: a write waited up to {writes.longest_s:.1f} s, the machine {late.worst_s:.2f} s"
            )
            assert writes.longest_s <= BOUND_S + CLIENT_S + late.worst_s
        with Server(state) as server:
            until(lambda: same(server, made), "all content")
