"""Channels, blocks, N of M and costs in a Trainer: rounds, resume and what is left at the end."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from pruneflow import (
    NM,
    Block,
    Channels,
    Linear,
    PruningCallback,
    Reparametrize,
    latency,
    multiply_adds,
    sparsity,
)
from pruneflow.deploy import shrink
from pruneflow.structure.channels.removal import remove_channels

WAYS = {
    "channels": {"granularity": Channels()},
    "channels by cost": {"granularity": Channels(), "costs": multiply_adds, "scope": "layer"},
    "weights by cost": {"costs": multiply_adds},
    "blocks": {"granularity": Block(5, 2)},
    "2 of 4": {"granularity": NM(2, 4)},
    "by time": {"costs": latency},
}


class SaveAt(L.Callback):
    """Saves a checkpoint once, when an epoch has ended."""

    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch - 1:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def model(model):
    model.body = nn.Sequential(nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 52))
    model.example_input_array = torch.zeros(2, 20)
    return model


def fresh(model):
    other = type(model)()
    other.body = nn.Sequential(*(type(m)(*sizes(m)) for m in model.body))
    other.example_input_array = torch.zeros(2, 20)
    return other


def sizes(module):
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.num_features,) if isinstance(module, nn.BatchNorm1d) else ()


@pytest.fixture(autouse=True)
def head(monkeypatch, model):
    original = type(model).__init__

    def init(self):
        original(self)
        self.head = nn.Linear(52, 2)

    monkeypatch.setattr(type(model), "__init__", init)
    model.head = nn.Linear(52, 2)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_as_if_never_interrupted(way, model, batches, trainer, tmp_path):
    def pruning():
        return PruningCallback(Linear(0.5, 3), start_epoch=1, **WAYS[way])

    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole, path = pruning(), tmp_path / "two.ckpt"
    trainer(whole, SaveAt(3, path), max_epochs=6).fit(model, batches)
    assert whole.sparsity > (0.2 if "costs" in WAYS[way] else 0.49)
    other, resumed = fresh(model), pruning()
    other.load_state_dict(start)
    trainer(resumed, max_epochs=6).fit(other, batches, ckpt_path=path)
    assert all(torch.equal(other.state_dict()[n], v) for n, v in model.state_dict().items())
    assert resumed.cost_per_weight == whole.cost_per_weight


def test_channels_end_as_zeros_that_shrink_cuts_out(model, batches, trainer):
    trainer(PruningCallback(Linear(0.6, 2), granularity=Channels())).fit(model, batches)
    model.eval()
    points = torch.randn(5, 20)
    small = shrink(model.cpu(), points)
    assert small.body[0].out_features < 48 or small.body[3].out_features < 52
    torch.testing.assert_close(small(points), model(points))
    expected = model(points)
    remove_channels(model, points)
    assert model.body[0].out_features == small.body[0].out_features
    torch.testing.assert_close(model(points), expected)


def test_averages_lose_the_same_channels(model, batches, trainer):
    average = EMAWeightAveraging(decay=0.5)
    trainer(PruningCallback(Linear(0.5, 2), granularity=Channels()), average).fit(model, batches)
    assert 0 < int((model.body[1].weight == 0).sum()) < 48
    shrink(model.eval(), torch.randn(5, 20))


def test_reparametrized_channels(model, batches, trainer):
    pruning = PruningCallback(
        Linear(0.5, 2), granularity=Channels(), scope="layer", masking=Reparametrize()
    )
    trainer(pruning).fit(model, batches)
    dead = model.body[1].weight == 0
    assert 0 < int(dead.sum()) < 48
    assert not model.body[0].weight[dead].any()
    assert not model.body[3].weight[:, dead].any()


def test_tells_apart_what_was_removed_together(model, batches, trainer, tmp_path):
    fit = trainer(PruningCallback(Linear(0.5, 2), granularity=NM(2, 4)), max_epochs=2)
    fit.fit(model, batches)
    fit.save_checkpoint(tmp_path / "two.ckpt")
    other = PruningCallback(Linear(0.5, 2), granularity=NM(1, 2))
    with pytest.raises(ValueError, match=r"'granularity': 'NM\(n=1, m=2\)'.*NM\(n=2, m=4\)"):
        trainer(other, max_epochs=4).fit(fresh(model), batches, ckpt_path=tmp_path / "two.ckpt")


def test_names_the_layer_that_reads_the_channels_of_another_callback(model, batches, trainer):
    def callbacks(*body):
        channels = PruningCallback(Linear(0.5, 2), granularity=Channels(), include=body)
        return channels, PruningCallback(Linear(0.5, 2), include=("head.weight",))

    with pytest.raises(
        ValueError,
        match=r"share no channels .* got head\.weight \(coupled with body\.3\.weight\); `exclude`",
    ):
        trainer(*callbacks("body.*")).fit(model, batches)
    pair = callbacks("body.0.weight")  # that is, body.3.weight excluded
    trainer(*pair).fit(model, batches)
    assert all(pruning.sparsity >= 0.49 for pruning in pair)


def test_says_what_a_module_needs_for_channels_and_costs(model, batches, trainer):
    model.example_input_array = None
    for way in ({"granularity": Channels()}, {"costs": multiply_adds}):
        with pytest.raises(
            ValueError, match=r"`example_input_array` must be .* got NoneType in TwoLayers"
        ):
            trainer(PruningCallback(Linear(0.5, 2), **way)).fit(model, batches)


@pytest.mark.parametrize("example", [(torch.zeros(2, 20),), {"points": torch.zeros(2, 20)}])
def test_a_module_may_have_its_example_as_arguments(model, batches, trainer, example):
    model.example_input_array = example
    pruning = PruningCallback(Linear(0.5, 2), granularity=Channels(), costs=multiply_adds)
    trainer(pruning).fit(model, batches)
    assert pruning.sparsity > 0


def test_what_a_granularity_cannot_do_is_refused_before_training(model, batches, trainer):
    with pytest.raises(ValueError, match=r"at most 0\.5 with NM\(n=2, m=4\), got 0.9"):
        trainer(PruningCallback(Linear(0.9, 2), granularity=NM(2, 4), start_epoch=4)).fit(
            model, batches
        )
    with pytest.raises(ValueError, match=r"groups of 3 inputs, got body\.0\.weight \(48, 20\)"):
        trainer(PruningCallback(Linear(0.1, 2), granularity=NM(2, 3), start_epoch=4)).fit(
            model, batches
        )


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_examples_take_the_precision_of_the_training(precision, model, batches, trainer):
    pruning = PruningCallback(Linear(0.5, 2), granularity=Channels(), costs=multiply_adds)
    trainer(pruning, precision=precision, max_epochs=3).fit(model, batches)
    assert 0 < int((model.body[1].weight == 0).sum()) < 48


def test_what_is_logged_is_the_sparsity_of_the_weights(model, batches, trainer):
    pruning = PruningCallback(Linear(0.5, 2), granularity=Channels())
    fit = trainer(pruning, max_epochs=3)
    fit.fit(model, batches)
    assert fit.callback_metrics["sparsity"] == pytest.approx(sparsity(model), abs=1e-6)
    assert pruning.sparsity == pytest.approx(sparsity(model), abs=1e-6)


@pytest.mark.parametrize("granularity", [None, Channels()])
@pytest.mark.parametrize("power", [0.25, 0.9])
def test_another_fit_goes_on_with_the_costs_that_were_measured(
    trainer, model, batches, tmp_path, granularity, power
):
    measured = []

    def costs(module, example):
        measured.append(module)
        return multiply_adds(module, example, power=power)

    pruning = PruningCallback([0.2, 0.4, 0.5], granularity=granularity, costs=costs)
    save = SaveAt(1, tmp_path / "one.ckpt")
    with pytest.raises(ArithmeticError):
        trainer(pruning, save, Break(), max_epochs=3).fit(model, batches)
    assert pruning.round == 1
    trainer(pruning, max_epochs=3).fit(model, batches)
    assert (pruning.round, len(measured)) == (3, 1)
    assert pruning.cost_per_weight.power == power

    resumed = PruningCallback([0.2, 0.4, 0.5], granularity=granularity, costs=costs)
    trainer(resumed, max_epochs=3).fit(fresh(model), batches, ckpt_path=save.path)
    assert resumed.round == 3
    assert resumed.cost_per_weight == pruning.cost_per_weight
    assert resumed.cost_per_weight.power == power


class Break(L.Callback):
    """Breaks off after the first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        raise ArithmeticError
