"""`python -m cdpserver.catalog.probe DIRECTORY FORMAT`: exit status 0 if that LMDB catalog, of that format or a later
one, can be read from end to end.

A process of its own, because LMDB trusts its pages: on damaged ones it may crash the process that reads them.
"""

import contextlib
import sys
from pathlib import Path

from cdpserver.catalog.store import Store
from cdpserver.errors import CdpError


def main(directory: str, format: int) -> int:
    """Read everything; the exit status."""
    try:
        with contextlib.closing(Store(Path(directory), writable=False, format=format)) as store:
            store.content()
    except CdpError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
