"""Labels for the five heads, losses with gradients, and comparisons of what two models compute."""

from typing import Any

import torch
from torch import Tensor

TIGHT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def loss_and_gradients(model: Any, *batches: dict[str, Any], **keywords: Any) -> dict[str, Tensor]:
    """The summed loss of all batches as ``"loss"``, and the gradients of all trained parameters by name."""
    model.zero_grad()
    loss = torch.stack([model(**batch, **keywords).loss for batch in batches]).sum()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    """Both have the same names, and the tensors of a name are close."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **(tolerance or TIGHT), msg=lambda message, name=name: f"{name}: {message}"
        )


def outputs_of(output: Any) -> dict[str, Tensor]:
    """The tensors that a head computes, by name."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def assert_same_outputs(ours: Any, stock: Any, real: Tensor | None = None, **tolerance: Any) -> None:
    """All output tensors are close where tokens are real; the logits of padding mean nothing."""
    ours, stock = outputs_of(ours), outputs_of(stock)
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        per_token = real is not None and expected.shape[:2] == real.shape
        where = real.bool() if per_token else ...
        torch.testing.assert_close(ours[name][where], expected[where], **(tolerance or TIGHT))


def labels_of(head: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels for a head; a row's first real token is not a label, since padding would have to predict it."""
    ids = inputs["input_ids"]
    if head == "ForCausalLM":
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return {"labels": ids.masked_fill(mask.cumsum(dim=1) * mask <= 1, -100)}
    if head == "ForSequenceClassification":
        return {"labels": torch.arange(len(ids)) % 2}
    if head == "ForTokenClassification":
        return {"labels": (ids % 2).masked_fill(ids == 0, -100)}
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.full((len(ids),), 3), "end_positions": torch.full((len(ids),), 5)}
    return {}
