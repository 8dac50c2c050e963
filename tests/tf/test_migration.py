"""Code for the last TensorFlow classes of Transformers runs, or an error names the new row."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BatchEncoding

import mistral_hf
from mistral_hf.tf.migration import NEW_FORMS
from tests.helpers.tf_models import keras, tf, to_tf
from tests.tf.migration import ROWS, Row, markdown

datasets = pytest.importorskip("datasets")


@pytest.fixture
def names(make_model: Any, token_ids: Any, tmp_path: Path) -> dict[str, Any]:
    """What the expressions of `ROWS` use."""
    model = make_model(eos_token_id=None, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "checkpoint")
    ids = token_ids(2, 5).int().numpy()
    mask, labels = np.ones_like(ids), np.where(ids % 3, ids, -100)
    ported = to_tf(model)
    return {
        "mistral_hf": mistral_hf,
        "tf": tf,
        "keras": keras,
        "model": ported,
        "config": model.config,
        "folder": str(tmp_path / "checkpoint"),
        "target": str(tmp_path / "target"),
        "ids": ids,
        "mask": mask,
        "labels": labels,
        "prompts": tf.constant(ids),
        "symbols": [keras.Input((5,), dtype="int32"), keras.Input((5,), dtype="int32")],
        "tokens": BatchEncoding({"input_ids": ids, "attention_mask": mask}),
        "dataset": datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), "text": ["", ""]}),
    }


@pytest.fixture
def fast() -> Iterator[None]:
    """What `generate` compiles by default is run as it is."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.old[:60])
def test_an_old_form_gives_what_the_new_one_does_or_names_it(row: Row, names: dict[str, Any], request: Any) -> None:
    if "model.generate(" in row.old:
        request.getfixturevalue("fast")
    if row.refused:
        with pytest.raises(Exception, match=f"(?s){row.refused}"):
            eval(row.old, dict(names))
        eval(row.new or row.old, dict(names))
        return
    old, new = eval(row.old, dict(names)), eval(row.new or row.old, dict(names))
    assert row.equal or type(old) is type(new)
    if row.equal and new is not None:
        tf.nest.map_structure(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), old, new)


def test_new_embeddings_keep_the_old_rows_train_and_are_saved(names: dict[str, Any], tmp_path: Path) -> None:
    """The output layer too; what was compiled for the old ones is compiled again."""
    ported, ids = names["model"], names["ids"]
    before = {name: variable.numpy() for name, variable in ported.named_weights().items()}
    options = {"do_sample": False, "max_new_tokens": 3, "jit_compile": False}
    generated = ported.generate(ids, **options).numpy()
    ported.resize_token_embeddings(120)
    assert ported(input_ids=[[110]]).logits.shape == (1, 1, 120)
    assert len(ported.trainable_weights) == len(ported.named_weights()) == len(before)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = ported.named_weights()[name].numpy()
        np.testing.assert_array_equal(weight[:99], before[name])
        assert 0.1 < weight[99:].std() < 0.3
    ported.lm_head.weight.assign(np.pad(before["lm_head.weight"], [(0, 21), (0, 0)]))
    np.testing.assert_array_equal(ported.generate(ids, **options), generated)
    ported.compile("sgd")
    ported.fit({"input_ids": ids, "labels": ids}, verbose=0)
    ported.save_pretrained(tmp_path / "larger")
    assert mistral_hf.MistralForCausalLM.from_pretrained(tmp_path / "larger").lm_head.out_features == 120
    ported.resize_token_embeddings(50)
    assert ported(ids % 50).logits.shape == (2, 5, 50)
    with pytest.raises(ValueError, match="new_num_tokens=0 must be at least 1"):
        ported.resize_token_embeddings(0)


def test_tied_embeddings_are_resized_once(make_model: Any) -> None:
    ported = to_tf(make_model(tie_word_embeddings=True))
    assert ported.resize_token_embeddings(120) is ported.get_output_embeddings()
    assert ported(input_ids=[[110]]).logits.shape == (1, 1, 120)
    bare = to_tf(make_model("Model"))
    assert bare.get_output_embeddings() is None
    assert bare.resize_token_embeddings() is bare.embed_tokens


def test_the_saved_model_serves(names: dict[str, Any], tmp_path: Path) -> None:
    ported, ids, mask = names["model"], names["ids"], names["mask"]
    ported.save_pretrained(tmp_path / "both", saved_model=True)
    assert {"model.safetensors", "saved_model"} <= set(os.listdir(tmp_path / "both"))
    saved = tf.saved_model.load(str(tmp_path / "both/saved_model/1"))
    found = saved.serve({"input_ids": tf.constant(ids), "attention_mask": tf.constant(mask)})
    np.testing.assert_allclose(found["logits"], ported(ids).logits, atol=2e-5)


def test_batches_of_a_data_set_are_padded_by_the_tokenizer(names: dict[str, Any], tokenizer: Any) -> None:
    """Columns that the model does not take are left out; the last batch is kept unless rows are shuffled."""
    rows = [[5, 6, 7], [8, 9], [10]]
    data = datasets.Dataset.from_dict({"input_ids": rows, "label": [0, 1, 1], "text": ["a", "b", "c"]})
    batches = list(names["model"].prepare_tf_dataset(data, 2, shuffle=False, tokenizer=tokenizer))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 3), (1, 1)]
    assert batches[0]["labels"].numpy().tolist() == [0, 1]
    assert batches[0].keys() == {"input_ids", "attention_mask", "labels"}
    assert len(list(names["model"].prepare_tf_dataset(data, 2, tokenizer=tokenizer))) == 1
    with pytest.raises(TypeError, match=r"is a list, but must be a datasets\.Dataset"):
        names["model"].prepare_tf_dataset(rows)


def test_a_list_of_too_many_inputs_is_refused(names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="holds 7 inputs, but the model takes at most 6 in the order input_ids"):
        names["model"]([names["ids"]] * 7)
    with pytest.raises(ValueError, match="has no head, so no loss"):
        mistral_hf.TFMistralModel(names["config"]).hf_compute_loss([1], tf.zeros([1, 2]))


@pytest.mark.parametrize("name", sorted(name for forms in NEW_FORMS.values() for name in forms))
def test_an_old_option_is_refused_with_its_new_form(name: str, names: dict[str, Any], tmp_path: Path) -> None:
    calls = {
        "from_pretrained": lambda **options: mistral_hf.TFMistralModel.from_pretrained(names["folder"], **options),
        "save_pretrained": lambda **options: names["model"].save_pretrained(tmp_path / "saved", **options),
        "generate": lambda **options: names["model"].generate(names["ids"], **options),
    }
    where = next(place for place, forms in NEW_FORMS.items() if name in forms)
    with pytest.raises(ValueError, match=rf"{where} has no option '{name}' any more\. In its place: \w"):
        calls[where](**{name: True})
    assert not (tmp_path / "saved").exists()


def test_the_table_has_a_line_for_every_row() -> None:
    assert markdown().count("\n") == len(ROWS) + 1
