"""Intervals are dropped, and what is left reads as before: instants in islands of history, and base points themselves."""

import random

import pytest

from cdpserver.check import check_timeline
from cdpserver.check.depth import Everything
from cdpserver.errors import CorruptError, RefusedError, UsageError
from cdpserver.journal.log import Journal
from cdpserver.names import At, BasePoint, Seq
from cdpserver.nodes import base_point_path, nodes, note_path
from cdpserver.view.chain import map_path
from tests.core import Line, World, check_view
from tests.islands import drop, publish
from tests.model import BLOCK

pytestmark = pytest.mark.real

SIZE = 1 << 20


def churn(line: Line, dice: random.Random, count: int = 30) -> None:
    for _ in range(count):
        line.world.now_ns += dice.randrange(1, 1_500_000_000)
        offset = dice.randrange(SIZE // 512) * 512
        length = min(dice.choice((512, BLOCK, 3 * BLOCK, 70_000)), SIZE - offset)
        if dice.random() < 0.3:
            line.zero(offset, length, trim=dice.random() < 0.5)
        else:
            line.write(offset, dice.randbytes(length))


@pytest.fixture
def line(world: World) -> Line:
    """A disk with six intervals, each but the last with its base point."""
    dice = random.Random(5)
    made = world.add(SIZE)
    churn(made, dice)
    made.synced()
    for number in range(5):
        churn(made, dice)
        made.cut()
        publish(made, number)
    churn(made, dice)
    return made


def instants_of(line: Line, interval: int) -> list[int]:
    """The model's instants whose records lie in an interval. While it is there."""
    journal = Journal(line.directory)
    first = journal.first().seq
    found = [seq for seq in line.model.instants if seq >= first and journal.at_seq(seq).interval == interval]
    journal.close()
    return found


def check_some(line: Line, seqs: list[int]) -> None:
    for seq in random.Random(3).sample(seqs, min(5, len(seqs))):
        with line.view(seq) as view:
            check_view(view, line.model, seq)


@pytest.mark.parametrize("gone", [[1], [1, 2, 3], [2], [3, 4], [1, 3, 5], [1, 2, 3, 4, 5]])
def test_what_is_left_reads_as_before(line: Line, gone: list[int]) -> None:
    held = {number: instants_of(line, number) for number in range(1, 7)}
    for number in gone:
        drop(line, number)
    for number, seqs in held.items():
        if number not in gone:
            check_some(line, seqs)
    for seq in line.cuts:
        with line.view(seq) as view:
            check_view(view, line.model, seq)
    lost = [seq for number in gone for seq in held[number] if seq not in line.cuts]
    for seq in random.Random(4).sample(lost, 8):
        with pytest.raises(RefusedError, match="not kept"), line.view(seq):
            pass


def test_a_dropped_instant_is_refused_with_the_nearest_on_both_sides(line: Line) -> None:
    lost = instants_of(line, 3)
    journal = Journal(line.directory)
    time_ns = journal.at_time(journal.first_reader(3).header.first_time_ns + 3_000_000_000)
    journal.close()
    assert time_ns is not None and time_ns.interval == 3
    drop(line, 3)
    with line.points() as points:
        for when in (Seq(lost[len(lost) // 2]), At(time_ns.time_ns + 1)):
            with pytest.raises(UsageError, match="not kept any more") as refused:
                points.resolve(when, now_ns=line.world.now_ns)
            assert f"seq:{line.cuts[1]}" in refused.value.hint, "the end of interval 2"
            assert f"seq:{line.cuts[2]}" in refused.value.hint, "base point 2, which is interval 3's end"
        assert points.resolve(BasePoint(2), now_ns=line.world.now_ns).seq == line.cuts[2]
        assert points.resolve(Seq(line.cuts[2]), now_ns=line.world.now_ns).seq == line.cuts[2]
        found = points.points(now_ns=line.world.now_ns)
        assert [p.seq for p in found if p.kind == "bp"] == line.cuts
        seconds = {p.seq for p in found if p.kind == "rp"}
        assert not seconds & set(lost)


def test_the_beginning_can_go(line: Line) -> None:
    for number in (1, 2):
        drop(line, number)
    with line.points() as points:
        with pytest.raises(UsageError, match="not kept any more") as refused:
            points.resolve(Seq(3), now_ns=line.world.now_ns)
        assert f"after is {''}" in refused.value.hint and f"seq:{line.cuts[0]}" in refused.value.hint
        assert points.resolve(BasePoint(0), now_ns=line.world.now_ns).seq == line.cuts[0]
    # The writer goes on, indexes too, also after a power loss.
    line.world.reboot(clean=False)
    churn(line, random.Random(8))
    check_some(line, line.model.instants[-20:])
    report = check_timeline(
        line.world.state.path, line.timeline.id, boot_id=line.world.boot, depth=Everything(content=True)
    )
    assert report.whole, report
    line.cut()
    publish(line, 5)
    with line.view(line.cuts[5]) as view:
        check_view(view, line.model, line.cuts[5])


def test_a_missing_interval_without_a_base_point_is_damage(line: Line) -> None:
    seqs = instants_of(line, 4)
    drop(line, 3)
    base_point_path(line.directory, 2).unlink()
    report = check_timeline(line.world.state.path, line.timeline.id, boot_id=line.world.boot)
    assert any("missing before this segment" in damage.finding.what for damage in report.damage)
    with pytest.raises(CorruptError, match=r"interval 3 .* is missing"), line.view(seqs[3]):
        pass


@pytest.mark.parametrize("spoil", ["missing", "torn", "of another file", "empty"])
def test_a_map_is_made_anew_when_it_cannot_be_believed(line: Line, spoil: str) -> None:
    path = map_path(base_point_path(line.directory, 3))
    whole = path.read_bytes()
    match spoil:
        case "missing":
            path.unlink()
        case "torn":
            path.write_bytes(whole[: len(whole) // 2])
        case "of another file":
            path.write_bytes(map_path(base_point_path(line.directory, 2)).read_bytes())
        case "empty":
            path.write_bytes(b"")
    for number in (1, 2, 3, 4):
        drop(line, number)
    check_some(line, instants_of(line, 5))


def test_a_view_reads_on_while_its_chain_is_merged(line: Line) -> None:
    """Files that it has open lose their names, or another file takes the name."""
    for number in (1, 2, 3, 4):
        drop(line, number)
    [*_, seq] = instants_of(line, 5)
    with line.view(seq) as view:
        view.read(0, BLOCK)
        for node in nodes(line.directory):
            path = base_point_path(line.directory, node.number)
            path.with_suffix(".other").write_bytes(b"nonsense")
            path.with_suffix(".other").rename(path)
        check_view(view, line.model, seq)
    with pytest.raises(CorruptError), line.view(seq) as view:
        view.read(0, BLOCK)


def test_a_fork_stands_on_an_island(line: Line) -> None:
    seqs = instants_of(line, 4)
    fork = line.world.fork(line, seqs[len(seqs) // 2])
    for number in (1, 2, 3, 5):
        drop(line, number)
    dice = random.Random(2)
    churn(fork, dice)
    check_some(fork, fork.model.instants)
    fork.cut()
    publish(fork, 0)
    churn(fork, dice)
    drop(fork, 1)
    check_some(fork, instants_of(fork, 2))


def test_a_lost_note_loses_the_name_alone(line: Line) -> None:
    note_path(line.directory, 4).unlink()
    with line.points() as points:
        assert [p.seq for p in points.points(now_ns=line.world.now_ns, kind="bp")] == line.cuts[:4]
        assert points.resolve(BasePoint(4), now_ns=line.world.now_ns).seq == line.cuts[4]


def test_a_view_that_is_open_goes_on_when_what_lies_below_it_is_dropped(line: Line) -> None:
    """Before its first read, and when it has looked into all of them."""
    [*_, seq] = instants_of(line, 5)
    with line.view(seq) as fresh, line.view(seq) as warm, line.view(line.last_seq) as newest:
        check_view(warm, line.model, seq)
        for number in (1, 2, 3, 4):
            drop(line, number)
            check_view(newest, line.model, line.last_seq)
        check_view(fresh, line.model, seq)
        check_view(warm, line.model, seq)
    line.check_live(0, SIZE)
