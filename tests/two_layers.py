"""A small network, and points that it learns."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TwoLayers(L.LightningModule):
    """A small network that separates points by the sign of their first coordinate."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(20, 50)
        self.head = nn.Linear(50, 2)

    def forward(self, points):
        return self.head(self.body(points).relu())

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        correct = self(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", correct.float().mean())

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Points(L.LightningDataModule):
    """128 points in batches of 32, always in the same order."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(128, 20, generator=generator)
        return DataLoader(TensorDataset(points, (points[:, 0] > 0).long()), batch_size=32)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
