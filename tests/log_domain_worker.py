"""One rank of tests/test_log_domain.py: log_domain_worker.py RANK WORLD_SIZE FOLDER.

FOLDER has the saved cases by the number of ranks that are to work on them, and receives what this
rank made of its share. Fewer ranks than there are make a group of their own.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_worker import Collectives

import penex


def train(case: dict[str, Any], rank: int, group: Any, compile: bool = False) -> dict[str, Any]:
    """The loss and the gradient of each step, the sizes of the collectives, and an evaluation."""
    criterion = penex.LogPENEX(**case["options"], process_group=group)
    loss_of, collectives = criterion, Collectives()
    if compile:
        loss_of = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    losses, gradients = [], []
    with contextlib.nullcontext() if compile else collectives:  # the compiler takes no such mode
        for step in case["steps"]:
            logits, target = step[rank]
            loss = loss_of(logits.requires_grad_(), target)
            losses.append(loss.detach())
            gradients += torch.autograd.grad(loss.sum(), logits)
    with Collectives() as later:
        evaluated = criterion.eval()(*case["steps"][0][rank]).detach()
    return {
        "losses": losses,
        "gradients": gradients,
        "collectives": collectives.sizes,
        "later": later.sizes,
        "evaluated": evaluated,
    }


def main(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size
    )
    results = {}
    for size, cases in torch.load(folder / "cases", weights_only=True).items():
        group = "world" if size == world_size else dist.new_group(list(range(size)))
        if rank < size:
            results[size] = {name: train(case, rank, group) for name, case in cases.items()}
            if size == world_size:
                results["compiled"] = train(cases["weighted"], rank, dist.group.WORLD, True)
    torch.save(results, folder / f"result{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
