"""A copy of a disk, or of what changed of it: how it was done, why so, and what it cost."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

How: TypeAlias = Literal["full", "bitmap", "job"]
"""The whole disk, compared on our side; what a dirty bitmap marks; what QEMU's job had kept."""


@dataclass
class Copy:
    """One copy, under way or done. Sizes in bytes; `journalled` is None where a worker ended meanwhile and nobody knows."""

    method: How
    why: str
    journal_began: int
    """What the target's journal had taken when it began."""
    done: int = 0
    total: int = 0
    job_began: int = 0
    """What QEMU's job had sent before."""
    journalled: int | None = 0
    pause_ns: int = 0
    under_way: bool = True

    @classmethod
    def read(cls, shown: dict[str, Any]) -> "Copy":
        """The reverse of `as_dict`."""
        return cls(
            method=shown["method"],
            why=shown["why"],
            journal_began=0,
            done=shown["done_bytes"],
            total=shown["total_bytes"],
            journalled=shown["journalled_bytes"],
            pause_ns=shown["pause_ns"],
            under_way=shown["under_way"],
        )

    def follow(self, done: int, total: int) -> None:
        """How far QEMU's job is."""
        if self.method != "bitmap":
            self.done, self.total = done - self.job_began, total - self.job_began

    def took(self, journal: int) -> None:
        """What the target's journal has taken up to now."""
        grown = journal - self.journal_began
        self.journalled = grown if grown >= 0 else None

    def as_dict(self) -> dict[str, Any]:
        """As the API and the CLI show it."""
        return {
            "method": self.method,
            "why": self.why,
            "under_way": self.under_way,
            "done_bytes": self.done,
            "total_bytes": self.total,
            "sent_bytes": self.done,
            "journalled_bytes": self.journalled,
            "pause_ns": self.pause_ns,
        }

    def cost(self) -> dict[str, Any]:
        """As an event tells it."""
        shown = self.as_dict()
        return {name: shown[name] for name in ("method", "why", "sent_bytes", "journalled_bytes", "pause_ns")}
