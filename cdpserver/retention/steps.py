"""How densely recovery points are kept as they age: `1h 24h/1m 7d/1h` is every instant for an hour, then one a minute until
they are a day old, then one an hour until they are seven days old. Pure.

    age   0 ......... 1h ............ 24h ................ 7d
          every instant   one a minute       one an hour    nothing (base points stay as keep_bp says)
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from cdpserver.config_values import quoted
from cdpserver.errors import UsageError
from cdpserver.names import format_duration, parse_duration, show

STEP_FORMS = (
    "write how long, or steps SPAN/EVERY that get longer and wider apart, such as '24h' or '1h 24h/1m 7d/1h'"
)
MAX_STEPS = 8
"""Each is one more time that an interval is written anew."""

MIN_EVERY_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """Recovery points up to the age `span_ns` are kept `every_ns` apart; 0 is every instant."""

    span_ns: int
    every_ns: int = 0

    def __str__(self) -> str:
        span = format_duration(self.span_ns)
        return f"{span}/{format_duration(self.every_ns)}" if self.every_ns else span


def parse_steps(text: str) -> tuple[Step, ...]:
    """The steps, the shortest span first. UsageError that says what contradicts itself."""
    words = text.replace(",", " ").split()
    if not words or len(words) > MAX_STEPS:
        raise UsageError(f"not how long recovery points are kept: {show(text)}", hint=STEP_FORMS)
    steps = tuple(_step(word) for word in words)
    for younger, older in pairwise(steps):
        if older.span_ns <= younger.span_ns:
            why = f"the step {older} does not reach further back than {younger}"
        elif older.every_ns <= younger.every_ns:
            why = f"the step {older} keeps no fewer recovery points than {younger}, which is for younger ones"
        else:
            continue
        raise UsageError(f"{show(text)} contradicts itself: {why}", hint=STEP_FORMS)
    return steps


def _step(word: str) -> Step:
    span, slash, every = word.partition("/")
    step = Step(parse_duration(span), parse_duration(every) if slash else 0)
    if slash and not MIN_EVERY_NS <= step.every_ns <= step.span_ns:
        raise UsageError(
            f"{show(word)} is no step: EVERY is from {format_duration(MIN_EVERY_NS)} to the SPAN itself",
            hint=STEP_FORMS,
        )
    return step


def format_steps(steps: tuple[Step, ...]) -> str:
    """The text that `parse_steps` reads as `steps`."""
    return " ".join(map(str, steps))


def step_at(steps: tuple[Step, ...], age_ns: int) -> Step:
    """The step that something of this age is in; the last one if it is older than all."""
    return next((step for step in steps if age_ns <= step.span_ns), steps[-1])


@dataclass(frozen=True, slots=True)
class StepsValue:
    """A configuration value: how densely recovery points are kept, each span within `least` and `most` (ns)."""

    least: int
    most: int
    example: ClassVar[str] = '"1h 24h/1m"'

    @property
    def takes(self) -> str:
        return f"a duration from {format_duration(self.least)} to {format_duration(self.most)}, or steps SPAN/EVERY"

    def read(self, key: str, value: object) -> tuple[Step, ...]:
        return self.read_option(key, quoted(key, value, STEP_FORMS))

    def read_option(self, key: str, text: str) -> tuple[Step, ...]:
        try:
            steps = parse_steps(text)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", hint=error.hint) from None
        if not all(self.least <= step.span_ns <= self.most for step in steps):
            raise UsageError(f"{key} is out of range: {show(text)}", hint=f"it takes {self.takes}")
        return steps

    def write(self, value: tuple[Step, ...]) -> str:
        return f'"{format_steps(value)}"'
