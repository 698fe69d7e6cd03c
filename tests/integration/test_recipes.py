"""Every recipe composes, instantiates with every option, and runs."""

import itertools

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from pruneflow import latency, multiply_adds
from pruneflow.pruning.granularity import Granularity
from pruneflow.run.experiment import Experiment
from pruneflow.run.resources import resource_dir

RECIPES = sorted(path.stem for path in resource_dir("recipes").glob("*.yaml"))


GROUPS = [
    *("schedule", "optimizer", "lr_scheduler", "data", "model", "loss"),
    *("granularity", "costs", "importance"),
]


def options(group):
    return sorted(path.stem for path in (resource_dir("conf") / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder like CIFAR-10's copy, with a few noisy pictures."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, label, index in itertools.product(("train", "test"), range(10), range(6)):
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.jpg")
    return root


def test_all_recipes_of_the_plan_are_there():
    assert set(RECIPES) >= {
        "digits",
        "resnet18_cifar10",
        "resnet18_cifar10_channels",
        "resnet18_cifar10_iterative",
        "resnet18_cifar10_local",
        "resnet18_cifar10_short",
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("group", GROUPS)
def test_composes_and_instantiates_with_every_option(composed, recipe, group):
    for option in options(group):
        config = composed(f"recipe={recipe}", f"{group}={option}")
        if option == "image_folder":
            config.data.root = "pictures"
        if option == "torchvision":
            config.model.name = "mobilenet_v2"
        schedule = instantiate(config.schedule)
        assert schedule(schedule.rounds) == config.schedule.target or option == "explicit"
        assert schedule.rounds <= config.pruning.epochs
        instantiate(config.data)
        network = instantiate(config.model)(num_classes=10, in_channels=3)
        optimizer = instantiate(config.optimizer)(network.parameters())
        granularity = instantiate(config.granularity) if config.granularity else None
        assert isinstance(granularity, Granularity | None)
        assert not config.costs or instantiate(config.costs).func in (multiply_adds, latency)
        assert callable(instantiate(config.importance))
        assert instantiate(config.loss)(torch.zeros(2, 3), torch.tensor([0, 2]), None) > 0
        instantiate(config.lr_scheduler, epochs=config.dense.epochs)(optimizer)


@pytest.mark.parametrize("recipe", RECIPES)
def test_opens_with_the_command_that_runs_it(recipe):
    first = (resource_dir("recipes") / f"{recipe}.yaml").read_text().splitlines()[0]
    assert first == f"# python -m pruneflow recipe={recipe}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_states_only_what_differs_from_the_defaults(composed, recipe):
    text = OmegaConf.load(resource_dir("recipes") / f"{recipe}.yaml")
    chosen = [f"{key}={value}" for override in text.defaults for key, value in override.items()]
    chosen = [choice.removeprefix("override /") for choice in chosen]
    base = composed(*chosen, "~recipe")
    repeated = [
        f"{group}.{key}"
        for group, keys in text.items()
        if group != "defaults"
        for key, value in keys.items()
        if base[group][key] == value
    ]
    assert repeated == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_for_a_few_batches(composed, recipe, pictures, tmp_path):
    overrides = [f"recipe={recipe}", "dense.epochs=1", "pruning.epochs=11", "dense.cache=null"]
    if recipe != "digits":
        overrides += ["data=image_folder", f"data.root={pictures}", "data.batch_size=8"]
    limits = [f"++trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]
    quiet = ("++trainer.enable_progress_bar=false", "deploy.batches=[]")
    config = composed(*overrides, *limits, *quiet, "trainer.accelerator=cpu")
    facts = Experiment(config, tmp_path, recipe, "a test").run()
    whole = 0.1 if facts["granularity"] == "Channels()" else 0  # which come in vectors of 16
    assert -1e-3 <= facts["final"]["removed"] - facts["target"] <= 1e-3 + whole
    assert len(facts["rounds"]) == len(facts["plan"])
    assert (tmp_path / "report.html").exists()
