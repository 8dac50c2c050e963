"""Models on several devices: offloaded, tensor-parallel, fully sharded. Two processes run on the CPU (gloo)."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from mistral_hf import MistralForCausalLM, RollingCache, modeling_mistral
from tests.helpers.comparison import TIGHT
from tests.helpers.versions import at_least

ROOT = Path(__file__).parents[1]
GATHERS_EVERY_CALL = at_least("torch", "2.13")  # FSDP2 gathers a head for each of its calls
CHUNKS = (None, 5) if GATHERS_EVERY_CALL else (None,)
accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")

# Both processes run this: a checkpoint with tensor parallelism, then sharded by FSDP2, against the whole model.
WORKER = '''
import json, os, sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import mistral_hf

torch.set_num_threads(1)
folder, rank, world = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
load = AutoModelForCausalLM.from_pretrained
ids = torch.randint(1, 99, (4, 21), generator=torch.Generator().manual_seed(0))
whole, found = load(folder), {}


def curve(model, rows, reduce):
    """Losses of three optimiser steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.02), []
    for _ in range(3):
        loss = model(ids[rows], labels=ids[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if reduce:
            dist.all_reduce(loss)
            loss = loss / world
        losses.append(loss.item())
    return losses


split = load(folder, distributed_config=DistributedConfig(tp_size=world))
found["split k_proj"] = list(split.model.layers[0].self_attn.k_proj.weight.to_local().shape)
with torch.no_grad():
    output, expected = split(ids), whole(ids)
found["logits"] = (output.logits - expected.logits).abs().max().item()
found["cache"] = type(output.past_key_values).__name__, list(output.past_key_values.layers[0].key_buffer.shape)
for name, options in {
    "greedy": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static in chunks": {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True},
    "beams": {"num_beams": 3},
}.items():
    texts = [m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, **options)
             for m in (split, whole)]
    found[name] = torch.equal(*texts)
for chunk in (None, 5):
    loss = split(ids, labels=ids, loss_chunk_size=chunk).loss
    loss.backward()
    weight = split.model.layers[0].mlp.down_proj.weight
    whole.zero_grad()
    expected = whole(ids, labels=ids).loss
    expected.backward()
    found[f"split loss, chunk {chunk}"] = abs(loss.item() - expected.item())
    difference = weight.grad.full_tensor() - whole.model.layers[0].mlp.down_proj.weight.grad
    found[f"split gradient, chunk {chunk}"] = difference.abs().max().item()
    split.zero_grad()
try:
    load(folder, num_key_value_heads=1, distributed_config=DistributedConfig(tp_size=world))
except ValueError as error:
    found["one head for two"] = str(error)

rows = slice(rank * 2, rank * 2 + 2)
found["curve"] = curve(load(folder).train(), slice(0, 4), reduce=False)
for chunk in json.loads(sys.argv[2]):
    sharded = load(folder, loss_chunk_size=chunk, distributed_config=DistributedConfig(fsdp_size=world)).train()
    found["sharded k_proj"] = list(sharded.model.layers[0].self_attn.k_proj.weight.to_local().shape)
    found[f"sharded curve, chunk {chunk}"] = curve(sharded, rows, reduce=True)
with open(os.path.join(folder, f"found{rank}.json"), "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
'''


@pytest.fixture(scope="module")
def found(make_model: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """The results of the two processes."""
    folder = tmp_path_factory.mktemp("parallel")
    make_model(vocab_size=100).save_pretrained(folder)  # some releases cannot split an odd vocabulary
    script = folder / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), json.dumps(CHUNKS)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


def test_tensor_parallel_logits_match_the_whole_model(found: Any) -> None:
    for rank in found:
        assert rank["split k_proj"] == [12, 32]
        assert rank["logits"] < 1e-5


def test_every_tensor_parallel_rank_caches_its_heads_and_writes_the_same_text(found: Any) -> None:
    for rank in found:
        assert rank["cache"] == ["DynamicRollingCache", [4, 1, 8, 12]]
        for way in ("greedy", "static", "static in chunks", "beams"):
            assert rank[way], way


def test_tensor_parallel_losses_and_gradients_match_the_whole_model(found: Any) -> None:
    for rank in found:
        for chunk in (None, 5):
            assert rank[f"split loss, chunk {chunk}"] < 1e-5
            assert rank[f"split gradient, chunk {chunk}"] < 1e-5


def test_a_tensor_parallel_size_that_would_split_a_head_is_refused_at_loading(found: Any) -> None:
    for rank in found:
        assert "size of 2 does not divide num_key_value_heads=1" in rank["one head for two"]


@pytest.mark.parametrize(("ranks", "kv_heads", "fitting"), [(3, 2, "1, 2"), (4, 2, "1, 2"), (16, 8, "1, 2, 4, 8")])
def test_a_tensor_parallel_size_that_does_not_divide_the_heads_is_refused(
    ranks: int, kv_heads: int, fitting: str, make_model: Any
) -> None:
    model = make_model(num_attention_heads=8, num_key_value_heads=kv_heads)
    split = DistributedConfig(tp_size=ranks)
    with pytest.raises(ValueError, match=rf"{ranks} does not divide num_key_value_heads={kv_heads}.*\({fitting}\)"):
        MistralForCausalLM.maybe_distribute_model(model, split, None)
    assert MistralForCausalLM.maybe_distribute_model(model, DistributedConfig(tp_size=2), None) is model


def test_sharded_training_has_the_loss_curve_of_one_process(found: Any) -> None:
    for rank in found:
        assert rank["sharded k_proj"] == [12, 32]
        assert rank["curve"][-1] < rank["curve"][0] - 0.5
        for chunk in CHUNKS:
            assert rank[f"sharded curve, chunk {chunk}"] == pytest.approx(rank["curve"], rel=1e-4)


@accelerate
@pytest.mark.parametrize("devices", ["cpu and disk", "disk"])
def test_offloading_gives_the_same_tokens_and_losses(
    devices: str, checkpoint: Path, make_model: Any, padded: Any, tmp_path: Path
) -> None:
    """Under a small `max_memory`, ``device_map="auto"`` sends the layers that do not fit to the disk."""
    expected = make_model()
    size = sum(p.nbytes for p in expected.parameters())
    memory = {"cpu": 0.7 * size if devices == "cpu and disk" else 0.35 * size}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    found = set(model.hf_device_map.values())
    assert "disk" in found
    inputs = padded(11, 5)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), expected.generate(**inputs, **options))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        for chunk in (None, 5):
            loss = model(**inputs, labels=labels, loss_chunk_size=chunk).loss
            torch.testing.assert_close(loss, expected(**inputs, labels=labels).loss, **TIGHT)


@accelerate
def test_dispatched_layers_fill_the_rolling_buffer(checkpoint: Path, make_model: Any, token_ids: Any) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(MistralForCausalLM.from_pretrained(checkpoint), execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    output = model(token_ids(1, 13))
    assert isinstance(output.past_key_values, RollingCache)
    torch.testing.assert_close(output.logits, make_model()(token_ids(1, 13)).logits, **TIGHT)


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
@accelerate
def test_launch_configurations_fit_accelerate_and_the_model(name: str) -> None:
    """Accelerate reads them and has all of their fields; the layer class that they name exists."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = ROOT / f"examples/accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    fields = yaml.safe_load(path.read_text())
    options = vars(launch_command_parser().parse_args(["--config_file", str(path), "script.py"]))
    section = fields["fsdp_config" if name == "fsdp2" else "deepspeed_config"]
    assert section.keys() <= options.keys()
    assert path.name in path.read_text()
    if name == "fsdp2":
        assert section["fsdp_version"] == 2
        assert hasattr(modeling_mistral, section["fsdp_transformer_layer_cls_to_wrap"])


@pytest.mark.parametrize(("installed", "expected"), [("2.9.1", False), ("2.13.0+cpu", True), ("3.0", True)])
def test_versions_are_compared_by_their_numbers(installed: str, expected: bool) -> None:
    assert at_least("torch", "2.13", installed) == expected
