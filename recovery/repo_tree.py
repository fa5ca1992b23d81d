"""`cdp repo` and `cdp backup` as argparse knows them. Loaded by every command, so it is small."""

from argparse import ArgumentParser

from cdpserver import names
from cdpserver.errors import UsageError
from recovery.arguments import count, point, take_yes
from recovery.tree import Commands, Group, lazy

REPO_VARIABLE = "CDP_REPO"


def add_repositories(commands: Commands) -> None:
    """`cdp repo`, `cdp backup`"""
    _add_repo(commands)
    _add_backup(commands)


def _add_repo(commands: Commands) -> None:
    repo = commands.group("repo", "Backup repositories: where backups are kept, off this machine.")
    init = repo.leaf(
        "init",
        lazy("repo", "init"),
        "Make a repository in an empty directory or a bucket.",
        "cdp repo init /mnt/nas/backups --chunk-size 256K --key-file backup.key",
    )
    init.add_argument(
        "path",
        metavar="PATH",
        help="a directory, or s3://BUCKET/PREFIX?endpoint=URL&region=REGION&profile=PROFILE",
    )
    init.add_argument(
        "--chunk-size",
        type=names.parse_size,
        metavar="SIZE",
        help="what is stored once: a power of two from 64K to 64M; default: 256K (docs/backup.md says why)",
    )
    init.add_argument(
        "--immutable",
        type=names.parse_duration,
        metavar="SPAN",
        help="nobody removes a backup that is younger, such as 30d (docs/backup.md says how far that holds)",
    )
    take_key(init)
    add = repo.leaf(
        "add",
        lazy("repo", "add"),
        "Register a repository with the server, or where it is now: backup:ID is a point then, and policies may name it.",
        "cdp repo add /mnt/nas/backups --key-file /etc/cdp/backup.key",
    )
    forget = repo.leaf(
        "forget",
        lazy("repo", "forget"),
        "Take a repository out of the server's list; nothing in it is touched.",
        "cdp repo forget /mnt/nas/backups",
    )
    repo.leaf(
        "list",
        lazy("repo", "list_"),
        "List the repositories that the server knows, and those that were used on this machine.",
        "cdp repo list",
    )
    show = repo.leaf(
        "show", lazy("repo", "show"), "Show what a repository is and holds.", "cdp repo show /mnt/nas/backups"
    )
    check = repo.leaf(
        "check",
        lazy("repo", "check"),
        "Verify backups and chunks; damage is told as backups, disks and ranges.",
        "cdp repo check /mnt/nas/backups",
    )
    check.add_argument(
        "--quick", action="store_true", help="only whether everything has a place; read no data"
    )
    prune = repo.leaf(
        "prune",
        lazy("repo", "prune"),
        "Remove the backups that a rule does not keep.",
        "cdp repo prune /mnt/nas/backups --keep '7d 4w 12m' --dry-run",
    )
    prune.add_argument(
        "--keep",
        required=True,
        metavar="RULE",
        help="one of each of so many hours, days, weeks, months, years that have any: '7d 4w 12m 5y'",
    )
    prune.add_argument("--keep-last", type=count, default=1, metavar="N", help="and the newest N; default: 1")
    prune.add_argument("--dry-run", action="store_true", help="only say what would happen, and why")
    gc = repo.leaf(
        "gc",
        lazy("repo", "gc"),
        "Delete chunks that no backup needs. Safe beside running backups.",
        "cdp repo gc /mnt/nas/backups",
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    export = repo.leaf(
        "export",
        lazy("repo_stream", "export"),
        "Write backups to stdout as one stream, for tape (> /dev/nst0); what was written is told on stderr.",
        "cdp repo export /mnt/nas/backups --backup latest",
    )
    export.add_argument(
        "--backup", action="append", metavar="ID", type=_id, help="only this one; again for more"
    )
    import_ = repo.leaf(
        "import",
        lazy("repo_stream", "import_"),
        "Read such a stream from stdin (< /dev/nst0) into an empty place, or the repository that it is of.",
        "cdp repo import /mnt/new/backups",
    )
    copy = repo.leaf(
        "copy",
        lazy("repo", "copy"),
        "Copy the backups that another repository lacks to it; they keep their ids.",
        "cdp repo copy /mnt/nas/backups --to /mnt/vault/backups",
    )
    copy.add_argument("--to", required=True, metavar="PATH", help="the repository that they go to")
    keys = copy.add_mutually_exclusive_group()
    keys.add_argument("--to-key-file", metavar="FILE", help="holds its key; each has a key of its own")
    keys.add_argument("--to-key-command", metavar="COMMAND", help="prints its key")
    copy.add_argument("--name", metavar="DISK|VM", help="only those of this disk or VM")
    forget.add_argument("path", metavar="PATH")
    for command in (add, show, check, prune, gc, copy, export, import_):
        command.add_argument("path", metavar="PATH")
        take_key(command)


def _add_backup(commands: Commands) -> None:
    backup = commands.group("backup", "Backups of points, in a repository.")
    run = backup.leaf(
        "run",
        lazy("backup", "run"),
        "Back up a point, or a running VM that has no points here; only what changed since an earlier backup is read. Works"
        " without the server.",
        "cdp backup run web/vda@latest --repo /mnt/nas/backups\n"
        "  cdp backup run mail --libvirt qemu:///system --repo /mnt/nas/backups --freeze",
    )
    run.add_argument(
        "point",
        metavar="DISK@WHEN",
        type=_point_or_vm,
        help="or VM@WHEN, GROUP@WHEN: all disks at one instant, in one backup; with --qmp or --libvirt a VM's name",
    )
    _take_running_vm(run)
    run.add_argument("--full", action="store_true", help="read everything, whatever is known of changes")
    run.add_argument(
        "--max-increments",
        type=count,
        metavar="N",
        help="a full one follows after so many incremental ones; default: 63",
    )
    listing = backup.leaf(
        "list", lazy("backup", "list_"), "List the backups.", "cdp backup list --repo /mnt/nas/backups"
    )
    listing.add_argument("name", metavar="DISK", nargs="?", help="only those of this disk or VM")
    show = backup.leaf(
        "show", lazy("backup", "show"), "Show one backup.", "cdp backup show latest --repo /mnt/nas/backups"
    )
    verify = backup.leaf(
        "verify",
        lazy("backup", "verify"),
        "Read one backup, and compare every chunk with its id.",
        "cdp backup verify latest --repo /mnt/nas/backups",
    )
    remove = backup.leaf(
        "remove",
        lazy("backup", "remove"),
        "Remove a backup; no other one needs it. Space comes back at cdp repo gc.",
        "cdp backup remove latest --repo /mnt/nas/backups --yes",
    )
    take_yes(remove)
    lock = backup.leaf(
        "lock",
        lazy("backup", "lock"),
        "Keep a backup, whatever a rule says.",
        "cdp backup lock latest --repo /mnt/nas/backups --reason audit",
    )
    lock.add_argument("--reason", default="", metavar="TEXT")
    unlock = backup.leaf(
        "unlock",
        lazy("backup", "unlock"),
        "Give a lock up.",
        "cdp backup unlock latest --repo /mnt/nas/backups",
    )
    restore = backup.leaf(
        "restore",
        lazy("restore", "restore"),
        "Write a disk of a backup to a file, a device or an NBD server; interrupted, the same command goes on.",
        "cdp backup restore latest --repo /mnt/nas/backups --output vda.qcow2 --format qcow2 --verify",
    )
    restore.add_argument("--disk", metavar="DISK", help="of a backup of several: which one")
    restore.add_argument(
        "--output",
        required=True,
        metavar="OUTPUT",
        help="a file, a block device, nbd://... or nbd+unix://...",
    )
    restore.add_argument(
        "--format", choices=("raw", "qcow2"), help="of a file; default: raw, of a chain qcow2"
    )
    restore.add_argument(
        "--as",
        choices=("image", "chain"),
        default="image",
        dest="shape",
        help="image (default): all in one. chain: a QCOW2 file for the full backup and one on top of it for each incremental one,"
        " each with what that backup held",
    )
    restore.add_argument(
        "--in-place",
        action="store_true",
        help="onto the image, device or export that is there, with --force: only the blocks that differ are written",
    )
    restore.add_argument(
        "--base", metavar="IMAGE", help="let the image stand on this one, and hold what differs from it"
    )
    restore.add_argument(
        "--sparse", action="store_true", help="also look for zeros inside chunks, and leave them out"
    )
    restore.add_argument("--verify", action="store_true", help="read back and compare")
    restore.add_argument(
        "--force", action="store_true", help="replace what is there; begin an interrupted one anew"
    )
    detach = backup.leaf(
        "detach",
        lazy("backup", "detach"),
        "Take away the forks by which the server reads a backup as a point; else it does so a day after their last use.",
        "cdp backup detach 20261122T201805.250000Z-0badcafe",
    )
    detach.add_argument("id", metavar="ID", type=_id)
    _add_sources(backup)
    for command in (show, verify, remove, lock, unlock, restore):
        command.add_argument(
            "id", metavar="ID", type=_id, help="of cdp backup list, its beginning, or latest"
        )
    for command in (run, listing, show, verify, remove, lock, unlock, restore):
        take_repo(command)


def _add_sources(backup: Group) -> None:
    """`cdp backup now`, `cdp backup source`"""
    now = backup.leaf(
        "now",
        lazy("sources", "now"),
        "Let the server make the backup that a policy asks for, out of its turn.",
        "cdp backup now mail",
    )
    now.add_argument("name", metavar="DISK|VM", type=names.check_disk_name)
    source = backup.group(
        "source",
        "Running VMs that have no points here, which the server backs up as their policies say.",
        "cdp backup source add mail --libvirt qemu:///system --freeze",
    )
    add = source.leaf(
        "add",
        lazy("sources", "add"),
        "Name one, or say where it is now; cdp policy set VM --backup WHEN --backup-to PATH says when.",
        "cdp backup source add mail --libvirt qemu:///system --freeze --or-crash",
    )
    _take_monitor(add)
    source.leaf("list", lazy("sources", "list_"), "List them.", "cdp backup source list")
    remove = source.leaf(
        "remove",
        lazy("sources", "remove"),
        "Forget one, and its policy; its backups stay.",
        "cdp backup source remove mail",
    )
    for command in (add, remove):
        command.add_argument("vm", metavar="VM", type=names.check_name)


def _take_running_vm(run: ArgumentParser) -> None:
    """How a VM is reached that CDP does not protect, and how its backup comes."""
    _take_monitor(run)
    run.add_argument(
        "--sshfs",
        metavar="HOST",
        help="QEMU runs on this host, [USER@]HOST of ssh: the jobs write QCOW2 files over sshfs, which are taken in at the end",
    )
    run.add_argument(
        "--staging",
        metavar="DIR",
        help="with --sshfs: where these files wait here; default: $TMPDIR, else /tmp",
    )
    run.add_argument(
        "--ssh", metavar="COMMAND", help="with --sshfs: how ssh is called, such as 'ssh -p 2222 -i KEY'"
    )


def _take_monitor(run: ArgumentParser) -> None:
    """The monitor of a VM, its disks and its guest agent."""
    run.add_argument(
        "--qmp",
        metavar="PATH",
        help="of a running VM: the socket of a QMP monitor of its QEMU",
    )
    run.add_argument("--libvirt", metavar="URI", help="the same by the libvirt that owns the monitor")
    run.add_argument("--domain", metavar="NAME", help="its domain, if its name is not VM")
    run.add_argument(
        "--disk",
        metavar="DISK",
        action="append",
        default=[],
        help="a drive name, libvirt's target (vda), device id or node name; can be given again; else all that the guest has",
    )
    run.add_argument(
        "--freeze", action="store_true", help="with the guest's file systems frozen, by its agent: grade app"
    )
    run.add_argument(
        "--or-crash",
        action="store_true",
        help="back it up also if the guest cannot be frozen, with its lesser grade",
    )
    run.add_argument(
        "--agent", metavar="PATH", help="the socket of its guest agent; else libvirt's, with --libvirt"
    )


def take_repo(command: ArgumentParser) -> None:
    """Which repository is meant, and its key."""
    command.add_argument("--repo", metavar="PATH", help=f"the repository of a backup; else ${REPO_VARIABLE}")
    take_key(command)


def take_key(command: ArgumentParser) -> None:
    """Where the key of an encrypted repository comes from; never from the command line itself."""
    keys = command.add_mutually_exclusive_group()
    keys.add_argument("--key-file", metavar="FILE", help="holds the key of an encrypted repository")
    keys.add_argument("--key-command", metavar="COMMAND", help="prints the key, such as 'pass show backup'")


def _point_or_vm(text: str) -> str:
    return point(text) if "@" in text or text.startswith(names.BACKUP) else names.check_disk_name(text)


def _id(text: str) -> str:
    shown = text.removeprefix("backup:")
    if not shown or not shown.replace("-", "").replace(".", "").isalnum() or not shown.isascii():
        raise UsageError(f"not a backup: {names.show(text)}", hint="cdp backup list shows their ids")
    return shown
