"""Prompt lookup in JAX: the tokens of plain generation, in fewer steps where the text repeats itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mistral_hf.flax import compiled as flax_compiled
from mistral_hf.flax.prompt_lookup import LookupState, PromptLookup
from mistral_hf.generation_options import GenerationOptions
from tests.helpers.flax_models import jax, jnp, stacked, to_flax

LOOKUP = {"prompt_lookup_num_tokens": 4}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(eos_token_id=None, sliding_window=5)


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return to_flax(model)


def both(twin: Any, ids: Any, mask: Any = None, **options: Any) -> tuple[Any, Any]:
    """The sequences with and without lookup."""
    options = {"max_new_tokens": 20, **options}
    return tuple(twin.generate(ids, mask, **options, **more).sequences for more in (LOOKUP, {}))


@pytest.mark.parametrize("window", [1, 5, None])
def test_greedy_tokens_are_those_of_plain_generation_and_of_pytorch(
    make_model: Any, token_ids: Any, window: int | None
) -> None:
    """While the buffer wraps, and guesses that were wrong are taken back."""
    model = make_model(eos_token_id=None, sliding_window=window)
    ids = token_ids(1, 9)
    found, plain = both(to_flax(model), ids.numpy(), do_sample=False)
    expected = model.generate(ids, do_sample=False, max_new_tokens=20, attention_mask=torch.ones_like(ids))
    assert np.array_equal(found, plain)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.3},
        {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.7},
        {"max_matching_ngram_size": 1, "max_new_tokens": 17},
        {"max_matching_ngram_size": 3, "prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_sampling_penalties_and_limits_give_the_tokens_of_plain_generation(
    twin: Any, token_ids: Any, options: dict[str, Any]
) -> None:
    ids = token_ids(1, 9).numpy()
    found, plain = both(twin, ids, **{"do_sample": False, "prng_key": jax.random.key(4), **options})
    assert np.array_equal(found, plain)


def test_padding_and_scanned_layers_and_end_tokens(twin: Any, token_ids: Any) -> None:
    """The text ends at the first end token, even if what follows was guessed too."""
    ids, mask = token_ids(1, 9).numpy(), np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    plain = both(twin, ids, mask, do_sample=False)[1]
    for index in (9, 12, 20):
        end = int(plain[0, index])
        for model in (twin, stacked(twin)):
            found, expected = both(model, ids, mask, do_sample=False, eos_token_id=end)
            assert np.array_equal(found, expected)


def test_a_repeating_text_takes_fewer_steps(twin: Any) -> None:
    """Where the model continues a text as the text itself goes on, a step yields C + 1 tokens."""
    options = GenerationOptions(16, 0, **LOOKUP)
    strategy = PromptLookup(options)
    text = jnp.array([[9, 1, 2, 3, 4, 5, 6, 1, 2, *[0] * 20]])
    cache = twin.init_cache(1, 30)
    zero = jnp.zeros((), jnp.int32)
    state = LookupState(zero, zero + 16, text, zero, zero > 0, cache, jax.random.key(0), None)
    tokens, _ = strategy.inputs(state)
    assert tokens.tolist() == [[2, 3, 4, 5, 6]]
    logits = jax.nn.one_hot(jnp.array([[3, 4, 9, 6, 7]]), 99)  # the third guess, 5, is wrong
    after = strategy.choose_next(state, logits, cache.advance(jnp.ones((1, 5), bool)))
    assert int(after.step) == 3
    assert after.text[0, 9:12].tolist() == [3, 4, 9]
    assert int(after.cache.length) == 3
    assert int(after.cache.real.sum()) == 3


def test_the_tokens_of_a_step_are_streamed_one_by_one(twin: Any, token_ids: Any) -> None:
    pieces: list[Any] = []
    streamer = type("Streamer", (), {"put": lambda _, piece: pieces.append(piece), "end": lambda _: None})()
    ids = np.tile(token_ids(1, 3).numpy(), 3)
    output = twin.generate(ids, streamer=streamer, max_new_tokens=20, do_sample=False, **LOOKUP)
    assert [piece.shape for piece in pieces] == [(1, 9)] + [(1,)] * 20
    assert np.array_equal(np.concatenate([np.atleast_2d(piece) for piece in pieces], axis=1), output.sequences)


def test_a_batch_is_refused(twin: Any, token_ids: Any) -> None:
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=4 takes one prompt, not 2"):
        twin.generate(token_ids(2, 5).numpy(), **LOOKUP)


def test_lookup_needs_a_buffer_longer_than_the_window(twin: Any) -> None:
    programs = flax_compiled.generation_programs(twin._graph, GenerationOptions(16, 0, **LOOKUP))
    ids = jnp.ones((1, 64), jnp.int32)
    state = jax.eval_shape(programs.prefill, twin.params, ids, ids > 0, 5, jax.random.key(0))
    assert {leaf.shape for leaf in state.cache.keys} == {(1, 2, 5 + 4 + 1, 12)}
