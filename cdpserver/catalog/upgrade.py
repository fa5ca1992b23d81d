"""What becomes of the catalog when the state directory goes from one format version to the next."""

import contextlib

from cdpserver import durable
from cdpserver.catalog.recovery import is_readable
from cdpserver.catalog.store import Store, add_row_tables
from cdpserver.state import StateDir


def add_locks_and_policies(state: StateDir) -> None:
    """1 -> 2: empty tables for locks and policies."""
    _add_tables(state, format=1)


def add_protection(state: StateDir) -> None:
    """5 -> 6: empty tables for protected VMs, groups and recoveries."""
    _add_tables(state, format=2)


def add_trials(state: StateDir) -> None:
    """6 -> 7: an empty table for trials."""
    _add_tables(state, format=3)


def _add_tables(state: StateDir, *, format: int) -> None:
    """Give a catalog of `format` every table of this program, and its copy too. May be repeated.

    A catalog that is missing or damaged is left alone: recovering it makes it with every table.
    """
    if not is_readable(state.catalog, format):
        return
    add_row_tables(state.catalog)
    with contextlib.closing(Store(state.catalog, writable=True)) as store:
        durable.write_json(state.catalog_copy, store.content().to_json())
