import hashlib
import logging
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision.datasets
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from pruneflow.data import CIFAR10, Digits, ImageFolder
from pruneflow.data.splits import spread


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def batches(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def labels(loader, epoch=0):
    return torch.cat([targets for _, targets in batches(loader, epoch)])


@pytest.fixture
def tree(tmp_path):
    """Sixteen training and six test images, 12x10, of two classes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


class Recorder(LightningModule):
    """Keeps every batch it is shown, by epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).append(batch)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint in the given hook of epoch 1."""

    def __init__(self, hook, path):
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def fit(data, epochs, callbacks=(), ckpt_path=None):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder.seen


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("limits", [{}, {"memory_limit": 0, "num_workers": 2}])
def test_a_resumed_run_sees_the_batches_of_a_fresh_one(tmp_path, limits, hook):
    def digits():
        return Digits(batch_size=500, seed=3, crop_padding=1, **limits)

    checkpoint = tmp_path / "epoch 1.ckpt"
    fresh = fit(digits(), 4, callbacks=[SaveAt(hook, checkpoint)])
    resumed = fit(digits(), 4, ckpt_path=checkpoint)
    assert list(resumed) == [2, 3]
    reference = ready(digits()).train_dataloader()
    for epoch in range(4):
        for run in (fresh, resumed):
            if epoch in run:
                for (images, targets), expected in zip(
                    run[epoch], batches(reference, epoch), strict=True
                ):
                    assert torch.equal(images, expected[0])
                    assert torch.equal(targets, expected[1])
    assert not torch.equal(fresh[2][0][0], fresh[3][0][0])


def test_lightning_gives_no_advice_on_workers(recwarn):
    # pyproject.toml may be silent on this one; here it must not occur.
    fit(Digits(batch_size=700), 1)
    assert not [warning for warning in recwarn if "workers" in str(warning.message)]


def test_digits_are_split_in_three_by_class():
    data = ready(Digits())
    assert (data.image_shape, data.num_classes) == ((1, 8, 8), 10)
    assert data.classes == tuple("0123456789")
    parts = {
        "train": labels(data.train_dataloader()),
        "val": labels(data.val_dataloader()),
        "test": labels(data.test_dataloader()),
    }
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1294,
        "val": 144,
        "test": 359,
    }
    everything = torch.cat(list(parts.values()))
    for part in parts.values():
        share = torch.bincount(everything) * len(part) / len(everything)
        assert (torch.bincount(part) - share).abs().max() <= 1.5
    indices = torch.cat([data.train_indices, data.val_indices])
    assert torch.equal(indices.sort().values, torch.arange(1438))


def test_digits_show_scikit_learns_pixels():
    from sklearn.datasets import load_digits

    data = ready(Digits(mean=[0.0], std=[1.0], batch_size=2000))
    shown = torch.cat(
        [
            next(iter(loader))[0]
            for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        ]
    )
    found = (shown.flatten(1) * 17).round().long()
    expected = torch.from_numpy(load_digits().images).flatten(1).long()
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_the_test_set_does_not_depend_on_seeds():
    first, second = (
        ready(Digits(seed=seed, split_seed=seed, mean=[0.5], std=[1.0])) for seed in (0, 1)
    )
    for one, other in zip(first.test_dataloader(), second.test_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])
    assert not torch.equal(first.val_indices, second.val_indices)


def test_training_images_are_normalised():
    images = torch.cat([images for images, _ in ready(Digits()).train_dataloader()])
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-3


def test_image_size_resizes(tree):
    assert ready(Digits(image_size=16)).image_shape == (1, 16, 16)
    data = ready(ImageFolder(tree, image_size=5))
    assert data.image_shape == (3, 5, 5)
    assert next(iter(data.train_dataloader()))[0].shape[1:] == (3, 5, 5)


def test_a_folder_is_read_as_pil_reads_it(tree):
    data = ready(ImageFolder(tree, val_size=2, mean=[0.0] * 3, std=[1.0] * 3))
    assert (data.classes, data.image_shape) == (("cat", "dog"), (3, 10, 12))
    ((images, targets),) = data.test_dataloader()
    files = [tree / "test" / name / f"{k}.png" for name in data.classes for k in range(3)]
    expected = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    order = spread(torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(expected)[order])
    assert targets.tolist() == [0, 1, 0, 1, 0, 1]


def test_each_first_part_of_the_test_and_validation_sets_has_every_class(tree):
    data = ready(ImageFolder(tree, val_size=4, batch_size=2))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for _, targets in loader:
            assert targets.tolist() == [0, 1]


def test_mean_and_deviation_that_were_measured_can_be_read():
    data = Digits(std=[0.5])
    assert (data.mean, data.std) == (None, [0.5])
    ready(data)
    assert data.std == [0.5] and len(data.mean) == 1 and 0 < data.mean[0] < 1


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_beyond_the_memory_limit_the_same_batches_come_from_files(tree, caplog, workers):
    options = {"batch_size": 5, "val_size": 4, "crop_padding": 2, "flip": True}
    within = ready(ImageFolder(tree, **options))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        beyond = ready(ImageFolder(tree, memory_limit=100, num_workers=workers, **options))
    assert "exceed `memory_limit`=100" in caplog.text
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loaders = getattr(within, name)(), getattr(beyond, name)()
        for epoch in (0, 1):
            for one, other in zip(*(batches(loader, epoch) for loader in loaders), strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])


def test_folder_without_a_tree_is_refused(tmp_path, tree):
    with pytest.raises(FileNotFoundError, match=r"`root` must hold .*nowhere.*data\.root=DIR"):
        ready(ImageFolder(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"`root` must be .*, got None"):
        ready(ImageFolder())
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="Couldn't find any class folder"):
        ready(ImageFolder(tmp_path / "empty"))
    (tree / "train" / "horse").mkdir()
    with pytest.raises(FileNotFoundError, match="horse"):
        ready(ImageFolder(tree))


def test_unequal_classes_are_named(tree):
    (tree / "test" / "dog").rename(tree / "test" / "wolf")
    with pytest.raises(
        ValueError, match=r"got \['dog'\] in train/ only and \['wolf'\] in test/ only"
    ):
        ready(ImageFolder(tree))


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_the_first_image_of_another_size_is_named(tree, memory_limit):
    Image.new("RGB", (7, 7)).save(tree / "train" / "dog" / "3.png")
    with pytest.raises(ValueError, match=r"`image_size` must be set .*dog.3\.png \(7x7\)"):
        ready(ImageFolder(tree, memory_limit=memory_limit))


@pytest.mark.parametrize("kept", [9, 200])  # of the header, which tells the size, and of the pixels
def test_a_damaged_image_is_named(tree, kept):
    path = min(tree.rglob("train/*/*"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} \(.*replace or delete it"):
        ready(ImageFolder(tree))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"crop_padding": -1}, "crop_padding"),
        ({"val_size": 1.0}, "val_size"),
        ({"mean": [0.1, 0.2, 0.3]}, "mean"),
        ({"std": []}, "std"),
        ({"std": [0.0]}, "std"),
    ],
)
def test_bad_arguments_are_named(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        ready(Digits(**options))


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A tiny CIFAR-10, unpacked; nothing can be downloaded."""
    source = torchvision.datasets.CIFAR10
    folder = tmp_path / source.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name, content):
        raw = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def part(name, count):
        images = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        return write(name, {"data": images, "labels": [k % 10 for k in range(count)]})

    monkeypatch.setattr(source, "train_list", [part("data_batch_1", 40)])
    monkeypatch.setattr(source, "test_list", [part("test_batch", 10)])
    name, md5 = write("batches.meta", {"label_names": [f"class {k}" for k in range(10)]})
    monkeypatch.setattr(source, "meta", {"filename": name, "key": "label_names", "md5": md5})
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return folder


def test_cifar10_is_read_from_its_archive(archive):
    data = ready(CIFAR10(archive.parent, val_size=10, crop_padding=4, flip=True))
    assert (data.image_shape, data.num_classes) == ((3, 32, 32), 10)
    assert data.classes[3] == "class 3"
    assert labels(data.val_dataloader()).sort().values.tolist() == list(range(10))
    data = ready(CIFAR10(archive.parent, val_size=10, mean=[0.0] * 3, std=[1.0] * 3))
    images = next(iter(data.test_dataloader()))[0]
    raw = pickle.loads((archive / "test_batch").read_bytes(), encoding="latin1")["data"]
    assert torch.equal((images * 255).round().byte().flatten(1), torch.from_numpy(raw))


def test_cifar10_without_files_or_network_names_root_and_remedy(archive, tmp_path):
    with pytest.raises(ValueError, match=r"`root` must be .*, got None"):
        ready(CIFAR10())
    (archive / "test_batch").write_bytes(b"broken")
    expected = r"`root` must hold CIFAR-10, .*, got '.*data=image_folder data\.root=DIR"
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=expected):
            ready(CIFAR10(root))
