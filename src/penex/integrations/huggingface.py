"""PENEX in the Hugging Face :class:`~transformers.Trainer` (extra ``transformers``).

:class:`PENEXTrainer` replaces ``Trainer`` and handles everything: the penalty in checkpoints,
gradient accumulation and probabilities. :class:`PENEXLossFunc` is the loss alone, for the
``compute_loss_func`` of a ``Trainer`` that cannot be replaced. :func:`fold` returns a model whose
plain softmax gives the probabilities, for use in a pipeline.

Supported tasks are sequence, image and token classification: models whose output has ``logits``
(N, K) for labels (N), or (N, T, K) for labels (N, T), where -100 is ignored. In addition,
:class:`PENEXTrainer` supports causal language models, whose logits are not computed in training.
"""

import copy
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penex._extras import need
from penex._penalty import CollectedPenalty, LogSums, update_penalty
from penex.inference import fold_temperature
from penex.losses import PENEX

need("penex.integrations.huggingface", "transformers", "transformers", "accelerate")

from transformers import PreTrainedModel, Trainer, TrainingArguments  # noqa: E402
from transformers.trainer_utils import TrainOutput, get_last_checkpoint  # noqa: E402

from penex.integrations._causal import LAST_LOGITS, CausalHead, is_causal  # noqa: E402

__all__ = ["PENEXLossFunc", "PENEXTrainer", "fold"]

STATE_FILE = "penex.json"
"""The file in each checkpoint that holds the penalty and the sensitivity it belongs to."""
FOLDED = "penex_folded_sensitivity"
"""The configuration option that marks a folded model."""
IGNORE_INDEX = -100  # the Trainer does not count these labels
HEADS = ("classifier", "score", "classification_head", "logits_proj", "lm_head")


class PENEXLossFunc:
    r"""PENEX as the ``compute_loss_func`` of a stock :class:`~transformers.Trainer`.

    The sum over the micro-batch is divided by `num_items_in_batch`, which the Trainer counts over
    all micro-batches and ranks of an update. Even with class weights this is a number of labels,
    not the sum of their weights. In evaluation the divisor is whatever the Trainer counts there;
    without a count, the mean is that of :class:`penex.PENEX`.

    The Trainer does not know the criterion, which has four consequences. The running penalty is not
    saved in checkpoints, so after resuming it restarts from the first batch. It is updated with
    every micro-batch. The logits of ``predict`` are :math:`f`, whose probabilities are
    ``criterion.predict_proba(f)``. And ``label_smoothing_factor`` has no effect; pass
    `label_smoothing` here instead. :class:`PENEXTrainer` has none of these limitations.

    Args:
        sensitivity: :math:`\alpha > 0`.
        options: Other arguments of :class:`penex.PENEX`, except `reduction` and `ignore_index`.

    Attributes:
        criterion: The :class:`penex.PENEX` that computes the loss.

    Example:
        >>> loss_func = PENEXLossFunc(sensitivity=0.5, penalty=0.25)
        >>> outputs = {"logits": torch.tensor([[2.0, 0.0], [0.0, 1.0]])}
        >>> loss_func(outputs, torch.tensor([0, 1]), num_items_in_batch=2)
        tensor(2.0006)
    """

    def __init__(self, sensitivity: float = 0.1, **options: Any) -> None:
        self.criterion = PENEX(
            sensitivity=sensitivity, reduction="sum", ignore_index=IGNORE_INDEX, **options
        )

    def __call__(
        self,
        outputs: Mapping[str, Any],
        labels: Tensor | None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of one micro-batch.

        Args:
            outputs: The model's output, with ``logits``, shape (N, K) or (N, T, K).
            labels: Class indices, integer, shape (N) or (N, T).
            num_items_in_batch: The divisor of the sum, 0-d. None: the denominator of this batch.

        Returns:
            The loss, 0-d.

        Raises:
            TypeError: `outputs` has no ``logits``.
            ValueError: `labels` are not class indices that match the shape of the logits, the
                outputs are those of a causal language model, or `num_items_in_batch` comes from
                ``DataParallel``.
        """
        logits, labels = _rows(outputs, labels)
        total: Tensor = self.criterion.to(logits.device)(logits, labels)
        return _mean(total, labels, self.criterion.weight, num_items_in_batch)


class PENEXTrainer(Trainer):
    r""":class:`~transformers.Trainer` with the loss :class:`penex.PENEX`.

    - An update is that of the whole batch, however the batch is split into micro-batches
      (``gradient_accumulation_steps``) and ranks: the loss is divided once, by the number of
      labels in the batch or the sum of their class weights. All micro-batches use the running
      penalty from before the update, which afterwards absorbs them together. Before the first
      update there is no running penalty: unless `penalty` gives an initial value, each micro-batch
      uses its own estimate, as it always does with ``penalty_mode="auto"``.
    - For causal language models, the loss is computed without the logits, from the hidden states
      before the last layer, as in :func:`penex.functional.linear_penex_loss`; labels are shifted
      as in transformers. Evaluation computes logits where predictions or metrics are requested.
      The model may have adapters (PEFT), but not on its last layer.
    - ``predict`` and ``compute_metrics`` get calibrated logits (without label smoothing and
      huberization, :math:`(1+\alpha) f`): their softmax gives the probabilities of
      :meth:`penex.PENEX.predict_proba`, and their cross-entropy is the NLL.
    - ``eval_loss`` is the value of PENEX at the current penalty. It cannot be compared with
      cross-entropy, and is not reliable between epochs either. Choose the best model by a metric
      such as the NLL.
    - Checkpoints, and the folders that ``save_model`` writes, contain the penalty in
      ``penex.json``. It is restored on resuming and by ``load_best_model_at_end``.
    - ``save_model`` writes the model as it was trained; the softmax of its logits is too flat.
      :meth:`save_folded` writes a model for pipelines.
    - ``label_smoothing_factor`` sets `label_smoothing` of the loss.

    Gradients are about :math:`\alpha` times those of cross-entropy, so scale ``max_grad_norm`` by
    about :math:`\alpha` as well.

    Args:
        model: As for ``Trainer``.
        args: As for ``Trainer``.
        sensitivity: :math:`\alpha > 0`.
        weight: Class weights, shape (K).
        penalty_mode: As in :class:`penex.PENEX`.
        penalty: As in :class:`penex.PENEX`.
        ema: As in :class:`penex.PENEX`; applied once per update.
        huberization: As in :class:`penex.PENEX`.
        kwargs: Other arguments of ``Trainer``, except `compute_loss_func`.

    Attributes:
        criterion: The :class:`penex.PENEX` that computes the loss.

    Raises:
        ValueError: An option is out of range; the model is configured for regression or several
            labels, has been folded, or has a different number of labels than `weight`; one process
            drives several devices; or a causal language model is sharded, is to be trained with
            label smoothing, or computes its logits with more than a linear layer.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        sensitivity: float = 0.1,
        weight: Tensor | None = None,
        penalty_mode: str | None = None,
        penalty: float | None = None,
        ema: float = 0.1,
        huberization: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, compute_loss_func=self._loss, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"args: {_ONE_DEVICE}, got n_gpu = {self.args.n_gpu}")
        self._head = self._causal_head()
        classes = None if self._head is None else self._head.num_classes
        _check_config(getattr(self.model, "config", None), weight, classes)
        self.criterion = PENEXLossFunc(
            sensitivity,
            weight=weight,
            penalty_mode=penalty_mode,
            penalty=penalty,
            ema=ema,
            huberization=huberization,
            label_smoothing=self.args.label_smoothing_factor,
            process_group="world",
        ).criterion.eval()
        self.label_smoother = None  # it would smooth cross-entropy
        self._start = self.criterion.penalty.clone()
        # All micro-batches of an update share one penalty, which absorbs them together at its end.
        self._seen: list[LogSums] = []

    def _causal_head(self) -> CausalHead | None:
        """The last layer if the model is a causal language model, else None."""
        if not is_causal(self.model):
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "model: expected a causal language model to be whole on each rank, because its "
                "last layer is used separately, but this model is to be sharded"
            )
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                "label_smoothing_factor: expected 0 for a causal language model, whose logits are "
                f"not computed, got {self.args.label_smoothing_factor}"
            )
        return CausalHead(self.model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an update, and the denominator of its loss."""
        self._seen.clear()
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is not None and (self._head is not None or self.criterion.weight is not None):
            # The Trainer's count ignores class weights and includes the first token of each
            # sequence, which nothing predicts.
            first = 0 if self._head is None else 1
            labels = [batch["labels"].to(self.args.device)[..., first:] for batch in batches]
            labels = [part.flatten() for part in labels]
            items = _denominator(torch.cat(labels), self.criterion.weight)
            if self.args.average_tokens_across_devices:
                items = self.accelerator.gather(items).sum()
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch or, in evaluation, the mean loss of a batch."""
        items = num_items_in_batch if model.training else None
        if self._head is not None:
            inputs = {**inputs, "output_hidden_states": True}
            if model.training:
                inputs |= LAST_LOGITS
        return super().compute_loss(model, inputs, return_outputs, items)

    def _loss(
        self,
        outputs: Mapping[str, Any],
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        learning = torch.is_grad_enabled() and self.criterion.penalty_mode == "running"
        seen = self._seen if learning else []
        if self._head is None:
            logits, targets = _rows(outputs, labels)
            rule = CollectedPenalty(self.criterion.to(logits.device), seen)
            total = self.criterion._loss(logits, targets, self.criterion._with_penalty(rule))
        else:
            # The model's own autocast ends at its output; the last layer is applied after that.
            with self.accelerator.autocast():
                hidden, targets = self._head.rows(outputs, _labels(labels))
                rule = CollectedPenalty(self.criterion.to(hidden.device), seen)
                total = self._head.total(hidden, targets, self.criterion, rule)
        if learning and self.accelerator.sync_gradients:
            update_penalty(self.criterion, seen)
            seen.clear()
        return _mean(total, targets, self.criterion.weight, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss, calibrated logits and labels of a batch."""
        if self._head is not None:
            if prediction_loss_only:
                inputs = {**inputs, **LAST_LOGITS}
            config: Any = self.model.config  # type: ignore[union-attr]
            if ignore_keys is None:
                ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
            if not config.output_hidden_states:
                ignore_keys = [*ignore_keys, "hidden_states"]
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        if isinstance(logits, tuple):  # the model returns more, after its logits
            logits = (self._calibrated(logits[0]), *logits[1:])
        elif logits is not None:
            logits = self._calibrated(logits)
        return loss, logits, labels

    def _calibrated(self, logits: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return self.criterion.to(logits.device)._calibrated_logits(logits.to(dtype), -1)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as :meth:`transformers.Trainer.train` does, restoring the penalty when resuming.

        Raises:
            FileNotFoundError: The checkpoint was not written by this class.
            ValueError: The checkpoint was written with another sensitivity.
        """
        if resume_from_checkpoint is True:  # the Trainer raises if there is none
            folder = self.args.output_dir
            last: str | None = get_last_checkpoint(folder)  # type: ignore[no-untyped-call]
            resume_from_checkpoint = last or True
        if isinstance(resume_from_checkpoint, (str, PathLike)):
            self._load_penalty(Path(resume_from_checkpoint, STATE_FILE))
        elif self.model_init is not None:  # a new model
            self.criterion.penalty.copy_(self._start)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            best = Path(self.state.best_model_checkpoint, STATE_FILE)
            if best.exists():  # a node that does not have it kept its last model, too
                self._load_penalty(best)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as :meth:`transformers.Trainer.save_model` does, with the penalty."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            penalty = self.criterion.penalty.item()
            state = {
                "sensitivity": self.criterion.sensitivity,
                "penalty": penalty or None,
            }
            (folder / STATE_FILE).write_text(json.dumps(state))
        super().save_model(output_dir, _internal_call)

    def _load_penalty(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"resume_from_checkpoint: expected a checkpoint of PENEXTrainer, with the penalty; "
                f"{path} does not exist"
            )
        state = json.loads(path.read_text())
        if state["sensitivity"] != self.criterion.sensitivity:
            raise ValueError(
                f"resume_from_checkpoint: {path.parent} was trained with sensitivity "
                f"{state['sensitivity']}, its penalty means nothing to "
                f"{self.criterion.sensitivity}"
            )
        penalty = state["penalty"]
        self.criterion.penalty.fill_(penalty or 0.0)

    def save_folded(self, output_dir: str | PathLike[str], layer: str | None = None) -> None:
        """Save the model, folded by :func:`fold`, and its tokenizer or processor, for a pipeline.

        Args:
            output_dir: The folder to write, which ``from_pretrained`` and ``pipeline`` can read.
            layer: As in :func:`fold`.

        Raises:
            TypeError, ValueError, AttributeError: As :func:`fold`; also if the model is sharded, or
                was trained with label smoothing or huberization.
        """
        for name in ("label_smoothing", "huberization"):
            if getattr(self.criterion, name):
                raise ValueError(
                    f"{name}: expected none, as only the link of plain PENEX is a factor that can "
                    f"be folded into a layer, got {getattr(self.criterion, name)}; softmax of the "
                    "logits of predict, and criterion.predict_proba, give the probabilities"
                )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "the model is sharded; expected a whole one: save_model, load it in one process, "
                "and fold that"
            )
        if self.args.should_save:
            fold(self.model, self.criterion.sensitivity, layer).save_pretrained(output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)


def fold(model: nn.Module | None, sensitivity: float, layer: str | None = None) -> PreTrainedModel:
    r"""Copy `model` with its last layer scaled by :math:`1+\alpha`, so that plain softmax is right.

    This is :func:`penex.inference.fold_temperature` for models of transformers. The copy's
    configuration records it as ``penex_folded_sensitivity``, which survives saving and loading;
    :func:`fold` and :class:`PENEXTrainer` refuse such a model.

    Args:
        model: A model trained with PENEX.
        sensitivity: The :math:`\alpha > 0` it was trained with.
        layer: Name of the module that computes the logits, such as ``"classifier.out_proj"``. None:
            the task head, ``classifier``, ``score``, ``classification_head`` or ``logits_proj``.

    Returns:
        The copy.

    Raises:
        TypeError: `model` is not a ``PreTrainedModel``.
        ValueError: `sensitivity` is not finite and positive; `model` has already been folded; it
            has no such head; or the last layer cannot be scaled on its own.
        AttributeError: `model` has no module `layer`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {type(model).__name__} "
            "(merge adapters first)"
        )
    _refuse_folded(model.config)
    found = [name for name in HEADS if hasattr(model, name)] if layer is None else [layer]
    if len(found) != 1:
        raise ValueError(
            f"layer: expected {type(model).__name__} to have one of {', '.join(HEADS)}, got "
            f"{' and '.join(found) or 'none'}; name the module that makes the logits"
        )
    folded = copy.deepcopy(model)
    head = folded.get_submodule(found[0])
    own = {id(parameter) for parameter in head.parameters()}
    shared = [
        name
        for name, parameter in folded.named_parameters(remove_duplicate=False)
        if id(parameter) in own and not name.startswith(f"{found[0]}.")
    ]
    if shared:
        raise ValueError(
            f"layer: the weights of {found[0]!r} are also {', '.join(shared)}; scaling them would "
            "change more than the output"
        )
    fold_temperature(head, sensitivity)
    setattr(folded.config, FOLDED, float(sensitivity))
    return folded


_ONE_DEVICE = (
    "expected one process per device, as started by torchrun or accelerate launch, because "
    "DataParallel, which a single process with several devices uses, scales the loss incorrectly"
)


def _rows(outputs: Mapping[str, Any], labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (M, K) and labels (M)."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor):
        keys = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TypeError(f"outputs: expected a model output with logits, got {keys}")
    if "CausalLM" in type(outputs).__name__:
        raise ValueError(
            "outputs: expected those of sequence, image or token classification, got "
            f"{type(outputs).__name__}; for a causal language model use PENEXTrainer"
        )
    labels = _labels(labels)
    if logits.ndim not in (2, 3) or logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        raise ValueError(
            "expected logits (N, K) and labels (N), or logits (N, T, K) and labels (N, T), with "
            f"K >= 2; got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        )
    return logits.flatten(0, -2), labels.flatten().to(logits.device)


def _labels(labels: Tensor | None) -> Tensor:
    """Return the labels if they are class indices; refuse them otherwise."""
    if labels is None:
        raise ValueError("labels: expected the batch to have them, under 'labels'; got none")
    if labels.is_floating_point():
        raise ValueError(
            f"labels: expected class indices, got {labels.dtype}; this loss supports neither "
            "regression nor several labels per row"
        )
    return labels


def _mean(
    total: Tensor, labels: Tensor, weight: Tensor | None, items: Tensor | float | None
) -> Tensor:
    """`total` divided by the Trainer's count or, without one, by the batch's own denominator."""
    if items is None:
        items = _denominator(labels, weight)
    items = torch.as_tensor(items, device=total.device)
    if items.ndim > 0:
        raise ValueError(f"num_items_in_batch: {_ONE_DEVICE}, got shape {tuple(items.shape)}")
    return total / items.where(items != 0, 1)


def _denominator(labels: Tensor, weight: Tensor | None) -> Tensor:
    """The denominator of the mean over labels (M), 0-d."""
    keep = labels != IGNORE_INDEX
    if weight is None:
        return keep.sum()
    return (weight.to(labels.device)[labels.where(keep, 0)] * keep).sum()


def _check_config(config: Any, weight: Tensor | None, num_classes: int | None) -> None:
    """Refuse a model configured for another task; one without a configuration passes."""
    if config is None:
        return
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"model: expected problem_type 'single_label_classification', got {problem!r}"
        )
    classes = num_classes or getattr(config, "num_labels", None)
    if classes is not None and weight is not None and len(weight) != classes:
        raise ValueError(
            f"weight: expected one weight for each of the model's {classes} labels, got "
            f"{tuple(weight.shape)}"
        )
    _refuse_folded(config)


def _refuse_folded(config: Any) -> None:
    folded = getattr(config, FOLDED, None)
    if folded is not None:
        raise ValueError(
            f"model: it was folded, with sensitivity {folded}, so softmax of its logits is right "
            "already; expected the model that save_model wrote (if its head is new, delete "
            f"config.{FOLDED})"
        )
