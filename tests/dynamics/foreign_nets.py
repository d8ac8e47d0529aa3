"""What the tests of other packages' networks share."""

from contextlib import contextmanager

import torch

from resode import dynamics
from resode.dynamics.step import identity


def shaken(model, seed=0):
    """``model`` with every parameter and statistic drawn, so that no norm, gate or scale is trivially one or zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "layer_scale" not in name:
                p.normal_(0, (p.shape[0] / p.numel()) ** 0.5, generator=draw)
            elif name.endswith("bias"):
                p.normal_(0, 0.3, generator=draw)
            else:
                p.uniform_(0.5, 1.5, generator=draw)
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(0, 0.3, generator=draw)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 1.5, generator=draw)
    return model


def images(view, batch=2):
    return torch.rand(batch, *shape_of(view.model), generator=torch.Generator().manual_seed(1))


def shape_of(model):
    """Of an image: the only size that a ViT takes; a small one for a convolutional net."""
    if hasattr(model, "patch_embed"):
        return (3, *model.patch_embed.img_size)
    size = getattr(model, "image_size", 64)
    return (3, size, size)


@contextmanager
def silenced(*modules):
    """Let ``modules`` give zeros."""
    hooks = [module.register_forward_hook(lambda m, inputs, out: torch.zeros_like(out)) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def without(view, place):
    """The view with the step at ``place`` deleted."""
    return view.with_steps([step.deleted() if i == place else step for i, step in enumerate(view.steps)])


def distance(a, b):
    """The largest difference, in units of the largest element of ``b``."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def assert_near(a, b):
    assert a.shape == b.shape
    assert distance(a, b) < 1e-5


def check_view(model):
    """What holds of every view; returns it."""
    view = dynamics(model)
    x = images(view)
    with view.evaluation():
        assert_near(view(x), model(x))
        state = view.stem(x)
        for step in view.steps:
            # A step leaves the state as it was, and what follows the addition leaves the sum.
            held, after = state.clone(), step(state)
            assert torch.equal(state, held)
            if step.post is not identity:
                total = step.sum(state)
                held = total.clone()
                torch.testing.assert_close(step.post(total), after)
                assert torch.equal(total, held)
            assert step.shapes is not None
            state = after
        held = state.clone()
        view.head(state)
        assert torch.equal(state, held)
    labels = [step.label for step in view.steps]
    assert len(set(labels)) == len(labels)
    return view


def check_deletions(view, last_modules):
    """Deleting a residual step is silencing the module that its branch ends in, and is noticed.

    Args:
        last_modules: one for each residual step, in order.
    """
    residual = [i for i, step in enumerate(view.steps) if step.kind == "residual"]
    x = images(view, batch=1)
    with view.evaluation():
        whole = view.model(x)
        for i, module in zip(residual, last_modules, strict=True):
            with silenced(module):
                expected = view.model(x)
            assert_near(without(view, i)(x), expected)
            assert distance(expected, whole) > 1e-3, view.steps[i].label


def check_training(model):
    """The view computes in training mode what the model does, with the same draws."""
    view = dynamics(model)
    model.train()
    x = images(view, batch=4)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert_near(view(x), expected)
    torch.manual_seed(4)
    assert distance(model(x), expected) > 1e-3, "nothing was drawn"


def check_gradient(model):
    """Gradients pass the view as they pass the model, with respect to the input and to every parameter."""
    view = dynamics(model)
    model.eval()
    x = images(view).requires_grad_()
    inputs = [x, *model.parameters()]
    seen, expected = (torch.autograd.grad(net(x).square().mean(), inputs) for net in (view, model))
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
