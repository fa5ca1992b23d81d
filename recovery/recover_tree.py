"""`cdp recover` as argparse knows it. Loaded by every command, so it is small."""

from recovery.arguments import point
from recovery.tree import Commands, lazy


def add_recover(commands: Commands) -> None:
    """`cdp recover`"""
    recover = commands.group("recover", "run a VM from a point at once, and move its disks home meanwhile")
    start = recover.leaf(
        "start",
        lazy("recover", "start"),
        "Make writable disks of a point at once; when the VM runs on them, move them to primary storage, unseen by the guest.",
        "cdp recover start web@-90s --to /var/lib/vms --qmp /run/web.qmp\n"
        "  cdp recover start web@-90s --to /var/lib/vms --qmp /run/web.qmp --attach\n"
        "  cdp recover start web@-90s --to /var/lib/vms --libvirt qemu:///system --vm-command /etc/cdp/web.xml",
    )
    start.add_argument("point", metavar="DISK|VM@WHEN", type=point)
    start.add_argument(
        "--to",
        default=[],
        action="append",
        metavar="[DISK=]PATH",
        help="the directory, file or block device on primary storage that all disks, or one, move to; may be repeated",
    )
    start.add_argument(
        "--mode",
        choices=("mirror", "stream"),
        default="mirror",
        help="mirror (default): the VM runs on writable forks until all is copied. stream: it runs at home from the start, on"
        " QCOW2 files that are filled from the point",
    )
    start.add_argument("--qmp", metavar="PATH", help="the VM's monitor: -qmp unix:PATH,server=on,wait=off")
    start.add_argument(
        "--attach",
        nargs="?",
        choices=("virtio-blk", "virtio-scsi", "nodes"),
        const="virtio-blk",
        help="hand the disks to the QEMU at --qmp, which is there already, as devices (default: virtio-blk); one that was started"
        " with -S begins. nodes: as block nodes alone",
    )
    start.add_argument(
        "--vm-command",
        metavar="FILE",
        help="or a QEMU command line, with {disk:NAME} for the disks, that the service starts; with --libvirt a domain's XML",
    )
    start.add_argument(
        "--libvirt",
        metavar="URI",
        help="or the libvirt that the service starts the VM in; without --vm-command a machine of its own",
    )
    start.add_argument(
        "--domain", metavar="NAME", help="what it is called there; default: as the recovered VM"
    )
    start.add_argument("--accel", choices=("tcg", "kvm", "auto"), help="else as FILE says, or tcg")
    start.add_argument(
        "--isolated",
        action="store_true",
        help="only a look, without --to: no network, and nothing of it stays after cdp recover abort",
    )
    start.add_argument("--name", metavar="NAME", help="the recovered VM's name: its forks are NAME/DISK")
    start.add_argument(
        "--format",
        choices=("qcow2", "raw"),
        help="at home; default: qcow2, and raw for a block device or a file named .raw or .img",
    )
    start.add_argument(
        "--as",
        dest="shape",
        choices=("image", "chain"),
        default="image",
        help="image (default): one file. chain: the file at home stands on an image of the point, and that on"
        " the base image",
    )
    start.add_argument(
        "--base",
        metavar="FILE",
        help="of a chain: an image on primary storage; what it holds of the point is not copied. Default: the image that the disk"
        " was made from, if that is there unchanged",
    )
    start.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the old VM's disks: they are kept until the commit, and their history goes on; default: a new VM beside it",
    )
    start.add_argument(
        "--no-protect",
        dest="protect",
        action="store_false",
        help="do not protect the VM again when it is home",
    )
    start.add_argument(
        "--force",
        action="store_true",
        help="also from a point that is unordered or next to a gap, and onto a block device, whose content is lost",
    )
    recover.leaf("list", lazy("recover", "list_all"), "List recoveries.", "cdp recover list")
    show = recover.leaf(
        "show", lazy("recover", "show"), "Show a recovery.", "cdp recover show recovery-1f00aa2b --follow"
    )
    show.add_argument("--follow", action="store_true", help="until it is done, with a bar on a terminal")
    abort = recover.leaf(
        "abort",
        lazy("recover", "abort"),
        "End the migration: the VM goes on where it is.",
        "cdp recover abort recovery-1f00aa2b",
    )
    retry = recover.leaf(
        "retry",
        lazy("recover", "retry"),
        "Begin a recovery that failed or was aborted again, with all that the VM has written.",
        "cdp recover retry recovery-1f00aa2b",
    )
    commit = recover.leaf(
        "commit",
        lazy("recover", "commit"),
        "Say that the VM stays at home; there is no undo from here on. The forks stay until they are removed.",
        "cdp recover commit recovery-1f00aa2b",
    )
    undo = recover.leaf(
        "undo",
        lazy("recover", "undo"),
        "Move the VM back onto its forks, with all that it has written since.",
        "cdp recover undo recovery-1f00aa2b",
    )
    undo.add_argument(
        "--discard",
        action="store_true",
        help="of a VM that does not run: let go of what it wrote since the pivot, or, when streaming, since the start",
    )
    for command in (show, abort, retry, commit, undo):
        command.add_argument("recovery", metavar="ID", help="a recovery's id, or its VM's name")
