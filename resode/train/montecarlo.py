"""Monte Carlo dropout: dropout left on, a net is a sample of nets, whose disagreement tells what the net does not know.

With masks m_1 … m_T and p_t = softmax(z(x; m_t)), over the T samples

* the predictive mean is p̄ = (1/T) Σ_t p_t, and the predictive variance (1/T) Σ_t (p_t − p̄)² for each class (Gal &
  Ghahramani 2016, arXiv 1506.02142, eqs. 6 and 7);
* the predictive entropy is H[p̄] = −Σ_k p̄_k log p̄_k, in nats: all that is not known of the answer;
* the expected entropy is (1/T) Σ_t H[p_t]: what no sampled net knows, since the data do not tell (aleatoric);
* the mutual information of answer and masks is I = H[p̄] − (1/T) Σ_t H[p_t] ≥ 0: what the nets disagree in, and more
  data would tell (epistemic; BALD, Houlsby et al. 2011, arXiv 1112.5745, eq. 2).

The deterministic net, with dropout off, stands beside them. Where z is linear in the masks its logits are the means of
the z(x; m_t); its probabilities are not p̄.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resode.blocks.ode import solver_settings
from resode.data.dataset import check_whole
from resode.errors import InvalidInput
from resode.nets.net import evaluating
from resode.seeding import seeded
from resode.train.calibration import expected_calibration_error
from resode.train.dropout_epochs import built_with_dropout, drop_rates


@dataclass(frozen=True, eq=False)
class Prediction:
    """What T nets, ``model`` under as many masks, say of a batch.

    Args:
        logits: z(x; m_t), (T, B, K).
    """

    logits: Tensor

    @property
    def log_probabilities(self) -> Tensor:
        """log p_t, (T, B, K), float64."""
        return self.logits.double().log_softmax(-1)

    @property
    def log_mean(self) -> Tensor:
        """log p̄, (B, K): it is finite where p̄ is too small for a number."""
        each = self.log_probabilities
        return each.logsumexp(0) - torch.tensor(float(len(each)), dtype=each.dtype).log().to(each.device)

    @property
    def mean(self) -> Tensor:
        """The predictive mean p̄, (B, K)."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """The predictive variance of each class's probability, (B, K)."""
        return self.log_probabilities.exp().var(0, correction=0)

    @property
    def entropy(self) -> Tensor:
        """The predictive entropy H[p̄], (B,)."""
        return _entropy(self.log_mean)

    @property
    def expected_entropy(self) -> Tensor:
        """The mean of H[p_t], (B,)."""
        return _entropy(self.log_probabilities).mean(0)

    @property
    def mutual_information(self) -> Tensor:
        """H[p̄] less the mean of H[p_t], (B,); 0 where rounding would make it negative."""
        return (self.entropy - self.expected_entropy).clamp_min(0.0)


def _entropy(log_probabilities: Tensor) -> Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


@dataclass(frozen=True)
class Scores:
    """Accuracy, mean negative log-likelihood (nats) and expected calibration error on ``count`` samples."""

    accuracy: float
    loss: float
    calibration_error: float
    count: int


@dataclass(frozen=True, eq=False)
class MonteCarlo:
    """Monte Carlo dropout on N samples of data, in their order, on the CPU.

    Args:
        samples: T, the number of masks.
        mean: p̄, (N, K).
        variance: the predictive variance summed over the classes, (N,).
        entropy, expected_entropy: (N,), in nats; their difference is ``mutual_information``.
        of_mean: the scores of p̄.
        deterministic: those of the net without dropout.
    """

    samples: int
    mean: Tensor
    variance: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    of_mean: Scores
    deterministic: Scores

    @property
    def mutual_information(self) -> Tensor:
        """What the answer and the masks tell of each other, (N,)."""
        return (self.entropy - self.expected_entropy).clamp_min(0.0)

    def to_dict(self) -> dict[str, Any]:
        """The scores and the means over the data as plain values, for JSON."""
        names = ("variance", "entropy", "expected_entropy", "mutual_information")
        means = {name: float(getattr(self, name).mean()) for name in names}
        scores = asdict(self.of_mean)
        return {"samples": self.samples, **scores, **means, "deterministic": asdict(self.deterministic)}


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """``model`` with its dropout layers active and all else (batch norm, random ends of solves) in evaluation mode.

    Each forward pass draws masks, in an ODE block one for the whole solve (or for each of its mask intervals). There
    are no gradients. The mode of each module is restored afterwards.

    Raises:
        InvalidInput: for a net without dropout.
    """
    active = _active(model)
    with evaluating(model), solver_settings(model, compile_mode=None), _without_fast_paths():
        for layer in active:
            layer.training = True
        yield


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """torch's transformer layers call the layers that they hold, dropout among them, in evaluation too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def check_samples(model: nn.Module, samples: int) -> None:
    """Raise InvalidInput unless ``model`` has dropout to draw masks for, and ``samples`` is a whole number above 0."""
    check_whole(samples, "samples of Monte Carlo dropout")
    _active(model)


def _active(model: nn.Module) -> list[nn.Module]:
    """The dropout layers of ``model`` that drop anything."""
    active = [layer for layer, _, p in drop_rates(model) if p > 0.0]
    if not active:
        ended = built_with_dropout(model)
        raise InvalidInput(
            "Monte Carlo dropout needs a net that was trained with dropout, and "
            + ("the dropout of this one ended at p = 0 in training (early dropout)" if ended else "this one has none")
            + ": train with --dropout.p 0.1, for one, or --input-dropout 0.1"
        )
    return active


def predict(model: nn.Module, x: Tensor, samples: int = 50, *, generator: torch.Generator | None = None) -> Prediction:
    """What ``model`` says of ``x`` (B, …) under ``samples`` draws of its dropout masks.

    Args:
        generator: on the CPU; the masks are drawn from a seed drawn from it, on the device of ``x``. Without one they
            are the same at each call. The global random state is left as it was.

    Raises:
        InvalidInput: for a net without dropout, or a number of samples that is not a whole one above 0.
    """
    check_whole(samples, "samples of Monte Carlo dropout")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**62, (), generator=generator))
    with sampling(model), seeded(seed, x.device):
        return Prediction(torch.stack([model(x) for _ in range(samples)]))


def monte_carlo(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], samples: int = 50, seed: int = 0
) -> MonteCarlo:
    """Monte Carlo dropout of ``model`` on pairs (x, labels), beside the net without dropout.

    Raises:
        InvalidInput: as :func:`predict`, and when there is no data.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[Tensor, ...]] = []
    for x, labels in data:
        found = predict(model, x, samples, generator=generator)
        with evaluating(model), solver_settings(model, compile_mode=None):
            plain = model(x).double().log_softmax(-1)
        of_masks = (found.log_mean, found.variance.sum(-1), found.entropy, found.expected_entropy)
        parts.append(tuple(part.cpu() for part in (*of_masks, plain, labels)))
    if not parts:
        raise InvalidInput("nothing to evaluate on: the split is empty")
    log_mean, variance, entropy, expected, plain, labels = map(torch.cat, zip(*parts, strict=True))
    return MonteCarlo(
        samples, log_mean.exp(), variance, entropy, expected, scores(log_mean, labels), scores(plain, labels)
    )


def scores(log_probabilities: Tensor, labels: Tensor) -> Scores:
    """The scores of answers (N, K), the logarithms of probabilities, to questions with ``labels`` (N,)."""
    right = (log_probabilities.argmax(1) == labels).double().mean()
    loss = -log_probabilities.gather(1, labels.unsqueeze(1)).mean()
    error = expected_calibration_error(log_probabilities.exp(), labels)
    return Scores(float(right), float(loss), error, len(labels))
