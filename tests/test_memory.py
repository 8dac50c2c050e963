"""Memory of prefill and decoding, by counting the bytes of tensors; no test here measures time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_hf import MistralConfig, MistralForCausalLM, RollingCache

WINDOW = 64


class PeakStorage(TorchDispatchMode):
    """The most bytes held together by tensors that were made while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                storage = tensor.untyped_storage()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    """Two layers whose keys and values take more memory than anything else in a step."""
    config = MistralConfig(
        vocab_size=31, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, sliding_window=WINDOW, max_position_embeddings=100_000,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def peak_of_prompt(model: MistralForCausalLM, length: int, **options: Any) -> int:
    ids = torch.ones(1, length, dtype=torch.long)
    with PeakStorage() as memory:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, eos_token_id=None, **options)
    return memory.peak


def test_the_peak_counts_storages_that_are_alive_together() -> None:
    with PeakStorage() as memory:
        a = torch.zeros(100)
        b = a + 1
        a.view(10, 10).add_(b.view(10, 10))
        del a
        torch.zeros(50)
    assert memory.peak == 800


def test_a_prompt_in_chunks_takes_memory_for_its_ids_alone(model: MistralForCausalLM) -> None:
    """Per token of the prompt: a few copies of its id and of its mask, 8 bytes each, and no state of any layer."""
    short, long = (peak_of_prompt(model, length, prefill_chunk_size=WINDOW) for length in (1024, 8192))
    assert (long - short) / 7168 <= 10 * 8
    whole = [peak_of_prompt(model, length) for length in (1024, 8192)]
    assert (whole[1] - whole[0]) / 7168 > 4 * 32 * 4


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_step_copies_no_buffer(implementation: str, batch: int, model: MistralForCausalLM) -> None:
    """This holds before the window is full, at the wrap and after it."""
    model.set_attn_implementation(implementation)
    cache = RollingCache(model.config)
    ids = torch.ones(batch, WINDOW - 8, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        buffer = cache.layers[0].key_buffer.untyped_storage().nbytes()
        for _ in range(24):
            with PeakStorage() as memory:
                model(ids[:, :1], past_key_values=cache)
            assert memory.peak < buffer / 2
    assert cache.get_seq_length() == WINDOW + 16


def test_nothing_keeps_a_prompt_alive(model: MistralForCausalLM) -> None:
    """After a prompt of 64 windows, the cache holds one."""
    with torch.no_grad():
        cache = model(torch.ones(2, 64 * WINDOW, dtype=torch.long), use_cache=True).past_key_values
    held = sum(
        states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.key_buffer, layer.value_buffer)
    )
    assert held == 2 * 2 * (2 * 2 * WINDOW * 16 * 4)
