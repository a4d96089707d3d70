# SPDX-License-Identifier: Apache-2.0
"""Teachers: whatever maps texts to target vectors. Live, cached and projected teachers share one interface."""

import copy
import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from .licenses import strictest

# student.py travels to the Hub as one file, so the formulas that both sides need live there.
from .student import encode_sorted, load_safe, longest_input, pool
from .teacher_layout import SIDES, load_dense, read_layout


logger = logging.get_logger(__name__)


class Teacher(ABC):
    """What gives a target vector for every text.

    name: How results and cards call it. dim: length of a target. fingerprint: everything that changes the targets.
    num_parameters: Weights of the model behind it; None where there is none (vectors from an API). revision: Its commit on the
    Hub, if it came from there. license: What its card says, None for nothing.
    """

    name: str
    dim: int
    fingerprint: dict[str, Any]
    num_parameters: int | None = None
    revision: str | None = None
    license: str | None = None

    @property
    def live(self) -> "Teacher | None":
        """What runs the model behind, with no cache before it, to time it; None where there is none."""
        return self

    @abstractmethod
    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return targets [N, dim], float32 on the CPU, for N texts."""

    def add(self, *columns: Iterable[str]) -> Any:  # noqa: B027 (a live teacher keeps nothing)
        """Keep the targets of texts that are not kept yet, where any are (`TeacherCache.add`)."""

    def require(self, texts: Iterable[str]) -> None:  # noqa: B027 (most teachers have nothing to check)
        """Raise before long work if there can be no target for one of the texts; a live teacher has all of them."""

    def require_columns(self, columns: Sequence[Iterable[str]]) -> None:
        """Raise before long work if a text of the columns of a data set can have no target."""
        for column in columns:
            self.require(column)

    def targets(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """Return the targets of rows of texts, [B, C, dim]."""
        return self.encode([text for row in rows for text in row]).reshape(len(rows), -1, self.dim)

    def blocks(self, texts: Iterable[str]) -> Iterator[Tensor]:
        """Yield the targets of the texts, in order, a few thousand at a time, [n, dim] float32."""
        texts = iter(texts)
        while window := list(islice(texts, 4096)):
            yield self.encode(window)

    def project(self, projection: Any) -> "ProjectedTeacher":
        """Return this teacher seen through a projection (`PCAProjection`); nothing is encoded again."""
        return ProjectedTeacher(self, projection)


class ProjectedTeacher(Teacher):
    """A teacher, live or cached, whose vectors go through a projection on the way out."""

    def __init__(self, teacher: Teacher, projection: Any) -> None:
        if projection.input_dim != teacher.dim:
            raise ValueError(
                f"ProjectedTeacher: the projection takes {projection.input_dim} dimensions, but {teacher.name} gives "
                f"{teacher.dim}. It was fitted on another teacher. Fit one on this teacher's cache."
            )
        self.teacher, self.projection = teacher, projection
        self.name, self.dim, self.license = teacher.name, projection.dim, teacher.license

    @property
    def live(self) -> Teacher | None:
        """That of the teacher behind."""
        return self.teacher.live

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the teacher, and of the projection."""
        return {**self.teacher.fingerprint, "projection": self.projection.fingerprint}

    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None, **options: Any) -> Tensor:
        """Return projected targets [N, dim]; options are the teacher's own."""
        return self.projection(self.teacher.encode(texts, batch_size, show_progress_bar, **options))

    def add(self, *columns: Iterable[str]) -> Any:
        """Let the teacher behind keep what it keeps."""
        return self.teacher.add(*columns)

    def require(self, texts: Iterable[str]) -> None:
        """Raise if the teacher behind lacks a text."""
        self.teacher.require(texts)

    def require_columns(self, columns: Sequence[Iterable[str]]) -> None:
        """Raise if the teacher behind lacks a text of a column."""
        self.teacher.require_columns(columns)

    def targets(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """Return the projected targets of rows of texts, [B, C, dim]."""
        vectors = self.teacher.targets(rows)
        return self.projection(vectors.flatten(0, 1)).reshape(*vectors.shape[:2], self.dim)


class TwoTowerTeacher(Teacher):
    """One teacher for queries, the first column of a row, and another for its documents, in one space.

    Two prompts of one model ("query: ", "passage: "), or a model for the queries and an index that exists already for the
    documents (`TeacherCache.from_embeddings`). As a plain teacher, `encode(texts)`, it encodes queries; with
    `prompt_name="document"`, documents.

    Args:
        queries: Teacher of the first column.
        documents: Teacher of the others.

    Raises:
        ValueError: If their dimensions differ: they are of two spaces.
    """

    def __init__(self, queries: Teacher, documents: Teacher) -> None:
        if queries.dim != documents.dim:
            raise ValueError(
                f"TwoTowerTeacher: queries of {queries.name} have {queries.dim} dimensions, documents of {documents.name} "
                f"{documents.dim}, expected one space. The student would learn to search an index that is not its teacher's. "
                "Give the teacher that made the index."
            )
        self.queries, self.documents, self.dim = queries, documents, queries.dim
        self.name = queries.name if queries.name == documents.name else f"{queries.name} over {documents.name}"
        self.num_parameters, self.license = queries.num_parameters, queries.license

    @property
    def live(self) -> Teacher | None:
        """That of the queries."""
        return self.queries.live

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Those of both sides."""
        return {"queries": self.queries.fingerprint, "documents": self.documents.fingerprint}

    def encode(
        self,
        texts: list[str],
        batch_size: int = 64,
        show_progress_bar: bool | None = None,
        prompt_name: str | None = None,
    ) -> Tensor:
        """Return targets [N, dim] of N queries, or of documents by their prompt_name."""
        side = self.documents if prompt_name == "document" else self.queries
        return side.encode(texts, batch_size, show_progress_bar)

    def require(self, texts: Iterable[str]) -> None:
        """Raise if the teacher of queries lacks one."""
        self.queries.require(texts)

    def require_columns(self, columns: Sequence[Iterable[str]]) -> None:
        """Raise if either side lacks a text of its columns."""
        for side, column in zip([self.queries, *[self.documents] * (len(columns) - 1)], columns, strict=True):
            side.require(column)

    def targets(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """Return the targets of rows of a query and its documents, [B, C, dim]."""
        queries = self.queries.encode([row[0] for row in rows]).unsqueeze(1)
        documents = self.documents.encode([text for row in rows for text in row[1:]])
        return torch.cat([queries, documents.reshape(len(rows), -1, self.dim)], dim=1)


class AnchoredTeacher(Teacher):
    """A teacher that knows the first column only: what it says of that is the target of every column of a row.

    A translation is taught toward its English side by a teacher that knows English (Reimers and Gurevych 2020,
    https://huggingface.co/papers/2004.09813).

    Args:
        teacher: Teacher of the first column.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.name, self.dim = teacher, teacher.name, teacher.dim
        self.num_parameters, self.revision, self.license = teacher.num_parameters, teacher.revision, teacher.license

    @property
    def live(self) -> Teacher | None:
        """That of the teacher behind."""
        return self.teacher.live

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the teacher, and what is taken of it."""
        return {**self.teacher.fingerprint, "anchored": True}

    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return the teacher's targets [N, dim]."""
        return self.teacher.encode(texts, batch_size, show_progress_bar)

    def require_columns(self, columns: Sequence[Iterable[str]]) -> None:
        """Raise if the teacher lacks a text of the first column."""
        self.teacher.require(columns[0])

    def targets(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """Return the targets of rows of texts, [B, C, dim]: those of the first, C times."""
        first = self.teacher.encode([row[0] for row in rows])
        return first.unsqueeze(1).expand(-1, len(rows[0]), -1).contiguous()


class JointTeacher(Teacher):
    """Several teachers as one.

    Every vector is scaled to unit length first. "concatenate" puts the spaces side by side, so that the cosine of two texts
    is the weighted mean of the teachers' cosines; a PCA of it is a PCA of the joint space. "mean" averages coordinate by
    coordinate, which means something for models of one family only (fine-tunings, seeds): the spaces of others are turned
    against each other.

    Args:
        teachers: Two or more, live, cached or projected.
        combine: "concatenate" or "mean".
        weights: One a teacher, positive; equal if None.

    Raises:
        ValueError: If combine or the weights do not fit, or the widths of a mean differ.
    """

    def __init__(
        self, teachers: Sequence[Teacher], combine: str = "concatenate", weights: Sequence[float] | None = None
    ) -> None:
        self.teachers, self.combine = list(teachers), combine
        weights = [1.0] * len(self.teachers) if weights is None else list(weights)
        widths = [teacher.dim for teacher in self.teachers]
        if combine not in ("concatenate", "mean") or (combine == "mean" and len(set(widths)) > 1):
            raise ValueError(
                f"JointTeacher: combine is {combine!r} for teachers of {widths} dimensions, expected 'concatenate', or "
                "'mean' for equal dimensions. Coordinates without a partner can't be averaged. Concatenate, and reduce by PCA."
            )
        if len(self.teachers) < 2 or len(weights) != len(self.teachers) or min(weights) <= 0:
            raise ValueError(
                f"JointTeacher: weights {weights} for {len(self.teachers)} teachers, expected two teachers or more and a "
                "positive weight for each. A teacher without weight would be paid for and not heard. Leave it out."
            )
        self.weights = [weight / sum(weights) for weight in weights]
        self.name = " + ".join(teacher.name for teacher in self.teachers)
        self.dim = sum(widths) if combine == "concatenate" else widths[0]
        counts = [teacher.num_parameters for teacher in self.teachers]
        self.num_parameters = None if None in counts else sum(counts)
        self.license = strictest(teacher.license for teacher in self.teachers)

    @property
    def live(self) -> Teacher | None:
        """All of them, live; None if one is not there."""
        found = [teacher.live for teacher in self.teachers]
        return None if None in found else JointTeacher(found, self.combine, self.weights)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Those of the teachers, and how they are put together."""
        parts = [teacher.fingerprint for teacher in self.teachers]
        precisions = {part.get("dtype") for part in parts}
        common = {"dtype": precisions.pop()} if len(precisions) == 1 else {}
        return {"combine": self.combine, "weights": self.weights, "teachers": parts, **common}

    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return joint targets [N, dim]."""
        parts = [
            nn.functional.normalize(teacher.encode(texts, batch_size, show_progress_bar), dim=-1) for teacher in self.teachers
        ]
        if self.combine == "mean":
            return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))
        return torch.cat([weight**0.5 * part for weight, part in zip(self.weights, parts, strict=True)], dim=-1)

    def add(self, *columns: Iterable[str]) -> None:
        """Let each teacher keep what it keeps."""
        for teacher in self.teachers:
            teacher.add(*columns)

    def require(self, texts: Iterable[str]) -> None:
        """Raise if one of the teachers lacks a text that another has.

        Raises:
            ValueError: If so; a part of the target would be missing.
        """
        for teacher in self.teachers:
            try:
                teacher.require(texts)
            except ValueError as error:
                raise ValueError(
                    f"JointTeacher: {teacher.name} does not have every text of this column, expected the same texts in every "
                    f"teacher. A part of the target would be missing. Call add(...) with all text columns. ({error})"
                ) from error


class EncoderTeacher(Teacher):
    """A frozen text encoder: any sentence-transformers repository of the common layouts, or a plain `AutoModel`.

    Reads modules.json itself (Transformer, Pooling, Dense, Normalize, prompts), so sentence-transformers need not be
    installed, and refuses what it does not know. Texts go through the teacher's own tokenizer.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether the repository's own code may run.
        prompt: Text put before every text; None for the repository's own, "" for none.
        side: "query" or "document": which of the repository's prompts is its own, as sentence-transformers' `encode_query` and
            `encode_document` choose it; None for its default prompt.
        pooling: "mean", "cls", "last", or "pooler" (the backbone's own pooler, as SimCSE's teachers); only for a plain
            `AutoModel`, which does not say it.
        normalize: Whether vectors are scaled to unit length; None as the repository says (a plain `AutoModel`: True).
        max_length: Longest input in tokens; None as the repository says.
        dtype: torch dtype or its name; None for bfloat16 where the device computes it natively, else float32.
        device: None for a GPU where there is one.
        int8: Hold the backbone's linear layers in 8 bits (bitsandbytes), half the memory of bfloat16; the targets are
            others, if close, so it is never the default.
        device_map: "auto" or a map of modules to devices, for a teacher larger than one device; in place of `device`.
        **load_options: Whatever else `AutoModel.from_pretrained` takes (max_memory, offload_folder, ...).

    Raises:
        ImportError: If int8 is asked for and bitsandbytes is not installed.
        OSError: If there is no such model, or only pickled weights.
        ValueError: If the repository holds a module, pooling or activation that would be guessed at: targets from a
            wrong pooling train without any sign of it.
    """

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        trust_remote_code: bool = False,
        prompt: str | None = None,
        side: str | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        int8: bool = False,
        device_map: Any = None,
        **load_options: Any,
    ) -> None:
        self.name = Path(name).name if Path(name).is_dir() else str(name)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.dtype = dtype or (torch.bfloat16 if has_fast_bf16(self.device) else torch.float32)
        self.folder = fetch(name, revision, code=trust_remote_code)
        # The Hub's cache names a snapshot's folder by its commit.
        self.revision = self.folder.name if self.folder.parent.name == "snapshots" else None
        self.license = license_of(self.folder)
        layout = read_layout(self.folder, str(name), pooling, normalize)
        self.pooling, self.normalize, self.lower = layout["pooling"], layout["normalize"], layout["lower"]
        self._prompts = layout["prompts"]
        self.prompt = self.prompt_of(side) if prompt is None else prompt
        if self.prompt and not layout["include_prompt"]:
            raise ValueError(
                f"EncoderTeacher: {name} leaves its prompt out of the pooling (include_prompt is false), expected a "
                "teacher that pools over all tokens. The prompt would count in every target. Use prompt=''."
            )
        source = self.folder / layout["path"]
        options = {"trust_remote_code": trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if int8:
            load_options["quantization_config"] = _int8()
        if int8 or device_map is not None:
            load_options["device_map"] = {"": self.device} if device_map is None else device_map
        options |= {"dtype": self.dtype, "output_loading_info": True, **load_options}
        self.model, info = load_safe(AutoModel, source, **options)
        lost = [key for key in info["missing_keys"] if "pooler." not in key or self.pooling == "pooler"]
        if lost:
            raise ValueError(
                f"EncoderTeacher: {name} is missing {len(lost)} weights ({lost[0]}, ...), expected a whole checkpoint. "
                "Targets would come from random weights. Fetch it again."
            )
        self._absent = info["missing_keys"]
        self.max_length = longest_input(self.model, self.tokenizer, max_length or layout["max_length"])
        self.heads = [load_dense(self.folder / path, str(name)) for path in layout["dense"]]
        if "device_map" in load_options:
            self.device = self.model.device  # where inputs go; the rest is where the map put it
        else:
            self.model.to(self.device)
        for module in [self.model, *(head.to(self.device) for head in self.heads)]:
            module.eval().requires_grad_(False)
        self.dim = self.heads[-1][0].out_features if self.heads else self.model.config.hidden_size
        self._fingerprint: dict[str, Any] | None = None

    def with_prompt(self, prompt: str) -> "EncoderTeacher":
        """Return the same teacher, with the same weights, and another prompt."""
        other = copy.copy(self)
        other.prompt, other._fingerprint = prompt, None
        return other

    def prompt_of(self, side: str | None) -> str:
        """Return the repository's own prompt of queries or documents; of neither, its default one.

        Args:
            side: "query", "document" or None; see `EncoderTeacher`.

        Raises:
            ValueError: If it is none of them.
        """
        if side not in SIDES:
            raise ValueError(f"EncoderTeacher: side is {side!r}, expected one of {list(SIDES)}. Its prompt would be another's.")
        return next((self._prompts[name] for name in (*SIDES[side], None) if name in self._prompts), "")

    @property
    def num_parameters(self) -> int:
        """How many weights an embedding runs through, embedding tables included."""
        return sum(p.numel() for module in [self.model, *self.heads] for p in module.parameters())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes a target: a digest of weights and tokenizer, and each setting."""
        if self._fingerprint is None:
            states = [self._backbone_state(), *(head.state_dict() for head in self.heads)]
            heads = [str(head[1]) for head in self.heads]
            settings = {"prompt": self.prompt, "pooling": self.pooling, "heads": heads, "normalize": self.normalize}
            self._fingerprint = fingerprint(self, states, **settings, lower=self.lower)
        return self._fingerprint

    def _backbone_state(self) -> Mapping[str, Tensor]:
        state = self.model.state_dict()
        if any(value.is_meta for value in state.values()):  # parts of it were left on disk
            state = get_state_dict_offloaded_model(self.model)
        return present(state, self._absent)

    @torch.no_grad()  # not inference_mode: a live teacher's targets go into a loss that is differentiated
    def encode(self, texts: list[str], batch_size: int = 64, show_progress_bar: bool | None = None) -> Tensor:
        """Return [N, dim], float32 on the CPU."""

        def embed(batch: list[str]) -> Tensor:
            batch = [self.prompt + (text.lower() if self.lower else text) for text in batch]
            inputs = self.tokenizer(batch, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt").to(
                self.device
            )
            states = self.model(**inputs)
            if self.pooling == "pooler":
                vectors = states.pooler_output.float()
            else:
                vectors = pool(states.last_hidden_state.float(), inputs["attention_mask"], self.pooling)
            for head in self.heads:
                vectors = head(vectors)
            return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors

        vectors = encode_sorted(embed, texts, batch_size, show_progress_bar)
        return vectors if len(vectors) else torch.empty(0, self.dim)


def _int8() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("EncoderTeacher: int8 needs bitsandbytes. Install it with: pip install 'hf_distill[int8]'")
    return BitsAndBytesConfig(load_in_8bit=True)


def has_fast_bf16(device: torch.device | None = None) -> bool:
    """Whether the device multiplies bfloat16 in hardware, so that it is faster there, not only smaller."""
    if (device or torch.device("cuda" if torch.cuda.is_available() else "cpu")).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in ("amx_bf16", "avx512_bf16"))


def fetch(name: str | Path, revision: str | None = None, code: bool = False, kind: str = "model") -> Path:
    """Return the local folder of a model or data set: itself, or the Hub repository downloaded (or found) in the cache.

    Raises:
        OSError: If it is neither a folder nor to be had from the Hub.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        patterns = ["README.md", "*.json", "*.safetensors", "*.txt", "*.model", "*.npy", *(["*.py"] if code else [])]
        ignore = ["onnx/*", "openvino/*", "checkpoint*", "last-checkpoint/*"]
        options = {"allow_patterns": patterns, "ignore_patterns": ignore}
        return Path(snapshot_download(str(name), revision=revision, repo_type=kind, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"{name} is neither a folder here nor a repository that can be had from the Hub now, expected one of them. "
            "Check the spelling, log in (`hf auth login`) if it is private, and without network (or with "
            f"HF_HUB_OFFLINE=1) fetch it first: `hf download {name}{'' if kind == 'model' else f' --repo-type {kind}'}`. "
            f"({type(error).__name__}: {error})"
        ) from error


def license_of(folder: Path) -> str | None:
    """Return the licence that a model's card names."""
    card = folder / "README.md"
    license = (metadata_load(card) or {}).get("license") if card.exists() else None
    return license if isinstance(license, str) else None


def fingerprint(teacher: Any, states: Iterable[Mapping[str, Tensor]], **settings: Any) -> dict[str, Any]:
    """Return what changes the targets of a model with a tokenizer: a digest of both, and each setting.

    Args:
        teacher: With `tokenizer`, `max_length` and `dtype`.
        states: Its weights.
        **settings: What else it was told.
    """
    digests = {"weights": weights_digest(states), "tokenizer": tokenizer_digest(teacher.tokenizer)}
    return {**digests, **settings, "max_length": teacher.max_length, "dtype": str(teacher.dtype).removeprefix("torch.")}


def present(state: Mapping[str, Tensor], absent: Collection[str]) -> dict[str, Tensor]:
    """Return the weights less those that the checkpoint lacks: a pooler that is not used is another on every opening."""
    return {key: value for key, value in state.items() if key not in absent}


def weights_digest(states: Iterable[Mapping[str, Tensor]]) -> str:
    """Return a digest of every weight: its name, type, shape and bytes."""
    digest = hashlib.sha256()
    for state in states:
        for key, value in sorted(state.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for state in ("truncation", "padding"):  # set by the last call, not by the tokenizer's makers
        rules.pop(state, None)
    words = [type(tokenizer).__name__, rules, sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()
