"""Everything here runs on memory that is NaN until it is written."""

from tests.support.poison import poisoned

__all__ = ["poisoned"]
