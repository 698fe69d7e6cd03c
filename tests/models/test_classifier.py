from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from pruneflow.data import Digits
from pruneflow.models import Classifier, CrossEntropy, cosine, multistep, small_cnn
from pruneflow.structure.parameters import locate, unwrap

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)


def trainer(epochs, **settings):
    return Trainer(
        **settings,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    data = Digits(batch_size=64)
    module = Classifier(small_cnn(10, 1, width=16), 10, SGD, partial(cosine, epochs=4))
    fitted = trainer(4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on images of 8x8
    fitted.fit(module, data)
    torch.set_num_threads(threads)
    return module, data, fitted


def test_digits_are_learned(trained):
    module, data, fitted = trained
    (results,) = trainer(1).test(module, data, verbose=False)
    assert results["test_accuracy"] > 0.95
    assert fitted.callback_metrics["val_accuracy"] > 0.95
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} == set(
        fitted.callback_metrics
    )


def test_metrics_are_those_of_the_whole_set(trained):
    module, data, _ = trained
    (results,) = trainer(1).test(module, data, verbose=False)
    batches = list(data.test_dataloader())
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        logits = module.eval()(images)
    right = logits.argmax(1) == labels
    assert results["test_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    assert results["test_accuracy"] == pytest.approx(right.float().mean().item())
    expected = [right[labels == digit].float().mean().item() for digit in range(10)]
    assert module.test_per_class == pytest.approx(expected)


def test_state_dict_is_the_networks_alone(trained):
    module, _, _ = trained
    expected = [f"network.{key}" for key in module.network.state_dict()]
    assert list(module.state_dict()) == expected


@pytest.fixture
def batches():
    """Two of unequal size, all of class 0."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.zeros(size).long())
        for size in (5, 3)
    ]
    return DataLoader(pairs, batch_size=None)


def test_training_metrics_weigh_images_alike_and_start_again_each_epoch(batches):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    module = Classifier(network, 2, partial(torch.optim.SGD, lr=0.0), loss=CrossEntropy(0.2))
    images = torch.cat([images for images, _ in batches])
    labels = torch.zeros(8).long()
    for epochs in (1, 3):
        fitted = trainer(epochs)
        fitted.fit(module, batches, batches)
        expected = cross_entropy(network(images), labels, label_smoothing=0.2).item()
        assert fitted.callback_metrics["train_loss"].item() == pytest.approx(expected, rel=1e-5)
        share = (network(images).argmax(1) == 0).float().mean().item()
        assert fitted.callback_metrics["train_accuracy"].item() == pytest.approx(share)


class Recorder(Classifier):
    """A tiny network; notes the learning rate of each batch."""

    def __init__(self, schedule):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        super().__init__(network, 2, partial(torch.optim.SGD, lr=1.0), schedule)
        self.rates = []

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 0.1, 0.1, 0.01]),
        ({"accumulate_grad_batches": 2}, [1, 1, 1, 1, 0.1, 0.1]),
        ({"limit_train_batches": 1}, [1, 1, 0.1]),
        ({"limit_train_batches": 0.5}, [1, 1, 0.1]),
    ],
)
def test_the_learning_rate_is_scheduled_over_optimizer_steps(batches, settings, expected):
    module = Recorder(partial(multistep, epochs=3))
    trainer(3, **settings).fit(module, batches, batches)
    assert module.rates == pytest.approx(expected)


def test_data_without_a_length_need_a_number_of_batches(batches):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from batches

    endless = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ValueError, match="`limit_train_batches` must be a number of batches"):
        trainer(3).fit(Recorder(partial(multistep, epochs=3)), endless, batches)
    module = Recorder(partial(multistep, epochs=3))
    trainer(3, limit_train_batches=2).fit(module, endless, batches)
    assert module.rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])


def test_channels_last_reaches_weights_and_images_and_changes_no_result():
    network = small_cnn(10, 3, width=4).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = network(images)
    module = Classifier(network, 10, SGD, channels_last=True)
    formats = []
    network[3].register_forward_pre_hook(
        lambda layer, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(module(images), expected)
    assert formats == [True]
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Distillation:
    """As a later loss may be: part teacher, part labels, and what it was called with."""

    teacher: nn.Module
    seen: list = field(default_factory=list)

    def __call__(self, logits, labels, images):
        self.seen.append((logits, labels, images))
        return (logits - self.teacher(images)).square().mean() + cross_entropy(logits, labels)


@pytest.fixture
def distilled():
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)) for _ in range(2))
    return Classifier(student, 2, partial(torch.optim.SGD, lr=0.1), loss=Distillation(teacher))


def test_a_loss_sees_logits_labels_and_images_and_is_trained_on(distilled, batches):
    fitted = trainer(1, limit_train_batches=1)
    before = distilled.network[1].weight.detach().clone()
    images, labels = next(iter(batches))
    expected = distilled.loss((images, labels))
    gradient = torch.autograd.grad(expected, distilled.network[1].weight)[0]
    fitted.fit(distilled, batches, batches)
    assert fitted.callback_metrics["train_loss"].item() == pytest.approx(expected.item())
    torch.testing.assert_close(distilled.network[1].weight, before - 0.1 * gradient)
    logits, *rest = distilled._loss.seen[-1]
    assert logits.shape == (5, 2)
    assert all(torch.equal(*pair) for pair in zip(rest, (labels, images), strict=True))


def test_validation_and_test_measure_plain_cross_entropy_whatever_is_trained_on(distilled, batches):
    images = torch.cat([images for images, _ in batches])
    expected = cross_entropy(distilled.network(images), torch.zeros(8).long()).item()
    (validated,) = trainer(1).validate(distilled, batches, verbose=False)
    (tested,) = trainer(1).test(distilled, batches, verbose=False)
    assert validated["val_loss"] == pytest.approx(expected)
    assert tested["test_loss"] == pytest.approx(expected)
    assert not distilled._loss.seen


def test_a_teacher_in_a_loss_is_no_part_of_the_model(distilled):
    assert list(distilled.state_dict()) == ["network.1.weight", "network.1.bias"]
    assert len(list(distilled.parameters())) == 2


def test_names_of_its_parameters_are_those_of_the_network(distilled):
    assert list(locate(distilled)) == ["1.weight", "1.bias"]
    assert unwrap(torch.compile(distilled)) is distilled.network
