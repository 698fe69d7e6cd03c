import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from two_layers import Points, TwoLayers

from pruneflow import (
    Calibration,
    Gradients,
    InPlace,
    OneShot,
    Pruner,
    PruningCallback,
    Reparametrize,
    input_norms,
    magnitude,
    taylor,
)

both = pytest.mark.parametrize("masking", [InPlace, Reparametrize])


def loss(module, batch):
    return cross_entropy(module(batch[0]), batch[1])


def by_magnitude(name, tensor, context):
    assert context.gradients[name].shape == tensor.shape
    return tensor.abs()


by_magnitude.needs_gradients = True


def by_input_norms(name, tensor, context):
    return tensor.abs() * context.evidence[name]


by_input_norms.needs = input_norms


def taylor_scores(model, batches):
    model = copy.deepcopy(model)
    for batch in batches:
        (loss(model, batch) / len(batches)).backward()
    return [(layer.weight * layer.weight.grad).abs() for layer in (model.body, model.head)]


@both
@pytest.mark.parametrize("clock", [dict(start_epoch=2), dict(start_step=9)])
def test_a_round_keeps_what_the_loss_depends_on_most(model, batches, trainer, masking, clock):
    class Check(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == (9 if "start_step" in clock else 8):
                # The masks are there by now, so what was pruned is taken from before.
                scores = taylor_scores(self.before, list(batches.train_dataloader())[:3])
                smallest_kept = min(
                    score[mask].min()
                    for score, mask in zip(scores, pruning.pruner.masks.values(), strict=True)
                )
                largest_pruned = max(
                    score[~mask].max()
                    for score, mask in zip(scores, pruning.pruner.masks.values(), strict=True)
                )
                assert largest_pruned <= smallest_kept
                self.checked = pruning.pruner.masks.pruned

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.before = TwoLayers()
            self.before.load_state_dict(pl_module.state_dict())

    check = Check()
    pruning = PruningCallback(
        OneShot(0.7),
        importance=taylor,
        calibration=Calibration(loss, 3),
        masking=masking(),
        **clock,
    )
    trainer(pruning, check).fit(model, batches)
    assert check.checked == round(0.7 * 1100)


def test_before_any_training(model, batches, trainer):
    scores = taylor_scores(model, list(batches.train_dataloader()))
    kept = torch.cat([score.flatten() for score in scores]).topk(110).indices
    pruning = PruningCallback(OneShot(0.9), importance=taylor, calibration=Calibration(loss))
    trainer(pruning, max_epochs=1).fit(model, batches)
    weights = torch.cat([model.body.weight.flatten(), model.head.weight.flatten()])
    assert torch.equal(weights.nonzero().flatten(), kept.sort().values)


class Noisy(TwoLayers):
    """Has all that one pass too many would be seen by."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(50)
        self.drop = nn.Dropout(0.3)

    def forward(self, points):
        return self.head(self.drop(self.norm(self.body(points)).relu()))


class Shuffled(Points):
    """Shuffled by numbers of its own or by the global ones, in this process or in another."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def train_dataloader(self):
        dataset = super().train_dataloader().dataset
        if "generator" in self.settings:
            self.settings["generator"].manual_seed(3)
        return DataLoader(dataset, batch_size=32, shuffle=True, **self.settings)


@pytest.mark.parametrize(
    "settings",
    [{}, dict(generator=torch.Generator()), dict(num_workers=1, persistent_workers=True)],
    ids=["global numbers", "numbers of its own", "another process"],
)
def test_the_training_goes_on_as_if_no_gradient_had_been_taken(trainer, settings):
    weights = []
    for importance in (None, by_magnitude):
        gradients = (
            dict(importance=importance, calibration=Calibration(loss, 2)) if importance else {}
        )
        L.seed_everything(1, verbose=False)
        network = Noisy()
        pruning = PruningCallback([0.5, 0.8], start_step=1, steps_per_round=2, **gradients)
        trainer(pruning, max_epochs=2, accumulate_grad_batches=2).fit(network, Shuffled(**settings))
        weights.append(network.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


def test_resumes_with_the_same_gradients(trainer, tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(resume=None):
        L.seed_everything(1, verbose=False)
        network = TwoLayers()
        pruning = PruningCallback(
            [0.4, 0.6, 0.8], importance=taylor, calibration=Calibration(loss, 2)
        )
        trainer(pruning, Save(), max_epochs=4).fit(network, Points(), ckpt_path=resume)
        return network.state_dict()

    whole = run()
    resumed = run(tmp_path / "0.ckpt")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_in_any_loop_it_is_the_gradient_of_the_last_backward(model, batches):
    [batch] = list(batches.train_dataloader())[:1]
    pruner = Pruner(model, importance=taylor, optimizers=[])
    with pytest.raises(ValueError, match=r"none for body.weight, head.weight; .* prune after"):
        pruner.prune_to(0.5)
    loss(model, batch).backward()
    scores = torch.cat([s.flatten() for s in taylor_scores(model, [batch])])
    masks = pruner.prune_to(0.5)
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert torch.equal(kept.nonzero().flatten(), scores.topk(550).indices.sort().values)


def test_scores_of_halves_do_not_vanish():
    model = nn.Linear(4, 4).half()
    model.weight.data.fill_(1e-3)
    model.weight.data[0] = 2e-3
    pruner = Pruner(model, importance=taylor, optimizers=[])
    masks = pruner.prune_to(0.75, gradients={"weight": torch.full((4, 4), 1e-6).half()})
    assert masks["weight"][0].all()


@pytest.mark.parametrize(
    ("gradients", "error"),
    [
        (lambda: None, r"`calibration` must be set, as taylor needs"),
        (
            lambda: Calibration(loss, 0),
            "`batches` must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_refuses_at_construction(gradients, error):
    with pytest.raises(ValueError, match=error):
        PruningCallback(OneShot(0.5), importance=taylor, gradients=gradients())


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (lambda module, batch: 1.0, r"`loss` must return a scalar .* got 1.0"),
        (lambda module, batch: module(batch[0]), "`loss` must return a scalar"),
        (lambda module, batch: module(batch[0]).sum().detach(), "that depends on the weights"),
        (lambda module, batch: module.head.weight.sum(), "none for body.weight"),
    ],
    ids=["a number", "no scalar", "detached", "of a part"],
)
def test_refuses_a_loss_and_leaves_the_model_dense(model, batches, trainer, loss, error):
    pruning = PruningCallback(OneShot(0.5), importance=taylor, calibration=Calibration(loss))
    with pytest.raises(ValueError, match=error):
        trainer(pruning).fit(model, batches)
    assert all(parameter.all() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


# -- before training -------------------------------------------------------------------------------


class Normed(TwoLayers):
    """With a layer that is never called, and batch norm, whose statistics a pass would move."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(20)
        self.unused = nn.Linear(20, 20)

    def forward(self, points):
        return super().forward(self.norm(points))


class Order(L.Callback):
    """Notes the batches that training gets, and random numbers between them."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen += [batch[0].clone(), torch.rand(1)]


class InAnyOrder(Points):
    def train_dataloader(self):
        return DataLoader(super().train_dataloader().dataset, batch_size=32, shuffle=True)


def no_batch(module, batch):
    return cross_entropy(module(batch["images"]), batch["labels"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(importance=by_input_norms),
            r"`evidence` must have an entry .* got none for unused\.weight",
        ),
        (
            dict(importance=taylor, calibration=Calibration(no_batch)),
            r"`calibration` must have a loss that accepts .* got TypeError: ",
        ),
        (
            dict(importance=by_input_norms, calibration=Calibration(no_batch)),
            r"`calibration` must have a loss that accepts .* got TypeError: ",
        ),
    ],
    ids=["never called", "taylor, other batches", "input norms, other batches"],
)
def test_what_cannot_be_collected_is_refused_before_training(trainer, settings, message):
    torch.manual_seed(0)
    model, order = Normed(), Order()
    before = copy.deepcopy(model.state_dict())
    pruning = PruningCallback(
        [0.5], start_epoch=3, **(dict(calibration=Calibration(loss)) | settings)
    )
    with pytest.raises(ValueError, match=message):
        trainer(pruning, order).fit(model, InAnyOrder())
    assert not order.seen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_trying_the_calibration_changes_nothing_of_the_training(trainer):
    def run(importance):
        torch.manual_seed(0)
        model, order = Normed(), Order()
        pruning = PruningCallback(
            [0.5],
            importance=importance,
            calibration=Calibration(loss, batches=2),
            start_epoch=2,
            exclude=("unused.*",),
        )
        torch.manual_seed(1)
        trainer(order, pruning, max_epochs=3).fit(model, InAnyOrder())
        return order.seen, model

    plain, _ = run(magnitude)
    for importance in (taylor, by_input_norms):
        seen, model = run(importance)
        assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
        assert (model.body.weight == 0).any()


def test_what_the_first_batch_does_not_reach_others_may(trainer, batches):
    class Sometimes(TwoLayers):
        def forward(self, points):
            used = self.body if points[0, 0] > self.limit else self.spare
            return self.head(used(points).relu())

    model = Sometimes()
    model.spare = nn.Linear(20, 50)
    first = [float(batch[0][0, 0]) for batch in batches.train_dataloader()]
    model.limit = first[0]
    assert any(each > first[0] for each in first)
    pruning = PruningCallback(
        [0.5], importance=by_input_norms, calibration=Calibration(loss, batches=4)
    )
    trainer(pruning, max_epochs=1).fit(model, batches)
    assert pruning.sparsity == 0.5


def test_the_former_name_still_works(trainer, model, batches):
    pruning = PruningCallback([0.5], importance=taylor, gradients=Gradients(loss, batches=2))
    trainer(pruning, max_epochs=1).fit(model, batches)
    assert pruning.sparsity == 0.5


def test_a_calibration_of_another_kind():
    with pytest.raises(TypeError, match=r"`calibration` must be a Calibration, got loss"):
        PruningCallback([0.5], importance=taylor, calibration=loss)


def test_a_model_can_be_checked_before_there_is_a_trainer(batches):
    model = Normed()
    before = copy.deepcopy(model.state_dict())
    pruning = PruningCallback([0.5], importance=by_input_norms, calibration=Calibration(loss))
    pruning.check(model)
    with pytest.raises(ValueError, match=r"`evidence` must have .* got none for unused\.weight"):
        pruning.check(model, batches=batches.train_dataloader())
    del model.unused
    pruning.check(model, batches=batches.train_dataloader())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
