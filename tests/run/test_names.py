"""Old names of settings, and keys that belong to the experiment."""

import logging

import pytest
from omegaconf import OmegaConf

from pruneflow.run.names import (
    allow_hidden,
    check_trainer_keys,
    log_old_names,
    rename_keys,
)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("trainer.max_epochs=3", "++trainer.max_epochs=3"),
        ("+trainer.max_epochs=3", "++trainer.max_epochs=3"),
        ("++trainer.devices=1", "++trainer.devices=1"),
        ("classifier.label_smoothing=0,0.1", "++classifier.label_smoothing=0,0.1"),
        ("trainer.max_epochs_=3", "trainer.max_epochs_=3"),
        ("mytrainer.max_epochs=3", "mytrainer.max_epochs=3"),
        ("~trainer.devices", "~trainer.devices"),
        ("seed=1", "seed=1"),
        ("-m", "-m"),
    ],
)
def test_hidden_keys_alone_are_let_through(argument, expected):
    assert allow_hidden([argument]) == [expected]


def test_what_an_old_key_sets_is_moved():
    config = OmegaConf.create({"classifier": {"label_smoothing": 0.2}, "loss": {"a": 1}})
    OmegaConf.set_struct(config, True)
    found = rename_keys(config)
    assert found == {"classifier.label_smoothing": "loss.label_smoothing"}
    assert config == {"classifier": {}, "loss": {"a": 1, "label_smoothing": 0.2}}
    assert rename_keys(config) == {}


@pytest.mark.parametrize("config", [{}, {"classifier": None}, {"classifier": {}}])
def test_where_there_is_no_old_key_nothing_changes(config):
    there = OmegaConf.create(config)
    assert rename_keys(there) == {}
    assert there == config


def test_old_names_are_noted_with_the_new_ones(caplog):
    caplog.set_level(logging.INFO)
    choices = {"granularity": "weights", "costs": "none", "callbacks": ["ema"]}
    log_old_names(choices, {"a.b": "c.d"})
    assert caplog.messages == [
        "`granularity=weights` is now called `granularity=unstructured`; the old name still works",
        "`a.b` is now called `c.d`; the old name still works",
    ]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("max_epochs", 3, "`dense.epochs` and `pruning.epochs`"),
        ("max_steps", 3, "`dense.epochs` and `pruning.epochs`"),
        ("fast_dev_run", True, "`dense.epochs` and `pruning.epochs`"),
        ("check_val_every_n_epoch", 2, "`dense.epochs` and `pruning.epochs`"),
        ("callbacks", [], "`+callbacks.NAME`"),
        ("logger", False, "`logger=csv`"),
        ("devices", 2, "in your own Trainer"),
        ("devices", None, "in your own Trainer"),
    ],
)
def test_keys_of_the_experiment_are_refused_with_what_serves_instead(key, value, remedy):
    with pytest.raises(ValueError, match=f"`trainer.{key}` must be") as refused:
        check_trainer_keys(OmegaConf.create({key: value}))
    assert remedy in str(refused.value)


@pytest.mark.parametrize("trainer", [{}, {"devices": 1}, {"devices": "1"}, {"max_epochs": None}])
def test_what_changes_nothing_passes(trainer):
    check_trainer_keys(OmegaConf.create(trainer))
