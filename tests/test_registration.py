"""Who answers for Mistral in the Auto classes, models composed with a Mistral inside, and what importing costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.mistral import modeling_mistral as stock_modeling
from transformers.models.mistral.configuration_mistral import MistralConfig as StockConfig

import mistral_hf
from mistral_hf import MistralConfig, registration

SOURCE = Path(mistral_hf.__file__).parent
AUTO = {
    "AutoModel": "MistralModel",
    "AutoModelForCausalLM": "MistralForCausalLM",
    "AutoModelForSequenceClassification": "MistralForSequenceClassification",
    "AutoModelForTokenClassification": "MistralForTokenClassification",
    "AutoModelForQuestionAnswering": "MistralForQuestionAnswering",
}


def resolved_modules(folder: Path) -> set[str]:
    """Modules of the classes that all Auto classes make of a checkpoint."""
    models = [getattr(transformers, auto).from_pretrained(folder) for auto in AUTO]
    assert [type(model).__name__ for model in models] == list(AUTO.values())
    return {type(AutoConfig.from_pretrained(folder)).__module__, *(type(model).__module__ for model in models)}


OURS = {"mistral_hf.configuration_mistral", "mistral_hf.modeling_mistral"}
BUILT_IN = {
    "transformers.models.mistral.configuration_mistral",
    "transformers.models.mistral.modeling_mistral",
}


@pytest.mark.usefixtures("registered")
def test_registering_and_unregistering(checkpoint: Path, tiny: Any) -> None:
    assert resolved_modules(checkpoint) == OURS
    mistral_hf.register()
    mistral_hf.register()
    assert resolved_modules(checkpoint) == OURS
    mistral_hf.unregister()
    mistral_hf.unregister()
    assert resolved_modules(checkpoint) == BUILT_IN
    assert type(AutoModel.from_config(MistralConfig(**tiny()))) is stock_modeling.MistralModel
    mistral_hf.register()
    assert resolved_modules(checkpoint) == OURS


def test_the_auto_classes_make_models_of_a_configuration(tiny: Any) -> None:
    for auto, name in AUTO.items():
        model = getattr(transformers, auto).from_config(MistralConfig(**tiny()))
        assert type(model) is getattr(mistral_hf, name)
    assert type(AutoConfig.for_model("mistral")) is MistralConfig


def test_the_librarys_own_classes_stay_usable(tiny: Any, checkpoint: Path) -> None:
    assert type(AutoModel.from_config(StockConfig(**tiny()))) is stock_modeling.MistralModel
    assert type(transformers.MistralForCausalLM.from_pretrained(checkpoint)) is stock_modeling.MistralForCausalLM


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("ignored", ["AutoConfig", *AUTO])
def test_a_library_that_ignores_the_registration(
    ignored: str, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    mistral_hf.unregister()
    with monkeypatch.context() as patch:
        patch.setattr(getattr(registration, ignored), "register", lambda *args, **kwargs: None)
        with pytest.raises(RuntimeError, match=r"Auto\w+ resolves model_type 'mistral' to .* instead of mistral_hf\."):
            mistral_hf.register()
    # Nothing is left half registered.
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is stock_modeling.MistralForCausalLM


PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 8,
}


def composite_config(kind: str, text: Any) -> Any:
    if kind == "mistral3":
        return transformers.Mistral3Config(text_config=text, vision_config=dict(PIXTRAL), image_token_index=98)
    if kind == "llava":
        return transformers.LlavaConfig(text_config=text, vision_config=dict(CLIP), image_token_index=98)
    perceiver = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
    return transformers.Idefics2Config(
        text_config=text,
        vision_config={k: v for k, v in CLIP.items() if k != "model_type"},
        perceiver_config={**perceiver, "resampler_head_dim": 8, "num_key_value_heads": 1},
        image_token_id=98,
    )


COMPOSITES = {
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "idefics2": "Idefics2ForConditionalGeneration",
}


def text_model(model: Any) -> Any:
    return model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", COMPOSITES)
def test_composite_models(kind: str, tiny: Any, padded: Any, tmp_path: Path) -> None:
    """Built, run, saved and read back with our text model; then the same with the library's, to the same result."""
    composite = getattr(transformers, COMPOSITES[kind])
    model = composite(composite_config(kind, {"model_type": "mistral", **tiny()})).eval()
    assert type(text_model(model)) is mistral_hf.MistralModel
    assert type(model.config.text_config) is MistralConfig
    inputs = padded(11, 6)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=97)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert saved["model_type"] == "mistral"
    assert saved["head_dim"] == 12
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    text = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    again = composite.from_pretrained(tmp_path)
    assert type(text_model(again)) is mistral_hf.MistralModel
    assert torch.equal(again(**inputs).logits, expected)
    mistral_hf.unregister()
    stock = composite.from_pretrained(tmp_path)
    assert type(text_model(stock)) is stock_modeling.MistralModel
    torch.testing.assert_close(expected[real], stock(**inputs).logits[real], rtol=1e-5, atol=1e-5)
    assert torch.equal(text, stock.generate(**inputs, max_new_tokens=12, do_sample=False))


def test_composite_model_with_an_image(tiny: Any) -> None:
    config = composite_config("mistral3", {"model_type": "mistral", **tiny()})
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 98, 98, 6, 7]])  # a block of two by two patches is one token
    images = {"pixel_values": torch.randn(1, 3, 16, 8), "image_sizes": torch.tensor([[16, 8]])}
    output = model(ids, **images).logits
    assert (output - model(ids, pixel_values=-images["pixel_values"], image_sizes=images["image_sizes"]).logits).any()
    assert model.generate(ids, **images, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_composite_model_of_the_librarys_own_text_configuration(tiny: Any, token_ids: Any) -> None:
    model = transformers.Mistral3ForConditionalGeneration(composite_config("mistral3", StockConfig(**tiny())))
    assert model(token_ids(1, 5).clamp(max=97)).logits.shape == (1, 5, 99)


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_nothing_but_our_own_files() -> None:
    """Beyond torch, the library's Mistral module and its Auto classes, only the package itself is imported."""
    code = """
import sys
import transformers.models.mistral.modeling_mistral
from transformers import AutoModel, AutoModelForCausalLM
before = set(sys.modules)
import mistral_hf
print(*sorted(set(sys.modules) - before))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    new, packages = (set(line.split()) for line in run_python(code).splitlines()[-2:])
    assert "mistral_hf.modeling_mistral" in new
    assert {name for name in new if name.partition(".")[0] != "mistral_hf"} == set()
    assert new <= {"mistral_hf", "mistral_hf.bundled", *(f"mistral_hf.{name}" for name in CORE)}
    heavy = {
        "jax",
        "flax",
        "tensorflow",
        "keras",
        "bitsandbytes",
        "flash_attn",
        "mistral_common",
        "typer",
        "peft",
        "trl",
    }
    assert packages & heavy == set()


# What a room may import of the package; the command line, all but the ports; a room that is not
# named here, none of the model.
CORE: dict[str, set[str]] = {
    "configuration_mistral": set(),
    "attention": set(),
    "flash_kernels": set(),
    "flash": {"attention", "flash_kernels"},
    "cache": set(),
    "losses": {"products"},
    "products": set(),
    "places": {"attention", "cache"},
    "modeling_mistral": {"configuration_mistral", "attention", "flash", "cache", "losses", "places", "products"},
    "registration": {"configuration_mistral", "modeling_mistral"},
}
ROOMS = {
    **CORE,
    "__init__": {
        *("bundled", "configuration_mistral", "cache", "chat", "modeling_mistral", "registration"),
        *("modeling_flax_mistral", "modeling_tf_mistral"),
    },
    "weights": {"configuration_mistral"},
    "params": {"weights"},
    "checkpoints": {"weights", "params"},
    "output": {"checkpoints"},
    "chat": set(),
    "tokenization": {"chat"},
    "ports": {"configuration_mistral", "checkpoints", "output"},
    "flax_attention": set(),
    "flax_outputs": {"flax_attention"},
    "flax_layers": {"configuration_mistral", "flax_attention", "flax_outputs", "ports"},
    "flax_losses": {"flax_layers"},
    "flax_generation": {"flax_attention", "ports"},
    "flax_beam_search": {"flax_attention", "flax_generation", "ports"},
    "flax_params": {"checkpoints"},
    "flax_programs": {
        *("flax_attention", "flax_beam_search", "flax_generation", "flax_losses", "flax_params", "ports"),
    },
    "flax_sharding": set(),
    "modeling_flax_mistral": {
        *("configuration_mistral", "checkpoints", "output", "ports"),
        *("flax_attention", "flax_layers", "flax_losses", "flax_outputs", "flax_params", "flax_programs"),
        "flax_sharding",
    },
    "tf_attention": set(),
    "tf_layers": {"configuration_mistral", "ports", "tf_attention"},
    "tf_losses": {"configuration_mistral"},
    "tf_choice": {"ports"},
    "tf_beam_search": {"ports", "tf_attention", "tf_choice"},
    "tf_generation": {"ports", "tf_attention", "tf_beam_search", "tf_choice"},
    "tf_pretrained": {"configuration_mistral", "checkpoints", "output", "ports", "tf_layers"},
    "modeling_tf_mistral": {
        *("configuration_mistral", "tf_attention", "tf_generation", "tf_layers", "tf_losses", "tf_pretrained"),
    },
}
FRAMEWORKS = {"torch", "jax", "flax", "tensorflow", "keras"}
FORBIDDEN = {
    "configuration_mistral": FRAMEWORKS,
    "ports": FRAMEWORKS,
    "weights": FRAMEWORKS | {"safetensors", "transformers", "os", "io", "pathlib", "json"},
    "modeling_mistral": {"safetensors", "os", "io", "pathlib", "json", "flash_attn"},
    **{path.stem: {"torch", "tensorflow", "keras"} for path in SOURCE.glob("*flax*.py")},
    **{path.stem: {"torch", "jax", "flax"} for path in (*SOURCE.glob("tf_*.py"), SOURCE / "modeling_tf_mistral.py")},
}
FILES = sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it; those of the package begin with ``mistral_hf.``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "mistral_hf" if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported(path) if name.startswith("mistral_hf.")}
    return {name for name in names if (SOURCE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dependencies_point_one_way(path: Path) -> None:
    room = path.stem
    packages = {name.partition(".")[0] for name in imported(path)}
    assert packages & {"conversion", "examples", "benchmarks", "tests"} == set()
    assert packages & FORBIDDEN.get(room, set()) == set()
    if room == "cli":
        assert rooms_of(path) & {"modeling_flax_mistral", "modeling_tf_mistral"} == set()
    elif room in ROOMS:
        assert rooms_of(path) <= ROOMS[room]
    else:
        assert rooms_of(path) & {"modeling_mistral", "attention", "losses", "registration"} == set()
        assert rooms_of(path) & {"modeling_flax_mistral", "modeling_tf_mistral"} == set()


def test_no_room_depends_on_itself() -> None:
    """The rooms can be put in an order in which each imports only those before it."""
    left = {path.stem: rooms_of(path) for path in FILES if path.stem != "__init__"}
    while left:
        ready = {room for room, needs in left.items() if not needs & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {room: needs for room, needs in left.items() if room not in ready}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_registration_changes_the_auto_classes(path: Path) -> None:
    if path.stem == "registration":
        return
    assert not any(name.startswith("transformers.models.auto") for name in imported(path))
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    registering = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "register"]
    assert not [c for c in registering if isinstance(c.value, ast.Name) and c.value.id.startswith("Auto")]


def test_the_walk_finds_imports_of_all_forms(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text("import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\ndef h():\n    import i\n")
    assert imported(path) == {"a.b", "c.d", "mistral_hf.e", "mistral_hf.f.g", "i"}
