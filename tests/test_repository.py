"""A backup repository: what goes in comes out, is stored once, and damage is found, named and never given out.

The oracle is the model of tests/core.py: every backup is compared with the disk as the model says it was.
"""

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.repository import clock, format, gc, packs, prune, seal, sessions
from cdpserver.repository.check import check
from cdpserver.repository.configuration import config_from
from cdpserver.repository.content import Content
from cdpserver.repository.copy import copy
from cdpserver.repository.format import ZERO_ID, Entry, Kind
from cdpserver.repository.index import Index
from cdpserver.repository.layer import DATA, HOLE, HOLE_ZERO, Layer
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.record import FULL, INCREMENTAL, BackedUpDisk, Backup
from cdpserver.repository.repository import Repository, create, load_config
from cdpserver.repository.source import PointSource
from cdpserver.repository.take import back_up, chunks_of
from cdpserver.retention.slots import DAY_NS, HOUR_NS, Rule, parse_slots, slot_of
from tests.backed_up import CHUNK, SIZE, Case, with_history
from tests.core import scratch
from tests.model import BLOCK
from tests.places import check_place

KEY = b"a key that is long enough"


@pytest.fixture(params=["plain", "encrypted"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A disk of 40 chunks with some history, and an empty repository."""
    monkeypatch.setattr(seal, "SCRYPT_N", 1 << 8)  # a repository is opened hundreds of times here
    with scratch() as path:
        world, line = with_history(path)
        secret = KEY if request.param == "encrypted" else None
        made = Case(world, line, path, secret)
        create(DirectoryPlace(path / "repo"), chunk_size=CHUNK, secret=secret)
        made.write(1, 30)
        yield made
        world.close()


# --- backups


def test_full_then_incremental(case: Case) -> None:
    """The second reads what changed and nothing else; both are whole."""
    first = case.back_up()
    assert (first.kind, first.reason) == (FULL, "there is no backup of it in this repository")
    assert 0 < first.stored_bytes < 2 * first.new_bytes
    assert first.read_bytes < SIZE, "zeros are not read"
    case.line.write(7 * CHUNK, os.urandom(BLOCK))
    case.line.cut()
    case.line.write(9 * CHUNK, os.urandom(BLOCK))
    second = case.back_up()
    assert (second.kind, second.parent, second.increments) == (INCREMENTAL, first.id, 1)
    assert second.read_bytes == second.new_bytes == 2 * BLOCK
    assert second.disks[0].patched == 2
    third = case.back_up()
    assert (third.kind, third.read_bytes, third.stored_bytes) == (INCREMENTAL, 0, 0)
    case.verify()
    case.verify("another machine's cache")


def test_no_backup_stands_on_another(case: Case) -> None:
    """The first may go, and the rest is whole after gc."""
    made = [case.back_up()]
    for number in range(4):
        case.write(100 + number)
        made.append(case.back_up())
    with case.repository() as repository:
        for backup in made[:-1]:
            repository.remove(backup.id)
        assert gc.sweep(repository).waiting == 0
        assert check(repository).sound
    case.verify()
    case.verify("another machine's cache")


def test_zeros_and_the_same_cost_nothing(case: Case) -> None:
    case.back_up()
    case.line.zero(0, SIZE // CHUNK * CHUNK)
    case.line.write(0, b"base" * 4096)
    before = case.back_up()
    assert before.disks[0].chunks <= 2
    assert before.stored_bytes < 2 * CHUNK
    case.verify()


def test_a_full_one_after_so_many(case: Case) -> None:
    kinds = []
    for number in range(5):
        case.write(number, 2)
        kinds.append(case.back_up(most=2).kind)
    assert kinds == [FULL, INCREMENTAL, INCREMENTAL, FULL, INCREMENTAL]
    assert case.back_up(full=True).reason == "a full one was asked for"
    case.verify()


def test_a_resized_disk_is_read_whole(case: Case) -> None:
    case.back_up()
    case.line.grow(SIZE + 3 * CHUNK)
    case.line.write(SIZE - 1024, os.urandom(2 * BLOCK))
    grown = case.back_up()
    assert (grown.kind, grown.reason) == (FULL, "the disk was resized")
    case.verify()


def test_an_older_instant_is_compared_with_an_older_backup(case: Case) -> None:
    first = case.back_up()
    case.write(2)
    middle = case.line.last_seq
    case.write(3)
    case.back_up()
    late = case.back_up(seq=middle)
    assert (late.kind, late.parent) == (INCREMENTAL, first.id)
    case.verify()


def test_as_much_changed_as_a_full_one_reads(case: Case) -> None:
    case.back_up()
    for at in range(0, SIZE, CHUNK):
        case.line.write(at, os.urandom(min(CHUNK, SIZE - at)))
    made = case.back_up()
    assert (made.kind, made.reason.split(" since")[0]) == (FULL, "as much changed")
    case.verify()


def test_a_damaged_parent_means_a_full_one(case: Case) -> None:
    first = case.back_up()
    path = case.path / "repo/backups" / first.id
    path.write_bytes(path.read_bytes()[:-1])
    assert case.back_up().reason == "there is no backup of it in this repository"
    with case.repository() as repository:
        assert [d.backup for d in check(repository).damage] == [first.id]


def test_a_parent_whose_chunks_are_gone_is_made_good_by_a_full_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack was deleted beside us: what it had is read and stored again, and the older backups are whole with it."""
    monkeypatch.setattr(packs, "PACK_BYTES", CHUNK)
    first = case.back_up()
    case.write(2, 3)
    assert case.back_up().parent == first.id
    place = DirectoryPlace(case.path / "repo")
    first_pack = next(name for name, _ in place.names("packs") if name.endswith(f"{first.id}-000001"))
    place.delete(first_pack)
    case.write(3, 3)
    made = case.back_up()
    assert (made.kind, made.reason.partition(": ")[2]) == (FULL, "some of its chunks are gone")
    assert 0 < made.new_bytes < first.new_bytes, "what is there is not stored again"
    assert case.back_up().parent == made.id
    with case.repository() as repository:
        damaged = {d.backup for d in check(repository).damage}
    assert made.id not in damaged


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_many_increments(case: Case) -> None:
    """200 of them, each whole, and the packs of a few."""
    for number in range(200):
        case.write(number, 1)
        case.back_up()
    case.verify()


# --- keys, configuration, bad input


def test_copies_have_the_same_ids_and_read_what_the_other_one_lacks(case: Case) -> None:
    """Into a repository of another chunk size and key; what one backup lacks stops no other."""
    other = DirectoryPlace(case.path / "other")
    create(other, chunk_size=4 * CHUNK, secret=b"another key of enough length")

    def opened() -> Repository:
        return Repository(other, secret=b"another key of enough length", cache=case.path / "cache")

    case.back_up()
    case.write(600, 3)
    case.back_up()
    with case.repository() as source, opened() as target:
        done = copy(source, target)
        assert [backup.id for backup in done.copied] == source.backup_ids() == target.backup_ids()
        assert [backup.kind for backup in done.copied] == [FULL, INCREMENTAL]
        assert done.copied[1].read_bytes <= 3 * 4 * CHUNK, "what changed"
        assert copy(source, target).there == 2
    case.write(601, 1)
    case.back_up()
    case.write(602, 1)
    last = case.back_up()
    with case.repository() as source:
        damaged = source.backup_ids()[2]
    path = case.path / "repo" / "backups" / damaged
    path.write_bytes(path.read_bytes()[:-1])
    with case.repository() as source, opened() as target:
        done = copy(source, target)
        assert [backup.id for backup in done.copied] == [last.id]
        assert done.copied[0].kind == INCREMENTAL
        assert check(target).sound
        for id_ in target.backup_ids():
            case.compare(target, target.backup(id_))
        named = copy(source, target, wanted=lambda backup: backup.name.startswith("other"))
        assert (named.copied, named.there) == ((), 0)


def test_no_clock_makes_a_backup_too_old() -> None:
    """Slots count that have a backup, whatever the time is now; years are slots, too."""
    backups = [backup_at(24.0 * day) for day in range(40)]
    kept = [
        v.backup.created_ns // DAY_NS for v in prune.plan(backups, parse_slots("3d 2m"), locked={}) if v.keep
    ]
    assert kept == [30, 37, 38, 39]
    years = prune.plan(backups, parse_slots("5y"), locked={})
    assert [v.keep for v in years] == [False] * 39 + [True]


def test_a_layer_is_what_a_backup_changed(case: Case) -> None:
    """Laid over the other backup it is this one; what did not change is left to that."""
    first = case.back_up()
    case.write(500, 12)
    case.line.zero(3 * CHUNK, CHUNK)
    case.line.write(4 * CHUNK, bytes(CHUNK))
    second = case.back_up()
    with case.repository() as repository:
        new, old = (Content(repository, backup.disks[0]) for backup in (second, first))
        layer = Layer(new, old)
        assert layer.status(0, new.size, one=True)[0] == layer.status(0, new.size, one=False)[0]
        runs = layer.status(777, new.size, one=False)
        assert [run[0] for run in runs] == [777, *(run[1] for run in runs[:-1])]
        assert runs[-1][1] == new.size
        assert {kind for *_, kind in runs} == {DATA, HOLE, HOLE_ZERO}
        for start, end, kind in runs:
            length = end - start
            wanted = {
                DATA: layer_read(layer, start, length),
                HOLE: old.read(start, length),
                HOLE_ZERO: bytes(length),
            }
            assert wanted[kind] == new.read(start, length)
        assert sum(end - start for start, end, kind in runs if kind == DATA) <= 13 * CHUNK, "clusters"


def layer_read(layer: Layer, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    layer.read_into(buffer, start)
    return bytes(buffer)


def test_a_wrong_key_and_no_key(tmp_path: Path) -> None:
    place = DirectoryPlace(tmp_path / "repo")
    create(place, chunk_size=CHUNK, secret=KEY)
    with pytest.raises(RefusedError, match="is encrypted"):
        Repository(place, cache=tmp_path)
    with pytest.raises(RefusedError, match="not the key"):
        Repository(place, secret=b"another", cache=tmp_path)
    with pytest.raises(RefusedError, match="empty"):
        Repository(place, secret=b" \n", cache=tmp_path)
    Repository(place, secret=KEY + b"\n", cache=tmp_path).close()


def test_what_init_refuses(tmp_path: Path) -> None:
    place = DirectoryPlace(tmp_path / "repo")
    for size in (0, 4096, 3 << 20, 128 << 20):
        with pytest.raises(UsageError, match="power of two"):
            create(place, chunk_size=size)
    with pytest.raises(NotFoundError, match="no repository"):
        load_config(place)
    create(place)
    with pytest.raises(RefusedError, match="repository already"):
        create(place)
    (tmp_path / "repo/repo.json").unlink()
    place.put("packs/ab/x", b"")
    with pytest.raises(RefusedError, match=r"no repo\.json"):
        create(place)


@given(data=st.binary(max_size=300), at=st.integers(0, 400))
def test_a_damaged_configuration_is_said(data: bytes, at: int) -> None:
    with scratch() as path:
        place = DirectoryPlace(path)
        made = create(place)
        whole = place.get("repo.json")
        place.put("repo.json", whole[:at] + data + whole[at + len(data) :])
        with contextlib.suppress(CorruptError):
            assert load_config(place) == made


def test_each_bit_of_a_configuration_counts(tmp_path: Path) -> None:
    """An immutable period that ends early, or a salt that makes the right key a wrong one, is damage, and said as such."""
    place = DirectoryPlace(tmp_path / "repo")
    made = create(place, secret=KEY, immutable_ns=30 * DAY_NS)
    whole = place.get("repo.json")
    for at in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            with contextlib.suppress(CorruptError):
                assert config_from(bytes(data), "here") == made
    place.put("repo.json", whole.replace(b'"immutable_ns": 2', b'"immutable_ns": 1'))
    with pytest.raises(CorruptError, match=r"repo\.json of .* is damaged: it is not what was written"):
        Repository(place, secret=KEY, cache=tmp_path)
    place.put("repo.json", whole)
    Repository(place, secret=KEY, cache=tmp_path).close()


def test_a_configuration_of_an_older_program(tmp_path: Path) -> None:
    """Without a check it is read as it is; one of a newer program is refused."""
    place = DirectoryPlace(tmp_path / "repo")
    made = create(place)
    assert config_from(json.dumps(made.show()).encode(), "here") == made
    with pytest.raises(RefusedError, match="is of version 2"):
        config_from(json.dumps(made.show() | {"version": 2}).encode(), "here")


def test_a_directory_is_a_place(tmp_path: Path) -> None:
    check_place(DirectoryPlace(tmp_path / "repo"))


# --- damage


def test_every_kind_of_file_flipped_and_cut(case: Case) -> None:
    """Found, named, and nothing that is damaged is ever given out."""
    for number in range(3):
        case.write(10 + number)
        case.back_up()
    dice = random.Random(5)
    files = [
        p for folder in ("packs", "backups") for p in (case.path / "repo" / folder).rglob("*") if p.is_file()
    ]
    assert len(files) == 6
    for number, path in enumerate([*files, *files]):
        whole = path.read_bytes()
        for _ in range(12):
            at = dice.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << dice.randrange(8))]) + whole[at + 1 :])
            damaged(case, f"cache-{number}", unused=at >= len(whole) - format.TAIL_SIZE)
        path.write_bytes(whole[: dice.randrange(len(whole))])
        damaged(case, f"cut-{number}", unused=False)
        path.write_bytes(whole)
    case.verify()


def damaged(case: Case, cache: str, *, unused: bool) -> None:
    """Whatever can be read is right; what cannot is said. `unused`: the damage may be in what is there twice."""
    with case.repository(f"{cache}-{random.random()}") as repository:
        found = check(repository)
        assert not found.sound or unused or all_readable(case, repository)
        for backup in repository.backups():
            with contextlib.suppress(CorruptError):
                case.compare(repository, backup)


def all_readable(case: Case, repository: Repository) -> bool:
    """Damage of rows or heads that are there twice touches nothing."""
    for backup in list(repository.backups()):
        case.compare(repository, backup)
    return len(list(repository.backups())) == len(case.taken)


def test_packs_deleted_and_swapped(case: Case) -> None:
    """A pack that is gone, or holds another one's content, touches the backups that need it, and they are named."""
    first = case.back_up()
    case.line.write(3 * CHUNK, os.urandom(BLOCK))
    second = case.back_up()
    one, other = (next((case.path / "repo/packs").rglob(f"{b.id}-*")) for b in (first, second))
    contents = one.read_bytes(), other.read_bytes()
    other.unlink()
    with case.repository("c1") as repository:
        found = check(repository)
        assert {d.backup for d in found.damage} == {second.id}
        assert [(d.disk, d.start, d.end) for d in found.damage] == [("d1", 0, SIZE)], (
            "its list is in that pack"
        )
        case.compare(repository, repository.backup(first.id))
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    case.verify("c2")
    other.write_bytes(contents[1])
    with case.repository("c3") as repository:
        assert {d.backup for d in check(repository, read_data=False).damage} == {first.id, second.id}
    one.write_bytes(contents[0])
    case.verify("c4")


def test_payloads_swapped_in_a_pack_are_refused(case: Case) -> None:
    """Two chunks of random bytes are stored in the same length: their ids say that they changed places."""
    for number in (3, 5):
        case.line.write(number * CHUNK, os.urandom(CHUNK))
    backup = case.back_up()
    path = next((case.path / "repo/packs").rglob(f"{backup.id}-*"))
    data = bytearray(path.read_bytes())
    entries = format.scan(bytes(data), load_config(DirectoryPlace(case.path / "repo")).id)
    left, right = [e for e in entries if e.kind == Kind.DATA and e.stored >= CHUNK][:2]
    assert left.stored == right.stored
    content = bytes(data[left.place : left.place + left.stored])
    data[left.place : left.place + left.stored] = data[right.place : right.place + right.stored]
    data[right.place : right.place + right.stored] = content
    path.write_bytes(bytes(data))
    with case.repository() as repository:
        assert [(d.start, d.end) for d in check(repository).damage] == [
            (3 * CHUNK, 4 * CHUNK),
            (5 * CHUNK, 6 * CHUNK),
        ]


def test_the_index_is_disposable(case: Case) -> None:
    """Deleted or full of junk, it is made anew; rows of a pack may be damaged, the entries say the same."""
    case.back_up()
    for path in (case.path / "cache").iterdir():
        path.unlink()
    case.verify()
    for path in (case.path / "cache").glob("*.mdb"):
        path.write_bytes(b"junk" * 5000)
    case.verify()
    pack = next(p for p in (case.path / "repo/packs").rglob("*") if p.is_file())
    pack.write_bytes(pack.read_bytes()[: -format.TAIL_SIZE - 10])
    case.verify("anew")


# --- gc, sessions, two writers


def test_gc_beside_a_running_backup(case: Case) -> None:
    """What a backup that runs builds on is not deleted under it, whenever it began."""
    first = case.back_up()
    case.line.write(2 * CHUNK, os.urandom(CHUNK))
    second = case.back_up()
    with case.repository() as repository:
        place = repository.place
        pack = next(name for name, _ in place.names("packs") if second.id in name)
        with sessions.session(place, "old"), PackWriter(repository, "old") as writer:
            # It began before the pack was doomed, and builds on a chunk in it.
            mine = repository.entries(pack, dict(place.names("packs"))[pack])
            repository.remove(second.id)
            with case.repository("gc's") as other:
                swept = gc.sweep(other)
                assert (swept.deleted, swept.waiting) == (0, 1)
            assert not writer.claim(mine[0].id)
            with sessions.session(place, "young"), case.repository("young's") as young:
                assert not young.has(mine[0].id), "a backup that begins now builds on nothing that is doomed"
            # It ends, and is a backup that needs the chunk.
            repository.write_backup(second)
        with case.repository("gc's") as other:
            swept = gc.sweep(other)
            assert (swept.deleted, swept.waiting) == (1, 0), "moved, then deleted"
    case.verify()
    case.verify("anew")
    assert first.id in case.taken


def test_gc_leaves_a_session_its_packs(case: Case) -> None:
    """Stored, and not yet named by a backup."""
    with case.repository() as repository:
        content = os.urandom(CHUNK)
        id_ = repository.id(content)
        with sessions.session(repository.place, "one"), PackWriter(repository, "one") as writer:
            assert writer.claim(id_)
            assert not writer.claim(id_)
            writer.add(id_, Kind.DATA, CHUNK, repository.seal(id_, Kind.DATA, content))
            writer.flush()
            with case.repository("gc's") as other:
                assert gc.sweep(other) == gc.Swept((), 0, 0, 0)
            assert repository.load(id_, CHUNK) == content
        with case.repository("gc's") as other:
            assert gc.sweep(other).deleted == 1
        with pytest.raises(CorruptError, match="missing"):
            repository.load(id_, CHUNK)


def test_one_gc_at_a_time(case: Case) -> None:
    with (
        case.repository() as repository,
        sessions.session(repository.place, sessions.GC),
        case.repository("other") as other,
        pytest.raises(RefusedError, match="held by another"),
    ):
        gc.sweep(other)


def test_gc_goes_on_where_it_was_killed(case: Case) -> None:
    """Doomed, and nothing noted; or noted, and not deleted."""
    first = case.back_up()
    case.line.write(2 * CHUNK, os.urandom(CHUNK))
    case.back_up()
    with case.repository() as repository:
        place = repository.place
        repository.remove(first.id)
        pack = next(name for name, _ in place.names("packs") if first.id in name)
        place.put("doomed/" + pack.removeprefix("packs/").replace("/", "."), b"{}\n")
        sessions.doom(place, [pack])
        assert sessions.waits_for(place, pack) == set()
        gc.sweep(repository)
        assert not list(place.names("doomed"))
        assert pack not in dict(place.names("packs"))
    case.verify()


def test_two_backups_at_once_store_what_they_need(case: Case) -> None:
    """Neither knows of the other's packs; both are whole, also when one of them goes."""
    with (
        case.repository() as one,
        case.repository("other") as other,
        case.line.view(case.line.last_seq) as view,
    ):
        source = PointSource(view, name="d1", time_ns=case.world.now_ns)
        a = back_up(one, [source], "d1@a")
        other.index.forget(other.index.packs())
        b = back_up(other, [source], "d1@b", full=True)
        case.taken |= {a.id: view.seq, b.id: view.seq}
    case.verify()
    with case.repository() as repository:
        repository.remove(a.id)
        gc.sweep(repository)
    case.verify("anew")


# --- formats


@given(
    entries=st.lists(
        st.tuples(
            st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=200), st.sampled_from(Kind)
        ),
        max_size=20,
    )
)
def test_packs_say_the_same_twice(entries: list[tuple[bytes, bytes, Kind]]) -> None:
    """Rows and entries; cut anywhere, what the scan finds is a prefix."""
    repo_id, parts, at, made = bytes(16), [format.pack_head(bytes(16))], format.HEAD.size, []
    for id_, payload, kind in entries:
        entry = Entry(id_, at + format.ENTRY_SIZE, len(payload), len(payload), kind, 0)
        made.append(entry)
        parts += [format.pack_entry(entry), payload]
        at += format.ENTRY_SIZE + len(payload)
    data = b"".join([*parts, format.pack_end(made, at)])
    assert list(format.scan(data, repo_id)) == made
    place, count, crc = format.parse_tail(data[-format.TAIL_SIZE :], len(data))
    assert format.parse_rows(data[place : place + count * format.ROW.size], place, crc) == made
    for cut in range(format.HEAD.size, len(data), 37):
        found = list(format.scan(data[:cut], repo_id))
        assert found == made[: len(found)]


@given(data=st.binary(max_size=400))
def test_junk_is_corrupt_and_nothing_else(data: bytes) -> None:
    with pytest.raises(CorruptError):
        Backup.unpack(data)
    with contextlib.suppress(CorruptError):
        list(format.scan(format.pack_head(bytes(16)) + data, bytes(16)))
    with pytest.raises(CorruptError):
        list(format.scan(data, bytes(16)))
    if len(data) >= format.TAIL_SIZE:
        with pytest.raises(CorruptError):
            format.parse_tail(data[-format.TAIL_SIZE :], len(data))


@given(ranges=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 40)), max_size=20))
def test_chunks_of_ranges(ranges: list[tuple[int, int]]) -> None:
    at, disjoint = 0, []
    for skip, length in ranges:
        disjoint.append((at + skip, at + skip + length))
        at += skip + length
    expected = sorted(
        {n for start, end in disjoint for n in range(start // 16, -(-end // 16)) if end > start}
    )
    assert list(chunks_of(disjoint, 16)) == expected


# --- how long they are kept


def backup_at(hours: float, name: str = "web/vda") -> Backup:
    return Backup(f"{hours:09.2f}-{name[:2]}", FULL, "", int(hours * HOUR_NS), name, ())


RULES = st.dictionaries(st.sampled_from("hdwmy"), st.integers(1, 9), max_size=4).map(
    lambda found: tuple(Rule(found[unit], unit) for unit in "hdwmy" if unit in found)
)


@settings(max_examples=80)
@given(
    hours=st.lists(st.integers(0, 60_000), unique=True, max_size=30),
    names=st.lists(st.sampled_from(["web/vda", "db"]), min_size=30, max_size=30),
    rules=RULES,
    immutable=st.integers(0, 2000),
    lived=st.integers(0, 70_000),
    last=st.integers(1, 3),
    locked=st.sets(st.integers(0, 29)),
)
def test_what_is_kept(
    hours: list[int],
    names: list[str],
    rules: tuple[Rule, ...],
    immutable: int,
    lived: int,
    last: int,
    locked: set[int],
) -> None:
    """The newest of each of so many slots that have any, the last few, and what is held; nothing else, for each disk."""
    backups = [backup_at(hour, name) for hour, name in zip(hours, names, strict=False)]
    held = {backup.id: "" for number, backup in enumerate(backups) if number in locked}

    def verdicts(of: list[Backup]) -> dict[str, prune.Verdict]:
        planned = prune.plan(
            of,
            rules,
            locked=held,
            immutable_ns=immutable * HOUR_NS,
            lived_ns=lived * HOUR_NS,
            keep_last=last,
        )
        assert [v.backup.created_ns for v in planned] == sorted(b.created_ns for b in of)
        return {v.backup.id: v for v in planned}

    found = verdicts(backups)
    for name in ("web/vda", "db"):
        mine = sorted((b for b in backups if b.name == name), key=lambda b: b.created_ns, reverse=True)
        wanted = {b.id for b in mine[:last]}
        for rule in rules:
            slots: dict[int, str] = {}
            for b in mine:  # the newest of a slot comes first
                slots.setdefault(slot_of(rule.unit, b.created_ns), b.id)
            wanted |= {slots[slot] for slot in sorted(slots, reverse=True)[: rule.count]}
        wanted |= {
            b.id
            for b in mine
            if b.id in held or (b.created_ns + immutable * HOUR_NS > lived * HOUR_NS and immutable)
        }
        assert wanted == {b.id for b in mine if found[b.id].keep}
    assert all(v.keep == (v.reason != "no rule keeps it") for v in found.values())
    kept = [v.backup for v in found.values() if v.keep]
    assert all(v.keep for v in verdicts(kept).values()), "a second pass finds nothing more"


# --- how late it is


@given(
    visits=st.lists(
        st.tuples(st.integers(0, 3), st.integers(-(10**10), 10**10), st.integers(0, 10**9), st.booleans()),
        max_size=30,
    )
)
def test_no_clock_ends_a_period_early(visits: list[tuple[int, int, int, bool]]) -> None:
    """Clocks jump as they like: a visit of the same boot counts what was lived through, one of another boot a week at most."""
    second = 10**9
    now = clock.first(0, wall_ns=10**12 * second, boot="0", up_ns=0)
    lived = 0
    for boot, jump, up, rebooted in visits:
        before = now
        same = not rebooted and before.boot == str(boot)
        up_ns = before.up_ns + up * second if same else up
        now = clock.after(
            before, wall_ns=before.wall_ns + jump * second, boot=str(boot) + "x" * rebooted, up_ns=up_ns
        )
        lived = now.time_ns - before.time_ns
        assert lived >= 0
        if now.boot == before.boot and up_ns >= before.up_ns:
            assert lived == up_ns - before.up_ns
        else:
            assert lived == min(max(jump, 0) * second, clock.MOST_UNSEEN_NS)


def test_a_clock_that_is_years_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a visit, and at each boot: an immutable backup stays. The note lost: the newest backup says how late it was."""
    place = DirectoryPlace(tmp_path / "repo")
    create(place, immutable_ns=30 * DAY_NS)
    with Repository(place, cache=tmp_path) as repository:
        made = replace(backup_at(1), disks=(disk_of(repository),), since_ns=repository.now_ns())
        repository.write_backup(made)

        def held() -> str:
            return prune.hold(made, repository.now_ns(), locked={}, immutable_ns=30 * DAY_NS)

        wall = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: wall + 20 * 365 * DAY_NS)
        assert held()
        monkeypatch.setattr(clock, "boot_id", lambda: "another boot")
        assert held()
        place.put(clock.NAME, b"junk")
        assert held()
        for day in range(40):  # a visit each day, whatever year it is
            assert bool(held()) == (day < 30)
            wall += DAY_NS
            monkeypatch.setattr(clock, "boot_id", lambda boot=day: f"boot {boot}")


def disk_of(repository: Repository) -> BackedUpDisk:
    """Of one chunk that is zeros."""
    return BackedUpDisk("d", "t1", 1, 1, repository.chunk_size, "", (ZERO_ID,), 0)


def test_locked_ones_stay_and_names_don_t_share_slots() -> None:
    backups = [backup_at(1), backup_at(2), backup_at(1.5, "db/vda")]
    verdicts = prune.plan(backups, (), locked={backups[0].id: "audit"})
    assert [(v.keep, v.reason) for v in verdicts] == [
        (True, "locked: audit"),
        (True, "the newest"),
        (True, "the newest"),
    ]
    assert not prune.plan(backups, (), locked={})[0].keep


def test_an_index_is_shared_by_processes(tmp_path: Path) -> None:
    """Places of a chunk in several packs; forgetting one leaves the other."""
    with Index(tmp_path / "i.mdb") as index:
        entry = Entry(b"x" * 32, 100, 10, 20, Kind.DATA, 1)
        index.add("packs/aa/one", [entry])
        index.add("packs/aa/two", [entry])
        index.add("packs/aa/two", [entry])
        assert [pack for pack, _ in index.find(entry.id)] == ["packs/aa/one", "packs/aa/two"]
        index.forget({"packs/aa/one", "packs/aa/none"})
        assert index.find(entry.id) == [("packs/aa/two", entry)]
        assert index.find(ZERO_ID) == []
