"""Projections whose weights are read as one, and the feed-forward layer in pieces: the same model, fewer operators."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mistral_hf.modeling_mistral
from mistral_hf import RollingCache
from mistral_hf.torch.linear import fuse, fused_linear
from tests.helpers.operators import Recorder

WITHIN_ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def decode(model: Any, ids: Tensor, prompt: int = 6) -> Tensor:
    """Logits of a prompt and of steps of one token."""
    cache = RollingCache(model.config)
    logits = [model(ids[:, :prompt], past_key_values=cache).logits]
    for place in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def products_of_a_step(model: Any, ids: Tensor) -> int:
    """How many products with weights a decoding step takes."""
    cache = RollingCache(model.config)
    model(ids[:, :-1], past_key_values=cache)
    with Recorder() as recorder:
        model(ids[:, -1:], past_key_values=cache)
    return sum(name in ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise") for name in recorder.names)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_logits_across_the_wrap(batch: int, implementation: str, make_model: Any, token_ids: Any) -> None:
    model = make_model("ForCausalLM", implementation, sliding_window=8)
    ids = token_ids(batch, 21)
    apart = decode(model, ids)
    model.fuse_projections()
    torch.testing.assert_close(decode(model, ids), apart, **WITHIN_ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_four_products_a_layer_and_one(dtype: torch.dtype, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model().to(dtype), token_ids(3, 9)
    layers = model.config.num_hidden_layers
    assert products_of_a_step(model, ids) == 7 * layers + 1
    model.fuse_projections()
    assert products_of_a_step(model, ids) == 4 * layers + 1
    model.unfuse_projections()
    assert products_of_a_step(model, ids) == 7 * layers + 1
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in model.parameters())


def test_parameters_and_saved_files_stay(make_model: Any, tmp_path: Any) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "apart")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.fuse_projections()
    model.save_pretrained(tmp_path / "fused")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    name = "model.safetensors"
    assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()


def loaded(model: Any, other: Any) -> Any:
    model.load_state_dict(other.state_dict())
    return model


def assigned(model: Any, other: Any) -> Any:
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    return model


def trained(model: Any, other: Any) -> Any:
    for target in (model, other):
        target.load_state_dict(copy.deepcopy(other.state_dict()))
        target(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
        torch.optim.SGD(target.parameters(), lr=0.1).step()
    return model


CHANGES = {
    "loaded": loaded,
    "assigned": assigned,
    "trained": trained,
    "copied": lambda model, other: copy.deepcopy(loaded(model, other)),
    "moved": lambda model, other: loaded(model, other).double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_weights_changes_the_results(change: str, make_model: Any, token_ids: Any) -> None:
    model, other, ids = make_model(), make_model(), token_ids(2, 9)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    model.fuse_projections()
    changed = CHANGES[change](model, other)
    torch.testing.assert_close(decode(changed, ids), decode(other, ids), **WITHIN_ROUNDING)


def test_a_compiled_step(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(2, 7)
    expected = decode(model, ids)
    model.fuse_projections()
    model.forward = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(decode(model, ids), expected, **WITHIN_ROUNDING)


@pytest.mark.parametrize("undo", [False, True])
def test_fused_in_inference_mode_and_then_trained(undo: bool, make_model: Any, token_ids: Any) -> None:
    model = make_model()
    with torch.inference_mode():
        model.fuse_projections()
        if undo:
            model.unfuse_projections()
    model(token_ids(1, 9), labels=token_ids(1, 9)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not any(weight.is_inference() for weight in model.parameters())


class Wrapped(nn.Linear):
    """As adapters and quantized layers are made."""


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_a_wrapped_projection_is_refused_before_anything_is_moved(name: str, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(3, 9)
    expected = decode(model, ids)
    layer = model.model.layers[1].get_submodule(name)
    layer.__class__ = Wrapped
    with pytest.raises(ValueError, match="Wrapped cannot be fused with its neighbours"):
        model.fuse_projections()
    layer.__class__ = nn.Linear
    assert products_of_a_step(model, ids) == 7 * model.config.num_hidden_layers + 1
    model.fuse_projections()
    layer.__class__ = Wrapped  # adapted afterwards: called by itself again
    seen: list[nn.Module] = []
    layer.register_forward_hook(lambda module, *_: seen.append(module))
    torch.testing.assert_close(decode(model, ids), expected, **WITHIN_ROUNDING)
    assert seen == [layer] * 4


def test_weights_of_several_dtypes_are_refused(make_model: Any) -> None:
    model = make_model()
    model.model.layers[0].mlp.up_proj.bfloat16()
    with pytest.raises(ValueError, match=r"weights of torch\.bfloat16 on cpu, torch\.float32 on cpu cannot be fused"):
        model.fuse_projections()


def test_the_memory_of_moved_weights_is_let_go(make_model: Any, token_ids: Any) -> None:
    model = make_model()
    model.fuse_projections()
    fused = [weight.fused for weight in model.parameters() if hasattr(weight, "fused")]
    assert len(fused) == 2 * model.config.num_hidden_layers
    model.bfloat16()
    decode(model, token_ids(1, 9))
    assert not any(hasattr(weight, "fused") for weight in model.parameters())


def test_gradients_and_autocast_call_the_layers_one_by_one(make_model: Any) -> None:
    layers = make_model().model.layers[0].mlp.fusible()
    fuse(layers)
    states = torch.randn(1, 1, layers[0].in_features)
    assert fused_linear(layers, states) is None
    with torch.no_grad():
        assert fused_linear(layers, states) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert fused_linear(layers, states) is None


@pytest.mark.parametrize("length", [4, 5, 8, 11])
def test_the_feed_forward_layer_takes_a_long_prompt_in_pieces(
    length: int, make_model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model(), token_ids(2, length)
    with torch.no_grad():
        whole = model(ids).logits
    monkeypatch.setattr(mistral_hf.modeling_mistral, "MLP_TOKENS", 4)
    lengths: list[int] = []
    transform = mistral_hf.modeling_mistral.MistralMLP._transform

    def recorded(mlp: Any, states: Tensor) -> Tensor:
        lengths.append(states.shape[1])
        return transform(mlp, states)

    monkeypatch.setattr(mistral_hf.modeling_mistral.MistralMLP, "_transform", recorded)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole, **WITHIN_ROUNDING)
    assert max(lengths) == 4
    assert sum(lengths) == length * model.config.num_hidden_layers
    lengths.clear()
    model(ids)  # with gradients
    assert set(lengths) == {length}
    lengths.clear()
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(ids)
    assert lengths[0] == length
