"""Waits for a line on a guest's serial port: `python -m cdpserver.vm.trial.watch --serial FILE --marker REGEX`.

A process of its own, since a regular expression of an operator's may take for ever. Says `found` and the line as JSON, and ends.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOOK_S = 0.01

MAX_LINE = 4096
"""A console without line ends is cut into such pieces."""


def lines(path: Path) -> Iterator[str | None]:
    """Each line of a growing file; None when there is nothing new. What has no end yet is looked at as well."""
    offset, rest = 0, b""
    while True:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                new = file.read(1 << 20)
        except FileNotFoundError:
            new = b""
        if not new:
            yield None
            continue
        offset += len(new)
        *whole, rest = (rest + new).split(b"\n")
        rest = rest[-MAX_LINE:]
        for line in (*whole, rest):
            yield line[:MAX_LINE].decode(errors="replace").strip()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serial", type=Path, required=True)
    parser.add_argument("--marker", required=True)
    options = parser.parse_args()
    marker = re.compile(options.marker)
    for line in lines(options.serial):
        if line is None:
            time.sleep(LOOK_S)
        elif marker.search(line):
            sys.stdout.write(json.dumps({"found": line}) + "\n")
            return


if __name__ == "__main__":
    main()
