"""What a model masks by itself, and positions that begin again: computed because the sequence's mask says the same, or refused."""

import pytest
import torch
from transformers.masking_utils import and_masks, causal_mask_function, chunked_overlay, or_masks, sliding_window_overlay

import ringspan
from ringspan.transformer.hook import attention_mask

TOKENS = torch.arange(20)[None]
AGAIN = torch.cat([torch.arange(8), torch.arange(12)])[None]


def test_causal_masks_and_windows_are_known():
    assert attention_mask(mask_function=causal_mask_function) is None
    assert attention_mask(mask_function=and_masks(sliding_window_overlay(4), causal_mask_function)) is None


@pytest.mark.parametrize(
    "function",
    [
        and_masks(chunked_overlay(8, torch.zeros(1)), causal_mask_function),
        or_masks(causal_mask_function, causal_mask_function),
        and_masks(causal_mask_function, lambda b, h, q, kv: q - kv < 3),
    ],
)
def test_any_other_function_of_the_models_is_refused(function):
    with pytest.raises(ringspan.UnsupportedError, match="a model that masks by"):
        attention_mask(mask_function=function)


def test_positions_that_begin_again_need_a_document_border_in_the_mask():
    def run(group) -> list[int]:
        context = ringspan.ContextParallel(group)
        with pytest.raises(ringspan.UnsupportedError, match=r"begin again at \[8\]"):
            context.sequence(20).shard_batch({"input_ids": TOKENS, "position_ids": AGAIN})
        packed = context.sequence(20, ringspan.causal() & ringspan.documents([0, 8, 20]))
        return packed.shard_batch({"input_ids": TOKENS, "position_ids": AGAIN})["position_ids"][0].tolist()

    first, second = ringspan.run_in_process(2, run)
    assert sorted(first + second) == sorted(AGAIN[0].tolist())
