"""Layers of others inside a branch: which are refused, and what convert makes of them."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import DropBlock2d, DropBlock3d, StochasticDepth

from resode.blocks.branch import Branch
from resode.blocks.foreign import convert, refuse_foreign
from resode.blocks.ode import ODEBlock
from resode.errors import InvalidInput
from resode.layers.dropout import Dropout
from resode.layers.norm import BatchNorm
from resode.stack import Dropout as DropoutSettings
from resode.stack import Stack


class DropPath(nn.Module):
    """timm's, as it is copied into many repositories."""

    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        return x


class Wrapped(nn.Module):
    """A branch around a layer, two levels down."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, t, h):
        return self.body(h)


def images(b=6, c=4, dtype=torch.float32):
    return torch.randn(b, c, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))


FOREIGN = {
    "Dropout": nn.Dropout(0.1),
    "Dropout1d": nn.Dropout1d(0.1),
    "Dropout2d": nn.Dropout2d(0.1),
    "Dropout3d": nn.Dropout3d(0.1),
    "AlphaDropout": nn.AlphaDropout(0.1),
    "FeatureAlphaDropout": nn.FeatureAlphaDropout(0.1),
    "RReLU": nn.RReLU(),
    "BatchNorm1d": nn.BatchNorm1d(4),
    "BatchNorm2d": nn.BatchNorm2d(4),
    "BatchNorm3d": nn.BatchNorm3d(4),
    "SyncBatchNorm": nn.SyncBatchNorm(4),
    "LazyBatchNorm2d": nn.LazyBatchNorm2d(),
    "InstanceNorm2d": nn.InstanceNorm2d(4, track_running_stats=True),
    "StochasticDepth": StochasticDepth(0.1, "row"),
    "DropBlock2d": DropBlock2d(0.1, 3),
    "DropBlock3d": DropBlock3d(0.1, 3),
    "DropPath": DropPath(0.1),
    "MultiheadAttention": nn.MultiheadAttention(4, 2, dropout=0.1),
    "LSTM": nn.LSTM(4, 4, num_layers=2, dropout=0.1),
    "_SpectralNorm": nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    "Linear": nn.utils.spectral_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_breaks_the_contract_is_refused_by_name_and_place(name):
    with pytest.raises(InvalidInput) as caught:
        ODEBlock(Wrapped(nn.ReLU(), FOREIGN[name]))
    message = str(caught.value)
    assert message.startswith("branch.body.1")
    assert f"{name}, which" in message
    assert "at every evaluation" in message
    assert "resode.convert(branch)" in message


def test_a_branch_that_is_such_a_layer_itself_is_refused():
    with pytest.raises(InvalidInput, match="the branch is torch's Dropout"):
        refuse_foreign(nn.Dropout(0.1))


HARMLESS = {
    "LayerNorm": nn.LayerNorm(4),
    "GroupNorm": nn.GroupNorm(2, 4),
    "InstanceNorm2d": nn.InstanceNorm2d(4, affine=True),
    "attention without dropout": nn.MultiheadAttention(4, 2),
    "LSTM without dropout": nn.LSTM(4, 4),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "ours": nn.Sequential(BatchNorm(4), Dropout(0.5)),
    "our branch": Branch(4, Stack(dropout=DropoutSettings("unit", 0.5))),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_keeps_the_contract_is_accepted(name):
    refuse_foreign(Wrapped(HARMLESS[name]))


def deterministic(layer):
    """Whether two training evaluations agree, and leave the layer's state as it was."""
    layer = copy.deepcopy(layer).train()
    x = images()
    layer(x)
    held = copy.deepcopy(layer.state_dict())
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(2)
    second = layer(x)
    same = all(torch.equal(a, b) for a, b in zip(held.values(), layer.state_dict().values(), strict=True))
    return torch.equal(first, second) and same


LAYERS = [
    *(getattr(nn, name)() for name in ("ReLU", "GELU", "SiLU", "ELU", "Softplus", "Hardswish", "RReLU", "PReLU")),
    *(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)),
    *(nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4)),
    *(nn.LocalResponseNorm(3), nn.Conv2d(4, 4, 3), nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))),
    *(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
    *(nn.AvgPool2d(3, 1, 1), nn.FractionalMaxPool2d(2, output_size=3), StochasticDepth(0.5, "row")),
    DropBlock2d(0.5, 3),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_exactly_what_is_not_a_function_of_its_input_is_refused(layer):
    if deterministic(layer):
        refuse_foreign(Wrapped(layer))
    else:
        with pytest.raises(InvalidInput):
            refuse_foreign(Wrapped(layer))


# --- convert ---------------------------------------------------------------------------------------------------------


def trained(dtype=torch.float32):
    """A user's branch whose statistics and weights are no defaults."""
    torch.manual_seed(0)
    branch = Wrapped(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
        nn.Dropout2d(0.4),
        nn.Sequential(nn.SiLU(), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.2)),
        StochasticDepth(0.5, "row"),
    ).to(dtype)
    for p in branch.parameters():
        nn.init.normal_(p)
    for _ in range(3):
        branch(0.0, 2.0 * torch.randn(6, 4, 5, 5, dtype=dtype) + 1.0)
    return branch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convert_keeps_weights_statistics_and_evaluation(dtype):
    branch = trained(dtype)
    before = copy.deepcopy(branch)
    ours = convert(branch)
    refuse_foreign(ours)
    assert list(ours.state_dict()) == list(branch.state_dict())
    for name, held in ours.state_dict().items():
        assert torch.equal(held, branch.state_dict()[name])
        assert held.dtype == branch.state_dict()[name].dtype
    x = images(dtype=dtype)
    assert torch.equal(ours.eval()(0.0, x), branch.eval()(0.0, x))
    # and the module it was given is as it was
    assert [type(m) for m in branch.modules()] == [type(m) for m in before.modules()]
    with torch.no_grad():
        next(ours.parameters()).zero_()
    assert not torch.equal(next(ours.parameters()), next(branch.parameters()))


def test_convert_keeps_the_training_of_batch_norm():
    theirs = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
    ours = convert(theirs)
    for _ in range(3):
        x = torch.randn(6, 4, 5, 5)
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_what_convert_makes():
    body = convert(trained()).body
    assert isinstance(body[1], BatchNorm)
    assert (body[1].eps, body[1].momentum, body[1].num_features) == (1e-3, 0.3, 4)
    assert (body[2].kind, body[2].p) == ("spatial", 0.4)
    assert body[3][1].weight is None
    assert (body[3][2].kind, body[3][2].p) == ("unit", 0.2)
    assert (body[4].kind, body[4].p) == ("path", 0.5)
    path = convert(DropPath(0.3))
    assert (path.kind, path.p) == ("path", 0.3)
    assert isinstance(convert(nn.SyncBatchNorm(4)), BatchNorm)


def test_a_converted_branch_runs_in_an_ode_block():
    block = ODEBlock(convert(trained()), "rk4", steps=4, gradient="adjoint")
    x = images().requires_grad_()
    block(x).sum().backward()
    assert x.grad.isfinite().all()
    assert block.branch.body[1].running_mean.shape == (5, 4)


def test_a_layer_without_an_objection_is_left_alone():
    branch = Branch(4)
    assert [type(m) for m in convert(branch).modules()] == [type(m) for m in branch.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_convert_keeps_the_mode_and_what_is_frozen(training):
    norm = nn.BatchNorm2d(4).train(training)
    norm.weight.requires_grad_(False)
    ours = convert(Wrapped(norm)).body[0]
    assert ours.training == training
    assert (ours.weight.requires_grad, ours.bias.requires_grad) == (False, True)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_convert_keeps_the_options_of_batch_norm(options):
    theirs = nn.BatchNorm2d(4, **options)
    ours = convert(theirs)
    for _ in range(2):
        x = torch.randn(6, 4, 5, 5)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(images()), theirs.eval()(images()))


def test_a_layer_that_stands_in_several_places_stays_one():
    drop, norm = nn.Dropout(0.5), nn.BatchNorm2d(4)
    ours = convert(Wrapped(norm, drop, nn.ReLU(), nn.Sequential(drop, norm)))
    refuse_foreign(ours)
    assert ours.body[1] is ours.body[3][0]
    assert ours.body[0] is ours.body[3][1]
    assert sum(p.numel() for p in ours.parameters()) == 8


NO_COUNTERPART = {
    "AlphaDropout": nn.AlphaDropout(0.1),
    "RReLU": nn.RReLU(),
    "InstanceNorm2d": nn.InstanceNorm2d(4, track_running_stats=True),
    "StochasticDepth": StochasticDepth(0.5, "batch"),
    "DropBlock2d": DropBlock2d(0.1, 3),
    "DropPath": DropPath(0.1, scale_by_keep=False),
    "MultiheadAttention": nn.MultiheadAttention(4, 2, dropout=0.1),
    "_SpectralNorm": nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
}


@pytest.mark.parametrize("name", NO_COUNTERPART)
def test_what_has_no_counterpart_is_an_error_not_an_approximation(name):
    with pytest.raises(InvalidInput, match=f"{name} has no counterpart"):
        convert(Wrapped(NO_COUNTERPART[name]))
