"""Writing checkpoints: tensors as a stream, folders that appear only when they are complete, and their checksums.

with atomic_folder("model-folder") as folder:
    digests = write_checkpoint(folder, tensors, max_shard_size="5GB")
    write_manifest(folder, digests)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..compatibility import CheckpointError
from .json_file import read_json
from .reader import DTYPES, Array, TensorInfo, as_bytes, numpy_dtype

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all)

MANIFEST = "manifest.json"
CONVERSION = "mistral_hf.convert"  # what a manifest calls the maker of a converted folder
_PAGE = 4096
_PIECE = 1 << 18  # bytes; larger writes need large free blocks of memory, smaller ones reuse what was just freed
_CODES = {name: code for code, name in DTYPES.items()}


class LazyTensor(NamedTuple):
    """A tensor to write, whose values are read when they are written.

    Attributes:
        name: Its name in the file.
        info: Its dtype and shape.
        read: Returns the values.
        stream: Replaces `read` if given: yields the bytes in pieces, each of which stays unchanged until the next but
            one is read.
    """

    name: str
    info: TensorInfo
    read: Callable[[], Array]
    stream: Callable[[], Iterator[memoryview]] | None = None


def write_checkpoint(
    folder: str | Path,
    tensors: Sequence[LazyTensor],
    *,
    stem: str = "model",
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write tensors as safetensors, each read, written and dropped before the next one is read.

    Args:
        folder: An existing folder; see `atomic_folder` for one that appears only when complete.
        tensors: The tensors, in the order of the file.
        stem: First part of the file names: ``stem.safetensors``, or ``stem-00001-of-00003.safetensors`` and so on with
            an index.
        max_shard_size: In bytes or such as ``"5GB"``; None for one file. A larger tensor gets its own shard.
        progress: Called after each piece that was written.

    Returns:
        The SHA-256 of each file with weights, by file name.

    Raises:
        ValueError: `max_shard_size` cannot be read.
        CheckpointError: A tensor has another dtype, shape or number of bytes than announced, or a dtype that the
            format lacks.
    """
    folder = Path(folder)
    shards = _plan_shards(tensors, parse_size(max_shard_size))
    total = sum(tensor.info.nbytes for tensor in tensors)
    done = 0
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"

        def report(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        digests[name] = _write_safetensors(folder / name, shard, report)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return digests


def _plan_shards(tensors: Sequence[LazyTensor], limit: int | None) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if limit is not None and shards[-1] and size + tensor.info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.info.nbytes
    return shards


def _write_safetensors(path: Path, tensors: Sequence[LazyTensor], report: Callable[[int], None]) -> str:
    """Write the header, then stream the tensors, hashing in another thread; return the SHA-256 of the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info, *_ in tensors:
        if info.dtype not in _CODES:
            raise CheckpointError(f"{name} is {info.dtype}, which safetensors files cannot hold: give another dtype.")
        start, end = end, end + info.nbytes
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _PAGE)
    start_of_file = len(encoded).to_bytes(8, "little") + encoded
    digest = hashlib.sha256(start_of_file)
    with path.open("wb", buffering=0) as file:
        written = _write_all(file, start_of_file, 0)
        with ThreadPoolExecutor(1) as hasher:
            hashed: Future[None] | None = None
            for chunk in _chunks(tensors):
                if hashed is not None:
                    hashed.result()  # from here on, the piece that was hashed may be overwritten
                hashed = hasher.submit(digest.update, chunk)
                written = _write_all(file, chunk, written)
                report(len(chunk))
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(tensors: Sequence[LazyTensor]) -> Iterator[memoryview]:
    for name, info, read, stream in tensors:
        if stream is not None:
            yield from _exactly(name, info.nbytes, stream())
            continue
        array = read()
        if array.shape != info.shape or array.dtype != numpy_dtype(info.dtype):
            raise CheckpointError(f"{name} was announced as {info}, but is {array.dtype} {array.shape}.")
        yield as_bytes(array).data


def _exactly(name: str, nbytes: int, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    """Pass on the pieces of a stream that must have `nbytes` in all, as the header says."""
    left = nbytes
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left:
        raise CheckpointError(f"{name} was announced with {nbytes} bytes, but has {'more' if left < 0 else 'fewer'}.")


def _write_all(file: Any, chunk: bytes | memoryview, position: int) -> int:
    """Write a chunk at the end of a file that is `position` long, and return the new length."""
    view = memoryview(chunk)
    while view:
        view = view[file.write(view[:_PIECE]) :]
    end = position + len(chunk)
    if hasattr(os, "posix_fadvise"):  # write whole pages to disk now: their memory is freed, and fsync has less to do
        first, last = position // _PAGE * _PAGE, end // _PAGE * _PAGE
        if last > first:
            os.posix_fadvise(file.fileno(), first, last - first, os.POSIX_FADV_DONTNEED)
    return end


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str | None) -> int | None:
    """Bytes from a number or from text such as ``"5GB"`` or ``"512MiB"``; None stays None.

    Raises:
        ValueError: The text is not a positive whole number with one of these units.
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise ValueError(f"Cannot read the size {size!r}: give for example '5GB' or '512MiB'.")
    return int(match[1]) * _UNITS[match[2].upper()]


def check_new(folder: Path) -> None:
    """Refuse to replace a folder.

    Raises:
        FileExistsError: Always.
    """
    raise FileExistsError(f"{folder} exists: give another output, or --overwrite to replace what a conversion wrote.")


def check_converted(folder: Path) -> None:
    """Raise unless a conversion wrote a folder, and all that is in it.

    Raises:
        FileExistsError: The folder has no manifest of a conversion, or holds a file that the manifest does not list.
    """
    remedy = "so it is not replaced: remove it yourself, or give another output."
    try:
        manifest = _read_manifest(folder)
    except CheckpointError:
        manifest = {}
    if manifest.get("made_by") != CONVERSION:
        raise FileExistsError(f"{folder} is not the output of a conversion (no {MANIFEST} says so), {remedy}")
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    others = {path.relative_to(folder).as_posix() for path in paths} - manifest["files"].keys() - {MANIFEST}
    if others:
        raise FileExistsError(f"{folder} holds {sorted(others)[0]}, which no conversion wrote, {remedy}")


@contextmanager
def atomic_folder(
    path: str | Path, *, check_replaceable: Callable[[Path], None] = check_new, needs_bytes: int = 0
) -> Iterator[Path]:
    """A folder to write into, which takes its name only when the block ends without an error.

    Files are written to ``.NAME.incomplete`` beside the target. An error removes that folder; a killed run leaves it,
    and the next run on the same target clears it. Files are synced to disk before the folder is renamed. A target that
    is a symbolic link stays one: the folder that it points to is written.

    Args:
        path: The target.
        check_replaceable: Called with the target if that is a folder with something in it; raises an error unless it
            may be replaced.
        needs_bytes: Free disk space without which nothing is begun.

    Yields:
        The temporary folder.

    Raises:
        FileExistsError: The target exists and may not be replaced.
        BlockingIOError: Another run is writing the same target.
        OSError: The disk is too small.
    """
    target = Path(os.path.realpath(path))
    work, old = target.with_name(f".{target.name}.incomplete"), target.with_name(f".{target.name}.replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _claim(work, target):
        try:
            _restore(target, old)
            if os.path.lexists(target) and not target.is_dir():
                raise FileExistsError(f"{target} is not a folder: give another output.")
            if target.exists() and any(target.iterdir()):
                check_replaceable(target)
            free = shutil.disk_usage(target.parent).free
            if free < needs_bytes:
                have, need = f"{free / 1e9:.1f} GB free", f"{needs_bytes / 1e9:.1f} GB"
                raise OSError(f"{target.parent} has {have}, but {need} are needed: make room, or use another disk.")
            yield work
            _sync(work)
            _move(work, target, old)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _claim(work: Path, target: Path) -> Iterator[None]:
    """Make an empty folder `work` for this process alone; the claim ends with the process at the latest."""
    import fcntl

    while True:
        work.mkdir(exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not work.exists() or os.fstat(descriptor).st_ino != work.stat().st_ino:
                continue  # the run that made it has just finished
            for leftover in work.iterdir():
                is_folder = leftover.is_dir() and not leftover.is_symlink()
                shutil.rmtree(leftover) if is_folder else leftover.unlink()
            yield
            return
        except BlockingIOError:
            raise BlockingIOError(f"Another run is writing {target}: wait for it, or stop it.") from None
        finally:
            os.close(descriptor)


def _restore(target: Path, old: Path) -> None:
    """Undo a replacement that was interrupted between its two renames; finish one that was interrupted after them."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(work: Path, target: Path, old: Path) -> None:
    if target.exists() and any(target.iterdir()):
        target.rename(old)
    work.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: str | Path, known: Mapping[str, str] | None = None, made_by: str | None = None) -> None:
    """Write ``manifest.json``: the size and SHA-256 of every file in a folder.

    Args:
        folder: The finished folder.
        known: Checksums that need not be computed again, by file name relative to the folder.
        made_by: What wrote all of these files; see `check_converted`.
    """
    known = known or {}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    files = {
        name: {"size": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
        for name, path in paths.items()
        if name != MANIFEST
    }
    content = {"files": files} if made_by is None else {"made_by": made_by, "files": files}
    (Path(folder) / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def check_manifest(folder: str | Path) -> int:
    """Compare every file with the folder's ``manifest.json``.

    Returns:
        The number of files that were compared.

    Raises:
        ValueError: A file is missing or differs; the message names it.
    """
    folder = Path(folder)
    files = _read_manifest(folder)["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, but {MANIFEST} lists it: copy it too.")
        if path.stat().st_size != entry["size"] or file_sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is not the file that {MANIFEST} lists: copy or convert it again.")
    return len(files)


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST, "a manifest")
    match manifest.get("files"):
        case dict(files) if all(
            isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values()
        ):
            return manifest
    raise CheckpointError(f"{folder / MANIFEST} is not a manifest: files does not give sizes and checksums.")
