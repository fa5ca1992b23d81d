"""One backup of a running VM that a policy asks for, in a process of its own; repository/scheduled.py makes those of points."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from cdpserver import messages
from cdpserver.errors import NotFoundError
from cdpserver.progress import Progress, to_stdout
from cdpserver.repository import registered
from cdpserver.repository.scheduled import BY_POLICY, find, tidy
from cdpserver.retention.slots import parse_slots
from cdpserver.vm.backup import sources
from cdpserver.vm.backup.receiver import Where
from cdpserver.vm.backup.run import Wanted, alone, back_up
from cdpserver.vm.chain.command import over_any
from cdpserver.vm.connect import connect
from cdpserver.vm.record import Connection, QmpSocket


def run(state_dir: Path, vm: str, *, to: str, keep: str | None) -> dict[str, Any]:
    """Back the VM up; what was made and removed. An error if there is no backup."""
    source = sources.load(state_dir).get(vm)
    if source is None:
        raise NotFoundError(f"there is no source {vm}", hint="cdp backup source list")
    rules = None if keep is None else parse_slots(keep)
    one = find(state_dir, to)
    run_directory = str(state_dir / "run")
    # Root may give its socket to QEMU's user, and nobody else the way through the state directory.
    sockets = None if os.geteuid() == 0 else run_directory
    where = Where(one.path, one.read_key(), cache=run_directory, sockets=sockets)
    wanted = Wanted(
        vm,
        source.disks,
        agent=source.agent_address,
        or_crash=source.or_crash,
        user=_owner(source.connection),
        tags=BY_POLICY,
    )
    progress = _counted(to_stdout())
    with (
        registered.open_registered(state_dir, one) as repository,
        alone(repository.place, source.connection),
    ):
        made = over_any(
            connect(source.connection),
            lambda monitor: back_up(monitor, repository, where, wanted, progress),
        )
        repository.refresh()
        return made | tidy(repository, vm, rules)


def _counted(progress: Progress) -> Any:
    def hear(done: int, total: int) -> None:
        progress(done / max(total, 1))

    return hear


def _owner(connection: Connection) -> int | None:
    """Who QEMU runs as: its monitor's socket is that user's."""
    if not isinstance(connection, QmpSocket):
        return None
    try:
        return Path(connection.path).stat().st_uid
    except OSError:
        return None


def main() -> int:
    """`python -m cdpserver.vm.backup.scheduled`: the result or error as JSON."""
    parser = argparse.ArgumentParser(description="make a backup of a running VM that a policy asks for")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--vm", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--keep")
    o = parser.parse_args()
    return messages.tell(lambda: run(o.state_dir, o.vm, to=o.to, keep=o.keep))


if __name__ == "__main__":
    sys.exit(main())
