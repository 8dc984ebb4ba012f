"""Is it exact here, now? Every configuration beside float64 dense attention, with a budget for its error and the reason for it."""

from ringspan.verify.budget import FIXED, Budget, budgets
from ringspan.verify.case import DTYPES, Case, Grid
from ringspan.verify.compare import TENSORS, Error, measure
from ringspan.verify.dense import Inputs, Results, allowed_pairs, dense_attention, make_inputs
from ringspan.verify.poison import poisoned_memory
from ringspan.verify.report import CaseReport, VerifyReport
from ringspan.verify.run import verify
from ringspan.verify.world import World, open_world

__all__ = [
    "DTYPES",
    "FIXED",
    "TENSORS",
    "Budget",
    "Case",
    "CaseReport",
    "Error",
    "Grid",
    "Inputs",
    "Results",
    "VerifyReport",
    "World",
    "allowed_pairs",
    "budgets",
    "dense_attention",
    "make_inputs",
    "measure",
    "open_world",
    "poisoned_memory",
    "verify",
]
