"""What is for Hugging Face models, under the name of the library that it serves: `ringspan.transformers.register()` and others."""

from ringspan.transformer.hook import ATTENTION_NAME, register
from ringspan.transformer.parallelize import parallelize
from ringspan.transformer.rotary import prepare_rotary

__all__ = ["ATTENTION_NAME", "parallelize", "prepare_rotary", "register"]
