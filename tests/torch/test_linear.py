"""Linear layers: values and gradients, which layers are called as modules, and long prompts in pieces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear

from mistral_hf.modeling_mistral import MistralMLP
from mistral_hf.torch import linear as linear_module
from mistral_hf.torch.linear import linear, project
from tests.helpers.operators import Recorder

WITHIN_ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def operators_of(work: Callable[[], Any]) -> set[str]:
    with Recorder() as recorder:
        work()
    return set(recorder.names)


@pytest.fixture(params=["Intel", "AMD"])
def vendor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_is_intel", lambda: request.param == "Intel")


def layer_of(outputs: int = 36, inputs: int = 48) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (1, 2, 48), (8, 1, 48), (3, 5, 48), (2, 3, 4, 48)])
@pytest.mark.parametrize("outputs", [36, 7, 8])
@pytest.mark.usefixtures("vendor")
def test_values_and_gradients_match_the_exact_product(shape: tuple[int, ...], outputs: int) -> None:
    layer, states = layer_of(outputs), torch.randn(shape, requires_grad=True)
    found = linear(layer, states)
    weight, exact = layer.weight.double(), states.double()
    torch.testing.assert_close(found.double(), exact @ weight.T, **WITHIN_ROUNDING)
    gradient = torch.randn_like(found)
    expected = torch.autograd.grad(exact @ weight.T, [states, layer.weight], gradient.double())
    for ours, theirs in zip(torch.autograd.grad(found, [states, layer.weight], gradient), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **WITHIN_ROUNDING)


@pytest.mark.parametrize("rows", [1, 6])
def test_strided_states_match_the_layer(rows: int) -> None:
    layer = layer_of()
    wide = torch.randn(rows, 96, requires_grad=True)
    for states in (wide[:, ::2], wide[:, 48:], torch.randn(48, rows, requires_grad=True).t()):
        torch.testing.assert_close(linear(layer, states), layer(states), **WITHIN_ROUNDING)
        ours = torch.autograd.grad(linear(layer, states).sum(), [layer.weight, states])
        theirs = torch.autograd.grad(layer(states).sum(), [layer.weight, states])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **WITHIN_ROUNDING)


@pytest.mark.parametrize("frozen", ["weight", "states"])
def test_only_needed_gradients_are_computed(frozen: str) -> None:
    layer, states = layer_of(), torch.randn(2, 3, 48, requires_grad=frozen != "states")
    layer.requires_grad_(frozen != "weight")
    linear(layer, states).sum().backward()
    assert (states.grad is None) == (frozen == "states")
    assert (layer.weight.grad is None) == (frozen == "weight")


def test_second_derivatives_match_the_layer() -> None:
    layer, states = layer_of(), torch.randn(2, 3, 48, requires_grad=True)

    def second(product: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(product(layer, states).pow(2).sum(), states, create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), [states, layer.weight])

    for ours, theirs in zip(second(linear), second(lambda layer, states: layer(states)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("intel", [False, True])
def test_one_row_uses_bmm_or_mv_and_several_rows_use_onednn(intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row depends on the processor, whose vendor decides which kernels MKL takes."""
    monkeypatch.setattr(linear_module, "_is_intel", lambda: intel)
    layer, row = layer_of(), torch.randn(1, 1, 48)
    with torch.no_grad():
        assert operators_of(lambda: linear(layer, row)) & {"aten::bmm", "aten::mv"} == {
            "aten::mv" if intel else "aten::bmm"
        }
        torch.testing.assert_close(linear(layer, row), layer(row), **WITHIN_ROUNDING)
        assert "mkldnn::_linear_pointwise" in operators_of(lambda: linear(layer, torch.randn(1, 2, 48)))
        assert not operators_of(lambda: layer(torch.randn(1, 2, 48))) & {"aten::bmm", "mkldnn::_linear_pointwise"}


class Wrapped(nn.Linear):
    """A subclass, as adapters and quantized layers are."""


def hooked(kind: str) -> nn.Linear:
    layer = layer_of()
    getattr(layer, f"register_{kind}_hook")(lambda *args: None)
    return layer


def overridden() -> nn.Linear:
    layer = layer_of()
    layer.forward = lambda states: plain_linear(states, layer.weight)  # type: ignore[method-assign]
    return layer


CALLED_AS_MODULES: dict[str, Callable[[], nn.Linear]] = {
    "bias": lambda: nn.Linear(48, 36),
    "subclass": lambda: Wrapped(48, 36, bias=False),
    "bfloat16": lambda: layer_of().bfloat16(),
    "float64": lambda: layer_of().double(),
    "forward hook": lambda: hooked("forward"),
    "forward pre-hook": lambda: hooked("forward_pre"),
    "backward hook": lambda: hooked("full_backward"),
    "backward pre-hook": lambda: hooked("full_backward_pre"),
    "custom forward": overridden,
}


@pytest.mark.parametrize("kind", CALLED_AS_MODULES)
def test_layers_that_are_not_plain_are_called_as_modules(kind: str) -> None:
    layer = CALLED_AS_MODULES[kind]()
    states = torch.randn(2, 3, 48, dtype=layer.weight.dtype)
    with torch.no_grad():
        assert torch.equal(linear(layer, states), layer(states))
        if kind != "bfloat16":  # its plain product is also oneDNN's
            assert "mkldnn::_linear_pointwise" not in operators_of(lambda: linear(layer, states))


def test_a_global_hook_sees_every_layer() -> None:
    called: list[nn.Module] = []
    layer = layer_of()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        linear(layer, torch.randn(2, 3, 48))
    finally:
        handle.remove()
    assert called == [layer]


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer_of(), torch.randn(2, 3, 48)).dtype == torch.bfloat16


def test_no_tokens_give_an_empty_result() -> None:
    assert linear(layer_of(), torch.empty(2, 0, 48)).shape == (2, 0, 36)


def test_function_transforms_match_the_layer() -> None:
    layer, states = layer_of(), torch.randn(4, 3, 48)

    def work(states: Tensor) -> Tensor:
        return linear(layer, states)

    torch.testing.assert_close(torch.func.vmap(work)(states), layer(states), **WITHIN_ROUNDING)
    tangent = torch.func.jvp(work, (states,), (states,))[1]
    torch.testing.assert_close(tangent, layer(states), **WITHIN_ROUNDING)
    gradient = torch.func.grad(lambda states: work(states).sum())(states)
    torch.testing.assert_close(gradient, layer.weight.sum(dim=0).expand_as(states), **WITHIN_ROUNDING)


def test_compiled_and_exported_programs_hold_the_plain_product() -> None:
    layer, states = layer_of(), torch.randn(2, 3, 48)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, states: Tensor) -> Tensor:
            return linear(self.layer, states)

    exported = torch.export.export(Model(), (states,))
    assert "aten.linear.default" in {str(node.target) for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(states), layer(states), **WITHIN_ROUNDING)
    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(states), layer(states), **WITHIN_ROUNDING)


def test_a_model_uses_the_fast_products_and_calls_its_hooks(make_model: Any, token_ids: Any) -> None:
    model = make_model().eval()
    ids = token_ids(2, 5)
    with torch.no_grad():
        assert "aten::addmm" not in operators_of(lambda: model(ids))
        assert "aten::mm" not in operators_of(lambda: model(ids))
        names: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *args, name=name: names.append(name))
        model(ids)
    assert len(names) == len(set(names)) == 7 * model.config.num_hidden_layers + 1


def test_layers_that_read_the_same_states_are_computed_one_by_one() -> None:
    layers, states = [layer_of(outputs) for outputs in (36, 7, 8)], torch.randn(2, 3, 48)
    for found, layer in zip(project(states, *layers), layers, strict=True):
        torch.testing.assert_close(found, layer(states), **WITHIN_ROUNDING)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "PROMPT_PIECE", 4)


def lengths_seen_by_transforms(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the length of every input that a feed-forward layer transforms together."""
    lengths: list[int] = []
    transform = MistralMLP._transform

    def recorded(mlp: Any, states: Tensor) -> Tensor:
        lengths.append(states.shape[1])
        return transform(mlp, states)

    monkeypatch.setattr(MistralMLP, "_transform", recorded)
    return lengths


@pytest.mark.parametrize("length", [4, 5, 8, 11])
def test_the_feed_forward_layer_takes_a_long_prompt_in_pieces(
    length: int, make_model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model(), token_ids(2, length)
    with torch.no_grad():
        whole = model(ids).logits
    monkeypatch.setattr(linear_module, "PROMPT_PIECE", 4)
    lengths = lengths_seen_by_transforms(model, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole, **WITHIN_ROUNDING)
    assert max(lengths) == 4
    assert sum(lengths) == length * model.config.num_hidden_layers
    lengths.clear()
    model(ids)  # with gradients
    assert set(lengths) == {length}


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "act_fn", "down_proj"])
def test_a_hook_inside_the_feed_forward_layer_sees_the_whole_prompt(
    name: str, make_model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model(), token_ids(2, 11)
    lengths, shapes = lengths_seen_by_transforms(model, monkeypatch), []
    module = model.model.layers[0].mlp.get_submodule(name)
    module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    with torch.no_grad():
        model(ids)
    assert shapes == [(2, 11)]
    assert lengths == [11, 4, 4, 3]  # the other layer stays in pieces


def test_a_hook_keeps_the_activation_that_it_saw(make_model: Any, token_ids: Any) -> None:
    """Later operations do not write into it."""
    mlp, kept = make_model().model.layers[0].mlp, {}
    for name in ("gate_proj", "act_fn"):
        mlp.get_submodule(name).register_forward_hook(lambda *call, name=name: kept.update({name: call[2]}))
    with torch.no_grad():
        mlp(torch.randn(2, 3, 32))
        torch.testing.assert_close(kept["act_fn"], torch.nn.functional.silu(kept["gate_proj"]))
