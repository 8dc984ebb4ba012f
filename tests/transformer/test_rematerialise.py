"""Rematerialised layers have the gradients of plain ones; what is said not to run again does not; checkpoints go to the host and back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

import ringspan
from ringspan.attention.tape import Tape
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.kernels.reference import Reference
from ringspan.transformer import MODES, HostStore, Offload, PlainCopier, blockwise, decoder_layers, rematerialise
from ringspan.transformer.layers import feed_forward_of
from tests.support.errors import relative
from tests.support.models import VOCABULARY, gradients, make_batch, seeded, tiny_llama, with_attention

BUDGET = 1e-12
"""Computing a layer again gives the same bits, but for sums over chunks of the feed-forward. float64."""

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": tiny_llama,
    "qwen 3": lambda: seeded(Qwen3ForCausalLM, Qwen3Config(**_SMALL)),
    "gemma 2, with windows and softcaps": lambda: seeded(
        Gemma2ForCausalLM, Gemma2Config(**_SMALL, sliding_window=7, query_pre_attn_scalar=4, attn_logit_softcapping=5.0)
    ),
    "gpt-oss, with sinks": lambda: seeded(
        GptOssForCausalLM, GptOssConfig(**_SMALL, sliding_window=7, num_local_experts=2, num_experts_per_tok=1), torch.float32
    ),
}


def run(
    model: Any, mode: str, ranks: int = 2, chunk: int | None = None, offload: Offload | None = None, group_size: int = 1, **how: Any
) -> list[Any]:
    """For each rank: loss, gradients after `sum_gradients`, bytes sent in the backward, and the store."""
    how = {"kernel": "reference", **how}

    def rank(group: Any) -> Any:
        context = ringspan.ContextParallel(group, **how)
        mine = with_attention(model, "ringspan")
        store = None if offload is None else HostStore(PlainCopier(), offload)
        for layer in decoder_layers(mine):
            if chunk:
                blockwise(feed_forward_of(layer), chunk)
        rematerialise(decoder_layers(mine), mode, store, layers_per_checkpoint=group_size)
        sequence = context.sequence(19)
        part = sequence.shard_batch(make_batch(2, 19))
        loss = sequence.loss(mine(**part, use_cache=False).logits, part["shift_labels"])
        before = sum(context.transport.bytes_sent.values())
        loss.backward()
        sent = sum(context.transport.bytes_sent.values()) - before
        context.sum_gradients(mine)
        return loss.detach(), gradients(mine), sent, store

    return ringspan.run_in_process(ranks, rank)


def check(found: list[Any], expected: list[Any], budget: float = BUDGET) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours[0], theirs[0]) <= budget
        for name, gradient in theirs[1].items():
            assert relative(ours[1][name], gradient) <= budget, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_every_mode_gives_the_gradients_of_layers_that_keep_everything(model: str, mode: str):
    made = MODELS[model]()
    check(run(made, mode), run(made, "none"))


@pytest.mark.parametrize(
    "how", [{"strategy": "ulysses"}, {"kv_heads_per_stage": 1}, {"strategy": "balanced", "layout": "contiguous"}], ids=str
)
def test_attention_output_goes_with_other_strategies(how: dict[str, Any]):
    model = tiny_llama()
    check(run(model, "attention_output", 3, **how), run(model, "none", 3, **how))


@pytest.mark.parametrize("mode", ["full", "attention_output"])
def test_it_goes_with_the_blockwise(mode: str):
    model = tiny_llama()
    check(run(model, mode, chunk=4), run(model, "none"))


def count_kernel(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each half of the reference kernel runs from now on."""
    counts: Counter[str] = Counter()
    for half in ("forward", "backward"):
        right = getattr(Reference, half)

        def counted(self: Any, *arguments: Any, right: Any = right, half: str = half) -> Any:
            counts[half] += 1
            return right(self, *arguments)

        monkeypatch.setattr(Reference, half, counted)
    return counts


@pytest.mark.parametrize("how", [{}, {"strategy": "ulysses"}, {"kv_heads_per_stage": 1}], ids=str)
def test_under_attention_output_the_kernel_runs_once_forward_and_never_again(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model, counts = tiny_llama(), count_kernel(monkeypatch)
    calls = {}
    for mode in ("none", "attention_output", "full"):
        counts.clear()
        run(model, mode, 3, **how)
        calls[mode] = dict(counts)
    assert calls["attention_output"] == calls["none"]
    assert calls["full"]["forward"] == 2 * calls["none"]["forward"] > 0
    assert calls["full"]["backward"] == calls["none"]["backward"]


def test_under_attention_output_no_message_of_the_ring_is_sent_again():
    model = tiny_llama()
    sent = {mode: sum(result[2] for result in run(model, mode, 3)) for mode in ("none", "attention_output", "full")}
    assert sent["attention_output"] == sent["none"] < sent["full"]


def test_it_fails_where_the_tape_gives_back_something_else(monkeypatch: pytest.MonkeyPatch):
    right = Tape.result

    def worn_tape(self: Tape, compute: Any) -> Any:
        replayed = self._place is not None
        out, lse = right(self, compute)
        return (out * 1.01, lse) if replayed else (out, lse)

    monkeypatch.setattr(Tape, "result", worn_tape)
    model = tiny_llama()
    with pytest.raises(AssertionError):
        check(run(model, "attention_output", kv_heads_per_stage=1), run(model, "none"))


@pytest.mark.parametrize("mode", ["full", "attention_output"])
@pytest.mark.parametrize(
    "offload", [Offload(), Offload(in_flight=1), Offload(in_flight=100), Offload(host_bytes=6000), Offload(host_bytes=0)], ids=str
)
def test_checkpoints_that_went_to_the_host_give_the_same_gradients(mode: str, offload: Offload):
    model = tiny_llama(num_hidden_layers=5)
    found = run(model, mode, offload=offload)
    check(found, run(model, "none"))
    for *_, store in found:
        assert store.most_bytes_used <= (offload.host_bytes if offload.host_bytes is not None else 1 << 20)
        assert store.most_bytes_used > 0 or offload.host_bytes == 0


@pytest.mark.parametrize("offload", [None, Offload()], ids=["here", "on the host"])
@pytest.mark.parametrize("group", [2, 3, 9])
@pytest.mark.parametrize("mode", ["full", "attention_output"])
def test_layers_that_share_a_checkpoint_have_the_same_gradients(mode: str, group: int, offload: Offload | None):
    model = tiny_llama(num_hidden_layers=5)
    found = run(model, mode, chunk=5, offload=offload, group_size=group)
    check(found, run(model, "none"))
    if offload is not None and mode == "full":
        alone = run(model, mode, offload=offload)[0][3].most_bytes_used
        assert found[0][3].most_bytes_used * 5 == alone * -(-5 // group)


@pytest.mark.parametrize(("mode", "runs"), [("full", 2), ("attention_output", 1)])
def test_sharing_a_checkpoint_runs_no_attention_more(mode: str, runs: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama(num_hidden_layers=4)
    counts = []
    for group in (1, 2, 4):
        with monkeypatch.context() as within:
            counted = count_kernel(within)
            run(model, mode, ranks=1, group_size=group)
            counts.append(counted["forward"])
    assert counts == [4 * runs] * 3


def test_a_layer_that_shares_a_checkpoint_is_not_called_by_itself():
    model = tiny_llama("ringspan", num_hidden_layers=2)
    layers = decoder_layers(model)
    rematerialise(layers, "full", layers_per_checkpoint=2)
    with pytest.raises(RingspanError, match="one after the other"):
        layers[1](torch.randn(1, 4, model.config.hidden_size, dtype=torch.float64, requires_grad=True))
    with pytest.raises(RingspanError, match="at least one"):
        rematerialise(layers, "full", layers_per_checkpoint=0)
    with pytest.raises(RingspanError, match="no layer checkpoints"):
        rematerialise(layers, "none", layers_per_checkpoint=2)


def test_both_backwards_through_one_graph_see_the_same_checkpoints():
    model = with_attention(tiny_llama(), "ringspan")
    store = HostStore(PlainCopier(), Offload())
    rematerialise(decoder_layers(model), "attention_output", store)
    part = ringspan.ContextParallel().sequence(9).shard_batch(make_batch(1, 9))
    loss = model(**part, use_cache=False).loss
    loss.backward(retain_graph=True)
    first = {name: gradient.clone() for name, gradient in gradients(model).items()}
    loss.backward()
    assert all(relative(gradient, 2 * first[name]) <= BUDGET for name, gradient in gradients(model).items())


def test_a_cache_of_keys_is_refused():
    model = with_attention(tiny_llama(), "ringspan")
    rematerialise(decoder_layers(model), "full")
    part = ringspan.ContextParallel().sequence(9).shard_batch(make_batch(1, 9))
    with pytest.raises(RingspanError, match="use_cache=False"):
        model(**part, use_cache=True)


@pytest.mark.parametrize(
    ("mode", "store", "error", "said"),
    [
        ("some", None, RingspanError, "none, selective, attention_output, full"),
        ("none", HostStore(PlainCopier(), Offload()), RingspanError, "no layer checkpoints are made"),
    ],
)
def test_modes_that_are_unknown_or_have_nothing_to_offload_are_refused(mode: str, store: Any, error: Any, said: str):
    with pytest.raises(error, match=said):
        rematerialise(decoder_layers(tiny_llama()), mode, store)


def test_a_strategy_that_keeps_scores_is_not_called_selective():
    from ringspan.transformer.rematerialise import check_mode

    with pytest.raises(UnsupportedError, match="keeps its scores"):
        check_mode("selective", strategy="ring_self_attention")
