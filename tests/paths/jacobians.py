"""The parts of a gradient the plain way: dense Jacobians, multiplied along every path by itself."""

from itertools import pairwise, product

import torch
from torch.autograd.functional import jacobian

from resode import evaluate


def dense(map, h):
    """The Jacobian of ``map`` at ``h``, (outputs, inputs), over the whole batch."""
    with torch.enable_grad():
        found = jacobian(map, h)
    return found.reshape(map(h).numel(), h.numel())


def ways(step, h):
    """The ways through ``step`` at the state ``h``: pairs of a length and a matrix."""
    if step.kind == "transition":
        return [(0, dense(step, h))]
    if step.kind == "plain":
        return [(0, torch.eye(h.numel(), dtype=h.dtype))] if step.branch is None else [(1, dense(step, h))]
    round_it = dense(step.shortcut, h)
    if step.branch is None:
        return [(0, dense(step.post, step.shortcut(h)) @ round_it)]
    after = dense(step.post, step.shortcut(h) + step.scale * evaluate(step.branch, step.t, h))
    through = dense(lambda h: step.scale * evaluate(step.branch, step.t, h), h)
    return [(0, after @ round_it), (1, after @ through)]


def solver_ways(field, tableau, t, end, h):
    """The ways through one step of a Runge–Kutta method, told apart by the chains of stages."""
    step, stages = end - t, len(tableau.b)
    slopes, jacobians = [], []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        y = h + sum((step * a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(h))
        slopes.append(evaluate(field, t + c * step, y))
        jacobians.append(step * dense(lambda y, c=c: evaluate(field, t + c * step, y), y))
    found = [(0, torch.eye(h.numel(), dtype=h.dtype))]
    for taken in product((False, True), repeat=stages):
        chain = [i for i in range(stages) if taken[i]]
        if not chain:
            continue
        matrix = jacobians[chain[0]]
        for before, after in pairwise(chain):
            matrix = tableau.a[after][before] * jacobians[after] @ matrix
        found.append((len(chain), tableau.b[chain[-1]] * matrix))
    return found


def sums_over_paths(ways_of_steps, v):
    """{length: the sum over all paths of that length of v pulled back along the path}, path by path."""
    found = {}
    for path in product(*ways_of_steps):
        length, pulled = 0, v
        for more, matrix in reversed(path):
            length, pulled = length + more, pulled @ matrix
        found[length] = found.get(length, 0) + pulled
    return found
