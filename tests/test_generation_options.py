"""The options of `generate` that both ports share."""

from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from mistral_hf.generation_options import GenerationOptions, generation_options


@pytest.mark.parametrize("end", [7, np.int64(7), np.array(7), [7], np.array([7]), (np.int32(7),)], ids=repr)
def test_ids_of_tokens_may_be_numpy_scalars(end: Any) -> None:
    """As `tokenizer.eos_token_id` computed with, or a row of an array."""
    options = generation_options(None, 3, None, eos_token_id=end, pad_token_id=np.int64(2))
    assert options == GenerationOptions(20, 2, eos_token_ids=(7,))
    assert {type(token) for token in (*options.eos_token_ids, options.pad_token_id)} == {int}


def test_numbers_of_numpy_are_options_like_those_of_python() -> None:
    """They are keys of compiled programs."""
    given = {"temperature": np.float64(0.5), "do_sample": np.bool_(True), "top_k": np.int64(4)}
    assert generation_options(None, 3, None, **given) == GenerationOptions(
        20, 0, do_sample=True, temperature=0.5, top_k=4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
        ({"num_return_sequences": 3}, r"num_return_sequences=3 needs as many beams \(num_beams=1\), or do_sample=True"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 needs as many beams"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0 must be at least 1, or None"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens=-1 must be at least 1"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "prompt_lookup_num_tokens=3 needs num_beams=1"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size=0 must be at least 1"),
    ],
    ids=str,
)
def test_impossible_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation_options(None, 3, None, **options)


def test_an_option_that_a_port_lacks_is_refused_wherever_it_is_set() -> None:
    assert generation_options(None, 3, None, prefill_chunk_size=4).prefill_chunk_size == 4
    with pytest.raises(ValueError, match="no option 'prefill_chunk_size'"):
        generation_options(None, 3, None, ("prefill_chunk_size",), prefill_chunk_size=4)
    with pytest.raises(ValueError, match="config sets prefill_chunk_size=4"):
        generation_options(None, 3, GenerationConfig(prefill_chunk_size=4), ("prefill_chunk_size",))
