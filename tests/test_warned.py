"""What is warned of is said once on the way up."""

import pytest

from cdpserver.service.warned import Rising


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([79, 80, 85, 89, 90, 94, 95, 100], [80, 90, 95]),
        ([70, 96, 97], [96]),
        ([95, 93, 95, 91, 96], [95]),  # up and down at the cap is no news
        ([95, 90, 95], [95, 95]),  # a clear fall, and again
        ([82, 70, 82, 91], [82, 82, 91]),
    ],
)
def test_each_level_of_a_cap_is_said_once_on_the_way_up(values: list[int], said: list[int]) -> None:
    fullness = Rising((95, 90, 80), fall=5)
    assert [value for value in values if fullness.news("web/vda", value)] == said
    assert fullness.news("other", values[-1]) == (values[-1] >= 80), "each disk has its own"


def test_a_chain_that_stays_at_its_limit_is_said_once() -> None:
    long = Rising([64], fall=8)
    assert [long.news("t1", length) for length in (63, 64, 64, 63, 64, 65, 56, 64)] == [
        *(False, True, False, False, False, False, False, True)
    ]
