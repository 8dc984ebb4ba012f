"""Any Hugging Face decoder made long-context: its attention, and everything else that grows with the length."""

from ringspan.transformer.feed_forward import blockwise_feed_forward
from ringspan.transformer.hook import ATTENTION_NAME, register

__all__ = ["ATTENTION_NAME", "blockwise_feed_forward", "register"]
