"""The index of a repository on this machine: after a power loss it is made anew, and otherwise it stays."""

import os
from pathlib import Path

import pytest

from cdpserver.repository.format import Entry, Kind
from cdpserver.repository.index import Index
from cdpserver.repository.unsynced import Unsynced

ENTRY = Entry(b"x" * 32, 100, 10, 20, Kind.DATA, 1)


def boot(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("CDP_BOOT_ID", f"boot-{number:08}")


def killed(path: Path, pack: str) -> None:
    """A process that adds to it and is killed before it closes it."""
    pid = os.fork()
    if not pid:
        try:
            Index(path).add(pack, [ENTRY])
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def known(path: Path) -> set[str]:
    with Index(path) as index:
        return index.packs()


def test_what_was_not_synced_at_a_power_loss_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, marker = tmp_path / "i.mdb", tmp_path / "i.mdb-unsynced"
    boot(monkeypatch, 1)
    assert known(path) == set()
    assert not marker.exists(), "nothing was changed"
    with Index(path) as index:
        with Index(path) as again:
            again.add("packs/aa/one", [ENTRY])
        assert marker.read_text() == "boot-00000001"
        assert index.packs() == {"packs/aa/one"}
    assert not marker.exists()
    boot(monkeypatch, 2)
    assert known(path) == {"packs/aa/one"}, "it was synced"
    killed(path, "packs/aa/two")
    assert marker.read_text() == "boot-00000002"
    assert known(path) == {"packs/aa/one", "packs/aa/two"}, "a kill tears nothing"
    boot(monkeypatch, 3)
    assert known(path) == set()
    assert not marker.exists()


def test_who_syncs_last_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for those that were killed; not for those that still have changes."""
    path, marker = tmp_path / "i.mdb", tmp_path / "i.mdb-unsynced"
    boot(monkeypatch, 1)
    killed(path, "packs/aa/one")
    other = Unsynced(path)
    with Index(path) as index:
        index.add("packs/aa/two", [ENTRY])
        other.begin()
    assert marker.exists()
    synced: list[bool] = []
    other.end(lambda: synced.append(marker.exists()))
    assert synced == [True]
    assert not marker.exists()
    marker.touch()
    assert known(path) == {"packs/aa/one", "packs/aa/two"}, "one was killed before it changed anything"
