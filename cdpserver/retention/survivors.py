"""Which instants a thinned interval will give, and which records they need. Reads headers only; nothing is changed.

Memory: the headers of one segment, and the parts that are newest between two instants.
Cost: O(n log n) for n records, twice through the header logs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cdpserver.errors import RefusedError
from cdpserver.index.build import split_at_controls
from cdpserver.journal import control
from cdpserver.journal.instants import FOR_EVER, Instants
from cdpserver.journal.log import Journal, Run
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import SECTOR
from cdpserver.retention.newest import PARTS, newest

FOLD = 262_144
"""Parts gathered before those that are overwritten are let go."""


@dataclass
class _Chosen:
    """The newest instant of the slot under way, and the newest of the best grade in it."""

    every_ns: int
    seqs: set[int] = field(default_factory=set)
    _slot: int = -1
    _newest: int = 0
    _best: tuple[int, int] = (-1, 0)

    def take(self, slot: int, seq: int, grade: int) -> None:
        """A candidate, by ascending seq."""
        if slot != self._slot:
            self.close()
            self._slot, self._best = slot, (-1, 0)
        self._newest = seq
        if grade >= self._best[0]:
            self._best = (grade, seq)

    def close(self) -> None:
        """The slot is over."""
        if self._slot >= 0:
            self.seqs |= {self._newest, self._best[1]}


def _runs(journal: Journal, interval: int) -> Iterator[Run]:
    for segment in journal.segments(interval):
        reader = journal.reader(interval, segment)
        if reader.count:
            yield Run(reader, interval, reader.records(0, reader.count))


def _changes(records: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (records["kind"] >= CHANGES[0]) & (records["kind"] <= CHANGES[-1])
    return found


def choose(
    journal: Journal, interval: int, every_ns: int, *, exact: frozenset[int], held: frozenset[int]
) -> Instants:
    """The instants that the interval will give: of each `every_ns` the newest and the newest of the best grade, every
    bookmark, `exact`, and the interval's end. RefusedError if it cannot give one of `exact` itself.
    """
    listed = journal.first_reader(interval).instants
    state = journal.first_reader(interval).header.carry
    chosen = _Chosen(every_ns)
    wanted = set(exact)
    last = 0
    for run in _runs(journal, interval):
        for part in split_at_controls(run):
            _candidates(part, listed, state, chosen)
            record = part.records[-1]
            last = int(record["seq"])
            if record["kind"] == Kind.CONTROL:
                message = part.reader.control(record)
                if message["type"] == "mark":
                    wanted.add(control.marked(message, seq=last, time_ns=0)[0])
                elif message["type"] == "cut":
                    wanted.add(last)
                state = control.fold(state, message, seq=last, time_ns=int(record["time"]))
    chosen.close()
    seqs = np.array(sorted(chosen.seqs | wanted | {last}), dtype=np.uint64)
    rows = _with_times(journal, interval, seqs, listed)
    missing = [seq for seq in seqs.tolist() if seq not in rows]
    if missing:
        raise RefusedError(
            f"interval {interval} of {journal.timeline.name} cannot give seq {missing[0]}, which something needs",
            hint="it is left as it is; cdp check DISK says whether it is damaged",
        )
    only_held = held - chosen.seqs - {last}
    return Instants.make(every_ns, [(seq, *rows[seq], int(seq in only_held)) for seq in seqs.tolist()])


def _candidates(part: Run, listed: Instants | None, state: control.State, chosen: _Chosen) -> None:
    records = part.records[_changes(part.records)]
    if listed is not None:
        records = records[np.isin(records["seq"], listed.rows["seq"])]
    if not len(records):
        return
    slots = records["time"] // np.uint64(chosen.every_ns)
    ends = np.append(np.flatnonzero(np.diff(slots)), len(records) - 1)
    for slot, seq in zip(slots[ends].tolist(), records["seq"][ends].tolist(), strict=True):
        chosen.take(slot, seq, int(state.grade))


def _with_times(
    journal: Journal, interval: int, seqs: npt.NDArray[np.uint64], listed: Instants | None
) -> dict[int, tuple[int, int]]:
    """(time, until) of those of `seqs` that the interval can give."""
    if listed is not None:
        rows = listed.rows[np.isin(listed.rows["seq"], seqs)]
        return {seq: (time_ns, until_ns) for seq, time_ns, until_ns, _ in rows.tolist()}
    found: dict[int, tuple[int, int]] = {}
    pending: list[int] = []
    for run in _runs(journal, interval):
        records = run.records
        alters = records[_changes(records) | _gaps(run)]
        if pending and len(alters):
            found |= {seq: (found[seq][0], int(alters["time"][0])) for seq in pending}
            pending = []
        mine = records[np.isin(records["seq"], seqs)]
        after = np.searchsorted(alters["seq"], mine["seq"], side="right")
        for seq, time_ns, place in zip(
            mine["seq"].tolist(), mine["time"].tolist(), after.tolist(), strict=True
        ):
            known = place < len(alters)
            found[seq] = (time_ns, int(alters["time"][place]) if known else FOR_EVER)
            if not known:
                pending.append(seq)
    return found


def _gaps(run: Run) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(run.records), dtype=np.bool_)
    for number in np.flatnonzero(run.records["kind"] == Kind.CONTROL).tolist():
        found[number] = run.reader.control(run.records[number])["type"] == "gap"
    return found


def survivors(journal: Journal, interval: int, instants: Instants) -> Iterator[npt.NDArray[np.void]]:
    """The parts of records (dtype PARTS, by ascending seq) that the instants need, and every control record."""
    bounds = instants.rows["seq"]
    gathered: list[npt.NDArray[np.void]] = []
    for run in _runs(journal, interval):
        records = run.records
        edges = np.searchsorted(records["seq"], bounds, side="right").tolist()
        low = 0
        for high in sorted({edge for edge in edges if edge > 0}):
            gathered.append(_parts(run, low, high))
            if int(records["seq"][high - 1]) in instants:
                yield _needed(gathered, instants)
                gathered = []
            low = high
        gathered.append(_parts(run, low, len(records)))
        if sum(map(len, gathered)) > FOLD:
            gathered = [_needed(gathered, instants)]


def _parts(run: Run, low: int, high: int) -> npt.NDArray[np.void]:
    records = run.records[low:high]
    parts = np.empty(len(records), dtype=PARTS)
    parts["seq"], parts["kind"] = records["seq"], records["kind"]
    parts["start"] = records["offset"]
    parts["end"] = parts["start"] + records["length"].astype(np.int64) * SECTOR
    parts["segment"] = run.reader.segment
    parts["number"] = np.arange(low, high)
    return parts


def _needed(gathered: list[npt.NDArray[np.void]], instants: Instants) -> npt.NDArray[np.void]:
    """What the instant that ends the parts gathered shows of them. Only data is cut to what is seen: the rest has no payload."""
    parts = np.concatenate(gathered)
    changes = _changes(parts)
    left = newest(parts[changes])
    data = left[left["kind"] == Kind.DATA]
    seen = np.unique(left["seq"][left["kind"] != Kind.DATA])
    bare = parts[changes & (parts["kind"] != Kind.DATA) & np.isin(parts["seq"], seen)]
    others = parts[~changes & ((parts["kind"] == Kind.CONTROL) | np.isin(parts["seq"], instants.rows["seq"]))]
    kept = np.concatenate((data, bare, others))
    return kept[np.lexsort((kept["start"], kept["seq"]))]
