# SPDX-License-Identifier: Apache-2.0
"""A teacher that ran once: its vectors on disk, keyed by the text, read by memory map."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import DatasetCardData
from torch import Tensor
from transformers.utils import logging

from .hub import publish
from .processes import process_state
from .shards import (
    KEY,
    KeySet,
    find,
    holds,
    is_whole,
    keys_of,
    npy_bytes,
    read_header,
    read_tensor,
    shard_bytes,
    write_whole,
)
from .teachers import Teacher, fetch


logger = logging.get_logger(__name__)

_FORMAT = 1
_WINDOW = 4096  # texts hashed at a time


class TeacherCache(Teacher):
    """A teacher's vectors for a growing set of texts, each encoded once.

    The folder holds shards (safetensors: `keys`, `vectors`), an index sorted by key, and manifest.json. A shard is written
    whole or not at all and carries its checksum. What a shard holds depends on the texts and the settings only, so a
    build that was killed and goes on, or that several processes share, gives the same bytes as one that ran through.
    Memory: 24 bytes a text while adding, the index memory-mapped afterwards.

    Args:
        teacher: The live teacher.
        folder: Where the cache lies or shall lie.
        dtype: "float16" (cosine error about 1e-7) or "float32".
        shard_size: Texts a shard; fixed when the folder is made.
        batch_size: Texts a teacher batch; fixed when the folder is made.

    Raises:
        ValueError: If the folder holds targets of another teacher or other settings: training would imitate those.
        OSError: If the folder can't be written.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | Path,
        dtype: str = "float16",
        shard_size: int = 4096,
        batch_size: int = 64,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f"TeacherCache: dtype is {dtype!r}, expected 'float16' or 'float32'.")
        self._live: Teacher | None = teacher
        self.revision = teacher.revision
        settings = {"teacher": teacher.name, "dim": teacher.dim, "dtype": dtype, "fingerprint": teacher.fingerprint}
        settings["license"] = teacher.license
        self._attach(Path(folder), {**settings, "shard_size": shard_size, "batch_size": batch_size})

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None) -> "TeacherCache":
        """Open a finished cache for reading, without its teacher: a folder, or what `push_to_hub` published.

        Raises:
            FileNotFoundError: If there is none.
            OSError: If it is neither a folder nor to be had from the Hub.
        """
        folder = fetch(name, revision, kind="dataset")
        if not (folder / "manifest.json").exists():
            raise FileNotFoundError(f"TeacherCache: {name} has no manifest.json, expected a teacher cache.")
        cache = cls.__new__(cls)
        cache._live = None
        cache._attach(folder, None)
        return cache

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Publish it as a data set repository, so that others need not run the teacher; return the address of its page.

        It holds vectors and the hashes of their texts, not the texts: whoever has these finds their vectors.

        Args:
            name: Of the repository.
            **options: Of `hf_distill.hub.publish`: private, revision, token, message.

        Raises:
            OSError: As `publish` says.
        """
        facts = {"teacher": self.name, "texts": len(self), "dimensions": self.dim, "precision": self._manifest["dtype"]}
        data = DatasetCardData(tags=["hf_distill", "teacher-cache"], license=self.license)
        card = (
            f"---\n{data.to_yaml()}\n---\n\n# Vectors of {self.name}\n\nA teacher that ran once: its vectors, by a hash of the "
            "text. The texts are not in here.\n\n```python\nfrom hf_distill import TeacherCache\n\n"
            f'teacher = TeacherCache.open("{name}")  # for DistillationTrainer(teacher=...)\n```\n\n'
        )
        (self.folder / "README.md").write_text(card + "".join(f"* {key}: {value}\n" for key, value in facts.items()), "utf-8")
        return publish(self.folder, name, kind="dataset", **{"message": "Upload teacher cache", **options})

    @classmethod
    def from_embeddings(
        cls,
        texts: Iterable[str],
        vectors: Any,
        folder: str | Path,
        name: str,
        dtype: str = "float16",
        shard_size: int = 4096,
    ) -> "TeacherCache":
        """Make a cache of vectors from anywhere: an API, an existing index, another library.

        Args:
            texts: N texts.
            vectors: [N, D], numpy (a memory map too) or torch; row i belongs to text i. Of equal texts the first counts.
            folder: Where the cache shall lie.
            name: Who made the vectors, with version and settings: a cache of another name is refused.
            dtype: "float16" or "float32".
            shard_size: Texts a shard.

        Raises:
            ValueError: If the numbers of texts and vectors differ: every later text would get its neighbour's vector.
        """
        if len(texts) != len(vectors):
            raise ValueError(
                f"TeacherCache: {len(texts)} texts but {len(vectors)} vectors, expected as many. Texts would be paired "
                "with the vectors of others."
            )
        cache = cls.__new__(cls)
        cache._live = None
        settings = {"teacher": name, "dim": int(vectors.shape[1]), "dtype": dtype, "fingerprint": {"source": name}}
        cache._attach(Path(folder), {**settings, "shard_size": shard_size, "batch_size": None})

        def given(_: list[str], rows: Any) -> Tensor:
            part = vectors[rows]
            return part.detach().float().cpu() if isinstance(part, Tensor) else torch.as_tensor(np.asarray(part))

        cache._add([texts], given)
        return cache

    def _attach(self, folder: Path, settings: dict[str, Any] | None) -> None:
        self.folder = folder
        state = process_state()
        path = folder / "manifest.json"
        if settings is not None and state.is_main_process:
            _require_writable(folder)
            if not path.exists():
                write_whole(path, json.dumps({"format": _FORMAT, **settings, "adds": []}, indent=1).encode())
        state.wait_for_everyone()
        self._load()
        if settings is None:
            return
        have, want = ({"dim": m["dim"], "cache dtype": m["dtype"], **m["fingerprint"]} for m in (self._manifest, settings))
        keys = [key for key in {**want, **have} if have.get(key) != want.get(key)]
        changed = [f"{key}: {have.get(key)!r} there, {want.get(key)!r} now" for key in keys]
        if changed:
            raise ValueError(
                f"TeacherCache: {folder} holds targets of {self._manifest['teacher']} made otherwise ({'; '.join(changed)}), "
                f"expected those of {settings['teacher']}. The student would imitate the old ones. Use another folder, or "
                "delete this one."
            )

    def _load(self) -> None:
        """Read the manifest and map the index; several processes do so after each commit."""
        self._manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        if self._manifest["format"] != _FORMAT:
            raise ValueError(f"TeacherCache: {self.folder} has format {self._manifest['format']}, expected {_FORMAT}.")
        self.name, self.dim = self._live.name if self._live else self._manifest["teacher"], self._manifest["dim"]
        self.license = (self._live and self._live.license) or self._manifest.get("license")
        self._dtype = np.dtype(self._manifest["dtype"])
        self._shards = [shard for add in self._manifest["adds"] for shard in add]
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self._shards])
        self._verified: set[int] = set()
        index = self.folder / self._index_name()
        if self._shards:
            self._keys = np.load(index.with_suffix(".keys.npy"), mmap_mode="r", allow_pickle=False)
            self._rows = np.load(index.with_suffix(".rows.npy"), mmap_mode="r", allow_pickle=False)
        else:
            self._keys, self._rows = np.empty(0, KEY), np.empty(0, np.int64)

    def _index_name(self) -> str:
        # Named after what it indexes: an index left by a killed commit can't be taken for this one.
        digest = hashlib.sha256("".join(shard["sha256"] for shard in self._shards).encode())
        return f"index-{digest.hexdigest()[:16]}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The teacher's, and the precision on disk."""
        return {**self._manifest["fingerprint"], "cache_dtype": self._manifest["dtype"]}

    @property
    def live(self) -> Teacher | None:
        """The teacher that fills the cache; None if the cache was opened without one."""
        return self._live and self._live.live

    @property
    def num_parameters(self) -> int | None:
        """Weights of the live teacher; None if the cache was opened without one."""
        return None if self._live is None else self._live.num_parameters

    def __len__(self) -> int:
        """Number of distinct texts."""
        return int(self._starts[-1])

    # Writing

    def add(self, *columns: Iterable[str]) -> int:
        """Encode the texts that are not there yet; return how many were new.

        Each process of a launch calls it with the same texts and encodes its share of the shards. Killed and called again
        with the same texts, it goes on after the last finished shard. A damaged shard is dropped and its texts encoded
        again.

        Args:
            *columns: Iterables of texts (lists, dataset columns, generators), one after the other.

        Raises:
            ValueError: If a text is empty or no string (its row is named), or a vector is not finite.
            OSError: If the disk is too small; finished shards stay.
        """
        if self._live is None:
            raise ValueError(f"TeacherCache: {self.folder} was opened without its teacher. Use TeacherCache(teacher, folder).")
        batch = self._manifest["batch_size"]
        return self._add(columns, lambda texts, _: self._live.encode(texts, batch, show_progress_bar=False))

    def _add(self, columns: Iterable[Iterable[str]], encode: Callable[[list[str], np.ndarray], Tensor]) -> int:
        state = process_state()
        if state.is_main_process:
            self._drop_damaged()
        state.wait_for_everyone()
        self._load()
        before, number = len(self), len(self._manifest["adds"])
        total = self._estimate(columns, encode) if all(isinstance(column, Sized) for column in columns) else None
        if total == 0:
            return 0
        bar = logging.tqdm(
            total=total, desc=f"Teacher {self.name}", unit=" texts", smoothing=0.05, disable=not state.is_main_process
        )
        count, started, encoded = 0, time.perf_counter(), 0
        for count, (texts, keys, rows) in enumerate(self._plan(columns), 1):
            path = self.folder / f"add{number:04d}-{count - 1:06d}.safetensors"
            if (count - 1) % state.num_processes == state.process_index and not holds(path, keys):
                vectors = encode(texts, rows).numpy().astype(self._dtype)
                wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
                if len(wrong):
                    raise ValueError(
                        f"TeacherCache: {self.name} gives a vector that is not finite in {self._dtype} for {len(wrong)} texts, "
                        f"the first {texts[wrong[0]]!r}. The loss would be NaN. Try dtype='float32' for teacher and cache."
                    )
                write_whole(path, shard_bytes(keys, vectors), f"{(total or 0) * self._row_bytes() >> 20} MB in all")
                encoded += len(texts)
            bar.update(len(texts))
        bar.close()
        state.wait_for_everyone()
        if state.is_main_process:
            self._commit(number, count)
            speed = encoded / max(time.perf_counter() - started, 1e-9)
            logger.info(f"TeacherCache: {len(self) - before} new texts in {self.folder}, {speed:.0f} texts/s a process.")
        state.wait_for_everyone()
        self._load()
        return len(self) - before

    def _plan(self, columns: Iterable[Iterable[str]]) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        """Yield (texts, keys, rows) of each shard of new texts, in the order of their first occurrence."""
        size, seen = self._manifest["shard_size"], KeySet(self._keys)
        texts: list[str] = []
        keys, rows = np.empty(0, KEY), np.empty(0, np.int64)
        for window, window_keys, first_row in _windows(columns):
            new = seen.add(window_keys)
            texts += [window[i] for i in new]
            keys, rows = np.concatenate([keys, window_keys[new]]), np.concatenate([rows, new + first_row])
            while len(texts) >= size:
                yield texts[:size], keys[:size], rows[:size]
                texts, keys, rows = texts[size:], keys[size:], rows[size:]
        if texts:
            yield texts, keys, rows

    def _estimate(self, columns: Iterable[Iterable[str]], encode: Callable[[list[str], np.ndarray], Tensor]) -> int:
        """Say what is to come and return the number of new texts; refuse what the disk can't hold."""
        seen, total, sample, rows = KeySet(self._keys), 0, [], []
        for window, window_keys, first_row in _windows(columns):
            new = seen.add(window_keys)
            total += len(new)
            sample += [window[i] for i in new[:8]]  # some of every window, so that long and short texts count
            rows += [i + first_row for i in new[:8]]
        need = total * self._row_bytes()
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"TeacherCache: {total} texts need {need >> 20} MB in {self.folder}, but {free >> 20} MB are free. The build "
                "would stop half-way. Free space, or use another folder",
            )
        # Four batches' worth, so that they are sorted by length as a shard is; twice, for the first pass sets kernels up.
        step = max(len(sample) // 256, 1)
        sample, rows = sample[::step][:256], np.array(rows[::step][:256], dtype=np.int64)
        if total > 10 * len(sample) and process_state().is_main_process:
            encode(sample, rows)
            started = time.perf_counter()
            encode(sample, rows)
            minutes = (time.perf_counter() - started) * total / len(sample) / 60 / process_state().num_processes
            logger.info(f"TeacherCache: {total} new texts, {need >> 20} MB in {self.folder}, about {minutes:.1f} minutes.")
        return total

    def _row_bytes(self) -> int:
        return self.dim * self._dtype.itemsize + 2 * KEY.itemsize + 8

    def _commit(self, number: int, count: int) -> None:
        """Make the shards of one add part of the cache: index first, then the manifest, each in one rename."""
        for stale in self.folder.glob(f"add{number:04d}-*.safetensors"):
            if int(stale.stem.split("-")[1]) >= count:
                stale.unlink()
        add = []
        for i in range(count):
            file = f"add{number:04d}-{i:06d}.safetensors"
            header, _ = read_header(self.folder / file)
            add.append({"file": file, "rows": header["keys"]["shape"][0], "sha256": header["__metadata__"]["sha256"]})
        self._save([*self._manifest["adds"], add])

    def _save(self, adds: list[list[dict[str, Any]]]) -> None:
        old = self._index_name()
        self._manifest["adds"] = adds
        self._shards = [shard for add in adds for shard in add]
        if self._shards:
            keys = np.concatenate([read_tensor(self.folder / shard["file"], "keys").view(KEY)[:, 0] for shard in self._shards])
            order = np.argsort(keys, kind="stable")
            for suffix, values in ((".keys.npy", keys[order]), (".rows.npy", order.astype(np.int64))):
                write_whole(self.folder / f"{self._index_name()}{suffix}", npy_bytes(values))
        write_whole(self.folder / "manifest.json", json.dumps(self._manifest, indent=1).encode())
        if old != self._index_name():
            for stale in self.folder.glob(f"{old}.*.npy"):
                stale.unlink()
        self._load()

    def _drop_damaged(self) -> None:
        adds = [
            [shard for shard in add if is_whole(self.folder / shard["file"], shard["sha256"])] for add in self._manifest["adds"]
        ]
        lost = len(self._shards) - sum(map(len, adds))
        if lost:
            logger.warning(f"TeacherCache: {lost} shards in {self.folder} are damaged; their texts are encoded again.")
            self._save(adds)

    # Reading

    def require(self, texts: Iterable[str]) -> None:
        """Check that each text has a target and that every shard is as it was written.

        Raises:
            ValueError: If a text has none, or a shard is damaged: training would stop half-way, or learn noise.
        """
        for shard in range(len(self._shards)):
            self._verify(shard)
        for window, keys, first_row in _windows([texts]):
            found = find(self._keys, keys) >= 0
            if not found.all():
                row = int(np.argmin(found))
                raise ValueError(
                    f"TeacherCache: {self.folder} has no target for {int((~found).sum())} of the texts in rows {first_row} to "
                    f"{first_row + len(window) - 1}, the first in row {first_row + row}: {window[row]!r}. Call cache.add(...) "
                    "with the very texts that are trained on (cleaning them afterwards changes their key)."
                )

    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return the stored targets, [N, dim] float32, for N texts.

        Raises:
            KeyError: If a text has no target.
            ValueError: If a shard is damaged.
        """
        found = find(self._keys, keys_of(texts)) if len(texts) else np.empty(0, np.int64)
        if (found < 0).any():
            raise KeyError(f"TeacherCache: {self.folder} has no target for {texts[int(np.argmin(found))]!r}. Call cache.add.")
        rows = np.asarray(self._rows[found])
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        result = np.empty((len(texts), self.dim), np.float32)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            result[here] = self._vectors(int(shard))[rows[here] - self._starts[shard]]
        return torch.from_numpy(result)

    def blocks(self, texts: Iterable[str] | None = None) -> Iterator[Tensor]:
        """Yield targets a few thousand at a time, [n, dim] float32: of the given texts in order, else each one once."""
        if texts is not None:
            yield from super().blocks(texts)
            return
        for shard in range(len(self._shards)):
            yield torch.from_numpy(self._vectors(shard).astype(np.float32))

    def _vectors(self, shard: int) -> np.ndarray:
        # Mapped anew each time and let go at once: a kernel that maps a large folio around every touched page would soon
        # have the whole cache resident, and call it ours.
        self._verify(shard)
        return read_tensor(self.folder / self._shards[shard]["file"], "vectors")

    def _verify(self, shard: int) -> None:
        if shard in self._verified:
            return
        path = self.folder / self._shards[shard]["file"]
        if not is_whole(path, self._shards[shard]["sha256"]):
            raise ValueError(
                f"TeacherCache: shard {path} is damaged (its checksum is not the manifest's), expected what was written. The "
                "student would learn noise. Call cache.add(...) with the same texts: it is encoded again."
            )
        self._verified.add(shard)


def cache_folder(parent: str | Path, teacher: Teacher) -> Path:
    """Return a folder for this teacher with these settings: another prompt or precision gets another one."""
    digest = hashlib.sha256(json.dumps(teacher.fingerprint, sort_keys=True).encode()).hexdigest()
    return Path(parent) / f"{teacher.name.rsplit('/', 1)[-1]}-{digest[:12]}"


def _windows(columns: Iterable[Iterable[str]]) -> Iterator[tuple[list[str], np.ndarray, int]]:
    """Yield (texts, keys, row of the first) a few thousand texts at a time; rows count from 0 in each column."""
    for column in columns:
        texts, row = iter(column), 0
        while window := list(islice(texts, _WINDOW)):
            yield window, keys_of(window, row), row
            row += len(window)


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"TeacherCache: {folder} can't be written ({error.strerror}). Use a folder that is yours"
        ) from error
