"""What a demo shows: one outcome a policy, side by side for people, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy's run. Utilisation is None where memory was never short."""

    policy: str
    requests: int
    finished: int
    never_fit: int
    refusals: int
    preempted: int
    tokens_generated: int
    tokens_expected: int
    tokens_checked: int
    prompt_tokens: int
    reused_tokens: int
    violations: int
    utilisation_written_over_capacity: float | None
    utilisation_written_over_reserved: float | None
    copies: int
    copied_tokens: int
    relocations: int
    compactions: int
    apply_p50_us: float
    apply_p99_us: float
    balanced: bool
    steps: int
    applies: int
    seconds: float
    trace: str

    def flaws(self) -> list[str]:
        """Return what went wrong, in words."""
        served = self.finished + self.never_fit
        found = {
            f"{self.violations:,} tokens or copies were not as the books say": self.violations,
            f"{served:,} of {self.requests:,} requests are accounted for": served != self.requests,
            f"{self.tokens_generated:,} of {self.tokens_expected:,} tokens were generated": (
                self.tokens_generated != self.tokens_expected
            ),
            "the books do not balance at the end": not self.balanced,
        }
        return [f"{self.policy}: {flaw}" for flaw, wrong in found.items() if wrong]

    def omissions(self) -> list[str]:
        """Return what a load that is short of memory should have made happen, and did not."""
        events = ("refusals", "relocations", "compactions")
        return [f"{self.policy}: no {name}" for name in events if not getattr(self, name)]


def as_object(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the only outcome as an object, or several as a list under "policies"."""
    objects = [asdict(outcome) for outcome in outcomes]
    return objects[0] if len(objects) == 1 else {"policies": objects}


def table_of(outcomes: Sequence[Outcome], title: str) -> Table:
    """Return the outcomes side by side."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.policy, justify="right")
    for row in zip(*(_facts(outcome) for outcome in outcomes), strict=True):
        table.add_row(row[0][0], *(value for _, value in row))
    return table


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    never_fit = f" + {outcome.never_fit:,} that never fit" if outcome.never_fit else ""
    return [
        ("requests finished", f"{outcome.finished:,}{never_fit}"),
        ("decode steps", f"{outcome.steps:,}"),
        ("mean requests running", f"{outcome.tokens_generated / max(outcome.steps, 1):.1f}"),
        ("refusals", f"{outcome.refusals:,}"),
        ("preemptions", f"{outcome.preempted:,}"),
        ("memory written, of capacity", _share(outcome.utilisation_written_over_capacity)),
        ("memory written, of reserved", _share(outcome.utilisation_written_over_reserved)),
        ("copies", f"{outcome.copies:,}"),
        ("tokens copied", f"{outcome.copied_tokens:,}"),
        ("relocations", f"{outcome.relocations:,}"),
        ("compactions", f"{outcome.compactions:,}"),
        ("calls (a step with nothing to ask makes none)", f"{outcome.applies:,}"),
        ("call p50", f"{outcome.apply_p50_us:,.0f} us"),
        ("call p99", f"{outcome.apply_p99_us:,.0f} us"),
        ("tokens checked", f"{outcome.tokens_checked:,}"),
        ("violations", f"{outcome.violations:,}"),
        ("books balance", "yes" if outcome.balanced else "NO"),
        ("time", f"{outcome.seconds:.1f} s"),
    ]


def _share(value: float | None) -> str:
    return "never short" if value is None else f"{value:.1%}"
