"""A base point whose file, note or map was damaged or deleted by hand: found, named with what it takes with it, made anew."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdpserver.basepoint import note_what_is_missing, pending
from cdpserver.check import Report, check_timeline
from cdpserver.check.depth import Everything
from cdpserver.errors import CorruptError
from cdpserver.nodes import base_point_path, nodes, note_path, read_note
from cdpserver.view.chain import map_path
from cdpserver.view.history import History
from tests.core import scratch
from tests.test_prune import Kept, check

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def pruned() -> Iterator[Kept]:
    """Intervals 10 to 13 are left, and base points 8 to 11; interval 10 stands on bp:8."""
    with scratch() as path:
        made = Kept(path)
        made.prune()
        assert (made.intervals(), [node.number for node in nodes(made.line.directory)]) == (
            [10, 11, 12, 13],
            [8, 9, 10, 11],
        )
        yield made
        made.close()


@pytest.fixture
def kept(pruned: Kept) -> Iterator[Kept]:
    """As `pruned`, with every base point as it was again afterwards."""
    directory = pruned.line.directory
    saved = {path: path.read_bytes() for path in directory.glob("bp-*")}
    yield pruned
    for path, content in saved.items():
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(0o444)


def look(kept: Kept, *, full: bool = True) -> Report:
    return check_timeline(
        kept.world.state.path, kept.entry.id, boot_id=kept.world.boot, depth=Everything(content=full)
    )


@pytest.mark.parametrize("hurt", ["lost", "damaged", "empty"])
def test_the_file_that_the_journal_stands_on(kept: Kept, hurt: str) -> None:
    """Neither it nor what is read from it can be made anew from what is left: all of it is named, and nothing is served wrong."""
    path = base_point_path(kept.line.directory, 8)
    path.chmod(0o644)
    match hurt:
        case "lost":
            path.unlink()
        case "damaged":
            path.write_bytes(b"not a QCOW2 file" * 64)
        case "empty":
            path.write_bytes(b"")
    report = look(kept)
    named = {name for damage in report.damage for name in damage.named}
    assert {"bp:9", "bp:10", "bp:11"} <= named
    assert max(damage.affected for damage in report.damage) >= 3
    with pytest.raises(CorruptError):
        kept.read(kept.line.last_seq)


def test_the_newest_file_is_made_anew_by_the_service(kept: Kept) -> None:
    """What it looks for is cuts after the newest file that is there; nothing stands on that one yet, so nothing else is lost."""
    base_point_path(kept.line.directory, 11).unlink()
    history = History(kept.world.state.path, kept.line.timeline, kept.world.boot)
    try:
        assert [cut.number for cut in pending(history)] == [11]
    finally:
        history.close()
    assert look(kept).whole and check(kept) > 0


@pytest.mark.parametrize("number", [8, 10])
@pytest.mark.parametrize("hurt", ["lost", "damaged"])
def test_a_note_is_written_anew_from_the_journal(kept: Kept, number: int, hurt: str) -> None:
    """Also that of the base point which stands in the place of dropped intervals: the segment after it carries on from it."""
    path, before = note_path(kept.line.directory, number), read_note(kept.line.directory, number)
    path.unlink()
    if hurt == "damaged":
        path.write_text('{"number": 8')
    report = look(kept)
    lost = f"the note bp-{number}.json is missing or damaged: restart cdpserver, it writes it anew"
    assert any(damage.finding.what == lost for damage in report.damage), report.damage
    assert note_what_is_missing(kept.world.state, kept.line.directory) == ([number], [])
    assert read_note(kept.line.directory, number) == before
    assert look(kept).whole and check(kept) > 10


def test_a_note_that_nobody_can_write_anew(kept: Kept) -> None:
    """Its file stays: another holds only what differs from it."""
    directory = kept.line.directory
    base_point = base_point_path(directory, 7)
    assert not base_point.exists()
    shutil.copy(base_point_path(directory, 8), base_point)
    assert note_what_is_missing(kept.world.state, directory) == ([], [7])
    try:
        [damage] = [d for d in look(kept).damage if d.named == ("bp:7",)]
        assert "no record of its cut" in damage.finding.what and damage.finding.hint == "remove the file"
        above = base_point_path(directory, 8)
        above.chmod(0o644)
        subprocess.run(
            ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", base_point.name, str(above)], check=True
        )
        [damage] = [d for d in look(kept).damage if d.named == ("bp:7",)]
        assert damage.finding.hint == "leave the file where it is: bp:8 stands on it"
    finally:
        base_point.unlink()


@pytest.mark.parametrize("number", [8, 11])
@pytest.mark.parametrize("hurt", ["lost", "damaged"])
def test_a_map_is_disposable(kept: Kept, number: int, hurt: str) -> None:
    path: Path = map_path(base_point_path(kept.line.directory, number))
    path.chmod(0o644)
    path.unlink() if hurt == "lost" else path.write_bytes(b"cdpmap1\n" + bytes(40))
    assert look(kept).whole and check(kept) > 10
