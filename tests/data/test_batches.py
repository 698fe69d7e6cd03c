import random

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from pruneflow.data.batches import (
    AugmentedImages,
    EpochDraws,
    EpochLoader,
    fixed_draws,
    training_draws,
)

PADDING = 2


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (40, 3, 6, 5), dtype=torch.uint8, generator=generator)


def augmented(pixels, padding=PADDING, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    labels = torch.arange(len(pixels)) % 4
    return AugmentedImages(
        pixels, labels, padding=padding, mean=torch.tensor(mean), std=torch.tensor(std)
    )


def draws(epoch=0, seed=0, count=40, flip=True):
    return training_draws(torch.arange(count), epoch, seed=seed, padding=PADDING, flip=flip)


def test_crops_and_flips_equal_a_slow_reference_pixel_by_pixel(pixels):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    epoch = draws()
    images, labels = augmented(pixels, mean=mean, std=std)[epoch]
    for row, (index, top, left, mirrored) in enumerate(epoch.tolist()):
        assert labels[row] == index % 4
        for channel in range(3):
            for y in range(6):
                for x in range(5):
                    column = (4 - x if mirrored else x) + left - PADDING
                    line = y + top - PADDING
                    inside = 0 <= line < 6 and 0 <= column < 5
                    pixel = int(pixels[index, channel, line, column]) if inside else 0
                    expected = (pixel / 255 - mean[channel]) / std[channel]
                    assert images[row, channel, y, x].item() == pytest.approx(expected, abs=1e-5)


def test_every_crop_offset_and_both_mirrorings_occur():
    epoch = torch.cat([draws(epoch) for epoch in range(20)])
    corners = {(top, left) for _, top, left, _ in epoch.tolist()}
    assert corners == {(top, left) for top in range(5) for left in range(5)}
    assert 0.4 < epoch[:, 3].float().mean() < 0.6


def test_no_mirroring_unless_asked():
    assert not draws(flip=False)[:, 3].any()


def test_fixed_draws_show_the_images_as_they_are(pixels):
    images, _ = augmented(pixels)[fixed_draws(torch.tensor([3, 1]), padding=PADDING)]
    torch.testing.assert_close(images, pixels[[3, 1]] / 255)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    assert torch.equal(draws(3, seed=1), draws(3, seed=1))
    for column in range(4):
        assert not torch.equal(draws(3, seed=1)[:, column], draws(4, seed=1)[:, column])
        assert not torch.equal(draws(3, seed=1)[:, column], draws(3, seed=2)[:, column])
    assert not torch.equal(draws(1, seed=0), draws(0, seed=1))


def test_seeds_beyond_32_bits_differ():
    assert not torch.equal(draws(seed=1), draws(seed=1 + 2**32))


def test_an_epoch_holds_every_image_once():
    assert torch.equal(draws()[:, 0].sort().values, torch.arange(40))


def test_no_global_random_state_is_used(pixels):
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    sampler = EpochDraws(draws, count=40, batch_size=16)
    for workers in (0, 1):
        list(EpochLoader(augmented(pixels), sampler, num_workers=workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


@pytest.mark.parametrize(("count", "batch_size"), [(40, 16), (40, 40), (41, 8), (7, 16)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_an_epoch_without_overlap(count, batch_size, world_size):
    ranks = [
        list(
            EpochDraws(
                lambda epoch: draws(epoch, count=count),
                count=count,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    seen = torch.cat([batch[:, 0] for batches in ranks for batch in batches])
    assert torch.equal(seen.sort().values, torch.arange(count))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_set_after_iter_still_counts(pixels, workers):
    sampler = EpochDraws(draws, count=40, batch_size=40)
    loader = EpochLoader(augmented(pixels), sampler, num_workers=workers)
    iterator = iter(loader)
    sampler.set_epoch(5)
    expected, _ = augmented(pixels)[draws(5)]
    assert torch.equal(next(iterator)[0], expected)


def test_cropping_at_the_centre_is_what_padding_adds(pixels):
    windows = augmented(pixels, padding=0)
    assert torch.equal(
        windows[fixed_draws(torch.arange(40), padding=0)][0],
        augmented(pixels)[fixed_draws(torch.arange(40), padding=PADDING)][0],
    )
    corner = torch.tensor([[0, 0, 0, 0]])
    expected = pad(pixels[:1], (PADDING,) * 4)[:, :, :6, :5] / 255
    torch.testing.assert_close(augmented(pixels)[corner][0], expected)
