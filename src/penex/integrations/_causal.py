"""PENEX for causal language models of transformers, computed from their hidden states.

The logits of all tokens are never materialised: the model computes only those of the last token,
and returns its hidden states, from which :mod:`penex._linear` computes the loss.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from penex._linear import head_loss
from penex._penalty import PenaltyRule
from penex.losses import PENEX

LAST_LOGITS = {"logits_to_keep": 1}
"""Arguments with which a model's ``forward`` computes the logits of the last token only."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Configuration options that cap the logits."""


def is_causal(model: nn.Module | None) -> bool:
    """Whether `model` is a causal language model, whose labels are its tokens shifted by one."""
    names = {kind.__name__ for kind in type(_unwrapped(model)).__mro__}
    return not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


class CausalHead:
    """The last layer of a causal language model, and the loss computed from its input.

    Args:
        model: The model. It may be wrapped in adapters (PEFT), but its last layer may not.

    Raises:
        ValueError: The logits are not the output of a single linear layer, or the model cannot
            leave them out.
    """

    def __init__(self, model: nn.Module | None) -> None:
        inner = _unwrapped(model)
        name = type(inner).__name__
        layer = inner.get_output_embeddings()
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"model: expected {name} to have a torch.nn.Linear as its last layer, with no "
                f"adapter or quantisation, got {type(layer).__module__}.{type(layer).__name__}"
            )
        if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
            raise ValueError(
                f"model: expected the forward of {name} to take logits_to_keep, so that the "
                "logits can be left out"
            )
        config = inner.config.get_text_config()
        for cap in SOFT_CAPS:
            if getattr(config, cap, None) is not None:
                raise ValueError(
                    f"model: {name} caps its logits ({cap} = {getattr(config, cap)}); expected "
                    "them to be those of its last layer"
                )
        self.layer, self.num_classes = layer, layer.out_features
        self._checked = False

    def rows(self, outputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states (N, T - 1, D) and the tokens that follow them (N, T - 1).

        Args:
            outputs: The model's output, with all ``hidden_states`` and at least the ``logits`` of
                the last token.
            labels: The tokens, (N, T), not shifted.

        Raises:
            ValueError: The logits are not those of the last layer, or the shape of `labels` is not
                that of the hidden states without D.
        """
        hidden = outputs["hidden_states"][-1]
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: expected shape {tuple(hidden.shape[:-1])}, a token for each hidden "
                f"state, got {tuple(labels.shape)}"
            )
        if not self._checked:
            self._check(hidden[:, -1].detach(), outputs["logits"][:, -1].detach())
        return hidden[:, :-1], labels[:, 1:].to(hidden.device)

    def total(
        self, hidden: Tensor, labels: Tensor, criterion: PENEX, penalty: PenaltyRule
    ) -> Tensor:
        """The loss summed over the tokens, 0-d, with the options of `criterion` and `penalty`."""
        return head_loss(
            hidden,
            self.layer.weight,
            labels,
            self.layer.bias,
            loss=criterion._with_penalty(penalty),
            class_weight=criterion.weight,
            ignore_index=criterion.ignore_index,
            reduction="sum",
            chunk_size=None,
            vocab_group=None,
            num_classes=None,
        )

    @torch.no_grad()
    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        """Verify that the last layer, applied to the hidden states, gives the model's logits."""
        weight = self.layer.weight
        expected = F.linear(hidden.to(weight.dtype), weight, self.layer.bias)
        error, size = (expected - logits).abs().max(), expected.abs().max()
        half = torch.is_autocast_enabled(hidden.device.type) or weight.dtype.itemsize < 4
        if not error <= (0.05 if half else 1e-3) * size:
            raise ValueError(
                "model: its logits are not its last layer's output of its last hidden states "
                f"(they differ by up to {error.item():.3g}; the largest is {size.item():.3g}), so "
                "the loss cannot be computed without them"
            )
        self._checked = True


def _unwrapped(model: nn.Module | None) -> Any:
    """The model without its adapters."""
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
