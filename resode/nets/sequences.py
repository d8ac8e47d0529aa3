"""The modules of a net where their order is known: in an ``nn.Sequential``, whose forward pass is that order.

What stands within a branch belongs to the field, whose own depth is no depth of the net.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from torch import nn

from resode.blocks.ode import ODEBlock
from resode.blocks.residual import ResidualBlock
from resode.errors import InvalidInput


def is_sequence(module: nn.Module) -> bool:
    """Whether ``module`` computes its children one after the other, and nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def keeps_shape(module: nn.Module) -> bool:
    """Whether ``module`` is a residual block with the identity as its shortcut: a step of a stage."""
    is_block = isinstance(module, ResidualBlock) and type(module).forward is ResidualBlock.forward
    return is_block and isinstance(module.shortcut, nn.Identity)


def outside_branches(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``net`` with their names, each once, but for those within the branch of a block."""
    branches = {module.branch for module in net.modules() if isinstance(module, ResidualBlock | ODEBlock)}
    within = {part for branch in branches for part in branch.modules()}
    return ((name, module) for name, module in net.named_modules() if module not in within)


def block_sequences(net: nn.Module) -> list[nn.Sequential]:
    """The sequences in ``net`` that hold residual blocks that keep the shape, but for those within a branch.

    Raises:
        InvalidInput: for such a block that stands elsewhere: what comes before and after it, only a forward pass knows.
    """
    modules = list(outside_branches(net))
    found = [module for _, module in modules if is_sequence(module) and any(map(keeps_shape, module))]
    placed = {block for sequence in found for block in sequence}
    for name, module in modules:
        if keeps_shape(module) and module not in placed:
            raise InvalidInput(
                f"the residual block {name or 'given'} stands in no nn.Sequential, so the order of the blocks is not "
                "known: put the blocks of a stage into one"
            )
    return found


def runs(sequence: nn.Sequential) -> list[tuple[bool, list[nn.Module]]]:
    """``sequence`` cut into runs of residual blocks that keep the shape (True), and what stands between them."""
    return [(keeps, list(group)) for keeps, group in groupby(sequence, keeps_shape)]


def fill(sequence: nn.Sequential, modules: Iterable[nn.Module]) -> None:
    """Let ``sequence`` consist of ``modules``."""
    sequence._modules.clear()
    sequence.extend(modules)


def spliced(net: nn.Module, instead: Mapping[nn.Module, Sequence[nn.Module]]) -> nn.Module:
    """``net``, changed: wherever a module of ``instead`` stands, several stand one after the other."""
    if net in instead:
        return nn.Sequential(*instead[net])
    for parent in list(net.modules()):
        if is_sequence(parent) and any(child in instead for child in parent):
            fill(parent, [new for child in parent for new in instead.get(child, [child])])
        else:
            for name, child in list(parent._modules.items()):
                if child in instead:
                    parent._modules[name] = nn.Sequential(*instead[child])
    return net
