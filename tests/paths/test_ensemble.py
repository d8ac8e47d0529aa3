"""Ensembles of sub-networks against sums made by hand."""

import json

import pytest
import torch
import torch.nn.functional as F

from resode import InvalidInput, NetConfig, build, dynamics
from resode.blocks import ResidualBlock
from resode.paths.ensemble import EnsembleTable, log_mean_probability, subnetworks


def net_of(**settings):
    config = {"net": "resnet", "depth": 14, "width": 4, "channels": 2, "size": (8, 8), "classes": 3, **settings}
    net = build(NetConfig(**config), seed=0)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(16, 2, 8, 8))
    return net.eval()


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 2, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def run_by_hand(net, kept, x):
    h = net.stem(x)
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    for i, block in enumerate(blocks):
        h = block(h) if i in kept else block.post(block.shortcut(h))
    return net.head(h)


@torch.no_grad()
def test_an_ensemble_averages_the_probabilities_of_its_members():
    net, data = net_of(), batches(6, 5)
    table = subnetworks(dynamics(net), data, sizes=(1, 3, 4), keep=4, seed=2)
    assert table.steps == 6
    assert [len(kept) for kept in table.kept] == [4] * 4
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    probabilities = torch.stack([run_by_hand(net, kept, x).softmax(1) for kept in table.kept])
    for kept, member in zip(table.kept, table.members, strict=True):
        z = run_by_hand(net, kept, x)
        assert member.error == pytest.approx(float((z.argmax(1) != labels).float().mean()))
        assert member.loss == pytest.approx(float(F.cross_entropy(z, labels)), rel=1e-5)
    for ensemble in table.ensembles:
        p = probabilities[: ensemble.size].mean(0)
        assert ensemble.score.error == pytest.approx(float((p.argmax(1) != labels).float().mean()))
        assert ensemble.score.loss == pytest.approx(float(F.nll_loss(p.log(), labels)), rel=1e-5)
    assert table.ensembles[0].score.loss == pytest.approx(table.members[0].loss, rel=1e-6)
    # The test can tell: sub-networks differ.
    assert len({round(member.loss, 6) for member in table.members}) == 4


def test_a_sub_network_that_keeps_all_is_the_network_and_one_that_keeps_none_its_shortcuts():
    net, data = net_of(), batches(7)
    whole = subnetworks(dynamics(net), data, sizes=(2,), keep=6)
    assert {score.loss for score in whole.members} == {whole.whole.loss}
    assert whole.ensembles[0].score.loss == pytest.approx(whole.whole.loss, rel=1e-6)
    none = subnetworks(dynamics(net), data, sizes=(1,), keep=0)
    with torch.no_grad():
        expected = F.cross_entropy(run_by_hand(net, (), data[0][0]), data[0][1])
    assert none.members[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_a_probability_keeps_that_share():
    table = subnetworks(dynamics(net_of(depth=20)), batches(2), sizes=(60,), keep=0.3)
    share = sum(len(kept) for kept in table.kept) / (60 * 9)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 540) ** 0.5
    assert len({len(kept) for kept in table.kept}) > 1


def test_the_seed_decides_and_the_random_state_is_left_alone():
    view, data, state = dynamics(net_of()), batches(4), torch.get_rng_state()
    table = subnetworks(view, data, sizes=(3,), seed=1)
    assert subnetworks(view, data, sizes=(3,), seed=1) == table
    assert subnetworks(view, data, sizes=(3,), seed=2).kept != table.kept
    assert torch.equal(torch.get_rng_state(), state)


def test_an_ode_net_has_sub_networks_of_solver_steps():
    table = subnetworks(dynamics(net_of(net="odenet", steps=3)), batches(4), sizes=(1,), keep=0.5)
    assert table.steps == 3 * 3 + 2


def test_the_log_of_a_mean_of_probabilities():
    logits = [torch.randn(5, 3, dtype=torch.float64) for _ in range(4)]
    expected = torch.stack([z.softmax(1) for z in logits]).mean(0).log()
    torch.testing.assert_close(log_mean_probability(logits).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_table_survives_json():
    table = subnetworks(dynamics(net_of()), batches(4), sizes=(1, 2), by_class=True)
    assert EnsembleTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert 0.0 <= table.member_error <= 1.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 7}, "keep is 7: .* from 0 to 6"),
        ({"keep": 1.5}, r"keep is 1\.5"),
        ({"keep": -1}, "keep is -1"),
        ({"sizes": ()}, r"sizes of ensembles are \[\]"),
        ({"sizes": (0, 1)}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        subnetworks(dynamics(net_of()), batches(2), **settings)


def test_a_plain_net_has_no_sub_networks_and_no_data_is_an_error():
    with pytest.raises(InvalidInput, match="no residual step"):
        subnetworks(dynamics(net_of(net="plain")), batches(2))
    with pytest.raises(InvalidInput, match="there is none"):
        subnetworks(dynamics(net_of()), [])


def test_a_net_in_the_place_of_its_view_and_data_without_labels_are_refused():
    with pytest.raises(InvalidInput, match="a view of a network is expected, and this is a Net"):
        subnetworks(net_of(), batches(2))
    with pytest.raises(InvalidInput, match="a pair"):
        subnetworks(dynamics(net_of()), [x for x, _ in batches(2)])
