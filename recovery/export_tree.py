"""`cdp export` as argparse knows it. Loaded by every command, so it is small."""

from recovery.arguments import take_point
from recovery.tree import Commands, lazy


def add_export(commands: Commands) -> None:
    """`cdp export`"""
    export = commands.leaf(
        "export",
        lazy("export", "export"),
        "Write a point to a file, a device or an NBD server. Works without the server; interrupted, the same command goes on.",
        "cdp export web/vda@-90s --output vda.qcow2 --format qcow2 --verify",
    )
    take_point(export)
    export.add_argument(
        "--output",
        required=True,
        metavar="OUTPUT",
        help="a file, a block device, nbd://... or nbd+unix://...; of a VM or group a directory",
    )
    export.add_argument("--format", choices=("raw", "qcow2"), default="raw", help="of a file; default: raw")
    export.add_argument(
        "--sparse", action="store_true", help="also look for zeros in what was written, and leave them out"
    )
    export.add_argument(
        "--verify",
        action="store_true",
        help="read back and compare digests; what is there already is compared only",
    )
    export.add_argument(
        "--force", action="store_true", help="replace what is there; begin an interrupted export anew"
    )
