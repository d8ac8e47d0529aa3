"""An ODE block within torch.export: a fixed grid becomes operations of the graph, an adaptive solve is refused."""

import pytest
import torch

from resode.blocks.branch import Branch
from resode.blocks.ode import ODEBlock
from resode.errors import InvalidInput
from resode.stack import Stack


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    "settings", [{"solver": "rk4"}, {"solver": "dopri5"}, {"solver": "euler", "extra_channels": 1}]
)
def test_a_block_on_a_fixed_grid_is_exported_as_its_steps(settings, norm):
    torch.manual_seed(0)
    branch = Branch(3 + settings.get("extra_channels", 0), Stack(norm=norm), time="concat")
    block = ODEBlock(branch, steps=2, **settings).eval()
    batches = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(block, (torch.randn(2, 3, 6, 6),), dynamic_shapes=batches).module()
    for batch in (2, 5):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(exported(x), block(x))


def test_an_adaptive_block_is_not_exported():
    block = ODEBlock(Branch(3, time="concat"), "dopri5").eval()
    with pytest.raises(InvalidInput, match=r"dopri5 chooses its steps by the values it meets.*solver_settings"):
        torch.export.export(block, (torch.randn(2, 3, 6, 6),))
