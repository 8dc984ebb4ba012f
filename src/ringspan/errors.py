"""Errors that teach: what was asked, what was found, which rule that breaks, and the nearest thing that works."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

__all__ = ["RankFailure", "RingspanError", "ScheduleError", "UnsupportedError", "nearest_name"]


class RingspanError(ValueError):
    """Raised for everything that a user can put right.

    Args:
        asked: what the caller asked for, in the caller's words.
        found: what stands against it.
        rule: the rule that this breaks, as a sentence.
        nearest: the nearest request that works.
    """

    def __init__(self, asked: str, found: str = "", rule: str = "", nearest: str = "") -> None:
        self.asked, self.found, self.rule, self.nearest = asked, found, rule, nearest
        super().__init__(_sentence(asked, found, rule, nearest))

    def __reduce__(self):
        # Errors cross process and thread borders with their parts, not only with their message.
        return type(self), (self.asked, self.found, self.rule, self.nearest)


def _sentence(asked: str, found: str, rule: str, nearest: str) -> str:
    message = f"{asked}: {found}" if found else asked
    if rule:
        message += f". {rule}"
    if nearest:
        message = f"{message.rstrip('.')}. Try: {nearest}"
    return message


def nearest_name(name: object, known: Sequence[str]) -> str:
    """Which of `known` is spelled most like `name`; the first, where none is."""
    return next(iter(get_close_matches(str(name), known, 1)), known[0])


class ScheduleError(RingspanError):
    """A schedule that breaks one of the rules of `ringspan.schedule.validate`; `rule` names which."""


class RankFailure(RingspanError):
    """Another rank died or stopped answering; the message names it."""


class UnsupportedError(RingspanError):
    """A combination that is understood but not computed exactly here, and therefore refused."""
