"""The routes of protected VMs."""

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import models, paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.protection import Protection

VM = "/v1/vms/{name}"


def routes(answers: Answers, protection: Protection) -> APIRouter:
    """A protected VM is desired state: it stands until it is taken back."""
    routes = APIRouter(tags=["vms"])

    @routes.put(VM, response_model=models.Vm)
    async def protect_vm(name: str, body: models.ProtectVm) -> Response:
        """Protect a running VM, or change how. Its disks are registered on return, and copied from then on."""
        return await answers.one(
            await protection.protect(
                name, body.qmp, devices=body.disks, wait=body.wait, drive_mirror=body.drive_mirror
            )
        )

    @routes.get("/v1/vms", response_model=list[models.Vm] | models.Page[models.Vm])
    async def list_vms(page_size: PageSize = None, page_token: PageToken = None) -> Response:
        """Every protected VM, by name."""
        return await paging.answer_list(answers, "vms", protection.list_vms(), "vm", (page_size, page_token))

    @routes.get(VM, response_model=models.Vm)
    async def show_vm(name: str) -> Response:
        """One protected VM, and how far its mirrors are."""
        return await answers.one(protection.show(name))

    @routes.delete(VM, response_model=models.UnprotectedVm)
    async def unprotect_vm(name: str) -> Response:
        """End the protection of a VM and its mirrors. The disks keep their history."""
        return await answers.one(await protection.remove(name))

    return routes
