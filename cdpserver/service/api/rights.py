"""Which role each route takes. A route that is in no set here keeps the service from starting, and a test from passing."""

from collections.abc import Awaitable, Callable, Iterable, Iterator

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from cdpserver.errors import ForbiddenError, RefusedError
from cdpserver.service.roles import Role, Roles


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOOKS = _words(
    """
    status show_overview show_metrics scrape list_events stream_events list_jobs show_job
    list_disks show_disk list_forks show_fork list_groups show_group list_vms show_vm list_agent_vms
    list_points list_vm_points show_point point_uri list_base_points show_tree list_locks show_policy plan_prune usage forecast
    list_recoveries show_recovery list_drills list_rpo list_backups list_repositories list_sources
    """
)
"""What shows how things are, and nothing that guests have stored."""

OPERATES = _words(
    """
    say_synced set_bookmark cut_base_point rebuild_base_point add_fork add_lock cancel_job
    start_recovery abort_recovery retry_recovery commit_recovery undo_recovery drill_point lend_forks return_forks
    attach_backup detach_backup run_backup report say_agent_vm_arrived say_mirror_synced ask_mirror_holds say_mirror_lost
    """
)
"""What makes something, or says something of a disk, and loses nothing."""

READS = _words(
    """
    show_disk_uri show_mirror
    list_files find_files stat_file preview_file download_file download_tree list_file_versions diff_files
    """
)
"""What shows what guests have stored, or how to get at it."""

RULES = _words(
    """
    add_disk remove_disk resize_disk say_mirror_size remove_fork merge_base_points prune set_policy clear_policy remove_lock
    add_group remove_group protect_vm protect_agent_vm unprotect_vm add_repository remove_repository
    add_source remove_source
    """
)
"""What loses history, or lets a disk use the store."""

LEAST = {
    operation: role
    for role, operations in (
        (Role.VIEWER, LOOKS),
        (Role.OPERATOR, OPERATES | READS),
        (Role.ADMIN, RULES),
    )
    for operation in operations
}
"""The least of the roles that include each other."""

AGENTS_OWN = _words(
    """
    list_agent_vms report say_agent_vm_arrived
    show_mirror say_mirror_synced ask_mirror_holds say_mirror_lost say_mirror_size
    """
)
"""All that the role `protect` may, of its own agent and the disks of its VMs. Which VMs those are, an admin says."""

LOCAL_ONLY = frozenset({"lend_forks", "return_forks"})
"""What is about a process of this host."""


def check_all(app: FastAPI) -> None:
    """Every route has its role."""
    routes = set(_names(app.routes))
    assert routes == LEAST.keys(), routes ^ LEAST.keys()


def _names(routes: Iterable[BaseRoute]) -> Iterator[str]:
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _names(included.routes)
        elif isinstance(route, APIRoute):
            yield route.name


def guard(roles: Roles) -> Callable[[Request], Awaitable[None]]:
    """What every request passes. ForbiddenError for one that its role may not make."""

    async def check(request: Request) -> None:
        operation = str(request.scope["route"].name)
        state = request.scope["state"]
        if state["role"] != Role.PROTECT:
            roles.check(state["role"], LEAST[operation], operation)
        elif operation not in AGENTS_OWN:
            raise ForbiddenError(f"{operation} is nothing for an agent", hint="take another token")
        elif (agent := request.path_params.get("agent", state["agent"])) != state["agent"]:
            raise ForbiddenError(
                f"the token is of the agent {state['agent']}, not of {agent}"[:300],
                hint="cdp token add AGENT --role protect makes one for each",
            )
        if operation in LOCAL_ONLY and "until_known" in state:
            raise RefusedError(f"{operation} is about a process of the service's host", hint="run it there")

    return check
