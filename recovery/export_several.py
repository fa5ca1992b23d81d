"""`cdp export VM@WHEN --output DIR`: a file for each disk, all of one instant; goes on where it was interrupted."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cdpserver import durable
from cdpserver.errors import CorruptError, RefusedError, UsageError
from recovery.together import label
from recovery.unfinished import Output

PLAN = ".cdp-export.json"
"""In the directory while an export to it is unfinished: its point, and of each disk the place that this is."""


def export_several(
    options: Namespace, found: dict[str, Any], one: Callable[[Namespace], dict[str, Any]]
) -> dict[str, Any]:
    """Export every disk with `one`. RefusedError if something is there already, or another export is unfinished."""
    if "://" in options.output:
        raise UsageError(
            f"{found['name']} has several disks", hint="name a directory, or export the disks one by one"
        )
    directory = Path(options.output)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is no directory", hint="a VM or group is exported to a directory")
    directory.mkdir(parents=True, exist_ok=True)
    plan = directory / PLAN
    points = None if options.force else _unfinished(plan, options.point)
    resumes = points is not None
    if points is None:
        points = {label(found["name"], disk["disk"]): str(disk["point"]) for disk in found["disks"]}
    paths = {disk: directory / f"{disk}.{options.format}" for disk in points}
    if not (resumes or options.force or options.verify):
        _check_free(paths)
    durable.write_whole(plan, json.dumps({"point": options.point, "disks": points}).encode() + b"\n")
    results = []
    for disk, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = Namespace(**{**vars(options), "point": points[disk], "output": str(path)})
        if resumes and path.exists() and not Output.parse(str(path)).side.exists() and not options.verify:
            results.append({"point": points[disk], "output": str(path), "action": "finished before"})
        else:
            results.append(one(mine))
    plan.unlink()
    return {**{key: found[key] for key in ("name", "grade")}, "point": options.point, "disks": results}


def _check_free(paths: dict[str, Path]) -> None:
    for path in paths.values():
        if path.exists():
            raise RefusedError(
                f"{path} is there already", hint="--force replaces it, --verify compares it with the point"
            )


def _unfinished(plan: Path, point: str) -> dict[str, str] | None:
    """The places of an export of this point that was interrupted; None if there was none."""
    try:
        value = durable.read_json(plan)
    except FileNotFoundError:
        return None
    disks = value.get("disks")
    if not isinstance(disks, dict) or not all(isinstance(place, str) for place in disks.values()):
        raise CorruptError(f"{plan} is damaged", hint="--force begins the export anew")
    if value.get("point") != point:
        raise RefusedError(
            f"an export of {value.get('point')} to {plan.parent} is unfinished",
            hint="finish it with the same command, or --force begins anew",
        )
    return disks
