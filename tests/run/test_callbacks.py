"""The group `callbacks`: what joins the Trainers of a run, and what it leaves."""

import csv
import logging
from typing import ClassVar

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from safetensors.torch import load_file

from pruneflow.report.sections import document
from pruneflow.run.callbacks import SaveEachEpoch
from pruneflow.run.experiment import Experiment
from pruneflow.run.recipes import store_recipes
from pruneflow.run.resources import resource_dir

TINY = (
    *("dense.epochs=2", "pruning.epochs=4", "schedule.rounds=2", "dense.cache=null"),
    *("trainer.limit_train_batches=3", "trainer.limit_val_batches=1"),
    *("trainer.limit_test_batches=1", "trainer.accelerator=cpu"),
    *("trainer.enable_progress_bar=false", "model.width=8", "deploy.batches=[]"),
)


class Recorder(L.Callback):
    """Keeps the weights and buffers after each step, of each phase by itself."""

    phases: ClassVar[list] = []

    def on_train_start(self, trainer, pl_module):
        self.phases.append([])

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = pl_module.network.state_dict()
        self.phases[-1].append({name: value.clone() for name, value in state.items()})


RECORD = f"+callbacks.record={{_target_: {__name__}.Recorder}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run an experiment, and give its folder and facts."""
    store_recipes()

    def run(*overrides):
        folder = tmp_path_factory.mktemp("run")
        config = compose("config", overrides=[*TINY, *overrides])
        OmegaConf.resolve(config.callbacks)
        return folder, Experiment(config, folder, "digits", "a test").run()

    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        yield run
    ConfigStore.instance().repo.pop("recipe")


@pytest.fixture(scope="module")
def averaged(run):
    Recorder.phases.clear()
    return *run("callbacks=ema", "callbacks.ema.decay=0.75", RECORD), list(Recorder.phases)


def average(steps, decay):
    """The first step, then a share of each."""
    mean = steps[0]
    for step in steps[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * step[name] for name in mean}
    return mean


def test_a_run_hands_over_the_average_with_exact_zeros(averaged):
    folder, facts, (_, rounds) = averaged
    result = load_file(folder / "model.safetensors")
    expected = average(rounds, 0.75)
    pruned = {layer["name"] for layer in facts["layers"]}
    for name, value in result.items():
        zero = value == 0 if name in pruned else torch.zeros_like(value, dtype=torch.bool)
        torch.testing.assert_close(
            value, expected[name].to(value.dtype).masked_fill(zero, 0), rtol=1e-4, atol=1e-6
        )
    assert any(not torch.allclose(result[name], rounds[-1][name]) for name in pruned)
    zeros = sum(int((result[name] == 0).sum()) for name in pruned)
    weights = sum(layer["weights"] for layer in facts["layers"])
    assert zeros == sum(layer["zeros"] for layer in facts["layers"]) == round(0.98 * weights)
    assert facts["final"]["sparsity"] == zeros / weights


def test_the_dense_phase_ends_with_an_average_of_its_own(averaged):
    folder, _, (dense, _) = averaged
    result = load_file(folder / "checkpoints" / "dense.safetensors")
    for name, expected in average(dense, 0.75).items():
        torch.testing.assert_close(
            result[name], expected.to(result[name].dtype), rtol=1e-4, atol=1e-6
        )


def test_metrics_and_rounds_are_those_of_the_average(averaged):
    folder, facts, _ = averaged
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val_accuracy"]) == pytest.approx(facts["final"]["val_accuracy"])
    assert float(rows[1]["val_accuracy"]) == pytest.approx(facts["dense"]["val_accuracy"])


def test_an_average_that_forgets_all_but_the_last_step_changes_nothing(run):
    (plain, expected), (folder, facts) = run(), run("callbacks=ema", "callbacks.ema.decay=0.0")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert facts["rounds"] == expected["rounds"]
    assert facts["final"] == expected["final"]


@pytest.mark.filterwarnings("ignore:EarlyStopping.* may stop training before:UserWarning")
def test_early_stopping_ends_a_phase_and_the_target_is_missed(run, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.warns(UserWarning, match="ended in round 1 of 2, .*, below the target"):
        folder, facts = run(
            *("callbacks=early_stopping", "callbacks.early_stopping.patience=1"),
            "callbacks.early_stopping.min_delta=100",
        )
    with (folder / "metrics.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [0, 1, 2, 3]
    assert [line["round"] for line in facts["rounds"]] == [1]
    assert not document(facts, str(folder)).reached
    assert "Stopped early: the rounds (4 epochs) ended after epoch 3" in caplog.text
    assert "the dense phase" not in caplog.text  # which it let pass whole


@pytest.mark.filterwarnings("ignore:EarlyStopping.* may stop training before:UserWarning")
def test_early_stopping_waits_for_the_least_number_of_epochs(run, caplog):
    caplog.set_level(logging.WARNING)
    folder, facts = run(
        *("callbacks=early_stopping", "callbacks.early_stopping.patience=0"),
        *("callbacks.early_stopping.min_delta=100", "trainer.min_epochs=5"),
    )
    with (folder / "metrics.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [0, 1, 2, 3, 4]
    assert document(facts, str(folder)).reached
    assert "Stopped early: the rounds (4 epochs) ended after epoch 4" in caplog.text


def test_the_best_of_each_round_is_kept_and_none_of_the_dense_phase(run, tmp_path):
    _, facts = run(
        "callbacks=[sparsity_checkpoint,ema]",
        f"callbacks.sparsity_checkpoint.dirpath={tmp_path / 'best'}",
    )
    found = sorted((tmp_path / "best").iterdir())
    assert len(found) == len(facts["rounds"]) == 2
    for path, line in zip(found, facts["rounds"], strict=True):
        state = torch.load(path)["state_dict"]
        zeros = sum(int((state[f"network.{x['name']}"] == 0).sum()) for x in facts["layers"])
        assert zeros == sum(x["weights"] for x in facts["layers"]) - line["kept"]


def test_the_learning_rate_of_both_phases_goes_to_the_logger(run, tmp_path):
    logger = ("logger=csv", f"logger.save_dir={tmp_path}", "+trainer.log_every_n_steps=1")
    run("callbacks=lr_monitor", *logger)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert len(rates) == 2 + 4


def test_a_training_that_was_to_stop_is_still_to_stop_when_it_resumes(tmp_path):
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            return (self.weight * batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Stop(L.Callback):
        """Asks for it once, and is not there when the training resumes."""

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    def trainer(*callbacks, **lengths):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **lengths)

    path, data = tmp_path / "last.ckpt", torch.utils.data.DataLoader(torch.ones(2, 1))
    first = trainer(Stop(), SaveEachEpoch(path), max_epochs=9, min_epochs=2)
    first.fit(Model(), data)
    assert first.current_epoch == 2
    again, epochs = Model(), []
    count = type("Count", (L.Callback,), {"on_train_epoch_start": lambda *_: epochs.append(1)})
    trainer(count(), SaveEachEpoch(path), max_epochs=9).fit(again, data, ckpt_path=path)
    assert epochs == []
    # Of the checkpoint within, it goes on to the least number of epochs, and no further.
    trainer(count(), SaveEachEpoch(path), max_epochs=9, min_epochs=4).fit(
        again, data, ckpt_path=path
    )
    assert len(epochs) == 2
