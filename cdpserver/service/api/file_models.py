"""What answers about files look like: a part of `models`."""

from typing import Literal

from pydantic import Field

from cdpserver.service.api.models import Answer, Count


class File(Answer):
    """A file. A name or target that is no UTF-8 has U+FFFD where it is none, and its bytes in `name_hex`, `target_hex`."""

    name: str
    type: str = Field(
        description="file, dir, link, fifo, socket, char, block; volume; or unreadable, with the reason in `why`."
    )
    size: Count
    mtime_ns: int | None
    mode: Count | None = Field(description="The number of chmod(2).")
    uid: Count | None
    gid: Count | None
    target: str | None = Field(description="Where a link leads.")
    name_hex: str | None = None
    target_hex: str | None = None
    why: str | None = None
    holds: str | None = Field(None, description="Of a volume: a file system, lvm, luks.")


class Files(Answer):
    """A page of files. It may be empty and not the last one."""

    items: list[File]
    next_page_token: str | None
    point: str = Field(description="The point that this and all further pages are of.", examples=["d@seq:7"])
    remarks: list[str] = Field(description="What is to be known of the file system, such as its journal.")


class FileStat(File):
    """All that is known of a file."""

    path: str
    atime_ns: int
    links: Count
    xattrs: dict[str, str] = Field(description="Values in hex.")
    point: str
    remarks: list[str]


class Preview(Answer):
    """The head of a file."""

    name: str
    size: Count
    bytes: Count = Field(description="So many are shown.")
    kind: Literal["text", "binary", "image"]
    text: str | None = None
    hex: str | None = None
    width: Count | None = None
    height: Count | None = None
    point: str
    remarks: list[str]


class FileVersion(Answer):
    """A file from one point to another; without a type it was not there."""

    point: str
    time_ns: Count
    last_point: str
    last_time_ns: Count
    changes: list[str] = Field(description="What is not as in the version before.", examples=[["content"]])
    type: str | None
    size: Count | None
    mtime_ns: int | None
    digest: str | None = Field(description="BLAKE3 of the content, in hex.")
    why: str


class FileVersions(Answer):
    """A page of versions."""

    items: list[FileVersion]
    next_page_token: str | None
    remarks: list[str] = Field(description="What is to be known of the file system at the points so far.")


class FileDifference(Answer):
    """A file that two points do not have alike."""

    name: str
    change: Literal["added", "removed", "changed"]
    fields: list[str]
    before: File | None
    after: File | None


class FileDifferences(Answer):
    """A page of differences."""

    items: list[FileDifference]
    next_page_token: str | None
    point: str
    other: str
    remarks: list[str]
