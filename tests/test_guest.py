"""The test guest itself: what tests say of guests rests on it."""

import json
import socket
from pathlib import Path

import pytest

from tests.core import scratch
from tests.guest_image import guest_image
from tests.guest_vm import Guest, booted, file_disk

pytestmark = pytest.mark.real


def agent(guest: Guest, command: str) -> object:
    """One command to the guest agent, after what is left of earlier talk."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(60)
        s.connect(str(guest.agent))
        s.sendall(json.dumps({"execute": command}).encode() + b"\n")
        answer: dict[str, object] = json.loads(s.makefile().readline())
        return answer["return"]


def test_a_guest_counts_pays_and_is_killed() -> None:
    """What it said to be durable is on its disk after SIGKILL, and a second boot goes on from there."""
    with scratch() as path:
        root = guest_image().copy_root(path / "root.img")
        with booted(path / "vm", file_disk("root", root)) as guest:
            assert guest.run("cat /proc/version").startswith("Linux version")
            guest.start("counter")
            guest.start("ledger")
            guest.wait_acks(20)
            guest.wait_until(lambda: guest.paid >= 5, 60, "five payments")
            assert agent(guest, "guest-fsfreeze-freeze") == 1
            guest.wait_for("GUEST freeze")
            assert agent(guest, "guest-fsfreeze-thaw") == 1
            guest.wait_acks(5)
            guest.kill()
            acks, paid = guest.acks, guest.paid
        with booted(path / "again", file_disk("root", root)) as guest:
            assert int(guest.wait_for(r"GUEST last (\d+)")[1]) in (acks, acks + 1)
            assert guest.run("sqlite3 /data/ledger.db 'PRAGMA integrity_check'") == "ok"
            assert int(guest.run("sqlite3 /data/ledger.db 'SELECT max(number) FROM payment'")) in (
                paid,
                paid + 1,
            )
            assert guest.run("sqlite3 /data/ledger.db 'SELECT sum(units) FROM account'") == "1000000"
            guest.power_off()


def test_a_shell_says_what_failed(tmp_path: Path) -> None:
    with (
        scratch() as path,
        booted(path / "vm", file_disk("root", guest_image().copy_root(path / "r"))) as guest,
    ):
        with pytest.raises(AssertionError, match="failed"):
            guest.run("false")
        assert guest.run("echo one; echo two") == "one\ntwo"
