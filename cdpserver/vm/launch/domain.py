"""A libvirt domain for a recovered VM: of our own, or an operator's, with the recovered disks put in. Pure.

A disk's place is the <disk> with its name as <serial>, else as <target dev=>, which is what a VM protected through libvirt calls
its disks. What else the file has stays; a writable disk that is not the point's is refused, since the old VM may run on it.
libvirt 9.0 drops <reconnect> of a disk, so whoever starts the domain sees to the delay (`vm.recovery.domains`).
"""

from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from cdpserver.errors import UsageError
from cdpserver.names import show
from cdpserver.vm.launch import parts
from cdpserver.vm.launch.machine import Machine
from cdpserver.vm.launch.parts import Accel, Disk, Image, Nbd

ElementTree.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")

OF_SOURCE = ("source", "driver", "backingStore", "mirror", "auth", "encryption")
"""What a <disk> says of where its content is."""

LETTERS = "abcdefghijklmnop"
"""Of the targets vda, vdb, ...: a recovery has no more disks."""


def describe(machine: Machine, disks: Sequence[Disk]) -> str:
    """A domain of our own, with places for the disks. It has a guest agent's channel, and no interface."""
    root = Element("domain", type="qemu")
    SubElement(root, "memory", unit="MiB").text = str(machine.memory_mib)
    SubElement(root, "vcpu").text = str(machine.cpus)
    system = SubElement(root, "os")
    SubElement(system, "type", arch="x86_64", machine=machine.machine).text = "hvm"
    if machine.direct is not None:
        SubElement(system, "kernel").text = machine.direct.kernel
        if machine.direct.initrd is not None:
            SubElement(system, "initrd").text = machine.direct.initrd
        SubElement(system, "cmdline").text = machine.direct.append
    SubElement(SubElement(root, "features"), "acpi")
    SubElement(root, "cpu", mode="maximum")
    devices = SubElement(root, "devices")
    for disk, letter in zip(disks, LETTERS, strict=False):
        place = SubElement(devices, "disk", type="file", device="disk")
        SubElement(place, "target", dev=f"vd{letter}", bus="virtio")
        SubElement(place, "serial").text = parts.serial(disk)
    SubElement(devices, "controller", type="usb", model="none")
    SubElement(SubElement(devices, "serial", type="pty"), "target", port="0")
    channel = SubElement(devices, "channel", type="unix")
    SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    SubElement(devices, "memballoon", model="none")
    return ElementTree.tostring(root, encoding="unicode")


def fill(
    text: str, name: str, uuid: str, disks: Sequence[Disk], *, accel: Accel | None = None, same: bool = False
) -> str:
    """The domain with these disks; `same` keeps its own UUID. UsageError unless each disk has a place, and each place a disk."""
    root = read(text)
    root.attrib.pop("id", None)
    if accel is not None:
        root.set("type", "kvm" if accel == "kvm" else "qemu")
    _one(root, "name").text = name
    known = _one(root, "uuid")
    if not same or not known.text:
        known.text = uuid
    places = root.findall("./devices/disk")
    for disk in disks:
        place = next((p for p in places if p.findtext("serial") == parts.serial(disk)), None)
        place = next((p for p in places if _target(p) == disk.name), None) if place is None else place
        if place is None:
            raise UsageError(
                f"the domain has no place for the disk {disk.name}",
                hint=f"give a <disk> the <target dev='{disk.name}'/>, or that <serial>",
            )
        places.remove(place)
        _put(place, disk.source)
    for place in places:
        if place.find("readonly") is None and place.get("device", "disk") not in ("cdrom", "floppy"):
            raise UsageError(
                f"the domain has the disk {show(_target(place))}, and the point no such disk",
                hint="take it out, or mark it <readonly/>",
            )
    return ElementTree.tostring(root, encoding="unicode")


def read(text: str) -> Element:
    """What a file says. UsageError for what is no domain."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UsageError(
            f"the domain cannot be read: {error}", hint="virsh dumpxml --inactive writes one"
        ) from None
    if root.tag != "domain":
        raise UsageError(f"<{root.tag}> is no domain", hint="virsh dumpxml --inactive writes one")
    return root


def _one(root: Element, tag: str) -> Element:
    found = root.find(tag)
    if found is None:
        found = Element(tag)
        root.insert(0, found)
    return found


def _target(place: Element) -> str:
    target = place.find("target")
    return "" if target is None else target.get("dev", "")


def _put(place: Element, source: Nbd | Image) -> None:
    for tag in OF_SOURCE:
        for old in place.findall(tag):
            place.remove(old)
    match source:
        case Nbd(uri):
            place.set("type", "network")
            server, export = parts.nbd_server(uri)
            made = Element("source", protocol="nbd", name=export)
            if server["type"] == "unix":
                SubElement(made, "host", transport="unix", socket=server["path"])
            else:
                SubElement(made, "host", name=server["host"], port=server["port"])
            SubElement(made, "reconnect", delay=str(parts.RECONNECT_S))
            format = "raw"
        case Image(path, format, is_device):
            place.set("type", "block" if is_device else "file")
            made = Element("source", {"dev" if is_device else "file": path})
    place.insert(0, made)
    place.insert(0, Element("driver", name="qemu", type=format, discard="unmap"))
