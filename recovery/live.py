"""`cdp snapshot live`: a running VM's own snapshots, through QEMU's monitor. They need no service."""

import time
from argparse import Namespace
from typing import Any

from cdpserver import names
from cdpserver.errors import UsageError
from cdpserver.names import format_bytes, format_time
from recovery.bar import moving
from recovery.chain import print_tree
from recovery.output import answer, answer_json, answer_json_items, say
from recovery.remote import ask, on_a_terminal

_STEPS = 1000
"""Of the bar: QEMU says how far a job is in units of its own."""


def live_tree(options: Namespace) -> None:
    """The images of a disk."""
    from cdpserver.vm.chain import command, cowtree, snapshots
    from cdpserver.vm.chain.cow import Server
    from cdpserver.vm.qmp import Qmp

    async def do(monitor: Qmp) -> dict[str, Any]:
        value = await snapshots.tree(monitor, options.vm, options.disk)
        socket = Server.of(options.qmp, options.nbd_socket).socket
        return await cowtree.add_to_tree(monitor, options.disk, value, socket=socket)

    value = command.over(options.qmp, do)
    if options.json:
        answer_json(value)
    else:
        print_tree(value)


def live_create(options: Namespace) -> None:
    """Overlays, or COW snapshots, at one instant."""
    from cdpserver.vm.chain import command, snapshots

    if options.cow:
        _create_cow(options)
        return
    if options.nbd_socket:
        raise UsageError("--nbd-socket is of COW snapshots", hint="add --cow, or leave it out")
    name = _name(options)
    directory = options.directory.absolute() if options.directory else None
    made = command.over(
        options.qmp,
        lambda monitor: snapshots.create(monitor, options.vm, options.disk, name=name, directory=directory),
    )
    if options.json:
        answer_json_items(made)
    for one in made:
        if not options.json:
            answer(f"{one['snapshot']} of {one['disk']} is a snapshot; the VM writes to {one['active']}")
        if one["warning"]:
            say(f"warning: {one['warning']}")


def _create_cow(options: Namespace) -> None:
    from cdpserver.vm.chain import command, cow

    name, server = _name(options), cow.Server.of(options.qmp, options.nbd_socket)
    directory = options.directory.absolute() if options.directory else None
    made = command.over(
        options.qmp,
        lambda monitor: cow.create(
            monitor,
            options.vm,
            options.disk,
            name=name,
            directory=directory,
            server=server,
        ),
    )
    if options.json:
        answer_json_items(made)
    for one in made:
        if not options.json:
            answer(f"{one['snapshot']} of {one['disk']}, until QEMU ends: {one['uri']}")
        if one["warning"]:
            say(f"warning: {one['warning']}")


def live_save(options: Namespace) -> None:
    """A COW snapshot as a file."""
    from cdpserver.vm.chain import command, cow

    server, output = cow.Server.of(options.qmp, options.nbd_socket), options.output.absolute()
    found, size = command.over(options.qmp, lambda monitor: cow.find(monitor, options.disk, options.node))
    with moving(f"saving {options.node}") as bar:
        cow.save(
            found,
            server,
            output,
            format=options.format,
            progress=lambda done: bar(int(done * _STEPS), _STEPS),
        )
    said = {
        "disk": options.disk,
        "snapshot": found.name,
        "time_ns": found.time_ns,
        "output": str(output),
        "format": options.format,
        "size": size,
    }
    if options.json:
        answer_json(said)
    else:
        answer(f"{said['output']} holds {said['snapshot']} of {said['disk']}")


def _name(options: Namespace) -> str:
    given = options.name or format_time(time.time_ns()).replace(":", "").replace("-", "")
    return names.check_name(given)


def live_revert(options: Namespace) -> None:
    """Back to an older image."""
    from cdpserver.vm.chain import command
    from cdpserver.vm.chain.revert import revert

    if not options.yes and on_a_terminal():
        ask(f"Reset {options.vm}, with {options.disk} as it was in {options.node}?")
    name = _name(options)
    said = command.over(
        options.qmp, lambda monitor: revert(monitor, options.vm, options.disk, options.node, name=name)
    )
    if options.json:
        answer_json(said)
        return
    answer(
        f"{said['disk']} of {said['vm']} is as in {said['snapshot']} and writes to {said['active']}; "
        f"{said['left']} is kept. The VM is reset and stopped: start it"
    )


def live_commit(options: Namespace) -> None:
    """Into the base."""
    below = f"up from {options.base}" if options.base else "next below"
    _merge(options, "commit", f"Write {options.node} into the image {below}? It then holds the newest.")


def live_pull(options: Namespace) -> None:
    """Those below go."""
    below = f"between it and {options.base}" if options.base else "below it"
    _merge(options, "pull", f"Delete the images {below} of {options.node}?")


def live_delete(options: Namespace) -> None:
    """One goes."""
    _merge(options, "delete", f"Delete the snapshot {options.node}?")


def _merge(options: Namespace, verb: str, question: str) -> None:
    from cdpserver.vm.chain import command, cow, snapshots
    from cdpserver.vm.qmp import Qmp

    if not options.yes and on_a_terminal():
        ask(question)
    with moving(f"{verb} {options.node}") as bar:

        async def do(monitor: Qmp) -> dict[str, Any]:
            def progress(done: float) -> None:
                bar(int(done * _STEPS), _STEPS)

            if verb == "delete":
                server = cow.Server.of(options.qmp, options.nbd_socket)
                gone = await cow.delete(monitor, options.disk, options.node, server=server)
                if gone is not None:
                    return gone
                return await snapshots.delete(monitor, options.disk, options.node, progress=progress)
            work = snapshots.commit if verb == "commit" else snapshots.pull
            return await work(monitor, options.disk, options.node, base=options.base, progress=progress)

        said = command.over(options.qmp, do)
    if options.json:
        answer_json(said)
        return
    gone = ", ".join(said["removed"]) or "nothing"
    kept = f"; {', '.join(said['kept'])} left the chain and was kept" if said["kept"] else ""
    freed = format_bytes(max(said["freed_bytes"], 0))
    answer(f"{gone} of {said['disk']} removed{kept}; {said['stays']} stays; {freed} freed")
