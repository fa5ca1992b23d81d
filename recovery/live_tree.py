"""The commands about a running VM's own snapshots, as argparse knows them. Loaded by every command, so it is small."""

from argparse import ArgumentParser
from pathlib import Path

from recovery.arguments import take_yes
from recovery.tree import Group, lazy

_AT = "--qmp /run/web.qmp --disk vd0"


def add(snapshot: Group) -> None:
    """`cdp snapshot live`"""
    live = snapshot.group(
        "live",
        "a running VM's own snapshots, through QEMU's monitor",
        f"cdp snapshot live tree web {_AT}",
    )
    tree = live.leaf(
        "tree",
        lazy("live", "live_tree"),
        "Show the chain of a disk's images as QEMU has it open, and what stands beside it.",
        f"cdp snapshot live tree web {_AT}",
    )
    create = live.leaf(
        "create",
        lazy("live", "live_create"),
        "Put an overlay onto each disk, at one instant: what was active is then a snapshot.",
        f"cdp snapshot live create web {_AT} --disk vd1 --name before-upgrade\n"
        f"cdp snapshot live create web {_AT} --cow --directory /var/tmp",
    )
    save = live.leaf(
        "save",
        lazy("live", "live_save"),
        "Write a COW snapshot to a file of its own, which stays when QEMU ends.",
        f"cdp snapshot live save web monday --output monday.qcow2 {_AT}",
    )
    commit = live.leaf(
        "commit",
        lazy("live", "live_commit"),
        "Write an image into the base's file, else into the next below; it and what lies between go.",
        f"cdp snapshot live commit web root.monday.qcow2 {_AT}",
    )
    pull = live.leaf(
        "pull",
        lazy("live", "live_pull"),
        "Take into an image what lies between it and the base, which go; without a base, all below it.",
        f"cdp snapshot live pull web root.friday.qcow2 {_AT} --base root.qcow2",
    )
    delete = live.leaf(
        "delete",
        lazy("live", "live_delete"),
        "Delete a snapshot; the image above it takes what only this one held.",
        f"cdp snapshot live delete web root.monday.qcow2 {_AT}",
    )
    revert = live.leaf(
        "revert",
        lazy("live", "live_revert"),
        "Give a stopped VM's disk a new overlay on an older image, and reset the VM. What it left stays as a file.",
        f"cdp snapshot live revert web root.monday.qcow2 {_AT}",
    )
    _take_vm(tree, create, save, commit, pull, delete, revert)
    for command in (commit, pull, delete, revert):
        command.add_argument("node", metavar="IMAGE", help="its file's name or path, or its node's name")
    save.add_argument("node", metavar="SNAPSHOT", help="the name of a COW snapshot")
    save.add_argument("--output", type=Path, required=True, metavar="FILE", help="the new file")
    save.add_argument(
        "--format", choices=("raw", "qcow2"), default="qcow2", help="of the file (default: qcow2)"
    )
    create.add_argument(
        "--cow",
        action="store_true",
        help="keep what is overwritten beside a disk that is not QCOW2, until QEMU ends; see docs/snapshots.md",
    )
    for command in (tree, create, save, delete):
        command.add_argument(
            "--nbd-socket",
            type=Path,
            metavar="SOCKET",
            help="where QEMU's NBD server listens, if it has one already (else one is started at the monitor's path + .nbd)",
        )
    for command in (tree, save, commit, pull, delete, revert):
        command.add_argument("--disk", required=True, metavar="DEVICE", help=_DISK)
    create.add_argument(
        "--disk", required=True, metavar="DEVICE", action="append", help=f"{_DISK}; repeatable"
    )
    for command in (create, revert):
        command.add_argument("--name", help="a part of the new file's name (else the time)")
    create.add_argument(
        "--directory", type=Path, metavar="DIR", help="where the new files go (else beside the active image)"
    )
    for command in (commit, pull):
        command.add_argument("--base", metavar="IMAGE", help="an older image, which stays")
    take_yes(commit, pull, delete, revert)


_DISK = "the device's id, its drive, an export's id, or a node of QEMU's"


def _take_vm(*commands: ArgumentParser) -> None:
    for command in commands:
        command.add_argument("vm", metavar="VM", help="what the answer calls it")
        command.add_argument(
            "--qmp",
            type=Path,
            required=True,
            metavar="SOCKET",
            help="the monitor's Unix socket, held by nobody else",
        )
