"""An image of a point on a base image, made in a process of its own: `python -m cdpserver.vm.recovery.pointimage`.

The file has its name when it is whole and durable.
"""

import argparse
import os
import sys
from pathlib import Path

from cdpserver import durable, messages, qemu
from cdpserver.progress import Progress, to_stdout
from cdpserver.vm.recovery.move import nbd_server


def make(
    target: Path, *, uri: str, size: int, base: Path | None, base_format: str, progress: Progress
) -> None:
    """Write what the point at `uri` holds and `base` does not. BrokenError, NoSpaceError."""
    temporary = target.with_name(f"{durable.TEMPORARY}{target.name}")
    server, export = nbd_server(uri)
    temporary.unlink(missing_ok=True)
    try:
        qemu.create_over_nbd(temporary, node={"driver": "nbd", "server": server, "export": export}, size=size)
        backing = os.path.relpath(base, target.parent) if base is not None else ""
        qemu.rebase(temporary, backing, format=base_format, progress=progress)
        qemu.check(temporary)
        durable.publish(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.geteuid() == 0:
        owner = target.parent.stat()
        os.chown(target, owner.st_uid, owner.st_gid)


def main() -> int:
    """An error goes to stdout as JSON."""
    parser = argparse.ArgumentParser(description="write an image of a point on a base image")
    parser.add_argument("--uri", required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--base-format", default="raw")
    options = parser.parse_args()
    return messages.tell(
        lambda: make(
            options.target,
            uri=options.uri,
            size=options.size,
            base=options.base,
            base_format=options.base_format,
            progress=to_stdout(),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
