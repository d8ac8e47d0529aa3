"""One step of the optimizer: the forward pass in its precision, the loss, the penalties, the clipping."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resode.blocks.transport import collect_penalties
from resode.layers.layout import channels_last
from resode.train.clipping import adaptive_clip_
from resode.train.losses import right_answers, training_loss
from resode.train.penalties import penalty
from resode.train.recipe import PRECISIONS, Recipe

Forward = Callable[[Tensor], Tensor]


class Stepper:
    """Makes the steps of one training.

    In float16 the loss is multiplied by a scale before the backward pass, so that small gradients do not vanish, and
    the gradients are divided by it; a step whose gradients overflow is left out, and the scale halved (Micikevicius et
    al. 2018, arXiv 1710.03740, section 3.2; torch's ``GradScaler``).

    Args:
        model: holds the parameters; :meth:`step` may be given another way to compute it (compiled, sampled).
        device: where the model is.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.model, self.recipe, self.optimizer = model, recipe, optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")

    def step(self, forward: Forward, x: Tensor, wanted: Tensor, lr: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """Make one step; the loss, the penalty (if there is any) and the number of right answers before it.

        Args:
            x: images (B, C, H, W) or points (B, C).
            wanted: labels (B,) or shares of the classes (B, K).
        """
        recipe, optimizer = self.recipe, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        if recipe.channels_last and x.ndim == 4:
            x = channels_last(x)
        # Before the forward pass: CUDA graphs write the gradients of this step where those of the last one lie.
        optimizer.zero_grad()
        dtype = PRECISIONS[recipe.precision]
        autocast = torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not torch.float32)
        with autocast, collect_penalties() as of_blocks:
            logits = forward(x)
        loss = training_loss(logits, wanted, recipe.loss, recipe.label_smoothing, recipe.target_threshold)
        of_weights = penalty(self.model, recipe.penalty)
        added = [p.float() for p in (*of_blocks, of_weights) if p is not None]
        extra = torch.stack(added).sum() if added else None
        self.scaler.scale(loss if extra is None else loss + extra).backward()
        self._clip()
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss.detach(), None if extra is None else extra.detach(), right_answers(logits, wanted)

    def _clip(self) -> None:
        recipe = self.recipe
        if recipe.adaptive_clip is None and recipe.clip is None:
            return
        self.scaler.unscale_(self.optimizer)
        if recipe.adaptive_clip is not None:
            adaptive_clip_(self.model, recipe.adaptive_clip)
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
