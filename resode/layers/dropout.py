"""Dropout: multiply by a random mask m with P(m = 0) = p at every position.

=========== ======================================= =======================================================
kind        what is dropped together                source
=========== ======================================= =======================================================
unit        nothing: each element by itself         Srivastava et al. 2014, JMLR 15
spatial     a channel of an image                   Tompson et al. 2015, arXiv 1411.4280
dropconnect an element of the weights (see          Wan et al. 2013, ICML
            ``layers.conv``)
cutout      a rectangle of pixels, in all channels  DeVries & Taylor 2017, arXiv 1708.04552, on features
path        the whole branch, for an image          Huang et al. 2016, arXiv 1603.09382
=========== ======================================= =======================================================

Inverted dropout, the default, multiplies by m/(1 − p) in training and is the identity in evaluation; the other form
(``inverted=False``) multiplies by m in training and by 1 − p in evaluation. Both have the same expectation,
E[m/(1 − p)] = 1 and E[m] = 1 − p.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from resode.errors import choose, probability
from resode.layers.context import current

DROPOUTS = ("unit", "spatial", "dropconnect", "cutout", "path")


def bernoulli_mask(x: Tensor, p: float, shape: tuple[int, ...]) -> Tensor:
    """Ones with probability 1 − p and zeros with probability p, of ``shape``, in the type of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p)


def unit_mask(x: Tensor, p: float) -> Tensor:
    """A mask of the shape of ``x``: each element by itself."""
    return bernoulli_mask(x, p, tuple(x.shape))


def spatial_mask(x: Tensor, p: float) -> Tensor:
    """A mask of shape (B, C, 1, …): whole channels of an image (for a state (B, C), single elements)."""
    return bernoulli_mask(x, p, (*x.shape[:2], *(1 for _ in x.shape[2:])))


def path_mask(x: Tensor, p: float) -> Tensor:
    """A mask of shape (B, 1, …): whole images, for the branch of a residual block (stochastic depth)."""
    return bernoulli_mask(x, p, (x.shape[0], *(1 for _ in x.shape[1:])))


def cutout_mask(x: Tensor, p: float) -> Tensor:
    """A mask of shape (B, 1, H, W): one rectangle of pixels an image, placed anywhere, wrapping around the borders.

    Since the place is uniform on the torus, each pixel is dropped with probability (area of the rectangle)/(H·W).
    The rectangle has a = ⌈√p·H⌉ rows; the number of columns is p·H·W/a rounded up or down at random so that its
    mean is just that, and with it each pixel drops with probability exactly p. A state (B, C) is treated as an
    image of C pixels.
    """
    batch, height, width = (x.shape[0], 1, x.shape[1]) if x.ndim == 2 else (x.shape[0], x.shape[-2], x.shape[-1])
    rows = max(1, math.ceil(math.sqrt(p) * height))
    columns = p * height * width / rows
    uniform = torch.rand(3, batch, dtype=torch.float64, device=x.device)
    wide = torch.floor(columns + uniform[0])
    top = torch.floor(uniform[1] * height)
    left = torch.floor(uniform[2] * width)
    in_rows = _on_circle(torch.arange(height, device=x.device), top, torch.full_like(top, rows), height)
    in_columns = _on_circle(torch.arange(width, device=x.device), left, wide, width)
    keep = ~(in_rows[:, :, None] & in_columns[:, None, :])
    return keep.to(x.dtype).view(batch, -1) if x.ndim == 2 else keep.to(x.dtype).unsqueeze(1)


def _on_circle(positions: Tensor, start: Tensor, length: Tensor, period: int) -> Tensor:
    """Which ``positions`` lie in [start, start + length) modulo ``period``: (B, period), boolean."""
    return (positions[None, :] - start[:, None]).remainder(period) < length[:, None]


MASKS = {"unit": unit_mask, "spatial": spatial_mask, "cutout": cutout_mask, "path": path_mask}


def dropout(x: Tensor, p: float, kind: str = "unit", training: bool = True, inverted: bool = True) -> Tensor:
    """Dropout of ``x`` (B, C) or (B, C, H, W) by a mask drawn now.

    Args:
        p: probability with which each position is dropped, in [0, 1).
        kind: "unit", "spatial", "cutout" or "path".
        training: draw a mask; otherwise the deterministic form of evaluation.
        inverted: see the head of this module.

    Raises:
        InvalidInput: for p outside [0, 1) or an unknown kind.
    """
    draw = MASKS[choose(kind, MASKS, "dropout of a state")]
    probability(p, "dropout p")
    return _apply(x, p, draw(x, p) if training else None, inverted)


def _apply(x: Tensor, p: float, mask: Tensor | None, inverted: bool) -> Tensor:
    if mask is None:
        return x if inverted else x * (1.0 - p)
    return x * (mask / (1.0 - p)) if inverted else x * mask


class Dropout(nn.Module):
    """:func:`dropout` as a layer. Inside a solve its mask is drawn once (or once a mask interval).

    Raises:
        InvalidInput: for p outside [0, 1) or an unknown kind.
    """

    def __init__(self, p: float, kind: str = "unit", inverted: bool = True) -> None:
        super().__init__()
        self.p = probability(p, "dropout p")
        self.kind = choose(kind, MASKS, "dropout of a state")
        self.inverted = inverted

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0:
            return x
        context = current()
        training = self.training if context is None else context.is_training(self)
        if not training:
            return _apply(x, self.p, None, self.inverted)
        draw = partial(MASKS[self.kind], p=self.p)
        mask = draw(x) if context is None else context.mask(self, draw, x)
        return _apply(x, self.p, mask, self.inverted)

    def extra_repr(self) -> str:
        return f"p={self.p}, kind={self.kind!r}" + ("" if self.inverted else ", inverted=False")
