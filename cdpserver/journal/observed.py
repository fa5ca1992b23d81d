"""What *synced* rests on: what a controller saw of QEMU's job, or an operator's word.

It is kept in the control record, in the carry of header pages, and in the notes of base points (docs/format.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cdpserver.errors import CorruptError

OBSERVERS = ("operator", "qmp", "libvirt", "agent")

MOST_CHARACTERS = 64
"""Of an io-status; a header page has to have room for it."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What *synced* rests on.

    by         "operator": somebody said so; "qmp", "libvirt": a controller of the service saw QEMU's job, by that way;
               "agent": that of an agent on another host did; "" where nobody wrote it down
    ready      the job was ready; io_status is its own word, such as "ok"
    time_ns    when that was seen, or said
    """

    by: str = ""
    ready: bool = False
    io_status: str = ""
    time_ns: int = 0

    def as_dict(self) -> dict[str, Any] | None:
        """As the CLI and the API show it; an operator's word says nothing of the job."""
        if not self.by:
            return None
        job = {"ready": self.ready, "io_status": self.io_status} if self.by != "operator" else {}
        return {"by": self.by, "ready": None, "io_status": None, "time_ns": self.time_ns} | job


NOT_WRITTEN = Observed()


def read_observed(value: object, where: str) -> Observed:
    """From a record, a header page or a note. CorruptError."""
    if isinstance(value, dict) and value.keys() == {field.name for field in fields(Observed)}:
        types_fit = all(type(value[field.name]) is field.type for field in fields(Observed))
        if (
            types_fit
            and value["by"] in OBSERVERS
            and value["time_ns"] >= 0
            and len(value["io_status"]) <= MOST_CHARACTERS
        ):
            return Observed(**value)
    raise CorruptError(f"{where} says what *synced* rests on in a way that cannot be read")


def told(said: Mapping[str, Any] | None, *, now_ns: int) -> Observed:
    """From the wire, where the time is `ago_ns`."""
    if said is None:
        return NOT_WRITTEN
    job = {key: value for key, value in said.items() if key != "ago_ns"}
    return Observed(**job, time_ns=max(0, now_ns - said["ago_ns"]))
