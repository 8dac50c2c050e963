"""Every old form in the migration table works, or is refused with the new one in the message."""

from pathlib import Path
from typing import Any

import flax
import numpy as np
import pytest
import transformers
from transformers import GenerationConfig

import mistral_hf
from mistral_hf import FlaxMistralForCausalLM
from mistral_hf.flax.migration import NEW_FORMS
from tests.flax.migration import ROWS, Row, markdown
from tests.helpers.flax_models import jax, jnp, to_flax


@pytest.fixture(scope="module")
def names(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the code of a row may use."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = to_flax(make_model(eos_token_id=None, num_hidden_layers=1))
    model.save_pretrained(folder)
    return {
        "FlaxMistralForCausalLM": FlaxMistralForCausalLM,
        "GenerationConfig": GenerationConfig,
        "config": model.config,
        "flax": flax,
        "folder": folder,
        "ids": jnp.array([[5, 6, 7], [8, 9, 10]]),
        "jax": jax,
        "jnp": jnp,
        "key": jax.random.key(0),
        "mask": jnp.array([[1, 1, 1], [0, 1, 1]]),
        "mistral_hf": mistral_hf,
        "model": model,
        "params": model.params,
        "target": folder.parent / "target",
        "transformers": transformers,
    }


def result_of(code: str, names: dict[str, Any]) -> list[Any]:
    """The arrays that an expression gives; of a model, its weights."""
    value = eval(code, dict(names))
    return jax.tree.leaves(value.params if isinstance(value, FlaxMistralForCausalLM) else value)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.old)
def test_an_old_form_works_or_names_the_new_one(row: Row, names: dict[str, Any]) -> None:
    if row.refused:
        with pytest.raises((ValueError, TypeError, AttributeError, KeyError, ImportError), match=row.refused):
            eval(row.old, dict(names))
        return
    found, expected = result_of(row.old, names), result_of(row.new or row.old, names)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=2e-5)


def test_the_new_forms_are_code_too(names: dict[str, Any]) -> None:
    for row in ROWS:
        if row.refused and "token" not in row.new and "push_to_hub" not in row.new:
            eval(row.new, dict(names))


def test_every_refusal_of_the_models_is_known() -> None:
    """Each has the new form; the table shows the ones that people typed."""
    assert all(new and not new.endswith((" ", "; ")) for forms in NEW_FORMS.values() for new in forms.values())
    table = markdown()
    assert table.count("\n") == len(ROWS) + 1
    assert "| refused |" in table


@pytest.mark.parametrize("name", sorted(name for forms in NEW_FORMS.values() for name in forms))
def test_an_old_option_is_refused_with_its_new_form(name: str, names: dict[str, Any], tmp_path: Path) -> None:
    model, folder = names["model"], names["folder"]
    calls = {
        "from_pretrained": lambda **options: type(model).from_pretrained(folder, **options),
        "save_pretrained": lambda **options: model.save_pretrained(tmp_path / "saved", **options),
        "a call": lambda **options: model(names["ids"], **options),
    }
    where = next(place for place, forms in NEW_FORMS.items() if name in forms)
    with pytest.raises(ValueError, match=rf"{where} has no option '{name}' any more\. In its place: \w"):
        calls[where](**{name: True})
    assert not (tmp_path / "saved").exists()


def test_weights_in_another_dtype_are_used_in_it(names: dict[str, Any], tmp_path: Path) -> None:
    model = FlaxMistralForCausalLM.from_pretrained(names["folder"])
    model.params = model.to_bf16(model.params)
    assert model(names["ids"]).logits.dtype == jnp.bfloat16
    assert model.generate(names["ids"], max_new_tokens=2).sequences.shape == (2, 5)
    model.save_pretrained(tmp_path / "half")
    assert FlaxMistralForCausalLM.from_pretrained(tmp_path / "half").dtype == jnp.bfloat16
    mask = jax.tree.map(lambda weight: weight.ndim > 1, model.params)
    cast = model.to_fp32(model.params, mask)
    assert cast["model"]["norm"]["weight"].dtype == jnp.bfloat16
    assert cast["lm_head"]["weight"].dtype == jnp.float32


def test_init_weights_keeps_what_is_given(names: dict[str, Any]) -> None:
    model, params = names["model"], names["params"]
    given = {"lm_head": {"weight": jnp.ones_like(params["lm_head"]["weight"])}}
    found = model.init_weights(jax.random.key(3), params=given)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert (found["lm_head"]["weight"] == 1).all()


def test_checkpointing_can_be_enabled_later(names: dict[str, Any]) -> None:
    model = FlaxMistralForCausalLM(names["config"])
    logits = model(names["ids"]).logits
    model.enable_gradient_checkpointing()
    assert "remat" in str(jax.make_jaxpr(lambda params: model(names["ids"], params=params).logits)(model.params))
    np.testing.assert_allclose(model(names["ids"]).logits, logits, atol=1e-6)
