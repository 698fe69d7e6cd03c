"""Small tasks that have to be learned, and the networks that learn them."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from watching import held


class Learner(L.LightningModule):
    """A network that classifies; reports accuracy on points that it was not trained on."""

    batch_size = 32

    def __init__(self, network, task, optimizer=None):
        super().__init__()
        self.network = network
        self.task = task
        self.make_optimizer = optimizer or adam
        self.learning_rate = 0.03

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs).flatten(0, -2), labels.flatten())

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("val_accuracy", (self(inputs).argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        return self.make_optimizer(parameters, self.learning_rate)

    def train_dataloader(self):
        return loader(self.task(seed=1), self.batch_size)

    def val_dataloader(self):
        return loader(self.task(seed=2), 128)


def adam(parameters, learning_rate):
    return torch.optim.Adam(parameters, lr=learning_rate)


def loader(tensors, batch_size):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def points(seed):
    """On which side of a plane? Chance is 0.5."""
    inputs = torch.randn(256, 20, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] + inputs[:, 1] > 0).long()


def sentences(seed):
    """Does a word of the first half of the dictionary come first? Chance is 0.5."""
    words = torch.randint(12, (256, 5), generator=torch.Generator().manual_seed(seed))
    return words, (words[:, 0] < 6).long()


def successors(seed):
    """Which word follows each word? Chance is 1 in 12."""
    words = torch.randint(12, (256, 5), generator=torch.Generator().manual_seed(seed))
    return words, (5 * words + 3) % 12


def layers():
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 2))


def mlp(optimizer=None):
    return Learner(layers(), points, optimizer)


def normalised():
    network = nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 2))
    return Learner(network, points)


class Clipped(Learner):
    """Looks at what clipping does: it has to see the gradients of surviving weights only."""

    def __init__(self):
        super().__init__(layers(), points)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        before = self.gradients()
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if gradient_clip_algorithm == "value":
            expected = before.clamp(-gradient_clip_val, gradient_clip_val)
        else:
            assert before.norm() > gradient_clip_val
            expected = before * gradient_clip_val / (before.norm() + 1e-6)
        torch.testing.assert_close(self.gradients(), expected)

    def gradients(self):
        """Those of the survivors, having checked that the others are zero."""
        masks, survivors = held(self.trainer), []
        for name, parameter in self.named_parameters():
            keep = masks.get(name.removesuffix("_orig"), torch.ones(parameter.shape, dtype=bool))
            assert int(parameter.grad[~keep].count_nonzero()) == 0
            survivors.append(parameter.grad[keep])
        return torch.cat(survivors)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.recurrent = kind(8, 16, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, words):
        states, _ = self.recurrent(self.embedding(words))
        return self.head(states.mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.places = nn.Parameter(torch.randn(5, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, words):
        words = self.embedding(words) + self.places
        mixed, _ = self.attention(words, words, words, need_weights=False)
        return self.head(mixed.mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.places = nn.Parameter(torch.randn(5, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, words):
        return self.head(self.layer(self.embedding(words) + self.places).mean(1))


class Tied(nn.Module):
    """The embedding of a word is also what the output is compared with."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.body(self.embedding(words)))


class Backbone(Learner):
    """What BackboneFinetuning expects: a part called `backbone`."""

    def __init__(self):
        super().__init__(None, points)
        self.backbone = nn.Sequential(nn.Linear(20, 40), nn.ReLU())
        self.head = nn.Linear(40, 2)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))


class Gan(L.LightningModule):
    """Two networks, two optimizers, manual optimization; learns where real points lie."""

    real = torch.tensor([2.0, -1.0])

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        noise = batch[0][:, :4]
        real = self.real + 0.3 * batch[0][:, 4:6]
        self.toggle_optimizer(critic)
        fake = self.generator(noise).detach()
        loss = (self.critic(real) - 1).square().mean() + self.critic(fake).square().mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward((self.critic(self.generator(noise)) - 1).square().mean())
        generator.step()
        self.untoggle_optimizer(generator)

    def validation_step(self, batch, batch_idx):
        distance = (self.generator(batch[0][:, :4]) - self.real).norm(dim=1)
        self.log("val_accuracy", (distance < 1).float().mean())

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.0, 0.9)),
            torch.optim.Adam(self.critic.parameters(), lr=0.03, betas=(0.0, 0.9)),
        ]

    def train_dataloader(self):
        return loader(points(seed=1), 32)

    def val_dataloader(self):
        return loader(points(seed=2), 128)
