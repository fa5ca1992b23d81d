"""Entry point of `cdpserver`: help, the version, a typing error and the shell's completion don't wait for the server's
libraries, which are loaded after them.
"""

import os
import sys

from cdpserver.errors import BrokenError
from cdpserver.service.options import build_parser, options


def main() -> None:
    """The program `cdpserver`."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    options(None)  # help, the version and what is wrong end here
    from cdpserver.service.main import main as serve

    try:
        serve()
    except OSError as error:
        # What stands in its way is not ours to put right: a line and an exit code, as for everything else.
        where = f" {error.filename}" if error.filename else ""
        failed = BrokenError(f"the system refused{where}: {error.strerror or error}")
        sys.stderr.write(f"cdpserver: {failed}\n")
        sys.exit(failed.exit_code)


def _complete() -> None:
    """Answer a shell that completes a line, and end."""
    import argcomplete
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter, SuppressCompleter

    parser = build_parser()
    completers = {"state_dir": DirectoriesCompleter(), "config": FilesCompleter(["toml"])}
    for action in parser._actions:
        action.completer = completers.get(action.dest, SuppressCompleter())  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)
    sys.exit(1)


if __name__ == "__main__":
    main()
