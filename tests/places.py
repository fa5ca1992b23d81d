"""What every Place promises, as one test that each kind is put to."""

import pytest

from cdpserver.errors import CorruptError, NotFoundError, RefusedError
from cdpserver.repository.place import Place


def check_place(place: Place) -> None:
    """An empty one."""
    assert list(place.names("packs")) == []
    with pytest.raises(FileNotFoundError):
        place.get("repo.json")
    with pytest.raises(FileNotFoundError):
        place.read("packs/ab/none", 0, 1)
    place.put("packs/ab/one", b"0123456789")
    place.put("packs/ab/two", b"")
    place.put("packs/cd/one", b"x" * 3000)
    place.put("backups/one", b"b")
    assert sorted(place.names("packs")) == [("packs/ab/one", 10), ("packs/ab/two", 0), ("packs/cd/one", 3000)]
    assert list(place.names("backups")) == [("backups/one", 1)]
    assert place.get("packs/ab/one") == b"0123456789"
    assert place.read("packs/ab/one", 3, 4) == b"3456"
    for offset, length in ((5, 6), (10, 1), (50, 1)):
        with pytest.raises(CorruptError, match="ends before"):
            place.read("packs/ab/one", offset, length)
    place.put("locks/one", b"old")
    place.put("locks/one", b"new")
    assert place.get("locks/one") == b"new"
    for name in ("packs/ab/one", "packs/ab/one", "locks/one"):
        place.delete(name)
    assert sorted(place.names("packs")) == [("packs/ab/two", 0), ("packs/cd/one", 3000)]
    assert list(place.names("locks")) == []
    with pytest.raises(FileNotFoundError):
        place.get("packs/ab/one")
    for name in ("", "/etc/passwd", "../x", "a/../b", "packs/.hidden", "a/b/c/d", "packs/\n"):
        with pytest.raises(NotFoundError):
            place.get(name)
    with place.hold("sessions/one") as check_held:
        check_held()
        assert place.holds("sessions") == {"sessions/one"}
        with pytest.raises(RefusedError, match="held by another"), place.hold("sessions/one"):
            pass
    assert place.holds("sessions") == set()
    assert list(place.names("sessions")) == []
