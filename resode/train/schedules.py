"""The learning rate of each step of a training, as a function of the step alone, so that any training can be resumed.

With w steps of warm-up of N in all, and s' = (step − w)/(N − w) the share of what follows it:

========= ============================================ =========================================================
schedule  in the warm-up; after it, times lr           source
========= ============================================ =========================================================
constant  (step + 1)/w; 1                              Goyal et al. 2017, arXiv 1706.02677 (the warm-up)
step      (step + 1)/w; γ^k after k milestones         He et al. 2016, arXiv 1512.03385, section 4.2
cosine    (step + 1)/w; (1 + cos πs')/2                Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5
linear    (step + 1)/w; 1 − s'                         as in the speed-runs of CIFAR-10 (Jordan 2024, arXiv 2404.00498)
one-cycle cosine from 1/25 to 1; cosine to 1/250,000   Smith & Topin 2018, arXiv 1708.07120, as in torch's OneCycleLR
========= ============================================ =========================================================

cosine and linear end at the share ``final`` of lr in place of 0: final + (1 − final)·(…).
"""

import math

SCHEDULES = ("cosine", "linear", "step", "constant", "one-cycle")
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 250_000
"""Where the one-cycle schedule begins and ends, in units of lr: the defaults of torch."""


def relative_rate(
    schedule: str,
    step: int,
    total: int,
    warm: int = 0,
    *,
    milestones: tuple[float, ...] = (),
    gamma: float = 0.1,
    final: float = 0.0,
) -> float:
    """The learning rate of ``step`` (from 0) of ``total``, in units of its peak.

    Args:
        schedule: cosine, linear, step, constant or one-cycle.
        warm: steps of warm-up.
        milestones, gamma: of the step schedule, milestones as shares of the training.
        final: of cosine and linear, where they end.
    """
    if schedule == "one-cycle":
        return _one_cycle(step, total, warm)
    if step < warm:
        return (step + 1) / warm
    if schedule == "step":
        return gamma ** sum(step / total >= m for m in milestones)
    share = (step - warm) / max(1, total - warm)
    if schedule == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))
    if schedule == "linear":
        return final + (1.0 - final) * (1.0 - share)
    return 1.0


def _one_cycle(step: int, total: int, warm: int) -> float:
    """Both phases include their ends, as torch's do: the peak is step ``warm`` − 1, and the end the last step."""
    peak = float(warm - 1)
    if step <= peak:
        return _cosine(ONE_CYCLE_START, 1.0, step / peak if peak else 1.0)
    return _cosine(1.0, ONE_CYCLE_END, (step - peak) / max(1.0, total - 1 - peak))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))
