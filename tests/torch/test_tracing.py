"""Derivatives of every kind, function transforms, tracers and fake tensors: as on the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LABELS = {"plain": {}, "ignored": {"ignored": 3}, "smoothed": {"label_smoothing": 0.3}}


def labels_of(ids: Tensor, ignored: int = 0) -> Tensor:
    return ids.masked_fill(torch.arange(ids.shape[1]) < ignored, -100)


def products_with_hessians(loss: Callable[[], Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Gradients of the squared norm of the gradient."""
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    norm = torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum()
    return list(torch.autograd.grad(norm, parameters))


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_through_labels_match_cross_entropy(
    kind: str, dtype: torch.dtype, make_model: Any, token_ids: Any
) -> None:
    model, ids = make_model(implementation="eager").to(dtype), token_ids(2, 9)
    options = dict(LABELS[kind])
    labels = labels_of(ids, options.pop("ignored", 0))

    def plain_loss() -> Tensor:
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), **options)

    parameters = list(model.parameters())
    ours = products_with_hessians(lambda: model(ids, labels=labels, **options).loss, parameters)
    for found, expected in zip(ours, products_with_hessians(plain_loss, parameters), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_second_derivatives_of_a_loss_in_chunks_are_refused(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(implementation="eager"), token_ids(1, 9)
    loss = model(ids, labels=ids, loss_chunk_size=4).loss
    with pytest.raises(RuntimeError, match=r"differentiated again: set loss_chunk_size=None"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_functional_gradients_of_the_loss_match_backward(make_pair: Any, token_ids: Any) -> None:
    ids = token_ids(2, 9)
    gradients = []
    for model in make_pair():
        weights = dict(model.named_parameters())

        def loss(weights: dict[str, Tensor], model: Any = model) -> Tensor:
            return torch.func.functional_call(model, weights, (ids,), {"labels": ids, "use_cache": False}).loss

        gradients.append(torch.func.grad(loss)(weights))
    ours, stock = gradients
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], **CLOSE)


def test_gradients_of_every_row_by_vmap_match_a_loop(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(implementation="eager"), token_ids(3, 7)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        options = {"labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, weights, (row[None],), options).loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, ids)
    for row, tokens in enumerate(ids):
        model.zero_grad()
        model(tokens[None], labels=tokens[None]).loss.backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][row], weight.grad, **CLOSE)


@pytest.mark.parametrize("recording", [False, True])
def test_forward_mode_derivatives_match_the_reference(recording: bool, make_pair: Any, token_ids: Any) -> None:
    pair, found = make_pair(implementation="eager"), []
    states = torch.randn(2, 9, 32)
    for model in pair:
        with torch.set_grad_enabled(recording), forward_ad.dual_level():
            dual = forward_ad.make_dual(states, torch.ones_like(states))
            logits = model(inputs_embeds=dual, use_cache=False).logits
            found.append(forward_ad.unpack_dual(logits).tangent)
    torch.testing.assert_close(*found, **CLOSE)


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_traced_model_returns_the_same_logits(implementation: str, make_model: Any, token_ids: Any) -> None:
    model, other = Logits(make_model(implementation=implementation)), token_ids(2, 9, seed=5)
    traced = torch.jit.trace(model, (token_ids(2, 9),))
    torch.testing.assert_close(traced(other), model(other), **CLOSE)


@torch.no_grad()
def test_a_forward_pass_of_fake_tensors_gives_shapes(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(2, 9)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = model(mode.from_tensor(ids), attention_mask=mode.from_tensor(torch.ones_like(ids)))
    assert output.logits.shape == (2, 9, 99)
