"""Each optimizer makes the steps of its paper, with weight decay in the loss (sgd, adam) or apart (sgdw, adamw)."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from resode import InvalidInput, NetConfig, Stack, build
from resode.limits import refine_
from resode.train.optimizers import OPTIMIZERS, SGDW, begin_at_rest, make_optimizer
from resode.train.penalties import decaying, parameter_groups

RATES = (0.05, 0.05, 0.02, 0.1)
DECAY = 0.3
WITH_MOMENTUM = {"momentum": 0.8}


def net_of(kind="resnet"):
    config = NetConfig(net=kind, depth=14, width=3, channels=1, size=(6, 6), steps=2, stack=Stack(norm="group"))
    return build(config, seed=0).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in RATES:
        x = torch.randn(6, 1, 6, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(10, (6,), generator=generator)


def train(model, optimizer, more=lambda model: 0.0):
    """Steps at ``RATES``, on the cross-entropy and ``more``."""
    for (x, labels), lr in zip(batches(), RATES, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        (F.cross_entropy(model(x), labels) + more(model)).backward()
        optimizer.step()
    return model


def assert_same(one, other, rtol=1e-10, atol=1e-13):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda said, name=name: f"{name}: {said}")


def by_hand(name, model, weight_decay):
    """A function that makes the steps of ``name`` by the papers' formulas, one parameter at a time."""
    weights, memory, count = set(decaying(model).values()), {}, [0]

    def step(lr):
        count[0] += 1
        for p in model.parameters():
            g, lam = p.grad, weight_decay if p in weights else 0.0
            if name in ("sgd", "adam"):
                g = g + lam * p.detach()
            apart = lr * lam * p.detach() if name in ("sgdw", "adamw") else 0.0
            if name in ("sgd", "sgdw"):
                memory[p] = WITH_MOMENTUM["momentum"] * memory.get(p, 0.0) + g
                change = memory[p]
            else:
                m, v = memory.get(p, (0.0, 0.0))
                memory[p] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                change = m / (1 - 0.9 ** count[0]) / ((v / (1 - 0.999 ** count[0])).sqrt() + 1e-8)
            p.data = p.data - lr * change - apart

    return step


# --- the steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet", "odenet"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_those_of_the_paper(name, kind):
    model = net_of(kind)
    other = copy.deepcopy(model)
    optimizer = make_optimizer(model, name, lr=1.0, weight_decay=DECAY, **WITH_MOMENTUM)
    step = by_hand(name, other, DECAY)
    train(model, optimizer)
    for (x, labels), lr in zip(batches(), RATES, strict=True):
        other.zero_grad()
        F.cross_entropy(other(x), labels).backward()
        step(lr)
    assert_same(model, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["resnet", "odenet"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_decay_of_sgd_and_adam_is_half_the_squared_norm_in_the_loss(name, kind):
    def half_square(model):
        return 0.5 * DECAY * sum(weight.square().sum() for weight in decaying(model).values())

    model = net_of(kind)
    other = copy.deepcopy(model)
    train(model, make_optimizer(model, name, lr=1.0, weight_decay=DECAY))
    train(other, make_optimizer(other, name, lr=1.0, weight_decay=0.0), half_square)
    assert_same(model, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "apart"), [("sgd", "sgdw"), ("adam", "adamw")])
def test_decay_apart_is_another_step_and_the_same_without_decay(name, apart):
    def trained(name, decay):
        model = net_of()
        return train(model, make_optimizer(model, name, lr=1.0, weight_decay=decay))

    assert_same(trained(name, 0.0), trained(apart, 0.0), rtol=0.0, atol=0.0)
    one, other = (nn.utils.parameters_to_vector(trained(n, DECAY).parameters()) for n in (name, apart))
    assert float((one - other).detach().norm() / one.detach().norm()) > 1e-3


def test_sgdw_is_algorithm_1_with_the_rate_in_the_momentum_while_the_rate_stays():
    """Loshchilov & Hutter 2019, lines 6 to 9, with α η = lr and η λ' = lr λ."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    theta, m = w.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    optimizer = SGDW([w], lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(5):
        w.grad = torch.randn_like(w)
        optimizer.step()
        m = 0.9 * m + 0.1 * w.grad
        theta = theta - m - 0.1 * 0.2 * theta
    torch.testing.assert_close(w.detach(), theta, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "sgdw"])
def test_nesterovs_momentum_looks_a_step_ahead(name):
    w = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    model = nn.ParameterList([w])
    optimizer = make_optimizer(model, name, lr=0.1, weight_decay=0.0, momentum=0.5, nesterov=True)
    for g in (1.0, 2.0):
        w.grad = torch.full_like(w, g)
        optimizer.step()
    # m = 1, then 2.5; each step is g + ½ m.
    assert float(w.detach()) == pytest.approx(1.0 - 0.1 * (1.0 + 0.5) - 0.1 * (2.0 + 1.25), abs=1e-15)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, WITH_MOMENTUM),
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
    ],
)
def test_on_the_cpu_the_steps_are_those_of_torchs_optimizer_bit_by_bit(name, kind, options):
    model = net_of().float()
    other = copy.deepcopy(model)
    ours = make_optimizer(model, name, lr=1.0, weight_decay=DECAY, **WITH_MOMENTUM)
    torchs = kind(parameter_groups(other, DECAY), lr=1.0, **options)
    for step in range(3):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        for optimizer in (ours, torchs):
            optimizer.step()
    assert_same(model, other, rtol=0.0, atol=0.0)


# --- what decays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_the_gradient_is_zero_weights_shrink_and_biases_and_norms_stay(name):
    model = net_of()
    optimizer = make_optimizer(model, name, lr=0.1, weight_decay=DECAY)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    weights = decaying(model)
    for n, p in model.named_parameters():
        if n not in weights:
            assert torch.equal(p.detach(), before[n]), n
        elif name == "adam":  # the first of its steps has one size, whatever the gradient's
            g = DECAY * before[n]
            torch.testing.assert_close(p.detach(), before[n] - 0.1 * g / (g.abs() + 1e-8), rtol=1e-10, atol=1e-13)
        else:
            torch.testing.assert_close(p.detach(), (1 - 0.1 * DECAY) * before[n], rtol=1e-14, atol=0.0)


def test_sgdw_leaves_what_has_no_gradient_alone():
    used, unused = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = SGDW([used, unused], lr=0.1, weight_decay=1.0, momentum=0.9)
    used.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(used.detach(), torch.full((2, 2), 0.9))
    assert torch.equal(unused.detach(), torch.ones(2, 2))
    assert unused not in optimizer.state


# --- an optimizer like any other -------------------------------------------------------------------------------------


def test_sgdw_calls_hooks_once_a_step_and_evaluates_a_closure_before_the_decay():
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # torch wraps the steps of a class at its first use
    w, calls, seen = nn.Parameter(torch.ones(2, 2)), [], []
    optimizer = SGDW([w], lr=0.1, weight_decay=1.0)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = (3.0 * w).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 12.0
    assert calls == ["before", "after"]
    assert torch.equal(seen[0], torch.ones(2, 2))
    torch.testing.assert_close(w.detach(), torch.full((2, 2), 0.9 - 0.3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_was_saved_goes_on_to_the_same_numbers(name):
    model = net_of()
    optimizer = make_optimizer(model, name, lr=1.0, weight_decay=DECAY)
    train(model, optimizer)
    resumed = copy.deepcopy(model)
    other = make_optimizer(resumed, name, lr=1.0, weight_decay=DECAY)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it is not a copy
    assert_same(train(model, optimizer), train(resumed, other), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", ["resnet", "odenet"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_refining_a_net_carries_the_state(name, kind):
    """Of SGDW as of SGD: the momentum of each of the two copies of a block is half of the block's."""
    model = net_of(kind)
    optimizer = make_optimizer(model, name, lr=1.0, weight_decay=DECAY)
    train(model, optimizer)
    before = {p: dict(optimizer.state[p]) for p in model.parameters()}
    held = len(before)
    refine_(model, 2, optimizer)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    assert set(optimizer.state) == set(model.parameters())
    assert len(optimizer.state) > held if kind == "resnet" else len(optimizer.state) == held
    key, power = ("momentum_buffer", 1) if name.startswith("sgd") else ("exp_avg_sq", 2)
    scales = set()
    for p, old in before.items():
        if p in optimizer.state and old[key].any():
            scales.add(round(float(optimizer.state[p][key].norm() / old[key].norm()), 9))
    assert scales == ({1.0, 0.5**power} if kind == "resnet" else {1.0})
    train(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_cuda_a_fused_step_agrees_with_the_cpu(name):
    model = net_of()
    other = copy.deepcopy(model).cuda()
    ours, cudas = (make_optimizer(net, name, lr=0.1, weight_decay=DECAY) for net in (model, other))
    assert all(bool(group["fused"]) == (name != "sgdw") for group in cudas.param_groups)
    for step in range(3):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)
            q.grad = p.grad.cuda()
        ours.step()
        cudas.step()
    assert_same(model, other.cpu(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_fused_first_step_that_overflows_leaves_no_trace(nesterov):
    """The fused kernels of the CPU and of CUDA are told of an overflow alike."""
    models = [nn.Linear(64, 64).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": DECAY}
    never, fused = SGD(models[0].parameters(), **settings), SGD(models[1].parameters(), **settings, fused=True)
    begin_at_rest(fused)
    fused.grad_scale, fused.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    for p in models[1].parameters():
        p.grad = torch.full_like(p, math.inf)
    fused.step()
    fused.found_inf = torch.tensor(0.0)
    for step in range(3):
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)
            q.grad = p.grad.clone()
        never.step()
        fused.step()
    assert_same(*models, rtol=1e-12, atol=1e-12)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("lion", {}, "unknown optimizer 'lion': choose from sgd, sgdw, adam, adamw"),
        ("sgd", {"lr": 0.0}, "lr is 0.0"),
        ("sgd", {"lr": math.inf}, "lr is inf"),
        ("sgdw", {"weight_decay": -0.1}, "weight_decay is -0.1"),
        ("adam", {"weight_decay": math.nan}, "weight_decay is nan"),
        ("sgd", {"momentum": 1.0}, "momentum is 1.0"),
        ("adamw", {"nesterov": True}, "nesterov is a form of sgd's momentum"),
        ("sgdw", {"nesterov": True, "momentum": 0.0}, "nesterov is a form of sgd's momentum"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings, said):
    with pytest.raises(InvalidInput, match=said):
        make_optimizer(nn.Linear(2, 2), name, **{"lr": 0.1, "weight_decay": 0.0, **settings})


def test_a_frozen_model_is_refused():
    with pytest.raises(InvalidInput, match="nothing to train"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), "sgd", lr=0.1, weight_decay=0.0)
