import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruneflow import sparsity, sparsity_report


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 25, 10)
    )


def test_counts_all_parameters_and_both_kinds_of_multiply_adds():
    model = network()
    model[0].weight.data.view(-1)[:54] = 0  # half of 108
    model[3].weight.data[:9] = 0  # nine tenths of 1,000
    report = sparsity_report(model, torch.zeros(1, 3, 5, 5))
    assert report.weights == 1108
    assert report.zeros == 954
    assert report.parameters == 108 + 4 + 4 + 4 + 1000 + 10
    assert report.remaining == report.parameters - 954
    assert report.compression_ratio == pytest.approx(1130 / 176)
    assert report.multiply_adds == 25 * 108 + 1000
    assert report.remaining_multiply_adds == 25 * 54 + 100
    assert report.theoretical_speedup == pytest.approx(3700 / 1450)


def test_measuring_changes_nothing():
    model = network().train()
    model[1].eval()
    running = model[1].running_mean.clone()
    sparsity_report(model, torch.ones(1, 3, 5, 5))
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, running)


def test_negative_zero_counts_and_small_values_do_not():
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[0.0, -0.0, 1e-38, 1.0]])
    assert sparsity(layer) == 0.5


def test_sees_through_torch_prune():
    layer = nn.Linear(10, 10)
    prune.random_unstructured(layer, "weight", 0.3)
    assert sparsity(layer) == pytest.approx(0.3)


def test_a_frozen_teacher_does_not_count_unless_all_is_frozen():
    model = nn.ModuleDict({"student": nn.Linear(4, 4), "teacher": nn.Linear(4, 4)})
    model["student"].weight.data.zero_()
    model["teacher"].requires_grad_(False)
    assert sparsity(model) == 1
    assert sparsity(model.requires_grad_(False)) == 0.5


def test_prints_a_table_with_a_total():
    lines = str(sparsity_report(network())).splitlines()
    assert lines[0].split() == ["tensor", "shape", "weights", "kept", "sparsity"]
    assert lines[-2].split() == ["total", "1,108", "1,108", "0.00%"]
    assert lines[-1].endswith("compression ratio 1.00")


def test_what_is_not_counted_is_named():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    model[0].weight.data[:5] = 0
    model[1].weight.data[0] = 0
    with pytest.warns(UserWarning, match=r"neither pruned nor counted.*0\.weight \(44\.4%\)"):
        report = sparsity_report(model)
    assert (report.weights, report.zeros, report.sparsity) == (40, 4, 0.1)
    assert [(layer.name, layer.zeros) for layer in report.dense] == [("0.weight", 20)]
    assert report.remaining == 90 - 24
    assert "Not counted: 0.weight (44.4% of all parameters, 50.00% zeros)" in str(report)
    with pytest.warns(UserWarning, match="neither pruned nor counted"):
        assert sparsity(model) == 0.1
    assert sparsity(model, exclude=[nn.Embedding]) == 0.1
    assert sparsity(model, include=["*.weight"]) == 24 / 80


def test_layers_under_two_names_and_tied_ones_count_once():
    model = nn.Module()
    model.one, model.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model.layers = nn.Sequential(model.one, nn.ReLU(), model.two)
    model.two.weight = model.one.weight
    model.one.weight.data[0] = 0
    model.forward = lambda x: model.layers(x)
    report = sparsity_report(model, torch.zeros(1, 4))
    assert (report.parameters, report.weights, report.zeros) == (16, 16, 4)
    assert (report.multiply_adds, report.remaining_multiply_adds) == (32, 24)
