"""Memory over rounds is flat, and a round takes little beside the masks themselves."""

import gc

import lightning as L
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from pruneflow import InPlace, Linear, Pruner, PruningCallback, Reparametrize

both = pytest.mark.parametrize("masking", [InPlace, Reparametrize])
LAYERS, SIZE = 40, 128
WEIGHTS = LAYERS * SIZE**2


@pytest.fixture(autouse=True)
def _only_new_objects():
    """Keep the garbage collector from what was there before the test: a census is quicker."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def census():
    """Number of live tensors that the test made, and the bytes of their storages."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return len(tensors), sum(storage.nbytes() for storage in storages.values())


def growth(before):
    return tuple(now - then for now, then in zip(census(), before, strict=True))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, SIZE)).square().sum().backward()
    optimizer.step()


def test_census_sees_what_lives():
    before = census()
    kept = [torch.zeros(1000), torch.zeros(10, dtype=torch.int8)]
    view = kept[0][:10]
    torch.zeros(500)
    assert growth(before) == (3, 4010)
    del kept, view
    assert growth(before) == (0, 0)


@pytest.mark.parametrize(
    ("masking", "tensors", "nbytes"),
    [
        (InPlace, 1, 1),  # of each layer its bits, a byte a weight
        (Reparametrize, 2, 8),  # a float32 mask and what the forward pass made with it
    ],
)
def test_fifty_rounds_retain_one_mask_set(masking, tensors, nbytes):
    model, optimizer = network()
    step(model, optimizer)  # so that gradients and momentum are there already
    before = census()
    pruner = Pruner(model, optimizers=[optimizer], masking=masking())
    for round in range(1, 51):
        pruner.prune_to(round / 60, round=round)
        step(model, optimizer)
        if round % 7 == 1:
            assert growth(before) == (LAYERS * tensors, WEIGHTS * nbytes)
    pruner.remove()
    assert growth(before) == (0, 0)


class Censuses(L.Callback):
    def __init__(self):
        self.taken = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.taken.append(census())


@pytest.mark.filterwarnings("ignore:Round 47 of 50 prunes")  # the rate decays all the while
@both
def test_fifty_rounds_of_a_training_retain_what_three_do(model, batches, trainer, masking):
    pruning = PruningCallback(Linear(0.9, 50), masking=masking())
    censuses = Censuses()
    trainer(pruning, censuses, max_epochs=51, limit_train_batches=1).fit(model, batches)
    assert pruning.round == 50
    assert censuses.taken[2:] == censuses.taken[2:3] * 49


def live_bytes(build, run):
    """What the allocator had given out before `run` of what `build` built, and the most during it.

    It is profiled from the start, since a profile says nothing of what was there before it, but
    does see what an earlier profile saw made being freed.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        built = build()
        with record_function("run"):
            run(built)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == "run")
    live = before = most = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            if event.start_ns() < began:
                before = live
            else:
                most = max(most, live)
    return before, most


def test_live_bytes_sees_what_lives():
    def run(built):
        built.append(built.pop().clone())
        built[0].view(10, 100).zero_()
        torch.zeros(50)

    assert live_bytes(lambda: [torch.zeros(1000), torch.zeros(100)], run) == (4400, 4800)


@both
def test_a_round_peaks_at_old_and_new_masks_and_little_more(masking):
    def build():
        model, optimizer = network()
        step(model, optimizer)
        pruner = Pruner(model, optimizers=[optimizer], masking=masking())
        pruner.prune_to(0.3)
        step(model, optimizer)
        return pruner, model

    before, most = live_bytes(build, lambda built: built[0].prune_to(0.6))
    assert most - before <= WEIGHTS + 6 * (4 * SIZE**2)
