"""Any Hugging Face decoder made long-context: today its attention."""

from ringspan.transformer.hook import ATTENTION_NAME, register

__all__ = ["ATTENTION_NAME", "register"]
