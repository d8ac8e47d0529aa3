"""torch.compile sees a net of blocks as one graph, which computes what the net does."""

import pytest
import torch

from resode import Dropout, NetConfig, Stack, build
from resode.nets.config import NETS

NETS_OF_BLOCKS = [name for name in NETS if name != "odenet"]
SETTINGS = {
    **{name: {"net": name} for name in NETS_OF_BLOCKS},
    **{kind: {"kind": kind} for kind in ("preact", "bottleneck", "convnext")},
    # Time tells the blocks apart that share a branch, and no others.
    **{time: {"tied": True, "time": time, "depth": 14, "stack": Stack(norm="group")} for time in ("concat", "film")},
    "skipinit": {"scale": "skipinit"},
    "projection": {"shortcut": "projection"},
    "group": {"stack": Stack(norm="group")},
    "layer": {"stack": Stack(norm="layer")},
    "standardized": {"stack": Stack(conv="weight-standardized")},
    "scaled": {"stack": Stack(norm="none", conv="scaled-weight-standardized")},
    "tied, without statistics": {"tied": True, "stack": Stack(norm="group")},
    **{kind: {"stack": Stack(dropout=Dropout(kind, 0.1))} for kind in ("unit", "spatial", "cutout", "path")},
    "dropconnect": {"stack": Stack(dropout=Dropout("dropconnect", 0.1))},
    "noise": {"stack": Stack(input_noise=0.1)},
}


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_net_of_blocks_is_one_graph(name, training):
    settings = {"net": "resnet", "depth": 8, "width": 8, "blocks": 2, "convs": 1, "size": (16, 16), **SETTINGS[name]}
    model = build(NetConfig(**settings), seed=0).train(training)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(2)
    torch.testing.assert_close(compiled(x), expected)


# Dynamo's own, where it leaves a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_branch_that_asks_for_the_time_still_is_told():
    settings = {"net": "resnet", "depth": 14, "width": 8, "tied": True, "time": "concat", "size": (8, 8)}
    model = build(NetConfig(**settings), seed=0)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = build(NetConfig(**settings), seed=0)
    expected(x)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name])
    torch.testing.assert_close(compiled.eval()(x), expected.eval()(x))
