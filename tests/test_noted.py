"""A process of ours is noted before it runs, or it does not run."""

import os
import subprocess
from pathlib import Path

from cdpserver.service.processes import noted, wrapped


def test_what_a_process_finds_when_it_runs_is_its_own_note(tmp_path: Path) -> None:
    note, copy = tmp_path / "job.pid", tmp_path / "copy"
    subprocess.run(wrapped(note, ["cp", str(note), str(copy)]), check=True)
    assert copy.read_text().split()[3] == str(os.getpid())
    assert noted(note) is None  # it has ended


def test_who_was_started_by_a_service_that_is_gone_does_not_run(tmp_path: Path) -> None:
    """The next service may have looked for notes before this one was written: nobody would know of the process."""
    note, ran = tmp_path / "indexer.pid", tmp_path / "ran"
    ended = subprocess.run(wrapped(note, ["touch", str(ran)], parent=1), check=False)
    assert ended.returncode == 1
    assert not ran.exists()
