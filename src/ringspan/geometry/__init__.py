"""Integers only: spans, layouts, masks and the tiles that they leave. No torch here."""

from ringspan.geometry.balance import balanced_layout, make_layout
from ringspan.geometry.grid import PLACEMENTS, Grid, merge_groups, rows_within
from ringspan.geometry.heads import HeadShare, head_shares, head_stages, shared_keys
from ringspan.geometry.layout import LAYOUTS, Layout
from ringspan.geometry.mask import (
    Mask,
    MaskMod,
    Region,
    block_sparse,
    causal,
    depends_on_position,
    document_borders,
    documents,
    full,
    has_window,
    looks_ahead,
    mask_mod,
    prefix_lm,
    sliding_window,
)
from ringspan.geometry.mask_text import MASK_FORMS, MASKS, parse_mask
from ringspan.geometry.span import Span
from ringspan.geometry.tile import Tile, band_pairs
from ringspan.geometry.tiling import tiles
from ringspan.geometry.workload import Workload

__all__ = [
    "LAYOUTS",
    "MASKS",
    "MASK_FORMS",
    "PLACEMENTS",
    "Grid",
    "HeadShare",
    "Layout",
    "Mask",
    "MaskMod",
    "Region",
    "Span",
    "Tile",
    "Workload",
    "balanced_layout",
    "band_pairs",
    "block_sparse",
    "causal",
    "depends_on_position",
    "document_borders",
    "documents",
    "full",
    "has_window",
    "head_shares",
    "head_stages",
    "looks_ahead",
    "make_layout",
    "mask_mod",
    "merge_groups",
    "parse_mask",
    "prefix_lm",
    "rows_within",
    "shared_keys",
    "sliding_window",
    "tiles",
]
