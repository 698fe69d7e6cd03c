"""What `torchrun` starts: trains in both ways, and leaves what came of it in a folder."""

import os
import sys

import torch
from training import fit

from pruneflow import Random

if __name__ == "__main__":
    folder = sys.argv[1]
    for strategy in ("ddp", "fully_shard"):
        found = fit(f"{folder}/{strategy}", Random(5), strategy=strategy)
        torch.save(found["end"], f"{folder}/{strategy}-{os.environ['RANK']}.pt")
