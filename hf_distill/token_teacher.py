# SPDX-License-Identifier: Apache-2.0
"""Teachers of tokens: the states of an encoder's, or a language model's, layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from .senses import SELECTIONS, SenseDictionary
from .student import encode_sorted, load_safe, longest_input, pool
from .teachers import Teacher, fetch, fingerprint, has_fast_bf16, license_of, present


class TokenTeacher(Teacher):
    """A frozen model whose token states are the targets: any `AutoModel`, encoder or causal language model.

    Its vectors, as a plain teacher's (`encode`), are the means over real tokens, of unit length. As targets it gives the
    states themselves, [B, C, T, dim], zeros for padding; they are not cached.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        layer: Whose states, as `hidden_states` counts them: -1 is the last, 0 the embeddings.
        max_length: Longest input in tokens.
        bidirectional: Let a causal model see both sides (`config.is_causal` False), as LLM2Vec does; it should have been
            trained for that.
        dtype: torch dtype or its name; None for bfloat16 where the device computes it natively, else float32.
        device: None for a GPU where there is one.
        **load_options: Whatever else `AutoModel.from_pretrained` takes.

    Raises:
        OSError: If there is no such model, or only pickled weights.
        ValueError: If weights are missing, or there is no such layer: states would be random, or others than asked for.
    """

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        layer: int = -1,
        max_length: int | None = None,
        bidirectional: bool = False,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        **load_options: Any,
    ) -> None:
        self.name = Path(name).name if Path(name).is_dir() else str(name)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.dtype = dtype or (torch.bfloat16 if has_fast_bf16(self.device) else torch.float32)
        folder = fetch(name, revision)
        self.revision = folder.name if folder.parent.name == "snapshots" else None
        self.license = license_of(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"  # places are counted from the first token
        if bidirectional:
            load_options["config"] = AutoConfig.from_pretrained(folder)
            load_options["config"].is_causal = False
        options = {"dtype": self.dtype, "output_loading_info": True, **load_options}
        self.model, info = load_safe(AutoModel, folder, **options)
        lost = [key for key in info["missing_keys"] if "pooler." not in key]
        total = self.model.config.num_hidden_layers
        if lost or not -total - 1 <= layer <= total:
            raise ValueError(
                f"TokenTeacher: {name} lacks {len(lost)} weights ({lost[:1]}), layer is {layer} of {total}, expected a whole "
                f"checkpoint and a layer from {-total - 1} to {total}. States would be random, or others than asked for."
            )
        self.layer, self.bidirectional, self._absent = layer, bidirectional, info["missing_keys"]
        self.max_length = longest_input(self.model, self.tokenizer, max_length)
        self.model.to(self.device).eval().requires_grad_(False)
        if bidirectional and not _reads_on(self.model):
            raise ValueError(
                f"TokenTeacher: {name} ({type(self.model).__name__}) reads from left to right although bidirectional is True, "
                "expected states that depend on what follows. Senses would be those of half a text. Leave it out."
            )
        self.dim = self.model.config.hidden_size
        self._fingerprint: dict[str, Any] | None = None

    @property
    def num_parameters(self) -> int:
        """How many weights a state runs through, embedding tables included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes a state: a digest of weights and tokenizer, and each setting."""
        if self._fingerprint is None:
            settings = {"layer": self.layer, "bidirectional": self.bidirectional}
            self._fingerprint = fingerprint(self, [present(self.model.state_dict(), self._absent)], **settings)
        return self._fingerprint

    def tokens(self, texts: list[str]) -> list[Any]:
        """Return the ids of each text, as its states are counted: numpy, [T] each."""
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return [np.array(row, np.int32) for row in ids]

    @torch.no_grad()
    def read(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (states [N, T, dim] float32, ids [N, T], mask [N, T]) of one batch, on the teacher's device."""
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        inputs = self.tokenizer(texts, **options).to(self.device)
        if self.layer in (-1, self.model.config.num_hidden_layers):
            states = self.model(**inputs).last_hidden_state
        else:
            states = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
        return states.float(), inputs["input_ids"], inputs["attention_mask"]

    def states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return (states [N, T, dim], float32; mask [N, T]) of one batch."""
        states, _, mask = self.read(texts)
        return states, mask

    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return the mean states of unit length, [N, dim]."""

        def embed(batch: list[str]) -> Tensor:
            return nn.functional.normalize(pool(*self.states(batch), "mean"), dim=-1)

        vectors = encode_sorted(embed, texts, batch_size, show_progress_bar)
        return vectors if len(vectors) else torch.empty(0, self.dim)

    def targets(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """Return the states of rows of texts, [B, C, T, dim], zeros for padding."""
        states, mask = self.states([text for row in rows for text in row])
        states = states * mask.unsqueeze(-1)
        return states.reshape(len(rows), -1, *states.shape[1:]).cpu()  # as every target: the loader may pin it


@torch.no_grad()
def _reads_on(model: Any) -> bool:
    """Return whether the state of a token depends on the tokens behind it; some models have a mask of their own."""
    ids = torch.arange(10, 13, device=model.device).repeat(2, 1) % model.config.vocab_size
    ids[1, -1] = (ids[1, -1] + 1) % model.config.vocab_size
    first = model(input_ids=ids).last_hidden_state[:, 0].float()
    return not torch.allclose(*first, rtol=1e-4, atol=1e-6)


class SenseTeacher(Teacher):
    """Which sense of its token each state of a teacher has: numbers small enough to cache.

    As a plain teacher its "vectors" are the senses of a text's tokens in order, -1 for a token without senses and behind the
    end, so `TeacherCache(SenseTeacher(...))` keeps them, `dim` numbers a text: the teacher's max_length.

    Args:
        teacher: Whose states.
        dictionary: The `SenseDictionary` made from it.
        select: How a sense is chosen: "l2" (the nearest sense; best on dev), "cos", or "dot" (the paper's code).
        beside: What else a live teacher gives: "sense_scores" (for soft targets), "states" (for `StateLoss`).

    Raises:
        ValueError: If the dictionary was made from another teacher, or the choices of a token do not fit a cache's float16.
    """

    def __init__(
        self, teacher: TokenTeacher, dictionary: SenseDictionary, select: str = "l2", beside: Sequence[str] = ()
    ) -> None:
        made = dictionary.facts.get("fingerprint")
        most = int(dictionary.offsets.diff().max())
        if made != teacher.fingerprint or most > 2048 or set(beside) - {"sense_scores", "states"} or select not in SELECTIONS:
            raise ValueError(
                f"SenseTeacher: the dictionary was made from {made}, with up to {most} senses a token, the teacher is "
                f"{teacher.fingerprint}, select is {select!r}, beside {list(beside)}, expected one teacher, at most 2048 "
                f"senses, one of {SELECTIONS}, and some of sense_scores, states. Its states would be given senses of another."
            )
        self.teacher, self.dictionary, self.select, self.beside = teacher, dictionary, select, tuple(beside)
        self.name, self.dim, self.num_parameters = teacher.name, teacher.max_length, teacher.num_parameters
        self.revision, self.license = teacher.revision, teacher.license

    @property
    def live(self) -> Teacher | None:
        """That of the teacher behind."""
        return self.teacher.live

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the teacher, the dictionary's digest, and the selection."""
        return {**self.teacher.fingerprint, "dictionary": self.dictionary.digest, "select": self.select}

    def states(self, batch: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (the teacher's states [N, T, D], these with each replaced by its sense, mask [N, T]) of one batch."""
        states, ids, mask = self.teacher.read(batch)
        return states, self.dictionary.lookup(states, ids, mask, self.select)[0], mask

    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return the senses of each text's tokens, [N, dim], whole numbers as float32; -1 for none."""

        def embed(batch: list[str]) -> Tensor:
            states, ids, mask = self.teacher.read(batch)
            _, chosen = self.dictionary.lookup(states, ids, mask, self.select)
            return nn.functional.pad(chosen.float(), (0, self.dim - chosen.shape[1]), value=-1.0)

        vectors = encode_sorted(embed, texts, batch_size, show_progress_bar)
        return vectors if len(vectors) else torch.empty(0, self.dim)

    def targets(self, rows: Sequence[Sequence[str]]) -> Any:
        """Return the senses of rows of texts, [B, C, dim]; with more beside them, {"senses": [B, C, T], ...}."""
        texts = [text for row in rows for text in row]
        if not self.beside:
            return super().targets(rows)
        states, ids, mask = self.teacher.read(texts)
        scores = self.dictionary.all_scores(states, ids, mask, self.select)
        found = {"senses": self.dictionary.take(states, ids, scores)[1]}
        if "sense_scores" in self.beside:
            found["sense_scores"] = scores
        if "states" in self.beside:
            found["states"] = states * mask.unsqueeze(-1)
        return {name: value.reshape(len(rows), -1, *value.shape[1:]).cpu() for name, value in found.items()}
