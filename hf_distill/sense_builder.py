# SPDX-License-Identifier: Apache-2.0
"""Sense dictionaries made from any text: one pass of the teacher, a fair sample of each token's states, k-means."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from transformers.utils import logging

from .processes import process_state
from .senses import SenseDictionary
from .shards import KEY, KeySet, keys_of, read_tensor, write_whole
from .token_teacher import TokenTeacher


logger = logging.get_logger(__name__)
Rule = Callable[[np.ndarray], int]

_GPU_FROM = 1_000_000  # states times senses: faiss sets a GPU up anew for each token; the bound is a guess, not timed
_NUMBERS = 800_000  # texts of one file times the states' width: what a killed run loses at most


def build_senses(
    teacher: TokenTeacher,
    texts: Iterable[str],
    folder: str | Path,
    k: int | Rule = 50,
    cap: int = 1000,
    seed: int = 42,
    batch_size: int = 32,
) -> SenseDictionary:
    """Return the senses of every token that the texts hold: the centroids of its states under the teacher.

    Of each token at most `cap` occurrences are taken, those of smallest hash (of the text and the place in it), so the sample
    is fair and depends on neither the order of the texts nor the number of processes. The texts are read once; each process of
    a launch encodes its share of them, and clusters its share of the tokens. The folder keeps finished blocks: killed and
    called again, it goes on after them. Other processes make other batches, and states are then rounded otherwise: with a
    teacher in float32 senses differ by less than 2e-3; in bfloat16 k-means may end elsewhere.

    Memory of a process: 16 bytes a text, about 80 bytes for each occurrence that was ever kept, the states of a group of tokens
    (256 MB), those of one block (at most 5 MB times the tokens of its longest text), and at the end four times the dictionary
    as it is saved; disk: 2 D + 12 bytes for each occurrence that was ever kept, and the senses.

    Args:
        teacher: Whose states.
        texts: Any iterable; equal ones count once.
        folder: Where blocks are kept while it is made.
        k: Senses a token; or a rule, states [n, D] -> k (`markov_senses`), a function with a name of its own: what is kept in
            the folder is found again by it. A token with no more distinct states keeps them raw.
        cap: Occurrences a token at most.
        seed: Of k-means.
        batch_size: Texts of one teacher batch.

    Raises:
        ImportError: If faiss is not installed.
        ValueError: If k or cap is not positive, k is larger than cap, a rule has no name, there is no text, or a state does not
            fit float16.
    """
    if importlib.util.find_spec("faiss") is None:
        raise ImportError("Sense dictionaries need faiss. Install it with: pip install 'hf_distill[retrieval]'")
    if cap < 1 or (isinstance(k, int) and not 1 <= k <= cap):
        raise ValueError(
            f"build_senses: k is {k}, cap {cap}, expected from 1 to cap senses. Without one a token can't be replaced, and of "
            "more than there are states of it none would be a centre."
        )
    rule = {"k": k} if isinstance(k, int) else {"rule": _name(k)}
    folder, size = Path(folder), len(teacher.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    paths, count, digest = _keep_states(teacher, texts, folder, cap, batch_size)
    taken = _merge(paths, cap)
    ids, senses, counts = _keep_senses(paths, taken, folder / f"senses-{_digest(digest, rule, seed)}", k, seed)
    order = np.argsort(ids, kind="stable")
    offsets = np.searchsorted(ids[order], np.arange(size + 1))
    facts = {"teacher": teacher.name, "revision": teacher.revision, "fingerprint": teacher.fingerprint, "layer": teacher.layer}
    facts |= {**rule, "cap": cap, "seed": seed, "texts": count, "occurrences": len(taken)}
    raw = _share_raw(taken[:, 0], k) if isinstance(k, int) and k < cap else 0.0  # of as many as the cap no more are known
    if raw > 0.9:
        logger.warning(
            f"build_senses: {raw:.0%} of the tokens occur no more than {k} times: their senses are single states, not what "
            "states have in common. Take more texts, or a smaller k."
        )
    tensors = (torch.from_numpy(values) for values in (senses[order], offsets, counts[order]))
    return SenseDictionary(*tensors, facts, teacher.tokenizer)


def _name(rule: Rule) -> str:
    """Return what a rule is found again by."""
    function, settings = (rule.func, [rule.args, rule.keywords]) if isinstance(rule, partial) else (rule, [])
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '<')}"
    if "<" in name:
        raise ValueError(
            f"build_senses: the rule for k is {rule!r}, expected a function of a module, or a partial of one: the folder keeps "
            "its senses under its name, and another rule without one would be given them. Define it outside functions."
        )
    return name + (f" {settings}" if settings else "")


def _share_raw(ids: np.ndarray, k: int) -> float:
    """Return the share of tokens with no more than k occurrences."""
    return float((np.unique(ids, return_counts=True)[1] <= k).mean())


def _keep_states(
    teacher: TokenTeacher, texts: Iterable[str], folder: Path, cap: int, batch_size: int
) -> tuple[list[Path], int, str]:
    """Return (the files of states, a block of texts each; how many texts; a digest of all that they depend on)."""
    sample, state = _Sample(len(teacher.tokenizer), cap), process_state()
    paths, count, digest = [], 0, _digest(teacher.fingerprint, cap, batch_size)
    seen = KeySet(np.empty(0, KEY))
    for number, (block, keys) in enumerate(_blocks(texts, max(1, _NUMBERS // teacher.dim))):
        count += len(seen.add(keys))
        # What a block keeps depends on those before it.
        digest = _digest(digest, keys.tobytes().hex())
        paths.append(folder / f"states-{digest}.safetensors")
        if number % state.num_processes == state.process_index:
            if not paths[-1].exists():
                found = _gather(teacher, block, sample, batch_size)
                write_whole(paths[-1], save(found))
            sample.add(read_tensor(paths[-1], "ids"), read_tensor(paths[-1], "hashes"))
            logger.info(f"build_senses: {count} texts read.")
    if not paths:
        raise ValueError("build_senses: there are no texts, expected some. No token would have a sense.")
    state.wait_for_everyone()
    return paths, count, digest


def _keep_senses(paths: list[Path], taken: np.ndarray, made: Path, k: int | Rule, seed: int) -> list[np.ndarray]:
    """Return [token of each sense [S], senses [S, D], counts [S]], in no order; each process clusters its share of tokens."""
    state = process_state()
    files = [Path(f"{made}-{rank}-of-{state.num_processes}.safetensors") for rank in range(state.num_processes)]
    if not files[state.process_index].exists():
        width = read_tensor(paths[0], "states").shape[1]
        empty = {"ids": np.empty(0, int), "senses": np.empty((0, width), np.float16), "counts": np.empty(0, int)}
        own = {name: [values] for name, values in empty.items()}
        for token, vectors in _by_token(paths, taken, state.process_index, state.num_processes):
            centroids, counts = _cluster(vectors, k, seed)
            own["ids"].append(np.full(len(centroids), token))
            own["senses"].append(centroids)
            own["counts"].append(counts)
        write_whole(files[state.process_index], save({name: np.concatenate(values) for name, values in own.items()}))
    state.wait_for_everyone()
    parts = [load_file(file) for file in files]
    state.wait_for_everyone()
    return [np.concatenate([part[name] for part in parts]) for name in ("ids", "senses", "counts")]


class _Sample:
    """The occurrences of smallest hash of each token, so far: ids and hashes, and what a new one must be under."""

    def __init__(self, size: int, cap: int) -> None:
        self.cap, self.bounds = cap, np.full(size, np.iinfo(np.uint64).max, np.uint64)
        self.ids, self.hashes = np.empty(0, np.int32), np.empty(0, np.uint64)
        self.new: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, hashes: np.ndarray) -> None:
        self.new.append((ids, hashes))
        # Sorted at every block, a large sample would be sorted thousands of times. Late bounds only keep some more for a while.
        if 4 * sum(len(more) for more, _ in self.new) < len(self.ids):
            return
        self.ids = np.concatenate([self.ids, *(more for more, _ in self.new)])
        self.hashes = np.concatenate([self.hashes, *(more for _, more in self.new)])
        self.new = []
        kept = _smallest(self.ids, self.hashes, self.cap)
        self.ids, self.hashes = self.ids[kept], self.hashes[kept]
        last = np.flatnonzero(np.append(self.ids[1:] != self.ids[:-1], True))
        full = np.diff(np.append(-1, last)) == self.cap
        self.bounds[self.ids[last[full]]] = self.hashes[last[full]]


def _smallest(ids: np.ndarray, hashes: np.ndarray, cap: int) -> np.ndarray:
    """Return places of each token's `cap` smallest hashes, by token and hash; equal ones once."""
    order = np.lexsort((hashes, ids))
    ids, hashes = ids[order], hashes[order]
    first = np.append(True, (ids[1:] != ids[:-1]) | (hashes[1:] != hashes[:-1]))
    order, ids = order[first], ids[first]
    rank = np.arange(len(ids)) - np.searchsorted(ids, ids)
    return order[rank < cap]


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _blocks(texts: Iterable[str], size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield (a block's distinct texts, their keys)."""
    rows, first = iter(texts), 0
    while block := list(islice(rows, size)):
        keys = dict(zip(block, keys_of(block, first), strict=True))
        yield list(keys), np.array(list(keys.values()), KEY)
        first += len(block)


def _gather(teacher: TokenTeacher, block: list[str], sample: _Sample, batch_size: int) -> dict[str, np.ndarray]:
    """Return ids, hashes and states [n, D] of the block's occurrences that may be among the smallest."""
    base = keys_of(block).view(np.uint64).reshape(len(block), 2)[:, 0]
    tokens = teacher.tokens(block)
    hashes = [_mix(key + np.arange(1, len(ids) + 1, dtype=np.uint64)) for key, ids in zip(base, tokens, strict=True)]
    kept = [(numbers < sample.bounds[ids]) for ids, numbers in zip(tokens, hashes, strict=True)]
    wanted = [row for row, mask in enumerate(kept) if mask.any()]
    wanted.sort(key=lambda row: (-len(tokens[row]), row))  # batches of similar length, the same on every run
    ids, numbers, vectors = [], [], []
    for start in range(0, len(wanted), batch_size):
        rows = wanted[start : start + batch_size]
        states = teacher.states([block[row] for row in rows])[0].half().cpu()
        for row, found in zip(rows, states, strict=True):
            mask = kept[row]
            ids.append(tokens[row][mask])
            numbers.append(hashes[row][mask])
            vectors.append(found[: len(mask)][torch.from_numpy(mask)].numpy())
            if not np.isfinite(vectors[-1]).all():
                raise ValueError(
                    f"build_senses: a state of {block[row][:60]!r} is not finite in float16, expected numbers below 65504. Its "
                    "token would have no sense that can be saved. Take another layer."
                )
    if not ids:
        return {
            "ids": np.empty(0, np.int32),
            "hashes": np.empty(0, np.uint64),
            "states": np.empty((0, teacher.dim), np.float16),
        }
    return {"ids": np.concatenate(ids), "hashes": np.concatenate(numbers), "states": np.concatenate(vectors)}


def _mix(values: np.ndarray) -> np.ndarray:
    """Return the 64-bit numbers scattered (splitmix64's finaliser, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _merge(paths: list[Path], cap: int) -> np.ndarray:
    """Return [n, 3]: token, file and row of the occurrences that are taken, by token and hash."""
    ids, hashes, files, rows = [], [], [], []
    for number, path in enumerate(paths):
        ids.append(read_tensor(path, "ids"))
        hashes.append(read_tensor(path, "hashes"))
        files.append(np.full(len(ids[-1]), number))
        rows.append(np.arange(len(ids[-1])))
    ids, hashes, files, rows = map(np.concatenate, (ids, hashes, files, rows))
    kept = _smallest(ids, hashes, cap)
    return np.stack([ids[kept], files[kept], rows[kept]], axis=1)


def _by_token(paths: list[Path], whole: np.ndarray, rank: int, world: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (token, its states [n, D] float32) for this process's tokens, a group of tokens in memory at a time."""
    mine = whole[whole[:, 0] % world == rank]
    if not len(mine):
        return
    width = read_tensor(paths[int(mine[0, 1])], "states").shape[1]
    room = max(1, (256 << 20) // (4 * width))
    starts = np.flatnonzero(np.append(True, mine[1:, 0] != mine[:-1, 0]))
    ends = np.append(starts[1:], len(mine))
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + room, side="right")))
        group = mine[starts[first] : ends[last - 1]]
        vectors = np.empty((len(group), width), np.float32)
        for file in np.unique(group[:, 1]):
            here = group[:, 1] == file
            vectors[here] = read_tensor(paths[int(file)], "states")[group[here, 2]]
        for place in range(first, last):
            low, high = starts[place] - starts[first], ends[place] - starts[first]
            yield int(mine[starts[place], 0]), vectors[low:high]
        first = last


def _cluster(vectors: np.ndarray, k: int | Rule, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (centroids [k, D], how many states are closest to each); of no more distinct states than k, these themselves."""
    import faiss

    wanted = k if isinstance(k, int) else max(1, int(k(vectors)))
    if len({row.tobytes() for row in vectors}) <= wanted:
        distinct, counts = np.unique(vectors, axis=0, return_counts=True)
        return distinct.astype(np.float16), counts
    large = len(vectors) * wanted >= _GPU_FROM and torch.cuda.is_available()
    kmeans = faiss.Kmeans(
        vectors.shape[1], wanted, seed=seed, niter=25, min_points_per_centroid=1, max_points_per_centroid=len(vectors),
        gpu=large and "get_num_gpus" in dir(faiss) and faiss.get_num_gpus() > 0,
    )  # fmt: skip
    kmeans.train(vectors)
    _, closest = kmeans.index.search(vectors, 1)
    return kmeans.centroids.astype(np.float16), np.bincount(closest[:, 0], minlength=wanted)


def markov_senses(states: np.ndarray, few: int = 5, at_most: int = 2000, **settings: Any) -> int:
    """Return k for a token's states by the paper's rule: of M clusters that `markov_clusters` finds 0.1 M, or 0.4 M above 900.

    Source: the code of Wang et al. 2025, https://huggingface.co/papers/2504.06036. Quadratic in n, dense: for small inputs.

    Args:
        states: [n, D].
        few: k at least; a token with fewer states keeps them.
        at_most: States beyond it are left out.
        **settings: Of `markov_clusters`.
    """
    if len(states) < few:
        return few
    clusters = markov_clusters(states[:at_most], **settings)
    return max(few, int((0.1 if clusters <= 900 else 0.4) * clusters))


def markov_clusters(states: np.ndarray, inflation: float = 1.65, expansion: int = 2, steps: int = 100) -> int:
    """Return how many clusters Markov clustering (van Dongen 2000) finds, with similarities 1 / (distance + 0.01).

    Args:
        states: [n, D].
        inflation: Power that entries are raised to.
        expansion: Power of the matrix.
        steps: Most iterations.
    """
    states = np.asarray(states, np.float64)
    squares = (states**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * states @ states.T, 0))
    flow = 1 / (distances + 0.01)
    np.fill_diagonal(flow, 1.0)  # the loops that the paper's library puts there
    flow /= flow.sum(0)
    for _ in range(steps):
        before = flow
        flow = np.linalg.matrix_power(flow, expansion) ** inflation
        flow /= flow.sum(0)
        flow = np.where(flow < 1e-5, 0.0, flow)
        flow /= flow.sum(0)
        if np.abs(flow - before).max() < 1e-8:
            break
    return len({tuple(np.flatnonzero(row)) for row in flow if row.any()})
