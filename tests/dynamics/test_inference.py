"""Views made for speed: the same network, its batch norms folded, of other types and layouts, in place where it may."""

import copy

import pytest
import torch
from foreign_nets import shaken
from torch import nn
from torchvision import models

from resode import InvalidInput, NetConfig, ODEBlock, Parts, ResidualBlock, Stack, Step, build, dynamics
from resode.dynamics.inference import inference
from resode.dynamics.step import Fresh
from resode.dynamics.trace import Trace
from resode.layers.fold import Folded

NETS = {
    # (settings, batch norms in it, those of them that are folded)
    "basic": ({"net": "resnet", "depth": 14}, 13, 13),
    "projections": ({"net": "resnet", "depth": 14, "shortcut": "projection"}, 15, 15),
    "preact": ({"net": "resnet", "depth": 14, "kind": "preact", "scale": 0.5}, 13, 6),  # that between convolutions
    "skipinit": ({"net": "resnet", "depth": 14, "kind": "preact", "scale": "skipinit"}, 13, 6),
    "bottleneck": ({"net": "resnet", "depth": 14, "kind": "bottleneck"}, 19, 19),
    "standardized": ({"net": "resnet", "depth": 14, "stack": Stack(conv="weight-standardized")}, 13, 13),
    "tied": ({"net": "resnet", "depth": 26, "tied": True, "time": "concat"}, 11, 5),  # stem and transitions
    "group": ({"net": "resnet", "depth": 14, "stack": Stack(norm="group")}, 0, 0),
    "convnext": ({"net": "resnet", "depth": 14, "kind": "convnext"}, 7, 6),
    "points": ({"net": "resnet", "depth": 14, "kind": "mlp", "size": None}, 6, 6),
    "plain": ({"net": "plain", "depth": 14}, 13, 13),
    "vgg": ({"net": "vgg", "blocks": 2, "convs": (2, 1)}, 3, 3),
    "lenet5": ({"net": "lenet5", "size": (12, 12)}, 2, 2),
    "odenet": ({"net": "odenet", "steps": (2, 1, 3), "kind": "basic"}, 12, 5),  # stem and transitions
    "film": ({"net": "odenet", "steps": (1, 1, 1), "solver": "euler", "time": "film", "kind": "basic"}, 12, 5),
    "varying": ({"net": "odenet", "steps": (1, 2, 1), "time": "linear", "stack": Stack(norm="group")}, 0, 0),
}


def net_of(name, **settings):
    """One of our nets with norms, biases and scales as if it was trained, in training mode."""
    settings = {"width": 8, "channels": 2, "size": (8, 8), "classes": 3, **NETS[name][0], **settings}
    net = build(NetConfig(**settings), seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, p in net.named_parameters():
            if p.ndim <= 1:
                spread = 0.3 if parameter_name.endswith("bias") else 0.2
                p.add_(spread * torch.randn(p.shape, generator=draw))
        for _ in range(3):
            net(torch.randn(16, *net.input_shape, generator=draw))
    return net


def inputs(net, batch=6):
    return torch.randn(batch, *net.input_shape, generator=torch.Generator().manual_seed(5))


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def norms(model):
    return count(model, nn.modules.batchnorm._BatchNorm)


def distance(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def deletions(view, x):
    """Logits without each step that can be deleted."""
    for i, step in enumerate(view.steps):
        if step.not_deletable is None:
            yield view.with_steps([*view.steps[:i], step.deleted(), *view.steps[i + 1 :]])(x)


# The same network


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_the_logits_are_those_of_the_model(name, channels_last):
    net = net_of(name)
    x, view = inputs(net), inference(net, channels_last=channels_last)
    with dynamics(net).evaluation():
        found, expected = view(x), net(x)
    assert distance(found, expected) < 1e-5
    assert found.dtype is torch.float32


@pytest.mark.parametrize("name", NETS)
def test_norms_are_folded_where_they_follow_a_linear_map_used_once(name):
    net, (_, there, folded) = net_of(name), NETS[name]
    assert norms(net) == there
    view = inference(net)
    assert (count(view.model, Folded), norms(view.model)) == (folded, there - folded)
    plain = inference(net, fold=False)
    assert (count(plain.model, Folded), norms(plain.model)) == (0, there)


@pytest.mark.parametrize("name", [name for name in NETS if name != "lenet5"])  # of which no layer can be deleted
def test_lesions_are_those_of_the_plain_view(name):
    net = net_of(name)
    x, plain, fast = inputs(net), dynamics(net), inference(net)
    with plain.evaluation():
        whole = plain(x)
        pairs = list(zip(deletions(fast, x), deletions(plain, x), strict=True))
        for found, expected in pairs:
            assert distance(found, expected) < 1e-5
            assert not torch.equal(expected, whole)
        assert distance(fast(x), whole) < 1e-5  # and nothing was overwritten by them
    assert pairs


@pytest.mark.parametrize("name", ["basic", "preact", "odenet"])
def test_steps_in_another_order_are_those_of_the_plain_view(name):
    net = net_of(name, depth=20)
    x, changed = inputs(net), []
    for view in (inference(net), dynamics(net)):
        *first, one, other = view.steps
        with view.evaluation():
            changed.append(view.with_steps([*first, other, one])(x))
    assert distance(*changed) < 1e-5
    with view.evaluation():
        assert distance(view(x), changed[1]) > 1e-5


def test_steps_know_the_shapes_of_their_states():
    net = net_of("basic")
    assert [step.shapes for step in inference(net).steps] == [step.shapes for step in dynamics(net).steps]


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_torchvision_s_residual_nets(block):
    blocks = {"BasicBlock": [2, 2, 2, 2], "Bottleneck": [1, 1, 2, 1]}[block]
    model = shaken(models.ResNet(getattr(models.resnet, block), blocks, 5))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    view, plain = inference(model), dynamics(model)
    assert norms(model) == count(view.model, Folded) == 20
    assert all(isinstance(step.branch, Fresh) for step in view.steps)
    with plain.evaluation():
        assert distance(view(x), model(x)) < 1e-5
        for found, expected in list(zip(deletions(view, x), deletions(plain, x), strict=True))[::4]:
            assert distance(found, expected) < 1e-5


# Types and layouts


@pytest.mark.parametrize("name", NETS)
def test_bfloat16_is_near(name):
    net = net_of(name)
    x, view = inputs(net), inference(net, dtype=torch.bfloat16)
    with view.evaluation(), dynamics(net).evaluation():
        found, expected = view(x), net(x)
        state = view.run(view.stem(x))
    assert state.dtype is torch.bfloat16
    assert found.dtype is torch.float32
    assert 1e-5 < float((found - expected).norm() / expected.norm()) < 2e-2
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_bfloat16_on_a_net_of_others():
    model = shaken(models.resnet18(num_classes=5)).eval()
    x, view = torch.rand(2, 3, 64, 64), inference(model, dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = view(x), model(x)
    assert found.dtype is torch.float32
    assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_norms_that_are_not_folded_keep_their_statistics_in_bfloat16():
    net = net_of("preact")
    view = inference(net, dtype=torch.bfloat16)
    kept = [m for m in view.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(kept) == 7
    assert {tensor.dtype for m in kept for tensor in (m.weight, m.running_mean, m.running_var)} == {torch.float32}


def test_a_wide_model_stays_wide_and_a_narrow_one_can_be_widened():
    net = net_of("basic")
    x, wide = inputs(net), copy.deepcopy(net).double().eval()
    with torch.no_grad():
        expected = wide(x.double())
        assert distance(inference(wide)(x), expected) < 1e-12
        assert distance(inference(wide, dtype=torch.float32)(x).double(), expected) < 1e-5
        assert inference(wide, dtype=torch.bfloat16)(x).dtype is torch.float64
        found = inference(net, dtype=torch.float64)(x)
    assert found.dtype is torch.float64
    assert distance(found, expected) < 1e-5


def test_states_and_weights_lie_channels_last():
    net = net_of("basic")
    x, view = inputs(net), inference(net)
    with view.evaluation():
        for h in view.states(x):
            assert h.is_contiguous(memory_format=torch.channels_last)
            assert not h.is_contiguous()
    convolutions = [m for m in view.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)
    with view.evaluation():
        assert all(h.is_contiguous() for h in inference(net, channels_last=False).states(x))
    assert all(c.weight.is_contiguous() for c in net.modules() if isinstance(c, nn.Conv2d))


# The model is left alone


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["basic", "odenet"])
def test_the_model_is_left_as_it_was(name, dtype):
    net = net_of(name)
    for i, module in enumerate(net.modules()):
        module.training = i % 3 > 0
    modes = [module.training for module in net.modules()]
    held = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    view = inference(net, dtype=dtype)
    view(inputs(net))
    assert [module.training for module in net.modules()] == modes
    assert net.state_dict().keys() == held.keys()
    assert all(torch.equal(value, held[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    # And the copy is one: it goes on as it is when the model is trained.
    x = inputs(net)
    before = view(x)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    assert torch.equal(view(x), before)


def test_the_copy_is_in_evaluation_mode_and_learns_nothing():
    view = inference(net_of("basic"))
    assert not any(module.training for module in view.model.modules())
    assert not any(p.requires_grad for p in view.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in view.model.modules())
    assert not view(torch.randn(2, 2, 8, 8)).requires_grad


@pytest.mark.parametrize("name", ["basic", "preact", "odenet"])
def test_gradients_pass_to_the_input(name):
    net = net_of(name).eval()
    x = inputs(net).requires_grad_()
    found, expected = (torch.autograd.grad(view(x).square().mean(), x)[0] for view in (inference(net), dynamics(net)))
    assert distance(found, expected) < 1e-4


# What hand-made networks may do


def statistics(model, x):
    model.train()
    for _ in range(3):
        model(x)
    return model.eval()


class Blocks(nn.Module):
    """h ↦ h + f(h) for each of some modules f, between two linear maps."""

    def __init__(self, *branches, channels=4):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(3, channels), nn.Linear(channels, 2)
        self.branches = nn.ModuleList(branches)

    def read(self):
        steps = [
            Step(kind="residual", branch=lambda t, h, f=f: f(h), label=str(i)) for i, f in enumerate(self.branches)
        ]
        return Parts(self.stem, steps, self.head, (3,))

    def forward(self, x):
        h = self.stem(x)
        for f in self.branches:
            h = h + f(h)
        return self.head(h)


def views(*branches):
    """A model of these branches that has seen data, and its inference view; they agree, twice."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    model = statistics(Blocks(*branches), x)
    view = inference(model, read=Blocks.read)
    with torch.no_grad():
        for _ in range(2):  # an output that was overwritten would be another the second time
            assert distance(view(x), model(x)) < 1e-5
    return model, view


def fresh(view):
    return [isinstance(step.branch, Fresh) for step in view.steps]


class Function(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, h):
        return self.function(h, *self.layers)


def linear(out=4):
    return nn.Linear(4, out)


def norm():
    return nn.BatchNorm1d(4)


@pytest.mark.parametrize(
    ("branch", "folded", "may_overwrite"),
    [
        (lambda h, f, g: g(f(h)), 1, True),
        (lambda h, f, g: g(f(h)).relu(), 1, False),
        (lambda h, f, g: g(f(h).view(-1, 4)), 0, True),  # another tensor
        (lambda h, f, g: g(f(h).relu_()), 0, True),  # changed in between
        (lambda h, f, g: (lambda y: g(y) + y)(f(h)), 0, False),  # used by more than the norm
        (lambda h, f, g: (lambda y: (g(y), y.detach().square())[0])(f(h)), 0, True),
        (lambda h, f, g: g(f(h)) + f(h), 0, False),  # called twice
        (lambda h, f, g: g(g(f(h))), 0, True),
        (lambda h, f, g: g(h) + f(h), 0, False),  # beside each other
        (lambda h, f, g: f(g(h)), 0, True),
        (lambda h, f, g: f(g(h)).chunk(1)[0], 0, False),
    ],
)
def test_what_is_folded_and_overwritten_is_what_nothing_else_uses(branch, folded, may_overwrite):
    _, view = views(Function(branch, linear(), norm()))
    assert count(view.model, Folded) == folded
    assert fresh(view) == [may_overwrite]


def test_an_output_that_is_kept_is_not_overwritten():
    kept = torch.rand(16, 4)
    memory = []

    def remember(h, f):
        memory[:] = [f(h)]
        return memory[0]

    branches = (
        lambda h: kept[: len(h)],
        lambda h: h,
        Function(remember, linear()),
        lambda h: memory[0].tanh(),
        Function(lambda h, f: f(h), linear()),
    )
    _, view = views(*(f if isinstance(f, nn.Module) else Function(f) for f in branches))
    assert fresh(view) == [False, False, False, False, True]


def test_a_norm_in_another_part_than_its_layer_is_not_folded():
    """A lesion may part them."""
    torch.manual_seed(0)
    first, second = linear(), norm()
    model = nn.Sequential(linear(), first, second, nn.Linear(4, 2))
    x = torch.randn(16, 4)
    statistics(model, x)

    def read(model):
        steps = [Step(kind="plain", branch=lambda t, h, f=f: f(h), label=str(f)) for f in (model[1], model[2])]
        return Parts(model[0], steps, model[3], (4,))

    view, plain = inference(model, read=read), dynamics(model, read=read)
    assert count(view.model, Folded) == 0
    with torch.no_grad():
        for found, expected in zip(deletions(view, x), deletions(plain, x), strict=True):
            assert distance(found, expected) < 1e-5


def test_a_linear_layer_and_a_norm_over_other_axes():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, h):  # (B, 4 tokens, 4 features), normalized for each token
            return self.g(self.f(h.view(-1, 1, 4) * torch.ones(4, 1))).mean(1)

    _, view = views(Tokens())
    assert count(view.model, Folded) == 0


def test_what_hooks_look_at_is_not_folded_and_they_go_on():
    net, seen = net_of("basic"), []
    net.stem[2].register_forward_hook(lambda m, inputs, out: seen.append(float(inputs[0].detach().sum())))
    assert isinstance(net.stem[2], nn.modules.batchnorm._BatchNorm)
    view = inference(net)
    assert count(view.model, Folded) == 12
    x = inputs(net)
    seen.clear()
    view(x)
    net.eval()(x)
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_a_relu_with_a_hook_is_called():
    net, seen = net_of("basic"), []
    net.stages[0][0].post.register_forward_hook(lambda *_: seen.append(1))
    view = inference(net)
    assert [step.post is torch.relu for step in view.steps] == [False] + [True] * 5
    seen.clear()
    view(inputs(net))
    assert seen == [1]


def test_an_adaptive_block_is_frozen_alike():
    torch.manual_seed(0)
    field = Function(lambda h, f: f(h).tanh(), linear())
    field.forward = lambda t, h: Function.forward(field, h)
    model = nn.Sequential(linear(), norm(), ODEBlock(field, "dopri5"), nn.Linear(4, 2))
    x = torch.randn(16, 4)
    statistics(model, x)
    view, plain = inference(model, x), dynamics(model, x)
    assert [step.t for step in view.steps] == [step.t for step in plain.steps]
    assert count(view.model, Folded) == 1
    on_grid = inference(model, x, grid=3)
    assert len(on_grid.steps) == 3
    with torch.no_grad():
        assert distance(view(x), model(x)) < 1e-5
        assert distance(on_grid(x), dynamics(model, x, grid=3)(x)) < 1e-5


# Sums in place


@pytest.mark.parametrize("scale", [1.0, -2.5, torch.tensor(0.5)])
@pytest.mark.parametrize("post", [torch.relu, torch.neg])
def test_a_step_overwrites_the_output_of_its_branch_alone(scale, post):
    h, made = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), []

    def branch(t, h):
        made.append(h.cos())
        return made[-1]

    plain = Step(kind="residual", branch=branch, scale=scale, post=post)
    held, expected = h.clone(), plain(h)
    torch.testing.assert_close(expected, post(h + scale * h.cos()))
    assert torch.equal(made[-1], h.cos())
    step = Step(kind="residual", branch=Fresh(branch), scale=scale, post=post)
    torch.testing.assert_close(step(h), expected)
    assert torch.equal(made[-1], h.cos()) == isinstance(scale, torch.Tensor)
    assert torch.equal(step.deleted()(h), post(h))
    assert torch.equal(h, held)


def test_a_sum_of_other_type_or_shape_than_the_branch_is_not_written_into_it():
    h = torch.rand(4, 3)
    step = Step(kind="residual", branch=Fresh(lambda t, h: h.bfloat16()))
    assert step(h).dtype is torch.float32
    with pytest.raises(InvalidInput, match="they must agree"):
        Step(kind="residual", branch=Fresh(lambda t, h: h[:1].exp()))(h)


# Traces


def test_a_trace_says_who_took_what_where():
    f, g = linear(), norm()
    model = Blocks(Function(lambda h, f, g: g(f(h)), f, g)).eval()
    view = dynamics(model, read=Blocks.read)
    trace = Trace(view, torch.randn(2, 3), [f, g, model.stem, model.head])
    assert [output.maker for output in trace.outputs] == [model.stem, f, g, model.head]
    assert [output.place for output in trace.outputs] == [
        ("stem", -1), ("branch", 0), ("branch", 0), ("head", -1)
    ]  # fmt: skip
    taken = [output.takers for output in trace.outputs]
    assert taken == [
        {(("branch", 0), f), (("sum", 0), None)}, {(("branch", 0), g)}, {(("sum", 0), None)}, set()
    ]  # fmt: skip
    assert trace.calls == {model.stem: 1, f: 1, g: 1, model.head: 1}


# Errors


def test_inputs_that_are_not_known_must_be_given():
    model = nn.Sequential(nn.Linear(3, 4), ResidualBlock(Function(lambda h: h)))
    model[1].branch.forward = lambda t, h: h
    with pytest.raises(InvalidInput, match=r"it is not known what inputs this Sequential takes.*pass example=x"):
        inference(model)
    assert inference(model, torch.rand(2, 3)).steps


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", torch.complex64])
def test_other_types_are_refused(dtype):
    with pytest.raises(InvalidInput, match=r"dtype is .*: choose torch\.float64, torch\.float32, torch\.bfloat16"):
        inference(net_of("basic"), dtype=dtype)


def test_a_state_too_large_for_half_precision_is_refused():
    net = net_of("basic")
    with torch.no_grad():
        net.stem[2].bias.add_(1e6)
    with pytest.raises(InvalidInput, match=r"dtype=torch\.float16 moves the logits .*: use dtype=torch\.float32"):
        inference(net, dtype=torch.float16)
    assert inference(net).steps


def test_a_norm_that_cannot_be_folded_accurately_is_refused():
    torch.manual_seed(0)
    g = norm()
    model = Blocks(Function(lambda h, f, g: g(f(h)), linear(), g)).eval()
    model.branches[0].layers[0].weight.data.mul_(1e-6)
    model.branches[0].layers[0].bias.data.fill_(1.0)
    g.running_mean.fill_(1.0)
    g.running_var.fill_(1e-20)
    g.eps = 0.0
    with pytest.raises(InvalidInput, match=r"fold=True moves the logits .*: use fold=False"):
        inference(model, read=Blocks.read, fold=True)
    # Nobody asked for it by name: the copy is left unfolded, and is the model.
    x, view = torch.rand(4, 3), inference(model, read=Blocks.read)
    assert torch.equal(view(x), inference(model, read=Blocks.read, fold=False)(x))
