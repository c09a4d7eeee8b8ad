"""One rank of tests/test_vocab_parallel.py: vocab_worker.py RANK WORLD_SIZE FOLDER.

FOLDER has the saved cases and receives what this rank found. Pairs of ranks share the classes, all
of them do, and pairs of pairs share rows and classes.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import penex
from penex.functional import linear_penex_loss

Groups = dict[str, dist.ProcessGroup | None]


def function(case: dict[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """Loss and gradients of this rank's share of the classes."""
    hidden, weight, bias = (x.clone() for x in case["tensors"])
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = [x.chunk(size)[rank].clone().requires_grad_() for x in (weight, bias)]
    hidden.requires_grad_(case["input gradient"])
    loss = linear_penex_loss(
        hidden,
        own[0],
        case["target"],
        own[1],
        vocab_group=group,
        num_classes=len(weight),
        **case["options"],
    )
    loss.sum().backward()
    return {"loss": loss.detach(), "input": hidden.grad, "own": [x.grad for x in own]}


def module(case: dict[str, Any], share: int, groups: Groups) -> dict[str, Any]:
    """Training of a head with rows and classes shared out: parameters and penalty."""
    torch.manual_seed(1)
    vocab, data = groups["vocab"], groups["data"]
    head = penex.LinearPENEX(
        *case["sizes"], vocab_group=vocab, process_group=data, dtype=torch.float64
    )
    optimiser = torch.optim.SGD(head.parameters(), lr=2.0)
    to_input = []
    for step in case["steps"]:
        whole = map(torch.cat, zip(*step, strict=True))
        hidden, target = whole if data is None else step[share]
        hidden.requires_grad_()
        optimiser.zero_grad()
        head(hidden, target).backward()
        to_input.append(hidden.grad)
        if data is not None:  # what DistributedDataParallel does
            for parameter in head.parameters():
                dist.all_reduce(parameter.grad, group=data)
                parameter.grad /= dist.get_world_size(data)
        optimiser.step()
    own = [head.weight.detach(), head.bias.detach()]
    return {"own": own, "penalty": head.penalty, "input": to_input}


def refusals(group: dist.ProcessGroup, elsewhere: dist.ProcessGroup) -> list[str]:
    """The messages of calls that must be refused, on every rank."""
    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    target = torch.zeros(2, dtype=torch.long)
    options: list[dict[str, Any]] = [
        {"vocab_group": group},
        {"vocab_group": group, "num_classes": 4},
        {"vocab_group": group, "num_classes": 1},
        {"vocab_group": elsewhere, "num_classes": 4},
    ]
    messages = []
    for keywords in options:
        try:
            linear_penex_loss(hidden, weight, target, **keywords)
        except ValueError as error:
            messages.append(str(error))
    try:
        penex.LinearPENEX(3, 4, vocab_group=group).predict_proba(hidden)
    except ValueError as error:
        messages.append(str(error))
    try:
        penex.LinearPENEX(3, 4, vocab_group=group, num_sampled=2)
    except ValueError as error:
        messages.append(str(error))
    return messages


def main(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    cases = torch.load(folder / "cases", weights_only=True)
    own_pair, world = pairs[rank // 2], dist.group.WORLD
    found: dict[str, Any] = {"2": {}, "4": {}}
    for size, group in (("2", own_pair), ("4", world)):
        for name, case in cases["functions"].items():
            found[size][name] = function(case, group)
    case = cases["module"]
    found["pair"] = module(case, 0, {"vocab": own_pair, "data": None})
    found["both"] = module(case, rank // 2, {"vocab": own_pair, "data": across[rank % 2]})
    found["refusals"] = refusals(own_pair, pairs[1 - rank // 2])
    torch.save(found, folder / f"result{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
