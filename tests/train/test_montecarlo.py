"""Monte Carlo dropout against closed forms, and against the sum over all masks."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resode import Dropout, InvalidInput, NetConfig, ODEBlock, Stack, build
from resode.cli import main
from resode.layers.conv import Linear
from resode.layers.dropout import DROPOUTS
from resode.layers.dropout import Dropout as DropoutLayer
from resode.train import evaluate
from resode.train.dropout_epochs import DropoutEpochs
from resode.train.montecarlo import Prediction, monte_carlo, predict, sampling


def net_of(net="resnet", kind="unit", norm="batch", p=0.3, **settings):
    stack = Stack(norm=norm, dropout=Dropout(kind, p))
    config = NetConfig(net=net, depth=14, width=4, steps=2, channels=1, size=(8, 8), classes=3, stack=stack, **settings)
    return build(config, 0)


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Closed forms


def test_a_linear_model_has_the_logits_of_the_closed_form():
    # z = W (m ∘ x)/(1 − p): E z = W x and Var z_k = p/(1 − p) Σ_i (W_ki x_i)².
    p, T = 0.3, 20_000
    torch.manual_seed(0)
    model = nn.Sequential(DropoutLayer(p), nn.Linear(6, 3, bias=False)).double()
    x = torch.randn(1, 6, dtype=torch.float64)
    logits = predict(model, x, T, generator=seeded()).logits[:, 0]
    weight = model[1].weight.detach()
    mean, variance = weight @ x[0], p / (1 - p) * (weight * x).square().sum(1)
    assert torch.all((logits.mean(0) - mean).abs() < 5 * (variance / T).sqrt())
    # The variance of a sample variance is (μ₄ − σ⁴)/T, and μ₄ < 4σ⁴ here.
    assert torch.all((logits.var(0) / variance - 1).abs() < 5 * math.sqrt(3 / T))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x)[0], mean)


class Small(nn.Module):
    """Dropout of 3 inputs, and of 2 hidden units: 32 nets, equally likely for p = 1/2."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(3, 2), nn.Linear(2, 3)
        self.drops = nn.ModuleList([DropoutLayer(0.5), DropoutLayer(0.5)])

    def forward(self, x):
        return 3.0 * self.two(self.drops[1](torch.tanh(self.one(self.drops[0](x)))))

    @torch.no_grad()
    def enumerated(self, x):
        """z(x; m) for all masks m, (32, B, 3)."""
        ends = []
        for bits in product([0.0, 2.0], repeat=5):
            h = torch.tanh(self.one(x * torch.tensor(bits[:3], dtype=x.dtype)))
            ends.append(3.0 * self.two(h * torch.tensor(bits[3:], dtype=x.dtype)))
        return torch.stack(ends)


def by_definition(logits):
    """Mean, variance, entropy, expected entropy of one sample's logits (T, K), with Python's own sums."""
    ps = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits.tolist()]
    T, K = len(ps), len(ps[0])
    mean = [sum(p[k] for p in ps) / T for k in range(K)]
    variance = [sum((p[k] - mean[k]) ** 2 for p in ps) / T for k in range(K)]
    entropy = -sum(q * math.log(q) for q in mean)
    expected = -sum(q * math.log(q) for p in ps for q in p) / T
    return mean, variance, entropy, expected


def test_means_variances_and_entropies_are_those_of_the_definitions():
    model, x = Small().double(), torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    exact = Prediction(model.enumerated(x))
    for i in range(4):
        mean, variance, entropy, expected = by_definition(exact.logits[:, i])
        assert exact.mean[i].tolist() == pytest.approx(mean, rel=1e-12)
        assert exact.variance[i].tolist() == pytest.approx(variance, rel=1e-12)
        assert float(exact.entropy[i]) == pytest.approx(entropy, rel=1e-12)
        assert float(exact.expected_entropy[i]) == pytest.approx(expected, rel=1e-12)
        assert float(exact.mutual_information[i]) == pytest.approx(entropy - expected, rel=1e-9)
        assert entropy - expected > 0.01


def test_samples_tend_to_the_sum_over_all_masks():
    model, x = Small().double(), torch.randn(2, 3, dtype=torch.float64, generator=seeded())
    exact, T = Prediction(model.enumerated(x)), 4000
    found = predict(model, x, T, generator=seeded())
    known = {tuple(round(v, 9) for v in z) for z in exact.logits.flatten(0, 1).tolist()}
    drawn = [tuple(round(v, 9) for v in z) for z in found.logits.flatten(0, 1).tolist()]
    assert set(drawn) == known  # each of the 2 · 32, and nothing else
    assert torch.all((found.mean - exact.mean).abs() < 5 * (exact.variance / T).sqrt())
    assert torch.allclose(found.variance, exact.variance, rtol=0.1)
    assert torch.allclose(found.mutual_information, exact.mutual_information, rtol=0.1)


def test_a_solve_has_one_mask():
    # dh_i/dt = m_i a_i h_i/(1 − p): h_i(1) = h_i(0)·R(2 a_i)ⁿ or h_i(0), with one mask for all stages and steps.
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.rates, self.drop = nn.Parameter(torch.tensor([0.3, -0.5])), DropoutLayer(0.5)

        def forward(self, t, h):
            return self.drop(self.rates * h)

    x = torch.tensor([[1.0, 2.0]])
    model = ODEBlock(Field(), "rk4", steps=3)
    z = 2 * model.branch.rates.detach() / 3
    grown = (1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24) ** 3
    known = {tuple(round(float(v), 5) for v in x[0] * torch.where(torch.tensor(m), grown, 1.0)) for m in BITS}
    ends = predict(model, x, 100, generator=seeded()).logits[:, 0]
    assert {tuple(round(v, 5) for v in end) for end in ends.tolist()} == known


BITS = list(product([False, True], repeat=2))


def test_dropconnect_draws_a_mask_of_the_weights():
    model = Linear(2, 2, bias=False, dropconnect=0.5)
    x, weight = torch.tensor([[1.0, 1.0]]), model.weight.detach()
    ends = predict(model, x, 200, generator=seeded()).logits[:, 0]
    masks = [torch.tensor(bits).view(2, 2) for bits in product([0.0, 2.0], repeat=4)]
    known = {tuple(round(float(v), 5) for v in (weight * mask) @ x[0]) for mask in masks}
    assert {tuple(round(v, 5) for v in end) for end in ends.tolist()} == known


def test_one_sample_knows_of_no_disagreement_and_none_is_below_0():
    model, x = Small(), torch.randn(50, 3, generator=seeded())
    one = predict(model, x, 1)
    assert not one.variance.any()
    assert float(one.mutual_information.max()) < 1e-12
    few = predict(model, 100 * x, 7)
    assert float(few.mutual_information.min()) >= 0.0
    assert torch.all(few.entropy <= math.log(3) + 1e-12)


def test_answers_that_are_as_good_as_certain_stay_finite():
    logits = torch.tensor([[[0.0, 2000.0]], [[0.0, 2000.0]]])
    found = Prediction(logits)
    assert found.log_mean.tolist() == [[-2000.0, 0.0]]
    assert found.entropy.tolist() == found.expected_entropy.tolist() == [0.0]


# What is active, and what is left alone


@pytest.mark.parametrize("net", ["resnet", "odenet"])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_of_every_kind_samples_and_nothing_else_changes(net, kind):
    model = net_of(net, kind)
    ((x, _),) = batches(5)
    model(x)  # statistics that are not those of the beginning
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    modes = [module.training for module in model.modules()]
    held = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = predict(model, x, 3, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert not found.logits.requires_grad
    assert found.variance.sum(-1).min() > 0
    assert torch.equal(predict(model, x, 3, generator=seeded(1)).logits, found.logits)
    assert not torch.equal(predict(model, x, 3, generator=seeded(2)).logits, found.logits)


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_batch_norm_evaluates(net):
    # Samples do not see each other: alone, or in a batch, masks of the whole batch give each the same.
    model, (x, _) = net_of(net, "dropconnect"), batches(4)[0]
    one = predict(model, x, 3, generator=seeded()).logits
    other = predict(model, x[:2], 3, generator=seeded()).logits
    torch.testing.assert_close(one[:, :2], other, rtol=1e-4, atol=1e-5)


def test_a_random_end_of_the_solves_is_not_drawn():
    model, (x, _) = net_of("odenet", steer=0.5, p=1e-9), batches(4)[0]
    found = predict(model, x, 4).logits
    assert torch.equal(found[0], found[3])


def test_layers_of_others_are_sampled():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    assert predict(model, torch.ones(1, 3), 20).variance.min() > 0


# Over data


@pytest.mark.parametrize("net", ["resnet", "odenet"])
def test_scores_are_those_of_the_mean_and_of_the_net_without_dropout(net):
    model, data = net_of(net, norm="group"), batches(5, 3)
    found = monte_carlo(model, iter(data), samples=4, seed=3)
    plain = evaluate(model, data)
    assert found.deterministic.accuracy == plain.accuracy
    assert found.deterministic.loss == pytest.approx(plain.loss, rel=1e-6)
    generator = seeded(3)
    parts = [predict(model, x, 4, generator=generator) for x, _ in data]
    mean, labels = torch.cat([part.mean for part in parts]), torch.cat([labels for _, labels in data])
    torch.testing.assert_close(found.mean, mean)
    assert found.of_mean.loss == pytest.approx(float(F.nll_loss(mean.log(), labels)), rel=1e-9)
    assert found.of_mean.accuracy == float((mean.argmax(1) == labels).double().mean())
    assert found.of_mean.count == found.deterministic.count == 8
    torch.testing.assert_close(found.variance, torch.cat([part.variance.sum(1) for part in parts]))
    torch.testing.assert_close(found.mutual_information, torch.cat([part.mutual_information for part in parts]))
    values = found.to_dict()
    assert values["mutual_information"] == pytest.approx(values["entropy"] - values["expected_entropy"])
    assert values["samples"] == 4
    assert values["deterministic"]["count"] == 8
    # The masks of the second batch are others than those of the first.
    again = monte_carlo(model, [data[0], data[0]], samples=4)
    assert not torch.equal(again.mean[:5], again.mean[5:])


def test_transformers_of_torchs_are_sampled_too():
    """In evaluation without gradients torch has a fast path through them that knows of no dropout."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.3, batch_first=True)
    attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    for model in (layer, Attending()):
        found = predict(nn.Sequential(model, nn.Flatten(), nn.Linear(24, 3)), torch.randn(5, 3, 8), samples=4)
        assert (found.variance > 0.0).all()
    assert torch.backends.mha.get_fastpath_enabled()


# Refusals


def test_a_net_without_dropout_is_refused():
    with pytest.raises(InvalidInput, match=r"this one has none: train with --dropout.p 0.1"):
        predict(net_of(p=0.0), batches(2)[0][0])
    with pytest.raises(InvalidInput, match="this one has none"), sampling(nn.Linear(2, 2)):
        pass
    model = net_of()
    DropoutEpochs("early", 1).replay(model, 2)
    with pytest.raises(InvalidInput, match="ended at p = 0"):
        predict(model, batches(2)[0][0])


@pytest.mark.parametrize("samples", [0, -1, 2.5])
def test_a_number_of_samples_that_makes_no_sense_is_refused(samples):
    with pytest.raises(InvalidInput, match="samples of Monte Carlo dropout"):
        predict(net_of(), batches(2)[0][0], samples)


def test_no_data_is_refused():
    with pytest.raises(InvalidInput, match="the split is empty"):
        monte_carlo(net_of(), [])


def test_the_command_line(tmp_path, capsys):
    settings = "--data moons --kind mlp --steps 2 --epochs 1 --batch-size 400 --net odenet"
    small = settings.split()
    main(["train", *small, "--dropout.p", "0.2", "--out", str(tmp_path / "dropped")])
    main(["train", *small, "--out", str(tmp_path / "whole")])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "dropped"), "--mc-samples", "5"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("test: accuracy")
    assert said[1].startswith("mean of 5 masks: accuracy")
    assert "calibration error" in said[1]
    assert "mutual information" in said[2]
    main(["evaluate", str(tmp_path / "dropped"), "--mc-samples", "5"])
    assert capsys.readouterr().out.splitlines() == said
    with pytest.raises(SystemExit) as leave:
        main(["evaluate", str(tmp_path / "whole"), "--mc-samples", "5"])
    assert leave.value.code == 1
    assert "Monte Carlo dropout needs a net that was trained with dropout" in capsys.readouterr().err
