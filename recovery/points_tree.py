"""Points and groups in the tree of commands: `cdp point`, `cdp uri`, `cdp group`."""

from cdpserver import names
from recovery.arguments import count, take_place, take_point, when
from recovery.drill_tree import add_drills
from recovery.repo_tree import take_repo
from recovery.retention_tree import add_locks
from recovery.tree import Commands, lazy


def add_points(commands: Commands) -> None:
    """`cdp point`, `cdp uri`"""
    point = commands.group("point", "recovery points and bookmarks")
    listing = point.leaf(
        "list",
        lazy("points", "point_list"),
        "List points, oldest first.",
        "cdp point list web/vda --since -10m --kind rp --limit 20",
    )
    listing.add_argument("disk", metavar="DISK|VM", nargs="?", type=names.check_disk_name)
    listing.add_argument(
        "--vm", metavar="VM", type=names.check_name, help="a VM or group: where all its disks are good"
    )
    listing.add_argument("--since", metavar="WHEN", type=when)
    listing.add_argument("--until", metavar="WHEN", type=when)
    listing.add_argument("--kind", choices=("rp", "bp", "bookmark"))
    listing.add_argument("--limit", metavar="N", type=count, help="only the newest N")
    mark = point.leaf(
        "mark",
        lazy("points", "point_mark"),
        "Give the newest instant a name; of a VM or group the same instant of all its disks.",
        "cdp point mark web --name before-upgrade",
    )
    mark.add_argument("disk", metavar="DISK|VM", type=names.check_disk_name)
    mark.add_argument("--name", required=True, type=names.check_bookmark)
    mark.add_argument(
        "--freeze",
        action="store_true",
        help="with the guests' file systems frozen, by their agents: grade app",
    )
    mark.add_argument(
        "--or-crash",
        action="store_true",
        help="set it also if a guest cannot be frozen, with its lesser grade",
    )
    show = point.leaf(
        "show",
        lazy("points", "point_show"),
        "Show one instant: its grade, and what that rests on.",
        "cdp point show web@-90s --json",
    )
    take_point(show)
    add_locks(point)
    add_drills(point)
    uri = commands.leaf(
        "uri",
        lazy("points", "uri"),
        "Print the NBD URI of a point, or of a volume in it: always of the same instant. Of a VM or group one for each disk.",
        "nbdinfo $(cdp uri web/vda@-90s)",
    )
    take_place(uri)
    take_repo(uri)


def add_groups(commands: Commands) -> None:
    """`cdp group`"""
    group = commands.group("group", "VMs and disks that are cut at one instant")
    add = group.leaf(
        "add",
        lazy("groups", "add"),
        "Make a group, or add members to one. Then: cdp point list, mark, lock and the rest, by its name.",
        "cdp group add shop web db/vda",
    )
    group.leaf("list", lazy("groups", "list_all"), "List the groups.", "cdp group list")
    show = group.leaf("show", lazy("groups", "show"), "Show a group, and its disks.", "cdp group show shop")
    remove = group.leaf(
        "remove",
        lazy("groups", "remove"),
        "Take members out of a group, or the whole group away. Disks and their history stay.",
        "cdp group remove shop db/vda",
    )
    for command in (add, show, remove):
        command.add_argument("name", metavar="GROUP", type=names.check_name)
    for command, some in ((add, "+"), (remove, "*")):
        command.add_argument("members", metavar="DISK|VM", nargs=some, type=names.check_disk_name)


def add_rpo(commands: Commands) -> None:
    """`cdp rpo`"""
    rpo = commands.leaf(
        "rpo",
        lazy("rpo", "rpo"),
        "Show what could have been lost, and when: a row a second for an hour, a row a minute for a week.",
        "cdp rpo web --at 2026-11-22T20:18:05Z",
    )
    rpo.add_argument("disk", metavar="DISK|VM", type=names.check_disk_name)
    rpo.add_argument("--at", metavar="WHEN", type=when, help="what was so at this time")
    rpo.add_argument("--since", metavar="WHEN", type=when)
    rpo.add_argument("--until", metavar="WHEN", type=when)
    rpo.add_argument("--limit", metavar="N", type=count, help="only the newest N of each disk")
