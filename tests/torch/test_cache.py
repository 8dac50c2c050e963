"""The rolling buffer against a list model: contents, the library's contract, memory, autograd."""

import copy
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache

from mistral_hf import MistralConfig, RollingCache
from mistral_hf.torch.attention import visible
from mistral_hf.torch.rolling_layer import MAX_SLACK, RollingLayer
from mistral_hf.torch.sequence_layout import KeyLayout
from mistral_hf.torch.static_layer import StaticRollingLayer

ROW = 10_000  # the value of a token is ROW * the name of its row + its position


def states(rows: list[int], start: int, count: int) -> Tensor:
    """Keys ``[B, 1, N, 2]`` that carry their row and position; the second component is negated."""
    values = torch.tensor(rows)[:, None] * ROW + torch.arange(start, start + count)
    return torch.stack([values, -values], dim=-1)[:, None].float()


class ListModel:
    """The contents that a layer must have: the names of its rows, and the number of tokens so far."""

    def __init__(self, layer: RollingLayer | StaticRollingLayer, window: int | None, rows: list[int]) -> None:
        self.layer, self.window, self.rows, self.length = layer, window, rows, 0

    def update(self, count: int) -> None:
        layer, start = self.layer, self.length
        total, key_start = layer.get_mask_sizes(count)
        layout = KeyLayout(start, key_start, total, layer.ring_slots(count))
        new = states(self.rows, start, count)
        keys, values = layer.update(new, new + 0.5)
        self.length += count
        assert keys.shape == values.shape == (len(self.rows), 1, total, 2)
        assert int(layer.get_seq_length()) == self.length
        indices = layout.indices(count, torch.device("cpu"))
        for query in range(start, start + count):
            mask = visible(torch.tensor(query), indices, self.window)
            expected = range(self.first_visible(query), query + 1)
            assert sorted(indices[mask].tolist()) == list(expected)
            for row, name in enumerate(self.rows):
                assert keys[row, 0, mask, 0].tolist() == [name * ROW + index for index in indices[mask].tolist()]
                assert values[row, 0, mask, 1].tolist() == [0.5 - name * ROW - i for i in indices[mask].tolist()]
        self.check_buffer()

    def first_visible(self, position: int) -> int:
        return 0 if self.window is None else max(0, position - self.window + 1)

    def check_buffer(self) -> None:
        """Every token that is visible to the next query lies in its slot."""
        slots = self.layer.key_buffer.shape[2]
        for position in range(self.first_visible(self.length), self.length):
            assert self.layer.key_buffer[:, 0, position % slots, 0].tolist() == [n * ROW + position for n in self.rows]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 40)),
        st.tuples(st.just("decode"), st.integers(1, 5)),
        st.tuples(st.just("reorder"), st.integers(0, 10**6)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 10**6)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("record"), st.booleans()),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(window=st.one_of(st.none(), st.integers(1, 16)), operations=operations)
def test_any_sequence_of_operations_keeps_what_queries_see(window: int | None, operations: list[Any]) -> None:
    model = ListModel(RollingLayer(window), window, [1, 2])
    for name, argument in operations:
        layer, batch = model.layer, len(model.rows)
        generator = torch.Generator().manual_seed(int(argument))
        if name == "update":
            model.update(argument)
        elif name == "decode":
            for _ in range(argument):
                model.update(1)
        elif name == "reorder" and model.length:
            order = torch.randint(batch, (batch,), generator=generator)
            layer.reorder_cache(order)
            model.rows = [model.rows[i] for i in order]
        elif name == "repeat" and model.length and batch < 8:
            layer.batch_repeat_interleave(argument)
            model.rows = [row for row in model.rows for _ in range(argument)]
        elif name == "select" and model.length:
            chosen = torch.randperm(batch, generator=generator)[: max(1, batch // 2)]
            layer.batch_select_indices(chosen)
            model.rows = [model.rows[i] for i in chosen]
        elif name == "crop":
            crop(model, argument)
        elif name == "record":
            layer.record_past = argument
        elif name == "reset":
            layer.reset()
            model.length = 0
        if (
            layer.key_buffer is not None
            and window is not None
            and not layer.record_past
            and name in ("update", "decode")
        ):
            assert layer.slots <= window


def crop(model: ListModel, count: int) -> None:
    """Crop the layer if it can; if it cannot, it must raise an error and stay unchanged."""
    layer = model.layer
    remaining = model.length - count
    if remaining < 0 or layer.oldest > model.first_visible(remaining):
        with pytest.raises(ValueError, match=rf"crop\({-count}\)"):
            layer.crop(-count)
    else:
        layer.crop(-count)
        model.length = remaining
    assert layer.get_seq_length() == model.length
    if model.length:
        model.check_buffer()


def test_slots_match_the_worked_example() -> None:
    """W=4, a prompt of six tokens and one step: the numbers of the docstring, slot by slot."""
    layer = RollingLayer(4)
    layer.update(states([0], 0, 6), states([0], 0, 6))
    assert layer.key_buffer[0, 0, :, 0].tolist() == [4, 5, 2, 3]
    layer.update(states([0], 6, 1), states([0], 6, 1))
    assert layer.key_buffer[0, 0, :, 0].tolist() == [4, 5, 6, 3]


@pytest.mark.parametrize("window", [1, 4, 16, None])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 11])
def test_a_static_layer_shows_queries_the_same_keys(window: int | None, chunk: int) -> None:
    model = ListModel(StaticRollingLayer(40, window), window, [1, 2])
    for count in (chunk, 1, 1, chunk, 1, 1, 1):
        model.update(count)
    address = model.layer.key_buffer.data_ptr()
    model.layer.reset()
    model.length = 0
    model.update(chunk)
    assert model.layer.key_buffer.data_ptr() == address


def test_a_static_layer_refuses_overflows_and_crops() -> None:
    layer = StaticRollingLayer(8, None)
    with pytest.raises(ValueError, match=r"9 tokens do not fit a static cache of 8"):
        layer.update(states([0], 0, 9), states([0], 0, 9))
    layer.crop(0)
    for count in (-1, 1):
        with pytest.raises(ValueError, match=rf"crop\({count}\) is not possible with 0 tokens stored"):
            layer.crop(count)
    wrapping = StaticRollingLayer(8, 4)
    wrapping.update(states([0], 0, 5), states([0], 0, 5))
    assert not wrapping.is_croppable
    with pytest.raises(ValueError, match="overwritten at its window of 4"):
        wrapping.crop(-1)
    with pytest.raises(ValueError, match="max_cache_len=0"):
        RollingCache(MistralConfig(num_hidden_layers=1), max_cache_len=0)


@pytest.mark.parametrize("window", [None, 12, 16])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_static_layer_continues_after_a_crop_as_if_the_tokens_had_never_been_added(
    window: int | None, count: int
) -> None:
    model = ListModel(StaticRollingLayer(32, window, shown=12), window, [1, 2])
    assert model.layer.is_croppable
    model.update(8)
    model.layer.crop(-count)
    model.length -= count
    for new in (1, 3, 1):
        model.update(new)


def test_reordering_a_static_layer_keeps_its_address() -> None:
    layer = StaticRollingLayer(8, 4)
    layer.update(states([1, 2], 0, 3), states([1, 2], 0, 3))
    address = layer.key_buffer.data_ptr()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.key_buffer[:, 0, 2, 0].tolist() == [2 * ROW + 2] * 2
    assert layer.key_buffer.data_ptr() == address


@pytest.mark.parametrize("count", [1, 5, MAX_SLACK])
def test_recording_makes_a_crop_possible(count: int) -> None:
    """The tokens since the last crop can be removed, and decoding continues as if they had never been added."""
    model = ListModel(RollingLayer(16), 16, [1])
    model.layer.activate_past_recording()
    model.update(50)
    model.layer.crop(0)
    model.update(count)
    crop(model, count)
    assert model.length == 50
    for _ in range(20):
        model.update(1)


def test_a_crop_past_the_slack_raises_and_the_buffer_shrinks_again() -> None:
    layer = RollingLayer(16)
    layer.activate_past_recording()
    layer.update(states([0], 0, 3 * MAX_SLACK), states([0], 0, 3 * MAX_SLACK))
    with pytest.raises(ValueError, match=rf"at most {MAX_SLACK}"):
        layer.crop(-MAX_SLACK - 1)
    assert layer.slots < 2 * MAX_SLACK
    layer.record_past = False
    layer.update(states([0], 3 * MAX_SLACK, 1), states([0], 3 * MAX_SLACK, 1))
    assert layer.slots == 16


def test_growth_is_by_doubling_and_ends_at_the_window() -> None:
    layer = RollingLayer(300)
    sizes, addresses = [], set()
    for position in range(700):
        layer.update(states([0], position, 1), states([0], position, 1))
        if layer.slots not in sizes:
            sizes.append(layer.slots)
        if layer.slots == 300:
            addresses.add((layer.key_buffer.data_ptr(), layer.value_buffer.data_ptr()))
    assert sizes == [64, 128, 256, 300]
    assert len(addresses) == 1


def test_without_a_window_a_step_copies_only_when_the_buffer_doubles() -> None:
    layer = RollingLayer(None)
    addresses = []
    for position in range(1000):
        layer.update(states([0], position, 1), states([0], position, 1))
        addresses.append(layer.key_buffer.data_ptr())
    changes = sum(before != after for before, after in pairwise(addresses))
    assert changes == 4  # 64, 128, 256, 512, 1024
    assert layer.get_max_length() == -1


@pytest.mark.parametrize("make", [lambda: RollingLayer(8), lambda: StaticRollingLayer(64, 8)])
def test_after_a_prefill_nothing_keeps_the_prompt(make: Callable[[], Any]) -> None:
    layer = make()
    keys = torch.randn(2, 3, 3000, 4)
    reference, expected = weakref.ref(keys), keys[:, :, -1].clone()
    layer.update(keys, torch.randn(2, 3, 3000, 4))
    del keys
    assert reference() is None
    assert layer.key_buffer.untyped_storage().nbytes() == 2 * 3 * 8 * 4 * 4
    assert torch.equal(layer.key_buffer[:, :, 2999 % 8], expected)


def test_decoding_copies_no_buffer() -> None:
    """Past the window, a step writes only the bytes of one token's keys and values."""
    layer = RollingLayer(64)
    layer.update(states([0, 1], 0, 100), states([0, 1], 0, 100))
    token = states([0, 1], 100, 1)
    with ByteCounter() as counter:
        layer.update(token, token)
    assert counter.written == 2 * token.nbytes


class ByteCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all results that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(item.alias_info is not None for item in function._schema.returns)
        in_place = function._schema.name.endswith("_")
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and (in_place or not is_view):
                self.written += tensor.nbytes
        return result


def test_another_batch_is_refused_until_reset() -> None:
    layer = RollingLayer(8)
    layer.update(states([0, 1], 0, 3), states([0, 1], 0, 3))
    with pytest.raises(ValueError, match=r"holds 2 sequences, but the input has 3"):
        layer.update(states([0, 1, 2], 3, 1), states([0, 1, 2], 3, 1))
    layer.reset()
    layer.update(states([0, 1, 2], 0, 1), states([0, 1, 2], 0, 1))
    assert layer.key_buffer.shape[0] == 3


def test_gradients_flow_through_the_cache() -> None:
    """Writes in place leave the tensors that autograd saved intact: several chunks and steps, against one call."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 1, 12, 4, dtype=torch.float64, requires_grad=True)
    layer, results = RollingLayer(5), []
    for chunk in inputs.split([4, 3, 1, 1, 3], dim=2):
        keys, values = layer.update(chunk, chunk * 2)
        results.append((keys.square().sum() * values.sum()) if chunk.shape[2] > 1 else (keys * values).sum())
    (gradient,) = torch.autograd.grad(sum(results), inputs)
    expected, start = [], 0
    leaf = inputs.detach().clone().requires_grad_()
    for count in (4, 3, 1, 1, 3):
        keys = leaf[:, :, max(0, start - 4) : start + count]
        expected.append((keys.square().sum() * (2 * keys).sum()) if count > 1 else (2 * keys * keys).sum())
        start += count
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(expected), leaf)[0])


def test_a_buffer_of_inference_mode_can_be_continued_outside() -> None:
    layer = RollingLayer(4)
    with torch.inference_mode():
        layer.update(states([0], 0, 6), states([0], 0, 6))
    layer.update(states([0], 6, 1), states([0], 6, 1))
    assert layer.key_buffer[0, 0, :, 0].tolist() == [4, 5, 6, 3]


def test_gathered_replicas_make_one_cache() -> None:
    """As DataParallel does: zip the caches, concatenate along the batch, call the type with the result."""
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    replicas = []
    for rows in ([1, 2], [3]):
        cache = RollingCache(config)
        for layer in range(2):
            cache.update(states(rows, 0, 10), states(rows, 0, 10) + 0.5, layer)
        replicas.append(cache)
    gathered = RollingCache(
        [tuple(map(torch.cat, zip(*layers, strict=True))) for layers in zip(*replicas, strict=True)]
    )
    assert isinstance(gathered, Cache)
    assert gathered.get_seq_length() == 10
    model = ListModel(gathered.layers[1], 4, [1, 2, 3])
    model.length = 10
    for _ in range(6):
        model.update(1)


def test_early_initialization_and_offloading_keep_a_cache_usable() -> None:
    cache = RollingCache(MistralConfig(num_hidden_layers=2, sliding_window=4))
    cache.early_initialization(2, 1, 2, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert not cache.is_compileable
    assert RollingCache(MistralConfig(num_hidden_layers=2), max_cache_len=8).is_compileable
    model = ListModel(cache.layers[0], 4, [1, 2])
    model.update(6)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    model.update(1)
    assert cache.get_max_length() == 4
    assert cache.is_sliding == [True, True]


def test_a_copy_is_independent() -> None:
    layer = RollingLayer(4)
    layer.update(states([0], 0, 6), states([0], 0, 6))
    fork = copy.deepcopy(layer)
    fork.update(states([7], 6, 1), states([7], 6, 1))
    assert layer.key_buffer[0, 0, :, 0].tolist() == [4, 5, 2, 3]
    assert fork.key_buffer[0, 0, :, 0].tolist() == [4, 5, 7 * ROW + 6, 3]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("static", [False, True])
def test_autocast_keeps_keys_in_half_precision(
    static: bool, implementation: str, make_model: Any, token_ids: Any
) -> None:
    """Of a float32 model, so that a step casts its own token only; the logits are those without a cache."""
    model, ids = make_model(implementation=implementation), token_ids(2, 12)
    cache = RollingCache(model.config, max_cache_len=32 if static else None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, use_cache=False).logits
        pieces = [
            model(ids[:, span], past_key_values=cache).logits for span in (slice(10), slice(10, 11), slice(11, 12))
        ]
    assert {layer.key_buffer.dtype for layer in cache.layers} == {torch.bfloat16}
    assert {layer.value_buffer.dtype for layer in cache.layers} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0.1, atol=0.1)
