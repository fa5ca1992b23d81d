"""The search for the last good point: the right one, by as few questions as there are bits in their number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.errors import RefusedError
from recovery.search import Found, Verdict, next_question


def search(count: int, first_bad: int, skipped: frozenset[int] = frozenset()) -> tuple[Found, int]:
    """What is found, and by how many questions."""
    verdicts: dict[int, Verdict] = {}
    while not isinstance(asked := next_question(count, verdicts), Found):
        assert asked not in verdicts
        verdicts[asked] = "skip" if asked in skipped else "bad" if asked >= first_bad else "good"
    return asked, len(verdicts)


@given(st.integers(2, 2000), st.data())
def test_the_last_good_point_is_found(count: int, data: st.DataObject) -> None:
    first_bad = data.draw(st.integers(1, count - 1))
    found, asked = search(count, first_bad)
    assert found == Found(first_bad - 1, first_bad)
    assert asked <= (count - 2).bit_length()


@given(st.integers(2, 60), st.data())
def test_points_that_cannot_be_judged_stay_between(count: int, data: st.DataObject) -> None:
    first_bad = data.draw(st.integers(1, count - 1))
    skipped = data.draw(st.frozensets(st.integers(1, max(1, count - 2))))
    found, _ = search(count, first_bad, skipped)
    assert found.good < first_bad <= found.bad
    assert set(range(found.good + 1, found.bad)) <= skipped


def test_a_day_of_seconds_takes_seventeen() -> None:
    assert max(search(86_400, first_bad)[1] for first_bad in (1, 2, 43_199, 43_200, 77_777, 86_399)) <= 17


def test_answers_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RefusedError):
        next_question(10, {3: "bad", 5: "good"})
