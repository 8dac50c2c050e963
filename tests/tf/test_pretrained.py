"""The TensorFlow port reads and writes the checkpoints of PyTorch; it needs no PyTorch, and is imported on use."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral
from transformers.utils import logging

import mistral_hf
from mistral_hf import BUNDLED_CHECKPOINT
from mistral_hf.checkpoints.reader import CheckpointError
from tests.helpers.processes import run_python
from tests.helpers.tf_models import arrays, keras, tf, tf_pretrained, to_tf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def state(model: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("inv_freq")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_pytorch_reads_the_same_bits_after_a_round_trip(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tied: bool
) -> None:
    """Sharded in, sharded out, for our model and the library's; the configuration and the defaults are kept."""
    monkeypatch.setattr(tf_pretrained, "_ROWS", 20)
    model = make_model(tie_word_embeddings=tied, sliding_window=5).to(DTYPES[dtype])
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "torch", max_shard_size="10KB")
    assert (tmp_path / "torch/model.safetensors.index.json").exists()
    ported = mistral_hf.TFMistralForCausalLM.from_pretrained(tmp_path / "torch", dtype="auto")
    assert ported.variable_dtype == ported.compute_dtype == dtype
    assert ported.generation_config.repetition_penalty == 1.5
    ported.save_pretrained(tmp_path / "tf", max_shard_size="20KB")
    ported.save_pretrained(tmp_path / "one")
    assert (tmp_path / "tf/model.safetensors.index.json").exists()
    for folder in ("tf", "one"):
        for model_class in (mistral_hf.MistralForCausalLM, StockMistral):
            again = model_class.from_pretrained(tmp_path / folder)
            assert again.dtype == DTYPES[dtype]
            assert again.generation_config.repetition_penalty == 1.5
            assert again.config.sliding_window == 5
            assert state(again).keys() == state(model).keys()
            assert all(torch.equal(tensor, state(model)[name]) for name, tensor in state(again).items())
    written = load_file(tmp_path / "one/model.safetensors")
    assert ("lm_head.weight" in written) is not tied
    assert json.loads((tmp_path / "one/config.json").read_text())["architectures"] == ["MistralForCausalLM"]


def test_the_dtype_is_the_global_policy_unless_another_is_given(checkpoint: Path) -> None:
    """Fields of the configuration can be changed too."""
    load = mistral_hf.TFMistralForCausalLM.from_pretrained
    exact = load(checkpoint)
    assert (exact.variable_dtype, exact.compute_dtype) == ("float32", "float32")
    mixed = load(checkpoint, dtype="mixed_bfloat16", sliding_window=None)
    assert (mixed.variable_dtype, mixed.compute_dtype) == ("float32", "bfloat16")
    assert mixed.config.sliding_window is None
    assert load(checkpoint, dtype=tf.float16).variable_dtype == "float16"
    assert load(checkpoint, dtype=keras.DTypePolicy("bfloat16")).variable_dtype == "bfloat16"
    config = json.loads((checkpoint / "config.json").read_text())
    load(checkpoint, dtype="bfloat16").save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**config, "dtype": None}))
    assert load(checkpoint, dtype="auto").variable_dtype == "bfloat16"
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        assert load(checkpoint).variable_dtype == "bfloat16"
    finally:
        keras.config.set_dtype_policy(previous)


@torch.no_grad()
def test_a_checkpoint_of_another_head_loads_with_a_warning(
    checkpoint: Path, token_ids: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing head is newly initialised, an unexpected one is named; the decoder is the same."""
    ids = token_ids(2, 9)
    classifier, info = mistral_hf.TFMistralForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, output_loading_info=True
    )
    assert info == {"missing_keys": ["score.weight"], "unexpected_keys": ["lm_head.weight"]}
    assert "score.weight" in caplog.text
    assert "lm_head.weight" in caplog.text
    assert 0.1 < np.std(classifier.score.weight) < 0.3
    bare = mistral_hf.TFMistralModel.from_pretrained(checkpoint)
    expected = mistral_hf.MistralModel.from_pretrained(checkpoint)(ids).last_hidden_state
    np.testing.assert_allclose(bare(ids.numpy()).last_hidden_state, expected, atol=1e-4)
    bare.save_pretrained(tmp_path / "bare")
    classifier.save_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(mistral_hf.MistralModel.from_pretrained(tmp_path / "bare")(ids)[0], expected)
    theirs = mistral_hf.MistralForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert theirs.config.num_labels == 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    np.testing.assert_allclose(classifier(arrays(inputs)).logits, theirs(**inputs).logits, atol=1e-4)


def test_folders_whose_weights_and_configuration_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    load = mistral_hf.TFMistralForCausalLM.from_pretrained
    with pytest.raises(CheckpointError, match=r"lacks 9 weights .* model\.layers\.2\.input_layernorm"):
        load(checkpoint, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"has shape \(48, 32\), but the configuration says \(64, 32\)"):
        load(checkpoint, intermediate_size=64)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no model\.safetensors"):
        load(tmp_path / "empty")
    (checkpoint / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"has weights but no config\.json"):
        load(checkpoint)


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    with pytest.raises(CheckpointError, match=r"holds a model of model_type='mixtral', not 'mistral'.*AutoModel"):
        mistral_hf.TFMistralForCausalLM.from_pretrained(checkpoint)
    del config["model_type"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    mistral_hf.TFMistralForCausalLM.from_pretrained(checkpoint)


def test_loading_shows_a_bar_unless_the_library_hides_its_bars(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistral_hf.TFMistralForCausalLM.from_pretrained(checkpoint)
    assert "Loading weights: 100%" in capsys.readouterr().err
    logging.disable_progress_bar()
    try:
        mistral_hf.TFMistralForCausalLM.from_pretrained(checkpoint)
    finally:
        logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_token_classifier_is_read_and_written(make_model: Any, token_ids: Any, tmp_path: Path, tied: bool) -> None:
    """With its bias; from a language model, it is newly initialised."""
    model, ids = make_model("ForTokenClassification", num_labels=3, tie_word_embeddings=tied), token_ids(2, 9)
    model.save_pretrained(tmp_path / "torch")
    ported = mistral_hf.TFMistralForTokenClassification.from_pretrained(tmp_path / "torch")
    np.testing.assert_allclose(ported(ids.numpy()).logits, model(ids).logits, atol=1e-4)
    ported.save_pretrained(tmp_path / "tf")
    again = mistral_hf.MistralForTokenClassification.from_pretrained(tmp_path / "tf")
    assert all(torch.equal(tensor, state(model)[name]) for name, tensor in state(again).items())
    make_model().save_pretrained(tmp_path / "lm")
    _, info = mistral_hf.TFMistralForTokenClassification.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert info == {"missing_keys": ["score.weight", "score.bias"], "unexpected_keys": ["lm_head.weight"]}


@pytest.mark.parametrize("unknown", ["torch_dtype", "device_map"])
def test_unknown_arguments_are_refused(checkpoint: Path, unknown: str) -> None:
    with pytest.raises(ValueError, match=rf"no argument '{unknown}', .* it takes dtype"):
        mistral_hf.TFMistralForCausalLM.from_pretrained(checkpoint, **{unknown: "auto"})


def test_saving_replaces_nothing_but_a_checkpoint(make_model: Any, checkpoint: Path, tmp_path: Path) -> None:
    ported = to_tf(make_model(seed=1))
    (checkpoint / "tokenizer.json").write_text("{}")
    ported.save_pretrained(checkpoint, max_shard_size="10KB")
    ported.save_pretrained(checkpoint)
    again = mistral_hf.TFMistralForCausalLM.from_pretrained(checkpoint)
    np.testing.assert_array_equal(again.lm_head.weight, ported.lm_head.weight)
    assert (checkpoint / "tokenizer.json").read_text() == "{}"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("Dear")
    with pytest.raises(FileExistsError):
        ported.save_pretrained(tmp_path / "letters")
    with pytest.raises(TypeError, match="no argument 'safe_serialization' unless push_to_hub is True"):
        ported.save_pretrained(checkpoint, safe_serialization=False)


def test_push_to_hub_uploads_the_folder_under_its_name_or_the_given_one(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ported = to_tf(make_model())
    calls = []
    monkeypatch.setattr(type(ported), "push_to_hub", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    ported.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    ported.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    assert calls == [(("mine",), {"private": True}), (("me/other",), {})]


def test_the_import_is_lazy_and_an_error_names_the_extra() -> None:
    code = """
import mistral_hf
print(sorted({"tensorflow", "keras", "h5py"} & sys.modules.keys()))
for name in mistral_hf._HOMES["modeling_tf_mistral"]:
    try:
        getattr(mistral_hf, name)
    except ImportError as error:
        print(error)
"""
    first, *errors = run_python(code, ("torch", "tensorflow")).splitlines()
    assert first == "[]"
    assert len(errors) == 4
    expected = "mistral_hf.TFMistralModel needs tensorflow, which is not installed: pip install 'mistral_hf[tf]'"
    assert errors[3].startswith(expected)


def test_another_backend_of_keras_is_refused() -> None:
    code = """
import mistral_hf
try:
    mistral_hf.TFMistralModel
except ImportError as error:
    print(error)
"""
    found = run_python(code, ("torch",), KERAS_BACKEND="numpy")
    assert "its backend is 'numpy'. Set the environment variable KERAS_BACKEND=tensorflow before" in found


def test_generation_works_without_torch() -> None:
    code = f"""
import mistral_hf
model = mistral_hf.TFMistralForCausalLM.from_pretrained({str(BUNDLED_CHECKPOINT)!r})
print(*model.generate([[5, 6, 7]], do_sample=False, max_new_tokens=5, jit_compile=False)[0].numpy())
assert "torch" not in sys.modules
"""
    model = mistral_hf.MistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32)
    expected = model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=5)
    assert run_python(code, ("torch",)).split() == [str(token) for token in expected[0].tolist()]


def test_windows_that_differ_by_layer_are_refused(make_model: Any) -> None:
    config = make_model(layer_types=["full_attention", "sliding_attention"]).config
    with pytest.raises(ValueError, match=r"layer_types=\['full.* differ.*use the PyTorch models"):
        mistral_hf.TFMistralModel(config)
    config.layer_types[1] = "full_attention"
    assert mistral_hf.TFMistralModel(config).window is None
