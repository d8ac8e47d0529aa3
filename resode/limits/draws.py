"""Weights drawn at random over depth: independent from block to block, smooth in depth, or the same in all blocks.

Block l of L has the weights W_l = σ·θ(l/L), whose entries are independent of each other, Gaussian, of variance σ²:

======= =================================================================================================
iid     θ(l/L) is drawn anew for every l.
smooth  each entry of θ is a Gaussian process on [0, 1] of covariance exp(−(s − t)²/(2ℓ²)), ℓ its length
        scale (Marion et al. 2022, arXiv 2206.06929, section 4): as ℓ → ∞ the weights become tied.
tied    θ is constant.
======= =================================================================================================

The smooth process is a function of t, the same at every depth L: with exp(xy) = Σ_n (xy)ⁿ/n!,

    exp(−(x − y)²/2) = Σ_n φ_n(x) φ_n(y),  φ_n(x) = exp(−x²/2) xⁿ/√n!,

so that θ(t) = Σ_n φ_n((t − ½)/ℓ) Z_n, with Z_n independent and standard, has this covariance. The φ_n² are the weights
of a Poisson distribution of mean x²; the sum ends where what is left of them at t = 0 and t = 1 is below 10⁻¹⁶, after
38 terms for ℓ = 0.2. No matrix is factorized, and no more than these Z_n is ever held.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resode.blocks.settings import check_count
from resode.errors import InvalidInput, choose, positive
from resode.layers.conv import Conv2d, Linear

WEIGHTS = ("iid", "smooth", "tied")
LENGTH_SCALE = 0.2
SHORTEST = 0.02
"""A length scale below which the smooth process would take thousands of terms."""
_NEGLIGIBLE = 1e-16


class DepthDraws:
    """The weights of the L blocks of a stage, each block's made when it is asked for.

    Args:
        branch: the branch of one of the blocks. What is drawn are the weights of its linear and convolutional layers,
            of standard deviation √(g/fan-in): g = 2 for a layer behind a ReLU (He et al. 2015, arXiv 1502.01852, eq.
            10), 1 for any other. Biases are 0. The parameters of norms are left alone.
        depth: L.
        kind: "iid", "smooth" or "tied".
        seed: of the draws. The first blocks of two depths are the same if iid, and θ(t) if smooth.
        length_scale: ℓ of the smooth process.

    Raises:
        InvalidInput: for an unknown kind, a depth that is no whole number of at least 1, or a length scale below 0.02.
    """

    def __init__(
        self, branch: nn.Module, depth: int, kind: str = "iid", seed: int = 0, length_scale: float = LENGTH_SCALE
    ) -> None:
        check_count(depth, "depth")
        self.depth, self.kind = depth, kind
        self._sizes = [layer.weight.numel() for layer, _ in _drawn_layers(branch)]
        self._standard = standard_draws(kind, sum(self._sizes), depth, seed, length_scale)

    @torch.no_grad()
    def load(self, branch: nn.Module, index: int) -> None:
        """Give ``branch`` the weights of block ``index``, counted from 0.

        Raises:
            InvalidInput: for a block that is not there.
        """
        if not 0 <= index < self.depth:
            raise InvalidInput(f"block {index} of {self.depth}: blocks are counted from 0 to {self.depth - 1}")
        parts = self._standard(index).split(self._sizes)
        for (layer, deviation), part in zip(_drawn_layers(branch), parts, strict=True):
            layer.weight.copy_(part.view_as(layer.weight) * deviation)
            if layer.bias is not None:
                layer.bias.zero_()


def standard_draws(kind: str, size: int, depth: int, seed: int, length_scale: float) -> Callable[[int], Tensor]:
    """l ↦ θ(l/L), of shape (size,), float64, each entry of mean 0 and variance 1; L = ``depth``."""
    choose(kind, WEIGHTS, "course of weights over depth")
    if kind == "iid":
        return lambda index: normal((size,), seed, index + 2)
    if kind == "tied":
        constant = normal((size,), seed, 1)
        return lambda index: constant
    terms = smooth_terms(length_scale)
    Z = normal((terms, size), seed, 1)
    return lambda index: smooth_features(index / depth, length_scale, terms) @ Z


def smooth_terms(length_scale: float) -> int:
    """The number of functions φ_n after which those left out are negligible on all of [0, 1].

    Raises:
        InvalidInput: for a length scale below 0.02.
    """
    if positive(length_scale, "length_scale") < SHORTEST:
        raise InvalidInput(
            f"length_scale is {length_scale:g}, below {SHORTEST:g}: weights that change so fast are near independent "
            "ones; use kind 'iid'"
        )
    mean = (0.5 / length_scale) ** 2
    n, log_weight = 0, -mean
    # Beyond its mean a Poisson weight falls faster than a geometric one: the last bounds the rest.
    while n <= mean or log_weight > math.log(_NEGLIGIBLE):
        n += 1
        log_weight += math.log(mean / n)
    return n + 1


def smooth_features(t: float, length_scale: float, terms: int) -> Tensor:
    """φ_0 … φ_{terms−1} at x = (t − ½)/ℓ, float64; the squares of all of them sum to 1."""
    x = (t - 0.5) / length_scale
    n = torch.arange(terms, dtype=torch.float64)
    if x == 0.0:
        return (n == 0).double()
    # By logarithms: xⁿ and n! alone would overflow.
    size = torch.exp(n * math.log(abs(x)) - 0.5 * (x * x + torch.lgamma(n + 1)))
    return size if x > 0 else size * (1 - 2 * (n % 2))


def normal(shape: tuple[int, ...], seed: int, stream: int) -> Tensor:
    """Standard normal numbers, float64: those of one of the streams of ``seed``. Weights take the streams from 1 on."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _drawn_layers(branch: nn.Module) -> list[tuple[Conv2d | Linear, float]]:
    """The layers whose weights are drawn, in order, each with its standard deviation."""
    found, behind_relu = [], False
    for layer in branch.modules():
        if isinstance(layer, Conv2d | Linear):
            fan_in = layer.weight[0].numel()
            found.append((layer, math.sqrt((2 if behind_relu else 1) / fan_in)))
            behind_relu = False
        elif isinstance(layer, nn.ReLU):
            behind_relu = True
    return found
