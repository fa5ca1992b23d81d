"""`cdp drill`, `cdp bisect` and `cdp point drills` in the tree of commands."""

from cdpserver import names
from recovery.arguments import instant, point
from recovery.tree import Commands, Group, lazy

DRILL_FIELDS = """
It has passed when the marker, the guest agent and the check have come, as far as they are asked for; with none of them
named, when the agent has. The check is run by the service when the others have come, with CDP_POINT, CDP_DISKS, CDP_URI (the
first disk's fork; CDP_URI_1, CDP_URI_2, ... of all), CDP_QMP, CDP_AGENT and CDP_SERIAL in its environment, and has to end with 0.

fields of --json: id, what, time, state (passed, failed), reason, and in milliseconds since the request export_ms
(disks ready), process_ms (QEMU runs), read_ms and write_ms (the guest's first), rto_ms (it has passed)
"""

BISECT_FIELDS = """
The script gets CDP_POINT, CDP_TIME, CDP_DISKS, CDP_URI (the first disk's fork; CDP_URI_1, CDP_URI_2, ... of all) and
ends with 0 for good, 125 if that point cannot be judged, and anything else below 128 for bad. Interrupted, the same
command goes on.

fields of --json: good and bad (the two points that are next to each other, as DISK|VM@WHEN), good_time, bad_time,
skipped (points between them that could not be judged), probes (how often the script was run), points (how many there were)
"""


def add_drill(commands: Commands) -> None:
    """`cdp drill`"""
    drill = commands.leaf(
        "drill",
        lazy("drill", "drill"),
        "Boot a point apart from everything, wait for a sign of life, and record how long that took.",
        "cdp drill web@latest --vm-command /etc/cdp/web.qemu --marker 'login:'",
    )
    drill.add_argument("point", metavar="DISK|VM@WHEN", type=point)
    drill.add_argument("--marker", metavar="REGEX", help="a line on the guest's first serial port")
    drill.add_argument("--agent", action="store_true", help="an answer of the guest agent")
    drill.add_argument("--check", metavar="SCRIPT", help="a program of the server's host that ends with 0")
    drill.add_argument("--within", metavar="SPAN", type=_span, default="5m", help="default: 5m")
    drill.add_argument(
        "--vm-command",
        metavar="FILE",
        help="a QEMU command line with {disk:NAME} for the disks; else a machine like that of the protected VM",
    )
    drill.add_argument("--accel", choices=("tcg", "kvm", "auto"), help="else as FILE says, or tcg")
    drill.add_argument("--force", action="store_true", help="also a point that is unordered")
    drill.epilog = f"{drill.epilog}{DRILL_FIELDS}"


def add_drills(group: Group) -> None:
    """`cdp point drills`"""
    drills = group.leaf(
        "drills", lazy("drill", "drills"), "List what drills have shown.", "cdp point drills web"
    )
    drills.add_argument("name", metavar="DISK|VM", nargs="?", type=names.check_disk_name)


def add_bisect(commands: Commands) -> None:
    """`cdp bisect`"""
    bisect = commands.leaf(
        "bisect",
        lazy("bisect", "bisect"),
        "Find the last good point between two, by a script that is run on forks of points.",
        "cdp bisect web --good -1d --bad latest --run ./is-it-good",
    )
    bisect.add_argument("name", metavar="DISK|VM", type=names.check_disk_name)
    bisect.add_argument(
        "--good",
        required=True,
        metavar="WHEN",
        type=instant,
        help="an instant that is known to be good; or backup:ID, then backups are searched",
    )
    bisect.add_argument("--bad", required=True, metavar="WHEN", type=instant, help="a later one that is not")
    bisect.add_argument("--run", required=True, metavar="SCRIPT", dest="script", help="what tells them apart")
    bisect.add_argument(
        "--log", metavar="FILE", help="where the probes are noted; else in $XDG_STATE_HOME/cdp"
    )
    bisect.add_argument("--again", action="store_true", help="forget what an interrupted one has found")
    bisect.add_argument("--force", action="store_true", help="also points that are unordered")
    bisect.epilog = f"{bisect.epilog}{BISECT_FIELDS}"


def _span(text: str) -> str:
    names.parse_duration(text)
    return text
