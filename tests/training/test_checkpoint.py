import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn.utils import prune
from two_layers import TwoLayers

from pruneflow import InPlace, Linear, OneShot, PruningCallback, Reparametrize, sparsity
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.plan import Clock, Plan
from pruneflow.training.checkpoint import SparsityCheckpoint
from pruneflow.training.checkpoint_io import AtomicCheckpointIO
from pruneflow.training.checks import callback_warnings

# Lightning says so whenever a training goes on in the folder of its checkpoints.
same_folder = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Measured(TwoLayers):
    """Logs a metric that tells any two sets of weights and buffers apart."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 50), nn.BatchNorm1d(50))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Seen(Callback):
    """Records the metric of each validation, under the round that it fell in."""

    def __init__(self, pruning):
        self.pruning = pruning
        self.metrics = {}

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            metric = float(trainer.callback_metrics["val_loss"])
            self.metrics.setdefault(self.pruning.round, []).append(metric)


class EpochAverage(WeightAveraging):
    """Averages at the end of an epoch, after its validation."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


class Move(Callback):
    """Moves the weights once an epoch has been validated."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.body[0].bias.data += 0.1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Measured()


@pytest.fixture
def fit(trainer, batches, model, tmp_path):
    """Fit the model with a SparsityCheckpoint in `tmp_path`, and return that."""

    def run(*callbacks, module=model, monitor="val_loss", ckpt_path=None, **kwargs):
        best = SparsityCheckpoint(monitor=monitor, dirpath=tmp_path)
        settings = {"enable_checkpointing": True} | kwargs
        trainer(*callbacks, best, **settings).fit(module, batches, ckpt_path=ckpt_path)
        return best

    return run


def by_epoch(**kwargs):
    return PruningCallback(Linear(0.9, 2), start_epoch=2, epochs_per_round=2, **kwargs)


def by_step():
    return PruningCallback(Linear(0.9, 2), start_step=6, steps_per_round=9)


@pytest.mark.parametrize(
    ("make", "others", "kwargs"),
    [
        pytest.param(by_epoch, [], {}, id="in place"),
        pytest.param(lambda: by_epoch(masking=Reparametrize()), [], {}, id="reparametrized"),
        pytest.param(by_epoch, [EpochAverage()], {}, id="averaged at epoch end"),
        pytest.param(by_epoch, [WeightAveraging()], {}, id="averaged at each step"),
        pytest.param(by_epoch, [Move()], {}, id="moved at epoch end"),
        pytest.param(by_epoch, [], {"val_check_interval": 0.5}, id="mid-epoch"),
        pytest.param(by_step, [], {}, id="by step"),
        pytest.param(
            by_step, [], {"accumulate_grad_batches": 2, "val_check_interval": 1}, id="accumulated"
        ),
    ],
)
def test_each_has_the_weights_and_masks_that_its_metric_was_measured_on(
    fit, batches, trainer, tmp_path, make, others, kwargs
):
    pruning = make()
    seen = Seen(pruning)
    best = fit(pruning, seen, *others, max_epochs=8, **kwargs)
    assert list(best.best_of_rounds) == [0, 1, 2]
    assert set(map(str, tmp_path.iterdir())) == set(best.best_of_rounds.values())
    assert best.best_model_path == best.best_of_rounds[2]
    assert best.best_model_score == min(seen.metrics[2])
    for round, path in best.best_of_rounds.items():
        checkpoint = torch.load(path, weights_only=True)
        plain = Measured()
        plain.load_state_dict(checkpoint["state_dict"], strict=True)
        [measured] = trainer().validate(plain, batches, verbose=False)
        assert measured["val_loss"] == min(seen.metrics[round])
        assert sparsity(plain) == [0, 0.45, 0.9][round]
        state = checkpoint["callbacks"]["PruningCallback"]
        assert state["round"] == round
        for name, mask in MaskSet.from_state(state["masks"]).items():
            assert torch.equal(plain.get_parameter(name) != 0, mask)
        name = f"sparsity={sparsity(plain):.4f}-val_loss={measured['val_loss']:.4f}.ckpt"
        assert path == str(tmp_path / name)


@same_folder
@pytest.mark.parametrize("round", [0, 1, 2])
def test_training_resumes_from_each_and_remembers_the_others(fit, model, round):
    best = fit(by_epoch())
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    other = Measured()
    resumed = fit(by_epoch(), module=other, ckpt_path=best.best_of_rounds[round])
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name])
    # Its own later checkpoints stand beside those of the first training, as version 1.
    for number, path in best.best_of_rounds.items():
        version = "-v1" if number > round else ""
        assert resumed.best_of_rounds[number] == path.replace(".ckpt", f"{version}.ckpt")
    assert resumed.best_model_score == best.best_model_score


def test_best_is_a_model_at_the_target_though_a_denser_one_scored_better(
    trainer, batches, model, tmp_path
):
    pruning = PruningCallback(Linear(0.98, 2), start_epoch=4)
    seen = Seen(pruning)
    best = SparsityCheckpoint(monitor="val_loss", dirpath=tmp_path)
    once = trainer(pruning, seen, best, enable_checkpointing=True)
    once.fit(model, batches)
    assert min(seen.metrics[0]) < min(seen.metrics[2])
    tested = Measured()
    [measured] = once.test(tested, batches, ckpt_path="best", verbose=False)
    assert sparsity(tested) == 0.98
    assert measured["val_loss"] == best.best_model_score == seen.metrics[2][0]


def test_nothing_is_best_while_the_target_is_not_reached(trainer, batches, model, tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    best = SparsityCheckpoint(monitor="val_loss", dirpath=tmp_path)
    once = trainer(by_epoch(), Stop(), best, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="below the target"):
        once.fit(model, batches)
    assert list(best.best_of_rounds) == [0, 1]
    assert (best.best_model_path, best.best_model_score) == ("", None)
    assert torch.load(best.best_of_rounds[1])["callbacks"][best.state_key]["best_model_path"] == ""
    with pytest.raises(ValueError, match="not configured to save the best model"):
        once.test(Measured(), batches, ckpt_path="best")


def test_the_highest_metric_is_best_with_mode_max(trainer, batches, tmp_path):
    class Accuracy(Callback):
        def __init__(self):
            self.seen = []

        def on_validation_end(self, trainer, pl_module):
            self.seen.append(float(trainer.callback_metrics["val_accuracy"]))

    accuracy = Accuracy()
    best = SparsityCheckpoint(
        monitor="val_accuracy",
        mode="max",
        dirpath=tmp_path,
        filename="{round:.0f}-{val_accuracy:.5f}",
        save_last=True,
    )
    torch.manual_seed(0)
    pruning = PruningCallback(Linear(0.98, 2), epochs_per_round=3)
    trainer(pruning, accuracy, best, enable_checkpointing=True, num_sanity_val_steps=0).fit(
        TwoLayers(), batches
    )
    assert min(accuracy.seen[3:]) < max(accuracy.seen[3:])
    names = {
        f"round={round}-val_accuracy={max(seen):.5f}.ckpt"
        for round, seen in ((1, accuracy.seen[:3]), (2, accuracy.seen[3:]))
    }
    assert {path.name for path in tmp_path.iterdir()} == names | {"last.ckpt"}


def test_several_callbacks_reach_the_target_together(fit):
    body = PruningCallback(Linear(0.8, 2), include=["body.*"], start_epoch=1, epochs_per_round=2)
    head = PruningCallback(Linear(0.5, 1), include=["head.*"], start_epoch=2)
    best = fit(body, head)
    state = [torch.load(path)["callbacks"] for path in best.best_of_rounds.values()]
    names = [path.rpartition("sparsity=")[2][:6] for path in best.best_of_rounds.values()]
    assert names == ["0.0000", "0.3636", "0.4091", "0.7727"]
    assert best.best_model_path == best.best_of_rounds[3]
    assert [s[best.state_key]["best_model_path"] for s in state[:3]] == ["", "", ""]


def test_a_method_that_keeps_its_own_amount_has_rounds_too(fit):
    pruning = PruningCallback(2, importance=prune.L1Unstructured(0.5), start_epoch=1)
    best = fit(pruning)
    assert list(best.best_of_rounds) == [0, 1, 2]
    assert "sparsity=0.7500-" in best.best_model_path


@same_folder
def test_another_fit_starts_over_and_leaves_the_files_of_the_first(
    trainer, batches, model, tmp_path
):
    pruning = by_epoch()
    best = SparsityCheckpoint(monitor="val_loss", dirpath=tmp_path)
    trainer(pruning, best, enable_checkpointing=True).fit(model, batches)
    first = list(best.best_of_rounds.values())
    seen = Seen(pruning)
    untrained = Measured()
    untrained.configure_optimizers = lambda: torch.optim.SGD(untrained.parameters(), lr=1e-6)
    trainer(pruning, seen, best, enable_checkpointing=True).fit(untrained, batches)
    assert best.best_model_score == min(seen.metrics[2])
    assert best.best_model_path == best.best_of_rounds[2]
    assert set(map(str, tmp_path.iterdir())) == {*first, *best.best_of_rounds.values()}
    assert len(list(tmp_path.iterdir())) == 6
    unmeasured = trainer(by_epoch(), best, enable_checkpointing=True, check_val_every_n_epoch=9)
    with pytest.warns(UserWarning, match="No validation"):
        unmeasured.fit(Measured(), batches)
    assert (best.best_model_path, best.best_model_score, best.best_of_rounds) == ("", None, {})


@same_folder
def test_a_state_that_is_not_whole_is_refused_by_name(fit):
    path = fit(by_epoch()).best_of_rounds[1]
    checkpoint = torch.load(path)
    for key, state in checkpoint["callbacks"].items():
        if key.startswith("SparsityCheckpoint"):
            del state["best_of_rounds"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"must hold the whole state .*, got no `best_of_rounds`"):
        fit(by_epoch(), module=Measured(), ckpt_path=path)


def test_another_folder_starts_over(fit, trainer, batches, tmp_path):
    path = fit(by_epoch()).best_of_rounds[1]
    best = SparsityCheckpoint(monitor="val_loss", dirpath=tmp_path / "other")
    again = trainer(by_epoch(), best, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        again.fit(Measured(), batches, ckpt_path=path)
    assert list(best.best_of_rounds) == [2]


def test_a_slash_in_the_name_of_the_metric_makes_no_folder(trainer, batches, tmp_path):
    class Slash(TwoLayers):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    best = SparsityCheckpoint(monitor="val/loss", dirpath=tmp_path)
    trainer(PruningCallback(OneShot(0.5)), best, enable_checkpointing=True, max_epochs=1).fit(
        Slash(), batches
    )
    [path] = tmp_path.iterdir()
    assert path.name.startswith("sparsity=0.5000-val_loss=0.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(save_top_k=3),
            "`save_top_k` must be left out of SparsityCheckpoint, as it .*, got 3",
        ),
        (
            dict(save_on_train_epoch_end=True),
            "as it saves weights right after their validation",
        ),
        (dict(every_n_epochs=2, save_on_exception=True), r"`every_n_epochs`.*\n`save_on_exception"),
        (dict(monitor=None), "`monitor` must be the name of a metric .* got None"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparsityCheckpoint(**({"monitor": "val_loss"} | options))


def test_a_fit_that_measures_nothing_of_rounds_is_refused(fit):
    with pytest.raises(ValueError, match=r"`callbacks` must contain a PruningCallback .* got none"):
        fit()
    with pytest.raises(ValueError, match=r"`monitor` must be .* got 'val_loss' without validation"):
        fit(by_epoch(), limit_val_batches=0)


@pytest.mark.parametrize("monitor", ["train_loss", "val_los"])
def test_a_metric_that_validation_does_not_log_is_refused(fit, monitor):
    with pytest.raises(ValueError, match=f"`monitor` .* got '{monitor}', which was not logged"):
        fit(by_epoch(), monitor=monitor)


@pytest.mark.parametrize(
    ("callback", "kwargs", "remedy"),
    [
        (ModelCheckpoint(monitor="a"), {}, r"use SparsityCheckpoint\(monitor='a', mode='min'\)"),
        (ModelCheckpoint(monitor="a", mode="max", save_top_k=-1), {}, "mode='max'"),
        (ModelCheckpoint(), {}, None),
        (ModelCheckpoint(save_last=True), {}, None),
        (ModelCheckpoint(monitor="a", save_top_k=0, save_last=True), {}, None),
        (ModelCheckpoint(monitor="step", mode="max"), {}, None),
        (ModelCheckpoint(monitor="step", mode="min"), {}, "SparsityCheckpoint"),
        (ModelCheckpoint(monitor="sparsity", mode="max"), {}, None),
        (SparsityCheckpoint(monitor="a"), {}, None),
        (EarlyStopping("a"), {}, r"at epoch 5, has been.*set Trainer\(min_epochs=8\)"),
        (EarlyStopping("a"), {"min_epochs": 7}, "min_epochs"),
        (EarlyStopping("a"), {"min_epochs": 8}, None),
        (EarlyStopping("a", patience=6), {}, "min_epochs"),
        (EarlyStopping("a", patience=7), {}, None),
        (EarlyStopping("a", patience=7), {"val_check_interval": 0.5}, "min_epochs"),
        (EarlyStopping("a", patience=7, stopping_threshold=0.1), {}, "min_epochs"),
        (EarlyStopping("a", patience=7, divergence_threshold=9.0), {}, "min_epochs"),
    ],
)
def test_says_which_callbacks_may_choose_a_denser_model(trainer, callback, kwargs, remedy):
    plan = Plan.lay([0.5, 0.8], Clock(start=2, every=3))
    messages = callback_warnings(trainer(callback, enable_checkpointing=True, **kwargs), plan)
    assert len(messages) == (remedy is not None)
    assert all(re.search(f"{type(callback).__name__}.*{remedy}", text) for text in messages)


def test_nothing_is_denser_where_all_is_pruned_at_once_or_for_a_trial(trainer):
    callbacks = [EarlyStopping("a", patience=0), ModelCheckpoint(monitor="a")]
    settings = {"enable_checkpointing": True}
    assert len(callback_warnings(trainer(*callbacks, **settings), Plan.lay([0.5, 0.8]))) == 2
    assert callback_warnings(trainer(*callbacks, **settings), Plan.lay([0.8])) == []
    assert callback_warnings(trainer(*callbacks, **settings), Plan.lay(None)) == []
    trial = trainer(*callbacks, fast_dev_run=True, **settings)
    assert callback_warnings(trial, Plan.lay([0.5, 0.8])) == []


@pytest.mark.parametrize(
    ("sparsities", "length", "end"),
    [
        ([0.5, 0.8], None, 8),
        ([0.5, 0.8], 7, 7),
        ([0.5, 0.8], 30, 8),
        ([0.8], 30, 30),
        ([0.8], None, 3),
    ],
)
def test_the_advice_leads_to_the_end_of_the_last_rounds_fine_tuning(
    trainer, sparsities, length, end
):
    plan = Plan.lay(sparsities, Clock(start=2, every=3), length)
    (message,) = callback_warnings(trainer(EarlyStopping("a", patience=0)), plan)
    assert message.endswith(f"set Trainer(min_epochs={end})")
    assert callback_warnings(trainer(EarlyStopping("a", patience=0), min_epochs=end), plan) == []


@pytest.mark.parametrize(("minimum", "patience"), [({}, 7), ({"min_epochs": 8}, 1)])
def test_early_stopping_of_which_nothing_is_said_waits_for_the_last_round(
    trainer, batches, model, minimum, patience
):
    """Even where no check after the first improves the metric."""
    pruning = PruningCallback(Linear(0.8, 2), start_epoch=2, epochs_per_round=3)
    stopping = EarlyStopping("val_loss", min_delta=100.0, patience=patience)
    once = trainer(pruning, stopping, max_epochs=20, **minimum)
    once.fit(model, batches)
    assert callback_warnings(once, pruning.plan) == []
    assert (once.current_epoch, pruning.round) == (8, 2)


def test_early_stopping_stops_by_steps_too(trainer):
    plan = Plan.lay([0.5, 0.8], Clock(start=2, every=3, unit="step"))
    for steps, said in ((None, 1), (7, 1), (8, 0)):
        assert (
            len(callback_warnings(trainer(EarlyStopping("a", patience=99), min_steps=steps), plan))
            == said
        )


@pytest.mark.parametrize(
    ("make", "kwargs", "known_ahead"),
    [
        (by_epoch, dict(max_epochs=5, check_val_every_n_epoch=3), True),
        (by_epoch, dict(max_epochs=6, check_val_every_n_epoch=7), True),
        (by_epoch, dict(max_epochs=5, check_val_every_n_epoch=4, val_check_interval=0.5), True),
        (by_epoch, dict(check_val_every_n_epoch=None, val_check_interval=15), False),
        (by_step, dict(max_epochs=5, check_val_every_n_epoch=3), False),
        (by_epoch, dict(max_epochs=-1, max_steps=18, check_val_every_n_epoch=3), False),
    ],
)
def test_a_last_round_that_no_validation_follows_is_said_to_be_without_checkpoint(
    fit, make, kwargs, known_ahead
):
    pruning = make()
    with pytest.warns(UserWarning, match="No validation") as warned:
        best = fit(pruning, **kwargs)
    said = [str(warning.message) for warning in warned]
    assert any("No validation followed the last round" in text for text in said)
    assert any("No validation will follow" in text for text in said) == known_ahead
    assert (best.best_model_path, pruning.sparsity) == ("", 0.9)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(max_epochs=6, check_val_every_n_epoch=3),
        dict(max_epochs=5, check_val_every_n_epoch=5),
        dict(check_val_every_n_epoch=None, val_check_interval=20),
        dict(fast_dev_run=True, check_val_every_n_epoch=9),
    ],
)
def test_nothing_is_said_where_a_validation_follows(fit, kwargs):
    assert bool(fit(by_epoch(), **kwargs).best_model_path) == ("fast_dev_run" not in kwargs)


@same_folder
def test_nothing_is_said_where_the_last_round_was_in_another_fit(fit):
    pruning = by_epoch()
    fit(pruning)
    assert fit(pruning, max_epochs=2).best_model_path


class Swapping(torch.optim.SGD):
    """Trains with one set of weights and validates another, as schedule-free optimizers do."""

    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            other = self.state[parameter].setdefault("other", torch.rand_like(parameter))
            other.lerp_(parameter.detach(), 0.1)
        return loss

    @torch.no_grad()
    def swap(self):
        for parameter in self.param_groups[0]["params"]:
            if "other" in self.state[parameter]:
                trained = parameter.clone()
                parameter.copy_(self.state[parameter]["other"])
                self.state[parameter]["other"] = trained


def swapping(before, after):
    class Swapped(Measured):
        def configure_optimizers(self):
            return Swapping(self.parameters(), lr=0.01)

    def swap(self):
        if not self.trainer.sanity_checking:
            self.optimizers().optimizer.swap()

    setattr(Swapped, before, swap)
    setattr(Swapped, after, swap)
    return Swapped()


@pytest.mark.parametrize("masking", [InPlace, Reparametrize])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("on_validation_model_eval", "on_validation_model_train"),
        ("on_validation_start", "on_validation_end"),
        ("on_validation_epoch_start", "on_validation_epoch_end"),
    ],
)
def test_each_has_the_sparsity_of_its_name_beside_weights_swapped_for_validation(
    trainer, batches, tmp_path, before, after, weights_only, masking
):
    class Measuring(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                seen.append(sparsity(state_of(pl_module)))

        def on_before_backward(self, trainer, pl_module, loss):
            trained.append(sparsity(state_of(pl_module)))

    def state_of(module):
        plain = Measured()
        plain.load_state_dict(module.state_dict())
        return plain

    seen, trained = [], []
    pruning = by_epoch(optimizer_state="keep", masking=masking())
    best = SparsityCheckpoint(monitor="val_loss", dirpath=tmp_path, save_weights_only=weights_only)
    module = swapping(before, after)
    trainer(pruning, Measuring(), best, enable_checkpointing=True).fit(module, batches)
    assert seen == [0] * 8 + [0.45] * 8 + [0.9] * 8 == trained
    assert list(best.best_of_rounds) == [0, 1, 2]
    for round, path in best.best_of_rounds.items():
        plain = Measured()
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert sparsity(plain) == [0, 0.45, 0.9][round]
    assert sparsity(module) == 0.9


@same_folder
def test_weights_that_come_back_after_training_are_warned_of(fit):
    class WithEval(Measured):
        def configure_optimizers(self):
            optimizer = Swapping(self.parameters(), lr=0.01)
            optimizer.eval = optimizer.swap
            return optimizer

    with pytest.warns(UserWarning, match=r"'keep', `eval\(\)` of Swapping can restore"):
        fit(by_epoch(optimizer_state="keep"), module=WithEval(), max_epochs=5)
    fit(by_epoch(), module=WithEval(), max_epochs=5)


@pytest.mark.parametrize("name", ["x" * 300, "\u00e4" * 300, "val/" + "y" * 240])
def test_a_long_name_of_a_metric_is_cut_short(trainer, batches, tmp_path, name):
    class Long(TwoLayers):
        def validation_step(self, batch, batch_idx):
            self.log(name, nn.functional.cross_entropy(self(batch[0]), batch[1]))

    for plugins in ([], [AtomicCheckpointIO()]):
        best = SparsityCheckpoint(monitor=name, dirpath=tmp_path / str(len(plugins)))
        pruning = PruningCallback(OneShot(0.5))
        settings = {"enable_checkpointing": True, "max_epochs": 1, "plugins": plugins}
        trainer(pruning, best, **settings).fit(Long(), batches)
        [path] = (tmp_path / str(len(plugins))).iterdir()
        assert re.search(r"sparsity=0\.5000-.*=0\.\d{4}\.ckpt", path.name)


def test_names_that_no_file_system_takes_are_refused():
    for filename in ("a" * 231, "{epoch}-" + "b" * 230, "folder/" + "\u00e4" * 120):
        with pytest.raises(ValueError, match="`filename` must give names of at most 230 bytes"):
            SparsityCheckpoint(monitor="val_loss", filename=filename)
    SparsityCheckpoint(monitor="val_loss", filename="a" * 200 + "/" + "b" * 200 + "-{val_loss:.2f}")
