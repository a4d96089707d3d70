# SPDX-License-Identifier: Apache-2.0
"""Text data: loading, the column contract, the leak check."""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets, load_dataset
from transformers.utils import logging


logger = logging.get_logger(__name__)

RESERVED_COLUMNS = ("label", "labels", "score", "scores", "language")
_READERS = {
    # quoting=3: a quotation mark is a character like any other. keep_default_na: "null" and "NA" are words, not gaps.
    "tsv": ("csv", {"delimiter": "\t", "quoting": 3, "keep_default_na": False}),
    "csv": ("csv", {"keep_default_na": False}),
    "jsonl": ("json", {}),
    "json": ("json", {}),
    "parquet": ("parquet", {}),
    "txt": ("text", {}),
}


def load_texts(source: str | Path, subset: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """Load a data set: a tsv/csv/jsonl/parquet/txt file (gz too), a folder of one kind of these, or a Hub id.

    Args:
        source: The file, folder or Hub id.
        subset: Configuration of a Hub data set.
        split: Split of a Hub data set.
        streaming: Return an `IterableDataset`.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository.
    """
    path = Path(source)
    if path.exists():
        files = sorted(p for p in path.iterdir() if _kind(p)) if path.is_dir() else [path]
        kinds = {_kind(p) for p in files}
        if len(kinds) != 1 or None in kinds:
            raise FileNotFoundError(
                f"load_texts: {path} holds files of {len(kinds)} kinds {sorted(map(str, kinds))}, expected one of "
                f"{sorted(_READERS)} (or with .gz). Name one file."
            )
        reader, options = _READERS[kinds.pop()]
        return load_dataset(reader, data_files=[str(p) for p in files], split="train", streaming=streaming, **options)
    try:
        return load_dataset(str(source), subset, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"load_texts: {source} is neither a file or folder here nor a data set that can be had from the Hub now "
            f"(split {split!r}). Check the spelling; without network, fetch it first: `hf download --repo-type dataset "
            f"{source}`. ({type(error).__name__}: {error})"
        ) from error


def split_source(name: str) -> tuple[str, list[str] | None]:
    """Return (data set, text columns) of "data set:a,b"; a colon that belongs to a path is left alone."""
    source, colon, columns = name.rpartition(":")
    return (source, columns.split(",")) if colon and not Path(name).exists() else (name, None)


def split_language(name: str) -> tuple[str, str]:
    """Return (language, data set) of "deu=data set"; "" for none. An equals sign that belongs to a path is left alone."""
    code, equals, source = name.partition("=")
    return (code, source) if equals and not Path(split_source(name)[0]).exists() else ("", name)


def join_texts(datasets: Iterable[tuple[Dataset, list[str] | None]]) -> Dataset:
    """Return every distinct text of several data sets, one below the other, as {"text": ...}; held in memory.

    Args:
        datasets: (data set, its text columns; None for all but label and score).
    """
    texts: dict[str, None] = {}
    for dataset, names in datasets:
        columns = text_columns(dataset, names)
        require_texts(dataset, columns)
        for column in columns:
            texts |= dict.fromkeys(text.strip() for text in dataset[column])
    return Dataset.from_dict({"text": list(texts)})


def mix_languages(
    parts: Mapping[str, Any], temperature: float = 1.0, seed: int = 42, sizes: Mapping[str, int] | None = None
) -> Any:
    """Return the rows of several languages as one data set, with a column `language`, the small ones more often.

    A language of n rows gets a share proportional to n^(1 / temperature): 1 leaves them as they are, a large one makes all
    equal. The largest keeps each row once; of the others rows are repeated, each as often as any other, give or take one.

    Source: the temperature sampling of multilingual models, as in XLM-R, Conneau et al. 2019,
    https://huggingface.co/papers/1911.02116, where the exponent is called alpha.

    Args:
        parts: Language -> data set; all of them `Dataset`, or all streams, which are interleaved at random by their shares.
        temperature: 1 or more.
        seed: Of which rows are repeated once more, and of the interleaving.
        sizes: Rows of each stream.

    Raises:
        ValueError: If the temperature is below 1 (rows would be thrown away), or streams come without sizes.
    """
    streams = [code for code, part in parts.items() if isinstance(part, datasets.IterableDataset)]
    if temperature < 1 or (streams and not sizes):
        raise ValueError(
            f"mix_languages: temperature is {temperature}, sizes of the streams {sizes}, expected 1 or more, and how many rows "
            "each stream has. Shares would be unknown, or rows thrown away."
        )
    sizes = {code: sizes[code] if streams else len(part) for code, part in parts.items()}
    most = max(sizes.values())
    wanted = {code: round(most * (size / most) ** (1 / temperature)) for code, size in sizes.items()}
    if streams:
        total = sum(wanted.values())
        named = [part.map(lambda row, code=code: {**row, "language": code}) for code, part in parts.items()]
        shares = [wanted[code] / total for code in parts]
        return interleave_datasets(named, shares, seed, stopping_strategy="all_exhausted")
    rng, mixed = np.random.default_rng(seed), []
    for code, part in parts.items():
        whole, rest = divmod(wanted[code], len(part))
        rows = np.concatenate([np.tile(np.arange(len(part)), whole), rng.permutation(len(part))[:rest]])
        mixed.append(part.select(rows).add_column("language", [code] * len(rows)))
    return concatenate_datasets(mixed)


def _kind(path: Path) -> str | None:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    return kind if kind in _READERS else None


def only_file(folder: Path, stem: str, who: str) -> Path:
    """Return the file of a folder with this stem, whatever its kind.

    Args:
        folder: Of tests, a file each.
        stem: "sts12" for sts12.tsv.gz.
        who: Asks for it, as errors name it.

    Raises:
        FileNotFoundError: If there is none, or several: the mean of the others would be read as the mean of all.
    """
    found = sorted(path for path in folder.glob(f"{stem}.*") if path.is_file())
    if len(found) != 1:
        have = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"{who}: {len(found)} files {stem}.* in {folder} ({have}), expected one. A mean without it would be read as the "
            "mean of all sets. Add it, or leave one."
        )
    return found[0]


def text_columns(dataset: Any, names: list[str] | None = None) -> list[str]:
    """Return the text columns in order: those named, or all but `label`, `score` and `language`.

    Raises:
        ValueError: If a name is not a column, a column holds no text, or there is none.
    """
    have = list(dataset.column_names or next(iter(dataset)))
    for name in names or []:
        if name not in have:
            close = difflib.get_close_matches(name, have, 1)
            raise ValueError(
                f"texts: column {name!r} is not in the data set, expected one of {have}."
                + (f" Did you mean {close[0]!r}?" if close else "")
                + " Set text_columns, or, where a source is named, name:a,b."
            )
    columns = list(names) if names else [name for name in have if name not in RESERVED_COLUMNS]
    if not columns:
        raise ValueError(f"texts: the data set has only {have}, expected a text column.")
    for name in columns:
        dtype = getattr(dataset.features[name], "dtype", None) if dataset.features else "string"
        if dtype not in ("string", "large_string"):
            raise ValueError(
                f"texts: column {name!r} is of type {dataset.features[name]}, expected strings. Its values "
                "would be embedded as text. Name the text columns: --text_columns " + " ".join(c for c in columns if c != name)
            )
    return columns


def require_texts(dataset: Dataset, columns: list[str]) -> str:
    """Check every text of the columns; return a digest of them, by which two runs or processes see the same data.

    Raises:
        ValueError: If the data set is empty, or a text is empty or missing; the rows are named.
    """
    if len(dataset) == 0:
        raise ValueError("DistillationTrainer: the data set has no rows, expected texts to learn from.")
    digest = hashlib.sha256()
    for column in columns:
        wrong, row = [], 0
        for batch in dataset.select_columns([column]).iter(1000):
            wrong += [row + i for i, text in enumerate(batch[column]) if not is_text(text)]
            row += len(batch[column])
            digest.update("\0".join([*map(str, batch[column]), ""]).encode("utf-8", "surrogatepass"))
        refuse_rows(column, wrong)
    return digest.hexdigest()


def refuse_rows(column: str, wrong: list[int]) -> None:
    """Raise if some rows of a column hold no text.

    Raises:
        ValueError: If so; the rows are named.
    """
    if wrong:
        raise ValueError(
            f"DistillationTrainer: column {column!r} has {len(wrong)} empty or missing texts, in rows "
            f"{', '.join(map(str, wrong[:10]))}{' …' if len(wrong) > 10 else ''}, expected none. The student would learn "
            f"what the teacher says of nothing. Drop them: dataset.filter(lambda row: (row[{column!r}] or '').strip())."
        )


def is_text(value: Any) -> bool:
    """Return whether it is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())


def normal_form(text: str) -> str:
    """Return the text without case, punctuation and white space, unless nothing else is in it: what leaks are found by.

    Letters, numbers and marks stay: vowel signs and tones are marks in many scripts.
    """
    plain = text.casefold()
    if plain.isascii():
        return re.sub(r"[\W_]+", "", plain) or text.strip()
    plain = unicodedata.normalize("NFC", plain)
    return "".join(char for char in plain if unicodedata.category(char)[0] in "LMN") or text.strip()


def find_leaks(dataset: Dataset, columns: list[str], evaluation_texts: Iterable[str]) -> tuple[list[int], list[str]]:
    """Return (rows, texts) of a training set that stand in an evaluation set, case, punctuation and white space aside."""
    seen = {normal_form(text) for text in evaluation_texts} - {""}
    rows, texts = [], []
    batches = (zip(*(batch[column] for column in columns), strict=True) for batch in dataset.iter(1000))
    for row, values in enumerate(chain.from_iterable(batches)):
        leaked = [text for text in values if normal_form(text) in seen]
        if leaked:
            rows.append(row)
            texts += leaked
    return rows, texts


@dataclass
class TrainingTexts:
    """A data set cut for a run: rows to train on, and texts that fidelity is measured on.

    train: The rows. columns: Its text columns. held_out: Texts that no row holds. leaked: Texts left out because they
    stand in an evaluation set. rest: Rows that are neither trained on nor leaked: held out, or beyond max_texts.
    """

    train: Dataset
    columns: list[str]
    held_out: list[str]
    leaked: list[str]
    rest: Dataset

    @classmethod
    def split(
        cls,
        dataset: Dataset,
        columns: list[str] | None = None,
        held_out: int = 2000,
        max_texts: int | None = None,
        seed: int = 42,
        leaks_from: Iterable[str] = (),
    ) -> "TrainingTexts":
        """Check the texts, leave out leaks, hold some out.

        Args:
            dataset: Rows of texts.
            columns: Text columns; None for all but label and score.
            held_out: How many texts of the first column to hold out; at most a fifth of the rows.
            max_texts: Keep a random sample of so many rows.
            seed: Of the sample and of what is held out.
            leaks_from: Every text of the evaluation sets.

        Raises:
            ValueError: If a column, or a text, is not as it should be.
        """
        columns = text_columns(dataset, columns)
        require_texts(dataset, columns)
        rows, leaked = find_leaks(dataset, columns, leaks_from)
        order = np.random.default_rng(seed).permutation(len(dataset))  # one leak more leaves the rest where it is
        keep = order[~np.isin(order, rows)]
        count = min(held_out, len(keep) // 5)
        texts = list(dict.fromkeys(dataset.select(keep[:count])[columns[0]]))
        whole = dataset.select(keep).select_columns(columns)
        train = whole.select(range(count, len(whole)))
        rows, _ = find_leaks(train, columns, texts)  # a held-out text must not be trained on in another row
        keep = np.setdiff1d(np.arange(len(train)), rows)[:max_texts]
        rest = whole.select(np.setdiff1d(np.arange(len(whole)), keep + count))
        if leaked:
            logger.info(f"Leak check: {len(leaked)} training texts stand in an evaluation set; their rows are left out.")
        return cls(train.select(keep), columns, texts, leaked, rest)

    def extended(self, texts: list[str], leaks_from: Iterable[str] = ()) -> "TrainingTexts":
        """Return these with more rows, of one text column; texts that are held out, or in an evaluation set, are left out.

        Raises:
            ValueError: If there are several text columns: what belongs beside a new text is unknown.
        """
        if len(self.columns) != 1:
            raise ValueError(
                f"TrainingTexts: rows have the columns {self.columns}, expected one. A new text would have no partner. Name "
                "one text column."
            )
        more = Dataset.from_dict({self.columns[0]: texts}, features=self.train.features)
        rows, _ = find_leaks(more, self.columns, [*leaks_from, *self.held_out])
        more = more.select(np.setdiff1d(np.arange(len(more)), rows))
        return replace(self, train=concatenate_datasets([self.train, more]))

    def text_columns(self) -> list[Any]:
        """Return the text columns, each an iterable of known length."""
        return [self.train[column] for column in self.columns]

    def all(self) -> Iterator[str]:
        """Yield every training text, column after column."""
        return chain.from_iterable(self.text_columns())

    def corpus(self) -> Iterator[str]:
        """Yield every text there is, trained on or not: what a vocabulary is counted on."""
        return chain(self.all(), chain.from_iterable(self.rest[column] for column in self.columns))

    def facts(self, name: str | None) -> dict[str, Any]:
        """Return what results.json says of them; two runs on the same texts have the same digest."""
        return {
            "name": name,
            "rows": len(self.train),
            "columns": self.columns,
            "held_out": len(self.held_out),
            "leaked": len(self.leaked),
            "sha256": require_texts(self.train, self.columns),
        }
