"""An operator's command line made safe to run beside the VM that it is of: no network, no sockets of the host's, no disks but the
recovered ones. Pure.

The guest keeps its network cards, so that it boots as ever: each is alone on a hub of its own, which leads nowhere.
What would let it out or change something on the host is refused by name rather than passed over.
"""

import json
import re
from collections.abc import Iterator

from cdpserver.errors import UsageError
from cdpserver.vm.launch.template import Option, Template, has_place

DROPPED = frozenset(
    {
        "net",
        "vnc",
        "spice",
        "display",
        "nographic",
        "sdl",
        "monitor",
        "mon",
        "qmp",
        "qmp-pretty",
        "gdb",
        "s",
        "parallel",
        "name",
        "D",
        "trace",
    }
)
"""Ways to the outside that a guest does not notice."""

DISKS = frozenset({"drive", "blockdev"})

REFUSED = frozenset(
    {
        "hda",
        "hdb",
        "hdc",
        "hdd",
        "sd",
        "mtdblock",
        "pflash",
        "fda",
        "fdb",
        "virtfs",
        "fsdev",
        "add-fd",
        "chroot",
        "runas",
    }
)

REFUSED_DEVICES = (
    "vfio-",
    "vhost-",
    "usb-host",
    "usb-redir",
    "ivshmem",
    "scsi-generic",
    "scsi-block",
    "pci-assign",
)

NIC_KEPT = ("model", "mac", "addr", "vectors", "id")

_READ_ONLY = re.compile(r"(?:^|,)(?:readonly(?:=on)?|read-only=on|media=cdrom)(?:,|$)")
_AGENT = re.compile(r"name=org\.qemu\.guest_agent\.0")


def isolate(template: Template) -> Template:
    """The template of the isolated VM. UsageError for what cannot be isolated."""
    agents = {
        chardev
        for option in template.options
        if option.name == "device" and _AGENT.search(option.value or "")
        for chardev in [_part(option.value or "", "chardev")]
        if chardev is not None
    }
    made = list(_isolated(template, agents))
    return Template(
        template.program,
        (*made, Option("nic", "none"), Option("display", "none"), Option("monitor", "none")),
    )


def _isolated(template: Template, agents: set[str]) -> Iterator[Option]:
    hubs, ports = 0, 0
    for option in template.options:
        name, value = option.name, option.value or ""
        if name in DROPPED:
            continue
        _check(option)
        if name in ("netdev", "nic"):
            hubs += 1
            yield _unplugged(name, value, hubs)
        elif name == "serial":
            ports += 1
            ours = has_place(value) or ports == 1
            yield Option(name, (value if has_place(value) else "file:{serial}") if ours else "null")
        elif name == "chardev":
            yield _quiet(value, agents)
        else:
            yield option
    if not ports:
        yield Option("serial", "file:{serial}")


def _check(option: Option) -> None:
    name, value = option.name, option.value or ""
    if name in REFUSED:
        raise _cannot(option, "it reaches what is on this host")
    if name in DISKS and not has_place(value) and not _read_only(value):
        raise _cannot(option, "it could write to a disk that is not the point's: make it read-only")
    if name == "device" and (device := _driver(value)).startswith(REFUSED_DEVICES):
        raise _cannot(option, f"{device} reaches what is on this host")


def _cannot(option: Option, why: str) -> UsageError:
    return UsageError(
        f"the command cannot be isolated: {' '.join(option.words())[:200]}",
        hint=f"{why}; give a command without it",
    )


def _read_only(value: str) -> bool:
    if value.startswith("{"):
        options = _json(value)
        return options.get("read-only") is True
    return _READ_ONLY.search(value) is not None


def _driver(value: str) -> str:
    if value.startswith("{"):
        return str(_json(value).get("driver", ""))
    return value.partition(",")[0].removeprefix("driver=")


def _json(value: str) -> dict[str, object]:
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError("the command holds JSON that cannot be read", hint="quote as for a shell")
    return found


def _part(value: str, key: str) -> str | None:
    """One of the comma-separated parts, or of the JSON object."""
    if value.startswith("{"):
        found = _json(value).get(key)
        return None if found is None else str(found)
    return next((part[len(key) + 1 :] for part in value.split(",") if part.startswith(f"{key}=")), None)


def _unplugged(name: str, value: str, hub: int) -> Option:
    """The same card, and nobody else on its network."""
    if name == "nic" and _driver(value) == "none":
        return Option(name, value)
    kept = "".join(f",{key}={part}" for key in NIC_KEPT if (part := _part(value, key)) is not None)
    if name == "netdev":
        kept = f",id={_part(value, 'id')}"
    return Option(name, f"hubport{kept},hubid={hub}")


def _quiet(value: str, agents: set[str]) -> Option:
    id = _part(value, "id")
    if has_place(value):
        return Option("chardev", value)
    if id in agents:
        return Option("chardev", f"socket,id={id},path={{agent}},server=on,wait=off")
    return Option("chardev", f"null,id={id}")
