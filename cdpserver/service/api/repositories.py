"""The routes of repositories, and of backups in them as points."""

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from cdpserver.service.api.answers import Answers
from cdpserver.service.api.models import Answer, Body, Text
from cdpserver.service.attached import Attached


class AddRepository(Body):
    """PUT /v1/repositories"""

    path: Text = Field(description="The absolute path of a repository on the server.")
    key_file: Text = Field("", description="The absolute path of the file that holds its key.")
    key_command: Text = Field(
        "",
        description="Or a command of the shell that prints it, which the service runs each time that it opens the repository.",
    )


class Repository(Answer):
    """A repository that the server knows."""

    id: str
    path: str
    encrypted: bool


class Attach(Body):
    """POST /v1/backups:attach"""

    backup: Text = Field(
        description="backup:ID, backup:ID/DISK, or a volume of that.", examples=["backup:latest"]
    )
    repository: Text | None = Field(None, description="The id or path of the repository that it is in.")


class AttachedDisk(Answer):
    """One disk of a backup, as a point."""

    disk: str = Field(description="Its name when it was backed up.")
    point: str


class AttachedBackup(Answer):
    """A backup as a point: what takes DISK@WHEN takes it."""

    backup: str = Field(description="The whole id.")
    name: str = Field(description="The VM that its disks are.")
    repository: str
    time_ns: int
    point: str = Field(description="The disk, the volume, or all disks, as asked for.")
    disks: list[AttachedDisk]


class ListedBackup(Answer):
    """A backup in a repository that is registered."""

    id: str
    name: str = Field(description="What was backed up, with the instant.")
    kind: str
    time: str
    time_ns: int
    disks: list[str]
    grade: str = Field(description="That of its worst disk: crash or unordered.")
    repository: str


class Detached(Answer):
    """A backup that is attached no more."""

    detached: str


def routes(answers: Answers, attached: Attached) -> APIRouter:
    """Repositories that are registered, and their backups."""
    routes = APIRouter(tags=["backups"])

    @routes.put("/v1/repositories", response_model=Repository)
    async def add_repository(body: AddRepository) -> Response:
        """Register a repository, or where it is now; its backups are points from then on."""
        return await answers.one(await attached.add(body.path, body.key_file, body.key_command))

    @routes.get("/v1/repositories", response_model=list[Repository])
    async def list_repositories() -> Response:
        """Those that are registered."""
        return await answers.many(await attached.repositories())

    @routes.delete("/v1/repositories/{which:path}", response_model=Repository)
    async def remove_repository(which: str) -> Response:
        """Forget a repository, by its id or path; nothing in it is touched."""
        return await answers.one(await attached.remove(which))

    @routes.get("/v1/backups", response_model=list[ListedBackup])
    async def list_backups(name: str | None = None, repository: str | None = None) -> Response:
        """The backups in registered repositories, or in one (by id or path), oldest first; or those of one disk, VM or group."""
        return await answers.many(await attached.backups(name, repository))

    @routes.post("/v1/backups:attach", response_model=AttachedBackup)
    async def attach_backup(body: Attach) -> Response:
        """A backup as a point; one that is attached already stays as it is."""
        return await answers.one(await attached.attach(body.backup, body.repository))

    @routes.post("/v1/backups/{backup}:detach", response_model=Detached)
    async def detach_backup(backup: str) -> Response:
        """Take an attached backup away; it stays in its repository."""
        await attached.detach(backup)
        return await answers.one({"detached": backup})

    return routes
