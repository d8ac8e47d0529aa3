"""Weights as products of factors: the same net, the lasso's minimum, right in every gradient mode; and pruning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resode
from resode import Dropout, InvalidInput, NetConfig, Stack, build
from resode.blocks import GRADIENTS, Branch, ODEBlock
from resode.blocks.ode import solver_settings
from resode.dynamics.inference import inference
from resode.layers import SolveContext
from resode.layers.factors import Factors, factorized, factors_of
from resode.limits import coarsen, discretize, lift, refine, regularity
from resode.train.metrics import evaluate
from resode.train.optimizers import make_optimizer
from resode.train.penalties import Penalties, decaying, filters, parameter_groups, penalty
from resode.train.sparsity import SHARES, factorize, multiply_out, prune_to_sparse

NETS = {
    "lenet5": {"size": (16, 16)},
    "resnet": {},
    "resnet, tied": {"tied": True, "time": "concat"},
    "resnet, standardized": {"stack": Stack(norm="group", conv="weight-standardized")},
    "odenet": {},
    "odenet, film": {"time": "film", "stack": Stack(norm="layer")},
    "odenet, constant": {"time": "constant"},
    "odenet, linear": {"time": "linear"},
    "odenet, fourier": {"time": "fourier"},
}
every_net = pytest.mark.parametrize("name", NETS)
TIMES = ("none", "concat", "film", "constant", "linear", "fourier")


def net_of(name, **settings):
    defaults = {"depth": 14, "width": 3, "size": (6, 6), "channels": 1, "steps": 2, "stack": Stack(norm="group")}
    return build(NetConfig(net=name.split(",")[0], **{**defaults, **NETS[name], **settings}), seed=0).double()


def images(model, n=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *model.input_shape, generator=generator, dtype=torch.float64)


def factored(model):
    """A copy of ``model`` with factors."""
    model = copy.deepcopy(model)
    factorize(model)
    return model


def close(one, other, tol=1e-12):
    torch.testing.assert_close(one.detach(), other.detach(), rtol=tol, atol=tol)


# --- the same net ----------------------------------------------------------------------------------------------------


@every_net
def test_a_factorized_net_is_the_same_function(name):
    plain = net_of(name)
    model = factored(plain)
    x = images(plain)
    close(model(x), plain(x))
    assert len(factorized(model)) == len(decaying(plain)) > 0
    for layer, own in factorized(model):
        a, b = (factor.detach() for factor in factors_of(layer, own))
        w = a * b
        torch.testing.assert_close(b.square() - a.square(), w.abs()[w != 0.0].mean().expand_as(w), rtol=1e-10, atol=0.0)


@every_net
def test_both_factors_decay_and_nothing_that_did_not_before(name):
    plain = net_of(name)
    model = factored(plain)
    before, after = parameter_groups(plain, 0.1), parameter_groups(model, 0.1)
    both = {factor for place in factorized(model) for factor in factors_of(*place)}
    assert set(after[0]["params"]) == both
    assert len(after[0]["params"]) == 2 * len(before[0]["params"])
    assert [p.shape for p in after[1]["params"]] == [p.shape for p in before[1]["params"]]


@every_net
def test_multiplied_out_it_is_the_net_again(name):
    plain = net_of(name)
    model = factored(plain)
    multiply_out(model)
    assert not factorized(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()], "in their order, too"
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf
        torch.testing.assert_close(p, q, rtol=1e-15, atol=0.0, msg=lambda said, n=n: f"{n}: {said}")
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    multiply_out(model)  # and nothing more


def test_frozen_weights_stay_plain_and_frozen_factors_become_a_frozen_weight():
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    factorize(model)
    assert factorized(model) == [(model[1], "weight")]
    model.requires_grad_(False)
    multiply_out(model)
    assert isinstance(model[1].weight, nn.Parameter)
    assert not model[1].weight.requires_grad


def test_a_copy_and_what_it_was_copied_from_are_multiplied_out_one_by_one():
    """torch gives copies of a parametrized layer one class, so that taking its properties would break the other."""
    one = factored(net_of("odenet"))
    other = copy.deepcopy(one)
    x = images(one)
    expected = one(x)
    multiply_out(other)
    close(other(x), expected)
    close(one(x), expected)
    assert factorized(one)
    with torch.no_grad():
        factors_of(*factorized(one)[0])[0].mul_(2.0)
    close(other(x), expected)
    assert not torch.allclose(one(x), expected)
    multiply_out(one)
    assert not factorized(one)


@every_net
def test_states_can_be_saved_and_loaded(name):
    one, other = factored(net_of(name)), net_of(name)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    factorize(other)
    other.load_state_dict(one.state_dict())
    x = images(one)
    assert torch.equal(one(x), other(x))
    shapes = {n: p.shape for n, p in net_of(name).named_parameters()}
    for n, value in one.state_dict().items():
        whole = n.replace(".parametrizations", "").replace(".original0", "").replace(".original1", "")
        assert whole not in shapes or value.shape == shapes[whole]


def test_zeros_have_a_factor_by_which_they_can_grow():
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = 0.25
    factorize(layer)
    a, b = factors_of(layer, "weight")
    assert torch.equal(layer.weight[1:].detach(), torch.zeros(2, 4))
    torch.testing.assert_close(b[1:].detach(), torch.full((2, 4), 0.5))
    layer(torch.ones(1, 4)).sum().backward()
    assert a.grad.all()
    empty = nn.Linear(4, 3)
    nn.init.zeros_(empty.weight)
    factorize(empty)
    torch.testing.assert_close(factors_of(empty, "weight")[1].detach().square(), torch.full((3, 4), 0.5))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_weight_can_change_its_sign_as_it_could_not_with_factors_of_one_size(name):
    def trained(balanced):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, -1.0)
        factorize(layer)
        if balanced:
            with torch.no_grad():
                for factor, value in zip(factors_of(layer, "weight"), (-1.0, 1.0), strict=True):
                    factor.fill_(value)
        optimizer = make_optimizer(layer, name, lr=0.02, weight_decay=0.1)
        for _ in range(500):
            optimizer.zero_grad()
            (0.5 * (layer.weight - 1.0).square().sum()).backward()
            optimizer.step()
        return float(layer.weight.detach())

    assert trained(balanced=False) == pytest.approx(0.9, abs=1e-3)
    assert trained(balanced=True) == pytest.approx(0.0, abs=1e-3)


def test_layouts_in_memory_stay():
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    factorize(layer)
    assert layer.weight.stride() == factors_of(layer, "weight")[0].stride() == strides
    multiply_out(layer)
    assert layer.weight.stride() == strides


# --- gradients -------------------------------------------------------------------------------------------------------


def block_of(time="none", gradient="backprop", solver="rk4", drop="unit", steps=4, **stack):
    torch.manual_seed(0)
    stack = Stack(norm="group", activation="tanh", dropout=Dropout(drop, 0.2), **stack)
    branch = Branch(4, stack, time=time, knots=2 if time in ("constant", "linear", "fourier") else None)
    return ODEBlock(branch.double(), solver, steps=steps, gradient=gradient)


def gradients_of(block, seed=3):
    """The output, and the gradients of the input and of all parameters, by name."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(seed)
    out = block(x)
    named = dict(block.named_parameters())
    along = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    return out, dict(zip(("x", *named), torch.autograd.grad((out * along).sum(), (x, *named.values())), strict=True))


def by_the_product_rule(model, plain_gradients):
    """What the gradients of a factorized ``model`` must be: for a that of w times b, for b times a."""
    names = {layer: name for name, layer in model.named_modules()}
    expected = dict(plain_gradients)
    for layer, own in factorized(model):
        prefix = names[layer] + "." if names[layer] else ""
        g = expected.pop(f"{prefix}{own}")
        a, b = factors_of(layer, own)
        expected[f"{prefix}parametrizations.{own}.original0"] = g * b.detach()
        expected[f"{prefix}parametrizations.{own}.original1"] = g * a.detach()
    return expected


@pytest.mark.parametrize("conv", ["standard", "weight-standardized"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("time", TIMES)
def test_gradients_of_factors_follow_from_those_of_the_weights_in_every_mode(time, gradient, conv):
    if conv != "standard" and time == "film":
        return
    plain = block_of(time, gradient, conv=conv)
    model = factored(plain)
    (out, found), (expected_out, of_plain) = gradients_of(model), gradients_of(plain)
    close(out, expected_out, 1e-11)
    expected = by_the_product_rule(model, of_plain)
    assert found.keys() == expected.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-9, atol=1e-11, msg=lambda s, name=name: f"{name}: {s}")
        assert g.any(), name


@pytest.mark.parametrize("time", TIMES)
def test_the_modes_agree_on_the_factors(time):
    """checkpoint with backprop to rounding; reversible and adjoint to the order of many steps."""
    found = {}
    for gradient in GRADIENTS:
        found[gradient] = gradients_of(factored(block_of(time, gradient, steps=32)))[1]
    for gradient, tolerance in {"checkpoint": 1e-12, "reversible": 1e-4, "adjoint": 1e-4}.items():
        for name, g in found["backprop"].items():
            off = float((found[gradient][name] - g).norm() / g.norm())
            assert off < tolerance, f"{gradient}, {name}: {off:.1e}"


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_dropconnect_and_adaptive_solves(gradient):
    plain = block_of("linear", gradient, drop="dropconnect", solver="dopri5", steps=None)
    model = factored(plain)
    (out, found), (expected_out, of_plain) = gradients_of(model), gradients_of(plain)
    close(out, expected_out, 1e-10)
    for name, g in by_the_product_rule(model, of_plain).items():
        torch.testing.assert_close(found[name], g, rtol=1e-7, atol=1e-8)


def test_residual_blocks_have_the_gradients_of_the_product_rule():
    plain = net_of("resnet, standardized")
    model, x = factored(plain), images(plain)
    found, of_plain = (
        dict(
            zip(dict(net.named_parameters()), torch.autograd.grad(net(x).square().sum(), net.parameters()), strict=True)
        )
        for net in (model, plain)
    )
    for name, g in by_the_product_rule(model, of_plain).items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("time", ["none", "concat", "linear", "fourier"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_solve_multiplies_once(gradient, time, monkeypatch):
    block, made = factored(block_of(time, gradient)), []
    derive = SolveContext.derive

    def counting(context, module, name, make):
        def noted():
            made.append(module)
            return make()

        return derive(context, module, name, noted if isinstance(module, Factors) else make)

    monkeypatch.setattr(SolveContext, "derive", counting)
    block(torch.randn(2, 4, 5, 5, dtype=torch.float64)).sum().backward()
    assert len(made) == len(set(made)) == len(factorized(block))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize(("time", "gradient"), [("concat", "backprop"), ("linear", "adjoint")])
def test_compiled_steps_have_the_gradients_of_the_eager_ones(time, gradient, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(resode.blocks.compiled.torch, "compile", lambda graph, **_: real(graph, backend="eager"))
    torch._dynamo.reset()
    eager = factored(block_of(time, gradient, steps=2, conv="weight-standardized"))
    fast = copy.deepcopy(eager)
    fast.compile_mode = "default"
    for seed in (1, 2):  # the first solve runs as it is, and is traced
        (out, found), (expected_out, expected) = gradients_of(fast, seed), gradients_of(eager, seed)
        close(out, expected_out, 1e-11)
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-11)


# --- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.2, 0.6])
def test_decaying_factors_come_to_the_lasso(kappa):
    """min ½‖X w − y‖² + κ‖w‖₁ with XᵀX = I is the soft threshold of z = Xᵀy: sign(z)·max(|z| − κ, 0)."""
    torch.manual_seed(0)
    X = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q
    y = X @ torch.tensor([2.0, -1.5, 0.9, -0.7, 0.5, 0.3, -0.1, 0.05]).double() + 0.3 * torch.randn(20).double()
    z = X.T @ y
    layer = nn.Linear(8, 1, bias=False).double()
    factorize(layer)
    optimizer = make_optimizer(layer, "sgd", lr=0.2, weight_decay=kappa, momentum=0.5)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (layer(X)[:, 0] - y).square().sum()).backward()
        optimizer.step()
    expected = z.sign() * (z.abs() - kappa).clamp(min=0.0)
    assert 0 < int((expected == 0.0).sum()) < 8
    multiply_out(layer)
    torch.testing.assert_close(layer.weight.detach()[0], expected, rtol=0.0, atol=1e-8)


def test_the_lasso_of_a_design_that_is_not_orthogonal_by_its_optimality():
    """w minimizes ½‖X w − y‖² + κ‖w‖₁ if Xᵀ(y − X w) is κ sign(w) where w ≠ 0, and at most κ elsewhere."""
    torch.manual_seed(1)
    X, y, kappa = torch.randn(30, 6).double(), torch.randn(30).double(), 4.0
    layer = nn.Linear(6, 1, bias=False).double()
    factorize(layer)
    optimizer = make_optimizer(layer, "sgd", lr=0.005, weight_decay=kappa)
    for _ in range(4000):
        optimizer.zero_grad()
        (0.5 * (layer(X)[:, 0] - y).square().sum()).backward()
        optimizer.step()
    multiply_out(layer)
    w = layer.weight.detach()[0]
    slope, used = X.T @ (y - X @ w), w.abs() > 1e-8
    assert 0 < int(used.sum()) < 6
    torch.testing.assert_close(slope[used], kappa * w[used].sign(), rtol=0.0, atol=1e-6)
    assert float(slope[~used].abs().max()) < kappa


def test_the_penalties_of_products_are_those_of_the_weights():
    plain = net_of("odenet, linear")
    model = factored(plain)
    for settings in (Penalties(l1=0.3), Penalties(group=0.2)):
        close(penalty(model, settings), penalty(plain, settings))
    with torch.no_grad():
        assert filters(model).keys() == filters(plain).keys()


# --- the rest of the package -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "odenet", "odenet, linear"])
def test_views_and_copies_are_those_of_the_plain_net(name):
    plain = net_of(name).eval()
    model, x = factored(plain), images(plain)
    close(resode.dynamics(model, x)(x), plain(x), 1e-10)
    fast = inference(model, x)
    close(fast(x), plain(x), 1e-10)
    assert not factorized(fast.model)
    close(resode.convert(model)(x), plain(x), 1e-11)
    if name == "resnet":
        close(lift(model)(x), plain(x), 1e-10)
    else:
        with solver_settings(plain, solver="midpoint", steps=4):
            close(discretize(model, 4, "midpoint")(x), plain(x), 1e-10)
    assert factorized(model), "it is left as it was"
    close(model(x), plain(x))


def test_what_reads_parameters_for_weights_refuses_factors():
    model = factored(net_of("resnet", depth=20))
    for change in (refine, coarsen):
        with pytest.raises(InvalidInput, match=r"products of two factors.*refining or coarsening.*multiply_out"):
            change(model)
    data = [(images(model), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(InvalidInput, match=r"products of two factors.*regularity.*multiply_out"):
        regularity(resode.dynamics(model), data)


def test_what_cannot_be_factorized_is_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(InvalidInput, match=r"several layers share 0\.weight"):
        factorize(tied)
    with pytest.raises(InvalidInput, match=r"layer of .* is parametrized"):
        factorize(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))))
    with pytest.raises(InvalidInput, match="nothing to factorize"):
        factorize(nn.BatchNorm2d(3))
    with pytest.raises(InvalidInput, match="already"):
        factorize(factored(nn.Linear(3, 3)))
    assert not factorized(tied)


def test_other_parametrizations_of_a_layer_with_factors_are_not_lost():
    layer = factored(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh(), unsafe=True)
    with pytest.raises(InvalidInput, match="bias of a layer with factors is parametrized, too"):
        multiply_out(layer)
    assert factorized(layer)


# --- pruning ---------------------------------------------------------------------------------------------------------


def data_of(n=60, batch=25):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    labels = (x[:, 0] + 0.2 * x[:, 1] > 0).long()
    return list(zip(x.split(batch), labels.split(batch), strict=True))


def classifier(*columns):
    """Logits (0, Σ c_j x_j)."""
    model = nn.Linear(5, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
        model.weight[1] = weights_of(*columns)
    return model


def weights_of(*columns):
    return torch.tensor(columns, dtype=torch.float64)


def test_weights_go_up_to_the_largest_threshold_that_the_accuracy_permits():
    model = classifier(1.0, 0.2, 0.01, -0.02, 0.001)
    before = evaluate(model, data_of()).accuracy
    after = evaluate(classifier(1.0, 0.2, 0.0, 0.0, 0.0), data_of()).accuracy
    assert 0.9 < before <= after
    pruned = prune_to_sparse(model, data_of())
    assert torch.equal(model.weight[1].detach(), weights_of(1.0, 0.2, 0.0, 0.0, 0.0))
    assert pruned.threshold == 0.02
    assert (pruned.accuracy_before, pruned.accuracy_after) == (before, after)
    assert (pruned.sparsity, pruned.weights, pruned.layers) == (0.8, 10, {"weight": 0.8})
    assert pruned.to_dict()["layers"] == {"weight": 0.8}


def test_a_tolerance_lets_more_go():
    model = classifier(1.0, 0.2, 0.01, -0.02, 0.001)
    before = evaluate(model, data_of()).accuracy
    alone = evaluate(classifier(1.0, 0.0, 0.0, 0.0, 0.0), data_of()).accuracy
    assert 0.8 < alone < before
    pruned = prune_to_sparse(model, data_of(), tolerance=before - alone)
    assert torch.equal(model.weight[1].detach(), weights_of(1.0, 0.0, 0.0, 0.0, 0.0))
    assert (pruned.accuracy_after, pruned.sparsity) == (alone, 0.9)


def test_a_threshold_may_pass_where_a_smaller_one_does_not():
    """Two weights that cancel each other nearly: without the smaller one the other misleads, without both none does."""
    generator = torch.Generator().manual_seed(4)
    x, u = torch.randn(2, 200, generator=generator, dtype=torch.float64)
    data = [(torch.stack([x, 3 * u, 3 * u, 0 * u, 0 * u], 1), (x > 0).long())]
    model = classifier(1.0, 0.5, -0.6, 0.0, 0.0)
    accuracy = [evaluate(classifier(1.0, *w, 0.0, 0.0), data).accuracy for w in ((0.5, -0.6), (0.0, -0.6), (0.0, 0.0))]
    assert accuracy[1] < accuracy[0] < accuracy[2] == 1.0
    pruned = prune_to_sparse(model, data)
    assert (pruned.threshold, pruned.accuracy_after) == (0.6, 1.0)


def test_where_everything_may_go_everything_goes():
    model = classifier(1.0, 0.2, 0.0, 0.0, 0.0)
    pruned = prune_to_sparse(model, data_of(), tolerance=0.99)
    assert not model.weight.any()
    assert (pruned.threshold, pruned.sparsity) == (1.0, 1.0)


def test_where_nothing_may_go_nothing_does():
    """Each of the four weights, all of one size, is needed."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weight = model.weight.detach().clone()
    pruned = prune_to_sparse(model, [(x, torch.tensor([0, 1]))])
    assert torch.equal(model.weight.detach(), weight)
    assert (pruned.threshold, pruned.sparsity, pruned.accuracy_after) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("name", ["resnet", "odenet", "odenet, linear"])
def test_of_a_net_the_next_weight_would_cost_too_much(name, tolerance):
    model = net_of(name).eval()
    x = images(model, 40)
    data = [(x, model(x).argmax(1))]
    whole = copy.deepcopy(model)
    pruned = prune_to_sparse(model, data, tolerance=tolerance)
    assert pruned.accuracy_before == 1.0
    assert pruned.accuracy_after == evaluate(model, data).accuracy >= 1.0 - tolerance - 1e-9
    assert 0.0 < pruned.sparsity < 1.0

    def cut(threshold):
        other = copy.deepcopy(whole)
        with torch.no_grad():
            for weight in decaying(other).values():
                weight[weight.abs() <= threshold] = 0.0
        return other

    for (n, p), q in zip(model.named_parameters(), cut(pruned.threshold).parameters(), strict=True):
        assert torch.equal(p, q), n
    sizes = torch.cat([weight.detach().abs().flatten() for weight in decaying(whole).values()])
    following = float(sizes[sizes > pruned.threshold].min())
    assert evaluate(cut(following), data).accuracy < 1.0 - tolerance
    # None of the larger thresholds that are looked at first would do.
    for share in SHARES:
        threshold = float(sizes.quantile(1.0 - share, interpolation="higher"))
        if threshold > following:
            assert evaluate(cut(threshold), data).accuracy < 1.0 - tolerance
    assert pruned.layers.keys() == decaying(whole).keys()
    zeros = sum(int((p == 0.0).sum()) for p in decaying(model).values())
    assert pruned.sparsity == zeros / pruned.weights
    assert pruned.weights == len(sizes)


def test_factors_are_multiplied_out_and_training_modes_are_kept():
    model = factored(net_of("odenet")).train()
    x = images(model, 20)
    prune_to_sparse(model, ((x[i : i + 10], torch.arange(10)) for i in (0, 10)), tolerance=0.5)
    assert not factorized(model)
    assert all(layer.training for layer in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    F.cross_entropy(model(x), torch.arange(20) % 10).backward()


def test_an_evaluation_that_fails_leaves_the_weights_as_they_were():
    model, calls = classifier(1.0, 0.2, 0.01, -0.02, 0.001), []
    weight = model.weight.detach().clone()

    def fail(*_):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt

    model.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        prune_to_sparse(model, data_of(batch=60))
    assert torch.equal(model.weight.detach(), weight)


def test_what_makes_no_sense_is_refused():
    for tolerance in (-0.1, 1.0, float("nan")):
        with pytest.raises(InvalidInput, match=f"tolerance is {tolerance}"):
            prune_to_sparse(classifier(1.0, 0.0, 0.0, 0.0, 0.0), data_of(), tolerance=tolerance)
    with pytest.raises(InvalidInput, match="nothing to evaluate on"):
        prune_to_sparse(classifier(1.0, 0.0, 0.0, 0.0, 0.0), [])
    with pytest.raises(InvalidInput, match="nothing to prune"):
        prune_to_sparse(nn.BatchNorm1d(5), data_of())
