"""What each form of a pruned ResNet-18 is worth: file, memory, time, accuracy.

    python benchmarks/deploy.py --checkpoint model.safetensors [--dense dense.safetensors]
                                [--images DIR] [--threads N] [--write]

The network is that of the CIFAR-10 recipes, torchvision's ResNet-18 with 10 classes on 32x32
pictures; `--checkpoint` holds its pruned weights and `--dense` those before pruning, without which
fresh ones are run and their accuracy is not shown. `--images` is a folder with train/ and test/ of
class folders, for the accuracy of every form on all test pictures. `--write` puts the table into
docs/deploy.md. How it is measured: `pruneflow.deploy.forms` and `pruneflow.deploy.peak`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torchvision
from tables import write_between
from torch import Tensor

from pruneflow import sparsity
from pruneflow.data import ImageFolder
from pruneflow.deploy.building import Run
from pruneflow.deploy.forms import markdown, measure_forms
from pruneflow.models.networks import load_weights
from pruneflow.run.provenance import machine

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
BEGIN, END = "<!-- begin: benchmarks/deploy.py --write -->", "<!-- end: benchmarks/deploy.py -->"


def test_batches(root: Path) -> list[tuple[Tensor, Tensor]]:
    data = ImageFolder(root)
    data.setup()
    return list(data.test_dataloader())


def accuracy(run: Run, batches: list[tuple[Tensor, Tensor]]) -> float:
    right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="pruned weights")
    parser.add_argument("--dense", type=Path, help="weights before pruning")
    parser.add_argument("--images", type=Path, help="folder with train/ and test/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="put the table into docs/deploy.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dense, pruned = (torchvision.models.resnet18(num_classes=10) for _ in range(2))
    load_weights(pruned, arguments.checkpoint)
    if arguments.dense:
        load_weights(dense, arguments.dense)
    batches = test_batches(arguments.images) if arguments.images else []
    with tempfile.TemporaryDirectory() as folder:
        forms = measure_forms(
            dense,
            pruned,
            batches[0][0][:1] if batches else torch.randn(1, 3, 32, 32),
            folder,
            evaluate=(lambda run: accuracy(run, batches)) if batches else None,
            threads=arguments.threads,
        )
    if not arguments.dense:
        for form in forms:
            if form["name"].startswith("dense"):
                form["accuracy"] = None
    text = (
        f"ResNet-18 on 32x32 pictures, {100 * sparsity(pruned):.2f} % sparse; torch "
        f"{torch.__version__}, {arguments.threads} threads, {machine()}; medians in turns. In "
        f"brackets: dense in PyTorch divided by this form.\n\n{markdown(forms)}\n"
    )
    print(text)
    if arguments.write:
        write_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
