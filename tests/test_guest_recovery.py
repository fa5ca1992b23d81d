"""A real guest is protected, encrypted by ransomware, and recovered to the second before, while it goes on counting.

What counts is on its disks: a counter (tests/guest/counter) and a journal in which each line has the digest of the one before
(tests/guest/journal). Every number that the guest said to be durable has to be there, once, in order, and nothing else.
"""

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cdpserver.names import format_time
from tests.guest_image import guest_image
from tests.guest_vm import Guest, booted, file_disk, virtio_disk
from tests.test_service import Server, until
from tools.kit.source import nbd_server

pytestmark = pytest.mark.real

WAIT_S = 120


def nbd_disk(name: str, uri: str) -> list[str]:
    """A guest's disk on one of our URIs."""
    server, export = nbd_server(uri)
    below = f"driver=nbd,node-name={name}-nbd,server.type=unix,server.path={server['path']},export={export},reconnect-delay=30"
    above = f"driver=raw,node-name={name},file={name}-nbd,discard=unmap"
    return ["-blockdev", below, "-blockdev", above, *virtio_disk(name)]


def notes(guest: Guest) -> int:
    """The newest line of the journal that the guest said to be durable."""
    said = (re.fullmatch(r"NOTE (\d+)", line) for line in reversed(list(guest.console)))
    return next((int(m[1]) for m in said if m), 0)


def start_loads(guest: Guest, journal: str) -> None:
    """Both loads; they go on where the disk says that they were."""
    guest.start("counter")
    guest.start(f"journal {journal}")
    guest.wait_acks(5, WAIT_S)
    guest.wait_until(lambda: notes(guest) > 0, WAIT_S, "a line of the journal")


def encrypt(guest: Guest, *files: str) -> None:
    """What ransomware does, as far as a disk sees it."""
    for file in files:
        guest.run(f"dd if=/dev/urandom of={file} bs=64k count=2 conv=notrunc,fsync 2>/dev/null", WAIT_S)


def file_in(image: Path, path: str, work: Path) -> list[str]:
    """The lines of a file in an ext file system, after its journal is replayed in a copy."""
    raw = work / "looked-at.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    subprocess.run(["e2fsck", "-p", "-E", "journal_only", raw], check=False, capture_output=True)
    done = subprocess.run(["debugfs", "-R", f"cat {path}", raw], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def check_journal(lines: list[str]) -> None:
    """Each line has its number and the digest of the one before."""
    before = ""
    for number, line in enumerate(lines, start=1):
        digest = hashlib.sha256(before.encode() + b"\n").hexdigest()
        assert line == f"{number} {digest}"
        before = line


def recovered_disks(mode: str, begun: dict[str, Any], nodes: dict[str, str]) -> list[str]:
    """What the recovered guest starts on, in the order of `nodes`: its forks, or the files at home."""
    made = {disk["fork"].rpartition("/")[2]: disk for disk in begun["disks"]}
    words = []
    for name, node in nodes.items():
        disk = made[name]
        if mode == "stream":
            words += file_disk(node, Path(disk["target"]), driver="qcow2")
        else:
            words += nbd_disk(node, disk["uri"])
    return words


def command_of(guest: Guest, disks: list[str]) -> str:
    """The guest's machine as an operator's command file."""
    image = guest.image
    devices = " ".join(
        f"-device virtio-blk-pci,drive={{disk:{disk}}},bootindex={number}"
        for number, disk in enumerate(disks, start=1)
    )
    return (
        f"qemu-system-x86_64 -machine q35 -cpu max -m 192 -nodefaults {devices} -nic user,model=virtio-net-pci\n"
        f" -kernel {image.kernel} -initrd {image.initrd}\n"
        ' -append "console=ttyS0 quiet panic=-1 nokaslr mitigations=off no_timer_check tsc=reliable'
        ' random.trust_cpu=on root=/dev/vda" -device virtio-serial-pci -serial stdio -serial null\n'
        " -chardev socket,id=ga,path=/nowhere/ga.sock,server=on,wait=off"
        " -device virtserialport,chardev=ga,name=org.qemu.guest_agent.0"
    ).replace("\n", " \\\n")


@pytest.mark.parametrize(
    ("mode", "disks"),
    [("mirror", ["root"]), ("mirror", ["root", "more"]), ("stream", ["root"]), ("stream", ["root", "more"])],
    ids=["mirror-one-disk", "mirror-two-disks", "stream-one-disk", "stream-two-disks"],
)
def test_a_guest_is_back_at_the_second_before_and_goes_on(
    short_path: Path, mode: str, disks: list[str]
) -> None:
    two = len(disks) == 2
    names = [f"{name}-device" for name in disks]  # a disk is called as its device in the guest
    journal = "/tmp/more/journal" if two else "/data/journal"
    mount = "mkdir -p /tmp/more && mount -t ext4 /dev/vdb /tmp/more"
    sources = [guest_image().copy_root(short_path / "root.img")]
    if two:
        sources.append(short_path / "more.img")
        subprocess.run(["mke2fs", "-q", "-t", "ext4", sources[1], "16M"], check=True)
    home, link = short_path / "home", short_path / "monitor"
    home.mkdir()
    with Server(short_path / "s") as server:
        old = [word for name, path in zip(disks, sources, strict=True) for word in file_disk(name, path)]
        with booted(short_path / "old", old) as guest:
            if two:
                guest.run(mount)
            server.request("PUT", "/v1/vms/web", {"qmp": str(guest.qmp), "disks": disks})
            start_loads(guest, journal)
            until(lambda: _synced(server), "the disks in sync")
            guest.wait_acks(10, WAIT_S)
            before = guest.acks, notes(guest)
            instant = _now(server)
            most = _begun_by_now(guest)
            encrypt(guest, "/data/counter", journal)
            guest.wait_acks(3, WAIT_S)
            guest.kill()
        server.delete("/v1/vms/web")
        if two and mode == "mirror":  # what is drilled is a fork in any case
            command = short_path / "web.qemu"
            command.write_text(command_of(guest, names))
            asked = {
                "point": f"web@{instant}",
                "vm_command": str(command),
                "marker": "GUEST ready",
                "agent": True,
            }
            found = server.post("/v1/drills", **asked)
            assert found["state"] == "passed", found["reason"]
            assert found["read_ms"] < found["write_ms"] < found["rto_ms"]
        asked = {"point": f"web@{instant}", "to": str(home), "qmp": str(link), "name": "again", "mode": mode}
        begun: dict[str, Any] = server.post("/v1/recoveries", **asked)
        new = recovered_disks(mode, begun, dict(zip(names, disks, strict=True)))
        with booted(short_path / "new", new) as guest:
            last = guest.wait_for(r"GUEST last (\d+)")
            if two:
                guest.run(mount)
            found = int(last[1]), int(guest.run(f"wc -l <{journal}"))
            for least, is_there, at_most in zip(before, found, most, strict=True):
                assert least <= is_there <= at_most, (
                    "all that was durable at the instant, and nothing of later"
                )
            start_loads(guest, journal)
            counted = guest.acks
            link.symlink_to(guest.qmp)  # from here on the service finds the VM, and moves it
            until(lambda: _state(server) == "done", "the pivot")
            assert guest.acks > counted, "it goes on counting during the migration"
            guest.wait_acks(10, WAIT_S)
            guest.stop()
            guest.run(f"umount {Path(journal).parent}" if two else "true")
            guest.power_off(WAIT_S)
            guest.wait_end(WAIT_S)
            after = guest.acks, notes(guest)
        images = {
            disk["fork"].rpartition("/")[2]: Path(disk["target"]) for disk in _recovery(server)["disks"]
        }
        server.post("/v1/recoveries/again:commit")
    counter = file_in(images[names[0]], "/data/counter", short_path)
    assert counter == [str(number) for number in range(1, after[0] + 1)]
    lines = file_in(images[names[-1]], "/journal" if two else journal, short_path)
    check_journal(lines)
    assert len(lines) == after[1] > before[1]


def _synced(server: Server) -> bool:
    return all(disk["state"] == "synced" for disk in server.get("/v1/vms/web")["disks"])


def _begun_by_now(guest: Guest) -> tuple[int, int]:
    """The newest number, and line of the journal, that can have been written yet: the one after what was said."""
    since = len(guest.console)
    guest.run("echo AFTER >/dev/ttyS0")
    guest.wait_for("^AFTER$", since=since)
    return guest.acks + 1, notes(guest) + 1


def _now(server: Server) -> str:
    """Now, by the server's clock, as an instant."""
    return format_time(int(server.get("/v1/status")["time_ns"]))


def _recovery(server: Server) -> dict[str, Any]:
    shown: dict[str, Any] = server.get("/v1/recoveries/again")
    return shown


def _state(server: Server) -> str:
    shown = _recovery(server)
    assert shown["state"] != "failed", shown["reason"]
    return str(shown["state"])
