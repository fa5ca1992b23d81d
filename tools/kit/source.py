"""Disks of QEMU with nobody's guest in front: qemu-storage-daemon, and a machine of qemu-system that never starts.

guest --NBD--> qemu-storage-daemon --raw--> source.raw
                      \\--blockdev-mirror--> cdpserver's target
"""

import contextlib
import subprocess
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tools.kit.processes import FailedError, listens, start, stop, until
from tools.kit.qmp import Qmp

RECONNECT_S = 30
"""How long QEMU holds the guest's writes while the target is away, before it goes on without it."""

JOB, TARGET = "cdp0", "cdp0-target"


def nbd_server(uri: str) -> tuple[dict[str, Any], str]:
    """The `server` and `export` of a `blockdev-add` for an `nbd+unix` or `nbd` URI."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd":
        return {"type": "inet", "host": parts.hostname, "port": str(parts.port)}, export
    return {"type": "unix", "path": parse_qs(parts.query)["socket"][0]}, export


def make_image(image: Path, size: int, format: str) -> None:
    """An empty image that is not there yet."""
    if image.exists():
        raise FileExistsError(image)
    subprocess.run(["qemu-img", "create", "-q", "-f", format, str(image), str(size)], check=True)


def first(monitor: Path) -> Qmp | None:
    """A connection to the monitor of a QEMU that has just made its socket; None while it does not listen there yet."""
    with contextlib.suppress(ConnectionRefusedError):
        return Qmp(monitor)
    return None


class Source:
    """A file as the disk of a qemu-storage-daemon, which serves it over NBD to whoever plays the guest."""

    def __init__(self, directory: Path, size: int, *, format: str = "raw") -> None:
        self.format = format
        self.image = directory / f"source.{format}"
        make_image(self.image, size, format)
        self._socket, self.monitor = directory / "source.sock", directory / "qsd.qmp"
        self.uri = f"nbd+unix:///disk?socket={self._socket}"
        self.start()

    def start(self) -> None:
        """Start the daemon on the image as it is; the first time, and after its end."""
        socket, monitor, log = self._socket, self.monitor, self.monitor.with_suffix(".log")
        socket.unlink(missing_ok=True)
        monitor.unlink(missing_ok=True)
        self.process = start(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=file0,filename={self.image},discard=unmap"),
                *("--blockdev", f"driver={self.format},node-name=disk0,file=file0,discard=unmap"),
                *("--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"),
                *("--export", "type=nbd,id=guest,node-name=disk0,name=disk,writable=on"),
                *("--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off"),
                *("--monitor", "chardev=monitor"),
            ],
            log,
        )
        try:
            listens(self.process, monitor, log)
            self.qmp = until(lambda: first(monitor), f"listener at {monitor}")
        except BaseException:
            stop(self.process)
            raise

    def mirror(self, uri: str) -> None:
        """Mirror the disk to a target, write-blocking; returns when the job is READY."""
        server, export = nbd_server(uri)
        self.qmp.call(
            "blockdev-add",
            driver="nbd",
            node_name=TARGET,
            server=server,
            export=export,
            discard="unmap",
            reconnect_delay=RECONNECT_S,
        )
        self.qmp.call(
            "blockdev-mirror",
            job_id=JOB,
            device="disk0",
            target=TARGET,
            sync="full",
            copy_mode="write-blocking",
            on_target_error="stop",
            filter_node_name=f"{JOB}-top",
        )
        until(self.in_sync, "READY of the mirror", every_s=0.05)

    def in_sync(self) -> bool:
        """READY, without an error, and everything copied: all that QEMU 7.2 shows of being in sync."""
        return in_sync(self.qmp)

    def end_mirror(self) -> None:
        """End the mirror cleanly: QEMU drains it and flushes the target; then the connection is closed."""
        end_mirror(self.qmp)
        # Left open, the daemon would at its own end wait for a server that went first.
        self.qmp.call("blockdev-del", node_name=TARGET)

    def close(self) -> None:
        """The daemon ends."""
        self.qmp.close()
        stop(self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def job(qmp: Qmp) -> dict[str, Any]:
    """The mirror's job. FailedError when it is no more."""
    jobs = [found for found in qmp.call("query-block-jobs") if found["device"] == JOB]
    if not jobs:
        raise FailedError("the mirror's job has ended")
    return dict(jobs[0])


def in_sync(qmp: Qmp) -> bool:
    """READY, without an error, and everything copied."""
    found = job(qmp)
    return bool(found["ready"] and found["io-status"] == "ok" and found["offset"] == found["len"])


def end_mirror(qmp: Qmp) -> None:
    """Cancel a READY mirror, which is its clean end; FailedError if there was an error on the way."""
    qmp.call("block-job-cancel", device=JOB)
    ended = qmp.wait("BLOCK_JOB_COMPLETED", lambda data: data["device"] == JOB)
    if "error" in ended:
        raise FailedError(f"the mirror ended with an error: {ended['error']}")


class Machine:
    """A qemu-system-x86_64 with nothing to run, or whose processor never runs; its disk is written by HMP's `qemu-io`.

    `waits_for` is a machine that moves into this one: its disk is shared. `monitor2` is held by nobody.
    """

    def __init__(
        self,
        directory: Path,
        size: int,
        *,
        format: str = "raw",
        runs: bool = False,
        waits_for: "Machine | None" = None,
    ) -> None:
        self.incoming = directory / "incoming"
        if waits_for is None:
            self.image = directory / f"machine.{format}"
            make_image(self.image, size, format)
        else:
            self.image = waits_for.image
        self.monitor, self.monitor2 = directory / "machine.qmp", directory / "machine2.qmp"
        monitor, log = self.monitor, directory / "machine.log"
        self.process = start(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "64"),
                *(() if runs or waits_for else ("-S",)),
                *(("-incoming", f"unix:{self.incoming}") if waits_for else ()),
                *("-nodefaults", "-no-user-config", "-display", "none"),
                *("-drive", f"if=none,id=drive0,file={self.image},format={format},discard=unmap"),
                *("-device", "virtio-blk-pci,drive=drive0"),
                *("-qmp", f"unix:{monitor},server=on,wait=off"),
                *("-qmp", f"unix:{self.monitor2},server=on,wait=off"),
            ],
            log,
        )
        try:
            listens(self.process, monitor, log)
            self.qmp = until(lambda: first(monitor), f"listener at {monitor}")
        except BaseException:
            stop(self.process)
            raise

    def io(self, command: str) -> None:
        """A write as of the guest, through the whole block layer: `write -P 0x5a 0 1M`."""
        said = self.qmp.call("human-monitor-command", command_line=f'qemu-io drive0 "{command}"')
        if "rror" in said or "ailed" in said:
            raise FailedError(f"qemu-io {command}: {said.strip()}")

    def drive_mirror(self, uri: str) -> dict[str, Any]:
        """`drive-mirror` with nothing but what it must be told; returns at READY with the arguments."""
        arguments: dict[str, Any] = {
            "job-id": JOB,
            "device": "drive0",
            "target": uri,
            "format": "raw",
            "mode": "existing",
            "sync": "full",
        }
        self.qmp.call("drive-mirror", **arguments)
        until(lambda: in_sync(self.qmp), "READY of drive-mirror", every_s=0.05)
        return arguments

    def close(self) -> None:
        """The machine ends."""
        self.qmp.close()
        stop(self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
