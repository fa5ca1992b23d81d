"""The routes of chains: the tree of a disk, and merging its base points."""

from functools import partial

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import models
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.disks import DISK
from cdpserver.service.api.jobs import ACCEPTED, Long, Prefer
from cdpserver.service.merges import Merges


def routes(answers: Answers, long: Long, merges: Merges) -> APIRouter:
    """What is asked of, or done to, a chain."""
    routes = APIRouter(tags=["base points"])

    @routes.get(f"{DISK}:tree", response_model=models.Branch)
    async def show_tree(name: str) -> Response:
        """Base points as they follow on each other, with forks and locked points where they belong, and the bytes of each."""
        return await answers.one(await merges.tree(name))

    @routes.post(f"{DISK}:merge", response_model=models.Merged, responses=ACCEPTED)
    async def merge_base_points(name: str, body: models.Merge, prefer: Prefer = None) -> Response:
        """Delete a base point, or pull or commit others into it. What stays reads the same. Always a job, one for a disk."""
        work = partial(merges.merge, name, body.verb, body.point, body.base)
        return await long.answer_job(prefer, f"snapshot.{body.verb}", name, work)

    return routes
