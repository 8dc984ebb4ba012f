"""`ringspan.transformers.register()`: the Hugging Face hook under the name of the library that it serves."""

from ringspan.transformer.hook import ATTENTION_NAME, register

__all__ = ["ATTENTION_NAME", "register"]
