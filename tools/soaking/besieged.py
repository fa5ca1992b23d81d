"""The server that is struck: its processes by name, its store, and how each comes back."""

import contextlib
import os
import subprocess
from pathlib import Path

from cdpserver.state import StateDir
from recovery.client import Client
from tools.kit.processes import FailedError, run
from tools.kit.server import BIN, Server

CONFIG = 'workers = 2\n[store]\nprune_every = "2s"\n[scrub]\nrate = "1M"\nevery = "10s"\n'
SERVICE, KEEPER = "service", "keeper"
LONG_LIVED = (SERVICE, KEEPER, "target-0", "target-1", "export", "indexer")


class Besieged:
    """`cdpserver` on a store of its own: a tmpfs when we may mount one."""

    def __init__(self, directory: Path, *, store_bytes: int) -> None:
        self.directory, self.store = directory, directory / "store"
        self.mounted = os.geteuid() == 0
        self.store.mkdir()
        if self.mounted:
            run("mount", "-t", "tmpfs", "-o", f"size={store_bytes},mode=700", "cdp-soak", self.store)
        self.config = directory / "soak.toml"
        self.config.write_text(CONFIG)
        self.state_dir = self.store / "s"
        self.client = Client(StateDir(self.state_dir), timeout_s=120)
        self.start()

    def start(self) -> None:
        """The service runs and answers on return."""
        self.server = Server(self.state_dir, "--config", str(self.config))

    def kill(self) -> None:
        """SIGKILL the service alone."""
        self.server.process.kill()
        self.server.process.wait()

    def refuses_to_start(self) -> str:
        """What a service says that cannot start. FailedError if it runs."""
        ran = subprocess.run(
            [BIN / "cdpserver", "--state-dir", self.state_dir, "--config", self.config],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if not ran.returncode or "Traceback" in ran.stderr:
            raise FailedError(f"a service on a read-only store: status {ran.returncode}, {ran.stderr}")
        return ran.stderr.strip()

    def processes(self) -> dict[str, list[int]]:
        """Pids of ours that run now, by kind; all that works for a while is of the kind `job`."""
        found = {SERVICE: [self.server.process.pid], KEEPER: holders(self.state_dir / "run" / "holder.sock")}
        for path in sorted((self.state_dir / "run").glob("*.pid")):
            with contextlib.suppress(OSError, ValueError, IndexError):
                noted = path.read_text().split()
                pid, began = int(noted[0]), noted[21]
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] == began:
                    kind = path.name.partition(".")[0]
                    found.setdefault(kind if kind in LONG_LIVED else "job", []).append(pid)
        return {kind: pids for kind, pids in found.items() if pids}

    def used(self) -> int:
        """Bytes that the state directory takes up on the store."""
        total = 0
        for root, _, names in os.walk(self.state_dir):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(root, name)).st_blocks * 512
        return total

    def close(self) -> None:
        """Nothing of it runs, and nothing is mounted."""
        self.server.stop()
        for pids in self.processes().values():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        if self.mounted:
            run("umount", "--lazy", self.store)


def holders(path: Path) -> list[int]:
    """Pids of the processes that keep sockets and are to be asked at a Unix socket. They are nobody's children."""
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    ours = {f"socket:[{words[6]}]" for words in sockets if words[-1] == str(path)}
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_holder(pid, ours)]


def is_holder(pid: int, sockets: set[str]) -> bool:
    """Does a process run as a holder, with one of these sockets open?"""
    try:
        if b"holder.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False
        return any(os.readlink(fd) in sockets for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
