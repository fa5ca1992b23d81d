"""`tools/figures`: how many cases the tests of reliability go through, added up; with --write into docs/reliability.md.

The tests note what they did where CDP_FIGURES says (`tests/figures.py`). With --long N they do N times as much, and each place of
each system call.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: tools/figures --write -->", "<!-- end of figures -->"
FILES = ("power_loss", "power_loss_published", "fail_at_n", "flips", "scrub")
SELECTED = "loss or path or job or publishing or backup or export or bit"


def run(long: int) -> tuple[dict[str, Counter[str]], float, bool]:
    """(counts by what was done, seconds of CPU, did all pass?)."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as room:
        notes = Path(room) / "figures"
        notes.touch()
        env = {**os.environ, "CDP_FIGURES": str(notes), **({"CDP_LONG": str(long)} if long else {})}
        files = [f"tests/test_{name}.py" for name in FILES]
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-n", "0", "-k", SELECTED, *files]
        before = os.times()
        passed = subprocess.run(command, cwd=ROOT, env=env, check=False, stdout=sys.stderr).returncode == 0
        after = os.times()
        found: dict[str, Counter[str]] = {}
        for line in notes.read_text().splitlines():
            counts = json.loads(line)
            found.setdefault(counts.pop("what"), Counter()).update(counts)
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return found, cpu, passed


def table(found: dict[str, Counter[str]], cpu: float, long: int) -> list[str]:
    """The figures, in Markdown."""
    rows = ["| what | tried |", "| --- | --- |"]
    for what, counts in found.items():
        rows.append(f"| {what} | {', '.join(f'{count:,} {name}' for name, count in counts.items())} |")
    total: Counter[str] = Counter()
    for counts in found.values():
        total.update(counts)
    rows.append(f"| all | {', '.join(f'{count:,} {name}' for name, count in total.items())} |")
    command = f"tools/figures --write{f' --long {long}' if long else ''}"
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return [*rows, "", f"By `{command}` on {day}: {cpu:.0f} s of CPU, every test passed, 0 bytes lost."]


def write(rows: list[str]) -> None:
    """Put them in the page, in the place of the ones before."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join([f"{before}{BEGIN}", "", *rows, "", f"{END}{after}"]))


def main() -> int:
    """The exit status is that of the tests."""
    parser = argparse.ArgumentParser(
        prog="tools/figures", description="count what the tests of reliability go through"
    )
    parser.add_argument("--long", type=int, default=0, metavar="N", help="N times as much")
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    options = parser.parse_args()
    found, cpu, passed = run(options.long)
    if not passed:
        print("tests failed: no figures", file=sys.stderr)
        return 1
    rows = table(found, cpu, options.long)
    print("\n".join(rows))
    if options.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
