import csv
import gc
import io
import json
import logging
import pickle
import re
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, Subset
from two_layers import Points, TwoLayers

from pruneflow import (
    Compounding,
    Costs,
    Epochs,
    InPlace,
    Linear,
    OneShot,
    PruningCallback,
    Random,
    Reparametrize,
    SparsityCheckpoint,
    Steps,
    lamp,
    sparsity,
)
from pruneflow.training.checkpoint_io import AtomicCheckpointIO

both = pytest.mark.parametrize("masking", [InPlace, Reparametrize])


class Watch(L.Callback):
    """Records, after each epoch, the sparsity of the weights and the learning rate."""

    def __init__(self):
        self.seen = []
        self.rates = []
        self.logged = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append(float(trainer.callback_metrics.get("sparsity", -1)))
        state = pl_module.state_dict()
        weights = torch.cat([state[f"{name}.weight"].flatten() for name in ("body", "head")])
        self.seen.append(round((weights == 0).float().mean().item(), 3))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@both
def test_runs_the_plan_and_ends_removed(model, batches, trainer, masking, caplog):
    caplog.set_level(logging.INFO)
    pruning = PruningCallback(
        Compounding(target=0.9, rounds=2), start_epoch=1, epochs_per_round=2, masking=masking()
    )
    watch = Watch()
    trainer(pruning, watch).fit(model, batches)
    assert watch.seen == [0.0, 0.684, 0.684, 0.9, 0.9, 0.9]
    assert sparsity(model) == pruning.sparsity == 0.9
    assert list(model.state_dict()) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert "amount of the remaining" in caplog.text
    assert "3 epochs of fine-tuning follow" in caplog.text


def test_learns_at_98_percent(model, batches, trainer):
    pruning = PruningCallback(Compounding(target=0.98, rounds=4), epochs_per_round=4, start_epoch=4)
    fit = trainer(pruning, max_epochs=24)
    fit.fit(model, batches)
    assert sparsity(model) == pytest.approx(0.98, abs=1e-3)
    assert fit.validate(model, batches, verbose=False)[0]["val_accuracy"] > 0.9


def test_step_clock_prunes_at_the_start_of_a_step(model, batches, trainer):
    seen = {}

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = round(sparsity(pl_module), 2)

    pruning = PruningCallback(Linear(0.8, 2), start_step=2, steps_per_round=5)
    trainer(pruning, Steps(), max_epochs=-1, max_steps=9).fit(model, batches)
    assert [seen[step] for step in range(1, 10)] == [0, 0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.8, 0.8]


def test_a_plan_that_cannot_finish_is_refused_before_training(model, batches, trainer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`max_epochs`=6.*raise `max_epochs` to 9"):
        trainer(PruningCallback(Linear(0.9, 3), epochs_per_round=3)).fit(model, batches)
    with pytest.raises(ValueError, match=r"`max_steps`=24"):
        trainer(PruningCallback(OneShot(0.9), start_step=24)).fit(model, batches)
    with pytest.raises(ValueError, match=r"near names: body"):
        trainer(PruningCallback(OneShot(0.9), exclude=["bdoy.*"])).fit(model, batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "needed"),
    [
        (dict(max_steps=16), 16),  # 4 steps an epoch, and round 3 is at the start of the fifth
        (dict(max_steps=16, max_epochs=-1), 16),
        (dict(max_steps=8, max_epochs=20, accumulate_grad_batches=2), 8),
        (dict(max_steps=8, accumulate_grad_batches=3), 8),
        (dict(max_steps=4, limit_train_batches=1), 4),
    ],
)
def test_steps_that_end_before_the_last_round_are_refused(model, batches, trainer, kwargs, needed):
    def pruning():
        return PruningCallback(Linear(0.9, 3), start_epoch=2)

    before = model.body.weight.clone()
    with pytest.raises(ValueError, match=rf"`max_steps` must leave .* raise it above {needed},"):
        trainer(pruning(), **kwargs).fit(model, batches)
    assert torch.equal(model.body.weight, before)
    trainer(pruning(), **(kwargs | dict(max_steps=needed + 1))).fit(model, batches)
    assert sparsity(model) == 0.9


def test_a_function_gets_as_many_rounds_as_fit_the_steps(model, batches, trainer):
    pruning = PruningCallback(lambda round: 0.3 * round)
    trainer(pruning, max_epochs=-1, max_steps=9).fit(model, batches)
    assert len(pruning.plan.rounds) == pruning.round == 3


def test_logs_sparsity_to_the_logger_and_the_progress_bar(model, batches, trainer, tmp_path):
    shown = {}

    class Bar(TQDMProgressBar):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            shown.update(self.get_metrics(trainer, pl_module))

    logger = CSVLogger(tmp_path)
    pruning = PruningCallback(OneShot(0.75), start_epoch=1, scope="layer")
    trainer(
        pruning,
        Bar(),
        logger=logger,
        max_epochs=3,
        enable_progress_bar=True,
        log_every_n_steps=1,
    ).fit(model, batches)
    with (tmp_path / logger.name / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["sparsity"]]
    assert [float(row["sparsity"]) for row in rows] == [0.0, 0.75, 0.75]
    assert [float(row["round"]) for row in rows] == [0, 1, 1]
    assert float(rows[-1]["sparsity/body.weight"]) == 0.75
    assert float(rows[-1]["sparsity/head.weight"]) == 0.75
    assert shown["sparsity"] == 0.75
    assert shown["round"] == 1


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("when", ["epoch_end", "mid_epoch"])
@both
@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_resumes_with_the_same_masks_and_plan_position(
    model, batches, trainer, tmp_path, masking, stop_after, when
):
    def pruning():
        return PruningCallback(
            Compounding(target=0.9, rounds=3),
            epochs_per_round=2,
            importance=Random(5),
            masking=masking(),
            rewind="learning_rate",
        )

    start = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "last.ckpt"

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if when == "epoch_end" and trainer.current_epoch == stop_after:
                trainer.save_checkpoint(path)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if when == "mid_epoch" and trainer.current_epoch == stop_after and batch_idx == 1:
                trainer.save_checkpoint(path)

    whole, watch = pruning(), Watch()
    trainer(whole, watch, Save()).fit(model, batches)
    expected = {name: value.clone() for name, value in model.state_dict().items()}

    model.load_state_dict(start)
    resumed, again = pruning(), Watch()
    other = type(model)()
    trainer(resumed, again).fit(other, batches, ckpt_path=path)
    assert watch.seen[-len(again.seen) :] == again.seen
    assert resumed.round == 3
    assert again.logged[0] == watch.logged[-len(again.logged)]
    for name, value in other.state_dict().items():
        assert torch.equal(value == 0, expected[name] == 0)
        # Batches come in a fixed order, so from an epoch's end the weights are those of one run.
        assert when == "mid_epoch" or torch.equal(value, expected[name])
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == set(expected)


@both
def test_masks_of_the_plain_model_go_into_a_wrapped_one_and_back(
    model, batches, trainer, tmp_path, masking
):
    def wrapped():
        network = type(model)()
        network.body = checkpoint_wrapper(network.body)
        return network

    held = []
    for epochs, network in ((1, model), (2, wrapped()), (3, type(model)())):
        pruning = PruningCallback(lambda r: 0.3 * r, include=["body.*"], masking=masking())
        fit = trainer(pruning, max_epochs=epochs)
        fit.fit(network, batches, ckpt_path=tmp_path / "last.ckpt" if held else None)
        fit.save_checkpoint(tmp_path / "last.ckpt")
        held.append(pruning.sparsity)
    assert held == pytest.approx([0.3, 0.6, 0.9])


def test_state_of_a_checkpoint_that_was_only_tested_is_forgotten(model, batches, trainer, tmp_path):
    fit = trainer(PruningCallback(OneShot(0.9)), max_epochs=1)
    fit.fit(model, batches)
    fit.save_checkpoint(tmp_path / "pruned.ckpt")
    pruning, watch = PruningCallback(OneShot(0.9), start_epoch=2), Watch()
    again = trainer(pruning, watch, max_epochs=3)
    other = type(model)()
    again.test(other, batches, ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    again.fit(type(model)(), batches)
    assert watch.seen == [0, 0, 0.9]


def test_resuming_a_finished_training_keeps_its_state(model, batches, trainer, tmp_path):
    fit = trainer(PruningCallback(OneShot(0.9)), max_epochs=2)
    fit.fit(model, batches)
    fit.save_checkpoint(tmp_path / "finished.ckpt")
    pruning = PruningCallback(OneShot(0.9))
    again = trainer(pruning, max_epochs=2)
    other = type(model)()
    again.fit(other, batches, ckpt_path=tmp_path / "finished.ckpt")
    assert (pruning.round, pruning.sparsity, sparsity(other)) == (1, 0.9, 0.9)
    assert pruning.state_dict()["masks"]


def test_several_rounds_in_one_epoch_log_the_last(model, batches, trainer):
    pruning = PruningCallback(Linear(0.8, 2), start_step=1, steps_per_round=2)
    fit = trainer(pruning, max_epochs=1)
    fit.fit(model, batches)
    assert fit.callback_metrics["sparsity"] == pytest.approx(0.8)
    assert fit.callback_metrics["round"] == 2


def test_a_function_may_be_resumed_into_a_longer_training(model, batches, trainer, tmp_path):
    def schedule(round):
        return 1 - 0.7**round

    fit = trainer(PruningCallback(schedule), max_epochs=2)
    fit.fit(model, batches)
    fit.save_checkpoint(tmp_path / "two.ckpt")
    pruning = PruningCallback(schedule)
    other = type(model)()
    trainer(pruning, max_epochs=3).fit(other, batches, ckpt_path=tmp_path / "two.ckpt")
    assert sparsity(other) == pytest.approx(schedule(3), abs=1e-3)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.1, 2)]
)
def test_averages_of_the_weights_are_pruned_along(model, batches, trainer, averaging, order):
    class AtValidation(L.Callback):
        def __init__(self):
            self.seen = []

        def on_validation_end(self, trainer, pl_module):
            self.seen.append(round(sparsity(pl_module), 3))

    watch = AtValidation()
    callbacks = [PruningCallback([0.5, 0.9], start_epoch=2), averaging()][::order]
    fit = trainer(*callbacks, watch, max_epochs=5)
    fit.fit(model, batches)
    assert watch.seen[-4:] == [0.0, 0.5, 0.9, 0.9]
    assert sparsity(model) == 0.9


def test_a_reparametrized_model_is_not_averaged(model, batches, trainer):
    pruning = PruningCallback(OneShot(0.5), masking=Reparametrize())
    with pytest.raises(ValueError, match=r"EMAWeightAveraging.*InPlace"):
        trainer(pruning, EMAWeightAveraging()).fit(model, batches)


def test_several_callbacks_prune_different_tensors(model, batches, trainer, tmp_path):
    def callbacks():
        body = PruningCallback([0.5, 0.9], include=["body.*"])
        return body, PruningCallback(OneShot(0.4), include=["head.*"], start_epoch=1)

    fit = trainer(*callbacks(), max_epochs=2)
    fit.fit(model, batches)
    assert (sparsity(model, include=["body.*"]), sparsity(model, include=["head.*"])) == (0.9, 0.4)
    assert fit.callback_metrics["sparsity"] == pytest.approx(940 / 1100)
    fit.save_checkpoint(tmp_path / "two.ckpt")
    resumed = callbacks()
    trainer(*resumed, max_epochs=3).fit(type(model)(), batches, ckpt_path=tmp_path / "two.ckpt")
    assert [pruning.sparsity for pruning in resumed] == [0.9, 0.4]
    for frozen in (False, True):  # what is frozen may be unfrozen later
        new = type(model)()
        new.body.requires_grad_(not frozen)
        overlapping = (
            PruningCallback(OneShot(0.5)),
            PruningCallback(OneShot(0.4), include=["*.weight"]),
        )
        both = r"different tensors .* got body\.weight, head\.weight in two"
        with pytest.raises(ValueError, match=both):
            trainer(*overlapping).fit(new, batches)


def test_goes_on_from_zeros(model, batches, trainer):
    with torch.no_grad():
        model.body.weight[:, ::2] = 0
    zeros = model.body.weight == 0
    trainer(PruningCallback(None, from_zeros=True), max_epochs=1).fit(model, batches)
    assert torch.equal(model.body.weight == 0, zeros)
    trainer(PruningCallback([0.6, 0.9], from_zeros=True), max_epochs=2).fit(model, batches)
    assert int((model.body.weight[zeros] != 0).sum()) == 0
    assert sparsity(model) == 0.9
    assert not model.head.weight.any()
    with pytest.raises(
        ValueError, match=r"the present sparsity of the model, 0\.9, got 0\.6 in round 1"
    ):
        trainer(PruningCallback([0.6, 0.95], from_zeros="all")).fit(model, batches)
    with pytest.raises(ValueError, match="must be True, False or 'all', got 'some'"):
        PruningCallback(None, from_zeros="some")
    with pytest.raises(ValueError, match="`from_zeros=True`"):
        PruningCallback(None)


def test_state_is_small_tensors_and_builtins(model, batches, trainer, tmp_path):
    pruning = PruningCallback(OneShot(0.9), rewind="learning_rate")
    fit = trainer(pruning, max_epochs=1)
    fit.fit(model, batches)
    torch.save(pruning.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    bits = [state["masks"][name].pop("bits") for name in state["masks"]]
    assert sum(len(packed) for packed in bits) == 1100 // 8 + 1  # one bit a weight
    json.dumps(state)  # nothing but builtins is left


@pytest.mark.parametrize(
    "make",
    [
        lambda: PruningCallback(list(np.linspace(0.3, 0.9, 3))),
        lambda: PruningCallback(np.linspace(0.3, 0.9, 3)),
        lambda: PruningCallback(lambda round: 1 - np.exp(-0.3 * round)),
        lambda: PruningCallback(lambda round: torch.tensor(0.2) * round),
        lambda: PruningCallback(Compounding(target=np.float64(0.9), rounds=np.int64(3))),
        lambda: PruningCallback([0.3, 0.9], start_epoch=np.int64(0), epochs_per_round=np.array(2)),
        lambda: PruningCallback(
            np.int64(3), importance=prune.L1Unstructured(np.float64(0.2)), scope="layer"
        ),
        lambda: PruningCallback(
            [0.3, 0.9], costs={"body.weight": np.float64(1), "head.weight": torch.tensor(2.0)}
        ),
        lambda: PruningCallback(
            [0.3, 0.9], costs=lambda *_: {"body.weight": np.float32(1), "head.weight": np.int64(2)}
        ),
        lambda: PruningCallback([0.3, 0.9], rewind="learning_rate"),
    ],
)
def test_a_checkpoint_can_be_read_whatever_the_numbers_came_from(
    model, batches, trainer, tmp_path, make
):
    def fit(network, epochs, ckpt_path=None):
        network.example_input_array = torch.zeros(1, 20)
        pruning = make()
        done = trainer(pruning, max_epochs=4, plugins=[AtomicCheckpointIO()], limit_val_batches=0)
        done.fit_loop.max_epochs = epochs
        done.fit(network, batches, ckpt_path=ckpt_path)
        done.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return pruning

    fit(model, 3)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)["callbacks"]["PruningCallback"]
    for name in saved["masks"]:
        saved["masks"][name].pop("bits")
    json.dumps(saved)
    resumed = fit(type(model)(), 4, tmp_path / "3.ckpt")
    assert resumed.round == len(resumed.plan.rounds)


class Rated(TwoLayers):
    """Learning rates as NumPy computes them."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=np.float64(0.1))
        return [optimizer], [MultiStepLR(optimizer, np.array([1, 2]))]


def test_the_learning_rates_in_the_state_are_plain(batches, trainer):
    pruning = PruningCallback(OneShot(0.5), rewind="learning_rate")
    trainer(pruning, max_epochs=1).fit(Rated(), batches)
    file = io.BytesIO()
    torch.save(pruning.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["learning_rate"]["groups"][0][0]["lr"] == 0.1


def test_a_schedule_that_no_checkpoint_can_hold_is_refused_before_training(
    model, batches, trainer, tmp_path
):
    class Odd(TwoLayers):
        def configure_optimizers(self):
            [optimizer], [scheduler] = super().configure_optimizers()
            scheduler.odd = object()
            return [optimizer], [scheduler]

    odd = Odd()
    before = odd.body.weight.clone()
    pruning = PruningCallback(OneShot(0.5), rewind="learning_rate")
    with pytest.raises(ValueError, match=r"got object for schedulers\[0\]\['odd'\]"):
        trainer(pruning, enable_checkpointing=True).fit(odd, batches)
    assert torch.equal(odd.body.weight, before)
    trainer(pruning, max_epochs=1).fit(odd, batches)  # which writes none
    assert sparsity(odd) == 0.5


class Finetuned(TwoLayers):
    """Only what is not frozen has a parameter group from the start."""

    @property
    def backbone(self):
        return self.body

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.04)
        if epoch > 1:  # also where a training goes on
            self.make_trainable(pl_module.body)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("resume_after", [None, 1, 2, 4])
def test_groups_added_during_training_are_rewound_to_where_they_came(
    batches, trainer, tmp_path, order, resume_after
):
    class Rates(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def fit(ckpt_path=None):
        pruning = PruningCallback(
            [0.5, 0.8], start_epoch=3, epochs_per_round=2, rewind="learning_rate"
        )
        callbacks, watch, network = [Unfreeze(), pruning][::order], Rates(), Finetuned()
        trainer(*callbacks, watch, max_epochs=7).fit(network, batches, ckpt_path=ckpt_path)
        assert pruning.sparsity == sparsity(network) == 0.8
        return watch.seen

    expected = [[0.1], [0.05, 0.04], [0.025, 0.02], *[[0.1, 0.04], [0.05, 0.02]] * 2]
    seen = fit()
    assert seen == [pytest.approx(rates) for rates in expected]
    if resume_after is not None:
        again = fit(tmp_path / f"{resume_after}.ckpt")
        assert again == seen[-len(again) :]


def test_a_backbone_is_unfrozen_beside_rewinding(batches, trainer):
    pruning = PruningCallback(Linear(0.8, 2), start_epoch=2, rewind="learning_rate")
    unfreeze = BackboneFinetuning(1, lambda _: 1.0, backbone_initial_lr=0.01)
    network = Finetuned()
    trainer(unfreeze, pruning).fit(network, batches)
    assert sparsity(network) == 0.8


def test_refuses_to_resume_another_method(model, batches, trainer, tmp_path):
    fit = trainer(PruningCallback(OneShot(0.9)), max_epochs=1)
    fit.fit(model, batches)
    path = tmp_path / "one.ckpt"
    fit.save_checkpoint(path)
    for other, difference in (
        (
            PruningCallback(OneShot(0.9), importance=Random(3)),
            r"Random\(seed=3.*, got .*magnitude",
        ),
        (
            PruningCallback(OneShot(0.9), scope="layer"),
            r"'scope': 'layer'.*, got .*'global'",
        ),
    ):
        with pytest.raises(ValueError, match=difference):
            trainer(other, max_epochs=2).fit(type(model)(), batches, ckpt_path=path)
    other = trainer(PruningCallback(OneShot(0.9), exclude=["head.*"]), max_epochs=2)
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.raises(ValueError, match=r"head.*got that of 'PruningCallback'"),
    ):
        other.fit(type(model)(), batches, ckpt_path=path)


def test_refuses_to_resume_another_plan_or_version(model, batches, trainer, tmp_path):
    fit = trainer(PruningCallback(Linear(0.9, 2)), max_epochs=2)
    fit.fit(model, batches)
    path = tmp_path / "two.ckpt"
    fit.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"rounds at 0\.3 at .*, got rounds at 0\.45 at epoch 0"):
        trainer(PruningCallback(Linear(0.9, 3))).fit(type(model)(), batches, ckpt_path=path)
    checkpoint = torch.load(path)
    next(iter(checkpoint["callbacks"].values()))["version"] = 99
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="version 5, got version 99"):
        trainer(PruningCallback(Linear(0.9, 2))).fit(type(model)(), batches, ckpt_path=path)


def without(key):
    return lambda state: state.pop(key)


def of(key, value):
    return lambda state: state.update({key: value})


def of_mask(key, value):
    return lambda state: state["masks"]["body.weight"].update({key: value})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        *(
            (without(key), f"no `{key}`")
            for key in ("round", "method", "plan", "costs", "masks", "names", "learning_rate")
        ),
        (lambda state: state.clear(), "version 5, got version None"),
        (of("round", 99), "round 99 of a plan of 2 rounds"),
        (of("round", -1), "-1 for `round`"),
        (of("round", 1.0), "1.0 for `round`"),
        (of("round", True), "True for `round`"),
        (of("round", "1"), "'1' for `round`"),
        (of("plan", None), "round 1 of a plan of 0 rounds"),
        (of("plan", {"unit": "epoch"}), "for `plan`"),
        (of("plan", {"unit": "day", "rounds": []}), "for `plan`"),
        (of("plan", {"unit": "epoch", "rounds": [[0, 0.45], [1]]}), "for `plan`"),
        (of("plan", {"unit": "epoch", "rounds": [[0, 0.45], [1, "0.9"]]}), "for `plan`"),
        (of("masks", {}), "no masks at round 1; no mask for 'body.weight'"),
        (of("masks", None), "None for `masks`"),
        (of("masks", []), "for `masks`"),
        (without("masks"), "no `masks`"),
        (lambda state: state["masks"].pop("head.weight"), "no mask for 'head.weight'"),
        (
            lambda state: state["masks"].update(other=state["masks"]["head.weight"]),
            "a mask for 'other', which the model does not have",
        ),
        (
            of_mask("shape", [20, 50]),
            "a mask of shape [20, 50] for 'body.weight' of shape [50, 20]",
        ),
        (of_mask("shape", "abc"), "for `masks`"),
        (of_mask("shape", None), "for `masks`"),
        (of_mask("bits", torch.zeros(3, dtype=torch.uint8)), "for `masks`"),
        (of_mask("bits", torch.zeros(125)), "for `masks`"),
        (of_mask("bits", torch.zeros(125, 1, dtype=torch.uint8)), "for `masks`"),
        (of_mask("bits", [0] * 125), "for `masks`"),
        (of("names", []), "masks, but no `names`"),
        (of("names", ["body.weight", 3]), "for `names`"),
        (of("names", ["body.weight", "tail.weight"]), "no mask for 'tail.weight'"),
        (of("names", "body.weight"), "for `names`"),
        (of("method", "magnitude"), "for `method`"),
        (of("costs", {"body.weight": "1"}), "for `costs`"),
        (of("learning_rate", None), "no learning rate to rewind to at round 1"),
        (of("learning_rate", {"groups": []}), "for `learning_rate`"),
        (of("learning_rate", {"groups": [{}], "schedulers": []}), "for `learning_rate`"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused_by_name(
    model, batches, trainer, tmp_path, damage, said
):
    def pruning():
        return PruningCallback(Linear(0.9, 2), rewind="learning_rate")

    path = tmp_path / "one.ckpt"

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(path)

        def on_train_epoch_start(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="below the target"):
        trainer(pruning(), Save(), max_epochs=2).fit(model, batches)
    checkpoint = torch.load(path)
    state = checkpoint["callbacks"]["PruningCallback"]
    damage(state)
    torch.save(checkpoint, path)
    resumed = pruning()
    with pytest.raises(ValueError, match=re.escape(said)):
        trainer(resumed, max_epochs=2).fit(type(model)(), batches, ckpt_path=path)
    assert resumed.round == 0
    assert resumed.state_dict()["masks"] == {}


def test_a_second_fit_holds_the_zeros_and_a_new_model_starts_over(model, batches, trainer):
    pruning, watch = PruningCallback(OneShot(0.8), start_epoch=2), Watch()
    trainer(pruning, max_epochs=3).fit(model, batches)
    zeros = model.body.weight == 0
    trainer(pruning, watch, max_epochs=2).fit(model, batches)
    assert watch.seen == [0.8, 0.8]
    assert torch.equal(model.body.weight == 0, zeros)
    other, watch = type(model)(), Watch()
    trainer(pruning, watch, max_epochs=4).fit(other, batches)
    assert watch.seen == [0, 0, 0.8, 0.8]


@both
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_let_go_after_training(batches, trainer, tmp_path, masking, fails):
    class Fail(TwoLayers):
        def on_train_epoch_end(self):
            if fails and self.trainer.current_epoch == 1:
                raise RuntimeError("the disk is full")

    pruning = PruningCallback(Linear(0.8, 2), masking=masking(), rewind="learning_rate")
    best = SparsityCheckpoint(monitor="val_accuracy", mode="max", dirpath=tmp_path)
    network, loader = Fail(), batches.train_dataloader()
    with pytest.raises(RuntimeError, match="full") if fails else nullcontext():
        fit = trainer(pruning, best, max_epochs=3, enable_checkpointing=True)
        fit.fit(network, loader, loader)
    alive = weakref.ref(network.body.weight)
    del network, fit, loader
    gc.collect()
    assert alive() is None
    assert pruning.sparsity == 0.8
    copied = pickle.loads(pickle.dumps(pruning))
    assert copied.state_dict()["learning_rate"] == pruning.state_dict()["learning_rate"]


def test_validate_test_and_predict_never_prune(model, batches, trainer):
    fit = trainer(PruningCallback(OneShot(0.9)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit.validate(model, batches, verbose=False)
    fit.test(model, batches, verbose=False)
    fit.predict(model, batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class PutsBack(L.Callback):
    """Puts dense weights back at some moment of a fit."""

    def __init__(self, moment, by):
        self.by = by
        setattr(self, moment, self.put_back)

    def on_fit_start(self, trainer, pl_module):
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def put_back(self, trainer, pl_module):
        if self.by == "load":
            pl_module.load_state_dict(self.weights)
        else:
            with torch.no_grad():
                for name, parameter in pl_module.named_parameters():
                    parameter.copy_(self.weights[name])


@pytest.mark.parametrize("by", ["load", "copy"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("moment", ["on_train_end", "on_fit_end", "on_train_epoch_end"])
def test_weights_that_others_put_back_are_pruned_too(
    model, batches, trainer, tmp_path, moment, order, by
):
    pruning = PruningCallback([0.5, 0.8])
    saving = ModelCheckpoint(tmp_path, save_weights_only=True, save_on_train_epoch_end=True)
    callbacks = [PutsBack(moment, by), pruning][::order]
    last = trainer(*callbacks, saving, max_epochs=3, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last.fit(model, batches)
    assert sparsity(model) == pytest.approx(pruning.sparsity) == pytest.approx(0.8, abs=0.01)
    said = sum("were changed after training" in str(warning.message) for warning in caught)
    assert said == (moment == "on_fit_end" or (moment == "on_train_end" and order == -1))
    state = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    model.load_state_dict(state)
    assert sparsity(model) == pytest.approx(pruning.sparsity)


@both
@pytest.mark.parametrize("error", [RuntimeError("the disk is full"), KeyboardInterrupt()])
def test_removes_after_an_exception_without_hiding_it(model, batches, trainer, masking, error):
    class Fail(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise error

    pruning = PruningCallback(OneShot(0.9), masking=masking())
    expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(expected):
        trainer(pruning, Fail()).fit(model, batches)
    assert list(model.state_dict()) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert sparsity(model) == pruning.sparsity == 0.9
    assert not model.body._forward_pre_hooks
    assert not model.body.weight._post_accumulate_grad_hooks


def test_an_exception_is_not_hidden_by_a_failing_remove(model, batches, trainer):
    class Stubborn(InPlace):
        def remove(self):
            raise OSError("cannot let go")

    class Fail(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full") as caught:
        trainer(PruningCallback(OneShot(0.9), masking=Stubborn()), Fail()).fit(model, batches)
    assert "cannot let go" in caught.value.__notes__[0]


def test_weights_that_are_not_finite_stop_the_training_by_name(model, batches, trainer):
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"got NaN or infinity in head\.weight;"):
        trainer(PruningCallback(OneShot(0.9))).fit(model, batches)
    assert sparsity(model) == 0


def test_ending_below_the_target_is_said(model, batches, trainer):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    pruning = PruningCallback(Linear(0.9, 3), epochs_per_round=2)
    with pytest.warns(UserWarning, match=r"round 1 of 3, at sparsity 0\.3000, below the target"):
        trainer(pruning, Stop()).fit(model, batches)


def test_fast_dev_run_prunes_once_to_the_target(model, batches, trainer):
    pruning = PruningCallback(Linear(0.9, 3), epochs_per_round=20, start_epoch=50)
    trainer(pruning, fast_dev_run=True).fit(model, batches)
    assert sparsity(model) == 0.9


def test_learning_rate_restarts_each_round(model, batches, trainer):
    watch = Watch()
    pruning = PruningCallback(
        Linear(0.5, 2), start_epoch=2, epochs_per_round=2, rewind="learning_rate"
    )
    trainer(pruning, watch).fit(model, batches)
    assert watch.rates == pytest.approx([0.1, 0.09, 0.1, 0.09, 0.1, 0.09])


def test_torch_instance_takes_a_number_of_rounds(model, batches, trainer):
    pruning = PruningCallback(3, importance=prune.L1Unstructured(0.5), scope="layer")
    trainer(pruning).fit(model, batches)
    assert sparsity(model) == pytest.approx(0.875, abs=1e-3)


def test_a_plain_checkpoint_loads_into_the_plain_model(model, batches, trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path)
    fit = trainer(
        PruningCallback(OneShot(0.9), masking=Reparametrize()), saver, enable_checkpointing=True
    )
    fit.fit(model, batches)
    loaded = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    other = type(model)()
    other.load_state_dict(loaded, strict=True)
    assert sparsity(other) == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(schedule=3), "`schedule` must be a schedule"),
        (
            dict(schedule=0, importance=prune.L1Unstructured(0.5)),
            "must be a whole number of at least 1",
        ),
        (
            dict(schedule=OneShot(0.5), importance=prune.L1Unstructured(0.5)),
            "`schedule` must be the number of rounds",
        ),
        (dict(schedule=OneShot(0.5), start_epoch=1, start_step=3), "count either epochs or steps"),
        (dict(schedule=OneShot(0.5), epochs_per_round=0), "`epochs_per_round`"),
        (dict(schedule=OneShot(0.5), rewind="weights"), "`rewind` must be"),
        (dict(schedule=[0.5, 1.5]), r"`sparsities` must be a number in \[0, 1\)"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**arguments)


def test_refuses_strategies_that_flatten_parameters(model, batches, trainer):
    pruning = PruningCallback(OneShot(0.5))
    fit = trainer(pruning)
    # Lightning lets it run on a GPU only.
    fit._accelerator_connector.strategy = FSDPStrategy.__new__(FSDPStrategy)
    with pytest.raises(ValueError, match=r"FSDPStrategy, which flattens.*ModelParallelStrategy"):
        pruning.on_fit_start(fit, model)


def test_warns_beside_callbacks_that_may_choose_a_denser_model(model, batches, trainer, tmp_path):
    def pruning():
        return PruningCallback(Linear(0.9, 2), start_epoch=2)

    best = ModelCheckpoint(tmp_path / "theirs", monitor="val_accuracy", mode="max")
    with pytest.warns(UserWarning, match=r"use SparsityCheckpoint\(monitor='val_accuracy'"):
        trainer(pruning(), best, enable_checkpointing=True).fit(model, batches)
    stop = EarlyStopping("val_accuracy", mode="max", patience=2)
    with pytest.warns(UserWarning, match=r"set Trainer\(min_epochs"):
        trainer(pruning(), stop, max_epochs=9).fit(type(model)(), batches)
    ours = SparsityCheckpoint(monitor="val_accuracy", mode="max", dirpath=tmp_path / "ours")
    trainer(pruning(), ours, enable_checkpointing=True).fit(type(model)(), batches)  # no warning
    plain = type(model)()
    plain.load_state_dict(torch.load(ours.best_model_path, weights_only=True)["state_dict"])
    assert sparsity(plain) == 0.9


class SetUpAnew(L.Callback):
    """A second stage of training: new optimizers, of which nobody has told the callback."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)


@both
@pytest.mark.parametrize("order", [1, -1])
def test_zeros_hold_through_optimizers_that_the_training_has_made_anew(
    model, batches, trainer, masking, order
):
    pruning = PruningCallback([0.3, 0.6, 0.9], start_epoch=1, masking=masking())
    watch = Watch()
    trainer(*[SetUpAnew(), pruning][::order], watch).fit(model, batches)
    assert watch.seen == [0, 0.3, 0.6, 0.9, 0.9, 0.9]
    assert sparsity(model) == 0.9


@both
def test_ends_with_exact_zeros_whatever_moved_the_weights_last(model, batches, trainer, masking):
    class Noise(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                parameter.data += 1e-3

    trainer(PruningCallback(OneShot(0.9), masking=masking()), Noise()).fit(model, batches)
    assert sparsity(model) == 0.9


class SaveEach(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def sharpened(name, tensor, context, power):
    return tensor.abs() ** power


@dataclass(frozen=True)
class Sharpened:
    """An importance with a setting."""

    power: float

    def __call__(self, name, tensor, context):
        return sharpened(name, tensor, context, self.power)


class Plain:
    """The same without a `repr` of its own."""

    def __init__(self, power):
        self.power = power
        self._cache = object()

    def __call__(self, name, tensor, context):
        return sharpened(name, tensor, context, self.power)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (dict(rewind=None), dict(rewind="learning_rate")),
        (dict(rewind="learning_rate"), dict(rewind=None)),
        (
            dict(schedule=3, importance=prune.L1Unstructured(0.5)),
            dict(schedule=3, importance=prune.L1Unstructured(0.2)),
        ),
        (
            dict(importance=partial(prune.LnStructured, n=1, dim=0), scope="layer"),
            dict(importance=partial(prune.LnStructured, n=1, dim=1), scope="layer"),
        ),
        (dict(importance=Sharpened(2.0)), dict(importance=Sharpened(3.0))),
        (dict(importance=Plain(2.0)), dict(importance=Plain(3.0))),
        (
            dict(importance=lamp(partial(sharpened, power=2.0))),
            dict(importance=lamp(partial(sharpened, power=3.0))),
        ),
        (
            dict(costs=Costs({"body.weight": 2.0, "head.weight": 1.0})),
            dict(costs=Costs({"body.weight": 2.0, "head.weight": 1.0}, power=0.5)),
        ),
    ],
)
def test_refuses_to_resume_with_other_settings_of_a_method(
    model, batches, trainer, tmp_path, saved, resumed
):
    fit = trainer(PruningCallback(**(dict(schedule=[0.3, 0.6, 0.9]) | saved)), max_epochs=3)
    fit.fit(model, batches)
    fit.save_checkpoint(tmp_path / "three.ckpt")
    other = PruningCallback(**(dict(schedule=[0.3, 0.6, 0.9]) | resumed))
    with pytest.raises(ValueError, match="must have the same method"):
        trainer(other).fit(type(model)(), batches, ckpt_path=tmp_path / "three.ckpt")


@pytest.mark.parametrize(
    ("old", "now"),
    [
        (
            dict(importance="magnitude", scope="global", granularity="None", costs="None"),
            dict(),
        ),
        (
            dict(importance="Sharpened", scope="layer", granularity="None", costs="None"),
            dict(importance=Sharpened(2.0), scope="layer"),
        ),
        (
            dict(importance="magnitude", scope="global", granularity="None")
            | dict(costs="{'body.weight': 2.0, 'head.weight': 1.0}"),
            dict(costs={"body.weight": 2, "head.weight": 1}),
        ),
        (
            dict(importance="L1Unstructured(amount=0.5)", scope="global", granularity="None")
            | dict(costs="None"),
            dict(schedule=3, importance=prune.L1Unstructured(0.5)),
        ),
    ],
    ids=["magnitude", "an object", "costs", "a method of torch"],
)
def test_a_state_of_the_version_before_goes_on(model, batches, trainer, tmp_path, old, now):
    arguments = dict(schedule=[0.3, 0.6, 0.9]) | now
    fit = trainer(PruningCallback(**arguments), SaveEach(tmp_path), max_epochs=3)
    fit.fit(model, batches)
    checkpoint = torch.load(tmp_path / "1.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["PruningCallback"]
    state |= {"version": 4, "method": old | {"rewind": "None"}}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = PruningCallback(**arguments)
    again = type(model)()
    trainer(resumed, max_epochs=3).fit(again, batches, ckpt_path=tmp_path / "old.ckpt")
    assert resumed.round == 3
    assert torch.equal(again.body.weight, model.body.weight)
    other = PruningCallback(**(arguments | dict(importance=Random(0), schedule=[0.3, 0.6, 0.9])))
    with pytest.raises(ValueError, match=r"must have the same (plan|method)"):
        trainer(other, max_epochs=3).fit(type(model)(), batches, ckpt_path=tmp_path / "old.ckpt")


def test_clocks_say_the_same_as_the_flat_arguments():
    assert PruningCallback([0.5], clock=Epochs(10, every=5)).clock.every == 5
    flat = PruningCallback([0.5, 0.9], start_step=100, steps_per_round=10)
    assert flat.clock == Steps(100, every=10)
    assert PruningCallback([0.5, 0.9]).clock == Epochs()
    with pytest.raises(ValueError, match="`clock` must be given alone"):
        PruningCallback([0.5], clock=Epochs(1), start_epoch=1)
    with pytest.raises(TypeError, match="`clock` must be a clock, got 5"):
        PruningCallback([0.5], clock=5)
    with pytest.raises(ValueError, match="`epochs_per_round`"):
        Epochs(0, every=0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_dense_checkpoint_of_any_moment_goes_on_to_be_pruned(model, batches, trainer, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (2, 1):
                trainer.save_checkpoint(tmp_path / "dense.ckpt")

    trainer(Save(), max_epochs=3).fit(model, batches)
    watch = Watch()
    trainer(PruningCallback(OneShot(0.9), start_epoch=2), watch, max_epochs=3).fit(
        type(model)(), batches, ckpt_path=tmp_path / "dense.ckpt"
    )
    assert watch.seen == [0.9]
    late = PruningCallback([0.3, 0.6, 0.9])
    with pytest.warns(UserWarning, match="Rounds 1 to 3 of the plan are due .* pruned at once"):
        trainer(late).fit(type(model)(), batches, ckpt_path=tmp_path / "dense.ckpt")


def test_what_is_unfrozen_after_the_last_round_is_said_to_be_dense(model, batches, trainer):
    class Unfreeze(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.body.requires_grad_(trainer.current_epoch >= 3)

    model.body.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"body\.weight became trainable after the last round"):
        trainer(PruningCallback([0.5, 0.9]), Unfreeze()).fit(model, batches)
    assert sparsity(model, include=["head.*"]) == 0.9


class Alike(Points):
    """Every batch is the same, so that it does not matter where in an epoch a training goes on."""

    def train_dataloader(self):
        dataset = super().train_dataloader().dataset
        first = list(range(32))
        return DataLoader(Subset(dataset, 4 * first), batch_size=32)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@both
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_resumes_to_the_bit_within_an_epoch(model, trainer, tmp_path, masking, batch):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, _, batch_idx):
            if (trainer.current_epoch, batch_idx) == (3, batch):
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    def run(resume=None):
        torch.manual_seed(0)
        network = type(model)()
        pruning = PruningCallback(
            [0.4, 0.7, 0.9],
            epochs_per_round=2,
            masking=masking(),
            rewind="learning_rate",
        )
        fit = trainer(pruning, *([] if resume else [Save()]))
        fit.fit(network, Alike(), ckpt_path=resume)
        momentum = {
            # torch's own reparametrization lets pruned weights drift, and no checkpoint holds that
            name: fit.optimizers[0].state[parameter]["momentum_buffer"] * (parameter != 0)
            for name, parameter in network.named_parameters()
        }
        return network.state_dict(), momentum, pruning.state_dict()

    whole = run()
    resumed = run(tmp_path / "inside.ckpt")
    assert whole[2]["round"] == 3 and whole[2]["learning_rate"] is not None
    same(whole, resumed)


def same(one, other):
    """Equal to the bit, tensors within containers included."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for here, there in zip(one, other, strict=True):
            same(here, there)
    else:
        assert one == other


class Replaces(L.Callback):
    """Gives the model a new layer, trained from then on, in the place of one that is pruned."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            pl_module.body = torch.nn.Linear(20, 50)
            trainer.optimizers[0].add_param_group({"params": list(pl_module.body.parameters())})


@pytest.mark.parametrize("masking", [InPlace, Reparametrize])
@pytest.mark.parametrize("rounds", [1, 4])
def test_a_layer_that_is_replaced_is_pruned_like_the_old_one(
    model, batches, trainer, masking, rounds
):
    pruning = PruningCallback(Linear(0.8, rounds), masking=masking())
    watch = Watch()
    trainer(pruning, Replaces(), watch, max_epochs=5).fit(model, batches)
    assert watch.seen[3:] == [0.8, 0.8]
    assert sparsity(model) == pruning.sparsity == 0.8


def test_says_when_fit_begins_what_stays_dense(model, batches, trainer, caplog):
    caplog.set_level(logging.INFO)
    model.table = torch.nn.Parameter(torch.zeros(20, 10))
    trainer(PruningCallback(OneShot(0.5), exclude=["table"]), max_epochs=1).fit(model, batches)
    assert "stay dense (share of all parameters): table (" in caplog.text
