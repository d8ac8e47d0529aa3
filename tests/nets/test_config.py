"""The settings of a net: what is refused, and that they survive JSON."""

import json
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from resode import Dropout, InvalidInput, NetConfig, Stack
from resode.blocks import ADAPTIVE, GRADIENTS, KINDS, SOLVERS, TABLEAUX, TIMES
from resode.data import Augment
from resode.layers import BASES, DROPOUTS, NORMS
from resode.nets import NETS, Architecture, build
from resode.stack import ACTIVATIONS, CONVOLUTIONS

# Refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"net": "resnext"}, "unknown net 'resnext'.*lenet5, alexnet, vgg, plain, resnet, odenet"),
        ({"kind": "wide"}, "unknown branch kind 'wide'.*basic, preact"),
        ({"shortcut": "none"}, "unknown shortcut 'none'.*pad, projection"),
        ({"time": "sine"}, "unknown time conditioning 'sine'"),
        ({"knots": 4}, "knots is 4, and with time='concat' no parameter varies.*constant, linear, fourier"),
        ({"knots": 0, "time": "constant"}, "knots is 0"),
        ({"knots": 2.5, "time": "linear"}, r"knots is 2\.5"),
        ({"scale": "2/L"}, "unknown scale.*'2/L'.*skipinit"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"solver": "rk5"}, "unknown solver 'rk5'.*euler"),
        ({"gradient": "forward"}, "unknown gradient mode 'forward'.*backprop"),
        ({"width": 0}, "width is 0"),
        ({"width": 1.5}, "width is 1.5"),
        ({"blocks": 0}, "blocks is 0"),
        ({"mask_intervals": 0}, "mask_intervals is 0"),
        ({"depth": 0, "net": "odenet"}, "depth is 0"),
        ({"depth": 20.0}, "depth is 20.0"),
        ({"expansion": 0.0}, "expansion is 0"),
        ({"expansion": -1.0}, "expansion is -1"),
        ({"expansion": float("nan")}, "expansion is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": (4, 0, 4)}, "steps is 0"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"rtol": 1e-3}, "rtol is 0.001, and rk4 makes fixed steps.*dopri5"),
        ({"solver": "dopri5", "rtol": 0.0}, "rtol is 0"),
        ({"solver": "dopri5", "steps": 4, "rtol": 1e-3}, "rtol is 0.001, and dopri5 shall make 4 steps"),
        ({"solver": "explicit_adams", "gradient": "checkpoint"}, "needs a one-step solver"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"extra_channels": -1}, "extra_channels is -1"),
        ({"extra_channels": 1.0}, "extra_channels is 1.0: a whole number"),
        ({"kinetic": -0.1}, "kinetic is -0.1"),
        ({"jacobian": float("inf")}, "jacobian is inf"),
        ({"steer": 1.0}, r"steer is 1, and the interval \[0, 1\] is no longer"),
        ({"solver": "dopri5", "atol": -1.0}, "atol is -1"),
        ({"convs": 0}, "convs is 0"),
        ({"convs": ()}, r"convs is \(\)"),
        ({"convs": 1.5}, "convs is 1.5"),
        ({"convs": (1, 2)}, r"convs is \(1, 2\) for 3 blocks"),
        ({"convs": (1, 0, 2)}, r"convs is \(1, 0, 2\)"),
    ],
)
def test_an_architecture_that_makes_no_sense_is_refused(settings, says):
    for kind in (Architecture, NetConfig):
        with pytest.raises(InvalidInput, match=says):
            kind(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"channels": 0}, "0 channels"),
        ({"classes": 1}, "1 classes"),
        ({"channels": 1.5}, "1.5 channels"),
        ({"classes": 10.0}, r"10\.0 classes"),
        ({"size": (0, 8)}, r"size \(0, 8\)"),
        ({"size": (8.5, 8)}, r"size \(8\.5, 8\)"),
        ({"size": 32}, r"size 32 .* pixel of \(H, W\)"),
        ({"size": (32,)}, r"size \(32,\)"),
        ({"size": (3, 32, 32)}, r"size \(3, 32, 32\)"),
        ({"size": None, "net": "lenet5"}, "unknown net for points.*'lenet5'.*plain, resnet, odenet"),
        ({"size": None, "net": "alexnet"}, "unknown net for points"),
        ({"size": None, "net": "vgg"}, "unknown net for points"),
        ({"size": None, "kind": "basic"}, "'basic' needs images.*use kind 'mlp'"),
        ({"size": (8, 8), "kind": "mlp"}, "'mlp' needs points"),
        *(
            ({"net": net, "size": None, "kind": "mlp", "stack": stack}, says)
            for net in ("plain", "resnet", "odenet")
            for stack, says in [
                (Stack(conv="weight-standardized"), "weight-standardized convolutions need images"),
                (Stack(conv="scaled-weight-standardized"), "scaled-weight-standardized convolutions need images"),
                (Stack(norm="instance"), "instance norm needs images"),
            ]
        ),
        ({"net": "odenet", "steps": (1, 2)}, r"steps is \(1, 2\) for 3 stages"),
        ({"net": "odenet", "steps": ()}, r"steps is \(\) for 3 stages"),
        ({"net": "odenet", "steps": (1, 2, 3), "size": None, "kind": "mlp"}, r"steps is \(1, 2, 3\) for 1 stages"),
    ],
)
def test_a_net_that_does_not_fit_its_data_is_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        NetConfig(**settings)


@pytest.mark.parametrize("net", ["plain", "resnet"])
def test_only_depths_of_6n_plus_2_are_taken_and_the_message_names_the_nearest(net):
    legal = [6 * n + 2 for n in range(1, 30)]
    for depth in range(1, 120):
        if depth in legal:
            assert NetConfig(net=net, depth=depth).depth == depth
            continue
        with pytest.raises(InvalidInput, match=rf"depth {depth} of {net} is not of the form 6n \+ 2") as refusal:
            NetConfig(net=net, depth=depth)
        near = int(str(refusal.value).rpartition(": ")[2].split()[0])
        assert near in legal
        assert abs(near - depth) == min(abs(each - depth) for each in legal)


@pytest.mark.parametrize("net", ["lenet5", "alexnet", "vgg", "odenet"])
def test_depth_means_nothing_to_the_other_nets(net):
    assert NetConfig(net=net, depth=5).depth == 5


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"net": "lenet5"}, 12),
        ({"net": "alexnet"}, 8),
        ({"net": "vgg", "blocks": 1}, 2),
        ({"net": "vgg", "blocks": 4}, 16),
        ({"net": "resnet"}, 4),
        ({"net": "plain"}, 4),
        ({"net": "odenet"}, 4),
    ],
)
def test_the_least_image_is_as_said(settings, least):
    for height, width in ((least - 1, 64), (64, least - 1)):
        with pytest.raises(InvalidInput, match=f"{settings['net']} .*{height}×{width}.*at least {least}×{least}"):
            NetConfig(size=(height, width), **settings)
    for size in ((least, least), (least, 2 * least + 1), (2 * least + 1, least)):
        net = build(NetConfig(size=size, depth=8, width=2, steps=1, channels=1, classes=3, **settings), seed=0)
        assert net(torch.rand(2, 1, *size)).shape == (2, 3)


def test_the_settings_cannot_be_changed_behind_the_checks():
    config = NetConfig()
    with pytest.raises(FrozenInstanceError):
        config.depth = 21
    with pytest.raises(InvalidInput, match="depth 21"):
        replace(config, depth=21)


# To JSON and back

FRACTIONS = st.floats(0.0, 0.99)
PIXELS = st.integers(0, 4)
OF_AUGMENT = {
    "flip": st.booleans(),
    "alternate_flip": st.booleans(),
    **dict.fromkeys(("crop", "shift", "cutout", "randaugment"), PIXELS),
    **dict.fromkeys(("resized_crop", "translate", "erase", "brightness", "contrast", "saturation"), FRACTIONS),
    **{name: st.floats(0.0, 10.0) for name in ("shear", "rotate", "mixup", "cutmix")},
    "hue": st.floats(0.0, 0.5),
    "magnitude": st.integers(0, 30),
    "interpolation": st.sampled_from(("nearest", "bilinear")),
}
STACKS = st.builds(
    Stack,
    norm=st.sampled_from(NORMS),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dropout=st.builds(
        Dropout,
        kind=st.sampled_from(DROPOUTS),
        p=FRACTIONS,
        schedule=st.sampled_from(("constant", "linear")),
        inverted=st.booleans(),
    ),
    input_dropout=FRACTIONS,
    input_noise=st.floats(0.0, 2.0),
    conv=st.sampled_from(CONVOLUTIONS),
    augment=st.fixed_dictionaries(OF_AUGMENT)
    .filter(lambda values: not (values["flip"] and values["alternate_flip"]))
    .map(lambda values: Augment(**values)),
)
WHOLE = st.integers(1, 9)


def test_every_setting_of_the_augmentation_is_drawn_below():
    assert set(OF_AUGMENT) == {f.name for f in fields(Augment)}


@st.composite
def configs(draw):
    size = draw(st.none() | st.tuples(st.integers(32, 99), st.integers(32, 99)))
    net = draw(st.sampled_from(NETS if size else ("plain", "resnet", "odenet")))
    blocks = draw(st.integers(1, 5))
    stages = 3 if size else 1
    solver, steps = draw(st.sampled_from(SOLVERS)), draw(st.none() | WHOLE | st.tuples(*[WHOLE] * stages))
    tolerance = st.none() | st.floats(1e-9, 1.0) if solver in ADAPTIVE and steps is None else st.none()
    time = draw(st.sampled_from(TIMES))
    stack = draw(STACKS if size else STACKS.filter(lambda stack: stack.norm != "instance"))
    return NetConfig(
        net=net,
        depth=6 * draw(WHOLE) + 2,
        width=draw(WHOLE),
        kind=draw(st.sampled_from(KINDS[:-1])) if size else "mlp",
        expansion=draw(st.none() | st.floats(0.1, 4.0)),
        shortcut=draw(st.sampled_from(("pad", "projection"))),
        scale=draw(st.floats(-2.0, 2.0) | st.sampled_from(("skipinit", "1/L", "1/sqrt(L)"))),
        tied=draw(st.booleans()),
        blocks=blocks,
        convs=draw(WHOLE | st.tuples(*[WHOLE] * blocks)),
        time=time,
        knots=draw(st.none() | WHOLE) if time in BASES else None,
        solver=solver,
        steps=steps,
        rtol=draw(tolerance),
        atol=draw(tolerance),
        max_steps=draw(WHOLE),
        gradient=draw(st.sampled_from(GRADIENTS if solver in TABLEAUX else ("backprop", "adjoint"))),
        compile=draw(st.booleans()),
        mask_intervals=draw(WHOLE),
        extra_channels=draw(st.integers(0, 9)),
        kinetic=draw(FRACTIONS),
        jacobian=draw(FRACTIONS),
        steer=draw(FRACTIONS),
        stack=stack if size else replace(stack, conv="standard"),
        channels=draw(WHOLE),
        size=size,
        classes=draw(st.integers(2, 100)),
    )


@given(configs())
@hypothesis_settings(deadline=None, max_examples=100)
def test_every_setting_survives_a_dict_and_json(config):
    assert config.to_dict() == asdict(config)
    assert NetConfig.from_dict(config.to_dict()) == config
    again = NetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_the_names_that_the_command_line_offers_are_all_there_are():
    hints = get_type_hints(Architecture)
    offered = {"net": NETS, "kind": KINDS, "time": TIMES, "solver": SOLVERS, "gradient": GRADIENTS}
    assert {name: get_args(hints[name]) for name in offered} == offered


def test_missing_settings_take_their_defaults():
    assert NetConfig.from_dict({}) == NetConfig()
    assert NetConfig.from_dict({"depth": 8, "stack": {"norm": "group"}}) == NetConfig(
        depth=8, stack=Stack(norm="group")
    )
    assert NetConfig.from_dict({"stack": {"dropout": {"p": 0.5}}}).stack.dropout == Dropout(p=0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"bogus": 1},
        {"stack": {"bogus": 1}},
        {"stack": {"dropout": {"p": 0.1, "bogus": 1}}},
        {"stack": {"augment": {"bogus": True}}},
    ],
)
def test_an_unknown_setting_is_refused_by_name_wherever_it_stands(values):
    with pytest.raises(InvalidInput, match=r"unknown settings of a net: bogus$"):
        NetConfig.from_dict(values)


def test_all_unknown_settings_are_named():
    with pytest.raises(InvalidInput, match=r"unknown settings of a net: lr, momentum, p$"):
        NetConfig.from_dict({"momentum": 0.9, "lr": 0.1, "stack": {"p": 0.5}})


@pytest.mark.parametrize(
    "values", [{"net": "mlp"}, {"depth": 9}, {"stack": {"norm": "rms"}}, {"stack": {"dropout": {"p": 1.0}}}]
)
def test_a_dict_is_checked_as_the_settings_are(values):
    with pytest.raises(InvalidInput):
        NetConfig.from_dict(values)


def test_reading_a_dict_leaves_it_as_it_was():
    values = {"size": [8, 8], "stack": {"dropout": {"p": 0.1}}}
    before = json.dumps(values)
    NetConfig.from_dict(values)
    assert json.dumps(values) == before
