"""What tools read of a cache: the tokens that it holds and nothing else, in order; its kind, length and memory."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from mistral_hf import MistralConfig, RollingCache
from tests.helpers.family import FAMILY

WINDOW = 8


def filled(model: Any, ids: Any, **options: Any) -> RollingCache:
    cache = RollingCache(model.config, **options)
    with torch.no_grad():
        for start, end in ((0, 5), (5, ids.shape[1] - 1), (ids.shape[1] - 1, ids.shape[1])):
            model(ids[:, start:end], past_key_values=cache)
    return cache


@pytest.mark.parametrize("length", [7, 8, 9, 12, 21])
@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("static", [False, True])
@FAMILY
def test_the_keys_and_values_of_a_layer_are_those_of_the_reference(
    length: int, window: int | None, static: bool, make_pair: Any, token_ids: Any
) -> None:
    """A static layer has room for all slots; zeros follow the tokens."""
    pair, ids = make_pair(sliding_window=window), token_ids(2, length)
    cache = filled(pair.ours, ids, **({"max_cache_len": 24} if static else {}))
    stock = DynamicCache(config=pair.stock.config)
    with torch.no_grad():
        pair.stock(ids, past_key_values=stock)
    for ours, theirs, width in zip(cache.layers, stock.layers, pair.ours.config.layer_windows, strict=True):
        count = theirs.keys.shape[2]
        for found, expected in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            if static:
                assert found.shape[2] == min(24, width or 24)
                held = min(length, width or length)
                assert not found[:, :, held:].any()
                found = found[:, :, held - count : held]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@FAMILY
def test_a_cache_rebuilt_from_keys_and_values_continues_the_text(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(sliding_window=None), token_ids(2, 12)
    cache = filled(model, ids[:, :11])
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with torch.no_grad():
        expected = model(ids[:, 11:], past_key_values=cache).logits
        torch.testing.assert_close(model(ids[:, 11:], past_key_values=rebuilt).logits, expected)


def test_assigned_keys_and_values_replace_those_of_the_same_tokens(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(3, 14)
    cache, rows = filled(model, ids[:, :13]), torch.tensor([2, 0])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    with torch.no_grad():
        found = model(ids[rows, 13:], past_key_values=cache).logits
        expected = model(ids[rows]).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_assigning_another_number_of_tokens_is_refused(make_model: Any, token_ids: Any) -> None:
    layer = filled(make_model(), token_ids(1, 13)).layers[0]
    with pytest.raises(ValueError, match=r"holds 7 tokens and cannot be assigned 6: use crop\(\)"):
        layer.keys = layer.keys[:, :, 1:]
    static = filled(make_model(), token_ids(1, 13), max_cache_len=24).layers[0]
    with pytest.raises(ValueError, match=r"fixed addresses and cannot be assigned"):
        static.keys = static.keys


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize(
    ("options", "kind", "other"),
    [({}, DynamicCache, StaticCache), ({"max_cache_len": 24}, StaticCache, DynamicCache)],
)
def test_tools_take_a_cache_for_one_of_the_library(
    options: Any, kind: type, other: type, copied: Any, make_model: Any, token_ids: Any
) -> None:
    cache = filled(make_model(), token_ids(1, 13), **options)
    for found in (cache, copied(cache)):
        assert isinstance(found, RollingCache)
        assert isinstance(found, kind)
        assert not isinstance(found, other)
        assert found.get_seq_length() == 13
        assert torch.equal(found.layers[1].keys, cache.layers[1].keys)


def test_what_tools_read_of_a_cache_is_there(make_model: Any, token_ids: Any) -> None:
    model = make_model()
    cache = filled(model, token_ids(2, 13))
    memory = 2 * 2 * (2 * 2 * WINDOW * 12 * 4)
    assert repr(cache) == f"DynamicRollingCache(2 layers, window 8, 13 tokens, {memory:,} bytes)"
    assert repr(cache.layers[0]) == f"RollingLayer(window 8, 13 tokens, {memory // 2:,} bytes)"
    assert cache.max_cache_len == cache.get_max_length() == WINDOW
    assert RollingCache(MistralConfig(num_hidden_layers=1, sliding_window=None)).max_cache_len == -1
    assert RollingCache(model.config, max_cache_len=5).max_cache_len == WINDOW
    assert repr(RollingCache(MistralConfig(num_hidden_layers=0))) == "DynamicRollingCache(0 layers)"


def test_static_attention_weights_have_the_length_that_was_asked_for(make_pair: Any, token_ids: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    options |= {"return_dict_in_generate": True, "output_attentions": True, "disable_compile": True}
    shapes = []
    for model in make_pair(implementation="eager", sliding_window=None):
        output = model.generate(token_ids(2, 4), **options)
        shapes.append([tuple(weights.shape) for step in output.attentions for weights in step])
    assert shapes[0] == shapes[1]
