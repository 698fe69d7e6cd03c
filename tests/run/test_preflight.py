"""What cannot run is refused before anything runs, with one message that names the key."""

import os
import re

import pytest
import torch
from lightning import LightningDataModule
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruneflow.run.deploy_task import DeployTask
from pruneflow.run.experiment import Experiment
from pruneflow.run.preflight import BuildError, check_values

EMA = "{_target_: lightning.pytorch.callbacks.EMAWeightAveraging}"
EARLY_STOPPING = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val_loss}"


class Pictures(LightningDataModule):
    """Somebody's own datamodule: no `ImageData`, no fingerprint, plain loaders."""

    classes = ("dark", "light")
    num_classes = 2
    image_shape = (1, 4, 4)

    def __init__(self, count=8, batch_size=4, drop_last=False):
        super().__init__()
        labels = torch.arange(count) % 2
        images = labels[:, None, None, None] + 0.1 * torch.rand(count, 1, 4, 4)
        self.loader = DataLoader(
            TensorDataset(images, labels), batch_size=batch_size, drop_last=drop_last
        )

    def train_dataloader(self):
        return self.loader

    val_dataloader = test_dataloader = train_dataloader


class NoNames(Pictures):
    @property
    def classes(self):
        raise AttributeError("classes")


class OneClass(Pictures):
    classes, num_classes = ("all",), 1


def no_module(num_classes, in_channels):
    return [num_classes, in_channels]


def too_many(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 1000))


def linear(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))


def loss_per_image():
    return lambda logits, labels, images: logits[:, 0]


def loss_as_a_number():
    return lambda logits, labels, images: 0.5


def loss_of_the_labels():
    return lambda logits, labels, images: labels.float().mean()


def with_parts(config, **parts):
    """The configuration with parts of one's own: each a class or function, or with arguments."""
    for key, part in parts.items():
        target, arguments = part if isinstance(part, tuple) else (part, {})
        node = {"_target_": f"{target.__module__}.{target.__qualname__}", **arguments}
        OmegaConf.update(config, key, node | {"_partial_": key == "model"}, merge=False)
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "deploy.batches=16",
            "`deploy.batches` must be a list of whole numbers, got 16; set deploy.batches=[16]",
        ),
        (
            "deploy.batches=[0]",
            "`deploy.batches` must be at least 1, got [0]; set deploy.batches=[1,16,128]",
        ),
        ("deploy.batches=[1,many]", "`deploy.batches` must be a list of whole numbers"),
        (
            "deploy.threads=0",
            f"`deploy.threads` must be at least 1 and at most {os.cpu_count()}, got 0",
        ),
        (
            "deploy.threads=100000",
            f"at most {os.cpu_count()}, got 100000; set deploy.threads=null",
        ),
        ("deploy.batches=-1", "got -1; set deploy.batches=[1,16,128]"),
        ("deploy.threads=all", "`deploy.threads` must be a whole number or null, got 'all'"),
        ("seed=null", "`seed` must be a whole number, got null; set seed=0"),
        ("seed=-1", "`seed` must be at least 0 and at most 4294967295, got -1"),
        ("seed=1.5", "`seed` must be a whole number, got 1.5"),
        ("seed=true", "`seed` must be a whole number, got True"),
        ("resume=maybe", "`resume` must be true or false, got 'maybe'; set resume=true"),
        ("task=compare", "`task` must be 'prune' or 'deploy', got 'compare'"),
        ("dense.epochs=-1", "`dense.epochs` must be at least 0, got -1; set dense.epochs=10"),
        ("dense.epochs=1.5", "`dense.epochs` must be a whole number, got 1.5"),
        ("dense.weights=3", "`dense.weights` must be a string or null, got 3"),
        (
            "dense.weights=nowhere.pt",
            "`dense.weights` must be an existing file, got 'nowhere.pt'",
        ),
        ("pruning.epochs=two", "`pruning.epochs` must be a whole number, got 'two'"),
        ("pruning.exclude=null", "`pruning.exclude` must be a list of strings, got null"),
        ("pruning.exclude=fc", '; set pruning.exclude=["fc"]'),
        ("pruning.gradient_batches=0", "`pruning.gradient_batches` must be at least 1, got 0"),
        (
            "data.batch_size=large",
            "`data.batch_size` must be a whole number, got 'large'; set data.batch_size=128",
        ),
        ("data.batch_size=null", "`data.batch_size` must be a whole number, got null"),
        ("data.flip=maybe", "`data.flip` must be true or false, got 'maybe'; set data.flip=false"),
        (
            "data.mean=0.5",
            "`data.mean` must be a list of numbers or null, got 0.5; set data.mean=[0.5]",
        ),
        (
            "data.val_size=some",
            "`data.val_size` must be a number, got 'some'; set data.val_size=0.1",
        ),
        ("optimizer.lr=abc", "`optimizer.lr` must be a number, got 'abc'; set optimizer.lr=0.001"),
        ("optimizer.lr=nan", "`optimizer.lr` must be finite, got nan; set optimizer.lr=0.001"),
        ("optimizer.lr=inf", "`optimizer.lr` must be finite, got inf"),
        ("optimizer.momentum=[1]", "`optimizer.momentum` must be a number, got [1]"),
        (
            "model.width=wide",
            "`model.width` must be a whole number, got 'wide'; set model.width=32",
        ),
        ("schedule.rounds=two", "`schedule.rounds` must be a whole number, got 'two'"),
        ("classifier.channels_last=maybe", "`classifier.channels_last` must be true or false"),
        ("trainer.precision=7-mixed", "`trainer.precision` must be "),
        ("trainer.gradient_clip_val=lots", "`trainer.gradient_clip_val` must be a number or null"),
        (
            "trainer.accumulate_grad_batches=0",
            "`trainer.accumulate_grad_batches` must be at least 1",
        ),
        ("trainer.min_epochs=-1", "`trainer.min_epochs` must be at least 0, got -1"),
        ("loss.label_smoothing=some", "`loss.label_smoothing` must be a number, got 'some'"),
        (
            "callbacks=ema callbacks.ema.decay=slow",
            "`callbacks.ema.decay` must be a number, got 'slow'; set callbacks.ema.decay=0.999",
        ),
        (
            "callbacks=[lr_monitor,early_stopping] callbacks.early_stopping.patience=1.5",
            "`callbacks.early_stopping.patience` must be a whole number, got 1.5",
        ),
        (
            "callbacks=[lr_monitor] callbacks.lr_monitor.logging_interval=day",
            "`callbacks.lr_monitor.logging_interval` must be 'step' or 'epoch' or null, got 'day'",
        ),
        ("granularity=blocks granularity.rows=x", "`granularity.rows` must be a whole number"),
    ],
)
def test_values_of_the_wrong_type_or_range_are_refused(composed, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_values(composed(*override.split()))


def test_a_key_that_follows_another_is_not_named_besides(composed):
    with pytest.raises(ValueError, match="`seed` must be") as caught:
        check_values(composed("seed=null"))
    assert "data.seed" not in str(caught.value)


def test_a_key_that_was_taken_out_is_left_to_whoever_reads_it(composed):
    check_values(composed("~dense.cache", "~trainer.precision"))


def test_all_that_is_wrong_is_said_at_once(composed):
    with pytest.raises(ValueError, match=r"(?s)`seed`.*`deploy.batches`.*`data.batch_size`"):
        check_values(composed("seed=x", "deploy.batches=1", "data.batch_size=x"))


@pytest.mark.parametrize("group", ["adam", "adamw", "sgd"])
def test_what_is_right_passes(composed, group):
    extra = ("data.mean=[1]", "data.val_size=100", "trainer.limit_test_batches=0.5", "seed=7")
    check_values(composed(f"optimizer={group}", "optimizer.lr=1", "model.width=8", *extra))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.limit_test_batches=0"],
            "`trainer.limit_test_batches` must keep at least 1 of the 6 batches, got 0;",
        ),
        (
            ["trainer.limit_train_batches=0"],
            "`trainer.limit_train_batches` must keep at least 1",
        ),
        (
            ["trainer.limit_val_batches=0.01"],
            "`trainer.limit_val_batches` must keep at least 1 of the 3",
        ),
        (["trainer.limit_test_batches=1.5"], "invalid value 1.5 for limit_test_batches"),
        (
            ["trainer.precision=16-mixed"],
            "got '16-mixed' on a CPU; set trainer.precision",
        ),
        (["trainer.accelerator=warp"], "invalid accelerator name"),
        (["+trainer.foo=1"], "unexpected keyword argument 'foo'"),
        (["optimizer.lr=-1"], "Invalid learning rate: -1"),
        (["model.width=-3"], "negative dimension -3"),
        (
            [f"checkpoint={__file__}"],
            "`checkpoint` must be left out when pruning, got ",
        ),
        (["dense.cache=/dev/null/cache"], "/dev/null"),
        (["++trainer.max_epochs=3"], "`trainer.max_epochs` must be left out, got 3; set `dense"),
        (["loss.label_smoothing=1"], "`label_smoothing` must be in [0, 1), got 1"),
        (["+loss.temperature=2"], "unexpected keyword argument 'temperature'"),
        (["+importance.temperature=2"], "unexpected keyword argument 'temperature'"),
        (["costs=latency", "+costs.repeat=2"], "unexpected keyword argument 'repeat'"),
        (
            ["callbacks=[ema,lr_monitor]"],
            "`callbacks.lr_monitor` must have a logger, got none; set logger=csv",
        ),
        (
            ["+callbacks.stats={_target_: lightning.pytorch.callbacks.DeviceStatsMonitor}"],
            "`callbacks.stats` must have a logger, got none",
        ),
        (["callbacks=ema", "callbacks.ema.decay=2"], "Invalid decay value 2"),
        (["callbacks=ema", "+callbacks.ema.speed=2"], "unexpected keyword argument 'speed'"),
        (["+callbacks.mine=3"], "`callbacks.mine` must build a Lightning callback, got 3"),
        (
            ["+callbacks.mine={_target_: builtins.dict}"],
            "`callbacks.mine` must build a Lightning callback, got {}",
        ),
        (["+callbacks.mine={_target_: nowhere.Callback}"], "No module named 'nowhere'"),
        (
            ["+callbacks.mine={_target_: pruneflow.PruningCallback, schedule: [0.5]}"],
            "`callbacks.mine` must not be a PruningCallback, as every run has one",
        ),
        (
            ["callbacks=ema", f"+callbacks.other={EMA}"],
            "`callbacks` must average the weights once, got callbacks.ema, callbacks.other; leave",
        ),
        (
            ["callbacks=ema", "masking=reparametrize"],
            "`masking` must be in_place with callbacks.ema",
        ),
        (
            ["callbacks=early_stopping", f"+callbacks.other={EARLY_STOPPING}"],
            "Found more than one stateful callback of type `EarlyStopping`",
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val_los"],
            "`callbacks.early_stopping.monitor` must be one of val_loss, val_accuracy, train_loss, "
            "train_accuracy, got 'val_los'",
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val_accuracy"],
            "`callbacks.early_stopping.mode` must be 'max' for val_accuracy, got 'min'; set "
            "callbacks.early_stopping.mode=max",
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.mode=top"],
            "`mode` can be min, max, got top",
        ),
        (
            [
                *("callbacks=ema", "+callbacks.ema.update_starting_at_epoch=11"),
                *("+callbacks.ema.update_starting_at_step=99999", "dense.epochs=0"),
                "pruning.epochs=11",
            ],
            "`callbacks.ema` must update the averaged weights in each phase, got no update in the "
            "rounds (epochs 0 to 10,",
        ),
        (
            ["callbacks=ema", "callbacks.ema.update_every_n_steps=0"],
            "`callbacks.ema` must update the averaged weights in each phase, got no update in the "
            "dense phase (",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_it_runs(composed, tmp_path, overrides, message):
    defaults = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    with pytest.raises(ValueError, match=re.escape(message)):
        Experiment(composed(*defaults, *overrides), tmp_path, "digits", "a test")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": OneClass}, "`data` must have at least two classes, each with a name, got 1"),
        ({"data": NoNames}, "got NoNames without `classes`; see pruneflow.data.ImageData"),
        ({"data": dict}, "'dict' object has no attribute 'prepare_data'"),
        (
            {"data": (Pictures, {"batch_size": 9, "drop_last": True})},
            "`data` must have batches in `train_dataloader`, got none; lower data.batch_size",
        ),
        (
            {"data": Pictures, "model": too_many},
            "`model` must return 2 logits for each image, one per class, got shape (2, 1000)",
        ),
        ({"data": Pictures, "model": no_module}, "no attribute 'training'"),
        (
            {"data": Pictures, "loss": loss_per_image},
            "`loss` must return a scalar that depends on the logits, got shape (2,); return the me",
        ),
        ({"data": Pictures, "loss": loss_as_a_number}, "depends on the logits, got 0.5"),
        ({"data": Pictures, "loss": loss_of_the_labels}, "depends on the logits, got shape ()"),
    ],
)
def test_parts_of_ones_own_that_do_not_fit_are_refused(composed, tmp_path, parts, message):
    config = with_parts(composed("trainer.accelerator=cpu"), **parts)
    with pytest.raises(ValueError, match=re.escape(message)):
        Experiment(config, tmp_path, "digits", "a test")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_refused_by_the_node_that_asks_for_it(
    composed, tmp_path, accelerator
):
    with pytest.raises(BuildError) as refused:
        Experiment(composed(f"trainer.accelerator={accelerator}"), tmp_path, "digits", "a test")
    assert refused.value.key == "trainer"


@pytest.mark.parametrize("override", ["deploy.batches=16", "deploy.threads=0", "data.batch_size=x"])
def test_deploying_is_checked_as_well(composed, tmp_path, override):
    with pytest.raises(ValueError, match=f"`{override.split('=')[0]}` must be"):
        DeployTask(composed("task=deploy", f"checkpoint={__file__}", override), tmp_path)


def test_a_batch_that_takes_all_pictures_is_named(composed, tmp_path, caplog):
    Experiment(composed("data.batch_size=5000", "trainer.accelerator=cpu"), tmp_path, "", "")
    assert "`data.batch_size` is at least the number of images" in caplog.text


def test_a_datamodule_of_ones_own_runs_without_a_fingerprint(composed, tmp_path, caplog):
    config = composed(
        *("dense.epochs=1", "pruning.epochs=1", "schedule=one_shot", "deploy.batches=[]"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
        f"dense.cache={tmp_path}/cache",
    )
    config = with_parts(config, data=Pictures, model=linear)
    facts = Experiment(config, tmp_path, "mine", "a test").run()
    assert facts["classes"] == ["dark", "light"]
    assert "the dense phase is not cached" in caplog.text
