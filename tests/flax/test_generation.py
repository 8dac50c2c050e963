"""`generate` of the JAX model: the PyTorch model's tokens, in one compiled loop over a rolling buffer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mistral_hf
from mistral_hf import BUNDLED_CHECKPOINT, MistralForCausalLM
from mistral_hf.flax import compiled as flax_compiled
from mistral_hf.flax import logits as flax_logits
from mistral_hf.generation_options import GenerationOptions
from tests.helpers import reference
from tests.helpers.flax_models import arrays, differences, jax, jnp, stacked, to_flax

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(eos_token_id=None, sliding_window=5)


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return to_flax(model)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    """The trained checkpoint in PyTorch and in JAX, in float32."""
    return (
        MistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval(),
        mistral_hf.FlaxMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=jnp.float32),
    )


def new_tokens(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    output = model.generate(**inputs, **options)
    sequences = output if torch.is_tensor(output) else output.sequences
    return np.asarray(sequences)[:, inputs["input_ids"].shape[1] :]


def test_trained_weights_give_the_logits_and_tokens_of_pytorch(bundled: tuple[Any, Any]) -> None:
    """Logits within 3e-4 of float64; 128 equal tokens, past the window of 128, from left-padded prompts."""
    ours, twin = bundled
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    prompts = ["Once upon a time", "It is a truth universally acknowledged, that a single man", "The President"]
    inputs = tokenizer(prompts, return_tensors="np", padding=True)
    options = {"max_new_tokens": 128, "do_sample": False}
    found = new_tokens(twin, inputs, **options)
    assert found.shape == (3, 128)
    assert np.array_equal(found, new_tokens(ours, {k: torch.tensor(v) for k, v in inputs.items()}, **options))

    text = tokenizer((BUNDLED_CHECKPOINT / "heldout.txt").read_text()[:3000])["input_ids"][:400]
    weights = {name: weight.double() for name, weight in ours.state_dict().items()}
    expected = reference.logits(weights, ours.config, torch.tensor([text]))
    assert differences(twin(np.array([text])).logits, expected) < 3e-4


@pytest.mark.parametrize("window", [1, 2, 5, None])
def test_greedy_tokens_match_the_oracle(make_model: Any, padded: Any, window: int | None) -> None:
    """From prompts longer than the window, one of them padded; the buffer wraps at least twice."""
    rope = {"rope_type": "default", "rope_theta": 50.0}
    model, inputs = make_model(sliding_window=window, rope_parameters=rope, eos_token_id=None), padded(9, 4)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    expected = reference.greedy(weights, model.config, inputs["input_ids"], 14, inputs["attention_mask"])[:, 9:]
    assert np.array_equal(new_tokens(to_flax(model), arrays(inputs), max_new_tokens=14, **GREEDY), expected)


def test_scanned_layers_generate_the_same_and_params_replace_the_weights(
    model: Any, twin: Any, make_model: Any, padded: Any
) -> None:
    inputs = arrays(padded(9, 4))
    expected = new_tokens(twin, inputs, max_new_tokens=14, **GREEDY)
    scanned = stacked(twin)
    assert np.array_equal(new_tokens(scanned, inputs, max_new_tokens=14, **GREEDY), expected)
    other = to_flax(make_model(seed=3, eos_token_id=None, sliding_window=5))
    changed = new_tokens(twin, inputs, params=other.params, max_new_tokens=14, **GREEDY)
    assert np.array_equal(changed, new_tokens(other, inputs, max_new_tokens=14, **GREEDY))
    assert not np.array_equal(changed, expected)


def test_every_row_ends_at_its_first_end_token(model: Any, twin: Any, padded: Any) -> None:
    """As in PyTorch: an ended row is padded, and generation stops when all rows have ended."""
    inputs = padded(9, 4, 7)
    free = new_tokens(twin, arrays(inputs), max_new_tokens=14, **GREEDY)
    ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 6])]
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    found = new_tokens(twin, arrays(inputs), **options)
    assert np.array_equal(found, new_tokens(model, inputs, **options))
    assert found.shape[1] < 14
    assert (found == 0).any()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 3.0, "eos_token_id": list(range(30))},
        {"num_beams": 3, "length_penalty": 0.2, "eos_token_id": list(range(10)), "early_stopping": True},
        {"num_beams": 2, "repetition_penalty": 1.5, "eos_token_id": [7, 31]},
        {"repetition_penalty": 1.7},
    ],
    ids=str,
)
def test_beam_search_and_repetition_penalty_match_pytorch(
    model: Any, twin: Any, padded: Any, options: dict[str, Any]
) -> None:
    inputs = padded(9, 9 if "repetition_penalty" in options else 4)  # PyTorch would penalize the padding token too
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    assert np.array_equal(new_tokens(twin, arrays(inputs), **options), new_tokens(model, inputs, **options))


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_prompt_read_in_chunks_gives_the_same_tokens(
    make_model: Any, padded: Any, window: int | None, chunk: int
) -> None:
    """Chunks shorter and longer than the window, that the prompt's padding fills, and one for the whole prompt."""
    model, inputs = make_model(eos_token_id=None, sliding_window=window), padded(21, 4)
    options = {"max_new_tokens": 9, "do_sample": False, "prefill_chunk_size": chunk}
    expected = new_tokens(model, inputs, max_new_tokens=9, **GREEDY)
    assert np.array_equal(new_tokens(to_flax(model), arrays(inputs), **options), expected)


def test_a_prompt_in_chunks_takes_the_memory_of_a_chunk(twin: Any) -> None:
    memory = {}
    for chunk in (None, 64):
        programs = flax_compiled.generation_programs(twin._graph, GenerationOptions(16, 0, prefill_chunk_size=chunk))
        ids = jnp.ones((1, 4096), jnp.int32)
        lowered = programs.prefill.lower(twin.params, ids, ids > 0, 5, jax.random.key(0))
        memory[chunk] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory[64] < memory[None] / 8


@pytest.mark.parametrize("options", [{}, {"length_penalty": 2.0, "eos_token_id": list(range(20))}], ids=str)
def test_the_best_beams_are_returned_in_the_order_of_pytorch(
    model: Any, twin: Any, padded: Any, options: dict[str, Any]
) -> None:
    inputs = padded(9, 4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": 4, **options}
    found = new_tokens(twin, arrays(inputs), num_return_sequences=3, **options)
    assert np.array_equal(found, new_tokens(model, inputs, num_return_sequences=3, **options))
    assert len(found) == 6


def test_several_samples_of_a_prompt_differ_and_follow_it(twin: Any, padded: Any) -> None:
    inputs = arrays(padded(9, 4))
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "num_return_sequences": 3}
    sequences = twin.generate(**inputs, **options).sequences
    assert np.array_equal(sequences[:, :9], np.repeat(inputs["input_ids"], 3, axis=0))
    assert len({tuple(row[9:]) for row in sequences}) == 6
    narrow = new_tokens(twin, inputs, **{**options, "top_k": 1, "repetition_penalty": 1.5})
    greedy = new_tokens(twin, inputs, max_new_tokens=6, repetition_penalty=1.5, **GREEDY)
    assert np.array_equal(narrow, np.repeat(greedy, 3, axis=0))


def test_sampling_follows_its_key(twin: Any, token_ids: Any) -> None:
    inputs = {"input_ids": token_ids(1, 5).numpy()}
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 2.0}
    first, again, other = (new_tokens(twin, inputs, **options, prng_key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    greedy = new_tokens(twin, inputs, max_new_tokens=10, **GREEDY)
    assert np.array_equal(new_tokens(twin, inputs, **{**options, "top_k": 1}), greedy)


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"top_k": 4}, [TopKLogitsWarper(4)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)],
        ),
    ],
    ids=["all", "temperature", "top_k", "top_p", "min_p", "together"],
)
def test_samples_have_the_distribution_of_transformers(options: dict[str, Any], warpers: list[Any]) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 1.5
    scores, count = logits, 40_000
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(dim=-1)[0].numpy()
    chosen = flax_logits.sample(
        jnp.tile(logits.numpy(), (count, 1)), jax.random.key(0), GenerationOptions(1, 0, do_sample=True, **options)
    )
    found = np.bincount(np.asarray(chosen), minlength=12) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=0.012)


def test_prompts_of_similar_lengths_share_a_program(twin: Any, token_ids: Any) -> None:
    options = GenerationOptions(16, 0)
    flax_compiled.generation_programs.cache_clear()
    programs = flax_compiled.generation_programs(twin._graph, options)
    for length, new in [(3, 5), (16, 16), (9, 2), (1, 1)]:
        inputs = {"input_ids": token_ids(1, length).numpy()}
        assert new_tokens(twin, inputs, max_new_tokens=new, **GREEDY).shape == (1, new)
    assert flax_compiled.generation_programs.cache_info().currsize == 1
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == (1, 1)
    new_tokens(twin, {"input_ids": token_ids(1, 17).numpy()}, max_new_tokens=5, **GREEDY)
    # The loop is the same: its buffer is as long as the window.
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == (2, 1)


def test_the_buffer_is_as_long_as_the_window_and_written_in_place(twin: Any) -> None:
    options = GenerationOptions(16, 0)
    programs = flax_compiled.generation_programs(twin._graph, options)
    ids = jnp.ones((2, 64), jnp.int32)
    state = jax.eval_shape(programs.prefill, twin.params, ids, ids > 0, 5, jax.random.key(0))
    assert {leaf.shape for leaf in (*state.cache.keys, *state.cache.values)} == {(2, 2, 5, 12)}
    text = programs.decode.lower(twin.params, state, 5).compile().as_text()
    header = text.splitlines()[0]
    assert header.count("may-alias") + header.count("must-alias") >= len(jax.tree.leaves(state.cache))


class Recorder:
    """A streamer that records what it receives."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.ended = False

    def put(self, value: Any) -> None:
        assert not self.ended
        self.pieces.append(np.atleast_2d(value).T if value.ndim == 1 else value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_receives_every_token(twin: Any, token_ids: Any) -> None:
    inputs, recorder = {"input_ids": token_ids(1, 5).numpy()}, Recorder()
    expected = new_tokens(twin, inputs, max_new_tokens=9, **GREEDY)
    output = twin.generate(**inputs, streamer=recorder, max_new_tokens=9, **GREEDY)
    assert recorder.ended
    assert [piece.shape for piece in recorder.pieces] == [(1, 5)] + [(1, 1)] * 9
    assert np.array_equal(np.concatenate(recorder.pieces, axis=1), output.sequences)
    assert np.array_equal(output.sequences[:, 5:], expected)


def test_options_come_from_call_config_and_checkpoint(
    twin: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"input_ids": token_ids(1, 5).numpy()}
    monkeypatch.setattr(twin, "generation_config", GenerationConfig(max_new_tokens=3))
    assert new_tokens(twin, inputs).shape == (1, 3)
    assert new_tokens(twin, inputs, generation_config=GenerationConfig(max_length=9)).shape == (1, 4)
    assert new_tokens(twin, inputs, max_new_tokens=2).shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": np.array([[1, 1, 0]])}, "padding on the left"),
        ({"num_beams": 2, "streamer": Recorder()}, "cannot be streamed"),
        ({"typical_p": 0.5}, "no option 'typical_p'"),
        ({"num_beams": 2, "do_sample": True}, "cannot be sampled"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_length": 3}, "max_length=3 leaves no token after a prompt of 3"),
        ({"input_ids": np.array([[1, 99]])}, r"\[0, 99\)"),
    ],
    ids=["mask", "streamer", "option", "beams", "no tokens", "no room", "ids"],
)
def test_bad_prompts_and_options_are_refused(twin: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        twin.generate(**{"input_ids": np.ones((1, 3), int), **options})
