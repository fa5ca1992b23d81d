"""Turning runs of records into index entries: the work of the indexer, without its loop.

Everything of a batch goes into one transaction together with the seq that it reaches. Entries are put in key order, which LMDB
takes several times faster than random order.
"""

import os
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import numpy.typing as npt

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.index.pieces import KIND_BITS, LEVEL_BITS, SEGMENT_BITS, record_pieces
from cdpserver.index.store import CLOSED_NAME, SEQ, IndexFile, PointRow
from cdpserver.journal import control
from cdpserver.journal.log import Journal, Run
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import BLOCK, INDEX_BATCH, SECTOR

SECOND_NS = 1_000_000_000
BLOCK_SECTORS = BLOCK // SECTOR


def piece_entries(run: Run) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """(units, seqs, values) of every piece of the run's changes, in record order."""
    records = run.records
    records = records[(records["kind"] >= CHANGES[0]) & (records["kind"] <= CHANGES[-1])]
    single = (records["kind"] == Kind.DATA) & (records["length"] <= BLOCK_SECTORS)
    small = records[single]
    base = np.uint64(Kind.DATA << KIND_BITS | run.reader.segment << SEGMENT_BITS)
    units = [small["offset"] >> np.uint64(12)]
    seqs = [small["seq"]]
    values = [(small["place"] >> np.uint64(12)) | base]
    rows: list[tuple[int, int, int]] = []
    for record in records[~single]:
        seq, blocks = int(record["seq"]), -(-int(record["length"]) // BLOCK_SECTORS)
        first, place = int(record["offset"]) >> 12, int(record["place"])
        for unit, value in record_pieces(int(record["kind"]), first, blocks, run.reader.segment, place):
            rows.append((unit, seq, value))
    if rows:
        more = np.array(rows, dtype=np.uint64)
        units.append(more[:, 0])
        seqs.append(more[:, 1])
        values.append(more[:, 2])
    return np.concatenate(units), np.concatenate(seqs), np.concatenate(values)


def point_rows(run: Run, state: control.State) -> list[PointRow]:
    """One row for each second in which the run changed data, graded by `state`.

    The caller splits runs at control records, so that one state holds for all of a run.
    """
    records = run.records
    records = records[(records["kind"] >= CHANGES[0]) & (records["kind"] <= CHANGES[-1])]
    if not len(records):
        return []
    seqs, times = _instants_of(run, records)
    seconds = times // np.uint64(SECOND_NS)
    payload = np.where(
        records["kind"] == Kind.DATA, records["length"].astype(np.uint64) * np.uint64(SECTOR), 0
    )
    edges = [0, *(np.flatnonzero(np.diff(seconds)) + 1).tolist(), len(records)]
    return [
        PointRow(
            second=int(seconds[low]),
            last_seq=int(seqs[high - 1]),
            last_time_ns=int(times[high - 1]),
            records=high - low,
            payload_bytes=int(payload[low:high].sum()),
            session=state.session,
            grade=int(state.grade),
            evidence=state.evidence,
        )
        for low, high in pairwise(edges)
    ]


def _instants_of(
    run: Run, records: npt.NDArray[np.void]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """(seq, time) by which each record counts: its own; in a thinned interval those of the first instant that has it."""
    instants = run.reader.instants
    if instants is None:
        return records["seq"], records["time"]
    rows = instants.rows
    place = np.searchsorted(rows["seq"], records["seq"], side="left")
    if int(place[-1]) >= len(rows):
        raise CorruptError(f"{run.reader.path} goes on after the last instant that its interval can give")
    return rows["seq"][place], rows["time"][place]


def merge_rows(older: PointRow, newer: PointRow) -> PointRow:
    """Two rows of the same second: what happened in both, and the state at the end."""
    return PointRow(
        second=newer.second,
        last_seq=newer.last_seq,
        last_time_ns=newer.last_time_ns,
        records=older.records + newer.records,
        payload_bytes=older.payload_bytes + newer.payload_bytes,
        session=newer.session,
        grade=newer.grade,
        evidence=newer.evidence,
    )


def split_at_controls(run: Run) -> list[Run]:
    """The run in parts that each end with a control record (but perhaps the last)."""
    edges = (np.flatnonzero(run.records["kind"] == Kind.CONTROL) + 1).tolist()
    bounds = [0, *edges, len(run.records)]
    return [
        Run(run.reader, run.interval, run.records[low:high]) for low, high in pairwise(bounds) if high > low
    ]


def add_run(index: IndexFile, run: Run) -> None:
    """Index one run of records of this index's interval, in one transaction."""
    units, seqs, values = piece_entries(run)
    order = np.lexsort((seqs, units))
    units, seqs, values = units[order], seqs[order], values[order]
    keys = np.empty((len(units), 2), dtype=">u8")
    keys[:, 0], keys[:, 1] = units, seqs
    # The first two bytes of a unit are always zero: a key is the other six and the seq.
    raw = keys.view(np.uint8).reshape(-1, 16)[:, 2:].tobytes() if len(units) else b""
    raw_values = values.astype("<u8").tobytes()
    with index.changing() as txn:
        if len(units):
            items = [
                (raw[at * 14 : at * 14 + 14], raw_values[at * 8 : at * 8 + 8]) for at in range(len(units))
            ]
            txn.cursor(db=index.pieces).putmulti(items)
            levels = 0
            for level in np.unique(units >> np.uint64(LEVEL_BITS)).tolist():
                levels |= 1 << int(level)
            held = txn.get(b"levels", db=index.meta)
            txn.put(b"levels", bytes([levels | (held[0] if held else 0)]), db=index.meta)
        _add_points_and_controls(index, txn, run)
        txn.put(b"indexed", SEQ.pack(int(run.records["seq"][-1])), db=index.meta)


def _add_points_and_controls(index: IndexFile, txn: lmdb.Transaction, run: Run) -> None:
    held = txn.get(b"state", db=index.meta)
    state = control.unpack(msgpack.unpackb(held)) if held else run.reader.header.carry
    for part in split_at_controls(run):
        for row in point_rows(part, state):
            key = row.second.to_bytes(8, "big")
            older = txn.get(key, db=index.points)
            merged = merge_rows(PointRow.unpack(key, bytes(older)), row) if older else row
            txn.put(key, merged.pack(), db=index.points)
        last = part.records[-1]
        if last["kind"] == Kind.CONTROL:
            state = _add_control(index, txn, part, last, state)
    txn.put(b"state", msgpack.packb(control.pack(state)), db=index.meta)


def _add_control(
    index: IndexFile, txn: lmdb.Transaction, run: Run, record: np.void, state: control.State
) -> control.State:
    message = run.reader.control(record)
    seq, time_ns = int(record["seq"]), int(record["time"])
    body = SEQ.pack(time_ns) + msgpack.packb(message)
    txn.put(seq.to_bytes(8, "big"), body, db=index.control)
    if message["type"] in ("mark", "cut"):
        name = message["name"] if message["type"] == "mark" else message["number"]
        txn.put(f"{message['type']}/{name}".encode(), SEQ.pack(seq) + body, db=index.control)
    return control.fold(state, message, seq=seq, time_ns=time_ns)


def catch_up(journal: Journal, interval: int, index: IndexFile, *, batch: int = INDEX_BATCH) -> int:
    """Index what the interval has beyond the index, at most `batch` records; how many were indexed.

    Raises CorruptError at a damaged record, after everything before it was indexed.
    """
    done = index.indexed()
    held = journal.segments(interval)
    start = bisect_right(held, done + 1, key=lambda number: journal.reader(interval, number).first_seq) - 1
    added = 0
    for segment in held[max(start, 0) :]:
        reader = journal.reader(interval, segment)
        first = reader.count_to(done)
        while first < reader.count and added < batch:
            end = min(reader.count, first + batch - added)
            if reader.header.thinned:
                end = reader.count_to(reader.seq_of(end - 1))  # parts of one record stay together
            raw = reader.raw(first, end)
            whole = reader.first_bad(raw, first)
            if whole:
                add_run(index, Run(reader, interval, reader.records(first, first + whole)))
            added += whole
            if whole < end - first:
                raise CorruptError(
                    f"{reader.path}: record {reader.seq_of(first + whole)} is damaged",
                    hint="cdp check says what it touches",
                )
            first = end
        if added >= batch:
            break
    return added


def close_index(directory: Path, index: IndexFile) -> None:
    """Write a closed interval's index: sorted and dense, durable, renamed into place."""
    temporary = directory / ".tmp-index.mdb"
    for left in (temporary, Path(f"{temporary}-lock")):
        left.unlink(missing_ok=True)
    target = IndexFile(temporary, writable=True)
    try:
        for name in ("pieces", "points", "control", "meta"):
            with index.env.begin() as source, target.changing() as txn:
                rows = source.cursor(db=getattr(index, name))
                txn.cursor(db=getattr(target, name)).putmulti(iter(rows), append=True)
        target.env.sync(True)
    finally:
        target.env.close()
    Path(f"{temporary}-lock").unlink(missing_ok=True)
    os.chmod(temporary, 0o600)
    durable.publish(temporary, directory / CLOSED_NAME)
