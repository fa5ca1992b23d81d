"""`cdp protect`: a running VM is protected, or no more."""

import os
import time
from argparse import Namespace
from typing import Any

from cdpserver.errors import UsageError
from recovery.bar import moving
from recovery.client import Client
from recovery.copies import in_short, in_words
from recovery.output import Column, answer, answer_json, answer_table, say
from recovery.remote import client

COLUMNS = (
    Column("name"),
    Column("node"),
    Column("state"),
    Column("uri"),
    Column("copy", "last copy"),
    Column("reason"),
)

LOOK_S = 0.3


def protect(options: Namespace) -> None:
    """Protect the VM, or end that; with `--wait-synced` return when its disks are in sync."""
    service = client(options)
    if options.remove:
        _remove(service, options)
        return
    if options.by is not None:
        if options.agent is not None:
            raise UsageError(
                "--agent does not go with --by: the service cannot reach a guest agent on another host",
                hint="leave --agent away; points of this VM are crash points",
            )
        from recovery.agent_protect import protect_here

        shown = protect_here(options, _monitor(options))
    else:
        body: dict[str, Any] = {
            **_monitor(options),
            "disks": options.disk,
            "wait": options.wait,
            "drive_mirror": options.drive_mirror,
        }
        if options.agent is not None:
            body["agent"] = os.path.abspath(options.agent)
        shown = service.protect_vm(options.vm, body)
    if shown["moves_to"] is not None:
        say(
            f"{options.vm} is mirrored from where it runs until it has moved there: {shown['moves_to']['reason']}"
        )
    if options.wait_synced:
        shown = _wait_synced(service, options.vm, shown)
    if options.json:
        answer_json(shown)
    else:
        rows = [{**disk, "copy": in_short(disk["resync"])} for disk in shown["disks"]]
        answer_table(COLUMNS, rows, nothing="the guest has no disks")


def _monitor(options: Namespace) -> dict[str, str]:
    if (options.qmp is None) == (options.libvirt is None):
        raise UsageError(
            "no monitor is named" if options.qmp is None else "two monitors are named",
            hint="add --qmp with the path of QEMU's QMP socket, or --libvirt with a URI such as qemu:///system",
        )
    if options.qmp is not None:
        if options.domain is not None:
            raise UsageError("--domain goes with --libvirt", hint="leave it away")
        # The service has another working directory.
        return {"qmp": os.path.abspath(options.qmp)}
    return {"libvirt": options.libvirt, **({"domain": options.domain} if options.domain else {})}


def _wait_synced(service: Client, vm: str, shown: dict[str, Any]) -> dict[str, Any]:
    told = ""
    try:
        with moving(f"protecting {vm}") as move:
            while any(disk["state"] != "synced" for disk in shown["disks"]):
                copies = [
                    disk["resync"]
                    for disk in shown["disks"]
                    if disk["resync"] is not None and disk["resync"]["under_way"]
                ]
                if copies:
                    done, total = (sum(copy[key] for copy in copies) for key in ("done_bytes", "total_bytes"))
                    move(done, total)
                reasons = "; ".join(
                    f"{disk['name']}: {disk['reason']}" for disk in shown["disks"] if disk["reason"]
                )
                if reasons and reasons != told:
                    say(told := reasons)
                time.sleep(LOOK_S)
                shown = service.vm(vm)
    except KeyboardInterrupt:
        say(f"{vm} is being protected all the same: cdp status; to end that: cdp protect {vm} --remove")
        raise
    for disk in shown["disks"]:
        if disk["resync"] is not None:
            say(f"{disk['name']}: {in_words(disk['resync'])}")
    return shown


def _remove(service: Client, options: Namespace) -> None:
    gone = service.unprotect_vm(options.vm)
    if options.json:
        answer_json(gone)
        return
    answer(f"{options.vm} is protected no more; its disks keep their history")
    if gone.get("left"):
        say(f"its mirrors may still run in QEMU: {gone['left']}")
