"""Everything that can befall a protected guest, one after the other and in any order, while it writes.

It never waits for longer than the bound and never sees an error; and afterwards every `crash` point is what a power cut at that
instant would have left.
"""

import os
import random
from pathlib import Path

import pytest

from tests.storm import STRIKES, sea

pytestmark = pytest.mark.real


@pytest.mark.timeout(600)
def test_a_guest_in_a_storm(short_path: Path) -> None:
    seed = int(os.environ.get("CDP_SEED", random.randrange(1 << 32)))
    dice = random.Random(seed)
    strikes = list(STRIKES)
    dice.shuffle(strikes)
    print("seed", seed, [strike.__name__ for strike, _ in strikes])
    with sea(short_path) as waters:
        for strike, leaves_gap in strikes:
            gaps = len(waters.server.events("disk.gap"))
            with waters.waits_no_longer_than_the_bound(strike.__name__):
                strike(waters)
                waters.goes_on()
                waters.points_go_on()
                waters.in_sync()
            assert not leaves_gap or len(waters.server.events("disk.gap")) > gaps, strike.__name__
        waters.check_points(dice)
