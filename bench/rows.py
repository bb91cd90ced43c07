"""What a part of the bench takes and gives: its effort, and rows of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A figure and its budget; `at_least` where more is better. Without a budget it is told for the record."""

    what: str
    value: float
    unit: str
    budget: float | None = None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.budget is None:
            return ""
        return "ok" if (self.value >= self.budget if self.at_least else self.value <= self.budget) else "OVER"

    def cells(self) -> tuple[str, str, str, str]:
        sign = "≥" if self.at_least else "≤"
        budget = "" if self.budget is None else f"{sign} {self.budget:g} {self.unit}"
        return self.what, f"{self.value:,.{_digits(self.value)}f} {self.unit}", budget, self.verdict


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each measurement takes."""

    starts: int = 7
    rest_s: float = 15.0
    rounds: int = 2000
    cold: int = 7
    tokens: int = 1000
    repeats: int = 5
    decisions: int = 300
    requests: int = 1000


QUICK = Effort(starts=2, rest_s=3.0, rounds=150, cold=2, tokens=150, repeats=2, decisions=30, requests=100)


def _digits(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
