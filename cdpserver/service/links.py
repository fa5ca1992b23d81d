"""The names of disks' sockets: symbolic links that follow a disk to the worker that serves it."""

import os
from pathlib import Path

from cdpserver.service.core import Core
from cdpserver.target.placement import worker_of


def link_socket(core: Core, id: str) -> None:
    """The socket of one disk: a name of its own, so that its URI stays when another worker serves it."""
    worker = worker_of(id, core.config.workers)
    _point(core.state.nbd / f"{id}.sock", core.state.worker_socket(worker))


def link_sockets(core: Core) -> None:
    """The socket of every disk, and the one for all of them."""
    _point(core.state.target_socket, core.state.worker_socket(0))
    for entry in core.catalog.names().values():
        link_socket(core, entry.id)


def _point(link: Path, place: Path) -> None:
    """Make `link` a relative symbolic link to `place`, in one step: a client finds the old socket or the new one."""
    target = os.path.relpath(place, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.rename(new, link)
