"""Repositories in an object store: a real S3 server (Ceph's radosgw) on loopback, and a way to it that fails on request."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver.errors import (
    BrokenError,
    CdpError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from cdpserver.repository import gc, prune, seal
from cdpserver.repository.check import check
from cdpserver.repository.lease import Lease
from cdpserver.repository.place import Place
from cdpserver.repository.places import open_place
from cdpserver.repository.registered import Registered, open_registered
from cdpserver.repository.repository import Repository, create, load_config
from cdpserver.repository.s3 import S3Place, Store
from recovery import cli
from tests.backed_up import CHUNK, Case, with_history
from tests.ceph import FULL, KEY, SECRET, SLOW_DOWN, ObjectStore, bad_way
from tests.core import scratch
from tests.places import check_place
from tests.test_backup_live import Disks, backed_up, command
from tests.test_service import Server, connected
from tools.kit.processes import until

pytestmark = [pytest.mark.s3, pytest.mark.real]

NUMBERS = itertools.count()
DAY_NS = 86400 * 10**9
MIB = 1 << 20


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """Up for all tests of this file: each has a bucket of its own."""
    with ObjectStore(Path(tempfile.mkdtemp(prefix="cdp-s3-"))) as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where AWS's own tools look for them, and nothing else of this machine's."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


def bucket(store: ObjectStore, *, locks: bool = False) -> str:
    """A new one."""
    name = f"bucket-{next(NUMBERS)}"
    store.client().create_bucket(Bucket=name, ObjectLockEnabledForBucket=locks)
    return name


def location(store: ObjectStore, name: str, port: int | None = None) -> str:
    """As an operator writes it."""
    endpoint = store.endpoint if port is None else f"http://127.0.0.1:{port}"
    return f"s3://{name}/some/prefix?endpoint={endpoint}"


def place(store: ObjectStore, name: str, port: int | None = None, **limits: Any) -> S3Place:
    """With limits that a test can wait for."""
    endpoint = store.endpoint if port is None else f"http://127.0.0.1:{port}"
    return S3Place(location(store, name, port), Store(name, "some/prefix", endpoint), **limits)


@contextlib.contextmanager
def in_bucket(there: Place, **options: Any) -> Iterator[Case]:
    """A disk with history, and an empty repository there."""
    with scratch() as path:
        world, line = with_history(path)
        create(there, chunk_size=CHUNK, **options)
        case = Case(world, line, path, options.get("secret"), there)
        case.write(1, 30)
        yield case
        world.close()


@pytest.mark.parametrize("locks", [False, True])
def test_it_is_a_place(store: ObjectStore, locks: bool) -> None:
    """What every place promises; a bucket with object lock is one too."""
    check_place(place(store, bucket(store, locks=locks)))


def test_backups_prune_and_gc(store: ObjectStore) -> None:
    """The same as in a directory, also from another machine; encrypted."""
    there = place(store, bucket(store))
    with in_bucket(there, secret=b"a key") as case:
        first = case.back_up()
        case.write(2)
        second = case.back_up()
        assert (first.kind, second.kind) == ("full", "incremental")
        case.verify("another machine's cache")
        with case.repository() as repository:
            repository.remove(first.id)
            gc.sweep(repository)
            assert check(repository).sound
        case.verify()
        case.verify("a third one's")
        assert not [*there.names("sessions"), *there.names("doomed")]


# --- the network, and a store that is busy, full or gone


def test_a_wrong_key(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, another one, one that the service is told of: each is refused, nothing is written, and the right one opens it."""
    monkeypatch.setattr(seal, "SCRYPT_N", 1 << 8)
    name = bucket(store)
    there = place(store, name)
    with in_bucket(there, secret=b"the right key") as case:
        case.back_up()
        before = sorted(there.names("backups")), sorted(there.names("packs"))
        for secret, said in (
            (None, "is encrypted"),
            (b"another", "not the key of s3://"),
            (b"\n", "is empty"),
        ):
            with pytest.raises(RefusedError, match=said):
                Repository(there, secret=secret, cache=case.path / "other")
        key = case.path / "key"
        key.write_bytes(b"another")
        one = Registered(load_config(there).id.hex(), location(store, name), str(key))
        with pytest.raises(RefusedError, match="not the key"):
            open_registered(case.path / "s", one)
        key.write_bytes(b"the right key\n")
        with open_registered(case.path / "s", one) as opened:
            assert check(opened).sound
        assert (sorted(there.names("backups")), sorted(there.names("packs"))) == before
        case.verify()


def test_throttled_and_cut_requests_are_sent_again(store: ObjectStore) -> None:
    """Refused for the moment, cut in the middle of what is sent, cut in the middle of the answer."""
    name = bucket(store)
    data = random.Random(1).randbytes(3 << 20)
    with bad_way(store) as way:
        for fault in (SLOW_DOWN, 100_000, -20):
            way.faults = [fault]
            place(store, name, way.port).put("packs/ab/one", data)
            assert not way.faults
            assert place(store, name).get("packs/ab/one") == data
            place(store, name).delete("packs/ab/one")
        place(store, name).put("packs/ab/one", data)
        for fault in (SLOW_DOWN, 20, -20):
            way.faults = [fault]
            assert place(store, name, way.port).read("packs/ab/one", 5, 100_000) == data[5:100_005]
            assert not way.faults


def test_a_body_that_is_cut_is_never_taken_for_whole(store: ObjectStore) -> None:
    """The head of the answer came, the rest did not."""
    name = bucket(store)
    place(store, name).put("packs/ab/one", bytes(3 << 20))
    with bad_way(store) as way:
        way.faults = [-1_000_000]
        with pytest.raises(BrokenError, match="read packs/ab/one"):
            place(store, name, way.port).get("packs/ab/one")
        assert len(place(store, name, way.port).get("packs/ab/one")) == 3 << 20


def test_what_was_cut_for_good_is_not_there(store: ObjectStore) -> None:
    """A partial upload is nothing: no object, and no parts that somebody pays for."""
    name = bucket(store)
    with bad_way(store) as way:
        way.faults = [100_000, 100_000]
        with pytest.raises(BrokenError, match="cannot put packs/ab/one"):
            place(store, name, way.port, attempts=2).put("packs/ab/one", bytes(3 << 20))
    assert not list(place(store, name).names("packs"))
    assert "Uploads" not in store.client().list_multipart_uploads(Bucket=name)


def test_a_store_that_hangs_is_full_or_gone(store: ObjectStore) -> None:
    name = bucket(store)
    with bad_way(store) as way:
        way.faults = [None, None]
        with pytest.raises(BrokenError, match="Read timeout"):
            place(store, name, way.port, read_s=0.3, attempts=2).get("packs/ab/one")
        way.faults = [FULL]
        with pytest.raises(NoSpaceError, match="takes no more: QuotaExceeded"):
            place(store, name, way.port).put("packs/ab/one", b"x")
        port = way.port
    with pytest.raises(BrokenError, match="Could not connect"):
        place(store, name, port, attempts=1).get("packs/ab/one")


def test_a_backup_over_a_bad_way(store: ObjectStore) -> None:
    """Broken for good: there is no backup. The next one goes on with what is stored, and is whole."""
    name = bucket(store)
    with bad_way(store) as way, in_bucket(place(store, name)) as case:
        case.back_up()
        for chunk in range(20):
            case.line.write(chunk * CHUNK, os.urandom(CHUNK))
        case.place = place(store, name, way.port, attempts=1)
        way.faults = [400_000]
        with pytest.raises(BrokenError):
            case.back_up()
        with case.repository() as repository:
            assert len(repository.backup_ids()) == 1
        way.faults = [SLOW_DOWN]
        case.place = place(store, name, way.port)
        case.back_up()
        case.verify()


def test_bad_credentials_buckets_and_locations(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no bucket not-there"):
        place(store, "not-there").get("repo.json")
    with pytest.raises(NotFoundError, match="no repository"):
        Repository(place(store, bucket(store)))
    for text in (
        "s3://",
        "s3://B_",
        "s3://ok?endpoint=ftp://x",
        "s3://ok?key=x",
        "s3://a:b@c/d",
        "s3://ok/#x",
    ):
        with pytest.raises(UsageError):
            open_place(text)
    name = bucket(store)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(RefusedError, match="SignatureDoesNotMatch"):
        open_place(location(store, name)).put("locks/x", b"")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RefusedError, match="no credentials"):
        open_place(location(store, name)).get("repo.json")


# --- who is at work


def test_a_lease_ends_with_its_holder(store: ObjectStore) -> None:
    """Alive it is renewed; dead it ends by itself."""
    there = place(store, bucket(store), lease_s=5)
    there.put("sessions/dead/token", b"")
    with there.hold("sessions/one") as check_held:
        assert there.holds("sessions") == {"sessions/one", "sessions/dead"}
        with pytest.raises(RefusedError, match="held by another"), there.hold("sessions/one"):
            pass
        until(lambda: there.holds("sessions") == {"sessions/one"}, "end of the other session")
        check_held()
        with there.hold("sessions/dead"):
            assert there.holds("sessions") == {"sessions/one", "sessions/dead"}
    assert not list(there.names("sessions"))


def test_a_holder_that_was_taken_for_dead_does_not_publish(store: ObjectStore) -> None:
    """It comes back from a long sleep: its backup could name what `gc` took away, so there is none."""
    there = place(store, bucket(store))
    with in_bucket(there) as case:
        case.back_up()
        case.write(2)
        case.place = Asleep(there.where, Store(there.bucket, "some/prefix", store.endpoint))
        with pytest.raises(BrokenError, match="not held any more: it was taken for dead"):
            case.back_up()
        with case.repository() as repository:
            assert len(repository.backup_ids()) == 1


class Asleep(S3Place):
    """While this one slept, everybody else saw its leases end: when it puts a backup, none is there any more."""

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        super().put(name, data, until_ns)
        if name.startswith("backups/"):
            for held, _ in list(self.names("sessions")):
                self.delete(held)


def test_a_lease_that_is_not_renewed_in_time_is_lost() -> None:
    """By the holder's own clock, before anybody else takes it for dead."""
    with Lease(Deaf(), "sessions/one", 0.2) as lease:
        until(lambda: raised(lease.check), "end of the lease")
        with pytest.raises(BrokenError, match="could not be renewed"):
            lease.check()


class Deaf:
    """A place that takes one object, and then fails."""

    where = "nowhere"

    def __init__(self) -> None:
        self.there: list[str] = []

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        if self.there:
            raise BrokenError("the line is dead")
        self.there.append(name)

    def ages(self, prefix: str) -> Iterator[tuple[str, float]]:
        for name in self.there:
            yield name, 0.0

    def delete(self, name: str) -> None:
        self.there.remove(name)


def test_of_two_that_want_a_name_at_once_at_most_one_gets_it(store: ObjectStore) -> None:
    there = place(store, bucket(store))
    got: list[int] = []
    gate = threading.Barrier(3)

    def want(number: int) -> None:
        gate.wait()
        with contextlib.suppress(RefusedError), there.hold("sessions/gc"):
            got.append(number)
            gate.wait()
            return
        gate.wait()

    threads = [threading.Thread(target=want, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) <= 1
    assert not list(there.names("sessions"))


def raised(call: Any) -> bool:
    try:
        call()
    except CdpError:
        return True
    return False


# --- object lock


def test_nobody_takes_an_immutable_backup_away(store: ObjectStore) -> None:
    """Who has all the credentials deletes and overwrites everything: every backup is restored from what was written first."""
    name = bucket(store, locks=True)
    there = place(store, name)
    with in_bucket(there, immutable_ns=DAY_NS) as case:
        first = case.back_up()
        case.write(2)
        case.back_up()
        case.verify()
        enemy = store.client()
        rows = enemy.list_object_versions(Bucket=name)["Versions"]
        kept = [row for row in rows if "/packs/" in row["Key"] or "/backups/" in row["Key"]]
        assert len(kept) == 4
        for row in kept:
            refuses(enemy.delete_object, Bucket=name, Key=row["Key"], VersionId=row["VersionId"])
            enemy.put_object(Bucket=name, Key=row["Key"], Body=b"ransom")
            enemy.delete_object(Bucket=name, Key=row["Key"])
        enemy.delete_object(Bucket=name, Key="some/prefix/repo.json")
        case.place = place(store, name)
        case.verify("another machine's cache")
        with case.repository() as repository:
            with pytest.raises(RefusedError, match="does not let backups/"):
                repository.remove(first.id)
            assert gc.sweep(repository).deleted == 0
            assert check(repository).sound
            held = prune.hold(first, repository.now_ns(), locked={}, immutable_ns=DAY_NS)
            assert held.startswith("immutable for")


def refuses(call: Any, **arguments: Any) -> None:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError, match="AccessDenied"):
        call(**arguments)


def test_what_backups_share_is_held_as_long_as_the_newest(store: ObjectStore) -> None:
    """A pack that an older backup stored; the period is the server's, whatever this machine's clock says."""
    name = bucket(store, locks=True)
    there = place(store, name)
    with in_bucket(there, immutable_ns=DAY_NS) as case:
        first = case.back_up()
        pack = next(pack for pack, _ in there.names("packs"))
        put_until = there.retained_until_ns(pack)
        assert put_until >= first.since_ns + DAY_NS + DAY_NS // 4
        with case.repository() as repository:
            repository.index.note_retained(pack, 0)
        case.back_up()
        assert there.retained_until_ns(pack) == put_until, "long enough still"
        there.retain(pack, put_until + DAY_NS)
        assert there.retained_until_ns(pack) == put_until + DAY_NS
        there.retain(pack, put_until)
        assert there.retained_until_ns(pack) == put_until + DAY_NS, "never sooner"


def test_when_the_period_is_over_it_can_go(store: ObjectStore) -> None:
    """With all versions: what is deleted costs nothing any more."""
    name = bucket(store, locks=True)
    there = place(store, name)
    with in_bucket(there, immutable_ns=2 * 10**9) as case:
        first = case.back_up()
        with case.repository() as repository:
            until(lambda: not raised(lambda: repository.remove(first.id)), "end of the lock")
            until(lambda: gc.sweep(repository).deleted, "chunk that goes")
        rows = store.client().list_object_versions(Bucket=name).get("Versions", [])
        assert [row["Key"] for row in rows] == ["some/prefix/repo.json"]


def test_immutable_needs_object_lock(store: ObjectStore) -> None:
    with pytest.raises(RefusedError, match="without object lock"):
        create(place(store, bucket(store)), immutable_ns=DAY_NS)


# --- by command


Command = Callable[..., Any]


@pytest.fixture
def cdp(short_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A command, and what it answers in JSON."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(short_path / "xdg"))

    def run(*words: object) -> Any:
        options = cli.parse(["--state-dir", str(short_path / "s"), *map(str, words), "--json"])
        assert not options.run(options)
        return json.loads(capsys.readouterr().out)

    return run


def test_commands(store: ObjectStore, cdp: Command, short_path: Path) -> None:
    """Backups of points and by a schedule go into a bucket, are points there, and come back as an image and as a chain; by a
    stream and by a copy they go into a bucket with object lock.
    """
    where, locked, vault = (location(store, bucket(store, locks=locks)) for locks in (False, True, True))
    cdp("repo", "init", where, "--chunk-size", "64K")
    assert [row["path"] for row in cdp("repo", "list")] == [where]
    with Server(short_path / "s") as server:
        contents = []
        uri = server.add()
        for kind, length in (("full", 3 * MIB), ("incremental", 4096)):
            with connected(uri) as guest:
                guest.pwrite(os.urandom(length), MIB)
                contents.append(bytes(guest.pread(guest.get_size(), 0)))
            server.synced("d", write_blocking=True)
            assert cdp("backup", "run", "d@latest", "--repo", where)["kind"] == kind
        cdp("repo", "add", where)
        cdp("policy", "set", "d", "--backup", "daily 02:00 keep 7d", "--backup-to", where)
        made = cdp("backup", "now", "d")
        assert (made["kind"], made["read_bytes"]) == ("incremental", 0)
        ids = [row["id"] for row in cdp("backup", "list", "--repo", where)]
        assert len(ids) == 3 and ids[2] == made["id"]
        with connected(cdp("uri", f"backup:{ids[0]}")["uri"]) as point:
            assert point.pread(point.get_size(), 0) == contents[0], "served from the bucket"
        cdp("backup", "detach", ids[0])
        assert server.stop() == 0

    stream = short_path / "tape"
    command = [sys.executable, "-m", "recovery.cli", "repo"]
    with open(stream, "wb") as tape:
        subprocess.run([*command, "export", where], stdout=tape, check=True)
    with open(stream, "rb") as tape:
        subprocess.run([*command, "import", locked], stdin=tape, check=True)
    cdp("repo", "init", vault, "--chunk-size", "128K", "--immutable", "1d")
    assert cdp("repo", "copy", where, "--to", vault)["copied"] == ids

    raw, chain = short_path / "o.raw", short_path / "c.qcow2"
    for repo in (where, locked, vault):
        assert [row["id"] for row in cdp("backup", "list", "--repo", repo)] == ids
        assert cdp("repo", "check", repo)["sound"]
        for id_, content in zip(ids, (*contents, contents[1]), strict=True):
            cdp("backup", "restore", id_, "--repo", repo, "--output", raw, "--format", "raw", "--verify")
            assert raw.read_bytes() == content
            raw.unlink()
    cdp("backup", "restore", ids[1], "--repo", where, "--output", chain, "--as", "chain")
    subprocess.run(["qemu-img", "convert", "-O", "raw", chain, raw], check=True)
    assert raw.read_bytes() == contents[1]
    with pytest.raises(RefusedError, match="immutable"):
        cdp("backup", "remove", ids[0], "--repo", vault, "--yes")


def test_a_running_vm(
    store: ObjectStore, cdp: Command, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What QEMU's jobs send goes into the bucket."""
    name = bucket(store)
    monkeypatch.setenv("CDP_REPO", location(store, name))
    cdp("repo", "init", location(store, name), "--chunk-size", "64K")
    qemu = Disks(short_path)
    try:
        qemu.write(os.urandom(3 * MIB), MIB)
        made = cdp(*command(qemu))
        assert (made["kind"], made["read_bytes"]) == ("full", 3 * MIB)
        qemu.write(os.urandom(CHUNK), 5 * MIB)
        made = cdp(*command(qemu))
        assert (made["kind"], made["read_bytes"]) == ("incremental", CHUNK)
        assert backed_up("vda") == qemu.content()
    finally:
        qemu.end()


def test_who_uses_no_object_store_does_not_pay_for_one() -> None:
    words = "import recovery.cli, cdpserver.repository.places, sys; print('botocore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
