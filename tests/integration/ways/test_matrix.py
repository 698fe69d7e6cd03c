"""Whatever else a Trainer does, it goes on working when pruning is added: way x masking."""

import copy
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from learners import (
    Attention,
    Backbone,
    Clipped,
    Encoder,
    Gan,
    Learner,
    Recurrent,
    Tied,
    mlp,
    normalised,
    sentences,
    successors,
)
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from watching import Freeze, Overflow, Twin, Watch, hooks

from pruneflow import Compounding, Gradients, InPlace, PruningCallback, Reparametrize, taylor


@dataclass
class Way:
    """A way to train: a model, and what is given to the Trainer beside pruning.

    Args:
        model: The model.
        before: Callbacks that stand before pruning.
        after: Callbacks that stand after it.
        trainer: Settings of the Trainer.
        pruning: Arguments of PruningCallback.
        dense: Globs over parameters of two or more dimensions that are not to be pruned.
        sparsities: Of the first epochs.
    """

    model: Any
    before: tuple = ()
    after: tuple = ()
    trainer: dict = field(default_factory=dict)
    pruning: dict = field(default_factory=dict)
    dense: tuple = ()
    sparsities: tuple = (0, 0.4, 0.7, 0.8)


def adamw_fused(parameters, learning_rate):
    return torch.optim.AdamW(parameters, lr=learning_rate, fused=True)


def sgd_foreach(parameters, learning_rate):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)


def lbfgs(parameters, learning_rate):
    return torch.optim.LBFGS(parameters, max_iter=2, line_search_fn="strong_wolfe")


def fp16():
    scaler = torch.amp.GradScaler("cpu", backoff_factor=2.0**-12)
    return Way(
        mlp(), after=(Overflow(),), trainer=dict(plugins=MixedPrecision("16-mixed", "cpu", scaler))
    )


def words(network, **settings):
    return Way(
        Learner(network, sentences), **(dict(dense=("*embedding.weight", "*places")) | settings)
    )


def ema():
    return WeightAveraging(avg_fn=get_ema_avg_fn(0.9))


class LateEma(WeightAveraging):
    """Its average begins after the first round, and is of few steps."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 20 and step_idx % 5 == 0


def swa():
    return StochasticWeightAveraging(0.01, swa_epoch_start=3, annealing_epochs=2)


def backbone(epoch):
    return BackboneFinetuning(epoch, lambda _: 1.0, backbone_initial_lr=0.01)


class FirstEpoch(LearningRateFinder):
    """Searches when the first epoch has started, as Lightning's documentation shows."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.lr_find(trainer, pl_module)


def by_gradients():
    return dict(importance=taylor, gradients=Gradients(lambda m, batch: m.training_step(batch, 0)))


def search(kind=LearningRateFinder):
    return kind(1e-4, 0.1, num_training_steps=20)


def batch_size():
    return BatchSizeFinder(init_val=16, max_trials=1)


WAYS = {
    "fp32": lambda: Way(mlp()),
    "fp64": lambda: Way(mlp(), trainer=dict(precision="64-true")),
    "bf16": lambda: Way(mlp(), trainer=dict(precision="bf16-mixed")),
    "fp16": fp16,
    "accumulation": lambda: Way(mlp(), trainer=dict(accumulate_grad_batches=3)),
    "accumulation, steps": lambda: Way(
        mlp(),
        trainer=dict(accumulate_grad_batches=3),
        pruning=dict(start_step=3, steps_per_round=3),
    ),
    "clip norm": lambda: Way(Clipped(), trainer=dict(gradient_clip_val=0.01)),
    "clip value": lambda: Way(
        Clipped(), trainer=dict(gradient_clip_val=0.001, gradient_clip_algorithm="value")
    ),
    "adamw, fused": lambda: Way(mlp(adamw_fused)),
    "sgd, foreach": lambda: Way(mlp(sgd_foreach)),
    "lbfgs": lambda: Way(mlp(lbfgs)),
    "gan": lambda: Way(Gan(), trainer=dict(max_epochs=16), pruning=dict(scope="layer")),
    "ema before": lambda: Way(mlp(), before=(ema(),)),
    "ema after": lambda: Way(mlp(), after=(ema(),)),
    "late ema before": lambda: Way(mlp(), before=(LateEma(),)),
    "late ema after": lambda: Way(mlp(), after=(LateEma(),)),
    "swa before": lambda: Way(mlp(), before=(swa(),)),
    "swa after": lambda: Way(mlp(), after=(swa(),)),
    "swa, batch norm, before": lambda: Way(normalised(), before=(swa(),)),
    "swa, batch norm, after": lambda: Way(normalised(), after=(swa(),)),
    "deepcopy": lambda: Way(mlp(), after=(Twin(),)),
    "gradients": lambda: Way(mlp(), pruning=by_gradients()),
    "gradients, bf16": lambda: Way(
        mlp(), trainer=dict(precision="bf16-mixed"), pruning=by_gradients()
    ),
    "tied": lambda: Way(
        Learner(Tied(), successors),
        pruning=dict(include=["network.body.*", "network.embedding.weight"]),
    ),
    "attention": lambda: words(Attention()),
    "attention, out_proj excluded": lambda: words(
        Attention(),
        pruning=dict(exclude=["*.out_proj.*"]),
        dense=("*embedding.weight", "*places", "*out_proj.weight"),
    ),
    "encoder": lambda: words(Encoder()),
    "encoder, out_proj excluded": lambda: words(
        Encoder(),
        pruning=dict(exclude=["*.out_proj.*"]),
        dense=("*embedding.weight", "*places", "*out_proj.weight"),
    ),
    "lstm": lambda: words(Recurrent(nn.LSTM)),
    "gru": lambda: words(Recurrent(nn.GRU)),
    "frozen midway": lambda: Way(mlp(), before=(Freeze(2),)),
    "unfrozen before": lambda: Way(
        Backbone(), before=(backbone(1),), pruning=dict(start_epoch=2), sparsities=(0, 0, 0.4)
    ),
    "unfrozen as round 1 prunes": lambda: Way(Backbone(), before=(backbone(1),)),
    "unfrozen between rounds": lambda: Way(Backbone(), after=(backbone(2),), sparsities=(0,)),
    # Lightning puts these first, wherever they stand.
    "learning rate": lambda: Way(mlp(), before=(search(),)),
    "learning rate, steps": lambda: Way(
        mlp(), before=(search(),), pruning=dict(start_step=8, steps_per_round=8)
    ),
    "learning rate in epoch 0": lambda: Way(
        mlp(),
        before=(search(FirstEpoch),),
        pruning=dict(start_epoch=0),
        sparsities=(0.4, 0.7, 0.8),
    ),
    "batch size": lambda: Way(mlp(), before=(batch_size(),)),
    "limits": lambda: Way(mlp(), trainer=dict(limit_train_batches=0.8, limit_val_batches=1)),
    "limits, steps": lambda: Way(
        mlp(),
        trainer=dict(limit_train_batches=6, limit_val_batches=1),
        pruning=dict(start_step=6, steps_per_round=6),
    ),
    "max_time": lambda: Way(mlp(), trainer=dict(max_time={"days": 1})),
    "validation inside": lambda: Way(mlp(), trainer=dict(val_check_interval=3)),
}

# What Reparametrize cannot do, and says so before anything is trained.
REFUSED = {
    "ema before": "WeightAveraging",
    "ema after": "WeightAveraging",
    "late ema before": "LateEma",
    "late ema after": "LateEma",
    "swa before": "StochasticWeightAveraging",
    "swa after": "StochasticWeightAveraging",
    "swa, batch norm, before": "StochasticWeightAveraging",
    "swa, batch norm, after": "StochasticWeightAveraging",
    "tied": "network.embedding.weight (tied to network.head.weight)",
    "attention": "network.attention.out_proj.weight",
    "encoder": "network.layer.self_attn.out_proj.weight",
}


IN_PLACE = [(name, InPlace) for name in WAYS]
REPARAMETRIZED = [(name, Reparametrize) for name in WAYS if name not in {*REFUSED, "deepcopy"}]


def make(trainer, name, masking):
    """The way, its Trainer, and what prunes and watches in it."""
    torch.manual_seed(0)
    way, watch = WAYS[name](), Watch()
    clock = {} if "start_step" in way.pruning else dict(start_epoch=1, epochs_per_round=1)
    pruning = PruningCallback(
        Compounding(target=0.8, rounds=3), masking=masking(), **(clock | way.pruning)
    )
    callbacks = (*way.before, pruning, *way.after, watch)
    return way, trainer(*callbacks, **(dict(max_epochs=6) | way.trainer)), pruning, watch


def plain(model):
    """What pruning has to leave as it was: parameters, in their order, keys and hooks."""
    parameters = [(name, id(p), type(p), p.shape) for name, p in model.named_parameters()]
    return parameters, list(model.state_dict()), hooks(model)


def prunable(way):
    return [
        parameter
        for name, parameter in way.model.named_parameters()
        if parameter.dim() > 1 and not any(fnmatchcase(name, glob) for glob in way.dense)
    ]


@pytest.mark.filterwarnings("ignore:.*neither pruned nor counted")  # embeddings
@pytest.mark.parametrize(("name", "masking"), IN_PLACE + REPARAMETRIZED)
def test_zeros_hold_and_the_task_is_learned(trainer, name, masking):
    way, fit, pruning, watch = make(trainer, name, masking)
    before = plain(way.model)
    fit.fit(way.model)
    sizes = [parameter.numel() for parameter in prunable(way)]
    groups = sizes if way.pruning.get("scope") == "layer" else [sum(sizes)]
    zeros = sum(int((parameter == 0).sum()) for parameter in prunable(way))
    assert zeros == sum(round(0.8 * size) for size in groups)
    assert (pruning.round, pruning.sparsity) == (3, zeros / sum(sizes))
    assert tuple(watch.sparsities[: len(way.sparsities)]) == way.sparsities
    assert plain(way.model) == before
    [measured] = trainer().validate(way.model.float(), verbose=False)
    assert measured["val_accuracy"] > 0.85


@pytest.mark.filterwarnings("ignore:.*neither pruned nor counted")  # embeddings
@pytest.mark.parametrize("name", REFUSED)
def test_reparametrize_refuses_by_name_before_anything_is_trained(trainer, name):
    way, fit, _, _ = make(trainer, name, Reparametrize)
    before, state = plain(way.model), copy.deepcopy(way.model.state_dict())
    with pytest.raises(ValueError, match=rf"{re.escape(REFUSED[name])}.*InPlace"):
        fit.fit(way.model)
    assert plain(way.model) == before
    assert all(torch.equal(state[key], value) for key, value in way.model.state_dict().items())


def test_reparametrize_refuses_deepcopy_by_name(trainer):
    way, fit, _, _ = make(trainer, "deepcopy", Reparametrize)
    before = plain(way.model)
    with pytest.raises(RuntimeError, match="use masking=InPlace"):
        fit.fit(way.model)
    assert plain(way.model) == before


@pytest.mark.parametrize("make_model", [mlp, normalised, Clipped, Backbone, Gan])
def test_points_have_to_be_learned(trainer, make_model):
    torch.manual_seed(0)
    [measured] = trainer().validate(make_model(), verbose=False)
    assert measured["val_accuracy"] < 0.65
