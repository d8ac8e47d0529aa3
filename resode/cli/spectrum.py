"""``resode spectrum``."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor

from resode import plots
from resode.cli.common import Flat
from resode.cli.subject import Subject
from resode.paths import lengths, spectrum
from resode.paths.singles import check_samples
from resode.report import png

SAMPLES = 64
"""Of the data, by default: the spectrum of a gradient is much the same for any."""


@dataclass(frozen=True)
class Spectrum:
    """Sort the gradient of a network by the length of its paths: exactly, and as Veit et al. 2016 sample it.

    Example: resode spectrum torchvision:resnet50 --weights DEFAULT --data imagefolder:PATH --limit 16

    Args:
        max_length: tell no longer paths apart.
        grade: what the length of a path counts within a solver's step: the step, or each evaluation of f.
        paths: single paths sampled for each length; 0 for none.
        by_step: also the spectra of the gradients in the states before each step.
        share: of the gradient's magnitude, which the effective lengths carry.
        seed: of the sampled paths.

    The gradient is that of the loss summed over the samples (64 if --limit does not say otherwise), in their inputs.
    """

    subject: Annotated[Subject, Flat]
    max_length: int | None = None
    grade: Literal["step", "evaluation"] = "step"
    paths: int = 16
    by_step: bool = False
    share: float = 0.95
    seed: int = 0

    def run(self) -> None:
        # What follows the exact spectrum, which takes longest, is refused before it.
        lengths.check_share(self.share)
        if self.paths != 0:
            check_samples(self.paths)
        count = SAMPLES if self.subject.limit is None else self.subject.limit
        with replace(self.subject, limit=count, batch_size=max(count, 1)).open(exact=True) as look:
            x, labels = next(iter(look.batches))

            def loss(logits: Tensor) -> Tensor:
                return F.cross_entropy(logits.float(), labels, reduction="sum")

            found = self._found(look.view, x, loss)
            _say(found)
            name = self.subject.result("spectrum")
            print("Result:", look.run.save_result(name, found))
            print("Figure:", look.run.write(f"figures/{name}.png", png(plots.spectrum({look.name: found}))))
            if self.by_step:
                rows = spectrum.by_step(look.view, x, loss, self.max_length, self.grade).to_dict()
                name = self.subject.result("spectrum-by-step")
                print("Result:", look.run.save_result(name, rows))
                print("Figure:", look.run.write(f"figures/{name}.png", png(plots.spectra_by_step(rows))))

    def _found(self, view: Any, x: Tensor, loss: spectrum.Loss) -> dict[str, Any]:
        exact = spectrum.gradient(view, x, loss, self.max_length, self.grade)
        found: dict[str, Any] = {"exact": exact.to_dict()}
        if self.paths and self.grade == "step":
            sampled = spectrum.sampled(view, x, loss, self.paths, self.seed)
            found["sampled"] = sampled.to_dict()
            found["effective"] = lengths.effective(sampled.totals, sampled.counts, self.share).to_dict()
        return found


def _say(found: dict[str, Any]) -> None:
    exact, sampled = found["exact"], found.get("sampled")
    total = sum(exact["counts"])
    print("length    of all paths   norm of their sum   share of the gradient" + ("   norms summed" if sampled else ""))
    for k, (norm, share) in enumerate(zip(exact["norms"], exact["shares"], strict=True)):
        more = f"   {sampled['totals'][k]:12.4g}" if sampled else ""
        print(f"{k:6d}    {exact['counts'][k] / total:12.4%}   {norm:17.4g}   {share:21.2%}{more}")
    if "effective" in found:
        run = found["effective"]
        print(
            f"paths of {run['first']} to {run['last']} steps, {run['paths']:.2%} of all, carry {run['share']:.1%} of "
            "the summed norms of single paths"
        )
    print(f"norm of the gradient: {exact['norm']:.4g} (mean over {exact['samples']} samples)")
