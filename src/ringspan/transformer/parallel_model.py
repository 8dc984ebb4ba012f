"""A prepared model, and what a training loop needs beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ringspan.attention import ContextParallel
from ringspan.attention.batch import SAME_BATCHES, SEQUENCE_KEYWORD, checksums, differs, raise_first, shard_batch
from ringspan.attention.checks import check_sequence, problem_of
from ringspan.attention.loss import SumOverRanks
from ringspan.attention.observe import AFTER, watch
from ringspan.errors import RingspanError
from ringspan.geometry import Mask, causal
from ringspan.transformer.chance import refusing_chance
from ringspan.transformer.gradients import clip_gradients, sum_local_gradients, take_over
from ringspan.transformer.head import LossRequest
from ringspan.transformer.offload import HostStore, Offload
from ringspan.transformer.pieces import TensorGroup
from ringspan.transformer.tiled_loss import LossTerms
from ringspan.transport import Transport, agree

TOTAL_KEYWORD = "ringspan_total"
"""The key of a part under which it carries the number of labelled tokens of the whole step, over all replicas and micro-batches."""
_INPUTS = ("input_ids", "inputs_embeds", "position_ids", SEQUENCE_KEYWORD)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What `parallelize` settled: every `auto` as a number or a name, and why.

    Attributes:
        feed_forward_chunk: tokens, or None where the feed-forward is left as it is.
        loss_tile: tokens, or None where the model makes its own logits.
        rematerialise: the mode.
        reason: why this mode.
        offload: what goes to the host, or None.
    """

    feed_forward_chunk: int | None
    loss_tile: int | None
    rematerialise: str
    reason: str
    offload: Offload | None


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Those that a step is computed by.

    Attributes:
        everyone: all, whose shares of the loss add up.
        sharing: those that are given the same batches.
        copies: those whose gradients add up where parameters are not sharded.
        pieces: of a tensor axis, or None.
    """

    everyone: Transport
    sharing: Transport
    copies: Transport
    pieces: TensorGroup | None


class ParallelModel:
    """A prepared model, and what a training loop needs beside it. Made by `parallelize`.

    Attributes:
        model: the model that was given, prepared in place; its parameters are `DTensor`s where they are sharded.
        context: the `ContextParallel` of its sequences.
        chosen: what was settled.
        store: where checkpoints go, or None.
        num_replicas: how many different batches are computed at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        context: ContextParallel,
        ranks: Ranks,
        chosen: Chosen,
        terms: LossTerms,
        *,
        store: HostStore | None,
        num_replicas: int,
        is_sharded: bool,
    ) -> None:
        self.model, self.context, self.chosen, self.store, self.num_replicas = model, context, chosen, store, num_replicas
        self._ranks, self._everyone, self._terms, self._is_sharded = ranks, ranks.everyone, terms, is_sharded
        self._has_trained = False
        self._members: list[int] = ranks.sharing.gather_objects(ranks.everyone.rank)

    def shard_batch(self, batch: Mapping[str, Any], mask: Mask | None = None) -> dict[str, Any]:
        """This rank's part of the only micro-batch of a step: `shard_batches([batch], [mask])[0]`."""
        return self.shard_batches([batch], None if mask is None else [mask])[0]

    def shard_batches(self, batches: Sequence[Mapping[str, Any]], masks: Sequence[Mask] | None = None) -> list[dict[str, Any]]:
        """This rank's parts of a step's micro-batches. Collective over all ranks.

        Each part carries the number of labelled tokens of the whole step, over all micro-batches and replicas: the loss of a token weighs
        the same wherever it is, and no average is ever averaged.

        Args:
            batches: what this replica computes, whole, the same on all ranks of its context and tensor axes; of any lengths, but as many
                on every replica.
                What a batch holds: see `ringspan.attention.batch.shard_batch`.
            masks: of each batch; causal if not given.

        Returns:
            For each batch what `loss` takes.

        Raises:
            RingspanError: on every rank, where a batch is wrong on one of them, where ranks that share a sequence were given different
                tokens, labels, positions or padding, or where replicas have different numbers of micro-batches.
        """
        asked: list[tuple[int, Mask]] = []
        problem = problem_of(lambda: asked.extend(_wanted(batches, masks)))
        # First what to cut by, since agreeing on a new sequence is a matter of its context alone, and the others would wait elsewhere.
        given = [(length, str(mask), checksums(batch)) for (length, mask), batch in zip(asked, batches, strict=False)]
        said = self._everyone.gather_objects((self._members, given, problem))
        raise_first(problem, [other for *_, other in said])
        _check_alike(said)
        sequences = [self.context.sequence(length, mask) for length, mask in asked]
        parts: list[dict[str, Any]] = []
        problem = problem_of(
            lambda: parts.extend(shard_batch(sequence, batch) for sequence, batch in zip(sequences, batches, strict=True)),
        )
        count = sum(int(part["num_items_in_batch"]) for part in parts)
        counts = self._everyone.gather_objects((count, problem))
        raise_first(problem, [other for _, other in counts])
        # Every rank that was given the same batches has counted the same tokens.
        total = sum(each for each, _ in counts) // len(self._members)
        return [{**part, TOTAL_KEYWORD: total} for part in parts]

    def loss(self, part: Mapping[str, Any]) -> Tensor:
        """A micro-batch's share of the step's loss, on every rank: the shares of all micro-batches add up to it. Collective.

        `backward()` of each, and `sum_gradients()` once, leave the gradients of the unsplit model on the mean over all labelled tokens of
        all replicas and micro-batches. Under `torch.no_grad()` it validates, and leaves no parameter gathered.

        Args:
            part: from `shard_batches`.

        Raises:
            RingspanError: for a part that has no count.
            UnsupportedError: where the model's first forward in training drops elements by a function or draws random numbers, see
                `ringspan.transformer.chance`.
        """
        if TOTAL_KEYWORD not in part or "labels" not in part:
            raise RingspanError(
                "a loss",
                "this part knows no number of tokens",
                "A token's weight is one in all of the step's",
                "parallel.shard_batch(batch)",
            )
        labels: Tensor = part["labels"]
        request = LossRequest(
            labels=labels,
            scale=1 / max(1, part[TOTAL_KEYWORD]),
            terms=self._terms,
            tile=self.chosen.loss_tile,
            pieces=self._ranks.pieces,
        )
        inputs = {name: part[name] for name in _INPUTS if name in part}
        with nullcontext() if self._has_trained else refusing_chance(self.model):
            share = self.model(**inputs, use_cache=False, ringspan_loss=request)
        self._has_trained = self._has_trained or self.model.training
        self._reshard_without_backward()
        with watch(self.context.observer, AFTER, "reduce"):
            return SumOverRanks.apply(share, self._everyone)

    @torch.no_grad()
    def losses_by_position(self, parts: Sequence[Mapping[str, Any]], edges: Sequence[int]) -> list[float]:
        """The mean loss of the labelled tokens at positions `[edges[i], edges[i + 1])`, over all ranks and parts. Collective.

        A position is what the model is told: in the sequence, or in its document where documents are packed. Ranges hold other tokens each:
        what falls with the position may be the text's doing as much as the context's.

        Args:
            parts: from `shard_batches`, as many on every rank.
            edges: rising, one more than there are ranges.

        Returns:
            Nats per token for each range, on every rank; NaN for a range without a labelled token.

        Raises:
            RingspanError: on every rank, where `edges` do not rise.
        """
        rises = len(edges) > 1 and all(low < high for low, high in pairwise(edges))
        fault = (
            None if rises else RingspanError(f"edges={list(edges)!r}", "", "Ranges of positions follow each other", "edges=[0, 1024, 2048]")
        )
        agree(self._everyone, "losses_by_position", list(edges), fault)
        device = next(self.model.parameters()).device if not parts else parts[0]["labels"].device
        sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=device)
        borders = torch.tensor(edges, device=device)
        pieces = self._ranks.pieces
        for part in parts:
            labels: Tensor = part["labels"]
            request = LossRequest(labels=labels, scale=1.0, terms=self._terms, tile=self.chosen.loss_tile, pieces=pieces, by_token=True)
            inputs = {name: part[name] for name in _INPUTS if name in part}
            losses: Tensor = self.model(**inputs, use_cache=False, ringspan_loss=request)
            positions = part["position_ids"].expand(labels.shape)
            own = positions if pieces is None else pieces.take(positions)
            places = torch.bucketize(own.contiguous(), borders, right=True) - 1
            counted = (request.own_labels != self._terms.ignore_index) & (places >= 0) & (places < len(edges) - 1)
            found = torch.stack((losses[counted].double(), torch.ones_like(losses[counted], dtype=torch.float64)))
            sums.index_add_(1, places[counted], found)
        self._reshard_without_backward()
        self._everyone.all_reduce(sums)
        return (sums[0] / sums[1]).tolist()

    def _reshard_without_backward(self) -> None:
        """What FSDP leaves gathered for a backward is given up where none comes: an optimizer that is made next is given the shards."""
        if self._is_sharded and not torch.is_grad_enabled():
            # Late: whoever shards nothing need not load FSDP.
            from ringspan.transformer.fsdp import reshard

            reshard(self.model)

    def sum_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Sums gradients over the ranks where parameters are whole. Where they are sharded the backward has done it.

        To be called there as well: what the optimizer reads is not unmapped under it when gradients are dropped.

        Args:
            parameters: whose `.grad` to sum, such as float32 masters that the gradients were moved to; the model's if not given.
        """
        chosen = self.model.parameters() if parameters is None else parameters
        if self._is_sharded:
            take_over(chosen)
        else:
            sum_local_gradients(chosen, self._ranks.copies, self.context.observer)

    def clip_gradients(self, max_norm: float, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
        """Scales all gradients down where their common 2-norm is above `max_norm`, in place, after `sum_gradients`. Collective.

        On any mesh, by one sum over all ranks in which every element counts once, wherever it is split or whole.
        `torch.nn.utils.clip_grad_norm_` comes to the same where all parameters are split over the same axes; its norm is then a `DTensor`,
        of which each rank sees its part until `full_tensor()`.

        Args:
            max_norm: above 0; infinity measures and leaves them.
            parameters: whose `.grad` to scale, such as the masters that `sum_gradients` was given, split or whole as the model's parameters
                are; the model's if not given.

        Returns:
            The norm before, the unsplit model's, on every rank: a scalar, float32 or wider.

        Raises:
            RingspanError: on every rank, where `max_norm` is not above 0, ranks disagree about it, or one of them has no gradient at all.
        """
        chosen = list(self.model.parameters() if parameters is None else parameters)
        problem = problem_of(lambda: _check_clipping(max_norm, chosen))
        agree(self._everyone, "clip_gradients", max_norm, problem)
        is_counted = self._is_sharded or self._ranks.copies.rank == 0
        return clip_gradients(chosen, float(max_norm), self._everyone, is_counted)


def _check_clipping(max_norm: float, parameters: list[nn.Parameter]) -> None:
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0:
        raise RingspanError(f"max_norm={max_norm!r}", "", "A norm to clip to is a number above 0", "max_norm=1.0")
    if not any(parameter.requires_grad and parameter.grad is not None for parameter in parameters):
        found = f"none of {len(parameters)} parameters has a gradient"
        rule = "It follows a backward and sum_gradients, on the parameters that have their gradients"
        raise RingspanError("clip_gradients", found, rule, "clip_gradients(max_norm, masters) where the gradients were moved to masters")


def _wanted(batches: Sequence[Mapping[str, Any]], masks: Sequence[Mask] | None) -> list[tuple[int, Mask]]:
    """The length and mask of each batch."""
    if not batches or (masks is not None and len(masks) != len(batches)):
        found = f"{len(batches)} batches" if masks is None else f"{len(batches)} batches with {len(masks)} masks"
        raise RingspanError(found, "", "There is at least one batch a step, and one mask a batch", "masks=None, for causal ones")
    found = []
    for batch, mask in zip(batches, masks or [causal()] * len(batches), strict=True):
        tokens = batch.get("input_ids", batch.get("inputs_embeds"))
        if "labels" not in batch or not isinstance(tokens, Tensor) or tokens.ndim < 2:
            rule = "A loss needs tokens and labels, both [batch, length]"
            raise RingspanError("a batch to train on", f"it has {', '.join(map(str, batch)) or 'nothing'}", rule, "labels=input_ids")
        check_sequence(tokens.shape[1], mask)
        found.append((tokens.shape[1], mask))
    return found


def _check_alike(said: list[tuple[list[int], list[tuple[int, str, dict[str, int]]], Any]]) -> None:
    """As many micro-batches on all ranks, the same within each context."""
    for other, (members, asked, _) in enumerate(said):
        if len(asked) != len(said[0][1]):
            rule = "Every replica has as many micro-batches a step, since all take part in gathering the parameters"
            found = f"rank 0 has {len(said[0][1])}, rank {other} has {len(asked)}"
            raise RingspanError("micro-batches of one step", found, rule, "one whose labels are all −100 for who has none left")
        first = said[members[0]][1]
        if asked != first:
            found = f"rank {members[0]} has {[each[:2] for each in first]}, rank {other} has {[each[:2] for each in asked]}"
            if (same := [each[:2] for each in asked]) == [each[:2] for each in first]:
                index = next(index for index, pair in enumerate(zip(asked, first, strict=True)) if pair[0] != pair[1])
                found = differs(f"number {index}", same[index][0], {other: asked[index][2], members[0]: first[index][2]})
            nearest = "the same data order on all ranks of the context and tensor axes"
            raise RingspanError("micro-batches of one step", found, SAME_BATCHES, nearest)
