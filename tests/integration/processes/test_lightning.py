"""PruningCallback in Lightning's own ways to train in two processes."""

import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import prune
from training import Layers, Watch, fit, loader, make_trainer

from pruneflow import (
    Calibration,
    MaskSet,
    OneShot,
    PruningCallback,
    Random,
    SparsityCheckpoint,
    lamp,
    magnitude,
    sparsity,
    taylor,
    wanda,
)


def fit_unlike(*arguments, **settings):
    torch.manual_seed(dist.get_rank())
    return fit(*arguments, **settings)


def equal(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("importance", "scope"),
    [(magnitude, "global"), (prune.RandomUnstructured, "layer"), (taylor, "global")],
    ids=["magnitude", "random numbers of the process", "gradients"],
)
def test_ddp_holds_equal_masks_and_weights_in_both(two, tmp_path, importance, scope):
    first, second = two(fit_unlike, tmp_path, importance, strategy="ddp", scope=scope)
    equal(first["end"], second["end"])
    equal(first["weights"], second["weights"])
    for run in (first, second):
        assert run["sparsity"] == pytest.approx(0.8, abs=0.002)
        assert run["logged"]["sparsity"] == pytest.approx(run["sparsity"])
        assert not [text for text in run["warnings"] if "sparsity" in text]


def prune_by_evidence(folder, importance, scope, strategy="auto"):
    calibration = Calibration(Layers.loss, batches=4)
    pruning = PruningCallback(
        OneShot(0.5), importance=importance, calibration=calibration, scope=scope
    )
    watch = Watch(pruning)
    make_trainer(folder, [pruning, watch], strategy).fit(Layers(), loader(), loader())
    return watch.end


@pytest.mark.parametrize("strategy", ["ddp", "fully_shard"])
@pytest.mark.parametrize(
    ("importance", "scope"),
    [(taylor, "global"), (wanda, "global"), (lamp(taylor), "global"), (taylor, "erk")],
    ids=["taylor", "wanda", "lamp", "erk"],
)
def test_evidence_is_that_of_the_batches_of_all_processes(
    two, tmp_path, importance, scope, strategy
):
    # 4 batches; of each process below, 2 and the same points
    alone = prune_by_evidence(tmp_path, importance, scope)
    for found in two(prune_by_evidence, tmp_path, importance, scope, strategy):
        equal(found, alone)


@pytest.mark.parametrize("strategy", ["ddp", "fully_shard"])
def test_a_checkpoint_resumes_in_another_number_of_processes(two, tmp_path, strategy):
    importance = Random(5)  # masks that depend on nothing that the number of processes changes
    alone, together, last = tmp_path / "alone", tmp_path / "together", tmp_path / "last"
    whole = [fit(alone, importance), *two(fit, together, importance, strategy=strategy)]
    resumed = [
        fit(last, importance, resume=together / "epoch=2.ckpt"),
        *two(fit, last, importance, strategy=strategy, resume=alone / "epoch=2.ckpt"),
        *two(fit, last, importance, strategy=strategy, resume=together / "epoch=2.ckpt"),
    ]
    for run in [*whole, *resumed]:
        equal(run["end"], whole[0]["end"])
        assert run["sparsity"] == whole[0]["sparsity"] == pytest.approx(0.8, abs=0.002)
    for run in resumed:
        assert run["start"][0] == 2
        assert MaskSet.from_state(run["start"][1]).sparsity == pytest.approx(0.6, abs=0.002)


class Scored(Layers):
    """Each process measures something else, and Lightning is not told to make one of it."""

    def validation_step(self, batch, batch_idx):
        worse_at_first = dist.get_rank() * (self.current_epoch < 2)
        self.log("score", self.loss(batch) + worse_at_first)


def keep_the_best(folder):
    pruning = PruningCallback([0.4, 0.8], start_epoch=1)
    best = SparsityCheckpoint(dirpath=folder, monitor="score")
    with warnings.catch_warnings(action="ignore"):  # Lightning's own, that processes differ
        make_trainer(folder, [pruning, best], "ddp").fit(Scored(), loader(), loader())
    return best.best_model_path, float(best.best_model_score)


def test_the_best_checkpoint_is_the_same_in_both_though_their_metrics_differ(two, tmp_path):
    first, second = two(keep_the_best, tmp_path)
    assert first == second
    assert Path(first[0]).exists()


class StopsOnce(L.Callback):
    """Stops a first training in its second epoch; checks that the next one goes on from there."""

    def __init__(self, pruning):
        self.pruning = pruning
        self.zeros = None

    def on_train_start(self, trainer, pl_module):
        if self.zeros is not None:
            assert self.pruning.round == 1
            assert all(torch.equal(~self.pruning.pruner.masks[n], z) for n, z in self.zeros.items())

    def on_train_epoch_end(self, trainer, pl_module):
        if self.zeros is None and trainer.current_epoch == 1:
            trainer.should_stop = True
            self.zeros = {name: ~mask for name, mask in self.pruning.pruner.masks.items()}


def test_spawned_processes_go_on_with_a_callback_that_has_pruned_here(tmp_path):
    pruning = PruningCallback([0.4, 0.6, 0.8], start_epoch=1)
    stops_once = StopsOnce(pruning)
    model = Layers()
    with pytest.warns(UserWarning, match="Training ended in round 1 of 3"):
        make_trainer(tmp_path, [pruning, stops_once]).fit(model, loader(), loader())
    trainer = make_trainer(tmp_path, [pruning, stops_once], "ddp_spawn")
    trainer.fit(model, loader(), loader())
    assert sparsity(model) == pytest.approx(0.8, abs=0.002)
    assert trainer.callback_metrics["round"] == 3
    for name, zeros in stops_once.zeros.items():
        assert not model.get_parameter(name)[zeros].any()


def test_torchrun_trains_replicas_and_shards(tmp_path):
    alone = fit(tmp_path, Random(5))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).parent / "under_torchrun.py"
    subprocess.run([*launcher, script, tmp_path], check=True, timeout=240)
    for strategy in ("ddp", "fully_shard"):
        for rank in range(2):
            found = torch.load(tmp_path / f"{strategy}-{rank}.pt", weights_only=True)
            equal(found, alone["end"])
