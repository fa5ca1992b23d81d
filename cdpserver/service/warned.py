"""Warnings that are said once on the way up, and anew only after a clear fall. Pure."""

from collections.abc import Sequence


class Rising:
    """Levels by name of what rises; one that is passed counts as left when the value is `fall` or more below it."""

    def __init__(self, levels: Sequence[int], *, fall: int) -> None:
        self._levels = sorted(levels)
        self._fall = fall
        self._said: dict[str, int] = {}

    def news(self, name: str, value: int) -> bool:
        """Has `value` reached a level that was not said?"""
        reached = max((level for level in self._levels if value >= level), default=0)
        # Said before, and not clearly left since: what goes up and down at a level is no news.
        held = max(
            (x for x in self._levels if value > x - self._fall and x <= self._said.get(name, 0)), default=0
        )
        self._said[name] = max(reached, held)
        return reached > held
