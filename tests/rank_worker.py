"""One rank of the process-group test: rank_worker.py RANK SIZE FOLDER.

FOLDER/batches is a saved list of steps, each a list with one (logits, target) per rank;
FOLDER/resultRANK receives the penalty and the loss of every step.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import penex


def main(rank: str, size: str, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=int(rank), world_size=int(size)
    )
    criterion = penex.PENEX(process_group=dist.group.WORLD)
    steps = []
    for step in torch.load(Path(folder, "batches"), weights_only=True):
        logits, target = step[int(rank)]
        loss = criterion(logits.requires_grad_(), target)
        loss.backward()
        steps.append((criterion.penalty.clone(), loss.detach()))
    torch.save(steps, Path(folder, f"result{rank}"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
