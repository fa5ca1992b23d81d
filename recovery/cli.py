"""`cdp`: the operator's command line. Noun, then verb; answers on stdout, talk on stderr.

Exit codes are those of cdpserver.errors. An error is one line on stderr: `cdp: what is wrong (what to do next)`.

Start-up time is a goal: this module and what it imports at the top are loaded by every command, so they are of the
standard library and small. argparse costs 5 ms; typer costs 130 ms, because it loads pydantic to convert an argument.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence

from cdpserver import names
from cdpserver.errors import BrokenError, CdpError, UsageError
from recovery import chain_tree, check_tree
from recovery.arguments import count, take_disk, take_point, take_yes, when
from recovery.drill_tree import add_bisect, add_drill
from recovery.export_tree import add_export
from recovery.files_tree import add_files, add_mount
from recovery.output import printable
from recovery.points_tree import add_groups, add_points, add_rpo
from recovery.protect_tree import add_agent, add_protect, add_tokens
from recovery.recover_tree import add_recover
from recovery.repo_tree import add_repositories
from recovery.retention_tree import add_capacity, add_retention
from recovery.tree import Commands, lazy

INTERNAL = 1
INTERRUPTED = 130
PIPE_CLOSED = 141
"""As a shell reports a program that SIGINT or SIGPIPE ended."""

LEAST_PAUSE_S = 0.1
DEFAULT_PAUSE_S = 2.0
"""Between two looks of `--watch`."""

_TAKE_A_NEGATIVE = {"--at", "--good", "--bad", "--since", "--until", "--newer", "--size"}
_NEGATIVE = re.compile(r"-[0-9]")


def _new_name(text: str) -> str:
    if text.count("/") == 1:
        vm, name = names.check_disk_name(text).split("/")
        raise UsageError(f"not a name: {names.show(text)}", hint=f"for a disk of a VM: {name} --vm {vm}")
    return names.check_name(text)


def build_parser() -> argparse.ArgumentParser:
    """Every command of `cdp`."""
    commands = Commands()
    _add_seeing(commands)
    add_protect(commands)
    add_agent(commands)
    add_tokens(commands)
    _add_disk(commands)
    add_points(commands)
    add_groups(commands)
    add_rpo(commands)
    chain_tree.add(commands)
    add_export(commands)
    add_files(commands)
    add_mount(commands)
    _add_fork(commands)
    add_recover(commands)
    add_repositories(commands)
    add_drill(commands)
    add_bisect(commands)
    add_retention(commands)
    add_capacity(commands)
    _add_events(commands)
    _add_jobs(commands)
    _add_local(commands)
    return commands.root


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", text) or float(text) < LEAST_PAUSE_S:
        raise UsageError(f"not a pause: {names.show(text)}", hint=f"write seconds from {LEAST_PAUSE_S}")
    return float(text)


def _add_seeing(commands: Commands) -> None:
    status = commands.leaf(
        "status",
        lazy("status", "status"),
        "Show the service, the store and every disk on one screen, warnings first.",
        "cdp status --watch",
    )
    status.add_argument(
        "--watch",
        nargs="?",
        const=DEFAULT_PAUSE_S,
        type=_seconds,
        metavar="SECONDS",
        help=f"again and again, after a pause (else {DEFAULT_PAUSE_S:g} s); Ctrl-C ends it",
    )
    commands.leaf(
        "metrics",
        lazy("status", "metrics"),
        "Print what Prometheus scrapes, for its textfile collector; docs/metrics.md says what each means.",
        "cdp metrics",
    )


def _add_disk(commands: Commands) -> None:
    disk = commands.group("disk", "the disks that are protected")
    add = disk.leaf(
        "add",
        lazy("remote", "disk_add"),
        "Protect a disk. The URI in the answer is what drive-mirror writes to.",
        "cdp disk add vda --vm web --size 64M",
    )
    add.add_argument("name", metavar="NAME", type=_new_name)
    add.add_argument("--size", required=True, type=names.parse_size, help="64M, 1.5G, 10T, or bytes")
    add.add_argument("--vm", metavar="VM", type=names.check_name, help="the VM that it belongs to: VM/NAME")
    add.add_argument("--base", metavar="IMAGE", help="the image that its content started from")
    resize = disk.leaf(
        "resize",
        lazy("remote", "disk_resize"),
        "Let a disk grow as its source has; points before keep their size. To shrink is refused.",
        "cdp disk resize web/vda 128M",
    )
    disk.leaf("list", lazy("remote", "disk_list"), "List the disks.", "cdp disk list --json")
    show = disk.leaf("show", lazy("remote", "disk_show"), "Show one disk.", "cdp disk show web/vda")
    uri = disk.leaf(
        "uri",
        lazy("remote", "disk_uri"),
        "Print where a mirror of your own writes to; over TCP with TLS the disk's secret is in it.",
        "cdp disk uri web/vda",
    )
    remove = disk.leaf(
        "remove",
        lazy("remote", "disk_remove"),
        "Remove a disk with its whole history.",
        "cdp disk remove web/vda --yes",
    )
    take_yes(remove)
    synced = disk.leaf(
        "synced",
        lazy("remote", "disk_synced"),
        "Say that the first copy, or a resync, is complete: QEMU's job is READY.",
        "cdp disk synced web/vda --write-blocking",
    )
    synced.add_argument("--session", metavar="N", type=count, help="the session that it is said of")
    synced.add_argument(
        "--write-blocking", action="store_true", help="the mirror has copy-mode=write-blocking"
    )
    take_disk(resize, show, uri, remove, synced, metavar="NAME")
    resize.add_argument("size", metavar="SIZE", type=names.parse_size, help="64M, 1.5G, 10T, or bytes")


def _add_fork(commands: Commands) -> None:
    fork = commands.group("fork", "writable disks on top of a point")
    add = fork.leaf(
        "add",
        lazy("remote", "fork_add"),
        "Make a writable disk on top of a point; the point never changes.",
        "cdp fork add web/vda@-5m rescue",
    )
    take_point(add)
    take_disk(add, metavar="NAME")
    fork.leaf("list", lazy("remote", "fork_list"), "List the forks.", "cdp fork list")
    remove = fork.leaf(
        "remove",
        lazy("remote", "fork_remove"),
        "Remove a fork with all that was written to it.",
        "cdp fork remove rescue",
    )
    take_disk(remove, metavar="NAME")
    take_yes(remove)


def _add_events(commands: Commands) -> None:
    event = commands.group("event", "what happened")
    listing = event.leaf(
        "list",
        lazy("events", "event_list"),
        "List the newest events, oldest first.",
        "cdp event list --level warning --since -1d --follow",
    )
    listing.add_argument("--follow", action="store_true", help="and go on with those that come")
    listing.add_argument("--level", choices=("debug", "info", "warning", "error"), help="the least level")
    listing.add_argument("--event", metavar="NAME", help="disk.added, or disk for all of that noun")
    listing.add_argument("--disk", metavar="DISK", type=names.check_disk_name)
    listing.add_argument("--since", metavar="WHEN", type=when)
    listing.add_argument(
        "--limit", metavar="N", type=count, default=100, help="only the newest N; default: 100"
    )


def _job(text: str) -> int:
    return count(text.removeprefix("jobs/"))


def _add_jobs(commands: Commands) -> None:
    job = commands.group("job", "long work that the service does")
    job.leaf(
        "list", lazy("jobs", "job_list"), "List what is under way, and what ended lately.", "cdp job list"
    )
    show = job.leaf("show", lazy("jobs", "job_show"), "Show one job.", "cdp job show 12 --json")
    cancel = job.leaf("cancel", lazy("jobs", "job_cancel"), "End a job under way.", "cdp job cancel 12")
    for command in (show, cancel):
        command.add_argument("number", metavar="JOB", type=_job, help="its number")


def _add_local(commands: Commands) -> None:
    segment = commands.group("segment", "the files of a journal")
    show = segment.leaf(
        "show",
        lazy("local", "segment_show"),
        "Print the records of a segment as text. Needs no server, only the file.",
        "cdp segment show intervals/000001/00000001.log --verify",
    )
    show.add_argument("path", metavar="PATH", help="a header log: NNNNNNNN.log")
    show.add_argument("--verify", action="store_true", help="also check payload in the data file beside it")
    index = commands.group("index", "the index of a disk's journal")
    rebuild = index.leaf(
        "rebuild",
        lazy("local", "index_rebuild"),
        "Make a disk's index anew from its segments. Needs no server, and disturbs none.",
        "cdp index rebuild web/vda",
    )
    index_show = index.leaf(
        "show",
        lazy("stored", "index_show"),
        "Print the index of an interval, or a merged index, as text. Needs no server, only the file.",
        "cdp index show intervals/000001/index.mdb",
    )
    index_show.add_argument(
        "path", metavar="PATH", help="an index: index.mdb, open-BOOT.mdb or a file in merged/"
    )
    index_show.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    _add_stored(commands)
    check_tree.add(commands)
    take_disk(rebuild)
    completion = commands.leaf(
        "completion",
        lazy("complete", "print_script"),
        "Print what a shell reads to complete commands, disks and bookmarks of cdp and cdpserver.",
        "source <(cdp completion bash)",
    )
    completion.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh, fish")


def _add_stored(commands: Commands) -> None:
    timeline = commands.group("timeline", "the directory of a disk's history")
    show = timeline.leaf(
        "show",
        lazy("stored", "timeline_show"),
        "Print a timeline as text: base, first copy, intervals, segments, control records. Needs no server.",
        "cdp timeline show web/vda",
    )
    show.add_argument(
        "timeline", metavar="DISK", help="a disk, or the path of a timeline's directory: /... or ./..."
    )
    catalog = commands.group("catalog", "which timeline a disk's name means")
    catalog.leaf(
        "show",
        lazy("stored", "catalog_show"),
        "Print every entry of the catalog, and where its plain copy differs. Needs no server.",
        "cdp catalog show",
    )
    clock = commands.group("clock", "the server's clock")
    clock.leaf(
        "show",
        lazy("stored", "clock_show"),
        "Print what the clock was fixed to. Needs no server.",
        "cdp clock show",
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; UsageError."""
    given = list(arguments)
    for number in range(len(given) - 2, -1, -1):
        # argparse takes `-90s` for an option, unless it is part of one.
        if given[number] in _TAKE_A_NEGATIVE and _NEGATIVE.match(given[number + 1]):
            given[number : number + 2] = [f"{given[number]}={given[number + 1]}"]
    parser = build_parser()
    options = parser.parse_args(given)
    if not options.version and "run" not in options:
        parser.error("name a command: cdp --help lists them")
    return options


def _run(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.version:
        from cdpserver import __version__

        print(f"cdp {__version__}")
        return 0
    return options.run(options) or 0


def main() -> int:
    """Entry point of `cdp`; the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        return _complete()
    _open_missing_streams()
    # What a terminal or a file cannot encode is escaped rather than an error.
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        try:
            code = _run(sys.argv[1:])
        except SystemExit as stop:  # argparse, after --help
            code = int(stop.code or 0)
        sys.stdout.flush()
        return code
    except CdpError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        return _stop_writing(PIPE_CLOSED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except OSError as error:
        return _fail(_system_error(error), BrokenError.exit_code)
    except Exception as error:
        # The process's rim: an operator gets a line, not a traceback.
        if os.environ.get("CDP_DEBUG"):
            raise
        return _fail(f"internal error: {error!r} (CDP_DEBUG=1 shows where; please report it)", INTERNAL)


def _complete() -> int:
    """Answer a shell that completes a line; it gets an exit code, and never a word on the terminal."""
    from recovery.complete import complete

    try:
        complete(build_parser())
    except Exception:
        if os.environ.get("_ARC_DEBUG"):
            raise
        return INTERNAL
    return INTERNAL


def _open_missing_streams() -> None:
    """Give a command that was started with closed streams (`>&-`) some, so that nothing else need think of it."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _system_error(error: OSError) -> str:
    where = f" {error.filename}" if error.filename else ""
    return f"the system refused{where}: {error.strerror or error}"


def _fail(message: str, code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        code = _stop_writing(code)
    try:
        print(f"cdp: {printable(message)}", file=sys.stderr)
    except OSError:
        # Nobody can be told; the exit code still says it.
        return code
    return code


def _stop_writing(code: int) -> int:
    """Send what is still buffered nowhere, so that the interpreter's last flush has nothing to complain about."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
