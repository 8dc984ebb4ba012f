"""The Hugging Face hook and models whose tokens learn of each other by anything but the attention that ranks share."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ringspan
from ringspan.errors import UnsupportedError
from tests.support.errors import relative
from tests.support.hook import BUDGET, SIZES, on_each_rank, part_of
from tests.support.models import VOCABULARY, make_batch, seeded

_ENCODER_DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40}
OWN_ATTENTION: dict[str, dict[str, Any]] = {"Falcon": {}, "Bloom": {}, "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2}, "Rwkv": {}}
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": ({"state_size": 4}, "layers of the kind linear_attention"),
    "Jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
        "of the kind (linear_attention|mamba)",
    ),
    "Lfm2": ({"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, "of the kind (conv|linear_attention)"),
    "xLSTM": ({"num_heads": 4}, "no part of it takes position_ids"),
    "Bart": ({**_ENCODER_DECODER, "dropout": 0.0, "vocab_size": VOCABULARY}, "no part of it takes position_ids"),
}
"""Of a family: what its configuration needs, and what is said of it."""


def otherwise(family: str, attention: str) -> Any:
    sizes = {**SIZES, **OTHERWISE[family][0], "attn_implementation": attention}
    return seeded(getattr(transformers, f"{family}ForCausalLM"), getattr(transformers, f"{family}Config")(**sizes))


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_a_model_that_never_calls_the_attention_that_is_named_is_refused_when_it_is_loaded(family: str):
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim", "attn_implementation")}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **OWN_ATTENTION[family]})
    with pytest.raises(UnsupportedError, match=f"{family}ForCausalLM with attn_implementation='ringspan': .*attention of its own.*Llama"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ringspan")
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert plain(input_ids=make_batch(1, 12)["input_ids"]).logits.isfinite().all()


def test_a_part_with_attention_of_its_own_is_refused_only_where_it_is_given_a_sequence():
    tower = transformers.BloomModel(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4, attn_implementation="ringspan")
    )
    tower(input_ids=make_batch(1, 12)["input_ids"])
    # On one rank too: a mask is left to the attention that is named, and this model's own would have none.
    with pytest.raises(UnsupportedError, match=r"a BloomModel with a sequence on 1 rank: .*attention of its own"):
        tower(**part_of(None))


def test_a_model_that_transformers_leaves_with_its_own_attention_is_refused_on_several_ranks_and_right_on_one():
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4, n_layer=2, attn_implementation="eager")
    model = seeded(transformers.BloomForCausalLM, config)
    expected = model(input_ids=make_batch(1, 12)["input_ids"]).logits.detach()
    model.set_attn_implementation("ringspan")
    assert relative(model(**part_of(None)).logits.detach(), expected) <= BUDGET
    said = on_each_rank(lambda group: model(**part_of(group)))
    assert all("a BloomForCausalLM with a sequence on 2 ranks: transformers gave it attention of its own" in message for message in said)


@pytest.mark.parametrize("family", OTHERWISE)
def test_a_model_whose_tokens_learn_of_each_other_otherwise_is_refused_on_several_ranks_and_right_on_one(family: str):
    model, words = otherwise(family, "ringspan"), OTHERWISE[family][1]
    assert all(re.search(f"on 2 ranks: .*{words}.*Llama", message) for message in on_each_rank(lambda group: model(**part_of(group))))
    with torch.no_grad():
        found = model(**part_of(None), use_cache=False).logits
        expected = otherwise(family, "eager")(input_ids=make_batch(1, 12)["input_ids"], use_cache=False).logits
    assert relative(found, expected) <= BUDGET


def test_attention_itself_refuses_a_model_with_other_layers_that_nobody_saw_when_it_was_loaded():
    model = otherwise("Jamba", "eager")
    model.config._attn_implementation = "ringspan"
    said = on_each_rank(lambda group: model(**part_of(group)))
    assert all("attention of JambaAttention on 2 ranks: it has layers of the kind" in message for message in said)


class UsersAttention(nn.Module):
    """It calls the attention that is named, in a way that transformers' own models do not."""

    is_causal = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden: Tensor, **batch: Any) -> Tensor:
        """`[batch, shard, hidden]` to `[batch, shard, heads, head_dim]`."""
        q, k, v = self.project(hidden).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](self, q, k, v, None, **batch)[0]


class UsersModel(PreTrainedModel):
    config_class = Qwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = UsersAttention(config)
        self.post_init()

    def forward(self, input_ids: Tensor, **batch: Any) -> Tensor:
        """Token ids to what attention makes of them."""
        return self.attention(self.embed(input_ids), **batch)


def test_a_users_own_model_is_not_judged_by_what_it_does_not_say():
    model = seeded(UsersModel, Qwen3Config(**{**SIZES, "attn_implementation": "ringspan"}))
    assert not model._supports_attention_backend and not model._can_set_attn_implementation()
    expected = model(**part_of(None)).detach()

    def run(group: Any) -> Tensor:
        sequence = ringspan.ContextParallel(group).sequence(12)
        return sequence.unshard(model(**part_of(group)).detach(), 1)

    assert all(relative(found, expected) <= BUDGET for found in ringspan.run_in_process(2, run))
