"""`cdp backup run VM --qmp PATH | --libvirt URI`: a running VM that has no points here. It needs no service."""

import os
import shlex
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from cdpserver.errors import UsageError
from cdpserver.names import check_name
from cdpserver.repository.take import MAX_INCREMENTS
from recovery.backup_text import tell_made
from recovery.bar import moving
from recovery.output import say
from recovery.repositories import location_of, opened_with_key


def run_vm(options: Namespace) -> None:
    """Make one, of all its disks or those that are named, at one instant."""
    from cdpserver.vm.backup.receiver import Where
    from cdpserver.vm.backup.run import Sshfs, Wanted, alone, back_up
    from cdpserver.vm.backup.sshfs import SSH
    from cdpserver.vm.chain.command import over_any
    from cdpserver.vm.connect import check_connection, check_here, connect
    from cdpserver.vm.record import LibvirtDomain, QmpSocket

    vm = _check(options)
    if options.qmp is not None:
        connection: QmpSocket | LibvirtDomain = QmpSocket(os.path.abspath(options.qmp))
    else:
        connection = LibvirtDomain(options.libvirt, options.domain or vm)
    if options.sshfs is None:
        check_here(connection, vm)
    else:
        check_connection(connection)
    wanted = Wanted(
        vm,
        options.disk,
        full=options.full,
        max_increments=MAX_INCREMENTS if options.max_increments is None else options.max_increments,
        agent=_agent(options, vm),
        or_crash=options.or_crash,
        user=_owner(options.qmp),
    )
    location = location_of(options)
    with (
        opened_with_key(options) as (repository, secret),
        alone(repository.place, connection) as who,
        moving(f"backing up {vm}") as bar,
    ):
        if options.sshfs is not None:
            base = Path(options.staging or tempfile.gettempdir()).absolute()
            ssh = shlex.split(options.ssh) if options.ssh else SSH
            wanted = replace(wanted, sshfs=Sshfs(options.sshfs, base / f"cdp-{who}", ssh))
        where = Where(location if location.startswith("s3:") else os.path.abspath(location), secret)
        made = over_any(connect(connection), lambda monitor: back_up(monitor, repository, where, wanted, bar))
    tell_made(options, made)
    if made["not_frozen"]:
        say(f"the guest was not frozen: {made['not_frozen']}")


def _check(options: Namespace) -> str:
    """The VM's name. UsageError."""
    if options.qmp is not None and options.libvirt is not None:
        raise UsageError("two monitors are named", hint="give --qmp or --libvirt")
    if options.qmp is not None and options.domain is not None:
        raise UsageError("--domain goes with --libvirt", hint="leave it away")
    if "@" in options.point:
        raise UsageError(
            "a running VM is backed up as it is now", hint="leave @WHEN away, or --qmp and --libvirt"
        )
    if options.or_crash and not options.freeze:
        raise UsageError("--or-crash goes with --freeze", hint="add --freeze, or leave it away")
    if options.sshfs is None and (options.staging or options.ssh):
        raise UsageError("--staging and --ssh go with --sshfs", hint="add --sshfs HOST, or leave them away")
    if options.sshfs is not None and (not options.sshfs or options.sshfs.startswith("-")):
        raise UsageError("not a host", hint="write --sshfs [USER@]HOST")
    if options.agent is not None and not options.freeze:
        raise UsageError("--agent goes with --freeze", hint="add --freeze, or leave it away")
    return check_name(options.point)


def _agent(options: Namespace, vm: str) -> str | None:
    """The address of the guest's agent, if it is to be frozen."""
    if not options.freeze:
        return None
    if options.agent is not None:
        return str(os.path.abspath(options.agent))
    if options.libvirt is None:
        raise UsageError("which guest agent?", hint="add --agent with the path of its socket")
    return f"{options.libvirt}#{options.domain or vm}"


def _owner(qmp: str | None) -> int | None:
    """Who QEMU runs as: its monitor's socket is that user's."""
    if qmp is None:
        return None
    try:
        return Path(qmp).stat().st_uid
    except OSError:
        return None
