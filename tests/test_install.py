"""tools/install into a staging root: what is installed runs, upgrades keep what was changed, removal keeps data."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from cdpserver import __version__
from tools.kit.processes import until
from tools.packaging.layout import Layout

ROOT = Path(__file__).resolve().parent.parent
DEPENDENCIES = sysconfig.get_path("purelib")
CONFIGURATION = "etc/cdpserver/cdpserver.toml"

pytestmark = pytest.mark.real


def environment() -> dict[str, str]:
    """Nothing of this checkout, as on a host that never saw it."""
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"}


def install(root: Path, *arguments: str, ok: bool = True) -> str:
    done = subprocess.run(
        [ROOT / "tools/install", "--destdir", root, "--site-packages", DEPENDENCIES, *arguments],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("installed")
    install(root)
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """An installation of the test's own."""
    return Path(shutil.copytree(original, tmp_path / "root", symlinks=True))


def files(root: Path) -> dict[str, str]:
    """path -> digest or target of all that is no directory."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(root: Path, program: str, *arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(
        [root / "usr/local/bin" / program, *arguments],
        env=environment(),
        cwd=cwd,
        text=True,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout


def test_what_is_installed_runs_by_itself(root: Path, tmp_path: Path) -> None:
    # Modules in the current directory are not ours, whatever they are called.
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "cdpserver").mkdir()
    (tmp_path / "cdpserver/__init__.py").touch()
    assert run(root, "cdp", "--version", cwd=tmp_path).startswith("cdp ")
    assert run(root, "cdpserver", "--version", cwd=tmp_path).startswith("cdpserver ")


def test_every_file_has_its_place(original: Path) -> None:
    outside = [name for name in files(original) if "lib/cdpserver/" not in name]
    assert outside == [
        CONFIGURATION,
        "usr/local/bin/cdp",
        "usr/local/bin/cdpserver",
        "usr/local/lib/systemd/system/cdpserver-api.socket",
        "usr/local/lib/systemd/system/cdpserver-export-tcp.socket",
        "usr/local/lib/systemd/system/cdpserver-target-tcp.socket",
        "usr/local/lib/systemd/system/cdpserver.service",
        "usr/local/lib/sysusers.d/cdpserver.conf",
        "usr/local/lib/tmpfiles.d/cdpserver.conf",
        "usr/local/share/bash-completion/completions/cdp",
        "usr/local/share/bash-completion/completions/cdpserver",
        "usr/local/share/fish/vendor_completions.d/cdp.fish",
        "usr/local/share/fish/vendor_completions.d/cdpserver.fish",
        "usr/local/share/man/man1/cdp.1",
        "usr/local/share/man/man8/cdpserver.8",
        "usr/local/share/zsh/site-functions/_cdp",
    ]
    assert not list(original.rglob(".cdpserver.*"))


def test_the_default_configuration_explains_every_key_and_sets_none(original: Path) -> None:
    text = (original / CONFIGURATION).read_text()
    assert "# bp_every = " in text and "Set by" not in text
    shown = run(original, "cdpserver", "--config", str(original / CONFIGURATION), "--show-config")
    assert shown == run(original, "cdpserver", "--show-config")


def answer(path: Path, request: str) -> Any:
    connection = http.client.HTTPConnection("cdp", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("GET", request)
    return json.loads(connection.getresponse().read())


class Service:
    """The installed server, with a state directory."""

    def __init__(self, root: Path, state_dir: Path) -> None:
        self.process = subprocess.Popen(
            [root / "usr/local/bin/cdpserver", "--config", root / CONFIGURATION, "--state-dir", state_dir],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline
            try:
                self.status = answer(state_dir / "api.sock", "/v1/status")
                return
            except OSError:
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0


@pytest.fixture
def state_dir(short_path: Path) -> Path:
    return short_path / "s"


def test_removal_and_a_new_installation_leave_data_as_it_was(root: Path, state_dir: Path) -> None:
    service = Service(root, state_dir)
    try:
        run(root, "cdp", "--state-dir", str(state_dir), "disk", "add", "vda", "--size", "1M")
        uri = json.loads(run(root, "cdp", "--state-dir", str(state_dir), "disk", "show", "vda", "--json"))[
            "uri"
        ]
        subprocess.run(["nbdcopy", "-", uri], input=b"history!" * 8192, check=True, timeout=60)
    finally:
        service.stop()
    before = files(state_dir)
    assert any(name.endswith((".log", ".raw", ".dat")) for name in before), before
    said = install(root, "--remove")
    assert "stays" in said
    assert not list(root.iterdir()), "an untouched installation leaves nothing behind"
    assert files(state_dir) == before

    install(root)
    assert files(state_dir) == before
    service = Service(root, state_dir)
    try:
        assert "vda" in run(root, "cdp", "--state-dir", str(state_dir), "disk", "list")
    finally:
        service.stop()


def test_an_upgrade_replaces_what_is_ours_and_drops_what_is_no_more(root: Path) -> None:
    before = files(root)
    tree = root / "usr/local/lib/cdpserver"
    (module,) = tree.glob("lib/python3.*/site-packages/recovery/cli.py")
    module.write_text("raise SystemExit('damaged')")
    stale = module.with_name("of_an_older_version.py")
    stale.touch()
    install(root)
    assert "cdp " in run(root, "cdp", "--version")
    assert not stale.exists()
    after = files(root)
    assert after.keys() == before.keys()
    install(root, "--remove")
    assert not list(root.iterdir())


def test_a_reload_after_an_upgrade_runs_the_new_version(root: Path, state_dir: Path) -> None:
    service = Service(root, state_dir)
    try:
        tree = root / "usr/local/lib/cdpserver"
        new = tree.with_name("new")
        shutil.copytree(tree, new, symlinks=True)
        (module,) = new.glob("lib/python3.*/site-packages/cdpserver/__init__.py")
        module.write_text(module.read_text().replace(f'"{__version__}"', '"99.0"'))
        shutil.rmtree(tree)
        new.rename(tree)
        assert answer(state_dir / "api.sock", "/v1/status")["version"] == __version__
        service.process.send_signal(signal.SIGHUP)

        def new_one_answers() -> bool:
            with contextlib.suppress(subprocess.CalledProcessError):  # nobody answers for a moment
                return "99.0" in run(root, "cdp", "--state-dir", str(state_dir), "status")
            return False

        until(new_one_answers, "new version's answer")
        assert service.process.poll() is None
    finally:
        service.stop()


def test_a_changed_configuration_is_kept_by_upgrade_and_removal(root: Path) -> None:
    path = root / CONFIGURATION
    changed = 'socket_linger = "1h"\n'
    path.write_text(changed)
    assert "kept" in install(root)
    assert path.read_text() == changed
    assert "was changed" in install(root, "--remove")
    assert files(root) == {CONFIGURATION: hashlib.sha256(changed.encode()).hexdigest()}
    # A new installation does not know who wrote it, so it is the operator's.
    assert "kept" in install(root)
    assert path.read_text() == changed and path.with_name("cdpserver.toml.new").exists()
    install(root, "--remove")
    assert files(root).keys() == {CONFIGURATION}


def test_an_untouched_configuration_follows_the_version(root: Path) -> None:
    path, manifest = root / CONFIGURATION, root / "usr/local/lib/cdpserver/manifest.json"
    shipped = path.read_bytes()
    path.write_text("# the default of an older version\n")
    known = json.loads(manifest.read_text())
    known["configuration"] = {f"/{CONFIGURATION}": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(known))
    assert "kept" not in install(root)
    assert path.read_bytes() == shipped


def test_what_somebody_else_put_there_stays(root: Path, tmp_path: Path) -> None:
    mine = root / "usr/local/lib/cdpserver/mine.txt"
    mine.write_text("mine")
    beside = root / "usr/local/share/bash-completion/completions/other"
    beside.write_text("other")
    assert "mine.txt stays" in install(root, "--remove")
    assert files(root).keys() == {str(path.relative_to(root)) for path in (mine, beside)}

    other = tmp_path / "other"
    program = other / "usr/local/bin/cdp"
    program.parent.mkdir(parents=True)
    program.write_text("somebody else's")
    before = files(other)
    assert "not ours" in install(other, ok=False)
    assert files(other) == before and not (other / "usr/local/lib").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prefix", "opt"], "absolute"),
        (["--prefix", "/opt/a b"], "absolute"),
        (["--state-dir", "/srv/../etc"], "absolute"),
        (["--state-dir", "/srv/x\nExecStart=/bin/sh"], "absolute"),
        (["--remove"], "nothing is installed"),
        (["--site-packages", "/nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_installed_changes_nothing(arguments: list[str], says: str, tmp_path: Path) -> None:
    said = install(tmp_path / "empty", *arguments, ok=False)
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "empty").exists()


def test_a_damaged_manifest_is_said(root: Path) -> None:
    manifest = root / "usr/local/lib/cdpserver/manifest.json"
    manifest.write_text("{")
    before = files(root)
    assert "move it away" in install(root, "--remove", ok=False)
    assert files(root) == before


def test_the_units_follow_prefix_and_state_directory(tmp_path: Path) -> None:
    install(tmp_path, "--prefix", "/opt/cdp", "--state-dir", "/srv/history")
    units = tmp_path / "etc/systemd/system"
    service = (units / "cdpserver.service").read_text()
    assert (
        "ExecStart=/opt/cdp/bin/cdpserver --config /etc/cdpserver/cdpserver.toml --state-dir /srv/history\n"
        in service
    )
    assert "ReadWritePaths=/srv/history\n" in service and "StateDirectory" not in service
    assert "/srv/history/api.sock" in (units / "cdpserver-api.socket").read_text()
    assert "\nd /srv/history 0700 " in (tmp_path / "etc/tmpfiles.d/cdpserver.conf").read_text()
    assert not [path for path in units.iterdir() if "/var/lib/cdpserver" in path.read_text()]
    # An upgrade keeps the choice, and removal needs only the prefix.
    install(tmp_path, "--prefix", "/opt/cdp")
    assert (units / "cdpserver.service").read_text() == service
    install(tmp_path, "--prefix", "/opt/cdp", "--remove")
    assert not list(tmp_path.iterdir())


def test_a_state_directory_below_the_usual_place_is_systemds() -> None:
    text = (ROOT / "systemd/cdpserver.service").read_text()
    assert Layout("/usr/local", "/var/lib/cdpserver").render(text) == text
    assert "\nStateDirectory=vm/history\n" in Layout("/usr", "/var/lib/vm/history").render(text)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="apt-get install systemd")
def test_systemd_accepts_the_installed_units(original: Path, tmp_path: Path) -> None:
    for path in (original / "usr/local/lib/systemd/system").iterdir():
        text = path.read_text().replace("/usr/local/bin", f"{original}/usr/local/bin")
        (tmp_path / path.name).write_text(text)
    units = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            *units,
        ],
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
