"""Integers only: spans, layouts, masks and the tiles that they leave. No torch here."""

from ringspan.geometry.layout import LAYOUTS, Layout, make_layout
from ringspan.geometry.mask import MASKS, Causal, Full, Mask, Region, causal, full, parse_mask, tiles
from ringspan.geometry.span import Span
from ringspan.geometry.tile import Tile, band_pairs
from ringspan.geometry.workload import Workload

__all__ = [
    "LAYOUTS",
    "MASKS",
    "Causal",
    "Full",
    "Layout",
    "Mask",
    "Region",
    "Span",
    "Tile",
    "Workload",
    "band_pairs",
    "causal",
    "full",
    "make_layout",
    "parse_mask",
    "tiles",
]
