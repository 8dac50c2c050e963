"""Muon for the hidden matrices, AdamW for the rest, as one optimizer that a Trainer can schedule, save and resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Muon for a decoder's projection matrices, AdamW for its embeddings and norms.

    Muon's steps are scaled to the size of AdamW's (``match_rms_adamw``), and one learning rate serves both. Only
    matrices decay.

    Args:
        model: The model; Muon updates every parameter with two dimensions below ``layers``.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of both.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        named = list(model.named_parameters())
        hidden = [parameter for name, parameter in named if ".layers." in name and parameter.ndim == 2]
        tables = [parameter for name, parameter in named if ".layers." not in name and parameter.ndim == 2]
        vectors = [parameter for _, parameter in named if parameter.ndim < 2]
        groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # the base class declares overloads
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
