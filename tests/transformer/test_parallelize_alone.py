"""`parallelize` on ranks of one process and on one rank: families, refusals, and what a loop sees."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import ringspan
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transformer import Offload, head
from tests.support.errors import relative
from tests.support.families import SIZES, family, has_experts
from tests.support.models import gradients, make_batch, split_losses, tiny_llama, whole_loss
from tests.transformer.parallel_ranks import MODELS, Case, step, whole

BUDGET = 2e-6  # as in law 6


@pytest.mark.parametrize("name", head.FAMILIES)
def test_the_tiled_loss_of_a_family_is_the_models_own_with_its_scales_and_softcaps_on_two_ranks(name: str):
    model, batch = family(name), make_batch(2, 11)
    experts = has_experts(model)
    expected_loss, expected = whole_loss(model, batch)
    how: dict[str, Any] = {"feed_forward_chunk": None if experts else 4, "rematerialise": "full", "kernel": "reference"}
    for loss, found in split_losses(model, batch, loss_tile=3, **how):
        assert relative(loss, expected_loss) <= BUDGET
        for key, gradient in expected.items():
            assert relative(found[key], gradient) <= (10 if experts else 2) * BUDGET, key


def test_a_scale_that_is_forgotten_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(head.FAMILIES, "granite", lambda config: (1.0, None))
    with pytest.raises(AssertionError):
        test_the_tiled_loss_of_a_family_is_the_models_own_with_its_scales_and_softcaps_on_two_ranks("granite")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rematerialised", ["none", "attention_output", "full"])
def test_layers_that_transformers_computes_again_as_well_have_the_gradients_of_the_unsplit_model(rematerialised: str, reentrant: bool):
    case = Case({"context": 2}, "deep llama")
    expected_loss, expected = whole(case)

    def run(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mine = MODELS["deep llama"]()
        offload = None if rematerialised == "none" else Offload(in_flight=1)
        parallel = ringspan.parallelize(mine, group, rematerialise=rematerialised, offload=offload)
        mine.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return step(parallel, case.batches(0)), gradients(mine)

    for loss, found in ringspan.run_in_process(2, run):
        assert relative(loss, expected_loss) <= BUDGET
        for name, gradient in expected.items():
            assert gradient is not None and relative(found[name], gradient) <= BUDGET, name


@pytest.mark.parametrize("model", [name for name in MODELS if not name.startswith("bfloat16")])
@pytest.mark.parametrize("data", ["padded", "packed"])
def test_on_ranks_of_one_process_loss_and_gradients_are_those_of_the_unsplit_model(model: str, data: str):
    case = Case({"context": 2}, model, data)
    expected_loss, expected = whole(case)

    def run(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mine = copy.deepcopy(MODELS[model]())
        parallel = ringspan.parallelize(mine, group, feed_forward_chunk=5, loss_tile=4)
        return step(parallel, case.batches(0)), gradients(mine)

    for loss, found in ringspan.run_in_process(2, run):
        assert relative(loss, expected_loss) <= BUDGET
        for name, gradient in expected.items():
            assert (found[name] is None) == (gradient is None)
            assert gradient is None or relative(found[name], gradient) <= BUDGET, name


def test_validation_needs_no_gradients_and_gives_the_same_loss():
    model = tiny_llama()
    parallel = ringspan.parallelize(model, loss_tile=4, feed_forward_chunk=5)
    part = parallel.shard_batch(make_batch(2, 13))
    with torch.no_grad():
        validated = parallel.loss(part)
    assert relative(validated, parallel.loss(part).detach()) <= 1e-12 and not validated.requires_grad


def test_smoothing_and_z_loss_are_the_same_with_tiles_and_without():
    losses = []
    for tile in (3, None):
        parallel = ringspan.parallelize(tiny_llama(), loss_tile=tile, feed_forward_chunk=None, label_smoothing=0.1, z_loss=0.01)
        losses.append(parallel.loss(parallel.shard_batch(make_batch(2, 13))).detach())
    plain = ringspan.parallelize(tiny_llama(), loss_tile=3, feed_forward_chunk=None)
    assert relative(losses[0], losses[1]) <= 1e-12
    assert abs(float(losses[0]) - float(plain.loss(plain.shard_batch(make_batch(2, 13))).detach())) > 1e-3


def test_a_prepared_model_still_answers_with_logits():
    model = tiny_llama()
    parallel = ringspan.parallelize(model, feed_forward_chunk=5, loss_tile=4)
    part = parallel.context.sequence(9).shard_batch(make_batch(1, 9))
    expected = tiny_llama()(**make_batch(1, 9))
    found = model(**part, use_cache=False)
    assert relative(found.logits.detach(), expected.logits.detach()) <= BUDGET
    assert relative(found.loss.detach(), expected.loss.detach()) <= BUDGET


def test_the_names_of_weights_are_those_of_the_model_so_that_its_checkpoints_go_on_loading():
    model, expected = tiny_llama(), list(tiny_llama().state_dict())
    ringspan.parallelize(model, rematerialise="full", offload=Offload())
    assert list(model.state_dict()) == expected and [name for name, _ in model.named_parameters()] == expected


class Wrapped(torch.nn.Module):
    """A model with another one around it, as peft's are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> Any:
        return self.base_model

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.base_model(*arguments, **keywords)


def test_a_model_that_is_wrapped_as_peft_wraps_it_is_prepared_within():
    batch = make_batch(2, 13)
    expected = tiny_llama()
    loss = expected(**batch).loss
    loss.backward()
    model = Wrapped(tiny_llama())
    parallel = ringspan.parallelize(model, feed_forward_chunk=5, loss_tile=4)
    found = parallel.loss(parallel.shard_batch(batch))
    found.backward()
    assert relative(found.detach(), loss.detach()) <= BUDGET
    for name, gradient in gradients(expected).items():
        assert relative(gradients(model.base_model)[name], gradient) <= BUDGET, name


def test_auto_settles_numbers_and_says_why():
    parallel = ringspan.parallelize(tiny_llama(), rematerialise="auto", tokens_per_rank=1 << 17, memory_bytes=1 << 30, offload=Offload())
    chosen = parallel.chosen
    assert chosen.rematerialise == "attention_output" and "layers keep 0.0 GiB" in chosen.reason and chosen.offload == Offload()
    assert chosen.feed_forward_chunk == 12288 and chosen.loss_tile == 52736
    assert parallel.store is not None
    roomy = ringspan.parallelize(tiny_llama(), rematerialise="auto", tokens_per_rank=8, offload=Offload())
    assert roomy.chosen.rematerialise == "none" and roomy.store is None


def test_auto_chooses_on_every_rank_for_the_smallest_memory():
    batch = make_batch(1, 40)
    sizes = (4 << 20, 300 << 10)

    def run(group: Any) -> tuple[Any, Any]:
        mine = sizes[group.rank] if group.size > 1 else min(sizes)
        parallel = ringspan.parallelize(tiny_llama(), group, rematerialise="auto", tokens_per_rank=20, memory_bytes=mine)
        parallel.loss(parallel.shard_batch(batch)).backward()
        roomy = ringspan.parallelize(tiny_llama(), group, rematerialise="auto", tokens_per_rank=20, memory_bytes=max(sizes))
        return parallel.chosen, roomy.chosen

    ((alone, roomy),) = ringspan.run_in_process(1, run)
    assert alone.rematerialise == "full" and roomy.rematerialise == "none", "these sizes choose alike"
    assert [chosen for chosen, _ in ringspan.run_in_process(2, run, timeout_seconds=30.0)] == [alone] * 2


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rematerialise=": ({"rematerialise": "auto", "tokens_per_rank": 1 << 30}, {"rematerialise": "auto", "tokens_per_rank": 1}),
    "feed_forward_chunk=": ({"feed_forward_chunk": 4}, {"feed_forward_chunk": 5}),
    "loss_tile=": ({"loss_tile": 4}, {"loss_tile": None}),
    "layers_per_checkpoint=": ({"layers_per_checkpoint": 1}, {"layers_per_checkpoint": 2}),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_settled_different_things_say_so_all_of_them(name: str):
    def run(group: Any) -> str:
        with pytest.raises(RingspanError) as caught:
            ringspan.parallelize(tiny_llama(), group, **DIFFERENT[name][group.rank])
        return str(caught.value)

    for message in ringspan.run_in_process(2, run, timeout_seconds=30.0):
        assert name in message and "rank 0 has" in message and "rank 1 has" in message


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "a chunk of nothing": ({"feed_forward_chunk": 0}, "at least one token"),
    "a tile of nothing": ({"loss_tile": 2.5}, "at least one token"),
    "an unknown mode": ({"rematerialise": "some"}, "none, selective, attention_output, full"),
    "offload of nothing": ({"rematerialise": "none", "offload": Offload()}, "no layer checkpoints are made"),
    "auto without tokens": ({"rematerialise": "auto"}, "tokens_per_rank="),
    "a dtype without shards": ({"compute_dtype": torch.bfloat16}, "not sharded"),
    "parameters on the host without shards": ({"parameters_on_host": True}, "not sharded"),
    "smoothing beyond 1": ({"label_smoothing": 2.0}, "a share of 1"),
    "offload in no flight": ({"offload": Offload(in_flight=0)}, "At least one layer"),
    "a memory of nothing": ({"memory_bytes": 0}, "a number of bytes"),
    "an unknown layout": ({"layout": "wild"}, "layout"),
    "an unknown transport": ({"transport": "pigeon"}, "transport"),
    "scores that are kept": ({"strategy": "ring_self_attention"}, "keeps its scores"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_makes_no_sense_is_refused_on_every_rank_also_where_one_alone_asks_for_it(name: str):
    arguments, words = REFUSALS[name]

    def run(group: Any) -> str:
        # What is ContextParallel's is agreed on by it; the rest is asked for by one rank alone.
        alone = arguments if group.rank == 1 or arguments.keys() & {"layout", "transport"} else {}
        with pytest.raises(RingspanError) as caught:
            ringspan.parallelize(tiny_llama(), group, **alone)
        return str(caught.value)

    assert all(words in message for message in ringspan.run_in_process(2, run, timeout_seconds=30.0))


@pytest.mark.parametrize("how", [{"transport": "process_group"}, {"transport": "peer_memory"}, {"deterministic": True}])
def test_attention_is_asked_for_as_contextparallel_is(how: dict[str, Any]):
    def run(group: Any) -> str:
        parallel = ringspan.parallelize(tiny_llama(), group, kernel="torch_cpu", **how)
        sum(parallel.loss(part) for part in parallel.shard_batches([make_batch(1, 16)])).backward()
        return f"{parallel.context.carrier} {parallel.context.deterministic}"

    wanted = f"{how.get('transport', 'auto')} {how.get('deterministic', False)}"
    assert ringspan.run_in_process(2, run, timeout_seconds=30.0) == [wanted] * 2


def test_models_whose_logits_are_not_known_are_refused_and_go_without_tiles():
    model = tiny_llama()
    model.config.model_type = "unheard_of"
    with pytest.raises(UnsupportedError, match="loss_tile=None"):
        ringspan.parallelize(model)
    parallel = ringspan.parallelize(model, loss_tile=None)
    assert (
        relative(parallel.loss(parallel.shard_batch(make_batch(1, 9))).detach(), tiny_llama()(**make_batch(1, 9)).loss.detach()) <= BUDGET
    )


def test_a_balancing_loss_of_experts_is_refused():
    model = family("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(UnsupportedError, match="output_router_logits=False"):
        ringspan.parallelize(model, feed_forward_chunk=None)


@pytest.mark.parametrize("chunk", ["auto", None])
def test_dropout_anywhere_in_a_model_is_refused(chunk: Any):
    model = tiny_llama()
    model.model.layers[1].mlp.act_fn = torch.nn.Sequential(model.model.layers[1].mlp.act_fn, torch.nn.Dropout(0.25))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.act_fn\.1 drops 0\.25 of the elements"):
        ringspan.parallelize(model, feed_forward_chunk=chunk)


def test_a_model_that_is_prepared_again_is_what_the_last_call_asked_for_and_is_saved_as_it_was(tmp_path: Path):
    model, batch = tiny_llama(), make_batch(2, 13)
    expected = tiny_llama()(**batch).loss.detach()
    ringspan.parallelize(model, feed_forward_chunk=5, loss_tile=4, rematerialise="full", offload=Offload())
    chunk = vars(model.model.layers[0].mlp)
    assert "forward" in chunk and "forward" in vars(model.model.norm)
    again = ringspan.parallelize(model, feed_forward_chunk=None, loss_tile=None, rematerialise="none")
    assert "forward" not in chunk and "forward" not in vars(model.model.norm) and "forward" not in vars(model.model.layers[0])
    assert relative(again.loss(again.shard_batch(batch)).detach(), expected) <= BUDGET
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert relative(loaded(**batch).loss.detach(), expected) <= BUDGET


_UNLIKE = {key: size for key, size in SIZES.items() if key not in ("num_key_value_heads", "attn_implementation")}
STRANGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT2": (
        "GPT2LMHeadModel",
        {**dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)},
        "no list named 'layers'.*seq.shard_batch",
    ),
    "Llama4Text": ("Llama4ForCausalLM", {"head_dim": 4, "num_local_experts": 2}, "layers of the kind chunked_attention"),
    "Mamba": ("MambaForCausalLM", {"state_size": 4}, "layers of the kind|is a convolution over tokens|attention be another's"),
    "Lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "layers of the kind conv"),
    "Falcon": ("FalconForCausalLM", {}, "attention be another's"),
}
"""Of a family: its model, what its configuration needs, and what is said of it."""


@pytest.mark.parametrize("name", [*STRANGE, "a convolution within a layer"])
def test_models_whose_tokens_learn_of_each_other_otherwise_are_refused_on_every_rank(name: str):
    if name in STRANGE:
        kind, sizes, words = STRANGE[name]
        model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**{**_UNLIKE, **sizes}))
    else:
        model, words = tiny_llama(), r"model\.layers\.1\.mixer is a convolution over tokens"
        model.model.layers[1].mixer = torch.nn.Conv1d(36, 36, 4)

    def run(group: Any) -> None:
        how: dict[str, Any] = {"feed_forward_chunk": None, "loss_tile": None, "rematerialise": "none"}
        for each in ({}, how):
            with pytest.raises(UnsupportedError, match=words):
                ringspan.parallelize(model, group, **each)

    ringspan.run_in_process(2, run, timeout_seconds=30.0)


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(RingspanError, match=r"a Linear: it has no config.*AutoModelForCausalLM"):
        ringspan.parallelize(torch.nn.Linear(3, 3))


def test_experts_are_no_feed_forward_that_runs_by_chunks():
    with pytest.raises(UnsupportedError, match="feed_forward_chunk=None"):
        ringspan.parallelize(family("mixtral"))


def test_a_batch_that_one_rank_cannot_compute_is_refused_on_every_rank():
    def run(group: Any) -> list[str]:
        parallel = ringspan.parallelize(tiny_llama(), group)
        said = []
        right, others = make_batch(1, 9), []
        for name in ("input_ids", "labels"):
            others.append({**right, name: right[name].clone()})
            others[-1][name][0, -1] += 1
        for batch in ({"input_ids": torch.zeros(1, 9, dtype=torch.int64)}, {**right, "extra": 1}, make_batch(1, 11), *others):
            with pytest.raises(RingspanError) as caught:
                parallel.shard_batch(batch if group.rank else right)
            said.append(str(caught.value))
        with pytest.raises(RingspanError, match="as many micro-batches"):
            parallel.shard_batches([make_batch(1, 9)] * (1 + group.rank))
        parallel.shard_batch(make_batch(1, 9))
        return said

    for said in ringspan.run_in_process(2, run, timeout_seconds=30.0):
        assert "labels" in said[0] and "nothing is ignored" in said[1] and "the same whole batches" in said[2]
        # A sampler that gives each rank its own tokens would train on a text that is nowhere.
        for name, message in zip(("input_ids", "labels"), said[3:], strict=True):
            assert f"number 0, of 9 tokens, is another on rank 1 than on rank 0: {name}" in message


def test_a_loss_of_a_part_that_was_not_counted_is_refused():
    parallel = ringspan.parallelize(tiny_llama())
    with pytest.raises(RingspanError, match=r"parallel\.shard_batch"):
        parallel.loss(parallel.context.sequence(9).shard_batch(make_batch(1, 9)))


@pytest.mark.parametrize("tile", [3, None])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_losses_by_position_are_the_models_own_token_by_token(name: str, tile: int | None):
    model, batch = family(name), make_batch(2, 19, padded=(0, 4))
    logits = copy.deepcopy(model)(**{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}).logits
    labels = torch.full_like(batch["labels"], -100)
    labels[:, :-1] = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    edges = [0, 1, 6, 7, 19]
    counted = labels != -100
    expected = [losses[:, low:high][counted[:, low:high]].mean().item() for low, high in pairwise(edges)]

    def rank(group: Any) -> list[float]:
        parallel = ringspan.parallelize(copy.deepcopy(model), group, loss_tile=tile, feed_forward_chunk=4, kernel="reference")
        return parallel.losses_by_position([parallel.shard_batch(batch)], [*edges, 23])

    for found in ringspan.run_in_process(3, rank):
        assert found[:-1] == pytest.approx(expected, rel=1e-6)
        # Nobody is there.
        assert math.isnan(found[-1])


def test_ranges_of_positions_rise_and_are_the_same_on_every_rank():
    def rank(group: Any) -> None:
        parallel = ringspan.parallelize(family("llama"), group, kernel="reference")
        parallel.losses_by_position([parallel.shard_batch(make_batch(1, 9))], [0, 4, 4] if group.rank == 1 else [0, 4, 9])

    with pytest.raises(RingspanError, match="follow each other"):
        ringspan.run_in_process(2, rank)
