"""What several tests share."""

import os

# Networks this small are faster on one thread, above all while something else is running; set
# before torch is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import pytest
import torch
from two_layers import Points, TwoLayers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoLayers()


@pytest.fixture
def batches():
    return Points()


@pytest.fixture
def trainer(tmp_path):
    """Make a quiet Trainer with the given callbacks."""

    def make(*callbacks, **kwargs):
        settings = {
            "max_epochs": 6,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
        }
        return L.Trainer(callbacks=list(callbacks), **(settings | kwargs))

    return make


@pytest.fixture(scope="module")
def composed():
    """Compose the configuration with overrides."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from pruneflow.run.recipes import store_recipes
    from pruneflow.run.resources import resource_dir

    store_recipes()
    with initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        yield lambda *overrides: compose("config", overrides=list(overrides))
    ConfigStore.instance().repo.pop("recipe")
