"""The control API: HTTP with JSON on `STATE_DIR/api.sock`, or over TLS with tokens. `cdp` is its client.

`/v1/openapi.json` describes it.

Names are stable: a disk is its name, a job `jobs/N`. A list comes whole, or in pages when `page_size` or `page_token` is given.
"""

from typing import Any

import trio
from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.responses import Response

import cdpserver
from cdpserver.service.agents import Agents
from cdpserver.service.api import agents as agent_routes
from cdpserver.service.api import backups as backup_routes
from cdpserver.service.api import capacity as capacity_routes
from cdpserver.service.api import chains as chain_routes
from cdpserver.service.api import disks as disk_routes
from cdpserver.service.api import downloads as download_routes
from cdpserver.service.api import drills as drill_routes
from cdpserver.service.api import events as event_routes
from cdpserver.service.api import files as file_routes
from cdpserver.service.api import jobs as job_routes
from cdpserver.service.api import locks as lock_routes
from cdpserver.service.api import models, rights, seeing, together
from cdpserver.service.api import policies as policy_routes
from cdpserver.service.api import protection as protection_routes
from cdpserver.service.api import pruning as pruning_routes
from cdpserver.service.api import recoveries as recovery_routes
from cdpserver.service.api import repositories as repository_routes
from cdpserver.service.api import times as time_routes
from cdpserver.service.api import vms as vm_routes
from cdpserver.service.api.answers import ERRORS, Answers, Rim, WholeBody, add_error_handlers
from cdpserver.service.api.bearers import Bearers
from cdpserver.service.api.jobs import Long
from cdpserver.service.api.server import serve
from cdpserver.service.capacity import Capacity
from cdpserver.service.core import Core
from cdpserver.service.forks import Forks
from cdpserver.service.groups import Groups
from cdpserver.service.instants import Instants
from cdpserver.service.locks import Locks
from cdpserver.service.overview import Overview
from cdpserver.service.parts import Parts
from cdpserver.service.policies import Policies
from cdpserver.service.roles import Role, Roles
from cdpserver.service.sources import Sources
from cdpserver.service.vms import Vms
from cdpserver.tokens import Known

__all__ = ["build", "serve"]

DESCRIPTION = __doc__ or ""


def _operation_id(route: APIRoute) -> str:
    """The name of the function: programs made from the description call their methods so, hence it never changes."""
    return route.name


def build(core: Core, parts: Parts, roles: Roles, stopping: trio.Event) -> FastAPI:
    """The application; its streams end at `stopping`.

    Routes with a verb come first: a name may hold a slash, so its pattern takes everything.
    """
    app = FastAPI(
        title="cdpserver",
        version=cdpserver.__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        generate_unique_id_function=_operation_id,
        responses=ERRORS,
        dependencies=[Depends(rights.guard(roles))],
    )
    children, disks, protection = parts.children, parts.disks, parts.protection
    base_points = protection.base_points
    answers, instants = Answers(core), Instants(core)
    long = Long(answers, parts.jobs)
    add_error_handlers(app)
    app.add_middleware(WholeBody)
    app.add_middleware(Bearers, known=Known(core.state), log=core.log)
    app.add_middleware(Rim, log=core.log)
    app.include_router(vm_routes.marks_routes(answers, parts.marks))
    app.include_router(disk_routes.verbs(answers, long, disks, instants, base_points))
    app.include_router(chain_routes.routes(answers, long, base_points.merges))
    app.include_router(disk_routes.disks(answers, long, disks))
    app.include_router(disk_routes.forks(answers, long, disks, Forks(core, disks)))
    app.include_router(
        seeing.routes(core, answers, Overview(core, children, protection, parts.sampler), parts.sampler)
    )
    app.include_router(vm_routes.routes(answers, Vms(core)))
    app.include_router(vm_routes.groups_routes(answers, Groups(core)))
    app.include_router(agent_routes.routes(answers, Agents(core, protection)))
    app.include_router(protection_routes.routes(answers, protection))
    app.include_router(lock_routes.routes(answers, Locks(core)))
    app.include_router(pruning_routes.routes(answers, disks.pruning))
    app.include_router(capacity_routes.routes(answers, Capacity(core)))
    app.include_router(policy_routes.routes(answers, Policies(core, base_points.look_again)))
    app.include_router(recovery_routes.routes(answers, parts.recoveries, roles))
    app.include_router(file_routes.routes(core, answers, disks.browsing))
    app.include_router(time_routes.routes(core, answers, disks.browsing))
    app.include_router(download_routes.routes(core, disks.browsing))
    app.include_router(drill_routes.routes(answers, long, parts.recoveries.drills, roles))
    app.include_router(repository_routes.routes(answers, parts.attached))
    app.include_router(backup_routes.routes(answers, long, Sources(core), parts.backups))
    app.include_router(job_routes.routes(answers, parts.jobs))
    app.include_router(event_routes.routes(core, answers, stopping))
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]

    @app.get("/v1/status", tags=["service"], response_model=models.Status)
    async def status() -> Response:
        """The service and its processes."""
        return await answers.one(
            {
                "version": cdpserver.__version__,
                "state_dir": str(core.state.path),
                "time_ns": core.clock.now_ns(),
                "children": children.status(),
                "disks": len(await core.thread(core.catalog.names)),
            }
        )

    @app.get("/v1/uri", tags=["points"], response_model=models.PointUri | together.SeveralUris)
    async def point_uri(point: str, asked: Request) -> Response:
        """Where DISK@WHEN, or DISK@WHEN/p2 or DISK@WHEN/lv/VG/LV, is read: an absolute NBD URI, durable on return.

        Of VM@WHEN and GROUP@WHEN that of each disk. What opens it over TCP with TLS, the disk's secret, only operators are told.
        """
        role: Role = asked.scope["state"]["role"]
        return await answers.one(await instants.uri(point, secret=role >= Role.OPERATOR))

    @app.get(
        "/v1/points/{point:path}", tags=["points"], response_model=together.Shown | together.SeveralShown
    )
    async def show_point(point: str) -> Response:
        """One instant of a disk, VM or group: its grade, and what that rests on."""
        return await answers.one(await instants.show(point))

    rights.check_all(app)
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description of the routes, without the error object of its own that it believes to answer with."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for operations in made["paths"].values():
            for operation in operations.values():
                name = operation["operationId"]
                operation["x-least-role"] = rights.LEAST[name].name.lower()
                operation["x-agents-own"] = name in rights.AGENTS_OWN
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(unused, None)
        app.openapi_schema = made
    return app.openapi_schema
