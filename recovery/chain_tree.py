"""The commands about base points and their chains, as argparse knows them. Loaded by every command, so it is small."""

from recovery import live_tree
from recovery.arguments import take_disk, take_point, take_yes, when
from recovery.tree import Commands, lazy


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
    take_point(rebuild, help="as DISK@bp:N")
    take_disk(cut, bp_list)
    snapshot = commands.group("snapshot", "chains and trees of base points")
    tree = snapshot.leaf(
        "tree",
        lazy("chain", "snapshot_tree"),
        "Show what follows on what: base points, forks, locked points, with the bytes of each. Works without the server.",
        "cdp snapshot tree web/vda",
    )
    take_disk(tree)
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
    take_point(delete, pull, commit, help="as DISK@bp:N, or another name of that instant")
    take_yes(delete, pull, commit)
    for command in (pull, commit):
        command.add_argument("--base", metavar="WHEN", type=when, help="an older base point, as bp:N")
    live_tree.add(snapshot)
