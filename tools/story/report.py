"""What the demo says while it goes on, and the summary at its end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two things that had to be equal (or, for a control, different), and whether they were."""

    what: str
    against: str
    how: str
    wanted: str
    found: str
    seconds: float

    @property
    def good(self) -> bool:
        """As it had to be."""
        return self.found == self.wanted


@dataclass
class Report:
    """Everything said and compared."""

    console: Console
    comparisons: list[Comparison] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    _steps: int = 0

    def step(self, title: str) -> None:
        """A new part of the story."""
        self._steps += 1
        elapsed = time.monotonic() - self.started
        self.console.print(
            f"\n[bold]{self._steps}. {title}[/bold]  [dim]{elapsed:.0f} s[/dim]", highlight=False
        )

    def say(self, text: str) -> None:
        """A line of the story; what programs say goes through here, so it is no markup."""
        self.console.print(f"   {text}", markup=False, highlight=False, soft_wrap=True)

    def figure(self, name: str, value: str) -> None:
        """A number for the summary."""
        self.figures.append((name, value))
        self.say(f"{name}: {value}")

    def compare(
        self, what: str, against: str, how: str, look: Callable[[], bool], *, differ: bool = False
    ) -> None:
        """Compare now, say the result, and keep it for the summary."""
        started = time.monotonic()
        found = "equal" if look() else "different"
        result = Comparison(
            what, against, how, "different" if differ else "equal", found, time.monotonic() - started
        )
        self.comparisons.append(result)
        self.say(f"{'ok' if result.good else 'WRONG'}: {what} and {against} are {found} ({how})")

    @property
    def good(self) -> bool:
        """Everything was compared as it had to be."""
        return bool(self.comparisons) and all(comparison.good for comparison in self.comparisons)

    def summary(self, failure: str) -> None:
        """The end, as a table for people."""
        table = Table(title="What was compared", title_justify="left", title_style="bold")
        for name in ("what", "against", "how", "result", "seconds"):
            table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
        for each in self.comparisons:
            expected = " (as it must be)" if each.good and each.wanted == "different" else ""
            style = "green" if each.good else "bold red"
            table.add_row(
                each.what,
                each.against,
                each.how,
                f"[{style}]{each.found}{expected}[/{style}]",
                f"{each.seconds:.2f}",
            )
        self.console.print()
        self.console.print(table)
        for name, value in self.figures:
            self.console.print(f"{name}: {value}", markup=False, highlight=False)
        good = sum(each.good for each in self.comparisons)
        self.console.print(
            f"{good} of {len(self.comparisons)} comparisons are as they must be; "
            f"{time.monotonic() - self.started:.0f} s",
            highlight=False,
        )
        if failure:
            self.console.print(f"FAILED: {failure}", style="bold red", markup=False)
        elif self.good:
            self.console.print("Every instant came back bit-exact.", style="bold green")
        else:
            self.console.print("FAILED: not everything was equal.", style="bold red")
