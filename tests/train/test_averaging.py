"""Averages of weights along a training, against their recursions step by step."""

import pytest
import torch
from torch import nn

from resode import InvalidInput
from resode.train.averaging import Average, Averaging

STEPS, EPOCH = 12, 4


def walk(settings, model=None, restart=None):
    """Weights that move in a known way; the averaging of them, and all the weights met."""
    model = model or nn.Linear(2, 1, bias=False).double()
    averaging, met = Averaging(model, settings, STEPS, EPOCH), []
    for step in range(STEPS):
        with torch.no_grad():
            model.weight += torch.tensor([[1.0, -0.5]], dtype=torch.float64) * (step + 1)
        averaging.after_step(step)
        met.append(model.weight.detach().clone())
    return averaging, met


def averaged(averaging):
    with averaging.evaluated() as model:
        return model.weight.detach().clone()


def test_ema_is_its_recursion_from_its_start_on():
    averaging, met = walk(Average(kind="ema", decay=0.4, start=0.25))
    expected = met[3]
    # The decay grows: 2/11, 3/12, 4/13, 5/14, 6/15 = 0.4, and stays there.
    for n, w in enumerate(met[4:], 1):
        d = min(0.4, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * w
    torch.testing.assert_close(averaged(averaging), expected)


def test_of_a_short_training_the_first_weights_do_not_stay_in_the_ema():
    averaging, met = walk(Average(kind="ema", decay=0.999))
    gap = (averaged(averaging) - met[-1]).norm() / (met[0] - met[-1]).norm()
    assert gap < 0.25


def test_swa_is_the_mean_of_the_weights_at_the_ends_of_epochs():
    averaging, met = walk(Average(kind="swa", start=0.5))
    torch.testing.assert_close(averaged(averaging), (met[7] + met[11]) / 2)


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_lookahead_goes_on_from_the_slow_weights(power):
    model = nn.Linear(2, 1, bias=False).double()
    slow = fast = model.weight.detach().clone()
    averaging, met = walk(Average(kind="lookahead", decay=0.8, every=3, power=power), model)
    for step in range(STEPS):
        fast = fast + torch.tensor([[1.0, -0.5]], dtype=torch.float64) * (step + 1)
        if (step + 1) % 3 == 0:
            d = 0.8 * ((step + 1) / STEPS) ** power
            slow = fast = d * slow + (1 - d) * fast
        torch.testing.assert_close(met[step], fast)
    torch.testing.assert_close(averaged(averaging), slow)
    torch.testing.assert_close(model.weight.detach(), fast)


def test_without_an_average_the_model_itself_is_evaluated():
    averaging, met = walk(Average())
    torch.testing.assert_close(averaged(averaging), met[-1])


def test_running_statistics_are_averaged_too():
    model = nn.Sequential(nn.BatchNorm1d(1))
    averaging = Averaging(model, Average(kind="ema", decay=0.5), 2, 2)
    for step, mean in enumerate((2.0, 13.0)):
        model[0].running_mean.fill_(mean)
        averaging.after_step(step)
    with averaging.evaluated() as judged:
        assert float(judged[0].running_mean) == pytest.approx((2 * 2.0 + 9 * 13.0) / 11)


@pytest.mark.parametrize("kind", ["ema", "swa", "lookahead"])
def test_what_was_averaged_survives_an_interruption(kind):
    settings = Average(kind=kind, decay=0.7)
    model = nn.Linear(2, 1, bias=False).double()
    averaging, _ = walk(settings, model)
    again = Averaging(model, settings, STEPS, EPOCH)
    again.load_state_dict(averaging.state_dict())
    torch.testing.assert_close(averaged(again), averaged(averaging), rtol=0, atol=0)


def test_a_restart_forgets_the_weights_so_far():
    averaging, met = walk(Average(kind="ema"))
    averaging.restart()
    torch.testing.assert_close(averaged(averaging), met[-1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "mode"}, "unknown average 'mode'"),
        ({"decay": 1.0}, "decay of the average is 1.0"),
        ({"start": -0.1}, "start of the average is -0.1"),
        ({"every": 0}, "every of the average is 0"),
        ({"power": -1.0}, "power of the average is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(InvalidInput, match=says):
        Average(**settings)
