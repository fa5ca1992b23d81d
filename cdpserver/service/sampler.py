"""Once a second: what could be lost of each disk now, put on record (cdpserver/rpo.py).

One question to the workers, whose answer is from memory; a disk that none has open is at rest, and nothing is written of it.
"""

import time
from functools import partial
from typing import Any

import trio

from cdpserver import names
from cdpserver.catalog import Entry
from cdpserver.errors import UsageError
from cdpserver.journal.control import Grade
from cdpserver.names import Ago, At, Latest
from cdpserver.rpo import Record, Sample
from cdpserver.service.core import Core
from cdpserver.service.protection import Protection
from cdpserver.service.vms import Vms

EVERY_S = 1.0

WITHIN_S = 0.8
"""How long workers may take to answer; then the second is one in which the target did not say."""


class Sampler:
    """Samples every disk, and tells what was on record."""

    def __init__(self, core: Core, protection: Protection) -> None:
        self._core = core
        self._protection = protection
        self._whole_ns: dict[str, int] = {}
        """By a timeline's id, when its content was seen whole last."""
        self._last: dict[str, dict[str, Any]] = {}
        self._failed = ""
        self.write_ns: dict[str, int] = {}
        """By a disk's name, how long a write took in the last second; of those that had writes."""

    async def keep_sampling(self) -> None:
        """Until cancelled."""
        due = trio.current_time()
        while True:
            await self._sample()
            due = max(due + EVERY_S, trio.current_time())
            await trio.sleep_until(due)

    async def _sample(self) -> None:
        said, _ = await self._core.targets.status(within_s=WITHIN_S)
        now_ns, monotonic_ns = self._core.clock.now_ns(), time.monotonic_ns()
        found: list[tuple[Entry, Sample]] = []
        for name, entry in (await self._core.thread(self._core.catalog.names)).items():
            status = said.get(name)
            if entry.state != "live" or (status is None and entry.id not in self._last):
                continue
            found.append((entry, self._of(entry, status, now_ns, monotonic_ns)))
        await self._core.thread(self._keep, found)

    def _of(self, entry: Entry, status: dict[str, Any] | None, now_ns: int, monotonic_ns: int) -> Sample:
        before = self._last.get(entry.id, {})
        known = before if status is None else status
        if status is not None:
            self._last[entry.id] = status
            self._note_latency(entry.name, before, status)
        mirror = self._protection.disk(entry.name)
        whole = bool(known.get("synced") or known.get("fork"))
        if whole and status is not None:
            self._whole_ns[entry.id] = now_ns
        behind_ns = mirror.behind_ns(monotonic_ns) if mirror is not None else 0
        whole_ns = self._whole_ns.get(entry.id, entry.created_ns)
        return Sample(
            time_ns=now_ns,
            lag_ns=max(behind_ns, now_ns - whole_ns),
            durable_lag_ns=None if status is None else int(status.get("lag_ns", 0)),
            received_seq=int(known.get("last_seq", 0)),
            durable_seq=int(known.get("durable_seq", 0)),
            write_ns=self.write_ns.get(entry.name, 0),
            grade=Grade[str(known.get("grade", Grade.UNORDERED.label)).upper()],
            resync=not whole,
        )

    def _note_latency(self, name: str, before: dict[str, Any], status: dict[str, Any]) -> None:
        old, new = before.get("counts") or {}, status.get("counts") or {}
        timed = new.get("timed", 0) - old.get("timed", 0)
        self.write_ns.pop(name, None)
        if old and timed > 0:
            self.write_ns[name] = max(0, new["timed_ns"] - old["timed_ns"]) // timed

    def _keep(self, found: list[tuple[Entry, Sample]]) -> None:
        failed = ""
        for entry, sample in found:
            try:
                Record(self._core.state.timeline(entry.id)).add(sample)
            except OSError as error:
                failed = f"{entry.name}: {error.strerror or error}"
        if failed and failed != self._failed:
            self._core.log.emit("rpo.not-recorded", level="warning", reason=failed)
        self._failed = failed

    # -- what was ------------------------------------------------------------------------------------------------

    async def show(
        self, name: str, *, at: str | None, since: str | None, until: str | None, limit: int | None
    ) -> list[dict[str, Any]]:
        """The record of a disk, or of each disk of a VM or group, oldest first; with `at` what was so then."""
        return await self._core.thread(
            partial(on_record, self._core, name, at=at, since=since, until=until, limit=limit)
        )


def on_record(
    core: Core, name: str, *, at: str | None, since: str | None, until: str | None, limit: int | None
) -> list[dict[str, Any]]:
    """What `Sampler.show` gives. For threads."""
    vms = Vms(core)
    entries = vms.disks(name) if vms.several(name) else [core.entry(name)]
    now_ns = core.clock.now_ns()
    since_ns, until_ns = _time(since, now_ns, absent=0), _time(until, now_ns, absent=now_ns)
    rows: list[dict[str, Any]] = []
    for entry in entries:
        record = Record(core.state.timeline(entry.id))
        if at is not None:
            one = record.at(_time(at, now_ns, absent=now_ns))
            rows += [{"disk": entry.name, **one.as_dict()}] if one is not None else []
            continue
        found = record.samples(since_ns=since_ns, until_ns=until_ns)
        found = found if limit is None else found[max(0, len(found) - limit) :]
        rows += [{"disk": entry.name, **sample.as_dict()} for sample in found]
    return sorted(rows, key=lambda row: (row["time_ns"], row["disk"]))


def _time(text: str | None, now_ns: int, *, absent: int) -> int:
    match None if text is None else names.parse_when(text):
        case None:
            return absent
        case At(time_ns):
            return time_ns
        case Ago(delta_ns):
            return max(0, now_ns - delta_ns)
        case Latest():
            return now_ns
        case _:
            raise UsageError(
                f"not a time: {names.show(str(text))}", hint="write 2026-11-22T20:18:05Z or -90s"
            )
