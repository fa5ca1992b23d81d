"""The verbs on a running disk's own snapshots: tree, create, commit, pull, delete.

Durability: a new overlay's file is durable before QEMU is told of it. A merge is QEMU's job: it changes the chain at its
end, by one write of a header, so that a job that failed, or a QEMU that was killed, leaves the chain as it was; this is
looked at after each job.
What a failed commit has written into the base by then shows no difference from above, but the base alone is no point any more.
"""

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from cdpserver import durable, qemu
from cdpserver.errors import BrokenError, CdpError, RefusedError, UsageError
from cdpserver.progress import Progress, nobody
from cdpserver.vm.chain import files, plan
from cdpserver.vm.chain.graph import Answers, Layer, LiveChain, chain_of
from cdpserver.vm.chain.jobs import dismiss_ended, run_job
from cdpserver.vm.chain.plan import Merge
from cdpserver.vm.chain.tree import tree as tree_of
from cdpserver.vm.qmp import Monitor, QmpRefusedError


async def ask(monitor: Monitor) -> Answers:
    """What QEMU has open now."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return Answers(
        graph=await monitor.execute("x-debug-query-block-graph"),
        nodes={str(node["node-name"]): node for node in nodes},
        blocks=await monitor.execute("query-block"),
        exports=await monitor.execute("query-block-exports"),
    )


async def look(monitor: Monitor, disk: str) -> LiveChain:
    """The chain of a disk as QEMU has it now. NotFoundError, RefusedError, CorruptError."""
    return chain_of(await ask(monitor), disk)


async def tree(monitor: Monitor, vm: str, disk: str) -> dict[str, Any]:
    """See vm/chain/tree.py."""
    chain = await look(monitor, disk)
    return tree_of(chain, files.standing(chain), vm)


# --- create


async def create(
    monitor: Monitor, vm: str, disks: Sequence[str], *, name: str, directory: Path | None = None
) -> list[dict[str, Any]]:
    """Put an overlay onto each disk, all at one instant; `name` becomes part of the files' names.

    What was active is then a snapshot. Refused for all if it is for one. UsageError, RefusedError, BrokenError.
    """
    chains = [await look(monitor, disk) for disk in disks]
    if len({chain.root for chain in chains}) < len(chains):
        raise UsageError("one disk is named twice", hint="give each --disk once")
    warnings = []
    for chain in chains:
        warnings.append(plan.check_room(chain))
        plan.check_overlay(chain)
        files.check_there(chain)
    made: list[tuple[LiveChain, Path, str]] = []
    try:
        for chain in chains:
            path = await trio.to_thread.run_sync(_overlay, chain, name, directory)
            made.append((chain, path, f"cdp-{secrets.token_hex(6)}"))
        await _put_on(monitor, made)
    except CdpError:
        await _take_back(monitor, made)
        raise
    return [
        {
            "vm": vm,
            "disk": chain.disk,
            "snapshot": chain.active.name,
            "active": path.name,
            "path": str(path),
            "node": node,
            "snapshots": chain.snapshots + 1,
            "warning": warning,
        }
        for (chain, path, node), warning in zip(made, warnings, strict=True)
    ]


def _overlay(chain: LiveChain, name: str, directory: Path | None) -> Path:
    below, active = plan.check_overlay(chain), chain.active
    return make_overlay(chain, name, directory, below=below, format=active.driver, size=active.size)


def make_overlay(
    chain: LiveChain, name: str, directory: Path | None, *, below: Path, format: str, size: int
) -> Path:
    """An empty file on an image, durable, and for QEMU to open as it can open that image. UsageError, BrokenError."""
    last = chain.layers[-1].path or below
    path = (directory or below.parent) / f"{last.stem}.{name}.qcow2"
    if path.exists():
        raise UsageError(f"{path} exists", hint="give the snapshot another name: --name")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent}", hint="give one with --directory")
    temporary = path.with_name(f"{durable.TEMPORARY}{path.name}")
    try:
        qemu.create_overlay(temporary, backing=below, format=format, size=size, subclusters=False)
        owner = below.stat()
        if os.geteuid() == 0:
            os.chown(temporary, owner.st_uid, owner.st_gid)
        temporary.chmod(owner.st_mode & 0o777)
        durable.publish(temporary, path)
    except OSError as error:
        raise BrokenError(
            f"{path} cannot be made ready: {error.strerror}", hint="look at its directory"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


async def _put_on(monitor: Monitor, made: Sequence[tuple[LiveChain, Path, str]]) -> None:
    for _, path, node in made:
        file = {"driver": "file", "filename": str(path), "discard": "unmap"}
        added = {"driver": "qcow2", "node-name": node, "file": file, "backing": None, "discard": "unmap"}
        await monitor.execute("blockdev-add", added)
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": chain.root, "overlay": node}}
        for chain, _, node in made
    ]
    await monitor.execute("transaction", {"actions": actions})


async def _take_back(monitor: Monitor, made: Sequence[tuple[LiveChain, Path, str]]) -> None:
    """Remove overlays that QEMU refused. If it is gone, they may be in use: they stay, and the tree shows them."""
    for _, path, node in made:
        try:
            named = await monitor.execute("query-named-block-nodes", {"flat": True})
            if any(found["node-name"] == node for found in named):
                await monitor.execute("blockdev-del", {"node-name": node})
        except CdpError:
            continue
        path.unlink(missing_ok=True)


# --- merges


async def commit(
    monitor: Monitor, disk: str, node: str, *, base: str | None, progress: Progress = nobody
) -> dict[str, Any]:
    """The content of an image goes into the file of the base, else of the next below."""
    chain = await _ready(monitor, disk)
    files.check_there(chain)
    return await _merge(monitor, chain, plan.plan_commit(chain, node, base, files.standing(chain)), progress)


async def pull(
    monitor: Monitor, disk: str, node: str, *, base: str | None, progress: Progress = nobody
) -> dict[str, Any]:
    """An image takes what lies between it and the base, or all below it; also the way out when a file below was deleted."""
    chain = await _ready(monitor, disk)
    return await _merge(monitor, chain, plan.plan_pull(chain, node, base, files.standing(chain)), progress)


async def delete(monitor: Monitor, disk: str, node: str, *, progress: Progress = nobody) -> dict[str, Any]:
    """One snapshot goes: of the chain by a merge, beside it with its file, on which nothing may stand."""
    chain = await _ready(monitor, disk)
    branches = files.standing(chain)
    beside = [path for paths in branches.values() for path in paths if node in (path.name, str(path))]
    if (
        node in {name for layer in chain.layers for name in (layer.node, layer.name, layer.filename)}
        or not beside
    ):
        files.check_there(chain)
        return await _merge(monitor, chain, plan.plan_delete(chain, node, branches), progress)
    if len(beside) > 1:
        raise RefusedError(f"{len(beside)} files have the name {node}", hint="give the path")
    path = beside[0]
    if above := branches.get(path):
        raise RefusedError(
            f"{', '.join(found.name for found in above)} stands on {path.name}", hint="delete that one first"
        )
    await trio.to_thread.run_sync(qemu.check_unused, path)
    freed = durable.used_bytes(path)
    path.unlink()
    return _said(chain, "delete", [path.name], [], chain.active.name, freed)


async def _ready(monitor: Monitor, disk: str) -> LiveChain:
    await dismiss_ended(monitor)
    return await look(monitor, disk)


async def _merge(monitor: Monitor, chain: LiveChain, merge: Merge, progress: Progress) -> dict[str, Any]:
    """Run the job, look at the chain, and remove the files that it has left."""
    stays, written_ns = merge.stays.path, None
    if merge.verb == "pull" and stays is not None and merge.stays is not chain.active:
        written_ns = stays.stat().st_mtime_ns
    used = sum(durable.used_bytes(layer.path) for layer in chain.layers if layer.path is not None)
    try:
        await run_job(
            monitor, merge.job, merge.command, merge.arguments, complete=merge.active, progress=progress
        )
    except (BrokenError, QmpRefusedError) as error:
        raise await _failed(monitor, chain, merge, error) from None
    after = await look(monitor, chain.handle)
    if tuple(layer.filename for layer in after.layers) != merge.after:
        raise BrokenError(
            f"QEMU says that the {merge.verb} is done, but {chain.disk} has {len(after.layers)} images, not {len(merge.after)}",
            hint="nothing was removed; cdp snapshot live tree shows what there is",
        )
    if stays is not None and written_ns is not None:
        os.utime(stays, ns=(written_ns, written_ns))  # it holds what it held: the instant that it shows stays
    removed, kept = [], []
    for layer in merge.gone:
        let_go = await _let_go(monitor, layer)
        if layer in merge.removable and layer.path is not None and let_go:
            layer.path.unlink(missing_ok=True)
            removed.append(layer.name)
        else:
            kept.append(layer.name)
    left = [*merge.after, *(layer.filename for layer in merge.gone if layer.name in kept)]
    freed = used - sum(durable.used_bytes(name) for name in left)
    return _said(after, merge.verb, removed, kept, merge.stays.name, freed)


async def _failed(monitor: Monitor, chain: LiveChain, merge: Merge, error: CdpError) -> CdpError:
    """The error of a job, with what it has left of the chain."""
    now = await look(monitor, chain.handle)
    if tuple(layer.filename for layer in now.layers) != merge.before:
        return BrokenError(
            f"{error.message}; the chain of {chain.disk} is another one now",
            hint="look at it before anything else: cdp snapshot live tree",
        )
    said = "the chain is as it was"
    if merge.verb == "commit":
        said += f", but {merge.stays.name} alone may hold some of what was to be committed"
    return (
        type(error)(f"{error.message}; {said}", hint=error.hint) if isinstance(error, BrokenError) else error
    )


async def _let_go(monitor: Monitor, layer: Layer) -> bool:
    """Whether QEMU has closed an image; what was added by `blockdev-add` waits for a `blockdev-del`."""
    with contextlib.suppress(QmpRefusedError):  # it is closed already, or something else uses it
        await monitor.execute("blockdev-del", {"node-name": layer.node})
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return all(str(node.get("file")) != layer.filename for node in nodes)


def _said(
    chain: LiveChain, verb: str, removed: list[str], kept: list[str], stays: str, freed: int
) -> dict[str, Any]:
    return {
        "disk": chain.disk,
        "verb": verb,
        "removed": removed,
        "kept": kept,
        "stays": stays,
        "active": chain.active.name,
        "snapshots": chain.snapshots,
        "freed_bytes": freed,
    }
