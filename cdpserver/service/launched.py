"""The VM of a recovery, when it is the service that starts it: by the operator's own command, on the recovery's forks.

It is a QEMU on its own from then on: it outlives the service, and whoever shuts it down is the operator.
"""

from pathlib import Path

import trio

from cdpserver import names
from cdpserver.errors import CdpError, UsageError
from cdpserver.service import domains, homes
from cdpserver.service.core import Core
from cdpserver.service.launching import LaunchError, Vm, read_file
from cdpserver.service.recovering import fork_uri
from cdpserver.vm.connect import connect
from cdpserver.vm.launch import kvm, template
from cdpserver.vm.launch.parts import Accel, Disk, Image, Nbd
from cdpserver.vm.launch.template import Template
from cdpserver.vm.recovery.attach import Attach, attach, detach
from cdpserver.vm.recovery.record import RecoveredDisk, Recovery

GONE_S = 10.0
LOOK_S = 0.05

ATTACH_S = 30.0
"""For a QEMU that opens all disks; in the beginning of each it may wait for the server."""


class Accels:
    """What guests are run by. Whether KVM does is found out once, when somebody asks for it."""

    def __init__(self) -> None:
        self._kvm: bool | None = None
        self._probing = trio.Lock()

    async def choose(self, asked: str | None) -> Accel | None:
        """tcg, kvm, or None for what the command says; `auto` is kvm where it has been seen to run a guest."""
        match asked:
            case None | "tcg" | "kvm":
                return asked
            case "auto":
                async with self._probing:
                    if self._kvm is None:
                        self._kvm = await trio.to_thread.run_sync(kvm.runs_guests)
                return "kvm" if self._kvm else "tcg"
        raise UsageError(f"not an accelerator: {names.show(asked)}", hint="it is tcg, kvm or auto")


def check_command(one: Recovery) -> None:
    """UsageError for a file that the VM cannot be started with. For threads."""
    if one.libvirt:
        domains.check(one)
    elif one.vm_command:
        read_command(one.vm_command)


def read_command(path: str) -> Template:
    """The operator's command. UsageError. For threads."""
    text = read_file(path, "the VM's command")
    if text.lstrip().startswith("<"):
        raise UsageError(
            f"{names.show(path)} is a libvirt domain, and the service starts a QEMU of its own",
            hint="name the libvirt that starts it: --libvirt URI; or give a QEMU command line",
        )
    return template.read(text)


async def launch(core: Core, one: Recovery) -> None:
    """Start the VM on what it is to run on, unless it runs or is somebody else's to start; its monitor listens on return.

    UsageError, LaunchError.
    """
    if one.libvirt:
        try:
            await domains.launch(core, one)
        except BaseException:
            with trio.CancelScope(shield=True):
                await _until_let_go(core, one)
            raise
        return
    if one.attach:
        try:
            await _attach(core, one, one.attach)
        except BaseException:
            with trio.CancelScope(shield=True):
                await _until_let_go(core, one)
            raise
        return
    vm = Vm(core, one.id)
    if not one.vm_command or vm.is_running():
        return
    found = await core.thread(read_command, one.vm_command)
    disks = sources_of(core, one)
    try:
        command = template.command(found, one.name, disks, vm.places, accel=one.accel or None)
        await vm.start(command, isolated=False)
    except BaseException:
        with trio.CancelScope(shield=True):
            await core.thread(vm.end)
            await _until_let_go(core, one)
        raise
    core.log.emit("recovery.launched", recovery=one.id, command=one.vm_command)


async def _attach(core: Core, one: Recovery, how: Attach) -> None:
    """Give the disks to the QEMU that is there. UnreachableError if none is; the disks that it had taken by then are its own."""
    disks = await core.thread(lambda: sources_of(core, one))
    with trio.move_on_after(ATTACH_S):
        async with connect(one.connection) as monitor:
            try:
                await attach(monitor, one.id, list(enumerate(disks)), how)
            except CdpError:
                await detach(monitor, one.id, len(disks))
                raise
        core.log.emit("recovery.attached", recovery=one.id, qmp=one.qmp, how=one.attach)
        return
    raise LaunchError(
        f"the QEMU at {one.qmp} took no disks in {ATTACH_S:.0f} s",
        hint="look whether somebody else has its monitor, which serves one at a time",
    )


async def _until_let_go(core: Core, one: Recovery) -> None:
    """The forks have no client any more: their server has seen the end of QEMU's connections."""
    with trio.move_on_after(GONE_S):
        for disk in one.disks:
            while (entry := core.catalog.get(disk.fork)) is not None:
                if not (await core.target_status(entry)).get("clients"):
                    break
                await trio.sleep(LOOK_S)


def sources_of(core: Core, one: Recovery) -> list[Disk]:
    """The disks by their short names, each where its newest content is. For threads."""
    return [Disk(names.split_name(disk.disk)[0], source_of(core, one, disk)) for disk in one.disks]


def source_of(core: Core, one: Recovery, disk: RecoveredDisk) -> Nbd | Image:
    """Where the VM's newest content is: in a stream at home from the start."""
    at_home = one.mode == "stream" or disk.at == "home"
    found = Image(disk.target, disk.format, homes.is_device(Path(disk.target)))
    return found if at_home else Nbd(fork_uri(core, disk))


def forget(core: Core, one: Recovery) -> None:
    """Take away what is left of a VM that does not run any more. For threads."""
    vm = Vm(core, one.id)
    if one.vm_command and not one.libvirt and not vm.is_running():
        vm.end()
