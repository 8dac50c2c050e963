"""Saving and loading of caches: generation continues as without a break; foreign and damaged files are refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mistral_hf import MistralConfig, RollingCache
from mistral_hf.torch import cache_file

WINDOW = 8


def filled(make_model: Callable[..., Any], ids: torch.Tensor, max_cache_len: int | None, **fields: Any) -> Any:
    """A model, and its cache after the given ids."""
    model = make_model(**fields)
    cache = RollingCache(model.config, max_cache_len)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return model, cache


def logits(model: Any, cache: RollingCache, ids: torch.Tensor) -> torch.Tensor:
    """Of the ids one by one, then of all of them again."""
    with torch.no_grad():
        steps = [model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)]
        return torch.cat([*steps, model(ids, past_key_values=cache).logits], dim=1)


@pytest.mark.parametrize("max_cache_len", [None, 64])
@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, 3 * WINDOW + 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_loaded_cache_continues_as_the_saved_one(
    make_model: Callable[..., Any],
    token_ids: Callable[..., torch.Tensor],
    tmp_path: Path,
    max_cache_len: int | None,
    window: int | None,
    length: int,
    batch: int,
) -> None:
    model, cache = filled(make_model, token_ids(batch, length), max_cache_len, sliding_window=window)
    cache.save_file(tmp_path / "cache", {"note": "kept"})
    loaded = RollingCache.load_file(tmp_path / "cache", model.config, max_cache_len=max_cache_len)
    assert (type(loaded), int(loaded.get_seq_length())) == (type(cache), length)
    for layer, saved in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, saved.keys)
        assert torch.equal(layer.values, saved.values)
    with safe_open(tmp_path / "cache", "pt") as content:
        assert content.metadata()["note"] == "kept"
    more = token_ids(batch, 2 * WINDOW, seed=2)
    assert torch.equal(logits(model, loaded, more), logits(model, cache, more))


@pytest.mark.parametrize(("saved", "loaded"), [(None, 64), (64, None)])
def test_a_growing_cache_and_a_preallocated_one_share_files(
    make_model: Callable[..., Any],
    token_ids: Callable[..., torch.Tensor],
    tmp_path: Path,
    saved: int | None,
    loaded: int | None,
) -> None:
    model, cache = filled(make_model, token_ids(1, 21), saved)
    cache.save_file(tmp_path / "cache")
    other = RollingCache.load_file(tmp_path / "cache", model.config, max_cache_len=loaded)
    more = token_ids(1, 2 * WINDOW, seed=2)
    torch.testing.assert_close(logits(model, other, more), logits(model, cache, more))


def test_a_loaded_cache_can_be_cropped_as_far_as_the_saved_one(
    make_model: Callable[..., Any], token_ids: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    """The buffer holds one token more than the next query sees; without it, a chat would have to be read again."""
    model, cache = filled(make_model, token_ids(1, 21), None)
    cache.save_file(tmp_path / "cache")
    loaded = RollingCache.load_file(tmp_path / "cache", model.config)
    for each in (cache, loaded):
        each.crop(-1)
        with pytest.raises(ValueError, match="no longer holds"):
            each.crop(-2)
    more = token_ids(1, 5, seed=2)
    assert torch.equal(logits(model, loaded, more), logits(model, cache, more))


def test_an_empty_cache_and_a_replaced_file(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, cache = filled(make_model, torch.ones(1, 3, dtype=torch.long), None)
    cache.save_file(tmp_path / "cache")
    RollingCache(model.config).save_file(tmp_path / "cache")
    assert RollingCache.load_file(tmp_path / "cache", model.config).get_seq_length() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 9}, "sliding_window=8, but this one has 9"),
        ({"sliding_window": None}, "sliding_window=8, but this one has None"),
        ({"num_hidden_layers": 3}, "layers=2, but this one has 3"),
        ({"num_key_value_heads": 1}, "needs .batch, 1,"),
        ({"head_dim": 16}, "this model needs .*, 16."),
    ],
)
def test_a_cache_of_another_window_or_shape_is_refused(
    make_model: Callable[..., Any],
    tiny: Callable[..., dict[str, Any]],
    tmp_path: Path,
    fields: dict[str, Any],
    message: str,
) -> None:
    _, cache = filled(make_model, torch.ones(1, 20, dtype=torch.long), None)
    cache.save_file(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        RollingCache.load_file(tmp_path / "cache", MistralConfig(**tiny(**fields)))


def test_damaged_and_foreign_files_are_refused(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, cache = filled(make_model, torch.ones(1, 20, dtype=torch.long), None)
    file, whole = tmp_path / "cache", tmp_path / "whole"
    cache.save_file(whole)
    content = whole.read_bytes()
    tensors = load_file(whole)
    with safe_open(whole, "pt") as opened:
        counts = json.loads(opened.metadata()["rolling_cache"])

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RollingCache.load_file(file, model.config)

    for damaged in (b"", content[:5], content[:-1], content[:200], b"\xff" * 100, pickle.dumps({"a": 1})):
        file.write_bytes(damaged)
        refused("no complete safetensors file")
    for text in (
        None,
        "",
        "[]",
        "{}",
        '{"length": "3"}',
        '{"length": -1, "layers": 2, "sliding_window": 8}',
        "[" * 100_000,
    ):
        save_file(tensors, file, metadata=None if text is None else {"rolling_cache": text})
        refused("was not written by")
    for length, message in ((7, "at most 7"), (2**31, "was not written by")):
        save_file(tensors, file, metadata={"rolling_cache": json.dumps({**counts, "length": length})})
        refused(message)
    metadata = {"rolling_cache": json.dumps(counts)}
    save_file({**tensors, "more": torch.ones(1)}, file, metadata=metadata)
    refused("lacks tensors of the cache, or has others")
    save_file({name: tensors[name] for name in list(tensors)[1:]}, file, metadata=metadata)
    refused("lacks tensors of the cache, or has others")
    for changed in (torch.ones(1), tensors["layers.1.keys"][:, :, :3].clone(), tensors["layers.1.keys"].double()):
        save_file({**tensors, "layers.1.keys": changed}, file, metadata=metadata)
        refused("load it with the model that filled it")
    with pytest.raises(FileNotFoundError):
        RollingCache.load_file(tmp_path / "nothing", model.config)


def test_a_failed_save_leaves_the_old_file(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = filled(make_model, torch.ones(1, 20, dtype=torch.long), None)
    cache.save_file(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()

    def fail(tensors: Any, file: str, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_file, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.save_file(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache").read_bytes() == before
    with pytest.raises(OSError, match="nowhere"):
        cache.save_file(tmp_path / "nowhere" / "cache")
