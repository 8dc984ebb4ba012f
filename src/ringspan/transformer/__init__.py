"""Any Hugging Face decoder made long-context: its attention, and everything else that grows with the length."""

from ringspan.transformer.blockwise import blockwise
from ringspan.transformer.hook import ATTENTION_NAME, register
from ringspan.transformer.layers import decoder_layers
from ringspan.transformer.memory import (
    LayerShape,
    LiveBytes,
    ModeChoice,
    auto_feed_forward_chunk,
    auto_loss_tile,
    auto_rematerialise,
    layer_shape,
)
from ringspan.transformer.offload import HostStore, Offload, PlainCopier, make_store
from ringspan.transformer.parallel_model import Chosen, ParallelModel
from ringspan.transformer.parallelize import parallelize
from ringspan.transformer.rematerialise import MODES, rematerialise
from ringspan.transformer.rotary import prepare_rotary
from ringspan.transformer.tiled_loss import LossTerms, cross_entropy_of_logits, tiled_cross_entropy, tiled_loss

__all__ = [
    "ATTENTION_NAME",
    "MODES",
    "Chosen",
    "HostStore",
    "LayerShape",
    "LiveBytes",
    "LossTerms",
    "ModeChoice",
    "Offload",
    "ParallelModel",
    "PlainCopier",
    "auto_feed_forward_chunk",
    "auto_loss_tile",
    "auto_rematerialise",
    "blockwise",
    "cross_entropy_of_logits",
    "decoder_layers",
    "layer_shape",
    "make_store",
    "parallelize",
    "prepare_rotary",
    "register",
    "rematerialise",
    "tiled_cross_entropy",
    "tiled_loss",
]
