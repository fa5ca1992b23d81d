"""An operator's own QEMU command line, with the recovered disks put in. Pure.

    qemu-system-x86_64 -machine q35 -m 4096 -smp 2 \\
      -device virtio-blk-pci,drive={disk:vda},bootindex=1 \\
      -drive file={uri:vdb},format=raw,if=virtio  -netdev bridge,id=n0,br=br0 -device virtio-net-pci,netdev=n0

{disk:NAME} is a block node that is made for the disk NAME, {uri:NAME} its NBD URI; {name} is the VM's name, {dir} a directory of
its own, {serial} and {agent} a log and a socket in it. A monitor of ours is added, and what keeps QEMU from being ours is
taken away (-daemonize, -pidfile) or refused.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from cdpserver.errors import UsageError
from cdpserver.names import show
from cdpserver.vm.launch import parts
from cdpserver.vm.launch.parts import Accel, Disk, Image, Nbd, Places

MAX_BYTES = 64 << 10
"""Of a command file: what the kernel takes of a single argument is twice that."""

FLAGS = frozenset(
    {
        "nodefaults",
        "no-user-config",
        "nographic",
        "S",
        "s",
        "snapshot",
        "daemonize",
        "enable-kvm",
        "no-reboot",
        "no-shutdown",
        "no-acpi",
        "no-hpet",
        "no-fd-bootchk",
        "usb",
        "full-screen",
        "mem-prealloc",
        "preconfig",
        "singlestep",
        "no-quit",
        "only-migratable",
        "win2k-hack",
        "xen-attach",
        "xen-domid-restrict",
        "alt-grab",
        "ctrl-grab",
        "nodefconfig",
        "sdl",
    }
)
"""Options of QEMU 7.2 without a value."""

REFUSED = {
    "snapshot": "what the guest writes would be lost",
    "incoming": "a point has disks and no memory to go on with",
    "loadvm": "a point has disks and no memory to go on with",
    "readconfig": "what it holds is not seen here",
    "preconfig": "nobody would let it go on",
    "S": "nobody would let it go on",
}

TAKEN_AWAY = frozenset({"daemonize", "pidfile"})

_PLACE = re.compile(r"\{(?:(disk|uri):([A-Za-z0-9._-]+)|(name|dir|serial|agent))\}")
_PROGRAM = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm|kvm")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of QEMU, without its dash; None where it takes no value."""

    name: str
    value: str | None

    def words(self) -> list[str]:
        """As it is written."""
        return [f"-{self.name}"] if self.value is None else [f"-{self.name}", self.value]


@dataclass(frozen=True, slots=True)
class Template:
    """A command file that was read."""

    program: str
    options: tuple[Option, ...]


def read(text: str) -> Template:
    """What a command file says. UsageError for what is no QEMU command, or could not be a recovered VM."""
    if len(text) > MAX_BYTES:
        raise UsageError(f"the command has {len(text)} characters", hint=f"at most {MAX_BYTES}")
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UsageError(f"the command cannot be read: {error}", hint="quote as for a shell") from None
    if not words or not _PROGRAM.fullmatch(PurePath(words[0]).name):
        first = show(words[0]) if words else "nothing"
        raise UsageError(
            f"the command begins with {first}",
            hint="the file holds one command line: qemu-system-x86_64 ..., or a libvirt domain in XML",
        )
    options = tuple(_options(words[1:]))
    for option in options:
        if option.name in REFUSED:
            raise UsageError(f"the command has -{option.name}: {REFUSED[option.name]}", hint="leave it out")
    return Template(words[0], tuple(option for option in options if option.name not in TAKEN_AWAY))


def _options(words: Sequence[str]) -> Iterator[Option]:
    left = iter(words)
    for word in left:
        name = word.removeprefix("-").removeprefix("-")
        if name == word or not name:
            raise UsageError(
                f"{show(word)} stands in the command without an option",
                hint="a disk is {disk:NAME} in a -device",
            )
        if name in FLAGS:
            yield Option(name, None)
            continue
        value = next(left, None)
        if value is None:
            raise UsageError(f"-{name} has no value in the command", hint="complete it")
        yield Option(name, value)


def command(
    template: Template, name: str, disks: Sequence[Disk], places: Places, *, accel: Accel | None = None
) -> list[str]:
    """The whole command line. UsageError unless every disk has a place in it; `accel` goes before what the file says."""
    used: set[str] = set()
    filled = [_fill(option, name, disks, places, used) for option in template.options]
    for disk in disks:
        if disk.name not in used:
            raise UsageError(
                f"the command has no place for the disk {disk.name}",
                hint=f"write drive={{disk:{disk.name}}} in its -device",
            )
    if accel is not None:
        filled = [option for option in filled if option.name not in ("accel", "enable-kvm")]
    if accel is not None or not _says_accel(filled):
        filled.insert(0, Option("accel", accel or "tcg"))
    given = {option.name for option in filled}
    if "name" not in given:
        filled.insert(0, Option("name", parts.comma(name)))
    if not given & {"display", "nographic", "vnc", "spice", "sdl"}:
        filled.append(Option("display", "none"))
    words = [template.program]
    for number, disk in enumerate(disks):
        words += parts.blockdevs(number, disk)
    for option in filled:
        words += option.words()
    return [*words, *parts.monitor(places)]


def _says_accel(options: Sequence[Option]) -> bool:
    return any(
        option.name in ("accel", "enable-kvm")
        or (option.name in ("machine", "M") and "accel=" in (option.value or ""))
        for option in options
    )


def _fill(option: Option, name: str, disks: Sequence[Disk], places: Places, used: set[str]) -> Option:
    numbers = {disk.name: number for number, disk in enumerate(disks)}

    def fill(found: re.Match[str]) -> str:
        kind, disk, word = found.groups()
        if word is not None:
            values: dict[str, str | Path] = {
                "name": name,
                "dir": places.directory,
                "serial": places.serial,
                "agent": places.agent,
            }
            return parts.comma(values[word])
        if disk not in numbers:
            raise UsageError(
                f"the command has a place for {show(disk)}, and the point no such disk",
                hint=f"it has {', '.join(numbers)}",
            )
        used.add(disk)
        return parts.node(numbers[disk]) if kind == "disk" else parts.comma(_location(disks[numbers[disk]]))

    value = None if option.value is None else _PLACE.sub(fill, option.value)
    return Option(option.name, value)


def _location(disk: Disk) -> str:
    match disk.source:
        case Nbd(uri):
            return uri
        case Image(path):
            return path


def has_place(value: str) -> bool:
    """Is something of ours put in here?"""
    return _PLACE.search(value) is not None
