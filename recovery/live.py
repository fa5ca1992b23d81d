"""`cdp snapshot live`: a running VM's own snapshots, through QEMU's monitor. They need no service."""

import time
from argparse import Namespace
from typing import Any

from cdpserver import names
from cdpserver.names import format_bytes, format_time
from recovery.bar import moving
from recovery.chain import print_tree
from recovery.output import answer, answer_json, answer_json_items, say
from recovery.remote import ask, on_a_terminal

_STEPS = 1000
"""Of the bar: QEMU says how far a job is in units of its own."""


def live_tree(options: Namespace) -> None:
    """The images of a disk."""
    from cdpserver.vm.chain import command, snapshots

    value = command.over(options.qmp, lambda monitor: snapshots.tree(monitor, options.vm, options.disk))
    if options.json:
        answer_json(value)
    else:
        print_tree(value)


def live_create(options: Namespace) -> None:
    """Overlays at one instant."""
    from cdpserver.vm.chain import command, snapshots

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
    from cdpserver.vm.chain import command, snapshots
    from cdpserver.vm.qmp import Qmp

    if not options.yes and on_a_terminal():
        ask(question)
    with moving(f"{verb} {options.node}") as bar:

        async def do(monitor: Qmp) -> dict[str, Any]:
            def progress(done: float) -> None:
                bar(int(done * _STEPS), _STEPS)

            if verb == "delete":
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
