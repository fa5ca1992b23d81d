"""What the shell offers while a `cdp` line is typed: names of disks, VMs, groups, forks, bookmarks, base points and jobs.

Loaded only when a shell asks (`_ARGCOMPLETE` is set), never by a command. Names come from the service, which has a fifth
of a second for it; without it, disks are those of the catalog's plain copy. Whatever goes wrong, nothing is offered and
nothing is printed: the operator is in the middle of a line.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import argcomplete.finders
from argcomplete import shell_integration
from argcomplete.completers import BaseCompleter, DirectoriesCompleter, FilesCompleter

from cdpserver.catalog.content import read_copy
from cdpserver.errors import CdpError
from cdpserver.state import StateDir, default_state_dir
from recovery.client import Client, Object
from recovery.output import answer_json

PATIENCE_S = 0.2
"""A key was pressed: what takes longer than this feels broken."""

MOST_POINTS = 200
"""Newest bookmarks or base points that are offered."""

USUAL_WHENS = ("latest", "-1m", "-5m", "-1h")

Completer: TypeAlias = Callable[..., list[str]]


class _Nothing(BaseCompleter):
    """For numbers, sizes and new names: argcomplete's own would offer files."""

    def __call__(self, **_: Any) -> list[str]:
        return []


class _Finder(argcomplete.finders.CompletionFinder):
    """argcomplete, for words with an `@` inside."""

    def quote_completions(
        self, completions: list[str], cword_prequote: str, last_wordbreak_pos: int | None
    ) -> list[str]:
        """As the shell wants them. Readline cuts `disk@mark` at the `@` but leaves it on the second part."""
        at = last_wordbreak_pos
        if at is not None and os.environ.get("_ARGCOMPLETE_SHELL") == "bash":
            at -= completions[:1] != [] and completions[0][at] == "@"
        return super().quote_completions(completions, cword_prequote, at)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process."""
    attach(parser)
    _Finder()(parser, always_complete_options=False, default_completer=_Nothing())


def attach(parser: argparse.ArgumentParser) -> None:
    """Tell argcomplete what to offer for every argument that names something."""
    for command in _leaves(parser):
        for action in command._actions:
            if (completer := _completer(command.prog, action)) is not None:
                action.completer = completer  # type: ignore[attr-defined]


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _leaves(verb)


def _completer(command: str, action: argparse.Action) -> Completer | None:
    """By what the help calls the argument: the same word always stands for the same thing."""
    word = action.metavar or action.dest
    if word == "DISK|VM":
        return offer_sets if command.startswith(("cdp point", "cdp rpo")) else offer_disks_and_vms
    if word == "DISK@WHEN" and "VM@WHEN" in (action.help or ""):
        return offer_points_of_sets
    if word != "NAME":
        return _offers().get(str(word))
    if action.option_strings or command.endswith(" add"):
        return None  # a new name
    return offer_forks if command.startswith("cdp fork") else offer_disks


def _offers() -> dict[str, Completer]:
    files, directories = cast(Completer, FilesCompleter()), cast(Completer, DirectoriesCompleter())
    return {
        "DISK": offer_disks,
        "DISK@WHEN": offer_points,
        "DISK|VM@WHEN": offer_points_of_vms,
        "GROUP": offer_groups,
        "WHEN": offer_whens,
        "VM": offer_vms,
        "JOB": offer_jobs,
        "PATH": files,
        "IMAGE": files,
        "DIR": directories,
        "state_dir": directories,
    }


# --- what is there


def offer_disks(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every disk, forks too."""
    return _disks(_state(parsed_args))


def offer_forks(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every fork."""
    return _names(lambda: _client(_state(parsed_args)).forks())


def offer_jobs(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The jobs that are kept."""
    return [name.removeprefix("jobs/") for name in _names(lambda: _client(_state(parsed_args)).jobs())]


def offer_vms(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every VM that has a disk."""
    return _vms(_disks(_state(parsed_args)))


def offer_groups(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every group."""
    return _groups(_state(parsed_args))


def offer_disks_and_vms(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Every disk, and every VM that has one."""
    disks = _disks(_state(parsed_args))
    return [*_vms(disks), *disks]


def offer_sets(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Whatever has points: disks, VMs and groups."""
    return [*offer_disks_and_vms(parsed_args), *offer_groups(parsed_args)]


def offer_points(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Disks; as soon as only one can be meant, its instants: there are always several, so the shell stops at the `@`."""
    state = _state(parsed_args)
    return _points(state, prefix, [] if "@" in prefix else _disks(state), [])


def offer_points_of_vms(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The same with VMs."""
    disks = _disks(state := _state(parsed_args))
    return _points(state, prefix, disks, _vms(disks))


def offer_points_of_sets(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The same with VMs and groups."""
    disks = _disks(state := _state(parsed_args))
    return _points(state, prefix, disks, [*_vms(disks), *_groups(state)])


def _points(state: StateDir, prefix: str, disks: list[str], sets: list[str]) -> list[str]:
    name, at, _when = prefix.partition("@")
    if not at:
        meant = [one for one in (*disks, *sets) if one.startswith(name)]
        if len(meant) != 1:
            return meant
        (name,) = meant
    whens = _common_whens(state, name) if name in sets else _whens(state, name)
    return [f"{name}@{when}" for when in whens]


def offer_whens(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Instants of the disk that was named before."""
    disk = getattr(parsed_args, "disk", None)
    return _whens(_state(parsed_args), disk) if isinstance(disk, str) else list(USUAL_WHENS)


def _state(options: argparse.Namespace) -> StateDir:
    return StateDir(default_state_dir(getattr(options, "state_dir", None)))


def _client(state: StateDir) -> Client:
    return Client(state, timeout_s=PATIENCE_S)


def _disks(state: StateDir) -> list[str]:
    try:
        return _fields(_client(state).disks(), "name")
    except CdpError:
        # No service, or a busy one.
        return _catalog(state)


def _catalog(state: StateDir) -> list[str]:
    try:
        content = read_copy(state.catalog_copy)
    except (CdpError, OSError):
        return []
    return [name for name, entry in content.entries.items() if entry.state == "live"]


def _whens(state: StateDir, disk: str) -> list[str]:
    client = _client(state)
    bookmarks = _names(
        lambda: client.points(disk, since=None, until=None, kind="bookmark", limit=MOST_POINTS)
    )
    numbers = _names(lambda: client.base_points(disk)[-MOST_POINTS:], "number")
    return [*bookmarks, *USUAL_WHENS, *(f"bp:{number}" for number in numbers)]


def _vms(disks: list[str]) -> list[str]:
    return sorted({name.partition("/")[0] for name in disks if "/" in name})


def _groups(state: StateDir) -> list[str]:
    return _names(lambda: _client(state).groups())


def _common_whens(state: StateDir, name: str) -> list[str]:
    """Instants of all disks of a VM or group: base points are of one."""
    client = _client(state)
    bookmarks = _names(lambda: client.vm_points(name, kind="bookmark", limit=MOST_POINTS))
    return [*bookmarks, *USUAL_WHENS]


def _names(ask: Callable[[], list[Object]], key: str = "name") -> list[str]:
    try:
        return _fields(ask(), key)
    except CdpError:
        return []


def _fields(items: list[Object], key: str) -> list[str]:
    return [str(item[key]) for item in items if item.get(key) is not None]


# --- the shells' side

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """What a shell has to read once, for `cdp` and `cdpserver`."""
    # Bash does not fall back on files: where nothing is offered, a file of the current directory would be wrong.
    return shell_integration.shellcode(
        ("cdp", "cdpserver"), shell=shell, complete_arguments=("-o", "nospace")
    )


def print_script(options: argparse.Namespace) -> None:
    """`cdp completion SHELL`"""
    text = script(options.shell)
    if options.json:
        answer_json({"shell": options.shell, "script": text})
    else:
        sys.stdout.write(text.rstrip("\n") + "\n")
