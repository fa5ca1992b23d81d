"""Chunks that somebody found damaged: each has a note in the repository, and the next backup stores it anew, wherever it is made.

    damaged/XX.PACK.ID    the chunk ID is damaged in packs/XX/PACK

Who asks whether a chunk is stored does not count a place with a note; who reads tries it last, for a note may be wrong. What
reads well again loses its note by `check`, and a pack that is gone by `gc`. A note that cannot be written (the repository is
read-only) counts in this process alone: whoever reads there next finds the damage again.
Threads: any.
"""

import contextlib
import threading

from cdpserver.errors import CdpError
from cdpserver.repository.format import ID_SIZE
from cdpserver.repository.place import Place

FOLDER = "damaged"


class Damaged:
    """The notes of one repository."""

    def __init__(self, place: Place) -> None:
        """None are known before `refresh`."""
        self._place = place
        self._lock = threading.Lock()
        self._found: set[tuple[str, bytes]] = set()
        """By this process."""
        self.places: frozenset[tuple[str, bytes]] = frozenset()
        """(pack, id)."""
        self.ids: frozenset[bytes] = frozenset()
        """Chunks that have a note in any pack."""

    def refresh(self) -> None:
        """What others noted counts, too."""
        names = [name for name, _ in self._place.names(FOLDER)]
        with self._lock:
            self._set({place for place in map(_place_of, names) if place is not None} | self._found)

    def note(self, pack: str, id_: bytes) -> None:
        """The chunk is damaged in that pack."""
        with self._lock:
            if (pack, id_) in self.places:
                return
            self._found.add((pack, id_))
            self._set(self.places | {(pack, id_)})
        with contextlib.suppress(CdpError, OSError):
            self._place.put(_name(pack, id_), b"{}\n")

    def forget(self, pack: str, id_: bytes) -> None:
        """It is whole, or the pack is gone."""
        with self._lock:
            self._found.discard((pack, id_))
            self._set(self.places - {(pack, id_)})
        with contextlib.suppress(CdpError, OSError):
            self._place.delete(_name(pack, id_))

    def of(self, pack: str) -> set[bytes]:
        """The chunks that are damaged in a pack."""
        return {id_ for there, id_ in self.places if there == pack}

    def _set(self, places: frozenset[tuple[str, bytes]] | set[tuple[str, bytes]]) -> None:
        self.places = frozenset(places)
        self.ids = frozenset(id_ for _, id_ in places)


def _name(pack: str, id_: bytes) -> str:
    return f"{FOLDER}/{pack.removeprefix('packs/').replace('/', '.')}.{id_.hex()}"


def _place_of(name: str) -> tuple[str, bytes] | None:
    """None for a name that is no note."""
    pack, _, digits = name.removeprefix(f"{FOLDER}/").rpartition(".")
    try:
        id_ = bytes.fromhex(digits)
    except ValueError:
        return None
    return ("packs/" + pack.replace(".", "/", 1), id_) if len(id_) == ID_SIZE else None
