"""One rank of tests/test_distributed.py: distributed_worker.py RANK WORLD_SIZE FOLDER.

FOLDER has the saved cases by the number of ranks that are to work on them, and receives what this
rank made of its share. Fewer ranks than there are make a group of their own.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import penex


class Collectives(TorchDispatchMode):
    """The largest tensor of every collective that is called, whatever python called it by."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait_tensor" not in name:
            found = torch.utils._pytree.tree_leaves((args, kwargs))
            self.sizes.append(max(leaf.numel() for leaf in found if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


def build(case: dict[str, Any], group: dist.ProcessGroup) -> penex.PENEX:
    return penex.PENEX(**case["options"], **({"process_group": group} if case["group"] else {}))


def train(case: dict[str, Any], rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    criterion = build(case, group)
    steps, sizes = [], []
    for step in case["steps"]:
        logits, target = step[rank]
        logits.requires_grad_()
        with Collectives() as collectives:
            loss = criterion(logits, target)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
        sizes.append(collectives.sizes)
        steps.append(
            {"loss": loss.detach(), "gradient": gradient, "penalty": criterion.penalty.clone()}
        )
    logits, target = case["steps"][0][rank]
    with Collectives() as collectives:
        with torch.no_grad():
            without_gradient = criterion(logits, target)
        evaluated = criterion.eval()(logits, target)
        evaluated.sum().backward()
    return {
        "steps": steps,
        "collectives": sizes,
        "later collectives": collectives.sizes,
        "evaluated": (evaluated.detach(), without_gradient, criterion.penalty),
    }


def train_compiled(case: dict[str, Any], rank: int, group: dist.ProcessGroup) -> list[Tensor]:
    """The losses and the penalty of the steps, in one graph with its collective."""
    criterion = build(case, group)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    losses = [compiled(step[rank][0].requires_grad_(), step[rank][1]) for step in case["steps"]]
    return [*(loss.detach() for loss in losses), criterion.penalty]


def train_wrapped(case: dict[str, Any], rank: int, group: dist.ProcessGroup) -> list[Tensor]:
    """The parameters and the penalty after training under DistributedDataParallel."""
    model = nn.Linear(*case["parameters"]["weight"].T.shape).double()
    model.load_state_dict(case["parameters"])
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
    criterion = penex.PENEX(**case["options"], process_group=group)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=2.0)
    for step in case["steps"]:
        x, target = step[rank]
        optimiser.zero_grad()
        criterion(wrapped(x), target).backward()
        optimiser.step()
    return [model.weight.detach(), model.bias.detach(), criterion.penalty]


def main(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size
    )
    results = {}
    for size, cases in torch.load(folder / "cases", weights_only=True).items():
        group = dist.group.WORLD if size == world_size else dist.new_group(list(range(size)))
        if rank < size:
            found: dict[str, Any] = {
                name: train(case, rank, group) for name, case in cases["losses"].items()
            }
            found["wrapped"] = train_wrapped(cases["wrapped"], rank, group)
            if size == world_size:
                for name in ("weighted", "the world"):
                    found[f"compiled {name}"] = train_compiled(cases["losses"][name], rank, group)
            results[size] = found
    torch.save(results, folder / f"result{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
