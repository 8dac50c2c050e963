"""Attention functions of tools: registered or assigned, under a new name or one of ours; a server's over requests."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModel, modeling_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward as library_sdpa

from mistral_hf import MistralConfig
from mistral_hf.torch.attention import ALL_ATTENTION_FUNCTIONS, BandMask, sdpa_attention_forward

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test puts into the library's registries is gone afterwards."""
    assigned = dict(modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping)
    registered = dict(AttentionInterface._global_mapping)
    yield
    modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping = assigned
    AttentionInterface._global_mapping.clear()
    AttentionInterface._global_mapping.update(registered)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("way", ["assigned", "registered"])
@pytest.mark.parametrize("name", ["mine", "sdpa", "eager"])
def test_a_function_that_a_tool_put_there_is_called(way: str, name: str, make_model: Any, token_ids: Any) -> None:
    masks: list[Any] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return library_sdpa(module, query, key, value, attention_mask, **kwargs)

    model, ids = make_model(implementation="sdpa", sliding_window=None), token_ids(2, 300)
    expected = model(ids, use_cache=False).logits
    assert not masks
    if way == "assigned":
        modeling_utils.ALL_ATTENTION_FUNCTIONS[name] = attention
    else:
        AttentionInterface.register(name, attention)
    if name != "sdpa":
        model.set_attn_implementation(name)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **CLOSE)
    assert len(masks) == model.config.num_hidden_layers
    assert not any(isinstance(mask, BandMask) for mask in masks)  # which only our own functions take


@pytest.mark.usefixtures("registries")
def test_without_an_override_the_function_is_ours() -> None:
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert AttentionInterface._global_mapping["sdpa"] is library_sdpa
    assert ALL_ATTENTION_FUNCTIONS["flex_attention"] is AttentionInterface._global_mapping["flex_attention"]
    with pytest.raises(KeyError):
        ALL_ATTENTION_FUNCTIONS["nobody's"]


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operators that hand a value to Python, for which a host waits on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("registries")
@torch.no_grad()
def test_a_server_runs_flattened_requests_with_its_own_attention(make_model: Any, token_ids: Any) -> None:
    """As vLLM does: requests in one row, positions that restart, attention over the server's cache, no wait."""
    lengths, calls = (5, 9, 1), []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        calls.append((module.layer_idx, kwargs["scaling"], kwargs["attention_instances"], attention_mask))
        parts = [states.split(lengths, dim=2) for states in (query, key, value)]
        outputs = []
        for q, k, v in zip(*parts, strict=True):
            window = module.config.sliding_window
            index = torch.arange(q.shape[2])
            mask = (index <= index[:, None]) & (index > index[:, None] - window)
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, mask, scale=kwargs["scaling"], enable_gqa=True
                )
            )
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    modeling_utils.ALL_ATTENTION_FUNCTIONS["served"] = attention
    model, rows = make_model("Model"), [token_ids(1, length, seed=length) for length in lengths]
    expected = torch.cat([model(row, use_cache=False).last_hidden_state for row in rows], dim=1)
    model.set_attn_implementation("served")
    instances = object()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    embedded = model.get_input_embeddings()(torch.cat(rows, dim=1))
    with Waits() as waits:
        states = model(
            inputs_embeds=embedded,
            position_ids=positions,
            use_cache=False,
            attention_instances=instances,
            return_dict=False,
        )[0]
    assert waits.names == []
    torch.testing.assert_close(states, expected, **CLOSE)
    assert calls == [(layer, 12**-0.5, instances, None) for layer in range(2)]


def test_a_server_builds_the_model_on_the_meta_device_with_its_parallel_plan(tiny: Any) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(MistralConfig(**tiny()), dtype=torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    names = {name for name, _ in model.named_parameters()}
    layers = {pattern: style for pattern, style in model.tp_plan.items() if "layers" in pattern}
    assert set(layers.values()) == {"colwise", "rowwise"}
    assert len(layers) == 7
    for pattern in layers:
        assert any(f"layers.0.{pattern.split('*.')[1]}.weight" == name for name in names)
    assert set(model._pp_plan) == {"embed_tokens", "layers", "norm"}
