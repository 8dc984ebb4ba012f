"""A step that an error ends on every rank between two attentions: the next one is as if it had not been."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.transformer import HostStore, Offload, decoder_layers, rematerialise
from ringspan.transformer.offload import PlainCopier
from tests.support.interruptions import interrupted
from tests.support.models import make_batch, tiny_llama

LENGTH = 32
STRATEGIES: dict[str, dict[str, Any]] = {
    "ring": {"strategy": "ring", "transport": "process_group"},
    "direct": {"strategy": "direct", "transport": "peer_memory"},
    "ulysses in stages": {"strategy": "ulysses", "stages": 2, "transport": "peer_memory"},
}


@pytest.mark.parametrize(("mode", "layers_per_checkpoint"), [("attention_output", 1), ("attention_output", 2), ("full", 1)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_step_after_it_has_its_gradients_and_nothing_of_it_is_kept(strategy: str, mode: str, layers_per_checkpoint: int):
    model = tiny_llama("ringspan", hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=4)
    batch = make_batch(1, LENGTH)

    def run(group: Any) -> None:
        mine = copy.deepcopy(model)
        layers, store = decoder_layers(mine), HostStore(PlainCopier(), Offload(in_flight=1))
        rematerialise(layers, mode, store, layers_per_checkpoint=layers_per_checkpoint)
        sequence = ringspan.ContextParallel(group, **STRATEGIES[strategy]).sequence(LENGTH)
        part = sequence.shard_batch(dict(batch))

        def gradients() -> list[Tensor]:
            mine.zero_grad()
            sequence.loss(mine(**part, use_cache=False).logits, part["shift_labels"]).backward()
            return [parameter.grad for parameter in mine.parameters() if parameter.grad is not None]

        expected, held = gradients(), store.bytes_held
        mlp: Any = layers[1].mlp
        for _ in interrupted(mlp, gradients):
            for _ in range(2):
                assert all(map(torch.equal, gradients(), expected))
            assert (store.bytes_used, store.bytes_held) == (0, held), "host memory is as it would be"

    ringspan.run_in_process(2, run, timeout_seconds=30.0)
