"""What rank 0 does for all may take longer than a rank waits for a message."""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import results, run_processes

SLOW_SECONDS, TIMEOUT_SECONDS = 4.0, 2.0


def slow_first(group) -> list[str]:
    """Rank 0 works for longer than the group's time-out, then refuses, then answers."""
    import time
    from datetime import timedelta

    import torch.distributed as dist

    from ringspan.errors import RingspanError
    from ringspan.training.ranks import on_first

    patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    assert isinstance(patient, dist.ProcessGroup)

    def slow() -> str:
        time.sleep(SLOW_SECONDS)
        return f"by rank {dist.get_rank()}"

    def refuse() -> str:
        raise RingspanError("a text", "it is empty")

    said = [on_first(slow, patient)]
    try:
        on_first(refuse, patient)
    except RingspanError as error:
        said.append(str(error))
    said.append(on_first(lambda: "at once", patient))
    return said


def test_the_others_wait_as_long_as_rank_0_says_that_it_is_at_work(tmp_path: Path):
    found = results(run_processes(2, "tests.training.test_first:slow_first", tmp_path / "ranks"))
    assert found == [["by rank 0", "a text: it is empty", "at once"]] * 2
