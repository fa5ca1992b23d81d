"""The commands of files in the tree: `cdp file`."""

import argparse

from cdpserver import names
from cdpserver.errors import UsageError
from cdpserver.files import MAX_PREVIEW, PREVIEW_BYTES
from recovery.arguments import place, take_disk, take_place, when
from recovery.tree import Commands, lazy


def _volume(text: str) -> str:
    names.split_volume(f"d@latest/{text}")
    return text


def _newer(text: str) -> str:
    names.wall_time_of(text, now_ns=0)
    return text


def _preview(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:9]) <= MAX_PREVIEW:
        raise UsageError(
            f"not a number of bytes: {names.show(text)}", hint=f"write a number from 1 to {MAX_PREVIEW}"
        )
    return int(text)


def add_files(commands: Commands) -> None:
    """`cdp file`."""
    file = commands.group("file", "the files in a point, read without a mount")
    ls = file.leaf(
        "ls",
        lazy("files", "ls"),
        "List a directory as it was; without a volume, the volumes of a disk that has several.",
        "cdp file ls web/vda@-5m/p2 /var/www",
    )
    cat = file.leaf(
        "cat", lazy("files", "cat"), "Print a file as it was.", "cdp file cat web/vda@-5m /etc/fstab"
    )
    stat = file.leaf(
        "stat",
        lazy("files", "stat"),
        "Show all that is known of a file.",
        "cdp file stat web/vda@latest /etc",
    )
    preview = file.leaf(
        "preview",
        lazy("files", "preview"),
        "Show the head of a file: text, else bytes in hex; of an image its dimensions.",
        "cdp file preview web/vda@-1h /srv/logo.png",
    )
    preview.add_argument(
        "--bytes",
        type=_preview,
        default=PREVIEW_BYTES,
        metavar="N",
        help=f"how many; default: {PREVIEW_BYTES}",
    )
    find = file.leaf(
        "find",
        lazy("files", "find"),
        "List what is below a directory, by name, time or type.",
        "cdp file find web/vda@-1d/lv/vg0/home /anna --name '*.odt' --newer -2d",
    )
    find.add_argument("--name", metavar="PATTERN", help="its name, as in the shell: '*.txt'")
    find.add_argument("--regex", metavar="REGEX", help="its path below the directory, a regular expression")
    find.add_argument("--newer", metavar="WHEN", type=_newer, help="changed after this time")
    find.add_argument("--type", choices=("file", "dir", "link"))
    get = file.leaf(
        "get",
        lazy("files_get", "get"),
        "Fetch a file, or a directory with all that is below. Run again, it goes on where it ended.",
        "cdp file get web/vda@-5m/p2 /var/www --output rescued",
    )
    into = get.add_mutually_exclusive_group(required=True)
    into.add_argument(
        "--output", metavar="DIR", help="where it is put, under its name; made if it is not there"
    )
    into.add_argument("--tar", metavar="IMAGE", help="a tar file instead; - is the standard output")
    get.add_argument("--force", action="store_true", help="replace files of the same name")
    history = file.leaf(
        "history",
        lazy("files_time", "history"),
        "List the versions of a file: from which point to which, and what changed.",
        "cdp file history web/vda /etc/fstab --since -2d",
    )
    take_disk(history)
    _add_path(history, needs_path=True)
    history.add_argument(
        "--volume", type=_volume, metavar="VOLUME", help="where there are several: p2 or lv/VG/LV"
    )
    history.add_argument("--since", metavar="WHEN", type=when, help="default: as long as there are points")
    history.add_argument("--until", metavar="WHEN", type=when, help="default: now")
    diff = file.leaf(
        "diff",
        lazy("files_time", "diff"),
        "List the files added, removed and changed from one point to another.",
        "cdp file diff web/vda@-1d web/vda@latest /etc",
    )
    take_place(diff)
    diff.add_argument("other", metavar="DISK@WHEN", type=place, help="the point that it is compared with")
    _add_path(diff, needs_path=False)
    for command in (ls, cat, stat, preview, find, get):
        _add_place(command, needs_path=command not in (ls, find))
        command.add_argument(
            "--key-file", metavar="PATH", help="the passphrase of a LUKS volume, in a file (LUKS 1)"
        )
    for command in (ls, preview, find):
        command.add_argument("--lock", action="store_true", help="and lock the point, for a restore later")


def _add_place(command: argparse.ArgumentParser, *, needs_path: bool) -> None:
    take_place(command)
    _add_path(command, needs_path=needs_path)


def add_mount(commands: Commands) -> None:
    """`cdp mount` and `cdp umount`."""
    mount = commands.leaf(
        "mount",
        lazy("mount", "mount"),
        "Show a point as a directory, read-only: the disk as a file, and the file systems in it.",
        "cdp mount web/vda@-5m there",
    )
    take_place(mount)
    mount.add_argument(
        "--kernel",
        action="store_true",
        help="have this host's kernel mount one file system read-only (root): exact, and a risk if the guest means harm",
    )
    mount.add_argument("--foreground", action="store_true", help="stay until it is unmounted")
    umount = commands.leaf(
        "umount", lazy("mount", "umount"), "Take such a directory away.", "cdp umount there"
    )
    for command in (mount, umount):
        command.add_argument("directory", metavar="DIR", help="an empty directory")


def _add_path(command: argparse.ArgumentParser, *, needs_path: bool) -> None:
    command.add_argument(
        "path",
        metavar="FILE",
        nargs=None if needs_path else "?",
        default="/",
        help="its path in the file system",
    )
