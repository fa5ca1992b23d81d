"""One backup that a policy asks for, in a process of its own: made, old ones removed by the rule, copied to a second repository.

The rule counts and removes backups of that VM or disk that policies made; those of an operator stay. What fails after the backup
is whole is said beside it, and done by the next one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cdpserver import messages, names
from cdpserver.errors import CdpError, NotFoundError, RefusedError
from cdpserver.progress import Progress, part, to_stdout
from cdpserver.repository import gc, prune, registered
from cdpserver.repository.copy import copy
from cdpserver.repository.locks import locks
from cdpserver.repository.record import Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.source import held_points
from cdpserver.repository.take import back_up
from cdpserver.retention.slots import Rule, parse_slots

BY_POLICY = {"by": "policy"}
"""The tag of backups that a policy's rule may remove."""


def run(
    state_dir: Path, name: str, points: list[str], *, to: str, copy_to: str | None, keep: str | None
) -> dict[str, Any]:
    """Back `points` up as `name`; what was made, removed and copied. An error if there is no backup."""
    progress = to_stdout()
    rules = None if keep is None else parse_slots(keep)
    with (
        _opened(state_dir, to) as repository,
        held_points(state_dir, [names.parse_point(point) for point in points]) as sources,
    ):
        made = back_up(repository, sources, name, tags=BY_POLICY, progress=part(progress, 0, 0.7))
        subject = name.partition("@")[0]
        said = made.show() | _tidy(repository, subject, rules)
        if copy_to is not None:
            said |= _copied(state_dir, repository, copy_to, subject, rules, part(progress, 0.8, 1))
    return said


def _opened(state_dir: Path, where: str) -> Repository:
    known = registered.load(state_dir).values()
    one = next((one for one in known if where in (one.id, one.path)), None)
    if one is None:
        raise NotFoundError(f"the repository {where} is not registered", hint=f"cdp repo add {where}")
    return registered.open_registered(state_dir, one)


def _tidy(repository: Repository, subject: str, rules: tuple[Rule, ...] | None) -> dict[str, Any]:
    """Remove what the rule does not keep, and give its room back."""
    if rules is None:
        return {"removed": 0, "freed_bytes": 0}
    mine = [backup for backup in repository.backups() if _by_policy(backup, subject)]
    immutable = repository.config.immutable_ns
    verdicts = prune.plan(
        mine,
        rules,
        locked=locks(repository),
        immutable_ns=immutable,
        lived_ns=repository.now_ns(),
    )
    dropped = [verdict.backup for verdict in verdicts if not verdict.keep]
    for backup in dropped:
        repository.place.delete(f"backups/{backup.id}")
    freed = 0
    if dropped:
        try:
            freed = gc.sweep(repository).freed_bytes
        except RefusedError:  # another one runs, and takes it with it or leaves it to the next
            freed = 0
    return {"removed": len(dropped), "freed_bytes": freed}


def _by_policy(backup: Backup, subject: str) -> bool:
    return backup.name.partition("@")[0] == subject and backup.tags.items() >= BY_POLICY.items()


def _copied(
    state_dir: Path,
    repository: Repository,
    to: str,
    subject: str,
    rules: tuple[Rule, ...] | None,
    progress: Progress,
) -> dict[str, Any]:
    try:
        with _opened(state_dir, to) as target:
            done = copy(repository, target, wanted=lambda b: _by_policy(b, subject), progress=progress)
            removed = _tidy(target, subject, rules)["removed"]
    except CdpError as error:
        return {"copied": 0, "copy_error": error.message}
    damaged = "; ".join(f"{id_}: {reason}" for id_, reason in done.damaged)
    return {"copied": len(done.copied), "copy_removed": removed, "copy_error": damaged}


def main() -> int:
    """`python -m cdpserver.repository.scheduled`: the result or error as JSON."""
    parser = argparse.ArgumentParser(description="make a backup that a policy asks for")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--copy-to")
    parser.add_argument("--keep")
    parser.add_argument("points", nargs="+")
    o = parser.parse_args()
    return messages.tell(lambda: run(o.state_dir, o.name, o.points, to=o.to, copy_to=o.copy_to, keep=o.keep))


if __name__ == "__main__":
    sys.exit(main())
