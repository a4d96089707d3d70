# SPDX-License-Identifier: Apache-2.0
"""Files of vectors keyed by the content of a text: keys, checksummed shards, writes that are whole or not at all."""

import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save


KEY = np.dtype("S16")  # 128 bits of BLAKE2b: among 10^9 texts a collision has a chance of 10^-21


def keys_of(texts: Iterable[str], first_row: int = 0) -> np.ndarray:
    """Return the content keys, [N] of 16 bytes.

    Raises:
        ValueError: If a text is empty or no string; its row is named. A blank has a vector, but nothing to teach.
    """
    digests = []
    for row, text in enumerate(texts, first_row):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"texts: row {row} is {text!r}, expected a non-empty string. A target for it would be noise. Drop "
                "such rows: dataset.filter(lambda row: row['text'] and row['text'].strip())."
            )
        digests.append(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY.itemsize).digest())
    return np.array(digests, dtype=KEY)


class KeySet:
    """A set of keys as a few sorted arrays: 16 bytes a key, where a Python set takes 100."""

    def __init__(self, known: np.ndarray) -> None:
        self._known, self._parts = known, []

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add the keys; return the positions of those that were new, in order, of equal ones the first."""
        new = np.sort(np.unique(keys, return_index=True)[1])
        for part in [self._known, *self._parts]:
            new = new[find(part, keys[new]) < 0]
        self._parts.append(np.sort(keys[new]))
        while len(self._parts) > 1 and len(self._parts[-2]) < 2 * len(self._parts[-1]):
            self._parts[-2:] = [np.sort(np.concatenate(self._parts[-2:]))]
        return new


def find(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return where each key stands in the sorted `known`, -1 for those that do not."""
    if not len(known):
        return np.full(len(keys), -1)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, place, -1)


def write_whole(path: Path, content: bytes, need: str = "") -> None:
    """Write a file whole or not at all: a killed process or a power cut leaves the old one, or none."""
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"hf_distill: {path} can't be written ({error.strerror}). What is finished stays: free space "
            f"({need or len(content)}) and run the same command again"
        ) from error  # fmt: skip


def npy_bytes(values: np.ndarray) -> bytes:
    """Return what `np.save` would write."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def shard_bytes(keys: np.ndarray, vectors: np.ndarray) -> bytes:
    """Return a safetensors file of keys and vectors that carries the checksum of its data."""
    tensors = {"keys": keys.view(np.uint8).reshape(len(keys), KEY.itemsize), "vectors": np.ascontiguousarray(vectors)}
    # The checksum is that of the data as they lie in the file, so a first pass finds it and a second writes it.
    return save(tensors, metadata={"sha256": hashlib.sha256(_data(save(tensors))).hexdigest()})


def _data(content: bytes) -> memoryview:
    return memoryview(content)[8 + int.from_bytes(content[:8], "little") :]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a safetensors file and where its data begin."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Return one tensor of a shard as a memory map."""
    header, start = read_header(path)
    entry = header[name]
    dtype = {"U8": np.uint8, "I32": np.int32, "U64": np.uint64, "F16": np.float16, "F32": np.float32}[entry["dtype"]]
    return np.memmap(path, dtype, "r", start + entry["data_offsets"][0], tuple(entry["shape"]))


def is_whole(path: Path, sha256: str | None = None) -> bool:
    """Whether the data match the checksum, the given one or the file's own."""
    try:
        header, start = read_header(path)
        with open(path, "rb") as file:
            file.seek(start)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return found == header["__metadata__"]["sha256"] == (sha256 or found)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return False


def holds(path: Path, keys: np.ndarray) -> bool:
    """Whether a finished, undamaged shard of exactly these keys lies there."""
    return path.exists() and is_whole(path) and np.array_equal(read_tensor(path, "keys").view(KEY)[:, 0], keys)
