# SPDX-License-Identifier: Apache-2.0
"""The sense dictionary: for every token the vectors that it can stand for, and the replacement of token states by them.

This file is published beside a multi-sense student's weights, so it imports only torch, transformers and what transformers
itself requires. `sense_builder.py` makes dictionaries.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoTokenizer
from transformers.utils import cached_file


SELECTIONS = ("dot", "l2", "cos")
FILE = "senses.safetensors"
# Of candidates that are gathered at a time, [tokens, K, D], in training, too: on a GPU, 64 MB, and 128 in float32; on a CPU,
# about as many as its cache holds: out of memory it takes several times as long.
_NUMBERS, _NUMBERS_CPU = 1 << 25, 3 << 19
_PROBE = "A cat, the Über-ÄHNLICH café's 3.14 naïve CATS … 東京!"  # what normalisers and pre-tokenisers differ on


class SenseDictionary:
    """The senses of a vocabulary: rows offsets[v] to offsets[v + 1] are those of token v; a token may have none.

    Source: the sense dictionary of Wang et al. 2025, https://huggingface.co/papers/2504.06036: centroids of a token's
    contextual states in a teacher's last layer.

    It is no module: its tensors are in no checkpoint and are not sent round by DDP. They are held in the precision that they
    are published in, float16, once on each device that states lie on; what is computed with them, in float32.

    Args:
        senses: [S, D].
        offsets: [V + 1], from 0 to S, not falling.
        counts: [S], how many occurrences each sense stands for.
        facts: What it was made from: teacher, revision, layer, k, selection, ...
        tokenizer: The teacher's.

    Raises:
        ValueError: If the tensors do not fit each other, or a sense is not finite in float16.
    """

    def __init__(self, senses: Tensor, offsets: Tensor, counts: Tensor, facts: Mapping[str, Any], tokenizer: Any) -> None:
        senses = senses.half()
        whole = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(senses) and bool((offsets.diff() >= 0).all())
        if not whole or len(counts) != len(senses) or not torch.isfinite(senses).all():
            raise ValueError(
                f"SenseDictionary: {tuple(senses.shape)} senses (finite: {bool(torch.isfinite(senses).all())}), counts of "
                f"{len(counts)}, offsets {offsets[:1].tolist()} to {offsets[-1:].tolist()}, expected finite ones, a count for "
                "each, and offsets from 0 to their number. Tokens would get the senses of others. Build it again."
            )
        self.senses, self.offsets, self.counts = senses, offsets.long(), counts.long()
        self.facts, self.tokenizer = dict(facts), tokenizer
        self.most = max(1, int(self.offsets.diff().max()))
        self._placed: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def dim(self) -> int:
        """Length D of a sense."""
        return self.senses.shape[1]

    @cached_property
    def digest(self) -> str:
        """A digest of every sense, and of whose they are."""
        found = hashlib.sha256(self.offsets.cpu().numpy().tobytes())
        found.update(self.senses.cpu().numpy().tobytes())
        return found.hexdigest()[:20]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return (senses, offsets, squared lengths of the senses) on a device."""
        if device not in self._placed:
            senses = self.senses.to(device)
            squares = torch.cat([part.float().square().sum(-1) for part in senses.split(1 << 16)])
            self._placed[device] = (senses, self.offsets.to(device), squares)
        return self._placed[device]

    def of(self, token: int) -> Tensor:
        """Return the senses of a token, [k, D] float32; k may be 0."""
        return self.senses[self.offsets[token] : self.offsets[token + 1]].float()

    def without_special_tokens(self) -> "SenseDictionary":
        """Return it without senses of special tokens, such as [CLS] and [SEP], and of [UNK]: they keep their states.

        Such a token means nothing by itself; its state sums up the whole text, and few senses hold little of that. The released
        code leaves them out for DeBERTa, and not for language models.
        """
        number, special = self.offsets.diff(), torch.tensor(self.tokenizer.all_special_ids, dtype=torch.long)
        kept = torch.ones(len(number), dtype=torch.bool)
        kept[special] = False
        rows = kept.repeat_interleave(number)
        offsets = torch.cat([self.offsets[:1], (number * kept).cumsum(0)])
        facts = {**self.facts, "special_tokens": False}
        return SenseDictionary(self.senses[rows], offsets, self.counts[rows], facts, self.tokenizer)

    def known(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return which tokens have senses: a boolean tensor of the shape of ids; padding (mask 0) has none."""
        _, offsets, _ = self._on(ids.device)
        found = offsets[ids + 1] > offsets[ids]
        return found if mask is None else found & mask.bool()

    def all_scores(self, states: Tensor, ids: Tensor, mask: Tensor | None = None, select: str = "l2") -> Tensor:
        """Return how well each sense of each token fits its state, [N, T, K]; -inf where a token has no such sense.

        K is the most that any token has, so that scores of different batches can be put together.

        Args:
            states: [N, T, D], with gradient.
            ids: [N, T].
            mask: [N, T], 0 for padding.
            select: "l2" (minus the squared distance), "cos", or "dot" (the paper's code).

        Raises:
            ValueError: If the states are of another width, or there is no such selection.
        """
        if states.shape[-1] != self.dim or select not in SELECTIONS:
            raise ValueError(
                f"SenseDictionary: states of {states.shape[-1]} dimensions for senses of {self.dim}, selected by {select!r}, "
                f"expected as many, and one of {SELECTIONS}. Project the student's states to the teacher's width."
            )
        senses, offsets, squares = self._on(states.device)
        known = self.known(ids, mask)
        first = offsets[ids[known]]
        number, order = (offsets[ids[known] + 1] - first).sort()  # tokens of few senses beside each other: few are gathered
        rows, first = states[known].float()[order], first[order]
        size = max(1, (_NUMBERS_CPU if states.device.type == "cpu" else _NUMBERS) // (self.most * self.dim))

        def fit(part: Tensor, candidates: Tensor) -> Tensor:
            return _fit(part, functional.embedding(candidates, senses).float(), squares[candidates], select)

        # The gradient gathers a part's candidates again: kept, those of all parts would lie beside each other.
        apart = {"use_reentrant": False, "preserve_rng_state": False}
        fitting = []
        for part, begin, count in zip(rows.split(size), first.split(size), number.split(size), strict=True):
            place = torch.arange(int(count[-1:].sum()), device=ids.device)
            places = (begin[:, None] + place).clamp(max=len(senses) - 1)
            scores = recompute(fit, part, places, **apart) if rows.requires_grad else fit(part, places)
            scores = scores.masked_fill(place >= count[:, None], -torch.inf)
            fitting.append(functional.pad(scores, (0, self.most - len(place)), value=-torch.inf))
        found = torch.full((*ids.shape, self.most), -torch.inf, device=states.device)
        found[known] = torch.cat(fitting)[order.argsort()]
        return found

    def take(self, states: Tensor, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return (states with each replaced by the sense of highest score [N, T, D], which that is [N, T]).

        A token without senses keeps its state, and so does padding; their number is -1.

        Args:
            states: [N, T, D].
            ids: [N, T].
            scores: [N, T, K], of `all_scores`.
        """
        senses, offsets, _ = self._on(states.device)
        known = scores[..., 0] > -torch.inf
        chosen = torch.where(known, scores.argmax(-1), -1)
        replaced = states.clone()
        replaced[known] = senses[offsets[ids[known]] + chosen[known]].to(states.dtype)
        return replaced, chosen

    def lookup(self, states: Tensor, ids: Tensor, mask: Tensor | None = None, select: str = "l2") -> tuple[Tensor, Tensor]:
        """Return `take` of `all_scores`."""
        return self.take(states, ids, self.all_scores(states, ids, mask, select))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a repository of its own: senses.safetensors, with the facts as its metadata, the tokenizer, and a card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"senses": self.senses, "offsets": self.offsets, "counts": self.counts}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / FILE, metadata={"format": "pt", "facts": json.dumps(self.facts)})
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(self.card(), encoding="utf-8")

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Publish what `save_pretrained` writes in one commit, as a repository of its own; return the address of its page.

        It stays there as a branch named by its digest, too: students that name it find it when another takes its place.

        Args:
            name: Of the repository; it is made if there is none.
            **options: Of `hf_distill.hub.publish`: private, revision, token, message.

        Raises:
            ImportError: Where this file came with a student alone, without hf_distill.
        """
        try:  # the check of remote code looks past what is tried
            from hf_distill.hub import publish
        except ImportError as error:
            raise ImportError("SenseDictionary: to publish one takes hf_distill. Install it: pip install hf_distill") from error
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            address = publish(folder, name, **{"message": "Sense dictionary", **options})
            publish(folder, name, **{"message": "Sense dictionary", **options, "revision": self.digest})
            return address

    def card(self) -> str:
        """Return the card of its repository, made from the facts."""
        number = self.offsets.diff()
        teacher = str(self.facts.get("teacher"))
        data = ModelCardData(
            library_name="hf_distill",
            tags=["hf_distill", "sense-dictionary"],
            base_model=teacher if teacher.count("/") == 1 else None,
            license=self.facts.get("license"),
        )
        facts = "\n".join(f"| {key} | {value} |" for key, value in self.facts.items() if not isinstance(value, dict))
        return (
            f"---\n{data.to_yaml()}\n---\n\n# Senses of {teacher}\n\n"
            f"For {int((number > 0).sum())} of {len(number)} tokens, up to {int(number.max())} vectors of {self.dim} "
            "dimensions that stand for what the token means in different contexts: centroids of the teacher's states "
            "([paper](https://huggingface.co/papers/2504.06036)). A student that names this repository replaces each of its "
            "token states by one of them.\n\n"
            "```python\nfrom hf_distill.senses import SenseDictionary\n\n"
            'dictionary = SenseDictionary.from_pretrained("<this repository>")\n```\n\n'
            f"| made from | |\n|---|---|\n{facts}\n"
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub_options: Any) -> "SenseDictionary":
        """Open what `save_pretrained` wrote, from a folder or the Hub.

        Raises:
            OSError: If there is none, or no senses.safetensors in it (a pickle is never opened).
            ValueError: If the file is not a sense dictionary.
        """
        path = cached_file(str(name), FILE, **hub_options)
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "null"))
            if facts is None or {"senses", "offsets", "counts"} != set(file.keys()):
                raise ValueError(
                    f"SenseDictionary: {path} holds {sorted(file.keys())} and facts {facts}, expected senses, offsets, counts "
                    "and the facts that save_pretrained writes. Whose senses they are would be unknown."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        return cls(**tensors, facts=facts, tokenizer=AutoTokenizer.from_pretrained(name, **hub_options))


def require_same_tokens(tokenizer: Any, other: Any) -> None:
    """Raise if a student's tokenizer makes other tokens of a text than the teacher's.

    Args:
        tokenizer: The teacher's, or the dictionary's.
        other: The student's.

    Raises:
        ValueError: If so; the first token that differs is named. A token would be replaced by senses of another.
    """
    words, others = ({number: word for word, number in known.get_vocab().items()} for known in (tokenizer, other))
    differing = sorted(number for number in words.keys() | others.keys() if words.get(number) != others.get(number))
    if differing:
        first, whose = differing[0], "number tokens"
        have = f"{words.get(first)!r} and {others.get(first)!r} at {first}"
    else:
        ids, own = (known(_PROBE)["input_ids"] for known in (tokenizer, other))
        if ids == own:
            return
        place = next(i for i, pair in enumerate(zip_longest(ids, own)) if pair[0] != pair[1])
        pieces = [known.convert_ids_to_tokens(row[place : place + 1]) for known, row in ((tokenizer, ids), (other, own))]
        whose, have = f"cut {_PROBE!r}", f"{pieces[0]} and {pieces[1]} at place {place}"
    raise ValueError(
        f"SenseDictionary: the tokenizers of teacher and student {whose} differently: {have}, expected the same. A token would "
        "be replaced by the senses of another. Use a student of the teacher's own tokenizer, whole."
    )


def _fit(states: Tensor, candidates: Tensor, squares: Tensor, select: str) -> Tensor:
    """Return [M, K] of states [M, D], candidates [M, K, D] and their squared lengths [M, K]."""
    if select == "cos":
        states = functional.normalize(states, dim=-1)
    products = torch.einsum("md,mkd->mk", states, candidates)
    if select == "cos":
        return products / squares.sqrt().clamp(min=1e-12)
    if select == "l2":
        return 2 * products - squares - states.square().sum(-1, keepdim=True)
    return products
