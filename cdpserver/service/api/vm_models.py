"""What the API takes and gives of protected VMs."""

from pydantic import Field

from cdpserver.service.api.models import Answer, Body, Resync, Text


class ProtectVm(Body):
    """PUT /v1/vms/VM"""

    qmp: Text | None = Field(
        None, description="The absolute path of a QMP monitor's Unix socket on the server; this, or libvirt."
    )
    libvirt: Text | None = Field(None, description="The URI of the libvirt that owns the monitor.")
    domain: Text | None = Field(None, description="Its domain, if its name is not the VM's.")
    disks: list[Text] = Field(
        [], description="Drive names, targets of libvirt, device ids or node names; all that the guest has."
    )
    wait: bool = Field(
        False, description="The guest waits for a target that is gone, rather than leave a gap."
    )
    drive_mirror: bool = False
    agent: Text | None = Field(
        None, description="The absolute path of the guest agent's socket; else it stays."
    )


class VmDisk(Answer):
    """A disk of a protected VM."""

    name: str
    device: str
    node: str = Field(description="QEMU's node; empty until it was found.")
    state: str = Field(description="waiting, starting, copying, resyncing, synced or degraded.")
    reason: str
    uri: str
    resync: Resync | None
    bitmap: str = Field(
        description="The dirty bitmap at the source that the target is anchored to: a resync sends what that marks."
    )


class MovesTo(Answer):
    """The QEMU that a VM is to move into, and who waits for it there."""

    qmp: str | None
    libvirt: str | None
    domain: str | None
    by: str | None
    reason: str = Field(description="What is waited for.")


class Vm(Answer):
    """A protected VM."""

    vm: str
    qmp: str | None
    libvirt: str | None
    domain: str | None
    by: str | None = Field(description="The `cdp agent` on another host that looks after it.")
    moves_to: MovesTo | None
    method: str
    wait: bool
    agent: str | None = Field(description="The guest agent's socket.")
    disks: list[VmDisk]


class UnprotectedVm(Answer):
    """A VM that is protected no more."""

    vm: str
    removed: bool
    left: str = Field(description="Why its mirrors could not be ended in QEMU; empty if they were.")
