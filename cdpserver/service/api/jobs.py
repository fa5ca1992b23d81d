"""The routes of jobs, and answering with one: `Prefer: respond-async` (RFC 7240) on what may take long."""

from typing import Annotated, Any, TypeAlias

import trio
from fastapi import APIRouter, Header, Path, Query
from starlette.responses import Response

from cdpserver import messages
from cdpserver.errors import RefusedError
from cdpserver.service.api import models, paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.jobs import Job, Jobs, Work

MAX_WAIT_S = 60.0
"""A client that waits longer asks again: connections that say nothing are taken for dead."""

ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {
        "model": models.Job,
        "description": "Asked for by Prefer: respond-async. The work goes on as a job.",
        "headers": {"Location": {"description": "Where the job is.", "schema": {"type": "string"}}},
    }
}

Prefer: TypeAlias = Annotated[
    str | None, Header(description="respond-async: answer with a job and go on.", examples=["respond-async"])
]
Number: TypeAlias = Annotated[int, Path(ge=1, lt=1 << 63)]


class Long:
    """Does what may take long: before the answer, or as a job if that is preferred."""

    def __init__(self, answers: Answers, jobs: Jobs) -> None:
        self._answers = answers
        self._jobs = jobs

    async def answer(self, prefer: str | None, kind: str, target: str, work: Work) -> Response:
        """What the work answers, or its job."""
        if not _is_asynchronous(prefer):
            return await self._answers.one(await work())
        return await self._accepted(self._jobs.start(kind, target, work))

    async def answer_job(self, prefer: str | None, kind: str, target: str, work: Work) -> Response:
        """The same for work that is always a job, so that others can name it and it outlives whoever asked."""
        job = self._jobs.start(kind, target, work)
        if _is_asynchronous(prefer):
            return await self._accepted(job)
        await job.ended.wait()
        messages.raise_error(job.error or {})
        if job.result is None:
            raise RefusedError(f"{job.name} was cancelled", hint="start it again")
        return await self._answers.one(job.result)

    async def _accepted(self, job: Job) -> Response:
        headers = {"Location": f"/v1/{job.name}", "Preference_Applied": "respond-async"}
        return await self._answers.one(job.as_dict(), 202, **headers)


def _is_asynchronous(prefer: str | None) -> bool:
    return "respond-async" in {part.partition(";")[0].strip().lower() for part in (prefer or "").split(",")}


def routes(answers: Answers, jobs: Jobs) -> APIRouter:
    """Watching, waiting, cancelling."""
    routes = APIRouter(tags=["jobs"])

    @routes.get("/v1/jobs", response_model=list[models.Job] | models.Page[models.Job])
    async def list_jobs(page_size: PageSize = None, page_token: PageToken = None) -> Response:
        """The jobs, oldest first: those under way, and the last 1000 of a day that ended."""
        found = jobs.list_jobs()
        if not paging.is_paged(page_size, page_token):
            return await answers.many([job.as_dict() for job in found])
        key = paging.read_token("jobs", page_token, int)
        size = page_size or paging.DEFAULT_PAGE
        left = [job for job in found if key is None or (job.number,) > key][: size + 1]
        return await paging.answer_page(
            answers, "jobs", [job.as_dict() for job in left], lambda job: (int(job["name"][5:]),), size
        )

    @routes.get("/v1/jobs/{number}", response_model=models.Job)
    async def show_job(
        number: Number,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for its end.")] = 0.0,
    ) -> Response:
        """One job."""
        job = jobs.job(number)
        with trio.move_on_after(wait):
            await job.ended.wait()
        return await answers.one(job.as_dict())

    @routes.delete("/v1/jobs/{number}", response_model=models.Job)
    async def cancel_job(number: Number) -> Response:
        """End a job; its processes are killed. One that has ended stays as it is."""
        return await answers.one((await jobs.cancel(number)).as_dict())

    return routes
