"""Folders with damage, one case for each that has once been missed: one line that names file, field and value."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_hf.checkpoints.reader import CheckpointError, SafetensorsFile, open_checkpoint
from tests.helpers.hostile_folders import KINDS, convert, edit_header, edit_json, write_folders, write_header

Spoil = Callable[[Path], object]
LONG = "x" * 1_000_000
WQ = "layers.0.attention.wq.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_folders_convert(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert convert(folders[kind], tmp_path / "out") is None


def params(**fields: Any) -> Spoil:
    return lambda folder: edit_json(folder / "params.json", lambda content: content.update(fields))


def yarn(**fields: Any) -> Spoil:
    return lambda folder: edit_json(folder / "params.json", lambda content: content["yarn"].update(fields))


def config(**fields: Any) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", lambda content: content.update(fields))


def rope(**fields: Any) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", lambda content: content["rope_scaling"].update(fields))


def text(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content)


def replaced(name: str, old: str, new: str) -> Spoil:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


def entry(**fields: Any) -> Spoil:
    path = "consolidated.safetensors"
    return lambda folder: edit_header(folder / path, lambda header: header["norm.weight"].update(fields))


def index(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda folder: edit_json(folder / "consolidated.safetensors.index.json", change)


def pth(change: Callable[[dict[Any, Any]], object], name: str = "consolidated.00.pth") -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = torch.load(folder / name, weights_only=True)
        change(tensors)
        torch.save(tensors, folder / name)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def overlapping(folder: Path) -> None:
    """Let the norm of layer 1 share the values of that of layer 0; others take the place that becomes free."""

    def change(header: dict[str, Any]) -> None:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        first, second = [name for name in names if entries[name]["shape"] == entries[names[0]]["shape"]][:2]
        entries[second]["data_offsets"] = entries[first]["data_offsets"]

    edit_header(folder / "consolidated.safetensors", change)


def duplicate_tensor(folder: Path) -> None:
    path = folder / "consolidated.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    norm = json.dumps(json.loads(data[8:end])["norm.weight"])
    write_header(path, data[8:end].strip()[:-1] + f', "norm.weight": {norm}}}'.encode(), data[end:])


DEEP = "[" * 100_000 + "]" * 100_000

CASES: list[tuple[str, str, Spoil, str]] = [
    # JSON texts
    ("safetensors", "deep", text("params.json", DEEP), r"params\.json is not JSON \(.*recursion"),
    ("hf", "deep-config", text("config.json", f'{{"a": {DEEP}}}'), r"config\.json is not JSON \(.*recursion"),
    ("sharded", "deep-index", text("consolidated.safetensors.index.json", DEEP), "not an index of shards"),
    (
        "safetensors",
        "deep-header",
        lambda f: write_header(f / "consolidated.safetensors", DEEP.encode(), b""),
        "header",
    ),
    ("safetensors", "twice", replaced("params.json", '"dim"', '"dim": 64, "dim"'), r"params\.json.* key 'dim' repeats"),
    ("safetensors", "tensor-twice", duplicate_tensor, r"consolidated\.safetensors.* key 'norm.weight' repeats"),
    ("safetensors", "infinite", params(norm_eps=float("inf")), r"params\.json.* Infinity is not finite"),
    ("safetensors", "1e400", replaced("params.json", "1e-05", "1e400"), r"params\.json.* 1e400 is not finite"),
    ("safetensors", "bytes", lambda f: (f / "params.json").write_bytes(b'{"a": "\xff"}'), r"params\.json is not JSON"),
    # params.json
    ("safetensors", "eps", params(norm_eps=1e300), r"params\.json: norm_eps .*finite, got 1e\+300"),
    ("safetensors", "theta", params(rope_theta=1e300), r"params\.json: rope_theta .*finite, got 1e\+300"),
    ("safetensors", "theta-list", params(rope_theta=[1]), r"params\.json: rope_theta .* got \[1\]"),
    ("safetensors", "window-true", params(sliding_window=True), r"params\.json: sliding_window=True"),
    ("safetensors", "window-3.7", params(sliding_window=3.7), r"params\.json: sliding_window=3\.7"),
    ("safetensors", "window-object", params(sliding_window={}), r"params\.json: sliding_window=\{\}"),
    ("safetensors", "window-nested", params(sliding_window=[[1], [2]]), r"params\.json: sliding_window=\[\[1\]"),
    ("safetensors", "window-text", params(sliding_window="²"), r"params\.json: sliding_window='²'"),
    ("safetensors", "layers-1e6", params(n_layers=10**6), r"params\.json: n_layers .*below 10000, got 1000000"),
    ("safetensors", "layers-1e12", params(n_layers=10**12), r"params\.json: n_layers .*below 10000, got 1000000000000"),
    ("safetensors", "dim-text", params(dim="64", head_dim=None), r"params\.json: dim .* got '64'"),
    ("safetensors", "tied", params(tied_embeddings="no"), r"params\.json: tied_embeddings .* got 'no'"),
    ("safetensors", "long-value", params(dim=LONG), r"params\.json: dim .* got 'xxx"),
    ("safetensors", "long-field", params(**{LONG: 1}), r"params\.json has fields .* has: xxx"),
    ("safetensors", "long-kind", params(activation=LONG), r"params\.json has activation='xxx"),
    ("safetensors", "yarn-text", params(yarn="much"), r"params\.json: yarn must be an object, got 'much'"),
    ("safetensors", "yarn-list", params(yarn=[4]), r"params\.json: yarn must be an object, got \[4\]"),
    ("safetensors", "yarn-negative", yarn(factor=-4), r"params\.json: yarn\.factor .* got -4"),
    ("safetensors", "yarn-nan", replaced("params.json", '"factor": 16', '"factor": NaN'), r"params\.json.* NaN"),
    ("safetensors", "yarn-null", yarn(beta=None), r"params\.json: yarn .*lacks \[beta\]"),
    ("safetensors", "yarn-list-factor", yarn(factor=[4]), r"params\.json: yarn\.factor .* got \[4\]"),
    ("safetensors", "yarn-zero", yarn(original_max_position_embeddings=0), r"yarn\.original_max_position_.* got 0"),
    ("safetensors", "yarn-scale", yarn(apply_scale="yes"), r"params\.json: yarn\.apply_scale .* got 'yes'"),
    ("safetensors", "yarn-theta", params(rope_theta=1), r"params\.json: rope_theta .*more than 1 with yarn, got 1"),
    ("safetensors", "scaling", params(llama_4_scaling=[1]), r"params\.json: llama_4_scaling .*object, got \[1\]"),
    # config.json
    ("hf", "layers", config(num_hidden_layers=10**12), r"config\.json: num_hidden_layers .* got 1000000000000"),
    ("hf", "rope-text", config(rope_scaling="yarn"), r"config\.json: rope_scaling must be an object, got 'yarn'"),
    ("hf", "rope-list", config(rope_parameters=[1]), r"config\.json: rope_parameters must be an object, got \[1\]"),
    ("hf", "rope-negative", rope(factor=-1.0), r"config\.json: rope_scaling\.factor .* got -1\.0"),
    ("hf", "rope-null", rope(factor=None), r"config\.json: rope_scaling\.factor must be .* got None"),
    ("hf", "mscale-list", rope(mscale=[1]), r"config\.json: rope_scaling\.mscale must be a finite number, got \[1\]"),
    ("hf", "type-list", config(model_type=["mistral"]), r"config\.json has model_type=\['mistral'\]"),
    ("hf", "layers-number", config(layer_types=7), r"config\.json: layer_types must give .* got 7"),
    ("hf", "layers-few", config(layer_types=[]), r"config\.json: layer_types must give .* got \[\]"),
    ("hf", "layers-kind", config(layer_types=["x", {}]), r"config\.json: layer_types must give .* got \['x', \{\}\]"),
    (
        "hf",
        "layers-window",
        config(layer_types=["sliding_attention"] * 2, sliding_window=None),
        r"config\.json: sliding_window must be a positive whole number, got None",
    ),
    ("hf", "rope-beta", rope(beta_fast="32"), r"config\.json: rope_scaling\.beta_fast .* got '32'"),
    ("hf", "window-true", config(sliding_window=True), r"config\.json: sliding_window=True"),
    ("hf", "eps-infinite", config(rms_norm_eps=float("inf")), r"config\.json.* Infinity is not finite"),
    ("hf", "eps-huge", config(rms_norm_eps=1e300), r"config\.json: rms_norm_eps .* got 1e\+300"),
    ("hf", "long-type", config(model_type=LONG), r"config\.json has model_type='xxx"),
    # safetensors headers
    ("safetensors", "float-shape", entry(shape=[64.0]), r"consolidated\.safetensors.* norm\.weight .*64\.0"),
    ("safetensors", "true-shape", entry(shape=[True, 64]), r"consolidated\.safetensors.* norm\.weight .*True"),
    ("safetensors", "float-offset", entry(data_offsets=[0.5, 128.5]), r"safetensors.* norm\.weight .*0\.5"),
    ("safetensors", "text-dtype", entry(dtype=["BF16"]), r"consolidated\.safetensors.* norm\.weight .*BF16"),
    ("safetensors", "many-axes", entry(shape=[1] * 1_000_000 + [64]), r"safetensors.* norm\.weight .*\[1, 1, 1"),
    (
        "safetensors",
        "metadata",
        lambda f: edit_header(f / "consolidated.safetensors", lambda h: h.update(__metadata__={"format": None})),
        r"consolidated\.safetensors has a malformed .*__metadata__",
    ),
    ("safetensors", "overlap", overlapping, r"consolidated\.safetensors .* begin at byte \d+, but .* end at \d+"),
    (
        "safetensors",
        "long-name",
        lambda f: edit_header(f / "consolidated.safetensors", lambda h: h.update({LONG: h.pop("norm.weight")})),
        "holds 1 unexpected tensors, xxx",
    ),
    (
        "safetensors",
        "unprintable-name",
        lambda f: edit_header(f / "consolidated.safetensors", lambda h: h.update({"\ud800\x1b[2J": h.pop(WQ)})),
        r"unexpected tensors, \\ud800\\x1b\[2J",
    ),
    ("safetensors", "pipe", pipe("consolidated.safetensors"), r"consolidated\.safetensors is not a regular file"),
    ("pth", "pipe", pipe("consolidated.00.pth"), r"consolidated\.00\.pth is not a regular file"),
    ("hf", "pipe-config", pipe("config.json"), r"config\.json is not a regular file"),
    ("hf-sharded", "pipe-index", pipe("model.safetensors.index.json"), r"index\.json is not a regular file"),
    # indices
    ("sharded", "number", index(lambda i: i["weight_map"].update({WQ: 5})), r"index\.json .*weight_map"),
    ("sharded", "list", index(lambda i: i.update(weight_map=[["a", "b"]])), r"index\.json .*weight_map"),
    ("sharded", "empty-name", index(lambda i: i["weight_map"].update({WQ: ""})), "is not a regular file"),
    ("sharded", "parent", index(lambda i: i["weight_map"].update({WQ: ".."})), "is not a regular file"),
    ("sharded", "long", index(lambda i: i["weight_map"].update({WQ: f"../{LONG}"})), "points outside its folder"),
    # pickles
    ("pth", "meta", pth(lambda t: t.update({WQ: t[WQ].to("meta")})), rf"consolidated\.00\.pth .* {WQ} is none, or"),
    ("pth", "sparse", pth(lambda t: t.update({WQ: t[WQ].float().to_sparse()})), rf"consolidated\.00\.pth .* {WQ} is"),
    ("pth", "expanded", pth(lambda t: t.update({WQ: torch.zeros(1).expand(64, 64)})), rf"00\.pth .* {WQ} is none, or"),
    ("pth", "complex", pth(lambda t: t.update({WQ: t[WQ].to(torch.complex64)})), "is complex64, which safetensors"),
    ("pth", "fp8uz", pth(lambda t: t.update({WQ: t[WQ].to(torch.float8_e4m3fnuz)})), "is float8_e4m3fnuz, which"),
    ("pth", "number-key", pth(lambda t: t.update({0: t[WQ]})), r"consolidated\.00\.pth is not a dictionary of tensors"),
    ("pth", "number", pth(lambda t: t.update({WQ: 5})), r"consolidated\.00\.pth is not a dictionary of tensors"),
    (
        "pth",
        "quantized",
        pth(lambda t: t.update({WQ: torch.quantize_per_tensor(t[WQ].float(), 0.1, 0, torch.qint8)})),
        r"consolidated\.00\.pth",
    ),
    (
        "pth-2",
        "dtypes",
        pth(lambda t: t.update({name: tensor.float() for name, tensor in t.items()}), "consolidated.01.pth"),
        r"is float32 in .*01\.pth, but bfloat16 in .*00\.pth: save all ranks in one dtype",
    ),
    (
        "pth-2",
        "rotary-dtype",
        pth(lambda t: t.update({WQ: t[WQ].float()}), "consolidated.01.pth"),
        rf"{WQ} is float32 in .*01\.pth, but bfloat16",
    ),
    ("pth-2", "axes", pth(lambda t: t.update({WQ: t[WQ][0]}), "consolidated.01.pth"), f"{WQ}: the shapes .* add up"),
    ("pth-2", "scalar", pth(lambda t: t.update({WQ: t[WQ][0, 0]}), "consolidated.01.pth"), f"{WQ}: the shapes"),
    # adapters
    ("lora", "scaling", params(lora={"scaling": "big"}), r"params\.json: lora\.scaling .* got 'big'"),
    ("lora", "scaling-huge", params(lora={"scaling": 1e308}), r"params\.json: lora\.scaling .* got 1e\+308"),
    ("lora", "rank", params(lora={"scaling": 1, "rank": [4]}), r"params\.json: lora\.rank .* got \[4\]"),
    ("lora", "dropout", params(lora={"scaling": 1, "dropout": 2}), r"params\.json: lora\.dropout .* got 2"),
    ("lora", "lora-list", params(lora=[1]), r"params\.json: lora must be an object, got \[1\]"),
    (
        "lora",
        "other-layer",
        lambda f: edit_header(
            f / "lora.safetensors",
            lambda h: h.update({"layers.99.attention.wq.lora_A.weight": h.pop("layers.0.attention.wq.lora_A.weight")}),
        ),
        r"holds layers\.99\.attention\.wq\.lora_A\.weight, which adapts no tensor",
    ),
    (
        "peft",
        "alpha",
        lambda f: edit_json(f / "adapter_config.json", lambda c: c.update(lora_alpha=None)),
        r"adapter_config\.json: lora_alpha .* got None",
    ),
    (
        "peft",
        "bias",
        lambda f: edit_json(f / "adapter_config.json", lambda c: c.update(bias=LONG)),
        r"adapter_config\.json has bias='xxx",
    ),
]


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [pytest.param(kind, spoil, message, id=f"{kind}-{name}") for kind, name, spoil, message in CASES],
)
def test_damage_is_refused_on_one_line_by_file_field_and_value(
    kind: str,
    spoil: Spoil,
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    source = shutil.copytree(folders[kind], tmp_path / "in")
    spoil(source)
    line = convert(source, tmp_path / "out")
    assert line is not None, "it was converted"
    assert line.endswith("."), line
    assert re.search(message, line), line


def test_a_flipped_bit_of_a_pickle_is_refused_or_harmless(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["pth"], tmp_path / "in")
    path = source / "consolidated.00.pth"
    data = path.read_bytes()
    for position in range(0, 1200, 8):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        if convert(source, tmp_path / "out") is None:
            shutil.rmtree(tmp_path / "out")


def test_shards_are_closed_if_a_later_one_is_damaged(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    close = SafetensorsFile.close
    monkeypatch.setattr(SafetensorsFile, "close", lambda file: (closed.append(file.path.name), close(file)))
    source = shutil.copytree(folders["sharded"], tmp_path / "in")
    (source / "consolidated-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        open_checkpoint(source, "consolidated")
    assert closed == ["consolidated-00001-of-00002.safetensors"]
