"""Merging base points: one file is written anew on an older one, checked, compared and renamed; then those between are removed.

    .tmp-bp-K.qcow2   a copy of bp-K.qcow2 on the older backing file: swept at the next start
    chain.json        {"keep", "on", "gone"}: durable before the rename, removed when everything is done
    bp-K.qcow2        renamed over: from now on the merge is done, and what is left of it is finished by whoever comes next

Invariants: a published file never changes in place, so who has one open goes on reading the same. Nothing is removed that
`chain.json` does not name, nor before bp-K stands below it. Killed anywhere, the chain is as before or merged, and every base
point that was to stay reads the same.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from cdpserver import durable, messages, qemu, sums, timeline
from cdpserver.catalog import Catalog
from cdpserver.chain import lock
from cdpserver.chain.holds import holds
from cdpserver.chain.plan import VERBS, Link, Merge, Verb, name_of, plan
from cdpserver.chain.same import check_same
from cdpserver.errors import CdpError, CorruptError, NotFoundError
from cdpserver.nodes import base_point_path, note_path, published, read_header
from cdpserver.progress import Progress, nobody, part, to_stdout
from cdpserver.state import StateDir
from cdpserver.view.chain import map_path, write_map


def links(directory: Path) -> list[Link]:
    """The published base points of a timeline, oldest first, as their headers say."""
    return [Link(n, read_header(base_point_path(directory, n))[0]) for n in published(directory)]


def merge(
    state: StateDir,
    catalog: Catalog,
    id: str,
    verb: Verb,
    number: int,
    *,
    base: int | None = None,
    progress: Progress = nobody,
) -> dict[str, Any]:
    """Delete, pull or commit a base point of timeline `id`; durable on return.

    RefusedError with the reason when something needs what would go, NoSpaceError; on an error the chain is as it was.
    """
    directory = state.timeline(id)
    line = timeline.load(directory)
    with lock.alone(directory):
        finish(directory)
        planned = plan(links(directory), verb, number, base, holds(state, catalog, id), line.full_name)
        before = _used(directory, planned)
        _execute(directory, planned, progress)
        freed = before - _used(directory, planned)
    return {
        "disk": line.full_name,
        "stays": f"bp:{planned.keep}",
        "removed": [f"bp:{n}" for n in sorted(planned.gone)],
        "freed_bytes": freed,
    }


def _used(directory: Path, planned: Merge) -> int:
    paths = (base_point_path(directory, n) for n in (planned.keep, *planned.gone))
    return sum(map(durable.used_bytes, paths))


def _execute(directory: Path, planned: Merge, progress: Progress) -> None:
    final = base_point_path(directory, planned.keep)
    building = final.with_name(f"{durable.TEMPORARY}{final.name}")
    form = "qcow2" if planned.on.endswith(".qcow2") else "raw"
    try:
        building.unlink(missing_ok=True)
        qemu.copy(final, building)
        building.chmod(0o600)
        qemu.rebase(building, planned.on, format=form, progress=part(progress, 0.1, 0.6))
        qemu.check(building)
        if read_header(building)[0] != planned.on:
            raise CorruptError(f"the merged {final.name} does not stand on {planned.on}", hint="try again")
        check_same(building, final, layers=1 + len(planned.gone), progress=part(progress, 0.6, 1.0))
        building.chmod(0o400)
        durable.write_json(
            directory / lock.NOTE, {"keep": planned.keep, "on": planned.on, "gone": list(planned.gone)}
        )
        durable.publish(building, final)
    except BaseException:
        with contextlib.suppress(OSError):
            building.unlink(missing_ok=True)
        finish(directory)
        raise
    finish(directory)
    write_map(final)
    sums.write(final)


def drop_unfinished(directory: Path) -> None:
    """Remove new files of merges that ended before they were renamed. The lock must be held."""
    for number in published(directory):
        final = base_point_path(directory, number)
        final.with_name(f"{durable.TEMPORARY}{final.name}").unlink(missing_ok=True)


def finish(directory: Path) -> list[int]:
    """End what a killed merge left: the numbers of the base points that it still had to remove. The lock must be held."""
    path = directory / lock.NOTE
    try:
        planned = _read(path)
    except FileNotFoundError:
        return []
    final = base_point_path(directory, planned.keep)
    removed = []
    if final.exists() and read_header(final)[0] == planned.on:
        with durable.io_errors("remove base points in", directory):
            for number in planned.gone:
                if base_point_path(directory, number).exists():
                    removed.append(number)
                # The file first: without it the others mean nothing.
                image = base_point_path(directory, number)
                for gone in (image, note_path(directory, number), map_path(image), sums.sums_path(image)):
                    gone.unlink(missing_ok=True)
        durable.fsync_dir(directory)
    path.unlink()
    durable.fsync_dir(directory)
    return removed


def _read(path: Path) -> Merge:
    value = durable.read_json(path)
    durable.take_keys(value, {"keep", "on", "gone"}, path)
    gone = value["gone"]
    keep = durable.take_int(value, "keep", path)
    if not isinstance(gone, list) or any(type(n) is not int or not 0 <= n < keep for n in gone):
        raise durable.corrupt_json(path, "'gone' are not older base points")
    on = durable.take_str(value, "on", path)
    if on in {name_of(n) for n in (*gone, keep)}:
        raise durable.corrupt_json(path, "'on' is one of those that go")
    return Merge(keep, on, tuple(gone))


def finish_all(state: StateDir) -> tuple[list[str], list[str]]:
    """End every killed merge, at the service's start: (what was removed, what could not be ended), in sentences."""
    done, failed = [], []
    for path in sorted(state.timelines.glob(f"t*/{lock.NOTE}")):
        try:
            with lock.alone(path.parent):
                removed = finish(path.parent)
            done.append(f"{path.parent.name}: removed {', '.join(f'bp:{n}' for n in removed) or 'nothing'}")
        except (CdpError, OSError) as error:
            failed.append(f"{path.parent.name}: {error}")
    return done, failed


def run(state_dir: Path, id: str, verb: Verb, number: int, base: int | None) -> dict[str, Any]:
    """One merge, told to the process that started this one."""
    state = StateDir.open(state_dir)
    with Catalog.open(state, writable=False) as catalog:
        if catalog.by_id(id) is None:
            raise NotFoundError(f"no disk has timeline {id}", hint="cdp disk list")
        return merge(state, catalog, id, verb, number, base=base, progress=to_stdout())


def main() -> int:
    """`python -m cdpserver.chain.merge`: merge base points in a process of its own; the result or error as JSON."""
    parser = argparse.ArgumentParser(description="merge base points")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--timeline", required=True)
    parser.add_argument("--verb", choices=VERBS, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--base", type=int)
    options = parser.parse_args()
    return messages.tell(
        lambda: run(options.state_dir, options.timeline, options.verb, options.number, options.base)
    )


if __name__ == "__main__":
    sys.exit(main())
