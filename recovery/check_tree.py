"""The commands that verify what is stored, and mend it."""

import re

from cdpserver import names
from cdpserver.errors import UsageError
from recovery.arguments import count, take_disk
from recovery.tree import Commands, lazy


def _percent(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}%?", text) or not 1 <= int(text.rstrip("%")) <= 100:
        raise UsageError(f"not a share: {names.show(text)}", hint="write percent, from 1 to 100")
    return int(text.rstrip("%"))


def add(commands: Commands) -> None:
    """`cdp check`, `cdp repair`."""
    _add_check(commands)
    repair = commands.leaf(
        "repair",
        lazy("repair", "repair"),
        "Show what can be made anew of a damaged disk, and do it when the plan is named. Needs no server, and disturbs none.",
        "cdp repair web/vda --apply 3f0c2a91be77",
    )
    take_disk(repair)
    repair.add_argument(
        "--apply", metavar="PLAN", help="do what this plan says; without it the plan is shown"
    )
    repair.add_argument(
        "--full", action="store_true", help="also compare base points' content with the journal"
    )


def _add_check(commands: Commands) -> None:
    check = commands.leaf(
        "check",
        lazy("check", "check"),
        "Verify everything of a disk: segments, payload, index, base points, catalog. Needs no server, and disturbs none.",
        "cdp check web/vda --within 30m --resume",
    )
    check.add_argument("disk", metavar="DISK|VM", type=names.check_disk_name)
    check.add_argument(
        "--quick", action="store_true", help="only headers, and what stands on what: no payload"
    )
    check.add_argument(
        "--full", action="store_true", help="also compare the base points' content with the journal"
    )
    check.add_argument(
        "--sample", metavar="PERCENT", type=_percent, help="the payload of so many records, chosen at random"
    )
    check.add_argument("--seed", metavar="N", type=count, help="choose those of an earlier sample again")
    check.add_argument(
        "--within",
        metavar="DURATION",
        type=names.parse_duration,
        help="end after that; headers are gone through all the same, since what is damaged is placed by them",
    )
    check.add_argument("--resume", action="store_true", help="go on where a check with --within ended")
    check.add_argument(
        "--chain", action="store_true", help="also prove by the hash chain that history was not rewritten"
    )
    check.add_argument(
        "--anchor",
        metavar="FILE",
        help="with --chain: compare with the heads kept in FILE, somewhere else, and keep the new ones there",
    )
    check.add_argument(
        "--forget",
        metavar="DISK",
        action="append",
        default=[],
        type=names.check_disk_name,
        help="with --anchor: what FILE has of this disk means nothing any more, since it was removed or made anew, "
        "or its chain was begun anew by cdp repair",
    )
    check.add_argument(
        "--files",
        action="store_true",
        help="name the guest's files that damaged bytes belong to: up to 20 of each place, or that it cannot be told",
    )
