"""A guest at work is backed up again and again: each backup, restored, is the point that it was made of, and what the guest had
said to be durable by then.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.guest_image import guest_image
from tests.guest_vm import Guest
from tests.judged import Judged, check_root, make_disks, newest, number_in
from tests.test_service import Server, connected

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for loop devices")]

BACKUPS = int(os.environ.get("CDP_LONG", "0")) or 5
"""CDP_LONG=64: past the next full one."""


class Backed(Judged):
    """The VM `web` with a repository."""

    def cdp(self, *arguments: object) -> Any:
        repo = str(self.directory / "repo")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "recovery.cli",
                *map(str, arguments),
                "--json",
                "--state-dir",
                self.server.state_dir,
            ],
            env={
                **os.environ,
                "CDP_REPO": repo,
                "XDG_STATE_HOME": repo + ".xdg",
                "XDG_CACHE_HOME": repo + ".xdg",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def digest_at(uri: str) -> str:
    """Of all that an export holds."""
    found = hashlib.sha256()
    with connected(uri) as client:
        for at in range(0, size := client.get_size(), 1 << 20):
            found.update(client.pread(min(1 << 20, size - at), at))
    return found.hexdigest()


def digest_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@pytest.mark.timeout(600)
def test_each_backup_of_a_guest_under_load_is_its_point(short_path: Path) -> None:
    image = guest_image()
    guest = Guest(short_path / "vm", make_disks(short_path, image), image=image)
    with Server(short_path / "s") as server:
        busy = Backed(short_path, server, guest)
        try:
            guest.boot()
            busy.protect()
            busy.in_sync()
            busy.note_clock()
            busy.load()
            busy.cdp("repo", "init", short_path / "repo", "--chunk-size", "64K")
            made = []
            for _ in range(BACKUPS):
                busy.goes_on(10)
                busy.points_go_on()
                made.append(busy.cdp("backup", "run", "web@latest"))
            counted, paid = busy.said("ACK"), busy.said("PAID")
        finally:
            guest.close()
        held = {
            (backup["id"], disk["name"]): digest_at(server.uri(f"{disk['name']}@seq:{disk['seq']}"))
            for backup in made
            for disk in backup["disks"]
        }
        assert server.stop() == 0
    assert [backup["kind"] for backup in made][:2] == ["full", "incremental"]
    for backup in made:
        work = short_path / backup["id"]
        work.mkdir()
        files = {}
        for disk in backup["disks"]:
            files[disk["name"]] = file = work / f"{disk['name'].partition('/')[2]}.raw"
            busy.cdp(
                "backup", "restore", backup["id"], "--disk", disk["name"], "--output", file, "--format", "raw"
            )
            assert digest_of(file) == held[backup["id"], disk["name"]], (backup, disk)
        left, right = (number_in(files[f"web/{name}-device"].read_bytes()) for name in ("left", "right"))
        assert left - right in (0, 1), (left, right, backup)
        check_root(
            files["web/root-device"],
            work,
            counted=newest(counted, backup["disks"][0]),
            paid=newest(paid, backup["disks"][0]),
            told=str(backup),
        )
    assert len(made) < 64 or [backup["kind"] for backup in made].count("full") > 1
