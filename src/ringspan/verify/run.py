"""Runs configurations over the ranks at hand and compares what comes out with float64 dense attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringspan.attention import ContextParallel
from ringspan.attention.checks import features
from ringspan.attention.sharding import assemble
from ringspan.errors import RankFailure, RingspanError, ScheduleError
from ringspan.geometry import make_layout, parse_mask
from ringspan.kernels import Problem, select_kernel
from ringspan.schedule import PieceBytes
from ringspan.strategies import link_bytes
from ringspan.transport import SingleRank
from ringspan.verify.budget import budgets
from ringspan.verify.case import DTYPES, Case
from ringspan.verify.compare import TENSORS, Error, measure
from ringspan.verify.dense import Inputs, Results, dense_attention, make_inputs
from ringspan.verify.poison import poisoned_memory
from ringspan.verify.report import CaseReport, VerifyReport
from ringspan.verify.world import World, context_for


@dataclass(frozen=True)
class _Yardstick:
    """What all cases over the same tensors share."""

    inputs: Inputs
    exact: Results


@dataclass(frozen=True)
class _Part:
    """What one rank brings: its shards, its bytes by peer, counted and promised, and the kernel that it ran."""

    results: Results
    sent: Mapping[int, int]
    promised: Mapping[tuple[int, int], int]
    seconds: float
    kernel: str


def verify(cases: Iterable[Case], world: World, watch: Callable[[CaseReport], None] = lambda report: None) -> VerifyReport:
    """Compares each case with float64 dense attention, over the ranks of `world`.

    Args:
        cases: configurations; under torchrun all of them for as many ranks as there are.
        world: where they run.
        watch: is told each report as it comes.

    Returns:
        The report, the same on every rank.

    Raises:
        RankFailure: where a real rank is lost; in-process, that case counts as failed.
    """
    began = time.perf_counter()
    reports = []
    for case in cases:
        with poisoned_memory(world.device):
            report = verify_case(case, world)
        if world.is_first:
            watch(report)
        reports.append(report)
    return VerifyReport(
        device=_device_name(world.device),
        transport=world.name,
        torch_version=torch.__version__,
        seconds=time.perf_counter() - began,
        cases=tuple(reports),
    )


def verify_case(case: Case, world: World) -> CaseReport:
    """Runs and compares one case. A refusal is reported as such: it counts neither for nor against."""
    if case.heads % case.kv_heads:
        return _unfinished(case, "refused", f"{case.kv_heads} KV heads do not divide {case.heads} query heads")
    try:
        parse_mask(case.mask).check_length(case.length)
        # Before the ranks start, so that it is computed once and not by each of their threads.
        exact = _yardstick(*_tensors(case), case.mask, world.device).exact
        select_kernel(case.kernel, _problem(case, world.device))
        parts = world.run(case, lambda context: _run_rank(case, context, world.device))
    except RingspanError as error:
        if isinstance(error, RankFailure) and world.transport is not None:
            raise
        status = "failed" if isinstance(error, (RankFailure, ScheduleError)) else "refused"
        return _unfinished(case, status, str(error))
    except Exception as error:
        # Real ranks would wait for the one that broke; in this process it is one more case that failed.
        if world.transport is not None:
            raise
        return _unfinished(case, "failed", f"{type(error).__name__}: {error}")
    layout = make_layout(case.layout, case.length, case.num_ranks, case.weights, parse_mask(case.mask))
    kernel = parts[0].kernel
    found = {name: assemble([getattr(part.results, name) for part in parts], layout, 2 if name == "lse" else 1) for name in TENSORS}
    report = CaseReport(
        case=case,
        status="exact",
        reason="",
        kernel=kernel,
        errors=measure(_on(world.device, found), exact),
        budgets=budgets(case.dtype, DTYPES[case.dtype], lambda: _single(*_tensors(case), case.mask, world.device, kernel)),
        bytes_sent={(rank, peer): size for rank, part in enumerate(parts) for peer, size in sorted(part.sent.items()) if size},
        bytes_promised={link: size for link, size in sorted(parts[0].promised.items()) if size},
        seconds=max(part.seconds for part in parts),
    )
    if report.over() or not report.counts:
        return CaseReport(**{**vars(report), "status": "over"})
    return report


def _run_rank(case: Case, context: ContextParallel, device: torch.device) -> _Part:
    sequence = context.sequence(case.length, parse_mask(case.mask))
    transport = context.transport
    whole = _yardstick(*_tensors(case), case.mask, device).inputs
    q, k, v = (sequence.shard(tensor).requires_grad_() for tensor in (whole.q, whole.k, whole.v))
    dout = sequence.shard(whole.dout)
    before = dict(transport.bytes_sent)
    began = time.perf_counter()
    # Apart, since whoever asks for lse may have a gradient of it, and that takes another path where a kernel's backward takes none.
    with torch.no_grad():
        _, lse = sequence.attention(q, k, v, return_lse=True)
    out = sequence.attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    shards = Results(*(tensor.detach().cpu() for tensor in (out, lse, dq, dk, dv)))
    seconds = time.perf_counter() - began
    sent = {peer: size - before.get(peer, 0) for peer, size in transport.bytes_sent.items()}
    wide = 8 if case.dtype == "float64" else 4
    rounds = sequence.kernel is not None and sequence.kernel.rounds
    sizes = PieceBytes(
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        element_bytes=DTYPES[case.dtype].itemsize,
        accumulator_bytes=wide,
        single_bytes=DTYPES[case.dtype].itemsize if rounds else None,
    )
    # Two forwards, of which one brings lse back, and a backward.
    promised = link_bytes(sequence.schedules, sequence.layout, sizes, "forward", return_lse=True)
    promised += link_bytes(sequence.schedules, sequence.layout, sizes, "forward")
    promised += link_bytes(sequence.schedules, sequence.layout, sizes, "backward")
    assert sequence.kernel is not None
    return _Part(shards, sent, promised, seconds, sequence.kernel.name)


def _tensors(case: Case) -> tuple[int, int, int, int, int, str, int]:
    return case.batch, case.length, case.heads, case.kv_heads, case.head_dim, case.dtype, case.seed


@lru_cache(maxsize=2)
def _yardstick(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str, seed: int, mask: str, device: torch.device
) -> _Yardstick:
    inputs = make_inputs(batch, length, heads, kv_heads, head_dim, DTYPES[dtype], seed, device)
    return _Yardstick(inputs, dense_attention(inputs, parse_mask(mask)))


@lru_cache(maxsize=8)
def _single(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str, seed: int, mask: str, device: torch.device, kernel: str
) -> Mapping[str, Error]:
    """The errors of one kernel that computes the whole on one rank."""
    case = Case(
        num_ranks=1, strategy="ring", layout="contiguous", mask=mask, length=length, heads=heads, kv_heads=kv_heads, dtype=dtype,
        kernel=kernel, batch=batch, head_dim=head_dim, seed=seed,
    )  # fmt: skip
    part = _run_rank(case, context_for(case, SingleRank()), device)
    exact = _yardstick(*_tensors(case), mask, device).exact
    return measure(_on(device, vars(part.results)), exact)


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> Results:
    return Results(**{name: tensor.to(device) for name, tensor in tensors.items()})


def _problem(case: Case, device: torch.device) -> Problem:
    return Problem(
        device=device.type,
        dtype=DTYPES[case.dtype],
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        features=features(parse_mask(case.mask), None),
    )


def _unfinished(case: Case, status: str, reason: str) -> CaseReport:
    return CaseReport(
        case=case, status=status, reason=reason, kernel="", errors={}, budgets={}, bytes_sent={}, bytes_promised={}, seconds=0.0
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
