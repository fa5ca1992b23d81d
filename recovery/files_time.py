"""`cdp file history` and `cdp file diff`: files through time, asked of the service, or read here from the state directory."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from cdpserver import names
from cdpserver.errors import UnreachableError
from cdpserver.state import StateDir, default_state_dir
from recovery.files import path_of, shown_name
from recovery.files_asked import Said, pages, path_query
from recovery.output import Column, answer_json_items, answer_table, say
from recovery.remote import client
from recovery.together import one_disk

HISTORY_COLUMNS = (
    Column("time_ns", "from"),
    Column("point"),
    Column("changes_text", "what changed"),
    Column("size", right=True),
    Column("mtime_ns_text", "modified"),
    Column("digest_text", "digest"),
)
DIFF_COLUMNS = (Column("change"), Column("fields_text", "what"), Column("shown", "name"))


def history(options: Namespace) -> None:
    """The versions of a file."""
    found = _history(options)
    if options.json:
        answer_json_items(found)
        return
    rows = list(found)
    for known in rows:
        known["changes_text"] = ", ".join(known["changes"]) + (f": {known['why']}" if known["why"] else "")
        known["mtime_ns_text"] = (
            "" if known["mtime_ns"] is None else names.format_time(max(known["mtime_ns"], 0))
        )
        known["digest_text"] = (known["digest"] or "")[:12]
    answer_table(HISTORY_COLUMNS, rows, nothing="the file is in none of these points")
    if rows:
        say("one of them: cdp file get POINT FILE --output DIR")


def _history(options: Namespace) -> Iterator[dict[str, Any]]:
    span = {"volume": options.volume, "since": options.since, "until": options.until}
    service = client(options)
    if _runs(options):
        query = {"disk": options.disk} | span | path_query(path_of(options))
        return pages(service, "files:history", query, Said())
    from cdpserver.files import through

    return through.history(_state(options), options.disk, path_of(options), **span, remark=say)


def diff(options: Namespace) -> None:
    """What differs between two points."""
    options.point, options.other = one_disk(options, options.point), one_disk(options, options.other)
    found = _diff(options)
    if options.json:
        answer_json_items(found)
        return
    rows = []
    for row in found:
        name = shown_name(row)
        rows.append(row | {"shown": "." if name == "/" else name, "fields_text": ", ".join(row["fields"])})
    answer_table(DIFF_COLUMNS, rows, nothing="nothing differs")


def _diff(options: Namespace) -> Iterator[dict[str, Any]]:
    if _runs(options):
        query = {"point": options.point, "other": options.other} | path_query(path_of(options))
        return pages(client(options), "files:diff", query, Said())
    from cdpserver.files import through

    return through.diff(_state(options), options.point, options.other, path_of(options), remark=say)


def _runs(options: Namespace) -> bool:
    try:
        client(options).status()
    except UnreachableError:
        return False
    return True


def _state(options: Namespace) -> StateDir:
    return StateDir.open(default_state_dir(options.state_dir))
