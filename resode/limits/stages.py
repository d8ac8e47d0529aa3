"""A residual stage with random weights, of any depth: its states, and how it pulls cotangents back.

No more is ever held than the states that are asked for: weights are made block by block, and again on the way back.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resode.blocks.branch import Branch
from resode.blocks.residual import ResidualBlock
from resode.blocks.settings import check_count
from resode.errors import InvalidInput, choose, positive
from resode.limits.draws import LENGTH_SCALE, WEIGHTS, DepthDraws, smooth_terms
from resode.stack import Stack

SKIPINIT = "skipinit"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Blocks h + L^(−β) f(h) with random weights, for any number L of them; no activation follows the sum.

    Args:
        beta: β; or "skipinit", for a learned factor that starts at 0 in the place of L^(−β).
        weights: iid, smooth or tied (see ``limits.draws``).
        norm: normalization in the branch; batch norm normalizes by the batch, as in training.
        kind: branch: mlp acts on vectors (B, channels), the others on images (B, channels, side, side).
        channels: channels of the state.
        side: height and width of the images.
        expansion: width inside the branch over channels.
        activation: of the branch. Behind a relu weights have twice the variance, so that E‖f(h)‖² = ‖h‖² for the mlp
            without a norm.
        length_scale: ℓ of smooth weights.
        batch: samples in h_0, which is Gaussian.

    Raises:
        InvalidInput: for an unknown name, or a number that makes no sense.
    """

    beta: float | Literal["skipinit"] = 0.5
    weights: Literal["iid", "smooth", "tied"] = "iid"
    norm: str = "none"
    kind: str = "mlp"
    channels: int = 64
    side: int = 8
    expansion: float = 1.0
    activation: str = "relu"
    length_scale: float = LENGTH_SCALE
    batch: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.beta, str):
            choose(self.beta, (SKIPINIT,), "beta (a number, or)")
        elif not 0.0 <= self.beta < math.inf:
            raise InvalidInput(f"beta is {self.beta!r}: a finite number of at least 0 is expected, or 'skipinit'")
        choose(self.weights, WEIGHTS, "course of weights over depth")
        smooth_terms(self.length_scale)
        for name in ("channels", "side", "batch"):
            check_count(getattr(self, name), name)
        positive(self.expansion, "expansion")
        if self.norm == "batch" and self.batch * (1 if self.kind == "mlp" else self.side**2) < 2:
            raise InvalidInput("batch norm averages over a batch, and batch is 1: raise it, or use another norm")
        self.branch()  # a combination that makes no sense is refused here

    def branch(self) -> Branch:
        """A branch of this stage, with parameters of its own drawing."""
        with torch.random.fork_rng(devices=[]):
            made = Branch(
                self.channels,
                Stack(norm=self.norm, activation=self.activation),
                self.kind,
                expansion=self.expansion,
            )
        return made.double()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a batch of states."""
        return (self.batch, self.channels, *(() if self.kind == "mlp" else (self.side, self.side)))


class DrawnStage:
    """A stage of ``depth`` blocks with the weights of ``seed``, in double precision, on ``device``.

    A block's weights are there only while it is used: one block stands for all of them.
    """

    def __init__(self, stage: Stage, depth: int, seed: int = 0, device: str | torch.device = "cpu") -> None:
        self.stage, self.depth = stage, depth
        branch = stage.branch()
        self._draws = DepthDraws(branch, depth, stage.weights, seed, stage.length_scale)
        scale = SKIPINIT if stage.beta == SKIPINIT else depth ** -float(stage.beta)
        self._block = ResidualBlock(branch, scale=scale).double().to(device).requires_grad_(False)

    def block(self, index: int) -> ResidualBlock:
        """Block ``index``, counted from 0, until another one is asked for."""
        self._draws.load(self._block.branch, index)
        self._block.t = index / self.depth
        return self._block

    @torch.no_grad()
    def states(self, h: Tensor) -> Iterator[Tensor]:
        """h_0 = ``h``, h_1, …, h_L."""
        yield h
        for index in range(self.depth):
            h = self.block(index)(h)
            yield h

    def pull_back(self, states: Sequence[Tensor], cotangent: Tensor) -> Iterator[Tensor]:
        """g_L = ``cotangent``, g_{L−1}, …, g_0, each block evaluated again at its state in ``states``."""
        yield cotangent
        for index in reversed(range(self.depth)):
            block = self.block(index)
            with torch.enable_grad():
                h = states[index].detach().requires_grad_()
                (cotangent,) = torch.autograd.grad(block(h), h, cotangent)
            yield cotangent
