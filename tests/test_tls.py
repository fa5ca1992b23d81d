"""NBD over TCP with TLS: who gets in, by real clients, with the certificates that docs/security.md makes."""

import os
import re
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
import trio

from cdpserver import sealed, tls
from cdpserver.catalog import Catalog
from cdpserver.config import Config, parse_config
from cdpserver.errors import CorruptError, ForbiddenError, NotFoundError, UsageError
from cdpserver.names import MAX_NUMBER
from cdpserver.service.core import tcp_uri
from cdpserver.state import StateDir
from cdpserver.vm import qmp
from cdpserver.vm.mirror import Mirror, mirror_uri
from cdpserver.vm.probe import ASKED_MOST, Probe
from cdpserver.vm.tls import Credential, name_in_node
from nbdplugin.admission import Admission
from recovery.agent_target import uri_here
from tests.test_protect import guest
from tests.test_protect_agent import free_port
from tests.test_protect_resync import SIZE, source
from tests.test_service import Server

PAGE = Path(__file__).resolve().parent.parent / "docs/security.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PART = 16 << 20
SECRET = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of the page have put what they make."""
    directory = tmp_path_factory.mktemp("tls")
    for lines in BLOCK.findall(PAGE.read_text()):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return directory


class Tls:
    """A service with certificates, two disks, and how they are opened."""

    def __init__(self, server: Server, files: Path) -> None:
        self.server = server
        self.files = files
        self.uris = {name: str(server.get(f"/v1/disks/{name}:uri")["uri"]) for name in ("a", "b")}
        self.points = {name: server.uri(f"{name}@latest") for name in ("a", "b")}

    def open(self, uri: str, *, tls: str = "require", credential: str = "hv1") -> Any:
        """libnbd's connection; `tls` may be "off"."""
        handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)
        if tls == "require":
            handle.connect_uri(Credential(str(self.files / credential)).added_to(uri))
        else:
            handle.connect_uri(uri.replace("nbds://", "nbd://"))
        return handle


@pytest.fixture(scope="module")
def served(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    state = Path(os.path.realpath(tmp_path_factory.mktemp("s"))) / "s"
    config = files / "cdpserver.toml"
    # Two workers: over TCP a client may come to the one that is not its disk's, which passes its requests on without TLS.
    config.write_text(
        f"listen = '127.0.0.1:{free_port()}'\nlisten_export = '127.0.0.1:{free_port()}'\nworkers = 2\n"
        f"[tls]\ncertificates = '{files / 'tls'}'\n"
    )
    with Server(state, "--config", str(config)) as server:
        for name in ("a", "b"):
            server.add(name)
            with_data = nbd.NBD()
            with_data.connect_uri(server.get(f"/v1/disks/{name}")["uri_unix"])
            with_data.pwrite(name.encode() * 4096, 0)
            with_data.shutdown()
            server.synced(name)
        yield Tls(server, files)


async def eventually(look: Callable[[], Awaitable[object]]) -> None:
    """Return when it finds something."""
    with trio.fail_after(60):
        while not await look():  # noqa: ASYNC110 - QEMU and the probe have no event
            await trio.sleep(0.05)


def refused(served: Tls, uri: str, **how: Any) -> bool:
    try:
        served.open(uri, **how).shutdown()
    except nbd.Error:
        return True
    return False


pytestmark = pytest.mark.real


def test_a_disk_opens_by_tls_with_its_secret_and_by_nothing_else(served: Tls) -> None:
    for uris in (served.uris, served.points):
        for name, uri in uris.items():
            assert uri.startswith("nbds://127.0.0.1:")
            for _ in range(4):  # the kernel chooses the worker
                handle = served.open(uri)
                assert handle.get_tls_negotiated()
                assert handle.pread(4096, 0) == name.encode() * 4096
                handle.shutdown()
            secret, plain = uri.rpartition("/")[2].split("~")
            place = uri.rpartition("/")[0]
            assert refused(served, uri, tls="off")
            assert refused(served, f"{place}/{plain}")
            assert refused(served, f"{place}/{'0' * 32}~{plain}")
            other = next(text for known, text in uris.items() if known != name).rpartition("/")[2]
            # One VM's secret opens another's disk no more than a guess.
            assert refused(served, f"{place}/{other.partition('~')[0]}~{plain}")
            assert refused(served, f"{place}/{secret}~direct:{plain}")
            assert refused(served, f"{place}/{secret}~none")
    without = [event["reason"] for event in served.server.events("target.forbidden")]
    assert any("without TLS" in reason for reason in without)


def test_a_client_without_a_certificate_of_the_ca_is_refused(served: Tls, tmp_path: Path) -> None:
    for file in ("ca-cert.pem",):
        (tmp_path / file).write_bytes((served.files / "hv1" / file).read_bytes())
    strange = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run(
        ["openssl", *strange, "-subj", "/CN=hv1", "-keyout", "client-key.pem", "-out", "client-cert.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert refused(served, served.uris["a"], credential=str(tmp_path))


@pytest.mark.parametrize("which", ["uris", "points"])
def test_nothing_is_listed_over_tcp(served: Tls, which: str) -> None:
    (uri, _) = getattr(served, which).values()
    for how in ("require", "off"):
        handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)
        handle.set_opt_mode(True)
        whole = Credential(str(served.files / "hv1")).added_to(uri)
        handle.connect_uri(whole if how == "require" else uri.replace("nbds://", "nbd://"))
        names: list[str] = []
        handle.opt_list(lambda name, _, found=names: found.append(name) or 0)
        assert names == []
        handle.opt_abort()


def test_only_operators_are_told_and_nothing_else_shows_it(served: Tls) -> None:
    secrets = {uri.rpartition("/")[2].partition("~")[0] for uri in served.uris.values()}
    assert len(secrets) == 2
    paths = served.server.get("/v1/openapi.json")["paths"]
    assert paths["/v1/disks/{name}:uri"]["get"]["x-least-role"] == "operator"
    assert paths["/v1/mirror"]["get"]["x-least-role"] == "operator"
    refused(served, served.uris["a"].replace("~a", "~b"))
    told = [str(served.server.get(path)) for path in ("/v1/disks", "/v1/overview", "/v1/status")]
    told += [path.read_text() for path in served.server.state_dir.glob("events*.jsonl")]
    told.append(served.server.log.read_text())
    told += [Path(f"/proc/{pid}/cmdline").read_text() for pid in served.server.pids().values()]
    assert not [secret for secret in secrets if any(secret in text for text in told)]
    assert (served.server.state_dir / "nbd.key").stat().st_mode & 0o777 == 0o600


def test_qemu_is_handed_its_certificate(served: Tls, short_path: Path, vm: str) -> None:
    served.server.post("/v1/disks", name=vm, size=SIZE)
    uuid = served.server.get(f"/v1/mirror?disk={vm}")["uuid"]
    bare = {"uri": mirror_uri(served.server.get(f"/v1/disks/{vm}:uri")["uri"], uuid)}
    uri = uri_here(bare, None, Credential.found(served.files / "hv1", None))

    async def work() -> None:
        async with qmp.connect(made.monitor) as monitor:
            mirror, other = Mirror(monitor, uuid), Mirror(monitor, "f" * 32)
            with pytest.raises(qmp.QmpRefusedError):
                await other.open_target(uri.replace(f"~{vm}:", "~b:"), wait=False)
            await mirror.start("disk0", uri, method="blockdev-mirror", wait=False)
            assert await mirror.leads_to(uri)
            assert not await mirror.leads_to(uri.replace(f"~{vm}:", "~b:"))

            async def in_sync() -> bool:
                job = await mirror.look()
                return job is not None and job.in_sync

            await eventually(in_sync)
            await mirror.end()
            await other.end()
            served.server.synced(vm)
            objects = await monitor.execute("qom-list", {"path": "/objects"})
            assert not [one["name"] for one in objects if "tls" in one["name"]]

    with source(short_path) as made:
        trio.run(work)
        with guest(made) as writes:
            mirrored = served.open(served.server.uri(f"{vm}@latest"))
            for at in range(0, SIZE, PART):
                assert mirrored.pread(PART, at) == writes.pread(PART, at)


def test_the_probe_asks_over_tls(served: Tls) -> None:
    uri = Credential.found(served.files / "hv1", None).added_to(served.uris["a"])
    workers = [pid for name, pid in served.server.pids().items() if name.startswith("target")]

    async def work() -> None:
        probe = Probe(uri)

        async def hangs() -> bool:
            return probe.hung_s() > 0

        async def answers() -> bool:
            return probe.hung_s() == 0

        with trio.fail_after(60):
            for _ in range(2 * ASKED_MOST + 1):
                await probe.ask()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(probe.run)
            # Nobody may look whether the workers hang: they would be killed, which is an answer.
            served.server.process.send_signal(signal.SIGSTOP)
            for pid in workers:
                os.kill(pid, signal.SIGSTOP)
            try:
                await eventually(hangs)
            finally:
                for pid in (*workers, served.server.process.pid):
                    os.kill(pid, signal.SIGCONT)
            await eventually(answers)
            nursery.cancel_scope.cancel()

    trio.run(work)


# --- without a service


@pytest.mark.parametrize("key", ["listen", "listen_export"])
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "[2001:db8::1]"])
def test_plain_off_loopback_is_refused(key: str, host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as plain:
        parse_config(f"{key} = '{host}:10809'")
    assert plain.value.message.startswith(f"{key}: ") and "tls.certificates" in plain.value.hint
    for secured in ("certificates", "psk"):
        assert parse_config(f"{key} = '{host}:10809'\n[tls]\n{secured} = '{tmp_path}'").nbd_tls
    for loopback in ("127.0.0.1", "127.1.2.3", "[::1]"):
        assert not parse_config(f"{key} = '{loopback}:10809'").nbd_tls


def test_files_that_will_not_do_are_named(files: Path, tmp_path: Path) -> None:
    tls.check_files(str(files / "tls"), str(files / "server-keys.psk"))
    tls.check_files(None, None)
    with pytest.raises(UsageError, match=r"tls\.certificates"):
        tls.check_files(str(tmp_path), None)
    for file in (tls.CA, tls.SERVER):
        (tmp_path / file).write_bytes((files / "tls" / file).read_bytes())
    (tmp_path / tls.SERVER_KEY).write_bytes((files / "hv1/client-key.pem").read_bytes())
    with pytest.raises(UsageError, match=r"tls\.certificates"):  # the key of another certificate
        tls.check_files(str(tmp_path), None)
    keys = tmp_path / "keys.psk"
    for text, mode, why in (
        ("", 0o600, "no key"),
        ("hv1:xyz\n", 0o600, "line 1"),
        (f"hv1:{SECRET}\nhv2\n", 0o600, "line 2"),
        (f"hv1:{SECRET}\n", 0o644, "everybody"),
    ):
        keys.write_text(text)
        keys.chmod(mode)
        with pytest.raises(UsageError, match=rf"tls\.psk: .*{why}"):
            tls.check_files(None, str(keys))
    with pytest.raises(UsageError, match=r"tls\.psk"):
        tls.check_files(None, str(tmp_path / "none"))


def test_who_is_refused_often_is_said_once(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    with Catalog.open(state, writable=True) as catalog:
        asked = Admission(state, catalog, tls=True)
        refused, other = ForbiddenError("no"), NotFoundError("none")
        assert [asked.is_news(refused, 100 + late) for late in (0, 0.5, 0.9, 1, 1.5)] == [
            True,
            False,
            False,
            True,
            False,
        ]
        assert asked.is_news(other, 101.5) and asked.is_news(other, 101.5)


def test_what_nbdkit_is_told() -> None:
    assert tls.nbdkit_arguments(None, None) == []
    assert "--tls-verify-peer" in tls.nbdkit_arguments("/d", None)
    assert tls.nbdkit_arguments("/d", "/k") == ["--tls=on", "--tls-psk=/k"]
    assert not Config(tls_psk=None).nbd_tls


def test_secrets_are_of_one_timeline_and_one_key(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    sealed.make_key(state)
    key = sealed.load_key(state)
    assert state.nbd_key.stat().st_mode & 0o777 == 0o600
    one = sealed.secret_of(key, b"1" * 16)
    others = {sealed.secret_of(key, b"2" * 16), sealed.secret_of(b"k" * 32, b"1" * 16)}
    assert len({one, *others}) == 3 and len(one) == 32
    for export in ("a", "vm/a@latest", "a:" + "f" * 32 + ":wait", "", f"a@seq:{MAX_NUMBER}", "x~y"):
        assert sealed.unseal(sealed.seal(export, one)) == (one, export)
    for text in ("a", "~a", one, one.upper() + "~a", one[1:] + "~a"):
        assert sealed.unseal(text) == ("", text)
    state.nbd_key.write_bytes(b"short")
    with pytest.raises(CorruptError, match="5 bytes"):
        sealed.load_key(state)


def test_a_uri_says_which_credential(files: Path, tmp_path: Path) -> None:
    uri = tcp_uri(f"{SECRET}~web/a:00", ("192.0.2.1", 10809), tls=True)
    assert uri == f"nbds://192.0.2.1:10809/{SECRET}~web/a:00"
    certificates = Credential.found(files / "hv1", None)
    keys = Credential.found(files / "psk", "hv1")
    assert certificates.user is None and keys.user == "hv1"
    assert Credential.found(files / "psk", None).user == "qemu"
    for credential in (certificates, keys, Credential("/a b/c", "ä")):
        whole = credential.added_to(uri)
        assert Credential.of(whole) == credential
        assert name_in_node(whole) == f"nbd://192.0.2.1:10809/{SECRET}~web/a:00"
        assert uri_here({"uri": uri}, None, credential) == whole
        assert uri_here({"uri": uri}, "127.0.0.1:1", credential).startswith("nbds://")
    assert Credential.of("nbd://h:1/a") is None
    assert name_in_node("nbd://[2001:db8::1]:10809/a") == "nbd://2001:db8::1:10809/a"
    assert name_in_node("nbd+unix:///a%20b?socket=/s") == "nbd+unix:///a b?socket=/s"
    assert keys.as_object("n") == {
        "qom-type": "tls-creds-psk",
        "username": "hv1",
        "id": "n",
        "dir": str(files / "psk"),
        "endpoint": "client",
    }
    with pytest.raises(UsageError, match="takes TLS"):
        uri_here({"uri": uri}, None)
    for directory, user, why in (
        (tmp_path, None, "ca-cert.pem"),
        (files / "hv1", "hv1", "keys.psk"),
        (Path("hv1"), None, "absolute"),
    ):
        with pytest.raises(UsageError, match=why) as wrong:
            Credential.found(directory, user)
        assert str(wrong.value)
