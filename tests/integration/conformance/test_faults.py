"""Faults of Lightning's ModelPruning and of torch.nn.utils.prune, and their absence here.

Each test first shows the fault where it is, so that what docs/compared.md claims stays true.
"""

import copy
import logging

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn.utils import prune

from pruneflow import (
    Compounding,
    InPlace,
    OneShot,
    Pruner,
    PruningCallback,
    Reparametrize,
    sparsity,
)
from pruneflow.structure.parameters import select


def layers(model):
    return [(model.body, "weight"), (model.head, "weight")]


def model_pruning(model, amount=0.5, **kwargs):
    settings = dict(
        parameters_to_prune=layers(model),
        amount=amount,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )
    return ModelPruning("l1_unstructured", **(settings | kwargs))


class SaveAt(Callback):
    """Save a checkpoint at the end of one epoch; note the sparsity after every epoch."""

    def __init__(self, path=None, epoch=None):
        self.path, self.epoch, self.seen = path, epoch, []

    def on_train_epoch_end(self, trainer, pl_module):
        weights = [module.weight.detach() for module, _ in layers(pl_module)]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        self.seen.append(round(zeros / sum(weight.numel() for weight in weights), 3))
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def test_resume_does_not_unprune(model, batches, trainer, tmp_path):
    path = tmp_path / "two.ckpt"
    fit = trainer(model_pruning(model), max_epochs=2)
    fit.fit(model, batches)
    fit.save_checkpoint(path)
    other = type(model)()
    trainer(model_pruning(other), max_epochs=3).fit(other, batches, ckpt_path=path)
    assert sparsity(other) == pytest.approx(0.5, abs=0.01)  # the fault: asked was 1-0.5³ = 0.875

    schedule = Compounding(amount=0.5, rounds=3)
    ours = type(model)()
    trainer(PruningCallback(schedule), SaveAt(path, epoch=1)).fit(ours, batches)
    resumed = type(model)()
    trainer(PruningCallback(schedule)).fit(resumed, batches, ckpt_path=path)
    assert sparsity(resumed) == pytest.approx(0.875, abs=1e-3)


def test_a_checkpoint_before_the_masks_are_removed_loads(model, batches, trainer, tmp_path):
    path = tmp_path / "one.ckpt"
    fit = trainer(model_pruning(model, make_pruning_permanent=False), max_epochs=1)
    fit.fit(model, batches)
    fit.save_checkpoint(path)
    other = type(model)()
    with pytest.raises(RuntimeError, match="weight_orig"):
        trainer(model_pruning(other, make_pruning_permanent=False), max_epochs=2).fit(
            other, batches, ckpt_path=path
        )

    for masking in (InPlace, Reparametrize):
        ours = type(model)()
        pruning = PruningCallback(OneShot(0.5), masking=masking())
        trainer(pruning, SaveAt(path, epoch=0), max_epochs=2).fit(ours, batches)
        plain = type(model)()
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
        assert sparsity(plain) == 0.5


def test_a_checkpoint_is_named_after_the_sparsity_of_its_weights(model, batches, trainer, tmp_path):
    class LogSparsity(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("sparsity", sparsity(pl_module))

    def saved(folder):
        pairs = set()
        for path in folder.glob("*.ckpt"):
            plain = type(model)()
            plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            pairs.add((path.stem, f"sparsity={sparsity(plain):.2f}"))
        return pairs

    def checkpoint(folder):
        return ModelCheckpoint(folder, filename="{sparsity:.2f}", save_top_k=-1)

    theirs = type(model)()
    folder = tmp_path / "theirs"
    trainer(
        LogSparsity(), model_pruning(theirs), checkpoint(folder), enable_checkpointing=True
    ).fit(theirs, batches)
    assert any(name != weights for name, weights in saved(folder))

    folder = tmp_path / "ours"
    trainer(PruningCallback([0.5, 0.8]), checkpoint(folder), enable_checkpointing=True).fit(
        model, batches
    )
    assert saved(folder) == {(name, name) for name in ("sparsity=0.50", "sparsity=0.80")}


def test_a_buffer_of_the_model_may_end_in_mask(model, batches, trainer, tmp_path):
    def with_buffer():
        new = type(model)()
        new.register_buffer("attention_mask", torch.ones(3))
        return new

    theirs = with_buffer()
    with pytest.raises(KeyError, match="attention_orig"):
        trainer(model_pruning(theirs), SaveAt(tmp_path / "one.ckpt", 0), max_epochs=1).fit(
            theirs, batches
        )

    for masking in (InPlace, Reparametrize):
        ours, path = with_buffer(), tmp_path / "ours.ckpt"
        fit = trainer(
            PruningCallback(OneShot(0.5), masking=masking()), SaveAt(path, 0), max_epochs=1
        )
        fit.fit(ours, batches)
        state = torch.load(path, weights_only=True)["state_dict"]
        assert set(state) == set(with_buffer().state_dict())


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.1, 2)]
)
def test_averaged_weights_are_sparse(model, batches, trainer, averaging):
    def sparsity_after(make_pruning, order):
        new = type(model)()
        # With biases the fault is another one: parameters change their order, and shapes differ.
        new.body.bias = new.head.bias = None
        trainer(*[make_pruning(new), averaging()][::order], max_epochs=4).fit(new, batches)
        return sparsity(new)

    assert 0.0 in {sparsity_after(model_pruning, order) for order in (1, -1)}

    ours = {sparsity_after(lambda _: PruningCallback(OneShot(0.5)), order) for order in (1, -1)}
    assert ours == {0.5}


def test_parameters_keep_their_order(model):
    plain = [name for name, _ in model.named_parameters()]
    theirs = copy.deepcopy(model)
    for layer, name in layers(theirs):
        prune.l1_unstructured(layer, name, 0.5)
        prune.remove(layer, name)
    assert [name for name, _ in theirs.named_parameters()] != plain

    for masking in (InPlace, Reparametrize):
        pruner = Pruner(model, optimizers=[], masking=masking())
        pruner.prune_to(0.5)
        pruner.remove()
        assert [name for name, _ in model.named_parameters()] == plain


def test_the_last_prune_is_followed_by_fine_tuning(model, batches, trainer):
    class LossAfterLastStep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights = pl_module.body.weight.detach().clone()

    watch = LossAfterLastStep()
    trainer(model_pruning(model), watch, max_epochs=1).fit(model, batches)
    assert int((watch.weights == 0).sum()) == 0  # the fault: dense until training was over
    assert sparsity(model) == 0.5

    ours = type(model)()
    trainer(PruningCallback(OneShot(0.5)), watch, max_epochs=1).fit(ours, batches)
    assert int((watch.weights == 0).sum()) > 0


def test_survivors_are_not_rewound_unasked(model, batches, trainer):
    class MovedByPrune(Callback):
        """How far survivors move where a round prunes: at an epoch's end or start."""

        moved = 0.0

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.before = live(pl_module.body)

        def on_train_batch_start(self, trainer, pl_module, *_):
            if hasattr(self, "before"):
                now = live(pl_module.body)
                change = (now - self.before)[now != 0].abs().max()
                self.moved = max(self.moved, float(change))

    def live(layer):
        return getattr(layer, "weight_orig", layer.weight).detach().clone()

    theirs = ModelPruning("l1_unstructured", layers(model), amount=0.2)
    watch = MovedByPrune()
    trainer(theirs, watch, max_epochs=2).fit(model, batches)
    assert watch.moved > 0  # the fault: on by default, every epoch

    watch = MovedByPrune()
    trainer(PruningCallback(Compounding(amount=0.2, rounds=2)), watch).fit(type(model)(), batches)
    assert watch.moved == 0


def test_a_second_fit_may_take_a_new_model(model, batches, trainer):
    theirs = model_pruning(model)
    trainer(theirs, max_epochs=1).fit(model, batches)
    other = type(model)()
    with pytest.raises(Exception, match="parameters_to_prune"):
        trainer(theirs, max_epochs=1).fit(other, batches)

    ours = PruningCallback(OneShot(0.5))
    for new in (type(model)(), type(model)()):
        trainer(ours, max_epochs=1).fit(new, batches)
        assert sparsity(new) == 0.5


def test_deepcopy_of_a_pruned_module_that_has_run():
    theirs = nn.Linear(4, 4)
    prune.l1_unstructured(theirs, "weight", 0.5)
    theirs(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)

    ours = nn.Linear(4, 4)
    Pruner(ours, optimizers=[]).prune_to(0.5)
    ours(torch.ones(1, 4))
    assert sparsity(copy.deepcopy(ours)) == 0.5


def test_importance_is_read_from_the_live_weight():
    def grow_a_survivor(layer, weight):
        with torch.no_grad():
            weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
            weight[0, 1] = 10.0

    theirs = nn.Linear(4, 1)
    theirs.weight.data = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    prune.l1_unstructured(theirs, "weight", 1)
    grow_a_survivor(theirs, theirs.weight_orig)
    prune.l1_unstructured(theirs, "weight", 1)
    assert theirs.weight[0, 1] == 0  # the fault: the weight that was now 10.0 went

    ours = nn.Linear(4, 1)
    ours.weight.data = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    for masking in (InPlace(), Reparametrize()):
        layer = copy.deepcopy(ours)
        pruner = Pruner(layer, optimizers=[], masking=masking)
        pruner.prune_to(0.25)
        live = layer.weight_orig if isinstance(masking, Reparametrize) else layer.weight
        grow_a_survivor(layer, live)
        assert pruner.prune_to(0.5)["weight"].tolist() == [[False, True, False, True]]


def test_normalisation_and_biases_are_not_in_the_pool(trainer, batches):
    class WithNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)

    model = WithNorm()
    theirs = ModelPruning.sanitize_parameters_to_prune(model, None)
    assert {(type(module).__name__, name) for module, name in theirs} == {
        ("Conv2d", "weight"),
        ("Conv2d", "bias"),
        ("BatchNorm2d", "weight"),
        ("BatchNorm2d", "bias"),
    }
    assert list(select(model).slots) == ["conv.weight"]


def test_attention_and_tied_weights():
    attention = nn.MultiheadAttention(4, 2)
    prune.l1_unstructured(attention.out_proj, "weight", 0.5)
    tokens = torch.randn(3, 1, 4)
    attention(tokens, tokens, tokens)[0].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        attention(tokens, tokens, tokens)[0].sum().backward()

    ours = nn.MultiheadAttention(4, 2)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    Pruner(ours, optimizers=[optimizer]).prune_to(0.5)
    for _ in range(2):
        optimizer.zero_grad()
        ours(tokens, tokens, tokens)[0].sum().backward()
        optimizer.step()
    assert sparsity(ours) == 0.5

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    prune.l1_unstructured(tied[0], "weight", 0.5)
    assert int((tied[1].weight == 0).sum()) == 0  # the fault: one side escapes the mask

    ours = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ours[1].weight = ours[0].weight
    Pruner(ours, optimizers=[]).prune_to(0.5)
    assert int((ours[1].weight == 0).sum()) == 8


def test_what_was_asked_for_is_reached_and_said(model, batches, trainer, caplog):
    caplog.set_level(logging.INFO)
    trainer(model_pruning(model), max_epochs=3).fit(model, batches)
    assert sparsity(model) == pytest.approx(0.875, abs=1e-3)  # the fault: every epoch compounds
    assert "87.5" not in caplog.text

    ours = type(model)()
    trainer(PruningCallback(OneShot(0.5)), max_epochs=3).fit(ours, batches)
    assert sparsity(ours) == 0.5
    assert "50.00 %           550" in caplog.text


def test_many_rounds_do_not_drift_from_the_target():
    rounds, gamma, weights = 30, 0.07, 101
    schedule = Compounding(amount=gamma, rounds=rounds)
    asked = round(schedule.target * weights)
    theirs = nn.Linear(weights, 1)
    for _ in range(rounds):
        prune.l1_unstructured(theirs, "weight", gamma)
    assert int((theirs.weight_mask == 0).sum()) != asked

    ours = nn.Linear(weights, 1)
    pruner = Pruner(ours, optimizers=[])
    for number in range(1, rounds + 1):
        pruner.prune_to(schedule(number))
    assert int((ours.weight == 0).sum()) == asked


@pytest.mark.parametrize("masking", [InPlace, Reparametrize])
def test_what_is_pruned_does_not_drift_under_weight_decay(masking):
    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    theirs = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=0.1)
    prune.l1_unstructured(theirs, "weight", 0.5)
    hidden = theirs.weight_orig[theirs.weight_mask == 0].clone()
    step(theirs, optimizer)
    assert not torch.equal(theirs.weight_orig[theirs.weight_mask == 0], hidden)

    ours = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, weight_decay=0.1)
    pruner = Pruner(ours, optimizers=[optimizer], masking=masking())
    mask = pruner.prune_to(0.5)["weight"]
    step(ours, optimizer)
    live = ours.weight_orig if masking is Reparametrize else ours.weight
    assert int((live[~mask] != 0).sum()) == 0
