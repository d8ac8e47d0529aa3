"""Every identity block of a residual net deleted, one at a time: what that costs, and what memory it takes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.station import MIB, arithmetic, evaluations, peak_rss, start_peak
from experiments.bench.turns import Way, wait
from resode.blocks import Branch, ResidualBlock
from resode.dynamics import ResidualDynamics, dynamics
from resode.dynamics.inference import inference
from resode.nets import Net, NetConfig, build
from resode.nets.net import evaluating
from resode.paths.interventions import delete
from resode.paths.streams import answers, default_streams

NAIVE, FORKED, FAST = "a forward pass each", "forked", "folded, channels-last"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """He's residual net for images, with random weights and the statistics of a few batches, and images for it.

    Args:
        depth: 6n + 2.
        width: channels of the first stage.
        side: of the square images.
        batch: images in a batch.
        seed: of weights and images.
        device: where they are.
    """

    depth: int
    width: int
    side: int
    batch: int
    seed: int
    device: str

    @cached_property
    def net(self) -> Net:
        config = NetConfig(net="resnet", depth=self.depth, width=self.width, size=(self.side, self.side))
        net = build(config, seed=self.seed).to(self.device)
        with torch.no_grad():
            for batch in range(3):
                net(self.images(self.batch, seed=self.seed + 1 + batch))
        return net.eval()

    @cached_property
    def x(self) -> Tensor:
        return self.images(self.batch, seed=self.seed)

    def images(self, batch: int, seed: int = 0, side: int | None = None) -> Tensor:
        side = side or self.side
        return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @property
    def name(self) -> str:
        """Such as "ResNet-110, width 16, batch 64 × 32²"."""
        return f"ResNet-{self.depth}, width {self.width}, batch {self.batch} × {self.side}²"


def ways(subject: Subject, streams: int | None) -> list[Way]:
    """Naive, by forking from the running baseline, and that on a copy made for speed, in float32 and in bfloat16.

    Args:
        streams: lesioned networks stacked in the batch; by default what ``lesion.single`` chooses.
    """
    stacked = default_streams(subject.x) if streams is None else streams
    net = subject.net
    x, one = subject.x, subject.x[:1]
    found = [
        Way(NAIVE, lambda: by_forward_passes(net, x), _about(subject, net, lambda: by_forward_passes(net, one), 1))
    ]
    for name, view, precision in (
        (FORKED, dynamics(net), "float32"),
        (f"{FORKED}, {FAST}", inference(net), "float32"),
        (f"{FORKED}, {FAST}, bf16", inference(net, dtype=torch.bfloat16), "bf16"),
    ):
        about = _about(subject, view.model, lambda view=view: by_forks(view, one, 1), stacked, precision)
        found.append(Way(name, lambda view=view: by_forks(view, x, stacked), about))
    return found


def _about(
    subject: Subject, model: nn.Module, on_one: Callable[[], Tensor], streams: int, precision: str = "float32"
) -> dict[str, Any]:
    """What a row says of a way; the evaluations of a block are counted ``on_one`` image."""
    with counted(model) as count:
        on_one()
    return {
        "arithmetic": arithmetic(subject.device, precision),
        "precision": precision,
        "evaluations": count(),
        "streams": streams,
    }


def by_forward_passes(net: Net, x: Tensor) -> Tensor:
    """Logits of the net without each of its identity blocks, and then of all of it: (deletions + 1, B, classes)."""
    found = []
    with evaluating(net):
        for stage, place in identity_blocks(net):
            block = stage[place]
            stage[place] = nn.Sequential(block.shortcut, block.post)
            found.append(net(x))
            stage[place] = block
        found.append(net(x))
    return torch.stack(found)


def identity_blocks(net: Net) -> list[tuple[nn.Sequential, int]]:
    """Stage and place of each block whose shortcut is the identity."""
    return [
        (stage, place)
        for stage in net.stages
        for place, block in enumerate(stage)
        if isinstance(block, ResidualBlock) and isinstance(block.shortcut, nn.Identity)
    ]


def by_forks(view: ResidualDynamics, x: Tensor, streams: int, deletions: int | None = None) -> Tensor:
    """The same from a view, each forking from the running baseline.

    Args:
        deletions: make only so many, spread over the depth.
    """
    places = [i for i, step in enumerate(view.steps) if step.shapes[0] == step.shapes[1]]
    if deletions is not None:
        places = places[:: -(-len(places) // deletions)]
    networks = [delete(i)(view).steps for i in places]
    found: list[Tensor | None] = [None] * (len(networks) + 1)
    with view.evaluation():
        for index, logits in answers(view, networks, x, streams):
            found[-1 if index is None else index] = logits
    return torch.stack(found)


@contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the evaluations of all branches in ``model``."""
    with ExitStack() as stack:
        counts = [stack.enter_context(evaluations(b)) for b in model.modules() if isinstance(b, Branch)]
        yield lambda: sum(count[0] for count in counts)


def largest_distance(found: Tensor, reference: Tensor) -> float:
    """Over the networks, the largest ‖found − reference‖/‖reference‖ of their logits."""
    off = (found.double() - reference.double()).flatten(1).norm(dim=1)
    return float((off / reference.double().flatten(1).norm(dim=1)).max())


def peak(subject: Subject, deletions: int | None, streams: int) -> float:
    """By how many MiB so many deletions lift the peak of what this process holds: to be asked of a fresh process."""
    view = inference(subject.net)
    # What is set up at the first use of anything shall not count: a pass on tiny images.
    by_forks(view, subject.images(2, side=8), streams, deletions=1)
    x = subject.x
    wait(subject.device)
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        by_forks(view, x, streams, deletions)
        return (torch.cuda.max_memory_allocated(x.device) - before) / MIB
    before = start_peak()
    by_forks(view, x, streams, deletions)
    return (peak_rss() - before) / MIB
