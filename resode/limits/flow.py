"""A net as flows: its ODE blocks, solved as they are used, finer, coarser, or by another solver."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from resode.blocks.multistep import MULTISTEP
from resode.blocks.ode import ODEBlock, ode_blocks, solver_settings
from resode.blocks.settings import TOLERANCE
from resode.blocks.solvers import uniform_grid
from resode.blocks.tableaux import TABLEAUX
from resode.errors import InvalidInput
from resode.limits.lift import lift
from resode.nets.net import evaluating

POINTS = 9
"""At which a trajectory is looked at whose solver has no grid of its own."""
MULTISTEP_ORDER = 4
LEAST_TOLERANCE = 50.0
"""In units of rounding of the state's type: an error control that asks for less fights with rounding."""


@dataclass(frozen=True, eq=False)
class Flow:
    """A net with ODE blocks.

    Args:
        net: the net.
        lifted: whether it was lifted from a residual net, whose blocks are the steps of its ODE blocks.

    Raises:
        InvalidInput: for a net without ODE blocks.
    """

    net: nn.Module
    lifted: bool = False

    def __post_init__(self) -> None:
        if not self.blocks:
            raise InvalidInput(f"this {type(self.net).__name__} has no ODE block: lift it first (limits.lift)")

    @property
    def named(self) -> dict[str, ODEBlock]:
        """The ODE blocks by their names in the net."""
        return ode_blocks(self.net)

    @property
    def blocks(self) -> list[ODEBlock]:
        return list(self.named.values())

    @property
    def order(self) -> int:
        """The least order of the blocks' solvers."""
        return min(order_of(block) for block in self.blocks)

    @contextmanager
    def solving(self, factor: float = 1.0, solver: str | None = None) -> Iterator[None]:
        """The net in evaluation mode, its blocks with ``factor`` times as many steps, and by ``solver`` if given.

        A block that chooses its steps has its tolerances divided by factor^(q + 1) instead, with q the order of its
        error estimate: then the steps that it accepts are about ``factor`` times as many.

        Raises:
            InvalidInput: when ``factor`` does not make whole numbers of steps, the grid steps over a breakpoint, or a
                block cannot be solved so.
        """
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.net))
            for block in self.blocks:
                stack.enter_context(solver_settings(block, compile_mode=None, **_settings(block, factor, solver)))
            for block in self.blocks:
                block.scheme()
            yield

    def allows(self, factor: float, solver: str | None = None) -> bool:
        """Whether the blocks can be solved so."""
        try:
            with self.solving(factor, solver):
                return True
        except InvalidInput:
            return False

    def entries(self, x: Tensor) -> dict[str, Tensor]:
        """What each block is given, solved as they are now, when the net is given ``x``.

        Raises:
            InvalidInput: for a block that the net uses more than once, or not at all.
        """
        found: dict[str, Tensor] = {}
        names = {block: name for name, block in self.named.items()}

        def note(block: ODEBlock, inputs: tuple[Tensor, ...]) -> None:
            if names[block] in found:
                raise InvalidInput(f"the ODE block {names[block]} is used twice in the net: its trajectory is not one")
            found[names[block]] = inputs[0]

        hooks = [block.register_forward_pre_hook(note) for block in names]
        try:
            self.net(x)
        finally:
            for hook in hooks:
                hook.remove()
        if unused := set(names.values()) - set(found):
            raise InvalidInput(f"the net does not use its ODE block {', '.join(sorted(unused))}")
        return found


def flow_of(net: nn.Module | Flow) -> Flow:
    """``net`` as flows: its own ODE blocks, or those that it is lifted to (``limits.lift``, between linear knots).

    Raises:
        InvalidInput: for a net that has no ODE blocks and cannot be lifted.
    """
    if isinstance(net, Flow):
        return net
    if ode_blocks(net):
        return Flow(net)
    return Flow(lift(net, basis="linear"), lifted=True)


def _settings(block: ODEBlock, factor: float, solver: str | None) -> dict[str, object]:
    if block.grid_steps is None:
        if solver is not None:
            raise InvalidInput(f"a block that chooses its steps by {block.solver} says of no number for {solver}")
        if factor == 1.0:
            return {}
        pair = TABLEAUX[block.solver]
        tolerances = ((name, getattr(block, name)) for name in ("rtol", "atol"))
        least = LEAST_TOLERANCE * torch.finfo(_dtype(block)).eps
        power = factor ** (pair.embedded_order + 1)
        return {name: max(least, (TOLERANCE if tol is None else tol) / power) for name, tol in tolerances}
    steps = block.grid_steps * factor
    if steps < 1 or steps != int(steps):
        raise InvalidInput(f"{factor:g} times the {block.grid_steps} steps of a block is no whole number")
    return {"steps": int(steps)} if solver is None else {"steps": int(steps), "solver": solver}


def _dtype(block: ODEBlock) -> torch.dtype:
    held = (tensor.dtype for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point())
    return next(held, torch.get_default_dtype())


def order_of(block: ODEBlock) -> int:
    """The order of the block's solver."""
    return MULTISTEP_ORDER if block.solver in MULTISTEP else TABLEAUX[block.solver].order


def grid_of(block: ODEBlock) -> tuple[float, ...]:
    """The points of the block's grid; of a block that chooses its steps, some points."""
    return uniform_grid(block.t0, block.t1, block.grid_steps or POINTS - 1)


def steps_of(block: ODEBlock) -> list[tuple[float, float]] | None:
    """The steps of the block's grid, from where to where; None unless each follows from the state before it."""
    if block.grid_steps is None or block.solver not in TABLEAUX:
        return None
    return list(pairwise(grid_of(block)))
