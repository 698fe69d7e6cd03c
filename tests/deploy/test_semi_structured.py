"""Logic and refusals; PyTorch's 2:4 kernels need a GPU, and conversion is replaced here."""

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import MLPBlock

from pruneflow import NM, Pruner
from pruneflow.deploy import semi_structured
from pruneflow.deploy.semi_structured import (
    device_reason,
    eligibility,
    to_semi_structured,
    weight_reason,
)


def prune_2_of_4(layer):
    """Keep the first two of every four inputs, other ones in every second row."""
    keep = torch.tensor([True, True, False, False]).repeat(layer.in_features // 4)
    keep = torch.stack([keep, keep.roll(1)]).repeat(layer.out_features // 2, 1)
    layer.weight.data *= keep
    return layer


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 10)]
    model = nn.Sequential(*layers).bfloat16()
    prune_2_of_4(model[0])
    return model


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretend that any device runs 2:4 kernels, which compute what the dense ones do."""
    monkeypatch.setattr(semi_structured, "device_reason", lambda device: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: weight.clone())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_every_four_are_eligible_and_one_more_is_not(dtype):
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 4.0, 0.0]).repeat(32, 8).to(dtype)
    assert weight_reason(weight) is None
    assert weight_reason(weight * 0) is None
    weight[5, 4] = torch.nan
    assert weight_reason(weight) == (
        "is not 2:4: 1 of 512 groups of four inputs keep more than two weights"
    )


def test_groups_lie_along_the_inputs_and_do_not_overlap():
    along_inputs = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(64, 16).half()
    assert weight_reason(along_inputs) is None
    assert "is not 2:4: 512 of 1024" in weight_reason(along_inputs.T)
    assert weight_reason(along_inputs.roll(2, 1)) is None  # 1100 1100
    three = torch.tensor([0.0, 1.0, 1.0, 1.0]).repeat(64, 16).half()
    assert "is not 2:4: 1024 of 1024" in weight_reason(three)


@pytest.mark.parametrize(
    ("shape", "eligible"),
    [((32, 64), True), ((96, 128), True), ((16, 64), False), ((32, 32), False), ((0, 64), False)],
)
def test_shapes_are_multiples_that_both_backends_take(shape, eligible):
    assert (weight_reason(torch.zeros(shape).half()) is None) == eligible


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float8_e4m3fn])
def test_other_types_are_refused(dtype):
    reason = weight_reason(torch.zeros(32, 64).to(dtype))
    assert reason == f"is {str(dtype)[6:]}, not float16 or bfloat16"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((8, 0), None, None),
        ((9, 0), None, None),
        ((7, 5), None, "is on a GPU of compute capability 7.5, below 8.0"),
        ((9, 4), "6.2", "is on an AMD GPU (ROCm), for which PyTorch has no 2:4 kernels"),
    ],
)
def test_devices(monkeypatch, capability, hip, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device_reason(torch.device("cuda", 0)) == reason


def test_layers_that_are_not_plain_linear_say_so():
    attention = nn.MultiheadAttention(64, 2)
    assert "not an nn.Linear" in eligibility(attention)["out_proj"]
    encoder = nn.TransformerEncoderLayer(64, 2, 128).half()
    reasons = eligibility(encoder)
    assert "fused kernel" in reasons["linear1"] and "fused kernel" in reasons["linear2"]
    assert set(eligibility(MLPBlock(64, 128, 0.0).half())) == {"0", "3"}
    assert eligibility(nn.Conv2d(1, 1, 1)) == {}


def test_on_a_cpu_every_layer_is_named_with_its_reason(model):
    with pytest.raises(ValueError, match="`model`") as caught:
        to_semi_structured(model)
    message = str(caught.value)
    assert "0 (is on cpu" in message
    assert "2 (is not 2:4: 2048 of 2048" in message
    assert "3 (is 10 by 64" in message
    assert message.endswith(
        "; prune to a sparsity of 0.5 with granularity=NM(2, 4), and move the model to a CUDA GPU "
        "in float16 or bfloat16"
    )


def test_what_nm_prunes_is_eligible_and_what_others_prune_is_not():
    torch.manual_seed(0)
    for granularity, eligible in ((NM(2, 4), True), (NM(1, 4), False), (None, False)):
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).bfloat16()
        options = {} if granularity is None else {"granularity": granularity}
        Pruner(model, optimizers=[], **options).prune_to(0.5)
        for reason in eligibility(model).values():
            assert reason.startswith("is on cpu" if eligible else "is not 2:4")


def test_without_linear_layers_there_is_nothing_to_convert():
    with pytest.raises(ValueError, match=r"got no nn\.Linear"):
        to_semi_structured(nn.ReLU())


def test_a_copy_is_converted_and_what_stays_dense_is_named(model, on_gpu, caplog, monkeypatch):
    converted = []
    monkeypatch.setattr(
        semi_structured,
        "to_sparse_semi_structured",
        lambda weight: converted.append(weight) or weight.clone(),
    )
    state = torch.get_rng_state()
    sparse = to_semi_structured(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(converted) == 1 and torch.equal(converted[0], model[0].weight)
    assert sparse[0].weight is not model[0].weight and model[0].weight.requires_grad
    assert not sparse[0].weight.requires_grad
    assert sparse[2].weight.requires_grad
    points = torch.randn(3, 64).bfloat16()
    assert torch.equal(sparse(points), model(points))
    assert "2 (is not 2:4" in caplog.text and "3 (is 10 by 64" in caplog.text
    assert "0 (" not in caplog.text


def test_a_backend_that_fails_or_computes_something_else_is_refused(model, on_gpu, monkeypatch):
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: weight * 1.1)
    with pytest.raises(ValueError, match="in the outputs of 0, with a norm"):
        to_semi_structured(model)

    def fails(weight):
        raise RuntimeError("not compiled for sm_80")

    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", fails)
    with pytest.raises(ValueError, match="got an error from 0: not compiled for sm_80"):
        to_semi_structured(model)
