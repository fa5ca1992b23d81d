"""What may be done with a running disk's chain, and how QEMU is asked for it; pure.

    pull NODE --base B     B  x  x  NODE  above     x go, NODE takes what they held     (block-stream)
    commit NODE --base B   B  x  NODE  above        B's file takes all, x and NODE go   (block-commit)
    delete NODE            below  NODE  above       a pull of the one above

A node's file is removed only when the chain has left it and nothing that we see stands on it; the chain's last image may be the
template of other VMs and is always left.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cdpserver.errors import RefusedError, UsageError
from cdpserver.vm.chain.graph import Layer, LiveChain

MAX_CHAIN = 128
"""Images of one disk: QEMU opens each with tables of its own, and a random read then takes ten times as long."""

MAX_CEPH_SNAPSHOTS = 32
"""Snapshots of a disk on Ceph: each costs every write a look at its object map."""

MANY = 5
"""More snapshots than this and the operator is warned: reads slow down, and each is one more file that must not be lost."""

JOB_PREFIX = "cdp-live-"

Verb: TypeAlias = Literal["pull", "commit"]
Branches: TypeAlias = Mapping[Path, tuple[Path, ...]]
"""For a file of the chain the files outside the chain that stand on it."""


@dataclass(frozen=True, slots=True)
class Merge:
    """One job of QEMU: its id, the command that starts it, and the chain's files before and after, from the active one down.

    `stays` holds what the merge was about; `gone` left the chain. `active` says that the job must be completed by hand.
    """

    verb: Verb
    job: str
    command: str
    arguments: Mapping[str, Any]
    before: tuple[str, ...]
    after: tuple[str, ...]
    stays: Layer
    gone: tuple[Layer, ...]
    removable: tuple[Layer, ...]
    active: bool


def check_room(chain: LiveChain, more: int = 0) -> str | None:
    """Whether one more snapshot has its place; a warning if it is one of many. `more` are kept outside the chain.

    RefusedError with the reason at the limit.
    """
    count = chain.snapshots + more
    hint = "make room: cdp snapshot live pull, commit or delete"
    if chain.on_ceph and count >= MAX_CEPH_SNAPSHOTS:
        raise RefusedError(
            f"{chain.disk} lies on Ceph and has {count} snapshots, of {MAX_CEPH_SNAPSHOTS} at most", hint=hint
        )
    if len(chain.layers) >= MAX_CHAIN:
        raise RefusedError(
            f"the chain of {chain.disk} has {len(chain.layers)} images, of {MAX_CHAIN} at most", hint=hint
        )
    if count + 1 > MANY:
        return f"{chain.disk} now has {count + 1} snapshots: more than {MANY} slow it down and are at risk"
    return None


def check_overlay(chain: LiveChain) -> Path:
    """The file of the active image, onto which an overlay can be put. RefusedError with the reason."""
    nodes = {layer.node for layer in chain.layers} | {node for node, _ in chain.filters}
    if jobs := chain.jobs_on(nodes):
        raise RefusedError(
            f"the job {', '.join(jobs)} works on {chain.disk}, and QEMU puts no overlay onto such a disk",
            hint="wait for its end (a mirror of cdpserver: end it, and start it again after)",
        )
    if chain.filters:
        raise RefusedError(
            f"{chain.disk} is under {_filters(chain)}: an overlay above would take its writes away",
            hint="wait until what put it there is done",
        )
    if chain.active.path is None:
        raise RefusedError(
            f"{chain.disk} is {chain.active.protocol} {chain.active.filename}: no file of this host with an absolute name",
            hint="give QEMU its images by absolute names",
        )
    return chain.active.path


def plan_commit(chain: LiveChain, node: str, base: str | None, branches: Branches) -> Merge:
    """NODE's content goes into the file of the base, which is the next below unless it is named. UsageError, RefusedError."""
    top = chain.position(node)
    bottom = top + 1 if base is None else chain.position(base)
    _check_below(chain, top, bottom, base)
    _check_jobs(chain, 0, bottom, "commit")
    if chain.filters:
        raise RefusedError(
            f"{chain.disk} is under {_filters(chain)}, and QEMU commits nothing there",
            hint="pull an image that is not the active one",
        )
    touched = chain.layers[top : bottom + 1]
    if standing := [path for layer in touched if layer.path for path in branches.get(layer.path, ())]:
        raise RefusedError(
            f"{', '.join(path.name for path in standing)} stands on what a commit would change or remove",
            hint="pull instead, which changes no image below",
        )
    top_layer, base_layer = chain.layers[top], chain.layers[bottom]
    arguments: dict[str, Any] = {
        "device": chain.root,
        "top-node": top_layer.node,
        "base-node": base_layer.node,
    }
    if top:
        arguments |= _backing(chain.layers[top - 1], base_layer)
    return _merge("commit", "block-commit", chain, arguments, top, bottom, active=top == 0)


def plan_pull(chain: LiveChain, node: str, base: str | None, branches: Branches) -> Merge:
    """NODE takes what the images between it and the base hold, or all below it. UsageError, RefusedError."""
    top = chain.position(node)
    bottom = len(chain.layers) if base is None else chain.position(base)
    _check_below(chain, top, bottom, base)
    if bottom == top + 1:
        raise RefusedError(
            f"{node} stands on {base} already: nothing lies between", hint="name an older base, or none"
        )
    _check_jobs(chain, top, min(bottom, len(chain.layers) - 1), "pull")
    if chain.layers[top].subclusters:
        # Seen with QEMU 7.2: `bdrv_co_do_copy_on_readv: Assertion skip_bytes < pnum failed`, and the VM is dead.
        raise RefusedError(
            f"{chain.layers[top].name} has subclusters (extended_l2), and QEMU may die of pulling into it",
            hint="commit it instead",
        )
    arguments: dict[str, Any] = {"device": chain.layers[top].node}
    if bottom < len(chain.layers):
        arguments["base-node"] = chain.layers[bottom].node
        arguments |= _backing(chain.layers[top], chain.layers[bottom])
    return _merge("pull", "block-stream", chain, arguments, top, bottom, branches=branches)


def plan_delete(chain: LiveChain, node: str, branches: Branches) -> Merge:
    """The image above NODE takes what only NODE held. RefusedError for the active one."""
    at = chain.position(node)
    if at == 0:
        raise RefusedError(
            f"the VM writes to {node}: it is no snapshot yet",
            hint="name an older image, or commit this one",
        )
    base = chain.layers[at + 1].filename if at + 1 < len(chain.layers) else None
    return plan_pull(chain, chain.layers[at - 1].filename, base, branches)


def _merge(
    verb: Verb,
    command: str,
    chain: LiveChain,
    arguments: dict[str, Any],
    top: int,
    bottom: int,
    *,
    active: bool = False,
    branches: Branches | None = None,
) -> Merge:
    layers = chain.layers
    before = tuple(layer.filename for layer in layers)
    gone = layers[top + 1 : bottom] if verb == "pull" else layers[top:bottom]
    stays = layers[top] if verb == "pull" else layers[bottom]
    names = {layer.filename for layer in gone}
    removable = tuple(
        layer
        for layer in gone
        if layer is not layers[-1] and layer.path is not None and not (branches or {}).get(layer.path)
    )
    # The same command finds the same job again, such as after an end of `cdp`.
    digest = hashlib.sha256("\0".join((verb, layers[top].filename, stays.filename, *sorted(names))).encode())
    job = f"{JOB_PREFIX}{verb}-{digest.hexdigest()[:12]}"
    return Merge(
        verb=verb,
        job=job,
        command=command,
        arguments={"job-id": job, **arguments, "auto-dismiss": False},
        before=before,
        after=tuple(name for name in before if name not in names),
        stays=stays,
        gone=gone,
        removable=removable,
        active=active,
    )


def _check_below(chain: LiveChain, top: int, bottom: int, base: str | None) -> None:
    if top == len(chain.layers) - 1:
        raise RefusedError(
            f"{chain.layers[top].name} is the last image of its chain: nothing lies below it",
            hint="cdp snapshot live tree shows what stands on what",
        )
    if bottom <= top:
        raise UsageError(f"{base} is not below {chain.layers[top].name}", hint="the base is an older image")


def _check_jobs(chain: LiveChain, top: int, bottom: int, verb: Verb) -> None:
    nodes = {layer.node for layer in chain.layers[top : bottom + 1]}
    if top == 0:
        nodes |= {node for node, _ in chain.filters}
    own = [job for job in chain.jobs_on(nodes) if not job.startswith(JOB_PREFIX)]
    if own:
        raise RefusedError(
            f"the job {', '.join(own)} works on {chain.disk}, and QEMU does no {verb} there meanwhile",
            hint="wait for its end; under a mirror, images below the active one can be pulled",
        )


def _backing(above: Layer, base: Layer) -> dict[str, str]:
    """What the header of the image above is to say: relative, so that a chain can be moved as a whole."""
    if above.path is None or base.path is None:
        return {}
    return {"backing-file": os.path.relpath(base.path, above.path.parent)}


def _filters(chain: LiveChain) -> str:
    return ", ".join(f"{node} ({driver})" for node, driver in chain.filters)
