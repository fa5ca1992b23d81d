"""`tools/demo`: the whole way in front of one's eyes, with real QEMU processes and a real file system.

    guest -> qemu-storage-daemon -> mirror -> cdpserver -> any instant, compared with independent copies

Exit status 0 only if everything compared as it had to.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from cdpserver.errors import CdpError
from cdpserver.names import format_size, parse_size
from tools.kit.processes import FailedError, ended_by_signals, scratch, why_no_mount
from tools.kit.qmp import QmpError
from tools.kit.server import Cdp, Server
from tools.story import drive_mirror
from tools.story.protection import Protection
from tools.story.report import Report

MIN_SIZE = 64 << 20
"""Room for the file system and everything that is written to it."""


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/demo", description="Continuous protection, shown and compared."
    )
    parser.add_argument("--size", default="256M", help="size of the disk (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="length of each stretch of work (default: %(default)s)"
    )
    parser.add_argument("--no-mount", action="store_true", help="write with qemu-io, as without root")
    parser.add_argument("--directory", type=Path, help="where to put the state directory and the disks")
    parser.add_argument("--keep", action="store_true", help="leave the files behind")
    parser.add_argument("--seed", type=int, default=1, help="of the guest's work")
    chosen = parser.parse_args(arguments)
    chosen.size = parse_size(chosen.size)
    if chosen.size < MIN_SIZE:
        parser.error(f"--size is at least {format_size(MIN_SIZE)}")
    return chosen


def tell(report: Report, chosen: argparse.Namespace, directory: Path) -> None:
    """The story, from the start of the server to what stock tools read after its end."""
    state = directory / "state"
    report.step("A server")
    report.say(f"$ cdpserver --state-dir {state}")
    with Server(state) as server, ExitStack() as stack:
        cdp = Cdp(state, report.say)
        story = Protection(report, server, cdp, directory, seconds=chosen.seconds)
        no_mount = "--no-mount" if chosen.no_mount else why_no_mount()
        story.begin(stack, size=chosen.size, no_mount=no_mount, seed=chosen.seed)
        story.work()
        story.keep_an_instant()
        story.lose()
        story.open_the_instant()
        story.recover()
        story.cut_a_base_point()
        story.kill_the_target()
        story.end()
        drive_mirror.tell(report, server, cdp, directory)
        report.step("The server stops; stock tools read the base point without it")
        status = server.stop()
        report.say(f"cdpserver ended with exit status {status}")
        if status:
            raise FailedError(f"cdpserver ended with exit status {status}")
    story.read_the_base_point()


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status."""
    try:
        chosen = options(arguments)
    except CdpError as error:
        sys.stderr.write(f"tools/demo: {error}\n")
        return error.exit_code
    report = Report(Console(width=None if sys.stdout.isatty() else 130))
    failure = ""
    with scratch("cdp-demo-", parent=chosen.directory, keep=chosen.keep) as directory:
        try:
            with ended_by_signals():
                tell(report, chosen, directory)
        except KeyboardInterrupt as signal:
            failure = f"ended by {signal}"
        except (FailedError, QmpError, CdpError, OSError) as error:
            failure = str(error)
        if chosen.keep:
            report.say(f"the files are in {directory}")
    report.summary(failure)
    return 0 if report.good and not failure else 1


if __name__ == "__main__":
    sys.exit(main())
