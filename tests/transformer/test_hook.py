"""The Hugging Face hook: what it computes exactly as the model would, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BioGptConfig,
    BioGptForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ringspan
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.training.sample import cache_keyword
from ringspan.transformer.hook import attention_forward
from tests.support.errors import relative
from tests.support.hook import BUDGET, SIZES, on_each_rank, part_of
from tests.support.models import gradients, make_batch, seeded, tiny_llama, whole_loss, with_attention

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Mistral with a sliding window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "Qwen 3 with normalised queries and keys": (Qwen3ForCausalLM, Qwen3Config, {}),
    "Gemma 2 with softcap, a window in every other layer, and a scale of its own": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 11},
    ),
    "GPT-2 with learned positions": (GPT2LMHeadModel, GPT2Config, dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)),
    "BioGPT, which calls another's attention though transformers does not say so of it": (
        BioGptForCausalLM,
        BioGptConfig,
        dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop", "activation_dropout"), 0.0),
    ),
    "gpt-oss with sinks and a window in every other layer": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "sliding_window": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


def split_loss(model: Any, batch: dict[str, Tensor], ranks: int, mask: ringspan.Mask | None = None, **how: Any) -> list[Any]:
    def run(group: Any) -> Any:
        context = ringspan.ContextParallel(group, **how)
        sequence = context.sequence(batch["input_ids"].shape[1], mask)
        mine = with_attention(model, "ringspan")
        part = sequence.shard_batch(batch)
        loss = sequence.loss(mine(**part).logits, part["shift_labels"])
        loss.backward()
        context.sum_gradients(mine)
        return loss.detach(), gradients(mine)

    return ringspan.run_in_process(ranks, run)


@pytest.mark.parametrize("name", MODELS)
def test_other_models_have_on_three_ranks_the_loss_and_gradients_that_they_have_whole(name: str):
    model_class, config_class, changes = MODELS[name]
    # The grouped matrix product of gpt-oss's experts knows no float64.
    is_narrow = model_class is GptOssForCausalLM
    model = seeded(model_class, config_class(**{**SIZES, **changes}), torch.float32 if is_narrow else torch.float64)
    budget = 10 * BUDGET if is_narrow else BUDGET
    batch = make_batch(2, 23)
    expected_loss, expected = whole_loss(model, batch)
    for loss, ours in split_loss(model, batch, 3):
        assert relative(loss, expected_loss) <= budget
        errors = {key: relative(ours[key], gradient) for key, gradient in expected.items() if gradient is not None}
        worst = max(errors, key=lambda key: errors[key])
        assert errors[worst] <= 10 * budget, f"{worst} is off by {errors[worst]:.1e}"


def test_a_window_of_another_width_gives_another_loss_so_that_the_test_above_can_fail():
    batch = make_batch(2, 23)
    losses = [
        float(whole_loss(seeded(MistralForCausalLM, MistralConfig(**{**SIZES, "sliding_window": window})), batch)[0]) for window in (5, 6)
    ]
    assert abs(losses[0] - losses[1]) > 1000 * BUDGET


def test_an_encoder_that_sees_everything_is_split_under_the_full_mask():
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    config = BertConfig(**{**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    model = seeded(BertForMaskedLM, config)
    ids = make_batch(2, 17)["input_ids"]
    expected = model(input_ids=ids).logits.detach()

    def run(group: Any) -> tuple[Tensor, Tensor]:
        sequence = ringspan.ContextParallel(group).sequence(17, ringspan.full())
        return with_attention(model, "ringspan")(**sequence.shard_batch({"input_ids": ids})).logits.detach(), sequence.positions

    for logits, positions in ringspan.run_in_process(3, run):
        assert relative(logits, expected[:, positions]) <= BUDGET


# ---- refusals ----------------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_sequence_is_refused_with_the_way_to_give_it_one():
    with pytest.raises(RingspanError, match=r"model\(\*\*seq\.shard_batch\(batch\)\)"):
        tiny_llama("ringspan")(input_ids=make_batch(1, 12)["input_ids"])


def test_hidden_states_are_given_where_they_are_asked_for():
    model = tiny_llama("ringspan")
    for found in ringspan.run_in_process(2, lambda group: model(**part_of(group), output_hidden_states=True)):
        assert len(found.hidden_states) == 1 + model.config.num_hidden_layers


def test_dropout_is_refused_while_training_and_is_no_matter_in_evaluation():
    model = tiny_llama("ringspan", attention_dropout=0.1)
    assert all("dropout=0.1" in message for message in on_each_rank(lambda group: model(**part_of(group))))
    model.eval()
    ringspan.run_in_process(2, lambda group: model(**part_of(group)))


@pytest.mark.parametrize("hidden", [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], ids=["left", "right"])
def test_an_attention_mask_that_reaches_the_model_itself_is_refused(hidden: list[int]):
    model = tiny_llama("ringspan")
    said = on_each_rank(lambda group: model(**part_of(group, attention_mask=torch.tensor([hidden]))))
    assert all("it hides tokens" in message and "shard_batch" in message for message in said)


def test_an_attention_mask_of_ones_hides_nothing_and_passes():
    model = tiny_llama("ringspan")
    ringspan.run_in_process(2, lambda group: model(**part_of(group, attention_mask=torch.ones(1, 6, dtype=torch.int64))))


@pytest.mark.parametrize("value", [torch.zeros(1, 1, 6, 12), torch.full((1, 1, 6, 12), float("-inf"))], ids=["zeros", "infinities"])
def test_a_mask_of_pairs_is_refused(value: Tensor):
    model = tiny_llama("ringspan")
    assert all("attention_mask" in message for message in on_each_rank(lambda group: model(**part_of(group, attention_mask=value))))


def test_a_causal_model_and_a_sequence_under_another_mask_are_refused():
    model = tiny_llama("ringspan")
    said = on_each_rank(lambda group: model(**part_of(group, mask=ringspan.full())))
    assert all("The model and the sequence ask for the same mask" in message and "ringspan.causal()" in message for message in said)


def test_an_encoder_and_a_causal_sequence_are_refused():
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    config = BertConfig(**{**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "ringspan"})
    model = seeded(BertForMaskedLM, config)
    assert all("ringspan.full()" in message for message in on_each_rank(lambda group: model(**part_of(group))))


@pytest.mark.parametrize(
    "keywords",
    [
        {"head_mask": torch.ones(4)},
        {"position_bias": torch.zeros(1, 4, 6, 12)},
        {"alibi": torch.ones(4)},
        {"output_attentions": True},
        {"new_idea": 3},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_a_keyword_that_would_change_the_result_is_refused_and_never_ignored(keywords: dict[str, Any]):
    module = nn.Module()

    def call(group: Any) -> None:
        sequence = ringspan.ContextParallel(group).sequence(12)
        q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
        attention_forward(module, q, k, k, None, ringspan_sequence=sequence, is_causal=True, **keywords)

    name = next(iter(keywords))
    said = on_each_rank(call)
    assert all(name in message and "Nothing that a model asks for is ignored" in message for message in said)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_longest_position_of_a_call_are_refused_since_each_rank_sees_only_its_own(rope_type: str):
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]} if rope_type == "longrope" else {}
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8, **factors}
    model = tiny_llama("ringspan", max_position_embeddings=8, rope_parameters=rope)
    assert all(rope_type in message for message in on_each_rank(lambda group: model(**part_of(group))))
    model(**part_of(None))  # one rank sees all positions
    within = tiny_llama("ringspan", max_position_embeddings=16, rope_parameters={**rope, "original_max_position_embeddings": 16})
    ringspan.run_in_process(2, lambda group: within(**part_of(group)))


def test_a_cache_of_keys_from_an_earlier_call_is_refused():
    model = tiny_llama("ringspan").eval()

    def twice(group: Any) -> None:
        with torch.no_grad():
            keyword = cache_keyword(model)
            cache = model(**part_of(group), use_cache=True)[keyword]
            model(**part_of(group), **{keyword: cache}, use_cache=True)

    assert all("do not belong together" in message for message in on_each_rank(twice))


def test_registering_more_than_once_does_no_harm():
    ringspan.transformers.register()
    ringspan.transformers.register()
    assert not hasattr(PreTrainedModel.get_correct_attn_implementation.__wrapped__, "__wrapped__")
    ringspan.run_in_process(2, lambda group: tiny_llama("ringspan")(**part_of(group)))


def test_without_transformers_registering_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RingspanError, match="pip install"):
        ringspan.transformers.register()


def test_refusals_of_a_feature_are_of_the_class_for_that():
    with pytest.raises(UnsupportedError):
        attention_forward(
            nn.Module(), *[torch.zeros(1, 2, 8, 4)] * 3, None, dropout=0.5, ringspan_sequence=ringspan.ContextParallel().sequence(8)
        )


def test_under_autocast_attention_computes_in_its_dtype_as_pytorchs_own_does():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    batch = make_batch(2, 23)
    exact_loss, exact = whole_loss(with_attention(model, "eager").double(), batch)

    def error(found: dict[str, Tensor]) -> float:
        return sum(relative(found[name].double(), exact[name]) for name in exact) / len(exact)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, plain = whole_loss(with_attention(model, "sdpa"), batch)

    def run(group: Any) -> Any:
        context = ringspan.ContextParallel(group)
        sequence = context.sequence(23)
        mine = with_attention(model, "ringspan")
        part = sequence.shard_batch(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sequence.loss(mine(**part).logits, part["shift_labels"])
        loss.backward()
        context.sum_gradients(mine)
        return loss.detach(), gradients(mine)

    for loss, found in ringspan.run_in_process(2, run):
        assert relative(loss.double(), exact_loss) < 1e-2
        assert 1e-4 < error(found) <= 1.5 * error(plain)
