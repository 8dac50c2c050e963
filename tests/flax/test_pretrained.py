"""Checkpoints go from PyTorch to JAX and back without a changed bit."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral
from transformers.utils import hub
from transformers.utils import logging as library_logging

from mistral_hf import (
    BUNDLED_CHECKPOINT,
    FlaxMistralForCausalLM,
    FlaxMistralModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
)
from mistral_hf.checkpoints.reader import CheckpointError
from tests.helpers.flax_models import array, jax, jnp, leaves, to_flax


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tied", "shard"),
    [("float32", False, "50GB"), ("bfloat16", True, "8KB"), ("float16", False, "8KB")],
)
def test_a_round_trip_from_pytorch_changes_no_bit(
    make_model: Any, tmp_path: Path, dtype: str, tied: bool, shard: str, scan_layers: bool
) -> None:
    """To JAX and back to our PyTorch classes and the library's, in one file and in shards."""
    model = make_model(tie_word_embeddings=tied).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "torch", max_shard_size=shard)
    twin = FlaxMistralForCausalLM.from_pretrained(tmp_path / "torch", scan_layers=scan_layers)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(twin.params)} == {dtype}
    assert ("lm_head" in twin.params) != tied
    twin.save_pretrained(tmp_path / "jax", max_shard_size=shard)
    assert (tmp_path / "jax" / "model.safetensors").exists() == (shard == "50GB")
    for kind in (MistralForCausalLM, StockMistral):
        loaded = kind.from_pretrained(tmp_path / "jax")
        assert loaded.config.to_diff_dict() | {"transformers_version": 0} == model.config.to_diff_dict() | {
            "transformers_version": 0
        }
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_cast_matches_pytorch(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "torch")
    twin = FlaxMistralForCausalLM.from_pretrained(tmp_path / "torch", dtype=jnp.bfloat16)
    for name, weight in model.to(torch.bfloat16).state_dict().items():
        assert np.array_equal(leaves(twin.params)[name].astype(np.float32), array(weight)), name
    assert twin.dtype == jnp.bfloat16
    twin.save_pretrained(tmp_path / "jax")
    assert json.loads((tmp_path / "jax" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_decoder_and_the_language_model_exchange_weights(
    make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing head is initialised and an extra one left out, each with a warning that names it."""
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "decoder")
    with caplog.at_level(logging.WARNING):
        decoder = FlaxMistralModel.from_pretrained(tmp_path / "whole")
        assert "has lm_head.weight" in caplog.text
        caplog.clear()
        whole = FlaxMistralForCausalLM.from_pretrained(tmp_path / "decoder")
        assert "lacks lm_head.weight" in caplog.text
    embeddings = array(model.model.embed_tokens.weight)
    assert np.array_equal(decoder.params["embed_tokens"]["weight"], embeddings)
    assert np.array_equal(whole.params["model"]["embed_tokens"]["weight"], embeddings)
    assert 0.15 < float(jnp.std(whole.params["lm_head"]["weight"])) < 0.25
    ids = np.arange(1, 8)[None]
    states = decoder(ids).last_hidden_state
    np.testing.assert_allclose(states, array(model.model(torch.tensor(ids)).last_hidden_state), atol=1e-5)
    decoder.save_pretrained(tmp_path / "again")
    assert (load_file(tmp_path / "again" / "model.safetensors")).keys() == model.model.state_dict().keys()
    assert isinstance(MistralModel.from_pretrained(tmp_path / "again"), MistralModel)


def test_a_checkpoint_that_does_not_fit_is_refused(make_model: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"lacks 9 weights.*layers\.2"):
        FlaxMistralForCausalLM.from_pretrained(tmp_path / "two", num_hidden_layers=3)
    with pytest.raises(ValueError, match="no option 'colour'"):
        FlaxMistralForCausalLM.from_pretrained(tmp_path / "two", colour="red")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FlaxMistralForCausalLM.from_pretrained("./nowhere")


def test_configuration_and_generation_config_are_read(tmp_path: Path) -> None:
    model = FlaxMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, sliding_window=None)
    assert model.config.sliding_window is None
    assert model.dtype == jnp.bfloat16
    assert model.generation_config.top_p == 0.9
    model.save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "copy")
    copy = FlaxMistralForCausalLM.from_pretrained(tmp_path / "copy")
    assert copy.config.sliding_window is None
    assert copy.generation_config.top_p == 0.9
    assert (tmp_path / "copy" / "tokenizer.json").exists()


def test_random_weights_follow_the_seed(tiny: Any, make_model: Callable[..., Any]) -> None:
    config = make_model().config
    first, again, other = (FlaxMistralForCausalLM(config, seed=seed).params for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
    first, other = (params["model"]["layers"]["1"] for params in (first, other))
    assert not np.array_equal(first["mlp"]["up_proj"]["weight"], other["mlp"]["up_proj"]["weight"])
    assert 0.17 < float(jnp.std(first["mlp"]["up_proj"]["weight"])) < 0.23
    assert (first["input_layernorm"]["weight"] == 1).all()
    stacked = FlaxMistralForCausalLM(config, scan_layers=True).params["model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert stacked.shape == (2, 48, 32)
    assert not np.array_equal(stacked[0], stacked[1])


def test_push_to_hub_uploads_what_is_saved_and_a_model_card(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, list[str]] = {}

    class Api:
        def create_repo(self, name: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": name})()

    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})()
    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: card)
    monkeypatch.setattr(
        FlaxMistralForCausalLM,
        "_upload_modified_files",
        lambda self, folder, name, **options: uploaded.update({name: sorted(p.name for p in Path(folder).iterdir())}),
    )
    to_flax(make_model()).push_to_hub("someone/tiny")
    assert uploaded == {"someone/tiny": ["README.md", "config.json", "generation_config.json", "model.safetensors"]}


def test_loading_shows_a_bar_that_the_library_can_disable(
    make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model().save_pretrained(tmp_path)
    library_logging.enable_progress_bar()
    FlaxMistralForCausalLM.from_pretrained(tmp_path)
    assert "Loading weights" in capsys.readouterr().err
    library_logging.disable_progress_bar()
    try:
        FlaxMistralForCausalLM.from_pretrained(tmp_path)
    finally:
        library_logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("model_type", ["ministral", "ministral3", "mixtral"])
def test_a_checkpoint_of_another_architecture_is_refused(model_type: str, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(CheckpointError, match=rf"holds a model of model_type='{model_type}', not 'mistral'.*AutoModel"):
        FlaxMistralForCausalLM.from_pretrained(checkpoint)


def test_layers_of_one_kind_are_computed_and_windows_that_differ_are_refused(tiny: Callable[..., Any]) -> None:
    kinds = ["full_attention", "full_attention"]
    model = MistralForCausalLM(MistralConfig(**tiny(layer_types=kinds))).eval()
    ids = np.arange(1, 21)[None]
    expected = model(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(np.asarray(to_flax(model)(ids).logits), expected, rtol=1e-4, atol=1e-4)
    kinds[1] = "sliding_attention"
    with pytest.raises(ValueError, match=r"layer_types=\['full.* differ.*use the PyTorch models"):
        FlaxMistralModel(MistralConfig(**tiny(layer_types=kinds)))
