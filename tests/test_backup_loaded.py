"""A chain of backups by dirty bitmaps, of a disk whose file system is at work: each one, restored, is the disk as it was at one
instant while its command ran. A recorder below QEMU says so, which has every write in order.

    churn -> kernel's ext4 -> loop -> nbdfuse -> qemu-storage-daemon, backed up -> nbdkit with recorder.py -> image, log
"""

import itertools
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.recorded import PLUGIN, RECORD, churn
from tests.test_backup_live import Disks, cdp, command, in_its_own
from tools.kit.mount import as_file, as_loop, mounted
from tools.kit.processes import until

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for loop devices")]

BACKUPS = int(os.environ.get("CDP_LONG", "0")) or 8
"""CDP_LONG=200: past three full ones."""

MIB = 1 << 20
SIZE = 48 * MIB
BLOCK = 4096
STAYS = 26 * MIB
"""What is never written again: however much changes, it is less than a full backup reads."""


class Oracle:
    """The disk, going on write by write. Its digest is the sum of those of its blocks, so each write costs what it wrote."""

    def __init__(self, image: Path) -> None:
        self._disk = bytearray(image.read_bytes())
        self.digest = 0
        self._mix(range(SIZE // BLOCK))

    def _mix(self, blocks: range) -> None:
        """In or out."""
        for number in blocks:
            block = memoryview(self._disk)[number * BLOCK : (number + 1) * BLOCK]
            self.digest ^= int.from_bytes(blake3(block, key=number.to_bytes(32)).digest())

    def write(self, offset: int, data: bytes) -> None:
        touched = range(offset // BLOCK, -(-(offset + len(data)) // BLOCK))
        self._mix(touched)
        self._disk[offset : offset + len(data)] = data
        self._mix(touched)


def states(image: Path, log: Path) -> Iterator[tuple[int, int]]:
    """(bytes of the log, digest of the disk after them), one for each write."""
    oracle, at = Oracle(image), 0
    yield at, oracle.digest
    with open(log, "rb") as file:
        while head := file.read(RECORD.size):
            offset, length = RECORD.unpack(head)
            oracle.write(offset, file.read(length))
            at = file.tell()
            yield at, oracle.digest


@contextmanager
def at_work(point: Path) -> Iterator[None]:
    """Somebody makes, changes, syncs and removes files."""
    ended, failed = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            for number in itertools.count():
                folder = point / f"work{number % 3}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                churn(folder, number, operations=40)
                if ended.wait(0.05):
                    return
        except BaseException as error:  # noqa: BLE001
            failed.append(error)  # it is raised where the test is

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]


def grows(log: Path) -> None:
    """Until so much has been written that it is something to back up."""
    enough = log.stat().st_size + MIB
    until(lambda: log.stat().st_size > enough, "writes between two backups")


def make_ext4(image: Path) -> None:
    """With something in it."""
    filled = image.with_suffix(".d")
    filled.mkdir()
    (filled / "stays").write_bytes(random.Random(1).randbytes(STAYS))
    image.touch()
    os.truncate(image, SIZE)
    options = ("-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", "-J", "size=4", "-d", filled)
    subprocess.run(["mkfs.ext4", "-q", "-b", str(BLOCK), *options, image], check=True)


@pytest.mark.timeout(3600)
def test_each_backup_of_a_file_system_under_load_is_one_instant_of_it(
    short_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_its_own(short_path, monkeypatch)
    cdp(capsys, "repo", "init", short_path / "repo", "--chunk-size", "64K")
    image, before, log = (short_path / name for name in ("a.raw", "before.raw", "log"))
    make_ext4(image)
    shutil.copyfile(image, before)
    log.touch()
    qemu = Disks(short_path, "python", PLUGIN, f"image={image}", f"log={log}")
    made: list[dict[str, Any]] = []
    between: list[tuple[int, int]] = []
    try:
        uri = f"nbd+unix:///vda?socket={short_path}/guest.sock"
        with (
            as_file(uri, short_path / "fuse") as file,
            as_loop(file) as device,
            mounted(device, short_path / "mnt", "-o", "commit=1") as point,
            at_work(point),
        ):
            for number in range(BACKUPS):
                grows(log)
                if number == BACKUPS // 2:
                    for name in qemu.bitmaps():
                        qemu.qmp.call("block-dirty-bitmap-remove", node="vda", name=name)
                start = log.stat().st_size
                made.append(cdp(capsys, *command(qemu)))
                between.append((start, log.stat().st_size))
    finally:
        qemu.end()
    for number, backup in enumerate(made):
        since = number - BACKUPS // 2 if number >= BACKUPS // 2 else number
        full = since % 64 == 0
        assert backup["kind"] == ("full" if full else "incremental"), backup["reason"]
    assert "no dirty bitmap" in made[BACKUPS // 2]["reason"]

    known: dict[int, list[int]] = {}
    for number, backup in enumerate(made):
        output = short_path / "restored.raw"
        cdp(capsys, "backup", "restore", backup["id"], "--output", output, "--format", "raw")
        known.setdefault(Oracle(output).digest, []).append(number)
        output.unlink()
    found: set[int] = set()
    for at, digest in states(before, log):
        found |= {
            number for number in known.get(digest, ()) if between[number][0] <= at <= between[number][1]
        }
    assert found == set(range(BACKUPS)), "these were no instant of the disk while their command ran"
