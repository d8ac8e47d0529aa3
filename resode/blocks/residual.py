"""The residual block post(shortcut(h) + scale·f(t, h)), and its shortcuts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode.errors import InvalidInput, choose
from resode.layers.context import evaluate
from resode.stack import Stack

SHORTCUTS = ("pad", "projection")
SCALES = ("skipinit", "1/L", "1/sqrt(L)")


class PadShortcut(nn.Module):
    """He et al. 2016, option A: every ``stride``-th pixel, with channels of zeros added; it has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise InvalidInput(
                f"a zero-padded shortcut from {in_channels} to {out_channels} channels: it can only add channels; "
                "use shortcut='projection'"
            )
        self.extra, self.stride = out_channels - in_channels, stride

    def forward(self, h: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(h[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))

    def extra_repr(self) -> str:
        return f"extra={self.extra}, stride={self.stride}"


class ProjectionShortcut(nn.Sequential):
    """He et al. 2016, option B: a 1×1 convolution with ``stride``, and the stack's norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        stack: Stack | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        stack = Stack() if stack is None else stack
        super().__init__(
            stack.conv_layer(in_channels, out_channels, 1, stride=stride), stack.norm_layer(out_channels, size)
        )


def make_shortcut(
    kind: str,
    in_channels: int,
    out_channels: int,
    stride: int,
    stack: Stack,
    size: tuple[int, int] | None = None,
) -> nn.Module:
    """The shortcut of a block that changes the shape: "pad" (option A) or "projection" (option B)."""
    if choose(kind, SHORTCUTS, "shortcut") == "pad":
        return PadShortcut(in_channels, out_channels, stride)
    return ProjectionShortcut(in_channels, out_channels, stride, stack, size)


class ResidualBlock(nn.Module):
    """h ↦ post(shortcut(h) + scale·f(t, h)).

    Args:
        branch: f, any module called as ``branch(t, h)``.
        shortcut: the other way round the branch; the identity if None.
        scale: a number; "skipinit" for a learned number that starts at 0 (De & Smith 2020, arXiv 2002.10444);
            "1/L" or "1/sqrt(L)" with L = ``depth``.
        post: what follows the addition (an activation, for post-activation kinds); the identity if None.
        t: the time at which the branch is evaluated, in [0, 1].
        depth: L, the number of blocks of the stage, for the scales that depend on it.

    Raises:
        InvalidInput: for an unknown scale, one that needs ``depth`` without it, or (in the forward pass) a branch
            whose output has not the shape of the shortcut's.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        scale: float | str = 1.0,
        post: nn.Module | None = None,
        t: float = 0.0,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.post = nn.Identity() if post is None else post
        self.t = t
        self.scale = make_scale(scale, depth)

    def forward(self, h: Tensor) -> Tensor:
        return self.post(add_branch(self.shortcut(h), evaluate(self.branch, self.t, h), self.scale))

    def extra_repr(self) -> str:
        return f"t={self.t:g}" + ("" if isinstance(self.scale, Tensor) else f", scale={self.scale:g}")


def make_scale(scale: float | str, depth: int | None) -> float | nn.Parameter:
    """The number (or learned parameter) that ``scale`` names for a stage of ``depth`` blocks."""
    if not isinstance(scale, str):
        return float(scale)
    if choose(scale, SCALES, "scale of a residual block (or a number)") == "skipinit":
        return nn.Parameter(torch.zeros(()))
    if depth is None or depth < 1:
        raise InvalidInput(f"scale {scale!r} needs the number of blocks: pass depth=L, at least 1 (got {depth})")
    return 1.0 / depth if scale == "1/L" else 1.0 / math.sqrt(depth)


def add_branch(shortcut: Tensor, branch: Tensor, scale: float | Tensor) -> Tensor:
    """shortcut + scale·branch.

    Raises:
        InvalidInput: when their shapes differ (broadcasting would hide the mistake).
    """
    if shortcut.shape != branch.shape:
        raise InvalidInput(
            f"the branch gives {tuple(branch.shape)} and the shortcut {tuple(shortcut.shape)}: they must agree; give "
            "the block a shortcut that changes the shape as its branch does"
        )
    if isinstance(scale, Tensor):
        return shortcut + scale * branch
    return torch.add(shortcut, branch, alpha=scale)
