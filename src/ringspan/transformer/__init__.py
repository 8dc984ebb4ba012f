"""Any Hugging Face decoder made long-context: its attention, and everything else that grows with the length."""

from ringspan.transformer.feed_forward import blockwise_feed_forward
from ringspan.transformer.hook import ATTENTION_NAME, register
from ringspan.transformer.layers import decoder_layers
from ringspan.transformer.offload import HostStore, Offload, PlainCopier, make_store
from ringspan.transformer.rematerialise import MODES, rematerialise
from ringspan.transformer.tiled_loss import LossTerms, cross_entropy_of_logits, tiled_cross_entropy, tiled_loss

__all__ = [
    "ATTENTION_NAME",
    "MODES",
    "HostStore",
    "LossTerms",
    "Offload",
    "PlainCopier",
    "blockwise_feed_forward",
    "cross_entropy_of_logits",
    "decoder_layers",
    "make_store",
    "register",
    "rematerialise",
    "tiled_cross_entropy",
    "tiled_loss",
]
