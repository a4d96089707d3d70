# SPDX-License-Identifier: Apache-2.0
"""Words and their senses: similarity of words, words in context, and classification on frozen embeddings."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from ..data import load_texts, only_file


Encode = Callable[[list[str]], Any]
# Texts, and for each the characters [start, end) of a word in it -> the word's vectors [N, D].
EncodeWords = Callable[[list[str], list[tuple[int, int]]], Any]
# Texts -> (token states [N, T, D] of one kind or more, as they are or replaced, and at last the mask [N, T]).
TokenStates = Callable[[list[str]], tuple[torch.Tensor, ...]]


def word_similarity(senses: Callable[[str], Any], source: str | Path) -> dict[str, float]:
    """Return Spearman's correlation with human scores, times 100, on each set of word pairs, and their mean by pairs.

    Two words are as similar as their two closest senses: the highest cosine over all pairs of senses (MaxSim; Huang et al.
    2012). The code of Wang et al. 2025, https://huggingface.co/papers/2504.06036, takes the highest dot product.

    Args:
        senses: A word -> its senses, [k, D]; k is 0 for a word without. Pairs with such a word are left out.
        source: Table of word1, word2, score, set.

    Returns:
        words_<set>, words_avg (weighted by the pairs that were scored), words_known (share of pairs that were, times 100).

    Raises:
        ValueError: If a column is missing, or no pair has senses.
    """
    rows = load_texts(source)
    _require(rows, {"word1", "word2", "score", "set"}, source)
    unit: dict[str, np.ndarray] = {}
    for word in dict.fromkeys([*rows["word1"], *rows["word2"]]):
        vectors = np.asarray(senses(word), np.float64)
        unit[word] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    found: dict[str, list[tuple[float, float]]] = {}
    for first, second, score, name in zip(rows["word1"], rows["word2"], rows["score"], rows["set"], strict=True):
        pairs = found.setdefault(name, [])
        if len(unit[first]) and len(unit[second]):
            pairs.append((float((unit[first] @ unit[second].T).max()), float(score)))
    scores = {f"words_{name}": 100 * float(scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic)
              for name, pairs in found.items() if len(pairs) > 2}  # fmt: skip
    known = {name: len(pairs) for name, pairs in found.items() if f"words_{name}" in scores}
    if not known:
        raise ValueError(f"word_similarity: no pair of {source} has senses on both sides. Is it another language?")
    average = sum(scores[f"words_{name}"] * count for name, count in known.items()) / sum(known.values())
    return {**scores, "words_avg": average, "words_known": 100 * sum(known.values()) / len(rows)}


class WiCEvaluator:
    """Accuracy, times 100, of telling whether a word means the same in two sentences: a threshold on the cosine.

    Source: Pilehvar and Camacho-Collados 2019, https://huggingface.co/papers/1808.09121. The threshold is the one of highest
    accuracy on the tuning split, never on the test.

    Args:
        source: Folder with the splits: word, sentence1, sentence2, index1, index2 (places of the word among those that spaces
            separate), label, and from_wordnet, if it says how many of the two are WordNet's examples.
        tune: Split that the threshold is chosen on.
        test: Split that is scored.

    Raises:
        ValueError: If a column is missing.
    """

    def __init__(self, source: str | Path, tune: str = "train", test: str = "test") -> None:
        self.splits = {}
        for split in (tune, test):
            rows = load_texts(only_file(Path(source), split, "WiCEvaluator"))
            _require(rows, {"sentence1", "sentence2", "index1", "index2", "label"}, source)
            self.splits[split] = rows
        self.tune, self.test = tune, test

    def texts(self) -> list[str]:
        """Return every distinct sentence of both splits: what the leak check compares with."""
        return list(dict.fromkeys(text for rows in self.splits.values() for side in (1, 2) for text in rows[f"sentence{side}"]))

    def __call__(self, encode_words: EncodeWords) -> dict[str, float]:
        """Return {"wic": accuracy, "wic_new": that of pairs without a sentence of WordNet, where the set says it}.

        Args:
            encode_words: Texts and the place of a word in each -> [N, D].
        """
        cosines = {split: _cosines(encode_words, rows) for split, rows in self.splits.items()}
        labels = {split: np.asarray(rows["label"]) > 0 for split, rows in self.splits.items()}
        threshold = best_threshold(cosines[self.tune], labels[self.tune])
        right = (cosines[self.test] >= threshold) == labels[self.test]
        scores = {"wic": 100 * float(right.mean())}
        if "from_wordnet" in self.splits[self.test].column_names:
            new = np.asarray(self.splits[self.test]["from_wordnet"]) == 0
            if new.any():
                scores["wic_new"] = 100 * float(right[new].mean())
        return scores


def best_threshold(values: np.ndarray, labels: np.ndarray) -> float:
    """Return the value from which on True gives the highest accuracy; half-way between two neighbours."""
    order = np.argsort(values)
    ranked, known = values[order], labels[order]
    # With the threshold before place i, everything from i on is called True.
    right = np.append(np.cumsum(known[::-1])[::-1], 0) + np.append(0, np.cumsum(~known))
    distinct = np.append(np.append(True, ranked[1:] > ranked[:-1]), True)
    place = int(np.where(distinct, right, -1).argmax())
    if place == 0:
        return float(ranked[0])
    return float(ranked[-1] + 1) if place == len(ranked) else float((ranked[place - 1] + ranked[place]) / 2)


class ClassificationEvaluator:
    """Accuracy, times 100, of a logistic regression on frozen embeddings, with few labels and with all.

    Few: so many training texts a label, the mean of several random draws, as MTEB does (Muennighoff et al. 2022,
    https://huggingface.co/papers/2210.07316).

    Args:
        source: Folder with <name>-train and <name>-test: text, label.
        name: Of the set.
        test: Split that is scored: "test", or "dev" to choose on; without <name>-dev, a tenth of the training texts are that.
        shots: Texts a label.
        draws: Random draws.
        full: Whether to train on all, too; if not, only the drawn training texts are encoded.

    Raises:
        ValueError: If a column is missing.
    """

    def __init__(
        self,
        source: str | Path,
        name: str,
        test: str = "test",
        shots: int = 8,
        draws: int = 10,
        full: bool = True,
    ) -> None:
        self.name, self.shots, self.draws, self.full = name, shots, draws, full
        self.train = load_texts(only_file(Path(source), f"{name}-train", "ClassificationEvaluator"))
        if test == "dev" and not any(Path(source).glob(f"{name}-dev.*")):
            self.train, self.test = self.train.train_test_split(0.1, seed=0).values()
        else:
            self.test = load_texts(only_file(Path(source), f"{name}-{test}", "ClassificationEvaluator"))
        for rows in (self.train, self.test):
            _require(rows, {"text", "label"}, source)

    def texts(self) -> list[str]:
        """Return the distinct texts of the test: what the leak check compares with."""
        return list(dict.fromkeys(self.test["text"]))

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Return {"<name>_few": accuracy, "<name>_few_std": over draws}, and with `full` {"<name>_full": accuracy}."""
        from sklearn.linear_model import LogisticRegression

        known, wanted = (np.asarray(list(map(str, rows["label"]))) for rows in (self.train, self.test))
        drawn = []
        for draw in range(self.draws):
            order = np.random.default_rng(draw).permutation(len(known))
            drawn.append(np.concatenate([order[known[order] == label][: self.shots] for label in sorted(set(known))]))
        # Of a large set few texts are drawn: the others are read for the full score alone.
        read = np.arange(len(known)) if self.full else np.unique(np.concatenate(drawn))
        train = np.asarray(encode(list(self.train.select(read)["text"])), np.float32)
        test = np.asarray(encode(list(self.test["text"])), np.float32)

        def accuracy(places: np.ndarray) -> float:
            model = LogisticRegression(max_iter=1000).fit(train[np.searchsorted(read, places)], known[places])
            return 100 * float((model.predict(test) == wanted).mean())

        found = [accuracy(places) for places in drawn]
        scores = {f"{self.name}_few": float(np.mean(found)), f"{self.name}_few_std": float(np.std(found))}
        return scores | ({f"{self.name}_full": accuracy(np.arange(len(known)))} if self.full else {})


def _cosines(encode_words: EncodeWords, rows: Any) -> np.ndarray:
    sides = []
    for side in (1, 2):
        texts = list(rows[f"sentence{side}"])
        places = [word_place(text, index) for text, index in zip(texts, rows[f"index{side}"], strict=True)]
        vectors = np.asarray(encode_words(texts, places), np.float64)
        sides.append(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
    return (sides[0] * sides[1]).sum(1)


def word_place(text: str, index: int) -> tuple[int, int]:
    """Return the characters [start, end) of a word, by its place among those that single spaces separate."""
    words = text.split(" ")
    start = sum(len(word) + 1 for word in words[:index])
    return start, start + len(words[index])


def word_states(tokenizer: Any, states: TokenStates, batch_size: int = 64) -> EncodeWords:
    """Return a function: texts and the characters of a word in each -> the mean state of its tokens, [N, D].

    Args:
        tokenizer: A fast one.
        states: texts -> (token states [N, T, D], mask [N, T]).
        batch_size: Texts of one call.
    """

    def encode(texts: list[str], places: list[tuple[int, int]]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            hidden = states(batch)[0].float().cpu()
            spans = tokenizer(batch, return_offsets_mapping=True, truncation=True, max_length=hidden.shape[1])["offset_mapping"]
            for row, own, (first, last) in zip(hidden, spans, places[start : start + batch_size], strict=True):
                chosen = [i for i, (a, b) in enumerate(own) if max(a, first) < min(b, last)]
                # A word beyond the length limit has no state: the mean of the text stands for it.
                found.append((row[chosen] if chosen else row[: len(own)]).mean(0))
        return torch.stack(found).numpy()

    return encode


def _require(rows: Any, columns: set[str], source: str | Path) -> None:
    missing = columns - set(rows.column_names)
    if missing:
        raise ValueError(f"word_sense: {source} has the columns {rows.column_names}, but not {sorted(missing)}.")


def word_tokens(dictionary: Any, word: str) -> list[int]:
    """Return the tokens of a word inside a text: many tokenizers have others for one at its beginning, and rarely saw those."""
    forms = [dictionary.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]

    def seen(tokens: list[int]) -> int:
        return min(int(dictionary.counts[dictionary.offsets[i] : dictionary.offsets[i + 1]].sum()) for i in tokens)

    return max(filter(None, forms), key=lambda tokens: (-len(tokens), seen(tokens)))


def state_errors(states: TokenStates, teacher: TokenStates, texts: Sequence[str], batch_size: int = 32) -> list[float]:
    """Return how much of the variance of a teacher's token states each kind of states leaves unexplained, times 100.

    0 is the teacher's own, 100 what one vector leaves that stands for all tokens. Where senses alone leave more than a student
    does without them, replacing its states takes more from them than it brings.

    Args:
        states: texts -> (token states [N, T, D] of each kind, mask [N, T]).
        teacher: The same, of one kind.
        texts: Of no training.
        batch_size: Texts of one call.
    """
    wrong: list[torch.Tensor] = []
    number, total, squares = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        wanted, mask = teacher(batch)
        *kinds, _ = states(batch)
        read = mask.bool().cpu()
        real = wanted.cpu()[read].double()
        wrong.append(torch.stack([(kind.cpu()[read] - real).square().sum() for kind in kinds]))
        number, total, squares = number + len(real), total + real.sum(0), squares + real.square().sum()
    variance = squares - total.square().sum() / number
    return (100 * torch.stack(wrong).sum(0) / variance).tolist()


def sense_vectors(dictionary: Any, single: bool = False) -> Callable[[str], np.ndarray]:
    """Return a function: word -> its senses [k, D] by a `SenseDictionary`; of a word of several tokens, one, their mean.

    Args:
        dictionary: The dictionary.
        single: Take the mean of a token's senses, weighted by how often each occurs: what a dictionary of k = 1 holds.
    """

    def mean(token: int) -> np.ndarray:
        first, last = int(dictionary.offsets[token]), int(dictionary.offsets[token + 1])
        weights = dictionary.counts[first:last].double().cpu().numpy()
        return np.average(dictionary.senses[first:last].double().cpu().numpy(), axis=0, weights=weights)

    def senses(word: str) -> np.ndarray:
        tokens = word_tokens(dictionary, word)
        if any(not len(dictionary.of(token)) for token in tokens):
            return np.empty((0, dictionary.dim))
        if len(tokens) > 1 or single:
            return np.mean([mean(token) for token in tokens], axis=0)[None]
        return dictionary.of(tokens[0]).double().cpu().numpy()

    return senses


def sense_purity(source: Any, contexts: Sequence[tuple[str, str, Any]], draws: int = 20, seed: int = 42) -> dict[str, float]:
    """Return how far senses separate what lexicographers separate: the purity of senses in terms of definitions, times 100.

    Of the contexts that have one sense, the share that has its most frequent definition, over all words that are one token
    and have several definitions (purity: Manning, Raghavan and Schütze 2008, section 16.3). Few contexts a sense make purity
    high by themselves; purity_by_chance is that of the same senses dealt out to the word's contexts at random.

    Args:
        source: The `SenseTeacher` that chooses senses.
        contexts: (word, text that holds it, definition that it has there).
        draws: Random dealings.
        seed: Of them.

    Returns:
        purity, purity_by_chance, contexts (how many counted); nothing if none does.
    """
    tokens = {word: word_tokens(source.dictionary, word) for word, _, _ in contexts}
    rows = sorted((row for row in contexts if len(tokens[row[0]]) == 1), key=lambda row: len(row[1]))  # little padding
    found: dict[str, list[tuple[int, Any]]] = {}
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        states, ids, mask = source.teacher.read([text for _, text, _ in batch])
        _, chosen = source.dictionary.lookup(states, ids, mask, source.select)
        for place, (word, _, definition) in enumerate(batch):
            own = (ids[place] == tokens[word][0]) & (chosen[place] >= 0)
            if own.any():
                found.setdefault(word, []).append((int(chosen[place][own][0]), definition))
    words = [tuple(zip(*pairs, strict=True)) for pairs in found.values() if len({definition for _, definition in pairs}) > 1]
    total = sum(len(senses) for senses, _ in words)
    if not total:
        return {}

    def purity(dealt: list[tuple[Any, Any]]) -> float:
        right = 0
        for senses, definitions in dealt:
            together: dict[int, Counter] = {}
            for sense, definition in zip(senses, definitions, strict=True):
                together.setdefault(sense, Counter())[definition] += 1
            right += sum(max(counts.values()) for counts in together.values())
        return 100 * right / total

    random = np.random.default_rng(seed)
    chance = [
        purity([(random.permutation(senses).tolist(), definitions) for senses, definitions in words]) for _ in range(draws)
    ]
    return {"purity": purity(words), "purity_by_chance": float(np.mean(chance)), "contexts": total}


def statistics(dictionary: Any, texts: Sequence[str]) -> dict[str, float]:
    """Return what a dictionary costs and covers: MB (as saved), tokens with senses, senses, share of the texts' tokens without.

    Args:
        dictionary: The `SenseDictionary`.
        texts: Texts it was not made from.
    """
    ids = [i for row in dictionary.tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in row]
    number = dictionary.offsets.diff().cpu().numpy()
    missing = float((number[ids] == 0).mean()) if ids else 0.0
    size = 2 * dictionary.senses.numel() + 8 * (len(dictionary.offsets) + len(dictionary.counts))
    found: Mapping[str, float] = {"mb": size / 1e6, "tokens": int((number > 0).sum()), "senses": len(dictionary.senses)}
    return {**found, "without_sense": 100 * missing}
