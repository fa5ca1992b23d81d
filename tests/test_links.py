"""The hash chain: what was sealed stays what it was, what was dropped or thinned says so, and rewritten history is found."""

import contextlib
import json
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from cdpserver import durable
from cdpserver.check import Report, check_timeline
from cdpserver.check.depth import Quick
from cdpserver.errors import CorruptError
from cdpserver.index.indexer import TimelineIndexer
from cdpserver.journal import links
from cdpserver.journal.links import HEAD, LINK, Chain, Kind, stamped
from cdpserver.journal.log import interval_path
from cdpserver.journal.record import BODY, CHECK, RECORD_SIZE, payload_digest
from cdpserver.journal.record import Kind as RecordKind
from cdpserver.journal.segment import PAGE, SegmentReader, data_path, log_path
from cdpserver.timeline import load
from recovery import check as command
from recovery import cli
from tests.test_check import BLOCK, BOOT, Disk, disk, empty_disk, fill, flip, template
from tests.test_check_depth import cdp, named

__all__ = ["disk", "named", "template"]  # fixtures


def chained(disk: Disk) -> Disk:
    """Three sealed intervals, their links, and a fourth one that is open."""
    writer = disk.open()
    for number in range(2):
        disk.write(number, 7)
        writer.cut()
    disk.write(3, 9)
    writer.commit()
    link(disk)
    return disk


def link(disk: Disk, *, anew: bool = False) -> None:
    with Chain.open(disk.directory, disk.timeline.uuid) as chain:
        assert chain.catch_up(100, anew=anew)


def look(disk: Disk) -> Report:
    return check_timeline(disk.state.path, "t1", boot_id=BOOT, depth=Quick(), chain=True)


def said(disk: Disk) -> list[str]:
    return [damage.finding.what for damage in look(disk).damage]


def test_each_sealed_segment_has_a_link_and_carries_both_digests(disk: Disk) -> None:
    chained(disk)
    report = look(disk)
    uuid, found = links.read(disk.directory)
    assert report.whole and uuid == disk.timeline.uuid and report.chain is not None
    places = [(link.kind, link.interval, link.segment) for link in found]
    assert places == [(Kind.SEALED, 1, 1), (Kind.SEALED, 2, 1), (Kind.SEALED, 3, 1)]
    before = links.NONE
    for one in found:
        page = log_path(interval_path(disk.directory, one.interval), one.segment).read_bytes()[:PAGE]
        assert stamped(page) == (one.new, before)
        before = one.new
    assert report.chain.as_dict() == {"uuid": uuid.hex(), "links": 3, "head": found[-1].digest.hex()}


def test_the_indexer_links_what_is_sealed_and_the_newest_when_it_is(disk: Disk) -> None:
    indexer = TimelineIndexer(disk.directory, BOOT)
    writer = disk.open()
    for number in range(3):
        disk.write(number, 7)
        writer.cut()
        indexer.step(float(number))
    indexer.close()
    assert len(links.read(disk.directory)[1]) == 4 and look(disk).whole and indexer.unproven == ""


def test_a_segment_that_is_only_followed_by_another_waits_for_its_seal(disk: Disk) -> None:
    chained(disk)
    with disk.writer._lock:  # type: ignore[union-attr]
        disk.writer._roll(new_interval=False)  # type: ignore[union-attr]
    with Chain.open(disk.directory, disk.timeline.uuid) as chain:
        assert not chain.catch_up(100) and len(chain.links) == 3
    disk.write(5, 5)
    disk.writer.commit()  # type: ignore[union-attr]
    link(disk)
    assert len(links.read(disk.directory)[1]) == 4 and look(disk).whole


def forge(disk: Disk, interval: int, number: int) -> None:
    """Rewrite a block of history as who knows the formats would: payload, digest and check agree."""
    path = interval_path(disk.directory, interval)
    with contextlib.closing(SegmentReader(path, number)) as reader:
        records = reader.records(0, reader.count)
        at = int(np.flatnonzero(records["kind"] == RecordKind.DATA)[0])
        record = records[at]
        salt, place = reader.header.salt, int(record["place"])
    payload = bytes([66]) * BLOCK
    with open(data_path(path, number), "r+b") as data:
        data.seek(place)
        data.write(payload)
    with open(log_path(path, number), "r+b") as log:
        log.seek(PAGE + at * RECORD_SIZE)
        fields = list(BODY.unpack(log.read(BODY.size)))
        fields[-1] = payload_digest(payload)
        body = BODY.pack(*fields)
        log.seek(PAGE + at * RECORD_SIZE)
        log.write(body + CHECK.pack(zlib.crc32(body, salt)))


def test_history_that_was_rewritten_is_found_though_every_check_of_its_own_agrees(disk: Disk) -> None:
    chained(disk)
    forge(disk, 3, 1)
    assert disk.check().whole
    assert said(disk) == ["segment 1 is not what it was when it was sealed"]


def test_an_interval_or_segment_that_is_gone_or_came_in_later_is_found(disk: Disk) -> None:
    chained(disk)
    shutil.rmtree(interval_path(disk.directory, 1))
    assert "interval 1 is gone, and no link says that it was dropped" in said(disk)
    for path in (log_path, data_path):
        path(interval_path(disk.directory, 3), 1).unlink()
    assert "segment 1 is gone, and no link says that it was dropped" in said(disk)
    shutil.copy(log_path(interval_path(disk.directory, 2), 1), log_path(interval_path(disk.directory, 2), 7))
    assert "segment 7 came in later" in said(disk)


def test_dropping_is_a_link_of_its_own(disk: Disk) -> None:
    chained(disk)
    with Chain.open(disk.directory, disk.timeline.uuid) as chain:
        chain.drop(1, reason="older than keep_rp")
        chain.drop(1, reason="once is enough")
    assert "is gone" not in str(said(disk))  # a pass that ended here drops it the next time
    durable.remove_tree(interval_path(disk.directory, 1))
    last = links.read(disk.directory)[1][-1]
    assert (last.kind, last.interval, last.reason, last.new) == (
        Kind.DROPPED,
        1,
        "older than keep_rp",
        links.NONE,
    )
    assert not [what for what in said(disk) if "interval 1" in what and "link" in what]


def test_any_change_of_the_chain_itself_is_found_and_a_torn_end_is_none(disk: Disk) -> None:
    chained(disk)
    path = disk.directory / links.FILE
    whole = path.read_bytes()
    used = HEAD.size + 3 * LINK.size
    dice = random.Random(9)
    for _ in range(60):
        at = dice.randrange(used)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :])
        assert HEAD.size - 32 <= at < HEAD.size or said(disk)  # reserved bytes of the head count, too
    # Torn in its last link, between two sectors: it was being made.
    last = used - LINK.size
    assert last // 512 != (used - 1) // 512
    for torn in (whole[:512] + bytes(len(whole) - 512), whole[:last] + bytes(512 - last) + whole[512:]):
        path.write_bytes(torn)
        assert len(links.read(disk.directory)[1]) == 2 and look(disk).whole
    path.write_bytes(whole[:last])
    assert look(disk).whole
    path.write_bytes(whole[: last - LINK.size])
    assert said(disk) == ["link 2 is lost or damaged: segment 1 of interval 2 carries its digest"]
    path.write_bytes(whole[:last])
    link(disk)
    assert path.read_bytes()[:used] == whole[:used] and look(disk).whole
    path.unlink()
    assert said(disk) == ["the hash chain is missing"] == [d.finding.what for d in disk.check().damage]


def test_a_header_page_that_carries_something_else_is_found(disk: Disk) -> None:
    chained(disk)
    log = log_path(interval_path(disk.directory, 2), 1)
    held = log.read_bytes()
    flip(log, links.DIGEST_AT)
    assert said(disk) == ["the digests that the header page of segment 1 carries are damaged"]
    links.stamp(log, bytes(32), held[links.PREVIOUS_AT :][:32])
    assert said(disk) == ["the header page of segment 1 carries another digest than its link"]
    links.stamp(log, held[links.DIGEST_AT :][:32], bytes(32))
    assert said(disk) == ["the header page of segment 1 carries another predecessor than the chain has"]
    # Nothing at all: older versions lost it with the power, and the link proves the segment all the same.
    log.write_bytes(
        held[: links.DIGEST_AT] + bytes(32) + held[64 : links.PREVIOUS_AT] + bytes(64) + held[PAGE:]
    )
    assert look(disk).whole


def test_a_segment_is_not_linked_anew_where_its_own_page_says_that_it_was_another(disk: Disk) -> None:
    chained(disk)
    path = disk.directory / links.FILE
    whole = path.read_bytes()
    path.write_bytes(
        whole[: HEAD.size + 2 * LINK.size]
    )  # the last link is lost, and history behind it rewritten
    forge(disk, 3, 1)
    assert said(disk) == ["segment 1 is not what it was when it was sealed"]
    with pytest.raises(CorruptError, match="is not what it was"):
        link(disk)
    assert len(links.read(disk.directory)[1]) == 2


def test_a_broken_chain_does_not_keep_the_indexer_from_indexing(disk: Disk) -> None:
    chained(disk)
    flip(disk.directory / links.FILE, HEAD.size + 3 * 8)
    disk.write(9, 9)
    indexer = TimelineIndexer(disk.directory, BOOT)
    assert indexer.step(0.0) > 0
    indexer.close()
    assert "link 1 of" in indexer.unproven
    with pytest.raises(CorruptError), Chain.open(disk.directory, disk.timeline.uuid):
        pass


def ask(
    disk: Disk, anchor: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, str]:
    """Exit status and stderr of a check against an anchor."""
    where = ("--state-dir", str(disk.state.path), "--quick", "--chain", "--anchor", str(anchor))
    monkeypatch.setattr("sys.argv", ["cdp", "check", "d", *where, *more])
    monkeypatch.setattr(command, "boot_id", lambda: BOOT)
    return cli.main(), capsys.readouterr().err


def test_an_anchor_elsewhere_shows_a_history_that_was_made_anew(
    named: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chained(named)
    anchor = tmp_path / "anchor.json"
    words = (
        "check",
        "d",
        "--state-dir",
        str(named.state.path),
        "--quick",
        "--chain",
        "--anchor",
        str(anchor),
    )
    assert cdp(monkeypatch, capsys, *words)[0] == 0
    assert named.writer is not None
    named.write(9, 9)
    named.writer.cut()
    link(named)
    code, out = cdp(monkeypatch, capsys, *words)
    assert code == 0 and "its hash chain has 4 links; head" in out
    kept = anchor.read_bytes()
    (row,) = json.loads(kept)["disks"].values()
    assert (row["disk"], row["links"]) == ("d", 4)
    # Whoever may write everything in the state directory makes a chain that agrees with what he wrote.
    forge(named, 3, 1)
    (named.directory / links.FILE).unlink()
    link(named, anew=True)
    assert look(named).whole
    assert cdp(monkeypatch, capsys, *words)[0] == 4 and anchor.read_bytes() == kept
    assert cdp(monkeypatch, capsys, "check", "d", "--anchor", str(anchor))[0] == 2


def test_a_timeline_made_anew_under_another_uuid_is_refused_until_it_is_told_to_forget(
    named: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever may write everything gives the name to another timeline, whose chain agrees with itself."""
    anchor = tmp_path / "anchor.json"
    chained(named)
    assert ask(named, anchor, monkeypatch, capsys, "--forget", "d")[0] == 2  # nothing is kept of it yet
    assert ask(named, anchor, monkeypatch, capsys)[0] == 0
    kept = anchor.read_bytes()
    other = empty_disk(tmp_path / "other")
    fill(other)
    shutil.rmtree(named.directory)
    shutil.copytree(other.directory, named.directory)
    made = Disk(named.state, load(named.directory))
    link(made)
    assert made.timeline.uuid != named.timeline.uuid and look(made).whole
    code, said = ask(made, anchor, monkeypatch, capsys)
    assert code == 4 and "d is not the timeline that was anchored" in said and anchor.read_bytes() == kept
    assert ask(made, anchor, monkeypatch, capsys, "--forget", "d")[0] == 0
    (uuid,) = json.loads(anchor.read_bytes())["disks"]
    assert uuid == made.timeline.uuid.hex() and ask(made, anchor, monkeypatch, capsys)[0] == 0


def test_a_disk_that_was_anchored_and_is_gone_is_said_by_the_check_of_another(
    named: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    anchor = tmp_path / "anchor.json"
    chained(named)
    assert ask(named, anchor, monkeypatch, capsys)[0] == 0
    kept = json.loads(anchor.read_bytes())
    (row,) = kept["disks"].values()
    kept["disks"] |= {"00" * 16: {**row, "disk": "web/root"}}
    anchor.write_text(json.dumps(kept))
    code, said = ask(named, anchor, monkeypatch, capsys)
    assert code == 4 and "web/root was anchored, and is gone" in said
    flip(named.log(2), PAGE + 20)
    code, said = ask(named, anchor, monkeypatch, capsys)
    assert code == 4 and "d is damaged" in said and "web/root was anchored, and is gone" in said
    flip(named.log(2), PAGE + 20)
    assert ask(named, anchor, monkeypatch, capsys, "--forget", "web/root")[0] == 0
    # A disk that has another name now is the same timeline.
    kept["disks"] = {
        uuid: {**row, "disk": "before"} for uuid, row in kept["disks"].items() if uuid != "00" * 16
    }
    anchor.write_text(json.dumps(kept))
    assert ask(named, anchor, monkeypatch, capsys)[0] == 0
    assert [row["disk"] for row in json.loads(anchor.read_bytes())["disks"].values()] == ["d"]
    kept["disks"] = {"a": {"disk": "d"}}
    anchor.write_text(json.dumps(kept))
    assert ask(named, anchor, monkeypatch, capsys)[0] == 4  # damaged, and said so
