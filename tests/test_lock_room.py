"""LMDB writes the file in which it notes readers through a mapping: it has room before that, or the environment is not opened."""

import errno
import os
from pathlib import Path

import lmdb
import pytest

from cdpserver import mapped
from cdpserver.index.store import CLOSED_NAME, IndexFile
from cdpserver.limits import INDEX_READERS


def test_an_index_has_room_for_all_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "open-boot.mdb"
    IndexFile(path, writable=True).env.close()
    found = Path(f"{path}-lock").stat()
    assert found.st_blocks * 512 >= found.st_size, "a hole would need room later"
    file = IndexFile(path, writable=False)
    assert file.env.info()["max_readers"] == INDEX_READERS
    file.env.close()


def test_a_closed_index_needs_no_such_file(tmp_path: Path) -> None:
    made = tmp_path / "open-boot.mdb"
    IndexFile(made, writable=True).env.close()
    path = made.rename(tmp_path / CLOSED_NAME)
    IndexFile(path, writable=False).env.close()
    assert not Path(f"{path}-lock").exists()


def test_without_room_it_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "open-boot.mdb"

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(lmdb.DiskError, match="No space left"):
        IndexFile(path, writable=True)
    assert not path.exists()


def test_lmdb_makes_it_as_long(tmp_path: Path) -> None:
    """Else it would be given another number of readers."""
    env = lmdb.open(str(tmp_path / "a"), subdir=False, max_readers=300)
    env.close()
    assert (tmp_path / "a-lock").stat().st_size == mapped.READERS_HEAD + 300 * mapped.READER
