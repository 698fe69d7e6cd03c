"""A training that runs alike in one process and in two, under any launcher."""

import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from pruneflow import Gradients, PruningCallback


class Layers(L.LightningModule):
    """Layers whose rows two processes cannot share evenly, or at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 8), nn.ReLU(), nn.Linear(8, 1)
        )

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.layers[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.layers[0], mesh=mesh)
            fully_shard(self.layers, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def loss(self, batch):
        return nn.functional.softplus(-self.layers(batch[0])[:, 0] * batch[1]).mean()

    def validation_step(self, batch, batch_idx):
        self.layers(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.03, weight_decay=0.1)


def here(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Watch(L.Callback):
    """Notes what is held at both ends of a training, and that zeros are exact after every step."""

    def __init__(self, pruning):
        self.pruning = pruning

    def on_train_start(self, trainer, pl_module):
        self.start = self.pruning.round, self.pruning.pruner.masks.state()

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, mask in self.pruning.pruner.masks.items():
            assert torch.equal(here(pl_module.get_parameter(name)) != 0, here(mask))

    def on_train_epoch_end(self, trainer, pl_module):
        self.end = self.pruning.round, self.pruning.pruner.masks.state()


def loader():
    points = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(points, points[:, 0].sign()), batch_size=16)


def make_trainer(folder, callbacks, strategy="auto"):
    if strategy == "fully_shard":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    return L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def fit(folder, importance, *, strategy="auto", resume=None, scope="global"):
    """Prune at epochs 1, 2 and 3 of 4, a checkpoint each; returns what came of it."""
    pruning = PruningCallback(
        [0.4, 0.6, 0.8],
        importance=importance,
        gradients=Gradients(Layers.loss, batches=4),
        scope=scope,
        start_epoch=1,
    )
    watch = Watch(pruning)
    model = Layers()
    trainer = make_trainer(folder, [pruning, watch], strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(), loader(), ckpt_path=resume)
    return {
        "start": watch.start,
        "end": watch.end,
        "weights": {name: here(weight.detach()) for name, weight in model.named_parameters()},
        "sparsity": pruning.sparsity,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "warnings": [str(warning.message) for warning in caught],
    }
