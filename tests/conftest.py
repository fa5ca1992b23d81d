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

if TYPE_CHECKING:
    from tests.core import World

# nbdkit takes its packages from the first python3 on PATH, which must be the one that runs the tests.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no bug: the time limit of a test is pytest's.
settings.register_profile("gate", deadline=None)
settings.load_profile("gate")


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
    return short_path.name.replace("_", "-")


@pytest.fixture
def world() -> Iterator["World"]:
    """A state directory whose timelines the test drives itself."""
    from tests.core import World, scratch  # the tests of pure things do without LMDB

    with scratch() as path:
        made = World(path)
        yield made
        made.close()
