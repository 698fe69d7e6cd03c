"""Ways of training that need checks of their own."""

import copy

import lightning as L
import pytest
import torch
from learners import Backbone, Learner, layers, mlp, points
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from watching import Watch

from pruneflow import InPlace, Linear, OneShot, PruningCallback, Reparametrize, sparsity

both = pytest.mark.parametrize("masking", [InPlace, Reparametrize])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mlp()


class Graphs(L.Callback):
    """Counts, after each epoch, what has been compiled so far."""

    def __init__(self):
        self.counts = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts.append(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("part", [False, True])
@both
def test_rounds_recompile_nothing(trainer, model, masking, part):
    torch._dynamo.reset()
    counters.clear()
    if part:
        model.network = torch.compile(model.network, backend="aot_eager")
    keys = list(model.state_dict())
    graphs, pruning = Graphs(), PruningCallback(Linear(0.8, 3), start_epoch=1, masking=masking())
    # Of the whole module Lightning's own `log` is compiled too, anew as its state changes.
    fit = trainer(pruning, Watch(), graphs, limit_val_batches=1.0 if part else 0)
    fit.fit(model if part else torch.compile(model, backend="eager"))
    dense, round_one, *more_rounds = graphs.counts
    assert dense > 0
    # Round 1 of Reparametrize puts a hook into the forward pass, which makes it another graph.
    assert (round_one == dense) == (masking is InPlace)
    assert more_rounds == [round_one] * 4
    assert sparsity(model) == 0.8
    assert list(model.state_dict()) == keys
    assert trainer().validate(model, verbose=False)[0]["val_accuracy"] > 0.85


class Still(Learner):
    """All gradients are zero, so that whatever moves a weight is weight decay."""

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        first, last = self.network[0], self.network[2]
        groups = [
            {"params": first.parameters(), "weight_decay": 0.5},
            {"params": last.parameters(), "weight_decay": 0.0},
        ]
        return self.make_optimizer(groups, lr=0.1)


@both
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_decay_moves_survivors_only_and_by_group(trainer, masking, optimizer):
    model = Still(layers(), points, optimizer)
    before = copy.deepcopy(model.state_dict())
    trainer(PruningCallback(OneShot(0.5), masking=masking()), Watch(), max_epochs=2).fit(model)
    assert sparsity(model) == 0.5
    for layer, factor in (("network.0", (1 - 0.1 * 0.5) ** 16), ("network.2", 1)):
        weight = model.get_parameter(f"{layer}.weight").detach()
        torch.testing.assert_close(weight, factor * before[f"{layer}.weight"] * (weight != 0))


@pytest.fixture(
    params=[
        (parametrizations.weight_norm, "network.0.parametrizations.weight.original1"),
        (parametrizations.spectral_norm, "network.0.parametrizations.weight.original"),
        (nn.utils.weight_norm, "network.0.weight_v"),
        (nn.utils.spectral_norm, "network.0.weight_orig"),
    ],
    ids=["weight_norm", "spectral_norm", "weight_norm, old", "spectral_norm, old"],
)
def normalised(request, model):
    """A model whose first weight is computed from another parameter, and that one's name."""
    how, name = request.param
    how(model.network[0])
    return model, name


OLD = "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"


@pytest.mark.filterwarnings(OLD)
@both
def test_a_normalised_weight_is_refused_by_name(trainer, normalised, masking):
    model, name = normalised
    pruning = PruningCallback(OneShot(0.8), masking=masking())
    with pytest.raises(ValueError, match=rf"network\.0\.weight.*{name}"):
        trainer(pruning).fit(model)


@pytest.mark.filterwarnings(OLD)
@both
def test_a_normalised_layer_may_be_left_dense_by_name(trainer, normalised, masking):
    model, _ = normalised
    pruning = PruningCallback(OneShot(0.8), exclude=["network.0.*"], masking=masking())
    trainer(pruning, Watch(), max_epochs=2).fit(model)
    assert int((model.network[0].weight == 0).sum()) == 0
    assert int((model.network[2].weight == 0).sum()) == 64


@pytest.mark.filterwarnings(OLD)
def test_what_a_normalised_weight_is_computed_from_is_pruned_when_named(trainer, normalised):
    model, name = normalised
    pruning = PruningCallback(
        Linear(0.8, 2), start_epoch=2, include=["network.2.weight", name], masking=InPlace()
    )
    fit = trainer(pruning, Watch(), max_epochs=8)
    fit.fit(model)
    assert fit.callback_metrics["val_accuracy"] > 0.85
    model(torch.zeros(1, 20))  # the old hooks compute the weight only then
    zeros = [int((layer.weight == 0).sum()) for layer in (model.network[0], model.network[2])]
    assert sum(zeros) == 704
    assert zeros[0] == int((model.get_parameter(name) == 0).sum())


@pytest.mark.filterwarnings(OLD)
def test_reparametrize_refuses_what_a_weight_is_computed_from(trainer, normalised):
    model, name = normalised
    pruning = PruningCallback(OneShot(0.8), include=[name], masking=Reparametrize())
    with pytest.raises(ValueError, match=rf"{name} \(.*InPlace"):
        trainer(pruning).fit(model)


@both
def test_several_callbacks_prune_disjoint_layers(trainer, model, masking, tmp_path):
    def make():
        first = PruningCallback(
            Linear(0.9, 3), start_epoch=2, exclude=["network.2.*"], masking=masking()
        )
        last = PruningCallback(OneShot(0.5), start_epoch=3, include=["network.2.*"])
        return first, last

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    first, last = make()
    whole = trainer(first, last, Watch(), Save(), max_epochs=8)
    whole.fit(model)
    assert (first.sparsity, last.sparsity) == (0.9, 0.5)
    assert [int((model.network[i].weight == 0).sum()) for i in (0, 2)] == [720, 40]
    assert whole.callback_metrics["sparsity/network.0.weight"] == pytest.approx(0.9)
    assert whole.callback_metrics["sparsity/network.2.weight"] == 0.5
    assert whole.callback_metrics["val_accuracy"] > 0.85
    assert first.state_key != last.state_key
    other = mlp()
    trainer(*reversed(make()), Watch(), max_epochs=8).fit(other, ckpt_path=tmp_path / "four.ckpt")
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_callbacks_that_overlap_are_refused_by_name(trainer, model):
    callbacks = PruningCallback(OneShot(0.9)), PruningCallback(OneShot(0.5), include=["*.0.weight"])
    with pytest.raises(ValueError, match=r"network\.0\.weight"):
        trainer(*callbacks).fit(model)
    assert sparsity(model) == 0


def test_one_masking_for_two_callbacks_is_refused_by_name(trainer, model):
    masking = InPlace()
    callbacks = [
        PruningCallback(OneShot(0.5), include=[name], masking=masking)
        for name in ("network.0.weight", "network.2.weight")
    ]
    with pytest.raises(ValueError, match="`masking`"):
        trainer(*callbacks).fit(model)


class Stream(IterableDataset):
    """Does not know how long it is."""

    def __iter__(self):
        return zip(*points(seed=1), strict=True)


@both
def test_steps_of_a_stream_without_a_length(trainer, model, masking):
    pruning = PruningCallback(Linear(0.8, 3), start_step=8, steps_per_round=8, masking=masking())
    fit = trainer(pruning, Watch())
    fit.fit(model, DataLoader(Stream(), batch_size=32), model.val_dataloader())
    assert (pruning.round, sparsity(model)) == (3, 0.8)
    assert fit.callback_metrics["val_accuracy"] > 0.85


class Silent(Learner):
    """Logs nothing."""

    def validation_step(self, batch, batch_idx):
        self(batch[0])


@both
def test_barebones_is_not_told_what_it_does_not_log(trainer, masking):
    model = Silent(layers(), points)
    trainer(PruningCallback(Linear(0.8, 3), masking=masking()), barebones=True).fit(model)
    assert sparsity(model) == 0.8


@both
@pytest.mark.parametrize("clock", ["epoch", "step"])
@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run_reaches_the_target(trainer, model, masking, clock, batches):
    clocks = {f"start_{clock}": 50, f"{clock}s_per_round": 20}
    pruning = PruningCallback(Linear(0.9, 3), masking=masking(), **clocks)
    trainer(pruning, fast_dev_run=batches).fit(model)
    assert sparsity(model) == pruning.sparsity == 0.9
    assert list(model.state_dict()) == list(mlp().state_dict())


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(0.01, 1)])
@pytest.mark.parametrize("order", [1, -1])
def test_fast_dev_run_of_averages(trainer, model, averaging, order):
    callbacks = PruningCallback(OneShot(0.9)), averaging()
    trainer(*callbacks[::order], fast_dev_run=True).fit(model)
    assert sparsity(model) == 0.9


@both
def test_max_time_ends_below_the_target_and_a_second_fit_goes_on(trainer, model, masking):
    pruning = PruningCallback(Linear(0.9, 3), epochs_per_round=2, masking=masking())
    with pytest.warns(UserWarning, match=r"round 1 of 3, at sparsity 0\.3"):
        trainer(pruning, Watch(), max_time={"microseconds": 1}).fit(model)
    assert sparsity(model) == pruning.sparsity == pytest.approx(0.3)
    early = {name: value == 0 for name, value in model.state_dict().items()}
    fit = trainer(pruning, Watch(), max_epochs=8)
    fit.fit(model)
    assert sparsity(model) == pytest.approx(0.9)
    assert all((value == 0)[early[name]].all() for name, value in model.state_dict().items())
    assert fit.callback_metrics["val_accuracy"] > 0.85


def test_a_training_that_has_no_time_to_begin_says_where_it_ended(trainer, model):
    pruning = PruningCallback(Linear(0.9, 3))
    with pytest.warns(UserWarning, match=r"round 0 of 3, at sparsity 0\.0000, below the target"):
        trainer(pruning, max_time={"seconds": 0}).fit(model)


@both
def test_max_time_without_max_epochs(trainer, model, masking):
    pruning = PruningCallback(Linear(0.9, 3), start_step=1, steps_per_round=4, masking=masking())
    fit = trainer(pruning, Watch(), max_time={"days": 1}, max_epochs=None, max_steps=12)
    fit.fit(model)
    assert (fit.global_step, pruning.round) == (12, 3)
    assert sparsity(model) == pytest.approx(0.9)


def ema():
    return WeightAveraging(avg_fn=get_ema_avg_fn(0.9))


def swa():
    return StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2)


@pytest.mark.parametrize("averaging", [ema, swa])
@pytest.mark.parametrize("order", [1, -1])
def test_averages_resume_as_if_never_stopped(trainer, model, averaging, order, tmp_path):
    def callbacks():
        return [PruningCallback(Linear(0.9, 3), start_epoch=1), averaging()][::order]

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    trainer(*callbacks(), Watch(), Save()).fit(model)
    other = mlp()
    trainer(*callbacks(), Watch()).fit(other, ckpt_path=tmp_path / "three.ckpt")
    assert sparsity(model) == pytest.approx(0.9)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_average_may_be_added_on_resume(trainer, model, tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    trainer(PruningCallback(Linear(0.9, 3)), Save(), max_epochs=4).fit(model)
    other, added = mlp(), StochasticWeightAveraging(0.01, swa_epoch_start=6)
    resumed = trainer(PruningCallback(Linear(0.9, 3)), added, Watch())
    resumed.fit(other, ckpt_path=tmp_path / "four.ckpt")
    assert sparsity(other) == pytest.approx(0.9)


@both
@pytest.mark.parametrize(
    "finder", [LearningRateFinder(1e-4, 0.1, 20), BatchSizeFinder(max_trials=1)]
)
def test_a_search_before_a_second_fit_leaves_the_zeros(trainer, model, masking, finder):
    pruning, watch = PruningCallback(OneShot(0.9), masking=masking()), Watch()
    trainer(pruning, max_epochs=1).fit(model)
    before = {name: value == 0 for name, value in model.state_dict().items()}
    trainer(finder, pruning, watch, max_epochs=2).fit(model)
    assert watch.sparsities == [0.9, 0.9]
    assert all(torch.equal(value == 0, before[n]) for n, value in model.state_dict().items())


@both
def test_a_backbone_that_was_unfrozen_resumes(trainer, masking, tmp_path):
    def callbacks():
        finetuning = BackboneFinetuning(1, lambda _: 1.0, backbone_initial_lr=0.03)
        return finetuning, PruningCallback(Linear(0.8, 3), start_epoch=2, masking=masking())

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    torch.manual_seed(0)
    trainer(*callbacks(), Save()).fit(Backbone())
    other = Backbone()
    trainer(*callbacks(), Watch()).fit(other, ckpt_path=tmp_path / "three.ckpt")
    weights = other.backbone[0].weight, other.head.weight
    assert sum(int((weight == 0).sum()) for weight in weights) == 704


@both
def test_a_layer_may_be_frozen_between_two_fits(trainer, model, masking):
    pruning, watch = PruningCallback(OneShot(0.9), masking=masking()), Watch()
    trainer(pruning, max_epochs=1).fit(model)
    before = {name: value == 0 for name, value in model.state_dict().items()}
    model.network[0].requires_grad_(False)
    trainer(pruning, watch, max_epochs=2).fit(model)
    assert watch.sparsities == [0.9, 0.9]
    assert all(torch.equal(value == 0, before[n]) for n, value in model.state_dict().items())
