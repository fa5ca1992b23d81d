"""One backup that a policy asks for, in a process of its own: made, and old ones removed by the rule. Or the copies of a VM's or
disk's backups to a second repository, in another one: a repository that hangs keeps nobody from another.

The rule counts and removes backups of that VM or disk that policies made; those of an operator stay.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cdpserver import messages, names
from cdpserver.errors import CorruptError, NotFoundError, RefusedError
from cdpserver.progress import part, to_stdout
from cdpserver.repository import gc, prune, registered
from cdpserver.repository.copy import copy
from cdpserver.repository.locks import locks
from cdpserver.repository.record import Backup
from cdpserver.repository.registered import Registered
from cdpserver.repository.repository import Repository
from cdpserver.repository.source import held_points
from cdpserver.repository.take import back_up
from cdpserver.retention.slots import Rule, parse_slots

BY_POLICY = {"by": "policy"}
"""The tag of backups that a policy's rule may remove."""


def run(state_dir: Path, name: str, points: list[str], *, to: str, keep: str | None) -> dict[str, Any]:
    """Back `points` up as `name`; what was made and removed. An error if there is no backup."""
    rules = None if keep is None else parse_slots(keep)
    with (
        _opened(state_dir, to) as repository,
        held_points(state_dir, [names.parse_point(point) for point in points]) as sources,
    ):
        made = back_up(repository, sources, name, tags=BY_POLICY, progress=part(to_stdout(), 0, 0.9))
        return made.show() | tidy(repository, name.partition("@")[0], rules)


def find(state_dir: Path, where: str) -> Registered:
    """The repository that a policy names, by its path or id. NotFoundError."""
    known = registered.load(state_dir).values()
    one = next((one for one in known if where in (one.id, one.path)), None)
    if one is None:
        raise NotFoundError(f"the repository {where} is not registered", hint=f"cdp repo add {where}")
    return one


def _opened(state_dir: Path, where: str) -> Repository:
    return registered.open_registered(state_dir, find(state_dir, where))


def tidy(repository: Repository, subject: str, rules: tuple[Rule, ...] | None) -> dict[str, Any]:
    """Of `subject`: remove what the rule does not keep, and give its room back."""
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
        repository.remove(backup.id)
    freed = 0
    if dropped:
        try:
            freed = gc.sweep(repository).freed_bytes
        except RefusedError:  # another one runs, and takes it with it or leaves it to the next
            freed = 0
    return {"removed": len(dropped), "freed_bytes": freed}


def _by_policy(backup: Backup, subject: str) -> bool:
    return backup.subject == subject and backup.tags.items() >= BY_POLICY.items()


def run_copies(state_dir: Path, subject: str, *, of: str, to: str, keep: str | None) -> dict[str, Any]:
    """Copy what policies made of `subject` to the second repository; what was copied and removed. CorruptError for damage."""
    rules = None if keep is None else parse_slots(keep)
    with _opened(state_dir, of) as repository, _opened(state_dir, to) as target:
        done = copy(
            repository,
            target,
            wanted=lambda b: _by_policy(b, subject),
            progress=part(to_stdout(), 0, 0.9),
        )
        said = {"copied": len(done.copied), **tidy(target, subject, rules)}
    if done.damaged:
        damaged = "; ".join(f"{id_}: {reason}" for id_, reason in done.damaged)
        raise CorruptError(f"not copied are {damaged}", hint=f"cdp repo check {of}")
    return said


def main() -> int:
    """`python -m cdpserver.repository.scheduled`: the result or error as JSON."""
    parser = argparse.ArgumentParser(description="make a backup that a policy asks for")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--copies-of")
    parser.add_argument("--keep")
    parser.add_argument("points", nargs="*")
    o = parser.parse_args()
    if o.copies_of is not None:
        return messages.tell(lambda: run_copies(o.state_dir, o.name, of=o.copies_of, to=o.to, keep=o.keep))
    return messages.tell(lambda: run(o.state_dir, o.name, o.points, to=o.to, keep=o.keep))


if __name__ == "__main__":
    sys.exit(main())
