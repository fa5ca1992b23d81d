"""The catalog: names and ids over processes, crashes, full disks and the loss of either of its files."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cdpserver import durable
from cdpserver.catalog import Catalog, Entry, Row
from cdpserver.catalog import rows as catalog_rows
from cdpserver.catalog.content import Content, read_copy
from cdpserver.catalog.derived import Derived
from cdpserver.catalog.recovery import ID_JUMP
from cdpserver.catalog.rows import MAX_DEPTH, TABLES, Table, check_row, read_row
from cdpserver.errors import CdpError, CorruptError, NoSpaceError, NotFoundError, RefusedError, UsageError
from cdpserver.names import split_name
from cdpserver.state import StateDir
from cdpserver.timeline import EmptyBase, create_timeline

LOCK = Row("k1", 1, {"disk": "t1", "seqs": [4, (1 << 64) - 1], "until": None, "hard": True, "reason": "été"})
POLICY = Row("daily", 3, {"keep": {"days": 7}, "name": "", "least": -(1 << 63)})


@pytest.fixture
def state(short_path: Path) -> StateDir:
    return StateDir.create_or_open(short_path / "s")


@pytest.fixture
def catalog(state: StateDir) -> Iterator[Catalog]:
    with Catalog.open(state, writable=True) as catalog:
        yield catalog


def make_disk(state: StateDir, catalog: Catalog, full: str) -> Entry:
    """A disk with a real timeline directory."""
    id = catalog.next_id()
    name, vm = split_name(full)
    create_timeline(state, id=id, name=name, vm=vm, size=1 << 20, base=EmptyBase(), now_ns=42)
    return catalog.add(full, id)


def read(state: StateDir) -> dict[str, Entry]:
    """The names as another opening sees them."""
    with Catalog.open(state, writable=False) as reader:
        return reader.names()


def test_a_disk_is_found_by_name_and_id(state: StateDir, catalog: Catalog) -> None:
    entry = make_disk(state, catalog, "web/vda")
    assert entry == Entry("web/vda", "t1", "live", 42)
    assert catalog.get("web/vda") == catalog.by_id("t1") == entry
    assert catalog.names() == {"web/vda": entry}
    assert catalog.get("vda") is None
    assert catalog.by_id("t2") is None


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a@b", "a\0b", "..", "x" * 300, "x" * 5000, "\udc80", "a" * 64]
)
def test_any_text_can_be_asked_for(catalog: Catalog, name: str) -> None:
    assert catalog.get(name) is None
    with pytest.raises(NotFoundError) as caught:
        catalog.remove(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", "a/b/c", "a@b", "a\0b", "..", "x" * 300])
def test_what_is_no_name_is_not_added(catalog: Catalog, name: str) -> None:
    with pytest.raises(UsageError):
        catalog.add(name, "t1", created_ns=0)
    with pytest.raises(UsageError):
        catalog.add("vda", "t1/..", created_ns=0)
    assert catalog.names() == {}


def test_a_name_needs_its_timeline(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError):
        catalog.add("vda", "t1")


def test_one_name_space(catalog: Catalog) -> None:
    catalog.add("web/vda", "t1", created_ns=0)
    catalog.add("db", "t2", created_ns=0)
    for name, id in (("web/vda", "t3"), ("web", "t3"), ("db/vda", "t3"), ("other", "t1")):
        with pytest.raises(RefusedError) as caught:
            catalog.add(name, id, created_ns=0)
        assert caught.value.hint
    catalog.add("web/vdb", "t3", created_ns=0)
    assert list(catalog.names()) == ["db", "web/vda", "web/vdb"]


def test_states_and_removal(catalog: Catalog) -> None:
    catalog.add("vda", "t1", created_ns=5)
    assert catalog.set_state("vda", "removing") == Entry("vda", "t1", "removing", 5)
    assert catalog.get("vda") == Entry("vda", "t1", "removing", 5)
    catalog.remove("vda")
    assert catalog.names() == {}
    with pytest.raises(NotFoundError):
        catalog.set_state("vda", "live")


def test_ids_are_never_given_twice(state: StateDir) -> None:
    with Catalog.open(state, writable=True) as catalog:
        assert [catalog.next_id(), catalog.next_id()] == ["t1", "t2"]
        catalog.add("vda", "t7", created_ns=0)
        catalog.remove("vda")
    with Catalog.open(state, writable=True) as catalog:
        assert catalog.next_id() == "t8"


READER = """
import sys
from cdpserver.catalog import Catalog
from cdpserver.state import StateDir
with Catalog.open(StateDir.open(sys.argv[1]), writable=False) as catalog:
    for line in sys.stdin:
        print(catalog.get(line.strip()), flush=True)
"""


def test_a_reader_in_another_process_sees_each_change(state: StateDir, catalog: Catalog) -> None:
    command = [sys.executable, "-c", READER, str(state.path)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=root) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def ask() -> str:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write("vda\n")
            reader.stdin.flush()
            return reader.stdout.readline().strip()

        assert ask() == "None"
        entry = catalog.add("vda", "t1", created_ns=0)
        assert ask() == repr(entry)
        catalog.remove("vda")
        assert ask() == "None"
        reader.stdin.close()


def test_the_copy_follows_each_change(state: StateDir, catalog: Catalog) -> None:
    assert json.loads(state.catalog_copy.read_text()) == {
        "format": 4,
        "next_id": 1,
        "disks": {},
        "locks": {},
        "policies": {},
        "vms": {},
        "groups": {},
        "recoveries": {},
        "trials": {},
    }
    make_disk(state, catalog, "vda")
    catalog.put_row("locks", LOCK)
    assert json.loads(state.catalog_copy.read_text()) == {
        "format": 4,
        "next_id": 2,
        "disks": {"vda": {"id": "t1", "state": "live", "created_ns": 42}},
        "locks": {"k1": {"schema": 1, "fields": dict(LOCK.fields)}},
        "policies": {},
        "vms": {},
        "groups": {},
        "recoveries": {},
        "trials": {},
    }


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (None, "was missing"),
        (b"", "is of no use"),
        (b"{}", "is of no use"),
        (b'{"format": 5, "next_id": 99, "disks": {}}', "of a newer cdpserver"),
        (b'{"format": 1, "next_id": 99, "disks": {}}', None),
        (b'{"format": 2, "next_id": 99, "disks": {}, "locks": {}, "policies": {}}', None),
    ],
)
def test_opening_sets_the_copy_right(state: StateDir, damage: bytes | None, said: str | None) -> None:
    """An older copy is a crash's; one that is missing or damaged is something else's, and said."""
    with Catalog.open(state, writable=True) as catalog:
        make_disk(state, catalog, "vda")
        catalog.put_row("locks", LOCK)
    right = state.catalog_copy.read_bytes()
    if damage is None:
        state.catalog_copy.unlink()
    else:
        state.catalog_copy.write_bytes(damage)
    sentences = Catalog.recover(state)
    if said is None:
        assert sentences == []
    else:
        [sentence] = sentences
        assert said in sentence and "Nothing is lost" in sentence
    Catalog.open(state, writable=True).close()
    assert state.catalog_copy.read_bytes() == right


@pytest.mark.parametrize("call", ["write", "fdatasync", "rename", "fsync"])
def test_a_change_on_a_full_disk_is_in_neither_file(
    state: StateDir, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    catalog.add("old", "t1", created_ns=0)
    before = catalog.names()

    def full(*_args: Any, **_options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        for change in (
            lambda: catalog.add("new", "t2", created_ns=0),
            lambda: catalog.remove("old"),
            catalog.next_id,
        ):
            with pytest.raises(NoSpaceError):
                change()
    assert catalog.names() == before
    assert catalog.next_id() == "t2"
    assert read_copy(state.catalog_copy) == Content(before, 3)


def test_a_reader_that_lmdb_refuses_reads_the_copy(state: StateDir, catalog: Catalog) -> None:
    entry = make_disk(state, catalog, "vda")
    catalog.close()
    shutil.rmtree(state.catalog)
    with Catalog.open(state, writable=False) as reader:
        assert reader.get("vda") == reader.by_id("t1") == entry
        assert reader.get("a\0b") is None
    state.catalog_copy.unlink()
    with pytest.raises(CorruptError, match="restart cdpserver"):
        Catalog.open(state, writable=False)


# --- recovery


def cut_to_nothing(data: Path) -> None:
    os.truncate(data, 0)


def cut_in_half(data: Path) -> None:
    os.truncate(data, 8192 + 100)


def overwrite_pages(data: Path) -> None:
    size = data.stat().st_size
    with open(data, "r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (size - 8192))


def overwrite_all(data: Path) -> None:
    data.write_bytes(b"\x5a" * data.stat().st_size)


def remove_file(data: Path) -> None:
    data.unlink()


def remove_all(data: Path) -> None:
    shutil.rmtree(data.parent)


DAMAGES = [cut_to_nothing, cut_in_half, overwrite_pages, overwrite_all, remove_file, remove_all]


@pytest.fixture
def disks(state: StateDir) -> dict[str, Entry]:
    """Three disks, made and closed; t4 is used and gone."""
    with Catalog.open(state, writable=True) as catalog:
        for name in ("vda", "web/vda", "web/vdb"):
            make_disk(state, catalog, name)
        catalog.set_state("web/vdb", "removing")
        catalog.next_id()
        catalog.put_row("locks", LOCK)
        catalog.put_row("policies", POLICY)
        return catalog.names()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_catalog_comes_back_from_its_copy(
    state: StateDir, disks: dict[str, Entry], damage: Any
) -> None:
    damage(state.catalog / "data.mdb")
    said = Catalog.recover(state)
    assert all(sentence.endswith(".") and sentence.isprintable() for sentence in said)
    assert "3 disks" in said[-1]
    with Catalog.open(state, writable=True) as catalog:
        assert catalog.names() == disks
        assert catalog.rows("locks") == {"k1": LOCK}
        assert catalog.rows("policies") == {"daily": POLICY}
        assert catalog.next_id() == "t5"
    assert Catalog.recover(state) == []


@pytest.mark.parametrize("damage", [cut_to_nothing, cut_in_half, overwrite_all, remove_file, remove_all])
def test_a_lost_catalog_is_never_opened_as_an_empty_one(
    state: StateDir, disks: dict[str, Entry], damage: Any
) -> None:
    damage(state.catalog / "data.mdb")
    copy = state.catalog_copy.read_bytes()
    with pytest.raises(CorruptError, match="restart cdpserver"):
        Catalog.open(state, writable=True)
    assert state.catalog_copy.read_bytes() == copy
    assert read(state) == disks


def test_the_damaged_catalog_is_kept(state: StateDir, disks: dict[str, Entry]) -> None:
    for n in (1, 2):
        overwrite_all(state.catalog / "data.mdb")
        assert Catalog.recover(state)
        assert (state.path / f"catalog.damaged-{n}" / "data.mdb").exists()


@pytest.mark.parametrize("copy", [None, b"", b"\0" * 50, b'{"format": 2, "next_id": 1, "disks": {}}'])
def test_without_the_copy_the_timelines_tell(
    state: StateDir, disks: dict[str, Entry], copy: bytes | None
) -> None:
    remove_all(state.catalog / "data.mdb")
    if copy is None:
        state.catalog_copy.unlink()
    else:
        state.catalog_copy.write_bytes(copy)
    said = Catalog.recover(state)
    assert sum("was added from timeline" in sentence for sentence in said) == 3
    assert sum("Locks and policies are lost" in sentence for sentence in said) == 1
    with Catalog.open(state, writable=True) as catalog:
        assert {name: entry.id for name, entry in catalog.names().items()} == {
            "vda": "t1",
            "web/vda": "t2",
            "web/vdb": "t3",
        }
        # t4 was used, but nothing tells so any more: ids go on far above.
        assert catalog.next_id() == f"t{4 + ID_JUMP}"


def test_what_the_copy_lacks_is_added(state: StateDir, disks: dict[str, Entry]) -> None:
    create_timeline(state, id="t9", name="new", vm=None, size=512, base=EmptyBase(), now_ns=1)
    (state.timelines / ".removing-t12").mkdir()
    (state.timelines / ".tmp-t11").mkdir()
    (state.timelines / "notes").mkdir()
    (state.timelines / "t10").mkdir()
    durable.remove_tree(state.timeline("t1"))
    remove_all(state.catalog / "data.mdb")
    said = "\n".join(Catalog.recover(state))
    assert "Disk new was added from timeline t9." in said
    assert "Timeline t10 was left out: " in said
    assert "Disk vda has no timeline directory t1." in said
    with Catalog.open(state, writable=True) as catalog:
        assert catalog.names() == dict(sorted({**disks, "new": Entry("new", "t9", "live", 1)}.items()))
        assert catalog.next_id() == "t13"


def test_a_timeline_whose_name_is_taken_gets_its_own(state: StateDir, disks: dict[str, Entry]) -> None:
    create_timeline(state, id="t9", name="vda", vm=None, size=512, base=EmptyBase(), now_ns=1)
    create_timeline(state, id="t10", name="x" * 64, vm="vda", size=512, base=EmptyBase(), now_ns=1)
    remove_all(state.catalog / "data.mdb")
    Catalog.recover(state)
    names = read(state)
    assert names["vda"].id == "t1"
    assert names["vda-t9"].id == "t9"
    assert names["x" * 60 + "-t10"].id == "t10"


def test_a_new_state_directory_needs_no_recovery(state: StateDir) -> None:
    assert Catalog.recover(state) == []
    assert not state.catalog.exists()
    with pytest.raises(CorruptError):
        Catalog.open(state, writable=False)


def test_recovery_goes_on_after_a_failure(
    state: StateDir, disks: dict[str, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename fails in turn: what is there afterwards is enough for the next run."""
    real = os.rename
    left = 0

    def failing(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(os, "rename", failing)
    for n in range(1, 10):
        if state.catalog.exists():
            overwrite_all(state.catalog / "data.mdb")
        left = n
        try:
            Catalog.recover(state)
        except (CdpError, OSError):
            left = 0
            assert Catalog.recover(state)
            assert read(state) == disks
        else:
            break
    assert 3 < n < 9
    assert read(state) == disks


# --- rows


def test_rows(state: StateDir, catalog: Catalog) -> None:
    catalog.put_row("locks", LOCK)
    catalog.put_row("policies", POLICY)
    changed = Row("k1", 2, {})
    catalog.put_row("locks", changed)
    with Catalog.open(state, writable=False) as reader:
        assert reader.rows("locks") == {"k1": changed}
        assert reader.row("policies", "daily") == POLICY
        assert reader.row("locks", "daily") is None
    assert catalog.delete_row("locks", "k1") == changed
    assert catalog.rows("locks") == {}
    with pytest.raises(NotFoundError):
        catalog.delete_row("locks", "k1")


NESTED: Any = None
for _ in range(MAX_DEPTH + 1):
    NESTED = [NESTED]

BAD_ROWS = [
    Row("", 1, {}),
    Row("a/b", 1, {}),
    Row("x" * 65, 1, {}),
    Row("k\n", 1, {}),
    Row("k", 0, {}),
    Row("k", True, {}),
    Row("k", 1, []),  # type: ignore[arg-type]
    Row("k", 1, {"x": 0.5}),
    Row("k", 1, {"x": b"bytes"}),
    Row("k", 1, {"x": 1 << 64}),
    Row("k", 1, {"x": -(1 << 63) - 1}),
    Row("k", 1, {"x": "\ud800"}),
    Row("k", 1, {"\ud800": 1}),
    Row("k", 1, {1: 2}),  # type: ignore[dict-item]
    Row("k", 1, {"x": (1, 2)}),
    Row("k", 1, {"x": NESTED}),
    Row("k", 1, {"x": "y" * 5000}),
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=repr)
def test_what_cannot_be_kept_is_refused(state: StateDir, catalog: Catalog, row: Row) -> None:
    catalog.put_row("locks", LOCK)
    with pytest.raises(UsageError) as caught:
        catalog.put_row("locks", row)
    assert str(caught.value).isprintable() and caught.value.hint
    assert catalog.rows("locks") == {"k1": LOCK} == read_copy(state.catalog_copy).rows["locks"]


def test_a_full_table_takes_no_more(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpserver.catalog.store.MAX_ROWS", 2)
    for id in ("a", "b", "a"):
        catalog.put_row("locks", Row(id, 1, {}))
    with pytest.raises(RefusedError, match="2 locks already"):
        catalog.put_row("locks", Row("c", 1, {}))
    catalog.put_row("policies", Row("c", 1, {}))
    assert catalog_rows.MAX_ROWS > 2


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=9), PLAIN, max_size=4))
def test_a_row_is_the_same_after_both_ways(fields: dict[str, Any]) -> None:
    row = Row("k", 1, fields)
    packed = check_row(row)
    assert read_row("k", msgpack.unpackb(packed), Path("x")) == row
    assert read_row("k", json.loads(json.dumps(row.value())), Path("x")) == row


@given(st.text(st.characters(categories=None), max_size=5), PLAIN)
def test_any_value_is_a_row_or_corrupt(id: str, value: Any) -> None:
    for candidate in (value, {"schema": 1, "fields": value}, {"schema": value, "fields": {}}):
        try:
            assert read_row(id, candidate, Path("x")).id == id
        except CorruptError:
            continue


class CatalogMachine(RuleBasedStateMachine):
    """The catalog against a dict, over reopening and the loss of one of its two files."""

    NAMES = ("a", "b", "a/x", "b/x", "b/y")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="cdp-"))
        self.state = StateDir.create_or_open(self.root / "s")
        self.catalog = Catalog.open(self.state, writable=True)
        self.model: dict[str, str] = {}
        self.rows: dict[Table, dict[str, Row]] = {table: {} for table in TABLES}
        self.given: set[str] = set()

    def teardown(self) -> None:
        self.catalog.close()
        shutil.rmtree(self.root)

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        id = self.catalog.next_id()
        assert id not in self.given
        self.given.add(id)
        excluded = any(
            name == other or name.startswith(f"{other}/") or other.startswith(f"{name}/")
            for other in self.model
        )
        try:
            self.catalog.add(name, id, created_ns=0)
            assert not excluded
            self.model[name] = id
        except RefusedError:
            assert excluded

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        assert self.catalog.remove(name).id == self.model.pop(name)

    @rule(table=st.sampled_from(TABLES), id=st.sampled_from(["k1", "k2"]), number=st.integers(1, 9))
    def put_row(self, table: Table, id: str, number: int) -> None:
        row = Row(id, number, {"n": number})
        self.catalog.put_row(table, row)
        self.rows[table][id] = row

    @rule(table=st.sampled_from(TABLES), id=st.sampled_from(["k1", "k2"]))
    def delete_row(self, table: Table, id: str) -> None:
        if id in self.rows[table]:
            assert self.catalog.delete_row(table, id) == self.rows[table].pop(id)
        else:
            with pytest.raises(NotFoundError):
                self.catalog.delete_row(table, id)

    @rule(damage=st.sampled_from([None, *DAMAGES]), lose_copy=st.booleans())
    def reopen(self, damage: Any, lose_copy: bool) -> None:
        self.catalog.close()
        if damage is not None:
            damage(self.state.catalog / "data.mdb")
        elif lose_copy:
            self.state.catalog_copy.unlink()
        assert bool(Catalog.recover(self.state)) == (damage is not None or lose_copy)
        self.catalog = Catalog.open(self.state, writable=True)

    @invariant()
    def agrees(self) -> None:
        assert {name: entry.id for name, entry in self.catalog.names().items()} == self.model
        copy = read_copy(self.state.catalog_copy)
        assert copy.entries == self.catalog.names()
        for table in TABLES:
            assert self.catalog.rows(table) == copy.rows[table] == self.rows[table]


CatalogMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)
test_catalog_machine = CatalogMachine.TestCase


def test_what_follows_from_the_catalog_is_worked_out_once_for_each_change(
    state: StateDir, catalog: Catalog
) -> None:
    asked: list[list[str]] = []

    def work() -> list[str]:
        asked.append(list(catalog.names()))
        if "bad" in asked[-1]:
            raise CorruptError("no answer")
        return asked[-1]

    derived = Derived(catalog, work)
    assert derived.now() == derived.now() == [] and len(asked) == 1
    make_disk(state, catalog, "web/vda")
    assert derived.now() == derived.now() == ["web/vda"] and len(asked) == 2
    catalog.put_row("policies", Row("disk-1", 1, {}))
    catalog.set_state("web/vda", "removing")
    assert derived.now() == ["web/vda"] and len(asked) == 3
    make_disk(state, catalog, "bad")
    for _ in range(2):
        with pytest.raises(CorruptError):
            derived.now()
    assert len(asked) == 5  # a failure is no answer to keep
    with Catalog(state, None) as copy:
        assert isinstance(copy.stamp(), tuple)
        assert Derived(copy, copy.names).now() == catalog.names()
