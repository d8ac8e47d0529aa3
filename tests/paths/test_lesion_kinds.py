"""Lesions of many steps, of swapped steps, of stages, layers and by any change: against nets run by hand."""

from collections import Counter
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from by_hand import batches, deletable, inputs, logits_of, net_of, reordered, scaled, units_of, view_of, without
from scipy.stats import chi2, kendalltau
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from resode import InvalidInput, ResidualDynamics, Step, dynamics
from resode.paths import delete, lesion, noise, scale, swap
from resode.paths.interventions import Intervention
from resode.paths.table import Lesion


def measured(net, units, data):
    """Error and loss of the net taken apart, sample by sample."""
    wrong, loss, count = 0, 0.0, 0
    for x, labels in data:
        z = logits_of(net, units, x)
        wrong += sum(int(one.argmax() != label) for one, label in zip(z, labels, strict=True))
        loss += float(F.cross_entropy(z, labels, reduction="sum"))
        count += len(labels)
    return wrong / count, loss / count


def is_of(score, net, units, data):
    assert (score.error, score.loss) == pytest.approx(measured(net, units, data), rel=1e-10)


def tiny(count=5, kind="residual"):
    """A view that costs next to nothing."""
    steps = [
        Step(kind=kind, branch=lambda t, h, i=i: torch.sin((i + 1) * h), label=f"s{i}", stage=i // 3)
        for i in range(count)
    ]
    return ResidualDynamics(nn.Identity(), steps, nn.Identity(), nn.Identity())


def tiny_data(count=1):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, generator=generator), torch.tensor([0, 2])) for _ in range(count)]


KINDS = [
    lesion.single,
    lesion.stage,
    partial(lesion.multiple, most=2, draws=3),
    partial(lesion.permute, most=2, draws=3),
]


# Each table against nets run by hand


@pytest.mark.parametrize("family", ["basic", "preact", "tied", "plain", "vgg", "midpoint", "hand"])
@pytest.mark.parametrize("streams", [None, 3])
def test_multiple_deletes_the_steps_it_says(family, streams):
    net, data = net_of(family), batches(family)
    units = units_of(net)
    table = lesion.multiple(view_of(net), data, most=3, draws=2, streams=streams)
    assert [(one.number, one.draw) for one in table.lesions] == [(k, n) for k in (1, 2, 3) for n in (0, 1)]
    for one in table.lesions:
        assert len(set(one.steps)) == one.number
        assert set(one.steps) <= set(deletable(units))
        is_of(one.score, net, without(units, one.steps), data)
    is_of(table.baseline, net, units, data)


@pytest.mark.parametrize("family", ["basic", "preact", "tied", "plain", "vgg", "rk4", "hand"])
@pytest.mark.parametrize("streams", [None, 3])
def test_permute_puts_the_steps_where_it_says_and_measures_their_order(family, streams):
    net, data = net_of(family), batches(family)
    units = units_of(net)
    table = lesion.permute(view_of(net), data, numbers=(1, 2, 5), draws=2, streams=streams)
    assert [(one.number, one.draw) for one in table.lesions] == [(k, n) for k in (1, 2, 5) for n in (0, 1)]
    for one in table.lesions:
        order = list(range(len(units)))
        for place, step in zip(one.steps, one.order, strict=True):
            assert place != step
            order[place] = step
        assert sorted(order) == list(range(len(units)))
        assert one.tau == pytest.approx(kendalltau(order, range(len(units))).statistic)
        assert one.number != 1 or len(one.steps) == 2
        is_of(one.score, net, reordered(units, order, range(len(units))), data)


@pytest.mark.parametrize("family", ["basic", "plain", "vgg", "midpoint", "hand"])
def test_stage_deletes_what_can_be_deleted_of_each_stage(family):
    net, data = net_of(family), batches(family)
    units = units_of(net)
    table = lesion.stage(view_of(net), data)
    assert [(one.label, one.stage) for one in table.lesions] == [
        (f"stage {i}", i) for i in sorted({unit.stage for unit in units})
    ]
    for one in table.lesions:
        assert list(one.steps) == deletable(units, one.stage)
        assert one.number == len(one.steps)
        is_of(one.score, net, without(units, one.steps), data)


def test_a_stage_of_which_nothing_can_be_deleted_has_no_score():
    steps = [
        Step(kind="residual", branch=lambda t, h: h, stage=0),
        Step(kind="transition", branch=lambda t, h: 2 * h, stage=1),
    ]
    table = lesion.stage(ResidualDynamics(nn.Identity(), steps, nn.Identity()), tiny_data())
    assert [(one.steps, one.score is None) for one in table.lesions] == [((0,), False), ((), True)]


@pytest.mark.parametrize("family", ["plain", "vgg", "hand"])
def test_layer_deletes_each_layer_without_a_shortcut_where_shapes_allow(family):
    net, data = net_of(family), batches(family)
    units, view = units_of(net), view_of(net)
    table = lesion.layer(view, data)
    layers = [i for i, unit in enumerate(units) if unit.shortcut is None and unit.movable]
    assert [one.steps for one in table.lesions] == [(i,) for i in layers]
    for one in table.lesions:
        (i,) = one.steps
        assert (one.label, one.kind, one.stage) == (view.steps[i].label, "plain", units[i].stage)
        if units[i].deletable:
            is_of(one.score, net, without(units, [i]), data)
        else:
            assert one.score is None
    assert any(one.score is None for one in table.lesions) == (family != "hand")


def test_interventions_makes_any_changes_and_says_where():
    net, data = net_of("basic"), batches("basic")
    units, view = units_of(net), view_of(net)
    changes = [scale(0.5, 1, 2), delete(4) >> swap(0, 1), noise(0.3, 3, seed=1), noise(0.3, 3, seed=2)]
    table = lesion.interventions(view, data, changes)
    assert [(one.label, one.steps) for one in table.lesions] == [
        ("scale 1, 2 by 0.5", (1, 2)),
        ("delete 4 >> swap 0 and 1", (0, 1, 4)),
        ("noise 3 of 0.3, seed 1", (3,)),
        ("noise 3 of 0.3, seed 2", (3,)),
    ]
    is_of(table.lesions[0].score, net, scaled(units, 0.5, [1, 2]), data)
    is_of(table.lesions[1].score, net, reordered(without(units, [4]), (1, 0), (0, 1)), data)
    assert table.lesions[2].score.loss != table.lesions[3].score.loss
    named = lesion.interventions(view, data, {"half": changes[0], "noisy": changes[2]})
    assert [one.label for one in named.lesions] == ["half", "noisy"]
    assert [one.score for one in named.lesions] == [table.lesions[0].score, table.lesions[2].score]
    assert lesion.interventions(view, data, changes[0]).lesions == table.lesions[:1]


def test_changes_of_one_name_are_all_made():
    same_name = [Intervention("mine", delete(i).change) for i in (0, 1)]
    table = lesion.interventions(tiny(), tiny_data(), same_name)
    assert [one.steps for one in table.lesions] == [(0,), (1,)]


@pytest.mark.parametrize(
    "change",
    [
        lambda view: view.with_steps(view.steps[:-1]),
        lambda view: ResidualDynamics(view.stem, view.steps, lambda h: h, view.model),
        lambda view: ResidualDynamics(lambda x: x, view.steps, view.head, view.model),
    ],
)
def test_a_change_of_other_parts_is_refused(change):
    with pytest.raises(InvalidInput, match="'mine' changes the stem, the head or the number"):
        lesion.interventions(tiny(), tiny_data(), [Intervention("mine", change)])


@pytest.mark.parametrize("family", ["basic", "plain", "midpoint"])
def test_deleting_one_step_at_random_is_one_of_the_single_deletions(family):
    net, data = net_of(family), batches(family)
    singles = {one.steps: one.score for one in lesion.single(view_of(net), data).made}
    for one in lesion.multiple(view_of(net), data, most=1, draws=8).lesions:
        assert one.score == singles[one.steps]


# Draws


def draws_of(table):
    return {(one.number, one.draw): (one.steps, one.order, one.score) for one in table.lesions}


@pytest.mark.parametrize("analysis", [lesion.multiple, lesion.permute])
def test_a_draw_follows_from_seed_number_and_place_alone(analysis):
    view, data, state = tiny(), tiny_data(), torch.get_rng_state()
    table = analysis(view, data, most=3, draws=3, seed=4)
    assert analysis(view, data, most=3, draws=3, seed=4) == table
    assert draws_of(analysis(view, data, most=3, draws=3, seed=5)).keys() == draws_of(table).keys()
    assert draws_of(analysis(view, data, most=3, draws=3, seed=5)) != draws_of(table)
    # More draws, or other numbers, leave those there were.
    more = draws_of(analysis(view, data, numbers=(5, 2, 3), draws=6, seed=4))
    assert all(more[key] == found for key, found in draws_of(table).items() if key[0] > 1)
    assert torch.equal(torch.get_rng_state(), state)


def counts_are_uniform(found, expected):
    """Pearson's test at the 99.9% level: the draws are fixed, so the test passes or fails for good."""
    counts = Counter(found)
    assert set(counts) == set(expected)
    each = len(found) / len(expected)
    statistic = sum((counts[key] - each) ** 2 / each for key in expected)
    assert statistic < chi2.ppf(0.999, len(expected) - 1)
    assert statistic > chi2.ppf(0.001, len(expected) - 1)  # and random: no rota


def test_the_sets_deleted_are_uniform():
    table = lesion.multiple(tiny(), tiny_data(), numbers=(2,), draws=400, streams=400)
    counts_are_uniform([one.steps for one in table.lesions], list(combinations(range(5), 2)))


def test_the_pairs_swapped_are_uniform():
    table = lesion.permute(tiny(), tiny_data(), numbers=(1,), draws=400, streams=400)
    counts_are_uniform([one.steps for one in table.lesions], list(combinations(range(5), 2)))


def test_draws_of_different_numbers_are_independent():
    table = lesion.multiple(tiny(), tiny_data(), numbers=(1, 2), draws=60)
    one, two = ([set(found.steps) for found in table.lesions if found.number == k] for k in (1, 2))
    within = sum(a <= b for a, b in zip(one, two, strict=True))
    assert abs(within - 60 * 2 / 5) < 4 * (60 * 2 / 5 * 3 / 5) ** 0.5


def test_no_swaps_leave_the_order_and_no_deletions_the_network():
    table = lesion.permute(tiny(), tiny_data(), numbers=(0,), draws=1)
    (one,) = table.lesions
    assert (one.tau, one.steps, one.order, one.score) == (1.0, (), (), table.baseline)
    table = lesion.multiple(tiny(), tiny_data(), numbers=(0,), draws=1)
    assert (table.lesions[0].steps, table.lesions[0].score) == ((), table.baseline)


def test_the_reverse_order_has_tau_minus_1():
    found = {one.number: one.tau for one in lesion.permute(tiny(2), tiny_data(), most=4, draws=1).lesions}
    assert found == {1: -1.0, 2: 1.0, 3: -1.0, 4: 1.0}


def test_only_steps_of_one_shape_and_kind_are_exchanged():
    net = net_of("midpoint")
    view, units = view_of(net), units_of(net)
    groups = {i: (unit.stage, unit.movable, unit.stage if not unit.movable else None) for i, unit in enumerate(units)}
    pairs = lesion.exchangeable(view, range(len(units)))
    assert pairs == [(i, j) for i, j in combinations(range(len(units)), 2) if groups[i] == groups[j]]
    for one in lesion.permute(view, batches("midpoint", (2,)), numbers=(6,), draws=6).lesions:
        assert all(groups[place] == groups[step] for place, step in zip(one.steps, one.order, strict=True))
    # A residual and a plain step of one shape are not of one kind.
    mixed = ResidualDynamics(nn.Identity(), [*tiny(2).steps, *tiny(2, "plain").steps], nn.Identity())
    assert lesion.exchangeable(mixed.measured(torch.randn(1, 3)), range(4)) == [(0, 1), (2, 3)]


def test_draws_keep_to_the_stages_named():
    view = view_of(net_of("basic"))
    data, stages = batches("basic", (2,)), {0: {0, 1, 2}, 1: {3, 4, 5}, 2: {6, 7, 8}}
    for asked in (0, 2, (1, 2)):
        allowed = set().union(*(stages[s] for s in ([asked] if isinstance(asked, int) else asked)))
        deleted = lesion.multiple(view, data, most=3, draws=6, stage=asked)
        assert set().union(*(one.steps for one in deleted.lesions)) == allowed
        swapped = lesion.permute(view, data, most=3, draws=6, stage=asked)
        moved = set().union(*(one.steps for one in swapped.lesions))
        assert moved == allowed - {3, 6}  # those that change the shape have nobody to swap with


def test_by_default_as_many_are_deleted_as_can_be_but_ten_at_most():
    assert {one.number for one in lesion.multiple(tiny(3), tiny_data(), draws=1).lesions} == {1, 2, 3}
    assert max(one.number for one in lesion.multiple(tiny(14), tiny_data(), draws=1).lesions) == 10
    assert {one.number for one in lesion.permute(tiny(2), tiny_data(), draws=1).lesions} == set(range(1, 11))


# Classes


def test_the_errors_of_the_classes_add_up_to_the_whole():
    net, data = net_of("basic"), batches("basic", (20, 11), classes=3)
    labels = torch.cat([labels for _, labels in data])
    counts = labels.bincount(minlength=4).tolist()
    for analysis in KINDS:
        table = analysis(view_of(net), data, by_class=True)
        for score in (table.baseline, *(one.score for one in table.made)):
            assert len(score.by_class) == 4
            assert score.by_class[3] is None  # no sample is of the fourth class
            total = sum(error * m for error, m in zip(score.by_class, counts, strict=True) if m)
            assert total == pytest.approx(score.error * 31)
    assert lesion.single(view_of(net), data).baseline.by_class is None


# Data


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.data):
            raise StopIteration
        self.at += 1
        return self.data[self.at - 1]


class PersistentLoader:
    """As a DataLoader with persistent workers: its one iterator begins anew each time that it is asked for."""

    def __init__(self, data):
        self.reader = Reader(data)

    def __iter__(self):
        self.reader.at = 0
        return self.reader


def test_data_are_gone_through_once_whatever_holds_them():
    view, data = tiny(), tiny_data(3)
    expected = lesion.single(view, data)
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, labels), batch_size=2)
    for held in (tuple(data), iter(data), (pair for pair in data), loader, iter(loader), PersistentLoader(data)):
        assert lesion.single(view, held) == expected
    assert lesion.single(view, [[x, labels] for x, labels in data]) == expected


def test_a_view_that_knows_no_shapes_learns_them_from_the_first_batch():
    steps = [Step(kind="plain", branch=lambda t, h, n=n: h @ torch.ones(h.shape[1], n)) for n in (3, 4, 4)]
    view = ResidualDynamics(nn.Identity(), steps, nn.Identity())
    assert [one.score is None for one in lesion.single(view, iter(tiny_data(2))).lesions] == [False, True, False]


class Samples(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        if i > 1:
            raise IndexError
        return torch.randn(3), i


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "there is none"),
        (Samples(), r"\(a tensor of shape \(3,\), a int\): a pair"),
        (torch.randn(4, 2, 3), r"a tensor of shape \(2, 3\): a pair"),
        ([(torch.randn(2, 3), torch.zeros(3, dtype=torch.int64))], r"shape \(2, 3\), a tensor of shape \(3,\)\)"),
        ([(torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.int64))], "labels of shape"),
        ([(torch.randn(2, 3),)], "a pair"),
        ([(torch.randn(2, 3), torch.tensor([0, 3]))], r"labels go from 0 to 3, .* 0 … 2"),
    ],
)
def test_data_that_are_no_batches_are_refused(data, says):
    with pytest.raises(InvalidInput, match=says):
        lesion.single(tiny(), data)


# Errors


@pytest.mark.parametrize(
    ("analysis", "settings", "says"),
    [
        (lesion.multiple, {"most": 6}, "most is 6: at least 1 and at most 5, of the steps that can be deleted"),
        (lesion.multiple, {"most": 0}, "most is 0: at least 1"),
        (lesion.multiple, {"numbers": (1, 6)}, r"numbers are \[1, 6\]: at least 0 and at most 5"),
        (lesion.multiple, {"numbers": ()}, r"numbers are \[\]"),
        (lesion.multiple, {"numbers": (-1,)}, r"numbers are \[-1\]"),
        (lesion.multiple, {"numbers": (1,), "most": 1}, "give one of them"),
        (lesion.multiple, {"draws": 0}, "draws is 0"),
        (lesion.multiple, {"stage": 4}, "no stage 4"),
        (lesion.permute, {"most": 0}, "most is 0: at least 1 is expected"),
        (lesion.permute, {"draws": -1}, "draws is -1"),
        (lesion.single, {"streams": 0}, "streams is 0"),
        (lesion.single, {"stream": 2}, "unknown setting of an analysis 'stream': choose from by_class, streams"),
        (lesion.single, {"draws": 2}, "unknown setting"),
        (lesion.layer, {}, "no layer without a shortcut"),
    ],
)
def test_settings_that_make_no_sense_are_refused(analysis, settings, says):
    with pytest.raises(InvalidInput, match=says):
        analysis(tiny(), tiny_data(), **settings)


def test_where_nothing_can_be_deleted_or_exchanged_nothing_is():
    steps = [Step(kind="plain", branch=lambda t, h, n=n: h @ torch.ones(h.shape[1], n)) for n in (4, 5)]
    view = ResidualDynamics(nn.Identity(), steps, nn.Identity())
    with pytest.raises(InvalidInput, match="none of these steps can be deleted"):
        lesion.multiple(view, tiny_data())
    with pytest.raises(InvalidInput, match="nothing to permute"):
        lesion.permute(view, tiny_data())


@pytest.mark.parametrize("analysis", [lesion.single, lesion.multiple, lesion.permute, lesion.stage, lesion.layer])
def test_a_model_in_place_of_its_view_is_refused_before_the_data_are_looked_at(analysis):
    def data():
        raise AssertionError
        yield

    with pytest.raises(InvalidInput, match=r"give resode\.dynamics\(net\)"):
        analysis(net_of("basic"), data())


# The model


def test_the_model_is_measured_in_evaluation_mode_and_left_in_its_own():
    net, data = net_of("basic"), batches("basic")
    expected = {analysis: analysis(dynamics(net), data) for analysis in KINDS}
    net.train()
    values = {name: value.clone() for name, value in net.state_dict().items()}
    for analysis, table in expected.items():
        assert analysis(dynamics(net), data) == table
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())


def test_lesions_of_a_changed_network_are_of_that():
    net, data = net_of("basic"), batches("basic")
    table = lesion.single((scale(0.5, 3) >> delete(1))(view_of(net)), data)
    units = without(scaled(units_of(net), 0.5, [3]), [1])
    is_of(table.baseline, net, units, data)
    for one in table.lesions:
        is_of(one.score, net, without(units, one.steps), data)
    assert isinstance(table.lesions[0], Lesion)
    assert table.lesions[1].score == table.baseline


def test_a_single_precision_network_is_measured_as_it_is():
    net, data = net_of("rk4").float(), [(x.float(), labels) for x, labels in batches("rk4")]
    table = lesion.multiple(dynamics(net), data, most=2, draws=2)
    for one in table.lesions:
        expected = measured(net, without(units_of(net), one.steps), data)
        assert one.score.loss == pytest.approx(expected[1], rel=1e-5)
    assert inputs("rk4", 1).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_labels_of_another_type_are_refused_before_anything_is_computed(dtype):
    data = [(x, labels.to(dtype)) for x, labels in tiny_data()]
    with pytest.raises(InvalidInput, match=rf"labels are of {dtype}: classes as torch.int64 are expected"):
        lesion.single(tiny(), data)
