"""The commands about base points and their chains, as argparse knows them. Loaded by every command, so it is small."""

from cdpserver import names
from recovery.tree import Commands, lazy


def _point(text: str) -> str:
    names.parse_point(text)
    return text


def _when(text: str) -> str:
    names.parse_when(text)
    return text


def add(commands: Commands) -> None:
    """`cdp bp` and `cdp snapshot`"""
    bp = commands.group("bp", "base points: QCOW2 snapshots that need no server")
    cut = bp.leaf(
        "cut", lazy("remote", "bp_cut"), "Cut a base point and wait for its file.", "cdp bp cut web/vda"
    )
    bp_list = bp.leaf("list", lazy("remote", "bp_list"), "List the base points.", "cdp bp list web/vda")
    rebuild = bp.leaf(
        "rebuild",
        lazy("chain", "bp_rebuild"),
        "Make the file of a base point anew from the journal, when it was damaged or lost.",
        "cdp bp rebuild web/vda@bp:3",
    )
    rebuild.add_argument("point", metavar="DISK@WHEN", type=_point, help="as DISK@bp:N")
    for command in (cut, bp_list):
        command.add_argument("disk", metavar="DISK", type=names.check_disk_name)
    snapshot = commands.group("snapshot", "chains and trees of base points")
    tree = snapshot.leaf(
        "tree",
        lazy("chain", "snapshot_tree"),
        "Show what follows on what: base points, forks, locked points, with the bytes of each. Works without the server.",
        "cdp snapshot tree web/vda",
    )
    tree.add_argument("disk", metavar="DISK", type=names.check_disk_name)
    delete = snapshot.leaf(
        "delete",
        lazy("chain", "snapshot_delete"),
        "Delete a base point; the one after it takes what only this one's file held.",
        "cdp snapshot delete web/vda@bp:3",
    )
    pull = snapshot.leaf(
        "pull",
        lazy("chain", "snapshot_pull"),
        "Delete the base points below one, down to the base, which stays; without a base, all of them.",
        "cdp snapshot pull web/vda@bp:7 --base bp:3",
    )
    commit = snapshot.leaf(
        "commit",
        lazy("chain", "snapshot_commit"),
        "Make one of a base point and those below it, the base included (else the next below). It holds the newest.",
        "cdp snapshot commit web/vda@bp:7 --base bp:3",
    )
    for command in (delete, pull, commit):
        command.add_argument("point", metavar="DISK@WHEN", type=_point)
        command.add_argument("--yes", action="store_true", help="do not ask")
    for command in (pull, commit):
        command.add_argument("--base", metavar="WHEN", type=_when, help="an older base point, as bp:N")
