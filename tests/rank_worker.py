"""One rank of the process-group test: rank_worker.py RANK WORLD_SIZE RENDEZVOUS BATCHES RESULT.

BATCHES is a saved list of steps, each a list with one (logits, target) per rank; RESULT receives
the penalty and the loss of every step.
"""

import sys

import torch
import torch.distributed as dist

import penex


def main(rank: str, world_size: str, rendezvous: str, batches: str, result: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world_size)
    )
    criterion = penex.PENEX(process_group=dist.group.WORLD)
    steps = []
    for step in torch.load(batches, weights_only=True):
        logits, target = step[int(rank)]
        loss = criterion(logits.requires_grad_(), target)
        loss.backward()
        steps.append((criterion.penalty.clone(), loss.detach()))
    torch.save(steps, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
