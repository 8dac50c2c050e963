"""Converted tokenizers against mistral-common: ids on a fuzzed corpus, decoding, special tokens, damage."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from transformers import AutoTokenizer

from mistral_hf.chat.template import get_chat_template
from mistral_hf.checkpoints.writer import file_sha256
from mistral_hf.convert.folders import convert_hf_to_raw, convert_raw_to_hf
from mistral_hf.convert.sentencepiece import read_sentencepiece
from mistral_hf.convert.tokenizer import convert_tokenizer, find_raw_tokenizer, raw_encoder
from mistral_hf.convert.verify import SAMPLE_TEXT, verify
from tests.helpers.raw_reference import COMMON, raw_tensors, write_raw
from tests.helpers.tokenizer_files import DATA, REAL, converted, raw_file, reference

SCRIPTS = [
    *[(0x20, 0x7E)] * 6,
    *[(0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F)],
    *[(0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1200, 0x137F), (0x2000, 0x206F), (0x2200, 0x22FF), (0x3040, 0x30FF)],
    *[(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0x1F300, 0x1FAFF), (0x10000, 0x10FFF), (0xE000, 0xE0FF)],
    (0x00, 0x1F),
    (0xFDC8, 0xFDF8),
]
LOOK_ALIKES = ["[INST]", "[/INST]", "</s>", "<s>", "<unk>", "<pad>", "[REF]", "[/REF]", "[REFERENCE_DOC_3]", "<0x0A>"]
LOOK_ALIKES += [
    "▁",
    "[TOOL_CALLS]",
    "[control_12]",
    "[control_768]",
    "<SPECIAL_30>",
    "[SYSTEM_PROMPT]",
    "[IMG]",
    "[INS",
]
WORDS = ["the", "Hello", "world", "function", "return", "def", "1234", "3.14", "http://x.y/z", "don't", "naïve", "über"]
WORDS += ["東京", "привет", "סלום", "", "  "]
NOT_TEKKEN = [version for version in REAL if version != "v3-tekken"]


def corpus(count: int) -> list[str]:
    """Random mixtures of scripts, emoji, control characters, runs, look-alikes of control tokens, and words."""
    rng = random.Random(0)

    def piece() -> str:
        kind = rng.random()
        if kind < 0.3:
            first, last = rng.choice(SCRIPTS)
            return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))
        if kind < 0.45:
            return rng.choice(" \n\t\r=-.#*aA0/") * rng.randint(1, 20)
        if kind < 0.6:
            return rng.choice(LOOK_ALIKES)
        if kind < 0.7:
            return "".join(rng.choice(" \n") for _ in range(rng.randint(1, 10)))
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))

    return ["".join(piece() for _ in range(rng.randint(0, 12))) for _ in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [*corpus(10_000), "", " ", SAMPLE_TEXT, *LOOK_ALIKES]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


every_real_one = pytest.mark.parametrize("version", REAL)


@every_real_one
def test_ids_and_text_match_mistral_common_on_a_fuzzed_corpus(version: str, folder: Path, texts: list[str]) -> None:
    """Over 10,000 strings give the ids of mistral-common, and the ids give the text again."""
    tokenizer, expected = converted(version, folder), reference(version, folder).instruct_tokenizer.tokenizer
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, got in zip(texts, ids, strict=True):
        assert got == expected.encode(text, bos=False, eos=False), repr(text)
    for text, decoded in zip(texts, tokenizer.batch_decode(ids), strict=True):
        # SentencePiece writes a space as ▁, so the two cannot be distinguished afterwards.
        assert decoded == (text.replace("▁", " ") if version in NOT_TEKKEN else text)


@every_real_one
def test_characters_without_meaning_stay_text(version: str, folder: Path) -> None:
    """Those that Unicode reserves for internal or private use are bytes also where control tokens are looked for."""
    tokenizer, expected = converted(version, folder), reference(version, folder).instruct_tokenizer.tokenizer
    for code in [*range(0xFDD0, 0xFDF0), 0xE000, 0xF8FF, 0xFFFE, 0xFFFF, 0x1FFFE, 0x10FFFF]:
        for text in (chr(code), f"a{chr(code)} b", f"[REF]{chr(code)}[/REF]", f" {chr(code)}[REFERENCE_DOC_3]a b"):
            ids = tokenizer(text).input_ids
            assert ids == expected.encode(text, bos=True, eos=False)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


@every_real_one
def test_special_tokens_match_mistral_common(version: str, folder: Path) -> None:
    tokenizer, expected = converted(version, folder), reference(version, folder).instruct_tokenizer.tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (expected.bos_id, expected.eos_id, expected.unk_id) == (1, 2, 0)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token == ("<pad>" if version == "v3-tekken" else "<unk>")
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == expected.n_words
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert special == {i for i in range(1000) if expected.is_special(i)} | {0}
    for token_id in sorted(special)[:40]:
        token = tokenizer.convert_ids_to_tokens(token_id)
        assert token == expected.id_to_piece(token_id)
        assert tokenizer.encode(token, add_special_tokens=False) == [token_id]


@every_real_one
def test_a_text_begins_once_and_pads_on_the_left(version: str, folder: Path) -> None:
    tokenizer, expected = converted(version, folder), reference(version, folder).instruct_tokenizer.tokenizer
    batch = tokenizer(["Hello", "Hello, this is longer"], padding=True)
    assert batch["input_ids"][1] == expected.encode("Hello, this is longer", bos=True, eos=False)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0][0] == 0
    assert batch["input_ids"][0][-len(expected.encode("Hello", bos=True, eos=False)) :][0] == tokenizer.bos_token_id


@every_real_one
def test_decoding_leaves_control_tokens_out_as_mistral_common_does(version: str, folder: Path) -> None:
    tokenizer, expected = converted(version, folder), reference(version, folder).instruct_tokenizer.tokenizer
    ids = [1, *expected.encode("Hello  there\n", bos=False, eos=True)]
    decoded = expected.decode(ids, special_token_policy=SpecialTokenPolicy.IGNORE)
    assert tokenizer.decode(ids, skip_special_tokens=True) == decoded


@every_real_one
def test_saving_and_loading_changes_nothing(version: str, folder: Path, tmp_path: Path, texts: list[str]) -> None:
    tokenizer = converted(version, folder)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts[:200])["input_ids"] == tokenizer(texts[:200])["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (again.padding_side, again.pad_token_id) == ("left", tokenizer.pad_token_id)


def test_the_mistral_libraries_are_not_needed_to_load(folder: Path) -> None:
    """Tokenizers are loaded and used where sentencepiece, mistral-common, tiktoken and protobuf cannot be imported."""
    code = """
        import sys
        for name in ("sentencepiece", "mistral_common", "tiktoken", "google.protobuf"):
            sys.modules[name] = None
        from transformers import AutoTokenizer
        for folder in sys.argv[1:]:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            print(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False))
    """
    tokenizers = [converted(version, folder) for version in ("v3", "v13")]
    line = [sys.executable, "-c", textwrap.dedent(code), *(tokenizer.name_or_path for tokenizer in tokenizers)]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    messages = [{"role": "user", "content": "Hi"}]
    expected = [tokenizer.apply_chat_template(messages, return_dict=False) for tokenizer in tokenizers]
    assert [json.loads(printed) for printed in result.stdout.splitlines()] == expected


# Versions


@pytest.mark.parametrize("version", NOT_TEKKEN)
def test_the_content_gives_the_version_of_a_bare_name(version: str, tmp_path: Path) -> None:
    source = shutil.copyfile(REAL[version], tmp_path / "tokenizer.model")
    assert convert_tokenizer(source, tmp_path).version == version


def test_a_file_name_gives_the_version(tmp_path: Path) -> None:
    info = convert_tokenizer(DATA / "mistral_instruct_tokenizer_241114.model.v7m1", tmp_path)
    assert (info.version, info.vocab_size, info.pad_token_id) == ("v7", 32768, 0)
    assert convert_tokenizer(REAL["v3"], tmp_path, version="v7").version == "v7"


@pytest.mark.parametrize("version", ["v3", "v3-tekken"])
def test_a_tekken_file_takes_its_version_with_or_without_the_suffix(version: str, tmp_path: Path) -> None:
    assert convert_tokenizer(REAL["v3-tekken"], tmp_path, version=version).version == "v3-tekken"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["mistral_version"], config["chat_template"]) == ("v3-tekken", get_chat_template("v3-tekken"))


def test_a_sentencepiece_file_refuses_a_version_of_tekken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SentencePiece file, .*'v3-tekken'.* 'v3'"):
        convert_tokenizer(REAL["v3"], tmp_path, version="v3-tekken")
    assert list(tmp_path.iterdir()) == []


def test_a_tekken_file_gives_its_version(folder: Path, tmp_path: Path) -> None:
    assert convert_tokenizer(raw_file("v13", folder), tmp_path).version == "v13"
    with pytest.raises(ValueError, match="no chat template for version 'v5'"):
        convert_tokenizer(REAL["v3"], tmp_path, version="v5")


# Damage


@pytest.mark.parametrize("keep", [0, 1, 1000, 400_000])
def test_truncated_sentencepiece_files_are_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(REAL["v1"].read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a SentencePiece model, or is truncated"):
        read_sentencepiece(path)


def test_sentencepiece_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """Without the trainer's settings (field 2 of the file) a model counts as a unigram model."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x0a\x05\x0a\x03abc" + b"\x12\x00" + b"\x1a\x00")
    with pytest.raises(ValueError, match="not BPE with byte fallback"):
        read_sentencepiece(path)


def field(number: int, value: bytes | int | float) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    size, data = (value, b"") if isinstance(value, int) else (len(value), value)
    digits = bytes((size >> 7 * i & 127) | 128 for i in range(9)) + bytes([size >> 63])
    key = number << 3 | (0 if isinstance(value, int) else 2)
    return bytes([key & 127 | 128, key >> 7]) + digits + data


def sentencepiece_file(*pieces: bytes) -> bytes:
    """A model of the smallest vocabulary that is accepted, and the given pieces."""
    controls = [(text.encode(), kind) for text, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3))]
    known = [*controls, *((f"<0x{byte:02X}>".encode(), 6) for byte in range(256)), *((b"%c" % c, 1) for c in b"abc")]
    vocabulary = [field(1, text) + field(2, 0.0) + field(3, kind) for text, kind in known]
    settings = field(2, field(3, 2) + field(35, 1)) + field(3, field(4, 0))
    return b"".join(field(1, piece) for piece in [*vocabulary, *pieces]) + settings


@pytest.mark.parametrize(
    "piece",
    [
        field(1, 10**15),
        field(1, b"x") + field(2, float("nan")),
        field(1, b"x") + field(2, 1),
        field(1, b"x") + field(3, b"x"),
        field(1, b"\xff"),
        field(2, 0.0),
        b"\x08" + b"\xff" * 100_000,
        field(1, b"x" * 1001),
        field(1, b"a"),
    ],
)
def test_sentencepiece_files_with_senseless_pieces_are_refused(piece: bytes, tmp_path: Path) -> None:
    """A size as a text, scores that are no numbers, endless numbers, long and repeated pieces."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_file())
    convert_tokenizer(path, tmp_path)
    path.write_bytes(sentencepiece_file(piece))
    with pytest.raises(ValueError, match=r"SentencePiece|Mistral tokenizer"):
        convert_tokenizer(path, tmp_path)


def test_each_user_defined_piece_needs_a_letter(tmp_path: Path) -> None:
    path, pieces = tmp_path / "tokenizer.model", [field(1, b"user%d" % i) + field(3, 4) for i in range(4)]
    path.write_bytes(sentencepiece_file(*pieces[:3]))
    convert_tokenizer(path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("user0auser2", add_special_tokens=False).input_ids
    assert ids[-3:] == [262, tokenizer.convert_tokens_to_ids("a"), 264]
    assert tokenizer.decode(ids[-3:]) == "user0auser2"
    path.write_bytes(sentencepiece_file(*pieces))
    with pytest.raises(ValueError, match="more user-defined pieces than letters"):
        convert_tokenizer(path, tmp_path)


def test_sentencepiece_files_with_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    rng, whole, path = random.Random(0), sentencepiece_file(), tmp_path / "tokenizer.model"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with suppress(ValueError):
            convert_tokenizer(path, tmp_path)


def tekken_content(**changes: Any) -> dict[str, Any]:
    """A tekken file of bytes only; `changes` are of its config where it has the field, else of the file."""
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": ""} for i in range(256)]
    config = {"pattern": ".", "default_vocab_size": 276, "default_num_special_tokens": 20, "version": "v3"}
    of_config = {key: value for key, value in changes.items() if key in config}
    others = {key: value for key, value in changes.items() if key not in config}
    return {"config": config | of_config, "vocab": vocab, **others}


def token(text: bytes, **fields: Any) -> dict[str, Any]:
    return {"token_bytes": base64.b64encode(text).decode(), **fields}


BYTES = tekken_content()["vocab"]


@pytest.mark.parametrize(
    "content",
    [
        tekken_content(default_num_special_tokens=10_000_000, default_vocab_size=10_000_256),
        tekken_content(default_num_special_tokens=10_000_000),
        tekken_content(default_vocab_size=-5),
        tekken_content(default_vocab_size=277),
        tekken_content(default_vocab_size=275),
        tekken_content(default_num_special_tokens=19),
        tekken_content(default_vocab_size="276"),
        tekken_content(default_vocab_size=276.0),
        tekken_content(default_num_special_tokens=None),
        tekken_content(pattern="("),
        tekken_content(pattern=5),
        tekken_content(version=["v3"]),
        tekken_content(vocab={"a": 1}),
        tekken_content(vocab=[*BYTES[:-1], 5]),
        tekken_content(vocab=[*BYTES[:-1], {}]),
        tekken_content(vocab=[*BYTES[:-1], {"token_bytes": "*/=="}]),
        tekken_content(vocab=[*BYTES[:-1], {"token_bytes": "€"}]),
        tekken_content(vocab=[*BYTES[:-1], token(b"ab")]),
        tekken_content(vocab=[*BYTES, token(b"a")], default_vocab_size=277),
        tekken_content(vocab=[*BYTES, token(b"ab", rank=1)], default_vocab_size=277),
        tekken_content(vocab=[*BYTES, token(b"a" * 1001)], default_vocab_size=277),
        tekken_content(special_tokens=5),
        tekken_content(special_tokens=[{}]),
        tekken_content(special_tokens=[{"token_str": 5}]),
        tekken_content(special_tokens=[{"token_str": "<s>"}] * 2),
        tekken_content(special_tokens=[{"token_str": "<s>", "rank": 1}]),
        tekken_content(model_settings_builder=5),
        tekken_content(model_settings_builder={"reasoning_effort": {"values": ["high"]}}),
        tekken_content(model_settings_builder={"reasoning_effort": {"values": ["{{"], "default": "{{"}}),
        tekken_content(model_settings_builder={"reasoning_effort": {"values": ["high"], "default": "none"}}),
        {**tekken_content(), "config": []},
        {"config": tekken_content()["config"]},
    ],
    ids=count(),
)
def test_senseless_tekken_files_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(tekken_content()))
    assert convert_tokenizer(path, tmp_path).vocab_size == 276
    path.write_text(json.dumps(content))
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"tekken.json is not a tekken tokenizer, or is damaged: ") as error:
        convert_tokenizer(path, tmp_path)
    assert time.process_time() - begin < 5
    assert len(str(error.value)) < 600


def test_tekken_files_with_deep_nesting_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text('{"config": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match="not a tekken tokenizer, or is damaged: RecursionError"):
        convert_tokenizer(path, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {}}', '{"config": {"pattern": "x"}, "vocab": []}'])
def test_damaged_tekken_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a tekken tokenizer"):
        convert_tokenizer(path, tmp_path)


def test_inconsistent_tekken_files_are_refused(folder: Path, tmp_path: Path) -> None:
    content = json.loads(raw_file("v11", folder).read_text())
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({**content, "special_tokens": None}))
    with pytest.raises(ValueError, match="lists no special tokens"):
        convert_tokenizer(path, tmp_path)
    content["vocab"][300]["token_bytes"] = base64.b64encode(b"a").decode()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="duplicates"):
        convert_tokenizer(path, tmp_path)


@pytest.mark.parametrize("version", ["v3", "v13"])
def test_raw_files_are_read_with_or_without_mistral_common(
    version: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = raw_file(version, folder)
    expected = raw_encoder(source)(SAMPLE_TEXT)
    monkeypatch.setitem(sys.modules, "mistral_common.tokens.tokenizers.tekken", None)
    assert raw_encoder(source)(SAMPLE_TEXT) == expected


# In a folder


def test_a_tekken_file_comes_first_and_differing_files_are_refused(tmp_path: Path) -> None:
    assert find_raw_tokenizer(tmp_path) is None
    os.mkfifo(tmp_path / "tokenizer.model")  # reading it would wait for a writer
    assert find_raw_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"a")
    (tmp_path / "tokenizer.model.v3").write_bytes(b"a")
    assert find_raw_tokenizer(tmp_path) == tmp_path / "tokenizer.model.v3"
    (tmp_path / "tokenizer.model.v2").write_bytes(b"b")
    with pytest.raises(ValueError, match=r"several tokenizers \(tokenizer\.model.*v2.*v3\)"):
        find_raw_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_bytes(b"c")
    assert find_raw_tokenizer(tmp_path) == tmp_path / "tekken.json"


@pytest.mark.parametrize("version", ["v3", "v13"])
def test_a_folder_keeps_its_tokenizer_there_and_back(version: str, folder: Path, tmp_path: Path) -> None:
    source = raw_file(version, folder)
    params = {**COMMON, "vocab_size": 32768}
    raw = write_raw(tmp_path / "raw", params, raw_tensors(params))
    shutil.copyfile(source, raw / source.name)
    convert_raw_to_hf(raw, tmp_path / "hf")
    convert_hf_to_raw(tmp_path / "hf", tmp_path / "back")
    assert file_sha256(tmp_path / "back" / source.name) == file_sha256(source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.model_max_length == params["max_seq_len"]
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, tokenizer.pad_token_id)
    outcomes = {check.name: check.ok for check in verify(raw, tmp_path / "hf", logits=False)}
    assert outcomes == {"configuration": True, "tensors": True, "tokenizer": True}
    (raw / source.name).unlink()
    shutil.copyfile(REAL["v1"], raw / "tokenizer.model.v1")
    checks = {check.name: check for check in verify(raw, tmp_path / "hf", logits=False)}
    assert checks["tokenizer"].ok is False


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    shutil.copyfile(REAL["v3"], raw / "tokenizer.model.v3")
    with pytest.raises(ValueError, match="has 32768 tokens, but the model has 80"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
