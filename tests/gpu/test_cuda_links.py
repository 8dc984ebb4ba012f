"""What the driver says of links, beside what `nvidia-smi` shows."""

from __future__ import annotations

import re
import subprocess
from itertools import combinations

import pytest
import torch

from ringspan.transport.peer_memory import _is_on_nvlink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"{torch.cuda.device_count()} CUDA devices here: a link joins two"),
]


def test_gpus_that_nvlink_joins_are_found():
    shown = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True, timeout=60).stdout
    # Coloured, where a terminal is guessed: GPU0  X  NV18 …
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in shown.splitlines()]
    links = {row[0]: row[1:] for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row[1:]}
    for one, other in combinations(range(torch.cuda.device_count()), 2):
        expected = links[f"GPU{one}"][other].startswith("NV")
        assert _is_on_nvlink(torch.device("cuda", one), [("host", one), ("host", other)]) is expected, (one, other, shown)
