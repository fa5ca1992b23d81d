"""What QEMU is told: a machine of our own, an operator's command with the disks put in, and the same cut off from everything."""

import itertools
import json
import subprocess
from pathlib import Path

import pytest

from cdpserver.errors import UsageError
from cdpserver.vm.launch import machine, template
from cdpserver.vm.launch.isolate import isolate
from cdpserver.vm.launch.kvm import runs_guests
from cdpserver.vm.launch.machine import Direct, Firmware, Machine
from cdpserver.vm.launch.parts import Disk, Image, Nbd, Places
from cdpserver.vm.machines import firmware_of, fitted

PLACES = Places(Path("/run/cdp/x"))
DISKS = [
    Disk("vda", Nbd("nbd+unix:///r/vda?socket=/s/a,b")),
    Disk("vdb", Nbd("nbd://[::1]:1/r/vdb")),
]

COMMAND = """
# The web server.
qemu-system-x86_64 -name web -machine q35 -m 2048 -smp 2 -daemonize -pidfile /run/web.pid \\
  -device virtio-blk-pci,drive={disk:vda},bootindex=1 -drive 'file={uri:vdb},format=raw,if=virtio' \\
  -netdev bridge,id=n0,br=br0 -device virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56 \\
  -nic tap,model=e1000,mac=52:54:00:12:34:57,script=no -vnc :1 -monitor unix:/run/web.mon,server=on,wait=off \\
  -chardev socket,id=ga,path=/run/web-ga.sock,server=on,wait=off -device virtio-serial-pci \\
  -device virtserialport,chardev=ga,name=org.qemu.guest_agent.0 -serial tcp::4444,server=on,wait=off \\
  -chardev pty,id=other -serial chardev:other -cdrom /srv/a.iso
"""


def values(command: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(command) if word == f"-{option}"]


def test_a_machine_of_our_own_is_complete() -> None:
    direct = Direct("/boot/k", "/boot/i", "console=ttyS0")
    disks = [*DISKS, Disk("vdc", Image("/srv/c.qcow2", "qcow2"))]
    made = machine.command(Machine(direct=direct, network="user", memory_mib=256), "web,again", disks, PLACES)
    assert (
        values(made, "accel") == ["tcg"] and values(made, "nic") == ["user"] and values(made, "m") == ["256"]
    )
    assert values(made, "kernel") == ["/boot/k"] and values(made, "append") == ["console=ttyS0"]
    assert values(made, "name") == ["web,,again"]
    nodes = [json.loads(value) for value in values(made, "blockdev")]
    assert [node["node-name"] for node in nodes][:2] == ["recovered0-nbd", "recovered0"]
    assert nodes[0]["server"] == {"type": "unix", "path": "/s/a,b"} and nodes[0]["export"] == "r/vda"
    assert nodes[2]["server"] == {"type": "inet", "host": "::1", "port": "1"}
    assert (nodes[4]["filename"], nodes[5]["driver"]) == ("/srv/c.qcow2", "qcow2")
    assert all(node.get("reconnect-delay") for node in nodes if node["driver"] == "nbd")
    alone = machine.command(Machine(network="user"), "x", DISKS, PLACES, isolated=True)
    assert values(alone, "nic") == ["none"] and values(alone, "serial") == ["file:/run/cdp/x/serial.log"]


def test_a_machine_is_as_large_as_there_is_room_and_has_its_firmware_and_buses() -> None:
    like = Machine(
        memory_mib=1 << 20,
        cpus=64,
        firmware=Firmware("/c,1", "/v"),
        buses=(("vda", "ide"), ("vdb", "virtio-scsi")),
    )
    made = machine.command(fitted(like, memory_mib=512, cpus=2), "x", DISKS, PLACES, isolated=True)
    assert (values(made, "m"), values(made, "smp")) == (["512"], ["2"])
    code, variables = values(made, "drive")
    assert "readonly=on,file=/c,,1" in code and "snapshot=on" in variables and "locking=off" in variables
    controller, *disks = values(made, "device")[-3:]
    assert controller.startswith("virtio-scsi-pci")
    assert [disk.partition(",drive=")[0] for disk in disks] == ["ide-hd", "scsi-hd,bus=recovered-scsi.0"]


def test_firmware_is_the_flash_that_a_machine_has() -> None:
    def flash(number: int, file: str, *, read_only: bool) -> dict[str, object]:
        return {"qdev": f"/machine/system.flash{number}", "inserted": {"ro": read_only, "file": file}}

    blocks = [flash(0, "/code", read_only=True), flash(1, "/vars", read_only=False)]
    disk = {"qdev": "vda", "inserted": {"ro": False, "file": "/disk"}}
    assert firmware_of([disk, *blocks]) == Firmware("/code", "/vars")
    assert firmware_of([disk]) is None and firmware_of(blocks[1:]) is None


def test_an_operators_command_gets_the_disks_and_a_monitor() -> None:
    made = template.command(template.read(COMMAND), "again", DISKS, PLACES)
    assert made[0] == "qemu-system-x86_64" and values(made, "accel") == ["tcg"]
    assert values(made, "device")[0] == "virtio-blk-pci,drive=recovered0,bootindex=1"
    assert values(made, "drive") == ["file=nbd://[::1]:1/r/vdb,format=raw,if=virtio"]
    assert values(made, "qmp") == ["unix:/run/cdp/x/qmp.sock,server=on,wait=off"]
    assert "-daemonize" not in made and not values(made, "pidfile")
    assert values(made, "netdev") == ["bridge,id=n0,br=br0"] and values(made, "vnc") == [":1"]
    assert "-display" not in made


def test_the_accelerator_is_tcg_unless_somebody_says_otherwise() -> None:
    for said in ("-accel kvm", "-enable-kvm", "-machine q35,accel=kvm"):
        text = f"qemu-system-x86_64 {said} -device virtio-blk-pci,drive={{disk:vda}}"
        assert "tcg" not in template.command(template.read(text), "x", DISKS[:1], PLACES)
    chosen = template.command(
        template.read("kvm -enable-kvm -hda {uri:vda}"), "x", DISKS[:1], PLACES, accel="tcg"
    )
    assert values(chosen, "accel") == ["tcg"] and "-enable-kvm" not in chosen


def test_an_isolated_command_reaches_nobody() -> None:
    made = template.command(isolate(template.read(COMMAND)), "x", DISKS, PLACES)
    assert values(made, "netdev") == ["hubport,id=n0,hubid=1"]
    assert values(made, "nic") == ["hubport,model=e1000,mac=52:54:00:12:34:57,hubid=2", "none"]
    assert values(made, "serial") == ["file:/run/cdp/x/serial.log", "null"]
    assert values(made, "chardev") == [
        "socket,id=ga,path=/run/cdp/x/agent.sock,server=on,wait=off",
        "null,id=other",
    ]
    assert (
        values(made, "monitor") == ["none"]
        and not values(made, "vnc")
        and values(made, "display") == ["none"]
    )
    assert not {"br0", "/run/web.mon", "4444"} & set(" ".join(made).replace(",", " ").split())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("-drive file=/srv/data.img,format=raw", "make it read-only"),
        ('-blockdev \'{"driver":"file","filename":"/srv/x","node-name":"x"}\'', "make it read-only"),
        ("-hda /srv/data.img", "reaches what is on this host"),
        ("-device vfio-pci,host=01:00.0", "vfio-pci reaches"),
        ('-device \'{"driver":"vhost-user-fs-pci"}\'', "vhost-user-fs-pci reaches"),
        ("-virtfs local,path=/,mount_tag=t,security_model=none", "reaches what is on this host"),
    ],
)
def test_what_cannot_be_isolated_is_refused(option: str, said: str) -> None:
    whole = template.read(f"qemu-system-x86_64 {option}")
    with pytest.raises(UsageError, match="cannot be isolated") as caught:
        isolate(whole)
    assert said in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with nothing"),
        ("rm -rf /", "begins with 'rm'"),
        ("FOO=1 qemu-system-x86_64", "begins with"),
        ("qemu-system-x86_64 'x", "cannot be read"),
        ("qemu-system-x86_64 disk.img", "without an option"),
        ("qemu-system-x86_64 -m", "-m has no value"),
        ("qemu-system-x86_64 -snapshot", "would be lost"),
        ("qemu-system-x86_64 -incoming defer", "no memory"),
        ("x" * 70_000, "characters"),
    ],
)
def test_what_is_no_command_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        template.read(text)
    assert said in caught.value.message


def test_disks_and_places_have_to_agree() -> None:
    with pytest.raises(UsageError, match="no place for the disk vdb"):
        template.command(template.read("kvm -hda {uri:vda}"), "x", DISKS, PLACES)
    with pytest.raises(UsageError, match="a place for 'vdx'"):
        template.command(template.read("kvm -hda {uri:vdx}"), "x", DISKS, PLACES)


@pytest.mark.real
def test_qemu_takes_what_is_written(tmp_path: Path) -> None:
    """Both commands as QEMU itself reads them, up to the guest's first instruction."""
    image = tmp_path / "d.raw"
    image.write_bytes(bytes(1 << 20))
    places = Places(tmp_path)
    disks = [Disk("vda", Image(str(image), "raw"))]
    ours = machine.command(Machine(memory_mib=64), "x", disks, places, isolated=True)
    text = COMMAND.replace("{uri:vdb}", "/dev/null").replace("format=raw,", "format=raw,readonly=on,")
    theirs = template.command(
        isolate(template.read(text.replace("-cdrom /srv/a.iso", ""))), "x", disks, places
    )
    for command in (ours, theirs):
        done = subprocess.run(
            [*command, "-S", "-qmp", "stdio"],
            input='{"execute":"qmp_capabilities"}{"execute":"quit"}',
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.real
def test_a_guest_that_runs_is_told_from_one_that_does_not() -> None:
    assert runs_guests(accel="tcg")
    assert not runs_guests(accel="none")
