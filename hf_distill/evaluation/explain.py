# SPDX-License-Identifier: Apache-2.0
"""A look into a sense dictionary: a word's senses, the contexts that each has, the words near it, and a map of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..token_teacher import SenseTeacher
from .plots import pyplot
from .tables import table
from .word_sense import word_tokens


_BATCH = 256  # texts that are looked through at a time
_WINDOW = 40  # characters of a context on each side of the word


@dataclass
class Explanation:
    """What `explain` found of a token.

    word: As asked for. rows: A sense each: its number, count, neighbours, contexts. states: [n, D], of the token in the texts.
    chosen: [n], the sense of each.
    """

    word: str
    rows: list[dict[str, Any]]
    states: np.ndarray
    chosen: np.ndarray

    def by_count(self) -> list[dict[str, Any]]:
        """Return the rows, those first that stand for most occurrences in the dictionary's texts, then in these."""
        return sorted(self.rows, key=lambda row: (-row["count"], -row["found"]))

    def table(self) -> str:
        """Return a line a sense as Markdown."""
        lines = {}
        for row in self.by_count():
            contexts = "; ".join(row["contexts"]).replace("|", "/")
            cells = {"counted": row["count"], "here": row["found"], "near": ", ".join(row["neighbours"]), "contexts": contexts}
            lines[f"{self.word} {row['sense']}"] = cells
        return table(lines, "sense")

    def draw(self, path: str | Path) -> None:
        """Draw the token's states in the texts on their first two principal axes, coloured by sense.

        Raises:
            ValueError: If the texts hold fewer than three.
        """
        if len(self.states) < 3:
            raise ValueError(f"explain: {self.word!r} occurs {len(self.states)} times in the texts, expected 3 for a map.")
        plt = pyplot()
        centred = self.states - self.states.mean(0)
        _, spread, axes_ = np.linalg.svd(centred, full_matrices=False)
        points, share = centred @ axes_[:2].T, spread**2 / (spread**2).sum()
        figure, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
        shown = sorted(set(self.chosen.tolist()), key=lambda sense: -(self.chosen == sense).sum())
        for place, sense in enumerate(shown):
            own, near = points[self.chosen == sense], self.rows[sense]["neighbours"][:3]
            label = f"{sense}: {', '.join(near)}" if place < 10 else None
            axes.scatter(*own.T, s=14, color=plt.get_cmap("tab20")(place % 20), label=label)
        axes.set(
            title=f"“{self.word}” in {len(points)} contexts, by sense",
            xlabel=f"first axis ({share[0]:.0%} of the variance)",
            ylabel=f"second axis ({share[1]:.0%})",
        )
        figure.legend(
            title="sense: near words", fontsize="x-small", title_fontsize="small", loc="outside lower center", ncols=2
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def explain(
    word: str,
    dictionary: Any,
    teacher: Any = None,
    texts: Iterable[str] = (),
    contexts: int = 3,
    neighbours: int = 5,
    most: int = 500,
    select: str | None = None,
) -> Explanation:
    """Return a word's senses, so that people can look before they trust: what stands near each, and where it occurs.

    Args:
        word: A single token of the dictionary.
        dictionary: The `SenseDictionary`.
        teacher: The `TokenTeacher` that it was made from; without it no contexts.
        texts: Where contexts are looked for, from the first on.
        contexts: How many a sense, those closest to it.
        neighbours: How many other tokens a sense, those with a sense of highest cosine.
        most: Occurrences that are looked at.
        select: How a sense is chosen; as the dictionary says if not given.

    Raises:
        ValueError: If the word is several tokens, or has no sense, or the teacher is another than the dictionary's.
    """
    tokens = word_tokens(dictionary, word)
    names = dictionary.tokenizer.convert_ids_to_tokens(tokens)
    if len(tokens) != 1 or not len(dictionary.of(tokens[0])):
        raise ValueError(
            f"explain: {word!r} is {names} to the dictionary's tokenizer"
            + (", and none of its texts had it" if len(tokens) == 1 else "")
            + ", expected one token that has senses. Senses belong to tokens: ask for one of these, or for another word."
        )
    token = tokens[0]
    senses, first = dictionary.of(token), int(dictionary.offsets[token])
    near = _near(dictionary, token, senses, neighbours)
    states, chosen, shown = [], [], []
    if teacher is not None:
        source = SenseTeacher(teacher, dictionary, select or dictionary.facts.get("select", "l2"))
        states, chosen, shown = _occurrences(token, source, texts, most)
    states = np.array(states, np.float32).reshape(-1, dictionary.dim)
    chosen = np.array(chosen, np.int64)
    rows = []
    for number, sense in enumerate(senses.cpu().numpy()):
        own = np.flatnonzero(chosen == number)
        closest = own[np.argsort(np.linalg.norm(states[own] - sense, axis=1), kind="stable")]
        found = list(dict.fromkeys(shown[place] for place in closest))[:contexts]
        row = {"sense": number, "count": int(dictionary.counts[first + number]), "found": len(own)}
        rows.append({**row, "neighbours": near[number], "contexts": found})
    return Explanation(word, rows, states, chosen)


def _near(dictionary: Any, token: int, senses: torch.Tensor, count: int) -> list[list[str]]:
    """Return for each sense [k, D] the tokens with the closest senses, the closest first."""
    number = dictionary.offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(number), device=number.device), number)
    unit = functional.normalize(senses, dim=-1)
    parts = dictionary.senses.split(1 << 16)  # a second, normalised dictionary may not fit
    cosines = torch.cat([unit @ functional.normalize(part.float(), dim=-1).T for part in parts], dim=1)
    special = set(dictionary.tokenizer.all_special_ids) | {token}
    found = []
    for row in cosines:
        ids = dict.fromkeys(i for i in owner[row.argsort(descending=True)[:2000]].tolist() if i not in special)
        found.append([dictionary.tokenizer.decode([i]).strip() for i in islice(ids, count)])
    return found


def _occurrences(token: int, source: SenseTeacher, texts: Iterable[str], most: int) -> tuple[list, list, list]:
    """Return (states, senses, contexts) of the token's first `most` occurrences."""
    states, chosen, shown = [], [], []
    rows = iter(texts)
    while len(states) < most and (block := list(islice(rows, _BATCH))):
        holding = [text for text, ids in zip(block, source.teacher.tokens(block), strict=True) if token in ids]
        for start in range(0, len(holding), 32):
            batch = holding[start : start + 32]
            found, ids, mask = source.teacher.read(batch)
            _, senses = source.dictionary.lookup(found, ids, mask, source.select)
            options = {"truncation": True, "max_length": source.teacher.max_length, "return_offsets_mapping": True}
            spans = source.teacher.tokenizer(batch, **options)["offset_mapping"]
            for row, place in torch.nonzero((ids == token) & mask.bool()).tolist():
                text, (first, last) = batch[row], spans[row][place]
                states.append(found[row, place].cpu().numpy())
                chosen.append(int(senses[row, place]))
                before, after = text[max(0, first - _WINDOW) : first], text[last : last + _WINDOW]
                shown.append(f"{before}[{text[first:last]}]{after}")
    return states[:most], chosen[:most], shown[:most]
