"""Samples of interleaved rounds, and what is said of them: medians, and ratios within a round.

A ratio is the median of each round's own ratio: what slowed the machine down in a round slowed both sides.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Goal:
    """`subject` compared with `against` (or by itself, when that is empty) should be at least, or at most, `value`."""

    subject: str
    against: str
    value: float
    text: str


@dataclass
class Measure:
    """One question with its subjects, one sample of each in every round."""

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    goals: tuple[Goal, ...] = ()
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, subject: str, value: float) -> None:
        """A sample of one round."""
        self.samples.setdefault(subject, []).append(value)

    def median(self, subject: str) -> float:
        """The middle of a subject's samples."""
        return median(self.samples[subject])

    def ratio(self, subject: str, against: str) -> float:
        """The middle of the rounds' ratios; 0 where the other side is 0."""
        pairs = zip(self.samples[subject], self.samples[against], strict=True)
        return median(one / other if other else 0.0 for one, other in pairs)

    def reached(self, goal: Goal) -> tuple[float, bool]:
        """What a goal is about, and whether it is reached."""
        value = self.ratio(goal.subject, goal.against) if goal.against else self.median(goal.subject)
        return value, value >= goal.value if self.better == "higher" else value <= goal.value

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        subjects = list(self.samples)
        goals = []
        for goal in self.goals:
            value, reached = self.reached(goal)
            goals.append({"text": goal.text, "goal": goal.value, "value": value, "reached": reached})
        return {
            "title": self.title,
            "unit": self.unit,
            "better": self.better,
            "medians": {subject: self.median(subject) for subject in subjects},
            "ratios": {f"{subjects[0]} / {other}": self.ratio(subjects[0], other) for other in subjects[1:]},
            "rounds": self.samples,
            "goals": goals,
            "notes": self.notes,
        }


def show(measures: list[Measure], console: Console) -> None:
    """The table for people."""
    table = Table(
        title="Medians; a ratio is the first line of its group by this one, within a round",
        title_justify="left",
    )
    for name in ("measure", "subject", "median", "ratio", "from .. to", "goal"):
        table.add_column(name, justify="right" if name in ("median", "ratio", "from .. to") else "left")
    for measure in measures:
        first = next(iter(measure.samples))
        for subject, values in measure.samples.items():
            goals = [goal for goal in measure.goals if goal.subject == subject]
            table.add_row(
                measure.title if subject == first else "",
                subject,
                f"{number(measure.median(subject))} {measure.unit}",
                "" if subject == first else f"{measure.ratio(first, subject):.2f}",
                f"{number(min(values))} .. {number(max(values))}",
                "\n".join(_goal(measure, goal) for goal in goals),
            )
        for name, value in measure.notes.items():
            said = ", ".join(f"{key} {found}" for key, found in value.items())
            table.add_row(f"[dim]{name}[/dim]", f"[dim]{said}[/dim]")
        table.add_section()
    console.print(table)


def _goal(measure: Measure, goal: Goal) -> str:
    value, reached = measure.reached(goal)
    return f"{goal.text}: {'[green]' if reached else '[red]'}{value:.2g}[/]"


def number(value: float) -> str:
    """Three or more digits, without noise."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
