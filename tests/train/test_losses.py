"""The losses against their equations, and the count of right answers."""

import pytest
import torch

from resode import InvalidInput
from resode.train.losses import right_answers, training_loss


def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, (6,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_its_equation_and_shares_of_one_class_are_a_label(smoothing):
    logits, labels = case()
    y = torch.eye(4, dtype=torch.float64)[labels]
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -(((1 - smoothing) * y + smoothing / 4) * log_p).sum(1).mean()
    for wanted in (labels, y.float()):
        assert float(training_loss(logits, wanted, "cross-entropy", smoothing)) == pytest.approx(
            float(expected), rel=1e-5
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_asks_each_class_by_itself(smoothing):
    logits, labels = case()
    u = (1 - smoothing) * torch.eye(4, dtype=torch.float64)[labels] + smoothing / 4
    p = torch.sigmoid(logits)
    expected = -(u * p.log() + (1 - u) * (1 - p).log()).mean()
    assert float(training_loss(logits, labels, "bce", smoothing)) == pytest.approx(float(expected), rel=1e-5)


def test_a_mixed_image_has_both_of_its_classes_for_bce_and_its_shares_for_cross_entropy():
    logits = case()[0][:1]
    shares = torch.tensor([[0.3, 0.7, 0.0, 0.0]])
    both = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    p = torch.sigmoid(logits)
    expected = -(both * p.log() + (1 - both) * (1 - p).log()).mean()
    assert float(training_loss(logits, shares, "bce")) == pytest.approx(float(expected), rel=1e-5)
    log_p = logits.log_softmax(1)[0]
    mixed = -(0.3 * log_p[0] + 0.7 * log_p[1])
    assert float(training_loss(logits, shares)) == pytest.approx(float(mixed), rel=1e-5)


@pytest.mark.parametrize(("threshold", "asked_for"), [(0.0, (1, 1, 1, 0)), (0.1, (0, 1, 1, 0)), (0.3, (0, 0, 1, 0))])
def test_bce_asks_for_the_classes_whose_share_is_above_the_threshold(threshold, asked_for):
    logits = case()[0][:1]
    shares, labels = torch.tensor([[0.1, 0.3, 0.6, 0.0]]), torch.tensor([asked_for], dtype=torch.float64)
    p = torch.sigmoid(logits)
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    found = training_loss(logits, shares, "bce", threshold=threshold)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_of_a_mixed_image_the_larger_part_counts():
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert right_answers(logits, torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.9, 0.1]])) == 2
    assert right_answers(logits, torch.tensor([1, 1, 0])) == 2


def test_an_unknown_loss_is_refused():
    with pytest.raises(InvalidInput, match="unknown loss 'hinge'"):
        training_loss(*case(), "hinge")
