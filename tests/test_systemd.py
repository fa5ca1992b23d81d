"""The units of systemd/: accepted without a warning, tight, and in agreement with the server and with each other."""

import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from cdpserver.config import MAX_WORKERS, Config
from cdpserver.service import notify
from cdpserver.service.keeper import SystemdStore
from cdpserver.service.listeners import Listeners
from cdpserver.state import StateDir

UNITS = Path(__file__).resolve().parent.parent / "systemd"
STATE_DIR = StateDir(Path("/var/lib/cdpserver"))

MAX_EXPOSURE = 1.7
"""Of 10, by `systemd-analyze security`. What is left is what it needs: sockets, TCP, four system calls, the host's images."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: apt-get install systemd"
)


def settings(path: Path) -> dict[str, list[str]]:
    """What a unit sets, section by section as one: none of ours uses a key in two sections."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def runnable(directory: Path) -> list[str]:
    """The units in `directory`, with a program that is there: systemd looks."""
    for path in UNITS.glob("cdpserver*"):
        text = path.read_text().replace("/usr/local/bin/cdpserver", "/bin/true")
        (directory / path.name).write_text(text)
    return sorted(str(path) for path in directory.iterdir())


def analyze(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], text=True, capture_output=True, timeout=60, check=False
    )


@needs_systemd
def test_systemd_accepts_every_unit_without_a_warning(tmp_path: Path) -> None:
    units = runnable(tmp_path)
    assert len(units) == 4
    done = analyze("verify", "--man=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_a_key_that_systemd_does_not_know_would_be_seen(tmp_path: Path) -> None:
    units = runnable(tmp_path)
    unit = tmp_path / "cdpserver.service"
    unit.write_text(unit.read_text().replace("NoNewPrivileges=", "NoNewPrivilege="))
    assert "NoNewPrivilege" in analyze("verify", "--man=no", *units).stderr


@needs_systemd
def test_the_service_is_tight(tmp_path: Path) -> None:
    runnable(tmp_path)
    unit = tmp_path / "cdpserver.service"
    limit = f"--threshold={MAX_EXPOSURE * 10:.0f}"
    done = analyze("security", "--offline=true", limit, str(unit))
    assert done.returncode == 0, done.stdout
    unit.write_text(
        unit.read_text().replace("SystemCallFilter=", "# ").replace("CapabilityBoundingSet=", "# ")
    )
    assert analyze("security", "--offline=true", limit, str(unit)).returncode != 0


NEEDED_CALLS = {
    "capset": "setpriv",
    "setpriority": "nice",
    "set_mempolicy": "qemu-img",
    "mbind": "numpy",
    "prlimit64": "the server's own limit of files",
    "prctl": "setpriv --pdeathsig",
    "io_submit": "qemu-img",
    "fallocate": "the writer",
    "renameat2": "durable files",
    "memfd_create": "QEMU's tools",
}
"""Found with strace over a disk's life: an image, writes, a base point, a view, a fork, a check."""


def calls(group: str) -> set[str]:
    """The system calls of a group, with those of the groups in it."""
    found = set()
    for line in analyze("syscall-filter", group).stdout.splitlines()[1:]:
        name = line.strip()
        if name.startswith("@"):
            found |= calls(name)
        elif name and not name.startswith("#"):
            found.add(name)
    return found


@needs_systemd
def test_what_the_server_and_its_tools_call_is_allowed() -> None:
    allowed: set[str] = set()
    for line in settings(UNITS / "cdpserver.service")["SystemCallFilter"]:
        named = set()
        for word in line.removeprefix("~").split():
            named |= calls(word) if word.startswith("@") else {word}
        allowed = allowed - named if line.startswith("~") else allowed | named
    assert not NEEDED_CALLS.keys() - allowed
    assert not {"mount", "ptrace", "bpf", "setuid", "init_module", "reboot", "sched_setscheduler"} & allowed


def test_the_service_is_told_apart_watched_and_never_given_up() -> None:
    service = settings(UNITS / "cdpserver.service")
    expected = {
        "Type": "notify",
        "NotifyAccess": "main",
        "KillMode": "process",
        "OOMPolicy": "continue",
        "Restart": "always",
        "StartLimitIntervalSec": "0",
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "PrivateTmp": "yes",
        "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6",
    }
    assert {key: service[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert "WatchdogSec" in service
    most = Config(workers=MAX_WORKERS, listen=("::1", 1), listen_export=("::1", 2), listen_api=("::1", 3))
    sockets = Listeners(STATE_DIR, most, SystemdStore())._wanted
    assert len(sockets) == 2 * MAX_WORKERS + 4 <= int(service["FileDescriptorStoreMax"][0])
    assert service["TimeoutStartSec"] == [f"{notify.START_S / 60:.0f}min"], "what a reload is given"


def test_the_units_speak_of_the_same_user_directory_and_sockets() -> None:
    service = settings(UNITS / "cdpserver.service")
    (start,) = service["ExecStart"]
    assert f"--state-dir {STATE_DIR.path}" in start
    assert service["RequiresMountsFor"] == [str(STATE_DIR.path)]
    user = service["User"][0]
    assert f"\nu {user} " in (UNITS / "sysusers.conf").read_text()
    assert f"\nd {STATE_DIR.path} 0700 {user} {user} -" in (UNITS / "tmpfiles.conf").read_text()
    api = settings(UNITS / "cdpserver-api.socket")
    assert api["ListenStream"] == [str(STATE_DIR.api_socket)]
    assert api["SocketUser"] == api["SocketGroup"] == [user]
    assert api["SocketMode"] == ["0600"]
    names = {path.name: settings(path)["FileDescriptorName"] for path in UNITS.glob("*.socket")}
    assert names == {
        "cdpserver-api.socket": ["api"],
        "cdpserver-export-tcp.socket": ["export-tcp"],
        "cdpserver-target-tcp.socket": ["target-tcp"],
    }
    for path in UNITS.glob("*.socket"):
        assert settings(path)["Service"] == ["cdpserver.service"]


@needs_systemd
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory away")
def test_the_user_and_the_state_directory_are_made(tmp_path: Path) -> None:
    root = f"--root={tmp_path}"
    (tmp_path / "etc").mkdir()
    for tool, conf in (("systemd-sysusers", "sysusers.conf"), ("systemd-tmpfiles", "tmpfiles.conf")):
        create = ["--create"] if tool == "systemd-tmpfiles" else []
        subprocess.run([tool, root, *create, str(UNITS / conf)], check=True, capture_output=True, timeout=60)
    fields = (tmp_path / "etc/passwd").read_text().split("cdp:")[1].splitlines()[0].split(":")
    made = (tmp_path / "var/lib/cdpserver").stat()
    assert made.st_uid == int(fields[1]) and stat.S_IMODE(made.st_mode) == 0o700
    assert fields[-1] == "/usr/sbin/nologin"


def test_a_socket_that_systemd_made_first_is_no_foreign_file(short_path: Path) -> None:
    state = StateDir(short_path / "s")
    state.path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(state.api_socket))
        assert StateDir.create_or_open(state.path) == state
    assert state.format.exists()
