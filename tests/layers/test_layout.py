"""The order of images in memory, on the way forward and on the way back."""

import pytest
import torch
from torch import Tensor, nn

from resode.blocks import ODEBlock
from resode.layers.layout import gradient_alike, is_channels_last


class Noting(torch.autograd.Function):
    """The identity, which notes how its gradients lie in memory."""

    @staticmethod
    def forward(ctx, x: Tensor, seen: list[bool]) -> Tensor:
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(is_channels_last(g))
        return g, None


class Noted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.seen: list[bool] = []

    def forward(self, t: float, h: Tensor) -> Tensor:
        return Noting.apply(self.conv(h), self.seen)


def images() -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)


# The mean of squares, and the mean over pixels of a net's head.
LOSSES = [lambda y: y.square().mean(), lambda y: y.mean((2, 3)).square().sum()]


@pytest.mark.parametrize("loss", LOSSES, ids=["squares", "pixels"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "reversible", "adjoint"])
@pytest.mark.parametrize("extra", [0, 1])
def test_a_solve_goes_back_in_the_order_of_memory_in_which_it_came(gradient, extra, loss):
    torch.manual_seed(1)
    branch = Noted()
    branch.conv = nn.Conv2d(3 + extra, 3 + extra, 3, padding=1)
    block = ODEBlock(branch, "rk4", steps=2, gradient=gradient, extra_channels=extra)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        branch.seen.clear()
        block.zero_grad()
        x = images()
        loss(block(x.contiguous(memory_format=layout))).backward()
        assert branch.seen
        assert set(branch.seen) == {layout == torch.channels_last}
        gradients.append([x.grad, *(p.grad.clone() for p in block.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_what_lies_contiguous_or_needs_no_gradient_is_left_alone():
    x = images()
    y = x * 2
    assert gradient_alike(y) is y
    assert y._backward_hooks is None
    still = x.detach().contiguous(memory_format=torch.channels_last)
    assert gradient_alike(still) is still
