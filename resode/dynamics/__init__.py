"""Any residual network as a list of steps in depth: what the analyses of ``paths`` and ``limits`` act on.

A step is h ↦ post(shortcut(h) + scale·branch(t, h)). A residual block is one; each step of an ODE block's grid is one,
with the identity as its shortcut and the increment Δ Σ_i b_i k_i as its branch; a transformer block is two (attention,
and the perceptron); a plain layer has no shortcut.

:func:`dynamics` reads our own nets and blocks, torchvision's ResNet (with ResNeXt and Wide ResNet), ConvNeXt, ViT and
VGG, and timm's ResNet, ConvNeXt and ViT. Any other model is described by hand, with a function that finds its parts::

    def read(model):
        steps = [Step(kind="residual", branch=lambda t, h, b=b: b.mlp(b.norm(h)), label=name)
                 for name, b in model.blocks.named_children()]
        return Parts(stem=model.embed, steps=steps, head=model.classifier, shape=(3, 32, 32))

    view = dynamics(model, read=read)

and the view is compared with the model all the same.
"""

import torch
from torch import Tensor, nn

from resode.blocks.ode import ODEBlock, ode_blocks
from resode.dynamics import timm, torchvision
from resode.dynamics.ode import Grid, Increment
from resode.dynamics.own import Accepted, read_net, read_sequence
from resode.dynamics.parts import Parts, Reader
from resode.dynamics.step import Map, Shape, Step
from resode.dynamics.view import ResidualDynamics
from resode.errors import InvalidInput
from resode.nets.net import Net, evaluating

__all__ = ["Grid", "Increment", "Map", "Parts", "Reader", "ResidualDynamics", "Shape", "Step", "dynamics"]


def dynamics(
    model: nn.Module, example: Tensor | None = None, grid: Grid | None = None, read: Reader | None = None
) -> ResidualDynamics:
    """Read ``model`` as steps.

    Args:
        model: one of our nets; a ``ResidualBlock`` or ``ODEBlock``; an ``nn.Sequential`` of these, with whatever
            modules before (the stem), between (transitions) and after (the head); a ResNet, ConvNeXt, ViT or VGG of
            torchvision's or a ResNet, ConvNeXt or ViT of timm's. It is read as it stands in evaluation mode.
        example: an input on which to compare the steps together with the model, in evaluation mode. Without one, a
            random input serves where the shape that the model takes is known.
        grid: read every ODE block on this grid (a number of equal steps, or the points from t0 to t1), whatever its
            own. A block that chooses its steps needs it, or an ``example``: the steps made there are then frozen.
        read: finds the parts of a model of any other kind.

    The steps of the view know the shapes that they met in the comparison.

    Raises:
        InvalidInput: for a model that cannot be read (with the modules in question), an ODE block without a grid, a
            ``grid`` without any ODE block, an ``example`` that is no batch, a view that differs from its model, or a
            model whose outputs are not finite, so that this cannot be told.
    """
    return read_on(model, example, grid, read)[0]


def read_on(
    model: nn.Module, example: Tensor | None = None, grid: Grid | None = None, read: Reader | None = None
) -> tuple[ResidualDynamics, Tensor | None]:
    """:func:`dynamics`, and the input on which it was compared with the model (None where no input is known)."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"the model is a {type(model).__name__}: an nn.Module is expected")
    if example is not None and not (isinstance(example, Tensor) and example.numel()):
        found = (
            f"a tensor of shape {tuple(example.shape)}"
            if isinstance(example, Tensor)
            else f"a {type(example).__name__}"
        )
        raise InvalidInput(f"the example is {found}: a batch of at least one input is expected")
    blocks = list(ode_blocks(model).values())
    if grid is not None and not blocks:
        raise InvalidInput(f"grid is {grid}, and this {type(model).__name__} has no ODE block: leave it out")
    with evaluating(model):
        accepted = _accepted(model, blocks, example) if grid is None else {}
        parts = _parts(model, grid, accepted) if read is None else _read_by_hand(model, read)
        view = ResidualDynamics(parts.stem, parts.steps, parts.head, model)
        x = example if example is not None else _random_input(model, parts.shape)
        if x is None:
            return view, None
        view, last = view.measured_to_end(x)
        if grid is None:  # on another grid the view is another net
            _require_equal(view.head(last), model(x), type(model).__name__)
        return view, x


def _read_by_hand(model: nn.Module, read: Reader) -> Parts:
    parts = read(model)
    if not isinstance(parts, Parts):
        raise InvalidInput(
            f"read gives a {type(parts).__name__} for this {type(model).__name__}: resode.Parts(stem, steps, head) is "
            "expected"
        )
    return parts


def _parts(model: nn.Module, grid: Grid | None, accepted: Accepted) -> Parts:
    if isinstance(model, Net):
        return read_net(model, grid, accepted)
    if reader := torchvision.reader(model) or timm.reader(model):
        return reader(model)
    return read_sequence(model, grid, accepted)


def _accepted(model: nn.Module, blocks: list[ODEBlock], example: Tensor | None) -> Accepted:
    """The steps that the blocks of ``model`` with steps of their choice make on ``example``."""
    found: dict[ODEBlock, tuple[float, ...]] = {}
    adaptive = [block for block in blocks if block.grid_steps is None]
    if example is None or not adaptive:
        return found

    def note(block: ODEBlock, inputs: tuple[Tensor, ...]) -> None:
        if block in found:
            raise InvalidInput("an ODE block that stands in several places of the model has no one grid: pass grid=32")
        found[block] = block.accepted_grid(inputs[0])

    hooks = [block.register_forward_pre_hook(note) for block in adaptive]
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _random_input(model: nn.Module, shape: Shape | None) -> Tensor | None:
    """Two inputs of ``shape``, of the model's type and on its device, without touching the random state."""
    if shape is None:
        return None
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    return x.to(like.device, like.dtype)


def _require_equal(seen: Tensor, expected: Tensor, name: str) -> None:
    if seen.shape != expected.shape:
        raise InvalidInput(
            f"the steps read from {name} give {tuple(seen.shape)} on the example, and it gives {tuple(expected.shape)}"
        )
    if not expected.isfinite().all():
        raise InvalidInput(
            f"{name} gives numbers that are not finite, by which its steps cannot be compared with it: pass an example "
            "on which they are finite, or mend its weights"
        )
    # A view that is right differs by rounding; half precision rounds at 1/256.
    close = 1e-4 if seen.dtype in (torch.float32, torch.float64) else 3e-2
    if not torch.allclose(seen, expected, rtol=close, atol=close * float(expected.abs().max())):
        off = float((seen - expected).abs().max())
        raise InvalidInput(f"the steps read from {name} differ from it by {off:g} on the example")
