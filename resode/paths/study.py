"""Many changed networks measured on one data set, in one pass through it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from operator import length_hint
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from resode.dynamics import ResidualDynamics
from resode.errors import InvalidInput, choose
from resode.paths import streams
from resode.paths.places import require_view
from resode.paths.progress import Progress, fingerprint
from resode.paths.scores import Score, Tallies
from resode.paths.table import Lesion, LesionTable

Data = Iterable[tuple[Tensor, Tensor]]


class How(TypedDict, total=False):
    """How an analysis is made.

    Args:
        by_class: measure the error of each class, too.
        streams: how many lesioned networks run at once, stacked in the batch; by default 1 on a CPU, and on a GPU as
            many as fill it. The results differ by rounding alone.
        progress: show a progress bar (on a terminal).
        resume: a file for the sums so far.
    """

    by_class: bool
    streams: int | None
    progress: bool
    resume: str | Path | None


class Study:
    """A network, and data to measure it and changes of it on.

    Args:
        view: the network.
        data: pairs (x, labels), gone through once.
        how: see :class:`How`.

    ``view`` is then one whose steps know the shapes that they meet: if they did not, the first batch told.

    Raises:
        InvalidInput: for anything but a view, an unknown setting, or when the data are empty or no such pairs.
    """

    def __init__(self, view: ResidualDynamics, data: Data, how: How) -> None:
        require_view(view, "a lesion")
        for name in how:
            choose(name, How.__annotations__, "setting of an analysis")
        width, resume = how.get("streams"), how.get("resume")
        if width is not None and width < 1:
            raise InvalidInput(f"streams is {width}: at least 1 is needed")
        if resume is not None and view.model is None:
            raise InvalidInput(
                f"resume={str(resume)!r}: a view without its model cannot be told from another; make it by "
                "resode.dynamics(model, read=…), or as ResidualDynamics(stem, steps, head, model)"
            )
        self.width, self.resume = width, None if resume is None else Path(resume)
        self.by_class, self.shown = how.get("by_class", False), how.get("progress", False)
        self.batches = length_hint(data, 0) or None
        rest = iter(data)
        first = next(rest, None)
        if first is None:
            raise InvalidInput("lesions need data to measure the error on, and there is none")
        require_pair(first)
        self.data: Data = chain([first], rest)
        known = all(step.shapes is not None for step in view.steps)
        self.view = view if known else view.measured(first[0])

    def table(
        self, analysis: str, lesions: Sequence[Lesion], networks: Sequence[ResidualDynamics | None]
    ) -> LesionTable:
        """What was found of each of the ``lesions``, whose ``networks`` are None where they cannot be made."""
        made = {i: network.steps for i, network in enumerate(networks) if network is not None}
        *found, baseline = self._scores(list(made.values()), [analysis, [lesion.label for lesion in lesions]])
        scores = dict(zip(made, found, strict=True))
        return LesionTable(
            analysis, baseline, tuple(replace(one, score=scores.get(i)) for i, one in enumerate(lesions))
        )

    def _scores(self, networks: Sequence[streams.Steps], question: Any) -> list[Score]:
        """The score of each of ``networks``, and last that of the view itself."""
        count = len(networks) + 1
        kept = Progress(self.resume, "" if self.resume is None else fingerprint(self.view, networks, question))
        tallies = Tallies(count, self.by_class)
        bar = tqdm(
            total=None if self.batches is None else self.batches * count,
            initial=kept.done * count,
            desc=f"lesions ({question[0]})",
            unit="net",
            leave=False,
            disable=None if self.shown else True,
        )
        with self.view.evaluation(), bar:
            for x, labels in kept.resume(self.data, tallies):
                answers = streams.answers(self.view, networks, x, self.width or streams.default_streams(x))
                for i, (network, logits) in enumerate(answers):
                    if i == 0:
                        tallies.begin(labels, logits.shape[1])
                    tallies.add(count - 1 if network is None else network, logits, labels)
                    bar.update()
        kept.finish()
        return tallies.scores()


def require_pair(batch: object) -> None:
    """Refuse what is no batch of images or points and the classes of each.

    Raises:
        InvalidInput: with what it is.
    """
    match batch:
        case (Tensor() as x, Tensor() as labels) if labels.ndim == 1 and len(x) == len(labels):
            if labels.dtype is not torch.int64:
                raise InvalidInput(f"labels are of {labels.dtype}: classes as torch.int64 are expected; use y.long()")
            return
    raise InvalidInput(
        f"a batch of the data is {_said(batch)}: a pair (x, labels) of tensors is expected, x of the shape that the "
        "network takes and labels of shape (B,)"
    )


def _said(batch: object) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(_said(part) for part in batch)})"
    return f"a {type(batch).__name__}"
