"""Everything is restarted, ten times at random, under a verified load through a real mirror: no write is lost, no error is seen.

fio --NBD--> qemu-storage-daemon --mirror--> worker        and each of: worker, export, indexer, service, holder
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_service import SIZE, Server, is_running, read, sweep, until
from tests.test_sockets import kill_holder
from tools.kit.source import Source

pytestmark = [pytest.mark.real, pytest.mark.e2e]

TURNS = 10
LOAD_S = 10
"""One run of fio; another follows until the turns are over."""


class Load:
    """fio writes, reads and verifies through the mirror's source, run after run."""

    def __init__(self, uri: str, directory: Path) -> None:
        self._output = directory / "fio.txt"
        self._directory = directory
        self._command = [
            *("fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=4k-64k"),
            *(f"--size={SIZE}", "--io_size=100g", "--iodepth=8", "--time_based", f"--runtime={LOAD_S}"),
            *("--rate_iops=300", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"),
            *("--randrepeat=0", f"--output={self._output}"),
        ]
        self.runs = 0
        self._start()

    def _start(self) -> None:
        self.runs += 1
        self._process = subprocess.Popen(self._command, cwd=self._directory, stdin=subprocess.DEVNULL)

    def check(self) -> None:
        """No error until now; go on."""
        status = self._process.poll()
        assert status in (None, 0), self._output.read_text()
        if status == 0:
            self._start()

    def end(self) -> None:
        """The run ends as it should."""
        assert self._process.wait(3 * LOAD_S) == 0, self._output.read_text()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Operations:
    """What happens to a service in its life, each ending when the service is whole again."""

    def __init__(self, state_dir: Path, config: Path, dice: random.Random) -> None:
        self._state_dir = state_dir
        self._config = config
        self._dice = dice
        config.write_text("workers = 1\n")
        self.server = self._start()

    def _start(self) -> Server:
        return Server(self._state_dir, "--config", str(self._config))

    def kill_child(self) -> None:
        """SIGKILL to one of the children."""
        name, pid = self._dice.choice(sorted(self.server.pids().items()))
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.server.pids().get(name) not in (None, pid), f"another {name}")

    def kill_everything(self) -> None:
        """SIGKILL to the service and all its children, at once."""
        pids = self.server.pids().values()
        self.server.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.server = self._start()

    def kill_server(self) -> None:
        """SIGKILL to the service alone; its children serve until a new one takes them over."""
        old = self.server.pids().values()
        self.server.kill()
        time.sleep(self._dice.random())
        self.server = self._start()
        assert not any(map(is_running, old))

    def stop_and_start(self) -> None:
        """As `systemctl restart`."""
        assert self.server.stop() == 0
        self.server = self._start()

    def new_program(self) -> None:
        """SIGHUP, with another number of workers: disks move."""
        old = self.server.pids()
        self._config.write_text(f"workers = {self._dice.randrange(1, 4)}\n")
        self.server.process.send_signal(signal.SIGHUP)
        until(lambda: not any(map(is_running, old.values())), "end of the old children")
        until(self.server._is_up, "API")

    def kill_during_new_program(self) -> None:
        """SIGKILL while the children are being taken over."""
        self.server.process.send_signal(signal.SIGHUP)
        time.sleep(self._dice.random())
        self.server.kill()
        self.server = self._start()

    def kill_the_holder(self) -> None:
        """The sockets' keeper."""
        kill_holder(self._state_dir)

    def all(self) -> list[Callable[[], None]]:
        return [
            self.kill_child,
            self.kill_everything,
            self.kill_server,
            self.stop_and_start,
            self.new_program,
            self.kill_during_new_program,
            self.kill_the_holder,
        ]


@pytest.mark.timeout(600)
def test_everything_is_restarted_ten_times(short_path: Path) -> None:
    seed = int(os.environ.get("CDP_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    dice = random.Random(seed)
    operations = Operations(short_path / "s", short_path / "c.toml", dice)
    try:
        with Source(short_path, SIZE) as source:
            source.mirror(operations.server.add())
            operations.server.post("/v1/disks/d:synced", write_blocking=True)
            load = Load(source.uri, short_path)
            try:
                # Each kind at least once, in any order.
                kinds = operations.all()
                for operation in dice.sample(kinds, len(kinds)) + dice.choices(kinds, k=TURNS - len(kinds)):
                    print(operation.__name__)
                    operation()
                    load.check()
                    time.sleep(dice.random())
                load.end()
            finally:
                load.kill()
            # on_target_error=stop: an error would have paused the mirror, and it would not be in sync.
            until(source.in_sync, "mirror in sync")
            content = read(source.uri, SIZE)
            server = operations.server
            assert read(server.uri("d@latest"), SIZE) == content
            assert server.get("/v1/disks/d")["broken"] == ""
            source.end_mirror()
        assert not server.events("target.broken") + server.events("target.damaged")
        assert server.stop() == 0
    finally:
        operations.server.process.kill()
        operations.server.process.wait()
        sweep(short_path / "s")
