"""torch.compile around a model whose attention is ringspan's: the same numbers, and no graph break but those that are documented."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ringspan.attention import graphs
from tests.support.processes import results, run_processes
from tests.transformer.compiled import beside_itself

# Dynamo asks a tensor between two graphs for its .grad, and hides the warning that this draws where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
EXACT = 1e-12
"""The compiled graphs here hold the operations of the model as they are, in float64."""
GRAPHS_OF_A_LAYER, GRAPHS_AROUND = 4, 5
"""What docs/compile.md says: a layer and its attention each in two; and what is before and after the mask, in two nested forwards."""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "layers"), [("model", 3), ("layers", 3), ("layers", 10)])
def test_a_compiled_model_has_the_same_loss_and_gradients_and_the_documented_graph_breaks(how: str, layers: int):
    found = beside_itself(None, how, layers)
    assert found["worst"] <= EXACT
    assert found["breaks"] and all(graphs.REASON in reason for reason in found["breaks"]), found["breaks"]
    around = GRAPHS_AROUND if how == "model" else 0
    assert layers < found["ran"] <= GRAPHS_OF_A_LAYER * layers + around
    assert found["made"] <= GRAPHS_OF_A_LAYER + around, "all layers share their graphs"


@pytest.mark.slow
def test_two_processes_that_compile_have_the_same_loss_and_gradients(tmp_path: Path):
    for found in results(
        run_processes(2, "tests.transformer.compiled:on_two_ranks", tmp_path / "ranks", group_timeout=150.0, timeout=200.0)
    ):
        assert found["worst"] <= EXACT
        assert found["ran"] and all(graphs.REASON in reason for reason in found["breaks"]), found["breaks"]


def test_the_compiler_is_told_once_it_is_there_and_not_before(monkeypatch: pytest.MonkeyPatch):
    owner = SimpleNamespace(function=lambda: 3)
    plain = owner.function
    monkeypatch.setattr(graphs, "_WAITING", [])
    graphs.stays_uncompiled(owner, "function")
    with monkeypatch.context() as without:
        without.delitem(graphs.sys.modules, "torch._dynamo", raising=False)
        graphs.keep_uncompiled()
        assert owner.function is plain
    torch.compile(lambda: None)
    graphs.keep_uncompiled()
    told = owner.function
    assert told is not plain and told() == 3
    graphs.keep_uncompiled()
    assert owner.function is told
