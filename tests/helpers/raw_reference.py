"""Synthetic raw checkpoints of every generation, an independent forward pass, and child processes."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 96, "vocab_size": 80}
COMMON = {**SIZES, "norm_eps": 1e-5, "rope_theta": 1e6, "max_seq_len": 256}
TOKENS = [1, 7, 33, 2, 60, 5, 5, 71, 12, 40, 3, 9, 77, 21, 50, 4]  # ids within the vocabulary of each
YARN = {"original_max_position_embeddings": 16, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}

GENERATIONS: dict[str, dict[str, Any]] = {
    "7B v0.1": {**COMMON, "rope_theta": 1e4, "sliding_window": 6},
    "7B v0.2": COMMON,
    "7B v0.3": {**COMMON, "sliding_window": None, "vocab_size": 96},
    "Nemo": {**COMMON, "dim": 40, "head_dim": 16},
    "Codestral 22B": {**COMMON, "n_heads": 6, "n_kv_heads": 1, "dim": 48},
    "Small 24B": {**COMMON, "head_dim": 24, "rope_theta": 1e8, "tied_embeddings": False},
    "Ministral 8B": {**COMMON, "n_layers": 4, "_sliding_window": [None, 6, 6, 6]},
    "tied": {**COMMON, "tied_embeddings": True},
    "yarn": {**COMMON, "yarn": {**YARN, "apply_scale": True}},
    "Ministral 3": {
        **COMMON,
        "yarn": YARN,
        "llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1},
        "q_lora_rank": None,
    },
    "Ministral 3 with a window": {
        **COMMON,
        "yarn": {**YARN, "original_max_position_embeddings": 8, "apply_scale": True},
        "llama_4_scaling": {"original_max_position_embeddings": 8, "beta": 0.5},
        "sliding_window": 6,
        "tied_embeddings": True,
    },
}
# A vision tower beside the text model, as far as the conversion looks at it.
VISION_PARAMS = {"vision_encoder": {"hidden_size": 8, "patch_size": 2, "spatial_merge_size": 2}}
VISION_SHAPES = {
    "vision_encoder.patch_conv.weight": (8, 3, 2, 2),
    "vision_encoder.transformer.layers.0.attention.wq.weight": (8, 8),
    "vision_language_adapter.w_in.weight": (64, 8),
    "patch_merger.merging_layer.weight": (8, 32),
    "pre_mm_projector_norm.weight": (8,),
}


def raw_tensors(
    params: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 0.3
) -> dict[str, torch.Tensor]:
    """Random weights under their raw names, each in the shape that `params` imply."""
    d, f, v, h = params["dim"], params["hidden_dim"], params["vocab_size"], params["head_dim"]
    q, kv = params["n_heads"] * h, params["n_kv_heads"] * h
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (v, d), "norm.weight": (d,)}
    if not params.get("tied_embeddings"):
        shapes["output.weight"] = (v, d)
    for n in range(params["n_layers"]):
        shapes |= {f"layers.{n}.attention_norm.weight": (d,), f"layers.{n}.ffn_norm.weight": (d,)}
        shapes |= {
            f"layers.{n}.attention.w{p}.weight": s
            for p, s in {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}.items()
        }
        shapes |= {f"layers.{n}.feed_forward.w{i}.weight": s for i, s in ((1, (f, d)), (2, (d, f)), (3, (f, d)))}
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}


def write_raw(
    folder: Path, params: dict[str, Any], tensors: dict[str, torch.Tensor], layout: str = "safetensors"
) -> Path:
    """Write a raw folder: ``safetensors``, ``pth``, ``pth-2`` (two tensor-parallel ranks) or ``sharded``."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    if layout == "safetensors":
        save_file(tensors, folder / "consolidated.safetensors")
    elif layout == "pth":
        torch.save(tensors, folder / "consolidated.00.pth")
    elif layout == "pth-2":
        for rank in range(2):
            torch.save(parallel_part(tensors, rank, 2), folder / f"consolidated.{rank:02d}.pth")
    elif layout == "sharded":
        names = list(tensors)
        shards = {f"consolidated-{i:05d}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        raise ValueError(layout)
    return folder


def write_raw_composite(folder: Path, params: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write a raw folder with a vision tower beside the text model, and return the tensors of the latter."""
    tensors = raw_tensors(params)
    write_raw(folder, params | VISION_PARAMS, tensors | {name: torch.ones(s) for name, s in VISION_SHAPES.items()})
    return tensors


def write_raw_lora(folder: Path, rank: int = 4) -> dict[str, torch.Tensor]:
    """Write a raw LoRA folder for the model `COMMON`, with scale 0.5, and return its tensors."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in raw_tensors(COMMON, torch.float32).items():
        if weight.dim() == 2 and name.startswith("layers"):
            base = name.removesuffix(".weight")
            tensors[f"{base}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{base}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    (folder / "params.json").write_text(json.dumps({**COMMON, "lora": {"rank": rank, "scaling": 0.5}}))
    return tensors


def parallel_part(tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """One rank's part: rows of q, k, v, w1, w3 and the head, columns of o, w2 and the embeddings, all of a norm."""
    columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    return {
        name: t.clone() if t.dim() == 1 else t.chunk(ranks, dim=int(name.endswith(columns)))[rank].clone()
        for name, t in tensors.items()
    }


def reference_logits(tensors: dict[str, torch.Tensor], params: dict[str, Any], tokens: list[int]) -> torch.Tensor:
    """``[S, V]`` logits in float64: the raw model, one position and one head at a time."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    heads, kv_heads, dim = params["n_heads"], params["n_kv_heads"], params["head_dim"]
    windows = params.get("sliding_window") or params.get("_sliding_window")
    hidden = w["tok_embeddings.weight"][tokens]
    for n in range(params["n_layers"]):
        window = (windows[n % len(windows)] if isinstance(windows, list) else windows) or len(tokens)
        at = f"layers.{n}.attention"
        x = _norm(hidden, w[f"layers.{n}.attention_norm.weight"], params["norm_eps"])
        q = _rope((x @ w[f"{at}.wq.weight"].T).view(-1, heads, dim), params["rope_theta"])
        k = _rope((x @ w[f"{at}.wk.weight"].T).view(-1, kv_heads, dim), params["rope_theta"])
        v = (x @ w[f"{at}.wv.weight"].T).view(-1, kv_heads, dim)
        rows = []
        for s in range(len(tokens)):
            first = max(0, s - window + 1)
            heads_out = []
            for head in range(heads):
                group = head * kv_heads // heads
                scores = (k[first : s + 1, group] @ q[s, head]) / math.sqrt(dim)
                heads_out.append(scores.softmax(0) @ v[first : s + 1, group])
            rows.append(torch.cat(heads_out))
        hidden = hidden + torch.stack(rows) @ w[f"{at}.wo.weight"].T
        ff = f"layers.{n}.feed_forward"
        x = _norm(hidden, w[f"layers.{n}.ffn_norm.weight"], params["norm_eps"])
        gate = torch.nn.functional.silu(x @ w[f"{ff}.w1.weight"].T) * (x @ w[f"{ff}.w3.weight"].T)
        hidden = hidden + gate @ w[f"{ff}.w2.weight"].T
    head_weight = w.get("output.weight", w["tok_embeddings.weight"])
    return _norm(hidden, w["norm.weight"], params["norm_eps"]) @ head_weight.T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _rope(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Interleaved RoPE on ``[S, H, D]``: pair i at position s is rotated by ``s * theta ** (-2 i / D)``."""
    out = torch.empty_like(x)
    for s in range(x.shape[0]):
        for i in range(x.shape[-1] // 2):
            angle = s * theta ** (-2 * i / x.shape[-1])
            c, sn = math.cos(angle), math.sin(angle)
            a, b = x[s, :, 2 * i], x[s, :, 2 * i + 1]
            out[s, :, 2 * i], out[s, :, 2 * i + 1] = a * c - b * sn, a * sn + b * c
    return out


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a forked process and return its exit code: 1 for an error, -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
