"""A fixture under which memory that nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ringspan.verify import poisoned_memory


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Import it into a conftest: every test beside it then runs on poisoned memory."""
    with poisoned_memory():
        assert torch.empty(3).isnan().all(), "memory is poisoned"
        yield
