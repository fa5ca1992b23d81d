"""The plan of a copy: everything is read once, nothing but data is written into a fresh file, and the mark never lies."""

import random

from hypothesis import given
from hypothesis import strategies as st

from cdpserver.copying.plan import CHUNK, GAP, Chunk, Extents, Watermark, chunks, sample

SIZE = 8 * CHUNK
EDGES = st.lists(
    st.integers(0, SIZE // 512).map(lambda sector: sector * 512)
    | st.integers(0, SIZE // GAP).map(lambda gap: gap * GAP),
    unique=True,
    max_size=40,
).map(sorted)


def extents_of(edges: list[int]) -> Extents:
    return Extents(SIZE, zip(edges[::2], edges[1::2], strict=False))


def covered(pairs: list[tuple[int, int]]) -> set[int]:
    return {sector for start, end in pairs for sector in range(start // 512, end // 512)}


@given(edges=EDGES, start=st.integers(0, 8).map(lambda number: number * CHUNK))
def test_a_fresh_target_gets_the_data_and_nothing_else(edges: list[int], start: int) -> None:
    extents = extents_of(edges)
    steps = list(chunks(extents, zeros=False, start=start))
    parts = [part for step in steps for part in step.parts]
    assert parts == sorted(parts)
    assert covered(parts) == {sector for sector in covered(list(extents)) if sector * 512 >= start}
    assert sum(end - start for start, end in parts) == 512 * len(covered(parts))
    assert all(step.parts and step.end - step.start <= CHUNK for step in steps)


@given(edges=EDGES, start=st.integers(0, 8).map(lambda number: number * CHUNK))
def test_any_other_target_gets_every_byte_once(edges: list[int], start: int) -> None:
    steps = list(chunks(extents_of(edges), zeros=True, start=start))
    at = start
    for step in steps:
        assert step.start == at
        at = step.end
    assert at == SIZE
    data = covered(list(extents_of(edges)))
    assert not any(covered([(step.start, step.end)]) & data for step in steps if not step.parts)


@given(edges=EDGES, seed=st.integers(0, 1000))
def test_below_the_mark_everything_is_done(edges: list[int], seed: int) -> None:
    mark, rng = Watermark(0), random.Random(seed)
    under_way: list[Chunk] = []
    open_steps = list(chunks(extents_of(edges), zeros=False))
    while open_steps or under_way:
        if open_steps and (not under_way or rng.random() < 0.5):
            under_way.append(open_steps.pop(0))
            mark.begin(under_way[-1])
        else:
            mark.end(under_way.pop(rng.randrange(len(under_way))))
        left = [step.start for step in [*under_way, *open_steps]]
        assert all(mark.at <= start for start in left)
        if not under_way and left:
            assert mark.at > 0


def test_what_is_looked_at_again() -> None:
    steps = list(chunks(Extents(100 * CHUNK, [(0, 100 * CHUNK)]), zeros=False))
    looked = sample(steps, last=10, spread=9)
    assert looked[-10:] == steps[-10:]
    assert [step.start // CHUNK for step in looked[:-10]] == list(range(0, 90, 10))
    assert sample(steps[:3], last=10, spread=9) == steps[:3]


def test_the_union_ends_with_the_first_ones_disk() -> None:
    one, other = Extents(CHUNK, [(0, 512)]), Extents(2 * CHUNK, [(256, 1024), (CHUNK - 512, CHUNK + 512)])
    assert list(one.union(other)) == [(0, 1024), (CHUNK - 512, CHUNK)]
