r"""A Lightning callback that logs how PENEX treats the samples of each batch.

Training itself needs no integration. ``self.criterion = penex.PENEX(process_group="world")`` in a
module is a submodule like any other: the penalty is saved in checkpoints, ``train()`` and
``eval()`` reach it, and under DDP all ranks use the penalty of the joint batch.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from penex import functional
from penex._extras import need
from penex._inputs import prepare, validate
from penex.losses import PENEX, LogPENEX

need("penex.integrations.lightning", "lightning", "lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

__all__ = ["PENEXMonitor"]


class PENEXMonitor(Callback):
    r"""Log the penalty, the sample weights and the margins of training batches.

    Values are logged at the steps at which the trainer writes its log (``log_every_n_steps``), for
    the batch that the criterion has seen in that step, without another forward pass. At other steps
    the callback costs a Python call and no synchronisation.

    A sample's weight is its term in the exponential part of the loss,
    :math:`v_i = e^{-\alpha f_{y_i}}`. With class weights, label smoothing, probability targets or
    huberization it is :math:`v_i = \sum_k w_k q_{ik} \min(e^{-\alpha f_{ik}}, t)`: the 1-norm of
    that part's gradient, divided by :math:`\alpha`. Its margin is
    :func:`penex.functional.margin`, :math:`f_y - \max_{j \ne y} f_j`, where :math:`y` is the most
    probable class if the targets are probabilities. A sample is one row with a target; for dense
    targets, a token or a pixel. Ignored rows and rows whose class weight is zero do not count; for
    a batch without other rows only the penalty is logged.

    ================================ ============================================================
    ``penex/penalty``                :math:`\rho`, this batch included
    ``penex/weight_mean``            :math:`\sum_i v_i / n`
    ``penex/weight_max_share``       :math:`\max_i v_i / \sum_i v_i`: the largest weight's share
    ``penex/weight_ess``             :math:`(\sum_i v_i)^2 / (n \sum_i v_i^2)`: the effective
                                     sample size as a share of the :math:`n` rows, 1 if all weights
                                     are equal, :math:`1/n` if one row has all the weight
    ``penex/margin_mean``            mean of the margins
    ``penex/margin_median``          median of the margins, the lower of the two middle values
    ``penex/margin_q05``             the margin of rank :math:`\lceil 0.05\, n \rceil` from below
    ``penex/margin_negative``        share of margins below 0, which is the training error
    ``penex/label_variance``         variance of :math:`f_y` over the batch
    ``penex/partition_variance``     variance of :math:`\log \sum_j e^{f_j}` over the batch
    ================================ ============================================================

    The variances use the same row and class weights as the loss. They are what
    :class:`penex.LogPENEX` adds to cross-entropy, to second order. That loss can be monitored too;
    it has all values but the penalty.

    With several criteria, keys contain the name of the criterion: ``penex/heads.main/penalty``. If
    a criterion is called more than once in a step (micro-batches, deep supervision), the last call
    counts. With several processes, each computes the values of its own batch, and Lightning logs
    those of the first; :math:`\rho` is shared if the criterion has a `process_group`.

    Args:
        criterion: The criterion to monitor. None: every such criterion in the module.

    Raises:
        TypeError: `criterion` is neither a :class:`penex.PENEX` nor a :class:`penex.LogPENEX`.
        ValueError: The module contains no such criterion; raised at the start of training.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PENEXMonitor()])  # doctest: +SKIP
    """

    def __init__(self, criterion: PENEX | LogPENEX | None = None) -> None:
        if criterion is not None and not isinstance(criterion, PENEX | LogPENEX):
            raise TypeError(
                "criterion: expected a penex.PENEX or penex.LogPENEX, got "
                f"{type(criterion).__name__}"
            )
        self.criterion = criterion
        self._watched: dict[str, PENEX | LogPENEX] = {}
        self._handles: list[RemovableHandle] = []
        self._due = False
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register hooks on the criteria."""
        self._watched = self._find(pl_module)
        for name, criterion in self._watched.items():
            hook = self._hook(name)
            self._handles.append(criterion.register_forward_hook(hook, with_kwargs=True))

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Keep this batch if its step will be logged."""
        self._due = trainer._logger_connector.should_update_logs

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the values of the batch that was kept."""
        self._due = False
        for name, (input, target) in self._seen.items():
            prefix = "penex/" if len(self._watched) == 1 else f"penex/{name}/"
            numbers = measured(self._watched[name], input, target)
            pl_module.log_dict(
                {prefix + key: value for key, value in numbers.items()},
                on_step=True,
                on_epoch=False,
            )
        self._seen.clear()

    def on_train_end(self, *_: Any) -> None:
        """Remove the hooks from the criteria."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()
        self._seen.clear()
        self._due = False

    def on_exception(self, *_: Any) -> None:
        """Remove the hooks from the criteria."""
        self.on_train_end()

    def _find(self, module: LightningModule) -> dict[str, PENEX | LogPENEX]:
        if self.criterion is not None:
            return {"criterion": self.criterion}
        found = {name: m for name, m in module.named_modules() if isinstance(m, PENEX | LogPENEX)}
        if not found:
            raise ValueError(
                f"PENEXMonitor: expected a penex.PENEX among the submodules of "
                f"{type(module).__name__}, found none; write self.criterion = penex.PENEX() in its "
                "__init__, or give the criterion: PENEXMonitor(criterion)"
            )
        return found

    def _hook(self, name: str) -> Any:
        def keep(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], _: Tensor
        ) -> None:
            if self._due:
                given = dict(zip(("input", "target"), args, strict=False)) | dict(kwargs)
                self._seen[name] = given["input"].detach(), given["target"].detach()

        return keep


@torch.no_grad()
def measured(criterion: PENEX | LogPENEX, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The values that :class:`PENEXMonitor` logs for a batch of `criterion`, 0-d each."""
    numbers, huberization = {}, None
    if isinstance(criterion, PENEX):
        numbers["penalty"], huberization = criterion.penalty.clone(), criterion.huberization
    input, arguments = validate(
        input,
        target,
        weight=criterion.weight,
        ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
    )
    batch = prepare(input, arguments)
    kept = batch.row_weights > 0
    count = int(kept.sum())
    if count == 0:
        return numbers

    selected = batch.select(batch.logits)
    u = -criterion.sensitivity * selected
    if huberization is not None:
        u = u.clamp(max=math.log(huberization))
    log_weights = (
        (u + batch.target_weights.log())
        .where(batch.target_weights > 0, -math.inf)
        .logsumexp(1)[kept]
    )
    heaviest = log_weights.max()
    relative = (log_weights - heaviest).exp()  # correct even where the weights themselves overflow
    numbers["weight_mean"] = heaviest.exp() * relative.mean()
    numbers["weight_max_share"] = 1 / relative.sum()
    numbers["weight_ess"] = relative.sum() ** 2 / (count * (relative**2).sum())

    labels = arguments.target
    if labels.is_floating_point():
        labels = labels.argmax(1)
    margins = functional.margin(batch.logits, labels.where(kept, 0))[kept]
    ordered = margins.sort().values  # kthvalue is refused on CUDA if Trainer(deterministic=True)
    numbers["margin_mean"] = margins.mean()
    numbers["margin_median"] = ordered[(count - 1) // 2]
    numbers["margin_q05"] = ordered[math.ceil(0.05 * count) - 1]
    numbers["margin_negative"] = (margins < 0).float().mean()
    numbers["label_variance"] = _variance(selected, batch.target_weights)
    numbers["partition_variance"] = _variance(batch.logits.logsumexp(1), batch.row_weights)
    return numbers


def _variance(values: Tensor, mass: Tensor) -> Tensor:
    shares, values = mass / mass.sum(), values.where(mass > 0, 0)
    return (shares * (values - (shares * values).sum()) ** 2).sum()
