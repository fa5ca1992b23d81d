"""`python -m cdpserver.catalog.probe DIRECTORY FORMAT`: exit status 0 if that LMDB catalog, of that format or a later
one, can be read from end to end; what it holds is printed, as in `catalog.json`.

A process of its own, because LMDB trusts its pages: on damaged ones it may crash the process that reads them.
"""

import contextlib
import json
import sys
from pathlib import Path

from cdpserver.catalog.content import Content
from cdpserver.catalog.store import Store
from cdpserver.errors import BrokenError, CdpError


def main(directory: str, format: int) -> int:
    """Read everything; the exit status."""
    try:
        sys.stdout.write(json.dumps(_read(Path(directory), format).to_json()))
    except CdpError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _read(path: Path, format: int) -> Content:
    try:
        store = Store(path, writable=False, format=format)
    except (BrokenError, PermissionError):
        # Its lock file may not be written, as on read-only media.
        store = Store(path, writable=False, format=format, lock=False)
    with contextlib.closing(store):
        return store.content()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
