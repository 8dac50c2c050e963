"""The Auto classes build our models, composite models contain them, and importing the package is cheap."""

import json
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
from tests.helpers.family import FAMILIES
from tests.helpers.processes import run_python

AUTO = {
    "AutoModel": "MistralModel",
    "AutoModelForCausalLM": "MistralForCausalLM",
    "AutoModelForSequenceClassification": "MistralForSequenceClassification",
    "AutoModelForTokenClassification": "MistralForTokenClassification",
    "AutoModelForQuestionAnswering": "MistralForQuestionAnswering",
}


def resolved_modules(folder: Path) -> set[str]:
    """Modules of the classes that the Auto classes build from a checkpoint."""
    models = [getattr(transformers, auto).from_pretrained(folder) for auto in AUTO]
    assert [type(model).__name__ for model in models] == list(AUTO.values())
    return {type(AutoConfig.from_pretrained(folder)).__module__, *(type(model).__module__ for model in models)}


OURS = {"mistral_hf.configuration_mistral", "mistral_hf.modeling_mistral"}
BUILT_IN = {
    "transformers.models.mistral.configuration_mistral",
    "transformers.models.mistral.modeling_mistral",
}


@pytest.mark.usefixtures("registered")
def test_registration_can_be_repeated_and_undone(checkpoint: Path, tiny: Any) -> None:
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


def test_the_auto_classes_build_our_models_from_a_configuration(tiny: Any) -> None:
    for auto, name in AUTO.items():
        model = getattr(transformers, auto).from_config(MistralConfig(**tiny()))
        assert type(model) is getattr(mistral_hf, name)
    assert type(AutoConfig.for_model("mistral")) is MistralConfig


def test_the_reference_classes_stay_usable(tiny: Any, checkpoint: Path) -> None:
    assert type(AutoModel.from_config(StockConfig(**tiny()))) is stock_modeling.MistralModel
    assert type(stock_modeling.MistralForCausalLM.from_pretrained(checkpoint)) is stock_modeling.MistralForCausalLM


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("ignored", ["AutoConfig", *AUTO])
def test_a_registration_without_effect_is_refused_and_undone(
    ignored: str, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    mistral_hf.unregister()
    with monkeypatch.context() as patch:
        patch.setattr(getattr(registration, ignored), "register", lambda *args, **kwargs: None)
        with pytest.raises(RuntimeError, match=r"Auto\w+ of mistral resolves to .* instead of mistral_hf\."):
            mistral_hf.register()
    # No class stays registered.
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


AUDIO = {
    "num_mel_bins": 8,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_source_positions": 8,
}
MEDIUM = 98  # the token that stands for a part of an image or sound


def composite_config(kind: str, text: Any) -> Any:
    if kind == "mistral3":
        return transformers.Mistral3Config(text_config=text, vision_config=dict(PIXTRAL), image_token_index=MEDIUM)
    if kind == "llava":
        return transformers.LlavaConfig(text_config=text, vision_config=dict(CLIP), image_token_index=MEDIUM)
    if kind == "voxtral":
        return transformers.VoxtralConfig(text_config=text, audio_config=dict(AUDIO), audio_token_id=MEDIUM)
    perceiver = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
    return transformers.Idefics2Config(
        text_config=text,
        vision_config={k: v for k, v in CLIP.items() if k != "model_type"},
        perceiver_config={**perceiver, "resampler_head_dim": 8, "num_key_value_heads": 1},
        image_token_id=MEDIUM,
    )


COMPOSITES = {
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "idefics2": "Idefics2ForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
}
# Each kind's name for an image or sound, a shape that it takes, its other inputs, and its number of tokens.
MEDIA: dict[str, tuple[str, tuple[int, ...], dict[str, Any], int]] = {
    "mistral3": ("pixel_values", (1, 3, 16, 8), {"image_sizes": torch.tensor([[16, 8]])}, 2),
    "llava": ("pixel_values", (1, 3, 8, 8), {}, 4),
    "idefics2": ("pixel_values", (1, 1, 3, 8, 8), {}, 2),
    "voxtral": ("input_features", (1, 8, 16), {}, 2),
}
EVERY_COMPOSITE = pytest.mark.parametrize("kind", COMPOSITES)
EVERY_TEXT_MODEL = pytest.mark.parametrize("model_type", FAMILIES)


def text_model(model: Any) -> Any:
    return model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model


def make_composite(kind: str, model_type: str, fields: dict[str, Any]) -> Any:
    """A composite around a tiny text model of this type, which must be ours."""
    family = FAMILIES[model_type]
    text = {"model_type": model_type, **family.fields(fields)}
    model = getattr(transformers, COMPOSITES[kind])(composite_config(kind, text)).eval()
    assert type(text_model(model)) is getattr(family.modeling, f"{family.stem}Model")
    assert type(model.config.text_config) is family.config
    return model


def stock_composite(kind: str, model_type: str, folder: Path) -> Any:
    """The saved composite with the reference's text model; the registration is undone."""
    mistral_hf.unregister()
    stock = getattr(transformers, COMPOSITES[kind]).from_pretrained(folder)
    assert type(text_model(stock)) is getattr(FAMILIES[model_type].stock_modeling, f"{FAMILIES[model_type].stem}Model")
    return stock


@pytest.mark.usefixtures("registered")
@EVERY_COMPOSITE
@EVERY_TEXT_MODEL
def test_composite_models_contain_ours_and_match_the_reference(
    kind: str, model_type: str, tiny: Any, padded: Any, tmp_path: Path
) -> None:
    """Built, run, saved and loaded with our text model, and loaded with the reference's, for the same results."""
    model = make_composite(kind, model_type, tiny())
    inputs = padded(11, 6)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=97)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert saved["model_type"] == model_type
    assert saved["head_dim"] == 12
    real = inputs["attention_mask"].bool()
    # Without positions, the reference counts the padding, by which Ministral 3 scales its queries.
    positions = {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    expected = model(**inputs, **positions).logits
    text = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    again = type(model).from_pretrained(tmp_path)
    assert type(text_model(again)) is type(text_model(model))
    assert torch.equal(again(**inputs, **positions).logits, expected)
    stock = stock_composite(kind, model_type, tmp_path)
    torch.testing.assert_close(expected[real], stock(**inputs, **positions).logits[real], rtol=1e-5, atol=1e-5)
    assert torch.equal(text, stock.generate(**inputs, max_new_tokens=12, do_sample=False))


@pytest.mark.usefixtures("registered")
@EVERY_COMPOSITE
@EVERY_TEXT_MODEL
def test_composite_models_read_images_and_sounds_as_the_reference_does(
    kind: str, model_type: str, tiny: Any, token_ids: Any, tmp_path: Path
) -> None:
    """The medium is within the window of the prompt, and beyond it in the text that follows."""
    model = make_composite(kind, model_type, tiny())
    name, shape, others, count = MEDIA[kind]
    medium = torch.randn(shape)
    ids = torch.cat([token_ids(1, 4).clamp(max=97), torch.full((1, count), MEDIUM), token_ids(1, 3).clamp(max=97)], 1)
    inputs = {"input_ids": ids, name: medium, **others}
    logits = model(**inputs).logits
    assert (logits - model(**inputs | {name: -medium}).logits).abs().max() > 1e-3
    text = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert text.shape == (1, ids.shape[1] + 12)
    model.save_pretrained(tmp_path)
    stock = stock_composite(kind, model_type, tmp_path)
    torch.testing.assert_close(logits, stock(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(text, stock.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False))


def test_a_composite_model_takes_the_reference_text_configuration(tiny: Any, token_ids: Any) -> None:
    model = transformers.Mistral3ForConditionalGeneration(composite_config("mistral3", StockConfig(**tiny())))
    assert model(token_ids(1, 5).clamp(max=97)).logits.shape == (1, 5, 99)


# A field of a mixture of experts, and the Auto class that gives its language model.
EXPERTS = {
    "mixtral": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "AutoModelForCausalLM"),
    "mistral4": (
        {
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
        },
        "AutoModelForImageTextToText",
    ),
}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_a_mixture_of_experts_stays_the_library_s_and_is_refused_here(
    model_type: str, tiny: Any, tmp_path: Path
) -> None:
    fields, auto = EXPERTS[model_type]
    sizes = {name: value for name, value in tiny().items() if name not in ("head_dim", "sliding_window")}
    name = f"{model_type.capitalize()}ForCausalLM"
    config = AutoConfig.for_model(model_type, **sizes | fields)
    getattr(transformers, auto).from_config(config).save_pretrained(tmp_path)
    model = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(model) is getattr(transformers, name)
    assert type(model).__module__ == f"transformers.models.{model_type}.modeling_{model_type}"
    message = f"model_type='{model_type}' is a mixture of experts, .* use the library's {name}, which the Auto classes"
    for family in FAMILIES.values():
        for ours in (family.config, getattr(family.modeling, f"{family.stem}ForCausalLM")):
            with pytest.raises(ValueError, match=message):
                ours.from_pretrained(tmp_path)


def test_importing_loads_only_the_files_of_the_package() -> None:
    """After torch, the reference's Mistral module and the Auto classes, only the package is imported."""
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
    parts = {name.split(".")[1] for name in new if "." in name}
    assert parts == {
        *("bundled", "compatibility", "registration", "torch"),
        *(
            f"{kind}_{name}"
            for kind in ("configuration", "modeling")
            for name in ("mistral", "ministral", "ministral3")
        ),
    }
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


def test_the_packages_are_attributes_without_a_second_import() -> None:
    code = """
import sys
import mistral_hf
print("mistral_hf.convert" in sys.modules, "mistral_hf.chat" in sys.modules)
print(mistral_hf.convert.convert_raw_to_hf.__module__, mistral_hf.chat.get_chat_template.__module__)
"""
    before, after = run_python(code).splitlines()[-2:]
    assert before == "False False"
    assert after == "mistral_hf.convert.folders mistral_hf.chat.template"


NAMES = ("MistralConfig", "MistralPreTrainedModel", *AUTO.values())


def names_resolved() -> set[str]:
    return {getattr(transformers, name).__module__ for name in NAMES}


@pytest.mark.usefixtures("registered")
def test_the_names_in_transformers_are_ours_until_they_are_given_back(checkpoint: Path) -> None:
    assert names_resolved() == OURS
    named = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, named).from_pretrained(checkpoint)
    assert type(model) is mistral_hf.MistralForCausalLM
    assert isinstance(model, transformers.MistralForCausalLM)
    mistral_hf.unregister()
    mistral_hf.unregister()
    assert names_resolved() == BUILT_IN
    mistral_hf.register(names=False)
    assert names_resolved() == BUILT_IN
    assert resolved_modules(checkpoint) == OURS
    mistral_hf.register()
    assert names_resolved() == OURS


@pytest.mark.usefixtures("registered")
def test_a_name_that_stays_the_library_s_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mistral_hf.unregister()
    with monkeypatch.context() as patch:
        patch.setitem(registration.NAMES, "MistralForCausalLM", stock_modeling.MistralForCausalLM)
        patch.setattr(registration, "setattr", lambda *args: None, raising=False)
        with pytest.raises(RuntimeError, match=r"transformers\.Mistral\w+ resolves to"):
            mistral_hf.register()
    assert names_resolved() == BUILT_IN


def test_both_modules_of_transformers_give_our_names() -> None:
    """The library imports itself a second time; whoever imported it before keeps the first module."""
    code = """
import sys
import transformers
import mistral_hf
print(transformers is sys.modules["transformers"])
for change in (lambda: None, mistral_hf.unregister, mistral_hf.register):
    change()
    print(*(module.MistralForCausalLM.__module__ for module in (transformers, sys.modules["transformers"])))
"""
    lines = run_python(code).splitlines()[-4:]
    ours, stock = "mistral_hf.modeling_mistral", "transformers.models.mistral.modeling_mistral"
    assert lines == ["False", f"{ours} {ours}", f"{stock} {stock}", f"{ours} {ours}"]


@pytest.mark.parametrize("name", ["MistralForCausalLM", "MinistralForCausalLM", "Ministral3ForCausalLM"])
def test_language_models_have_a_generation_mixin_among_their_direct_bases(name: str) -> None:
    """There the library and its tools look for one."""
    assert any(base.__name__.endswith("GenerationMixin") for base in getattr(mistral_hf, name).__bases__)
