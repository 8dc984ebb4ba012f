"""`ringspan.transformers.register()` and `parallelize()`: what is for Hugging Face models, under the name of the library that it serves."""

from ringspan.transformer.hook import ATTENTION_NAME, register
from ringspan.transformer.parallelize import parallelize

__all__ = ["ATTENTION_NAME", "parallelize", "register"]
