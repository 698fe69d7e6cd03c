"""A learning rate that has nearly decayed before the last rounds is noticed, others are not."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from two_layers import TwoLayers

from pruneflow import Compounding, Cubic, Linear, OneShot, PruningCallback

EPOCHS, BATCHES = 20, 4


class Scheduled(TwoLayers):
    def __init__(self, schedule, interval="epoch", **settings):
        super().__init__()
        self.schedule, self.interval = schedule, interval
        self.settings = {"lr": 0.1, "momentum": 0.9} | settings

    def configure_optimizers(self):
        groups = [{"params": self.body.parameters()}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, **self.settings)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        entry = {"scheduler": scheduler, "interval": self.interval, "monitor": "val_accuracy"}
        return [optimizer], [entry]


@pytest.fixture
def said(trainer, batches):
    """What a fit with rounds at epochs 0, 5, 10 and 15 of 20 warns of."""

    def fit(model, **settings):
        four = {"schedule": Compounding(target=0.9, rounds=4), "epochs_per_round": 5}
        pruning = PruningCallback(**(four | settings))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(pruning, max_epochs=EPOCHS).fit(model, batches)
        return [str(w.message) for w in caught if "learning rate" in str(w.message)]

    return fit


@pytest.mark.parametrize(
    ("schedule", "interval", "round"),
    [
        (lambda o: schedulers.CosineAnnealingLR(o, EPOCHS), "epoch", 4),
        (lambda o: schedulers.CosineAnnealingLR(o, EPOCHS * BATCHES), "step", 4),
        (lambda o: schedulers.OneCycleLR(o, 0.1, EPOCHS * BATCHES, pct_start=0.05), "step", 4),
        (lambda o: schedulers.ExponentialLR(o, 0.8), "epoch", 3),
        (lambda o: schedulers.MultiStepLR(o, [8, 12]), "epoch", 3),
        (lambda o: schedulers.PolynomialLR(o, EPOCHS, power=2), "epoch", 4),
        (lambda o: schedulers.LambdaLR(o, lambda epoch: 0.75**epoch), "epoch", 3),
    ],
)
def test_is_said_once_of_the_first_round_that_suffers(said, schedule, interval, round):
    (message,) = said(Scheduled(schedule, interval))
    assert message.startswith(f"Round {round} of 4 prunes 43.8 % of the remaining weights at")
    assert 'use rewind="learning_rate"' in message


def test_is_said_by_steps_and_of_a_single_round_too(said):
    cosine = Scheduled(lambda o: schedulers.CosineAnnealingLR(o, EPOCHS))
    by_steps = {"epochs_per_round": None, "steps_per_round": 5 * BATCHES}
    assert len(said(cosine, **by_steps)) == 1
    (message,) = said(cosine, schedule=OneShot(0.9), start_epoch=15)
    assert message.startswith("Round 1 of 1 prunes 90 %")


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Scheduled(lambda o: schedulers.CosineAnnealingLR(o, EPOCHS)), {"rewind": "learning_rate"}),
        (Scheduled(None), {}),
        (Scheduled(None, lr=1e-5), {}),
        (Scheduled(lambda o: schedulers.ConstantLR(o, 1.0, 1), lr=1e-5), {}),
        (Scheduled(lambda o: schedulers.LambdaLR(o, lambda epoch: (epoch + 1) / 30)), {}),
        (Scheduled(lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5)), {}),
        # A schedule that removes next to nothing in its last rounds, at low rates on purpose.
        (
            Scheduled(lambda o: schedulers.CosineAnnealingLR(o, EPOCHS)),
            {"schedule": Cubic(0.9, 16), "epochs_per_round": 1},
        ),
        # One of two groups goes on as it was.
        (Scheduled(lambda o: schedulers.LambdaLR(o, [lambda e: 0.5**e, lambda e: 1.0])), {}),
    ],
)
def test_is_not_said(said, model, settings):
    assert said(model, **settings) == []


def test_each_fit_has_its_own_highest_rate(said, trainer, batches):
    pruning = PruningCallback(Linear(0.9, 2), epochs_per_round=1)
    trainer(max_epochs=1).fit(Scheduled(None, lr=0.1), batches)
    trainer(pruning, max_epochs=2).fit(Scheduled(None, lr=1e-4), batches)  # warnings are errors
