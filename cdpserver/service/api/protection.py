"""The routes of protected VMs."""

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.errors import UsageError
from cdpserver.service.api import models, paging, vm_models
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.protection import Protection
from cdpserver.vm.record import Connection, LibvirtDomain, QmpSocket

VM = "/v1/vms/{name}"


def routes(answers: Answers, protection: Protection) -> APIRouter:
    """A protected VM is desired state: it stands until it is taken back."""
    routes = APIRouter(tags=["vms"])

    @routes.put(VM, response_model=vm_models.Vm)
    async def protect_vm(name: str, body: vm_models.ProtectVm) -> Response:
        """Protect a running VM, or change how. Its disks are registered on return, and copied from then on."""
        return await answers.one(
            await protection.protect(
                name,
                connection_of(name, body.qmp, body.libvirt, body.domain),
                devices=body.disks,
                wait=body.wait,
                drive_mirror=body.drive_mirror,
                agent=body.agent,
            )
        )

    @routes.get("/v1/vms", response_model=list[vm_models.Vm] | models.Page[vm_models.Vm])
    async def list_vms(page_size: PageSize = None, page_token: PageToken = None) -> Response:
        """Every protected VM, by name."""
        return await paging.answer_list(answers, "vms", protection.list_vms(), "vm", (page_size, page_token))

    @routes.get(VM, response_model=vm_models.Vm)
    async def show_vm(name: str) -> Response:
        """One protected VM, and how far its mirrors are."""
        return await answers.one(protection.show(name))

    @routes.delete(VM, response_model=vm_models.UnprotectedVm)
    async def unprotect_vm(name: str) -> Response:
        """End the protection of a VM and its mirrors. The disks keep their history."""
        return await answers.one(await protection.remove(name))

    return routes


def connection_of(name: str, qmp: str | None, libvirt: str | None, domain: str | None) -> Connection:
    """The way to the monitor of the VM `name`. UsageError unless it is one."""
    match qmp, libvirt:
        case str(path), None if domain is None:
            return QmpSocket(path)
        case None, str(uri):
            return LibvirtDomain(uri, domain or name)
    raise UsageError("name qmp, or libvirt and domain", hint="one of them is the way to the VM's monitor")
