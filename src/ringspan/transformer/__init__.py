"""Any Hugging Face decoder made long-context: its attention, and everything else that grows with the length."""

from ringspan.transformer.feed_forward import blockwise_feed_forward
from ringspan.transformer.hook import ATTENTION_NAME, register
from ringspan.transformer.tiled_loss import LossTerms, cross_entropy_of_logits, tiled_cross_entropy, tiled_loss

__all__ = [
    "ATTENTION_NAME",
    "LossTerms",
    "blockwise_feed_forward",
    "cross_entropy_of_logits",
    "register",
    "tiled_cross_entropy",
    "tiled_loss",
]
