"""`cdp backup source`, `cdp backup now`: running VMs that the service backs up, and backups out of their turn."""

import os
from argparse import Namespace

from recovery.backup_text import tell_made
from recovery.output import Column, answer_json, answer_table
from recovery.remote import answer_one, client

COLUMNS = tuple(map(Column, ("vm", "qmp", "libvirt", "domain", "disks", "freeze")))


def add(options: Namespace) -> None:
    """Name one."""
    said = {
        "qmp": options.qmp and os.path.abspath(options.qmp),
        "libvirt": options.libvirt,
        "domain": options.domain,
        "disks": options.disk,
        "freeze": options.freeze,
        "agent": options.agent and os.path.abspath(options.agent),
        "or_crash": options.or_crash,
    }
    answer_one(options, client(options).add_source(options.vm, said))


def list_(options: Namespace) -> None:
    """Those that were named."""
    found = client(options).sources()
    if options.json:
        answer_json(found)
        return
    rows = [row | {"disks": " ".join(row["disks"]) or "all"} for row in found]
    answer_table(COLUMNS, rows, nothing="no running VM was named; cdp backup source add names one")


def remove(options: Namespace) -> None:
    """Forget one."""
    answer_one(options, client(options).remove_source(options.vm))


def now(options: Namespace) -> None:
    """The backup that a policy asks for."""
    tell_made(options, client(options).run_backup(options.name))
