"""What every test may rely on: nbdkit's PATH, Hypothesis without deadlines, short socket paths, a world of timelines."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from cdpserver.errors import CorruptError

if TYPE_CHECKING:
    from tests.core import World

# nbdkit takes its packages from the first python3 on PATH, which must be the one that runs the tests.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no bug: the time limit of a test is pytest's.
settings.register_profile("gate", deadline=None)
settings.load_profile("gate")


# Where real processes meet on a busy machine, one may be late: not in time, not listening yet, gone already. Such a test runs
# once more, and the gate shows both tries. What an assertion or a check of ours says of data is final.
FINAL = [AssertionError, ExceptionGroup, CorruptError, "DID NOT RAISE"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("real") or item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.flaky(reruns=1, rerun_except=FINAL))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for Unix sockets, whose paths hold 107 bytes: `tmp_path` uses up most of them."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as path:
        yield Path(path)


@pytest.fixture
def home(short_path: Path) -> Path:
    """Primary storage, where recovered disks go."""
    directory = short_path / "home"
    directory.mkdir()
    return directory


@pytest.fixture
def vm(short_path: Path) -> str:
    """A VM's name that no other test has."""
    return short_path.name.replace("_", "0")


@pytest.fixture
def world() -> Iterator["World"]:
    """A state directory whose timelines the test drives itself."""
    from tests.core import World, scratch  # the tests of pure things do without LMDB

    with scratch() as path:
        made = World(path)
        yield made
        made.close()
