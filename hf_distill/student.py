# SPDX-License-Identifier: Apache-2.0
"""The student: an encoder backbone, pooling and a projection, in one repository that every loader opens.

This file is published beside the weights (`AutoModel.from_pretrained(repo, trust_remote_code=True)` runs it), so it
imports only torch, transformers and what transformers itself requires.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import ModelOutput, cached_file, logging


logger = logging.get_logger(__name__)

# Our name of a pooling -> its flag in sentence-transformers' 1_Pooling/config.json.
POOLINGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
ACTIVATIONS = {"identity": nn.Identity, "tanh": nn.Tanh}
TRAINING_HEAD = "training_head.safetensors"  # in checkpoints only
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector a text, [N, H], from its token states.

    Args:
        hidden: [N, T, H], the states of the last layer.
        mask: [N, T], 1 for a real token, 0 for padding, which may stand on either side.
        pooling: "mean" over real tokens, "cls" (the first real token) or "last" (the last real token).
    """
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    if pooling not in POOLINGS:
        raise ValueError(f"pool: pooling is {pooling!r}, expected one of {sorted(POOLINGS)}.")
    mask = mask.long()
    index = mask.argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def encode_sorted(
    embed: Callable[[list[str]], Tensor], texts: list[str], batch_size: int, show_progress_bar: bool | None = None
) -> Tensor:
    """Return [N, D] float32 on the CPU: `embed` over batches of similar length, in the order of `texts`.

    Args:
        embed: Maps a list of texts to [n, D].
        texts: N texts. The batches depend on the texts and `batch_size` only, so the same call gives the same bytes.
        batch_size: Texts a batch.
        show_progress_bar: True, False, or None for a bar when it takes more than two seconds.
    """
    wrong = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        raise TypeError(
            f"encode: row {wrong[0]} is of type {type(texts[wrong[0]]).__name__}, expected str "
            f"({len(wrong)} such rows, the first: {wrong[:5]}). Convert or drop them."
        )
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    bar = {"delay": 0 if show_progress_bar else 2, "disable": None if show_progress_bar is None else not show_progress_bar}
    starts = logging.tqdm(range(0, len(texts), batch_size), desc="Encoding", unit="batch", **bar)
    result = torch.empty(0, 0)
    for start in starts:
        rows = order[start : start + batch_size]
        vectors = embed([texts[i] for i in rows]).float().cpu()
        if start == 0:
            result = torch.empty(len(texts), vectors.shape[1])
        result[rows] = vectors
    return result


def longest_input(backbone: PreTrainedModel, tokenizer: Any, wanted: int | None = None) -> int:
    """Return how many tokens a text may have: the position table less its padding offset, the tokenizer's limit, or `wanted`.

    Raises:
        ValueError: If none of them says: memory would be made for texts of any length.
    """
    limit = getattr(backbone.config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in backbone.named_modules():
        # RoBERTa's kind numbers positions from padding_idx + 1, so two rows of the table are never reached.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit -= module.padding_idx + 1
    limit = min(limit, tokenizer.model_max_length, wanted or limit)
    if limit > 10**9:  # what a tokenizer without a limit says
        raise ValueError(
            f"max_length is not given, and neither {type(backbone).__name__} nor its tokenizer has a longest input, expected "
            "one of them. Memory would be made for texts of any length. Give max_length."
        )
    return limit


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Load weights whole although the run is DeepSpeed ZeRO-3, which shards them when training begins.

    transformers would make every parameter empty while it loads, and layers kept or weights copied from such a model would
    be nothing. Its setting has no public way to be put aside for a while (checked on 5.23).
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


@dataclass
class StudentOutput(ModelOutput):
    """What `StudentModel.forward` returns.

    embedding: [N, D], what is deployed: projected, and of unit length if the student normalises.
    projected: [N, D], the same before normalisation.
    last_hidden_state: [N, T, H], the backbone's token states.
    feature: [N, D'], the embedding behind the training-only head, if there is one.
    """

    embedding: Tensor | None = None
    projected: Tensor | None = None
    last_hidden_state: Tensor | None = None
    feature: Tensor | None = None


class StudentModel(PreTrainedModel):
    """A small text encoder: backbone, pooling, an optional Linear H -> D with activation, optional normalisation.

    Made with `from_backbone`, reopened with `from_pretrained`. The folder that `save_pretrained` writes also opens with
    plain `AutoModel` (the bare backbone), with `AutoModel(trust_remote_code=True)` (this class) and with
    `SentenceTransformer` (equal vectors), from one copy of the weights.

    The settings lie in `config.hf_distill`: pooling, projection_dim (None: no projection), activation, bias, normalize,
    max_length (tokens), prompts, and what it was made from (base_model, layers).
    """

    config_class = PreTrainedConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _files, _published_as = ("student.py",), "student.StudentModel"  # what goes along with the weights
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keys_to_ignore_on_load_missing = [r"^projection\."]  # read from 2_Dense/, strictly, in from_pretrained

    def __init__(self, config: PreTrainedConfig) -> None:
        attention = config._attn_implementation
        super().__init__(config)
        config._attn_implementation = attention  # what the user asked for: the backbone decides what it supports
        settings = config.hf_distill
        self.settings: dict[str, Any] = settings
        self.backbone = AutoModel.from_config(config, trust_remote_code=False)
        self.projection = None
        if settings["projection_dim"] is not None:
            self.projection = nn.Linear(config.hidden_size, settings["projection_dim"], bias=settings["bias"])
        self.activation = ACTIVATIONS[settings["activation"]]()
        self.training_head: nn.Linear | None = None
        self.tokenizer: Any = None
        self.post_init()
        self._freeze_pooler()

    def _freeze_pooler(self) -> None:
        # We never use the backbone's own pooler, but plain loaders expect its weights: it is published as it came.
        # Trainable, it would get no gradient, and DDP would wait for one.
        pooler = getattr(self.backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    def add_training_head(self, dim: int) -> None:
        """Put a Linear D -> dim behind the embedding, for a loss that compares it with wider vectors; never published."""
        self.training_head = nn.Linear(self.dim, dim)

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return self.projection.out_features if self.projection is not None else self.config.hidden_size

    @property
    def prompts(self) -> dict[str, str]:
        """Name -> text that `encode(prompt_name=...)` puts before every text."""
        return self.settings["prompts"]

    @classmethod
    @whole_weights()
    def from_backbone(
        cls, name: str, *, layers: list[int] | None = None, attn_implementation: str | None = None, **settings: Any
    ) -> "StudentModel":
        """Make a student from a pretrained encoder.

        Args:
            name: Folder or Hub id of any encoder that `AutoModel` opens without remote code, in safetensors.
            layers: Which of its layers to keep, in order, counted from 0 (`[0, 2, 5]`); None keeps all.
            attn_implementation: Attention kernel; None for transformers' choice.
            **settings: What `from_parts` takes (pooling, projection_dim, activation, bias, normalize, max_length, dropout,
                prompts), and revision, token, cache_dir, local_files_only for the Hub.

        Raises:
            ValueError: If a setting is unknown, a layer is not there, or the checkpoint lacks weights of the backbone
                (they would be trained from random without a word).
            OSError: If there is no such model, or it has no safetensors (a pickle is never opened).
        """
        hub_options = {key: settings.pop(key) for key in _HUB_OPTIONS if key in settings}
        loaded = {"dtype": torch.float32, "attn_implementation": attn_implementation, "output_loading_info": True}
        backbone, info = load_safe(AutoModel, name, **loaded, **hub_options)
        lost = [key for key in info["missing_keys"] if "pooler." not in key]
        if lost:
            raise ValueError(
                f"StudentModel: {name} is missing {len(lost)} weights of {type(backbone).__name__} ({lost[0]}, ...), "
                "expected a whole checkpoint. They would start from random values. Use another checkpoint."
            )
        total = backbone.config.num_hidden_layers
        layers = list(range(total)) if layers is None else list(layers)
        keep_layers(backbone, layers)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
        source = Path(name).name if Path(name).is_dir() else name
        model = cls.from_parts(backbone, tokenizer, base_model=source, layers=layers, **settings)
        logger.info(
            f"StudentModel: kept layers {layers} of {total} of {name}, {model.num_parameters() / 1e6:.1f}M parameters, "
            f"embeddings of {model.dim} dimensions."
        )
        return model

    @classmethod
    def from_parts(
        cls,
        backbone: PreTrainedModel,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        projection_dim: int | None = None,
        activation: str = "identity",
        bias: bool = True,
        normalize: bool = True,
        max_length: int | None = None,
        dropout: float | None = None,
        prompts: Mapping[str, str] | None = None,
        base_model: str | None = None,
        layers: list[int] | None = None,
    ) -> "StudentModel":
        """Make a student around an encoder in memory, its projection random.

        Args:
            backbone: The encoder; its weights are copied.
            tokenizer: That of the encoder.
            pooling: "mean", "cls" or "last".
            projection_dim: D of the Linear H -> D behind the pooling; None for none (D = H).
            activation: "identity" or "tanh", behind the projection.
            bias: Whether the projection has a bias.
            normalize: Whether embeddings are scaled to unit length.
            max_length: Longest input in tokens; None for the most that the backbone and tokenizer take.
            dropout: Every dropout rate of the backbone, in [0, 1); None leaves them. A student that imitates exact targets
                learns better without any (recipes/results), and on a CPU trains twice as fast.
            prompts: Name -> text put before every text; "query" and "document" are empty unless given.
            base_model: What it was made from, for its card; None for nothing.
            layers: Which layers of that.
        """
        _check_settings(pooling, activation, projection_dim)
        longest = longest_input(backbone, tokenizer, max_length)
        if max_length is not None and max_length > longest:
            raise ValueError(
                f"StudentModel: max_length is {max_length}, expected at most {longest}, which {base_model or 'it'} takes. "
                "Longer texts would fail or run past the position table. Lower max_length."
            )
        config = backbone.config
        if dropout is not None:
            for key, value in list(vars(config).items()):
                if "dropout" in key and isinstance(value, float):
                    setattr(config, key, dropout)
        settings = {"pooling": pooling, "projection_dim": projection_dim, "activation": activation, "bias": bias}
        settings |= {"normalize": normalize, "max_length": longest, "prompts": {"query": "", "document": "", **(prompts or {})}}
        config.hf_distill = {**settings, "base_model": base_model, "layers": layers}
        model = cls(config)
        model.backbone.load_state_dict(backbone.state_dict())
        model.tokenizer = tokenizer
        tokenizer.model_max_length = longest
        return model

    @classmethod
    @whole_weights()
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> "StudentModel":
        """Open what `save_pretrained` wrote, from a folder or the Hub; takes what `AutoModel.from_pretrained` takes.

        Raises:
            ValueError: If it is not a student, or any weight is missing or left over (a head left at its random start
                gives vectors that look fine).
        """
        hub_options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        # Without a config, the generic config_class would see `auto_map` and ask for remote code.
        config = AutoConfig.from_pretrained(name, **hub_options) if config is None else config
        if getattr(config, "hf_distill", None) is None:
            raise ValueError(
                f"StudentModel: {name} has no `hf_distill` settings in config.json, expected a folder that "
                "StudentModel.save_pretrained wrote. Make a student of it with StudentModel.from_backbone."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
        if wrong:
            raise ValueError(
                f"StudentModel: the weights in {name} do not fit its config.json: {wrong}. The student would run with "
                "random or lost weights. Save it again, or fetch the whole repository."
            )
        if model.projection is not None:
            model._load_projection(cached_file(name, "2_Dense/model.safetensors", **hub_options))
        model.tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
        return (model, info) if wants_info else model

    def load_folder(self, folder: str | Path) -> None:
        """Load the weights that `save_pretrained` wrote into this very model, strictly (resume and best model).

        Raises:
            ValueError: If a weight is missing, left over or of another shape; nothing is trained on from a random head.
        """
        saved = StudentModel.from_pretrained(str(folder), config=self.config, dtype=self.dtype).state_dict()
        if (Path(folder) / TRAINING_HEAD).exists():
            saved |= load_file(Path(folder) / TRAINING_HEAD)
        try:
            self.load_state_dict(saved)
        except RuntimeError as error:
            raise ValueError(f"StudentModel: the weights in {folder} do not fit this student: {error}") from error

    def _load_projection(self, path: str) -> None:
        saved = {key.removeprefix("linear."): value for key, value in load_file(path).items()}
        want = {key: tuple(value.shape) for key, value in self.projection.named_parameters()}
        have = {key: tuple(value.shape) for key, value in saved.items()}
        if have != want:
            raise ValueError(
                f"StudentModel: the projection in {path} holds {have}, expected {want} as config.json says. The student "
                "would project with foreign weights. Save the student again."
            )
        with torch.no_grad():
            for key, parameter in self.projection.named_parameters():
                parameter.copy_(saved[key])

    @torch.no_grad()
    def start_projection(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Start the projection from given values (`projection.starting_map`) in place of random ones.

        Args:
            weight: [D, H].
            bias: [D]; zero if None.

        Raises:
            ValueError: If the shapes differ.
        """
        if self.projection is None or weight.shape != self.projection.weight.shape:
            have = None if self.projection is None else tuple(self.projection.weight.shape)
            raise ValueError(f"StudentModel: the projection's weight is {have}, but the start is {tuple(weight.shape)}.")
        self.projection.weight.copy_(weight)
        if self.projection.bias is not None:
            self.projection.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)

    @torch.no_grad()
    def pooled(self, texts: list[str]) -> Tensor:
        """Return [N, H] float32 on the CPU: what the projection is given."""
        seen: list[Tensor] = []
        with self.projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            return encode_sorted(lambda batch: (self.outputs(batch), seen.pop())[1], texts, 32)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> StudentOutput:
        """Embed N tokenised texts.

        Args:
            input_ids: [N, T].
            attention_mask: [N, T], 1 for a real token; all ones if None.
            **inputs: Whatever else the backbone takes (token_type_ids, position_ids, inputs_embeds).
        """
        inputs.pop("return_dict", None)
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        # Under bf16 autocast the head would round to 3 digits what the loss compares; it costs nothing to keep it exact.
        with torch.autocast(hidden.device.type, enabled=False):
            exact = hidden.float() if self.dtype == torch.float32 else hidden
            projected = pool(exact, attention_mask, self.settings["pooling"])
            if self.projection is not None:
                projected = self.activation(self.projection(projected))
            embedding = nn.functional.normalize(projected, dim=-1) if self.settings["normalize"] else projected
            feature = None if self.training_head is None else self.training_head(embedding)
        return StudentOutput(embedding=embedding, projected=projected, last_hidden_state=hidden, feature=feature)

    @torch.no_grad()  # not inference_mode: weights that FSDP gathers meanwhile could not be trained afterwards
    def outputs(self, batch: list[str], prefix: str = "") -> StudentOutput:
        """Return what `forward` makes of one batch of texts, as for whoever opens the student: dropout off, nothing rounded."""
        options = {"padding": True, "truncation": True, "max_length": self.settings["max_length"]}
        inputs = self.tokenizer([prefix + text for text in batch], return_tensors="pt", **options).to(self.device)
        was_training, rounding = self.training, vars(self).pop("forward", None)  # Accelerate's, under autocast to bf16
        self.eval()
        try:
            return self(**inputs)
        finally:
            self.train(was_training)
            if rounding is not None:
                self.forward = rounding

    def encode(
        self,
        texts: str | list[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Return embeddings: [N, D] for a list, [D] for one text; numpy float32, or torch on the CPU.

        Args:
            texts: One text or N texts; longer ones than max_length are cut.
            prompt_name: Name of one of the student's prompts ("query", "document").
            prompt: The prompt itself, in place of a name.
            batch_size: Texts a batch; batches hold texts of similar length.
            truncate_dim: Keep only the first so many dimensions, scaled to unit length again if the student normalises.
            convert_to_tensor: Return torch instead of numpy.
            show_progress_bar: True, False, or None for a bar when it takes more than two seconds.

        Raises:
            ValueError: If the prompt's name or truncate_dim is not one of the student's.
        """
        if prompt_name is not None and prompt_name not in self.prompts:
            raise ValueError(
                f"StudentModel: prompt_name is {prompt_name!r}, expected one of {sorted(self.prompts)}. Without its "
                "prompt the student embeds another text than it was trained on."
            )
        if truncate_dim is not None and not 0 < truncate_dim <= self.dim:
            raise ValueError(f"StudentModel: truncate_dim is {truncate_dim}, expected 1 to {self.dim}.")
        prefix = prompt if prompt is not None else self.prompts[prompt_name] if prompt_name is not None else ""

        one = isinstance(texts, str)
        rows = [texts] if one else list(texts)
        vectors = encode_sorted(lambda batch: self.outputs(batch, prefix).embedding, rows, batch_size, show_progress_bar)
        vectors = vectors if rows else torch.empty(0, self.dim)
        if truncate_dim is not None:
            vectors = vectors[:, :truncate_dim]
            vectors = nn.functional.normalize(vectors, dim=-1) if self.settings["normalize"] else vectors
        vectors = vectors[0] if one else vectors
        return vectors if convert_to_tensor else vectors.numpy()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> None:
        """Write the repository: the backbone as the plain checkpoint at the root, the projection in 2_Dense/.

        Args:
            save_directory: The folder.
            is_main_process: Only the main process writes.
            state_dict: This model's (gathered) weights, in place of its own.
            push_to_hub: Upload it afterwards; `repo_id` and the options of `push_to_hub` go along.
            max_shard_size: Largest file of backbone weights.
            **kwargs: variant, token and the like, as `PreTrainedModel.save_pretrained` takes them.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        part = {
            prefix: {k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)}
            for prefix in ("backbone.", "projection.")
        }
        config = self.backbone.config
        config.hf_distill = self.settings
        config.auto_map = {"AutoModel": self._published_as}
        self.backbone.save_pretrained(folder, state_dict=part["backbone."], max_shard_size=max_shard_size, **kwargs)
        for source in map(Path(__file__).with_name, self._files):
            if source.resolve() != (folder / source.name).resolve():
                shutil.copyfile(source, folder / source.name)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        self._write_sentence_transformers(folder, part["projection."])
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), max_shard_size=max_shard_size, **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish it in one commit, with a card: `hf_distill.layout.publish_student`; where only this file is, without one."""
        try:
            from hf_distill.layout import publish_student
        except ImportError:
            return super().push_to_hub(repo_id, **options)
        return publish_student(self, repo_id, **options)

    def _write_sentence_transformers(self, folder: Path, projection: dict[str, Tensor]) -> None:
        settings, hidden = self.settings, self.config.hidden_size
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        pooling = {flag: name == settings["pooling"] for name, flag in POOLINGS.items()}
        pooling = {"word_embedding_dimension": hidden, **pooling, "include_prompt": True}
        _write_json(folder / "1_Pooling" / "config.json", pooling)
        if self.projection is not None:
            modules.append(("2_Dense", "Dense"))
            activation = ACTIVATIONS[settings["activation"]]
            dense = {"in_features": hidden, "out_features": settings["projection_dim"], "bias": settings["bias"]}
            dense["activation_function"] = f"{activation.__module__}.{activation.__qualname__}"
            _write_json(folder / "2_Dense" / "config.json", dense)
            tensors = {f"linear.{key}": value.cpu() for key, value in projection.items()}
            save_file(tensors, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
        if settings["normalize"]:
            modules.append(("3_Normalize", "Normalize"))
        # The short names of sentence-transformers 2 are understood by every version since.
        listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
        _write_json(folder / "modules.json", [{"idx": i, "name": str(i), **module} for i, module in enumerate(listed)])
        _write_json(folder / "sentence_bert_config.json", {"max_seq_length": settings["max_length"], "do_lower_case": False})
        prompts = {"prompts": settings["prompts"], "default_prompt_name": None, "similarity_fn_name": "cosine"}
        _write_json(folder / "config_sentence_transformers.json", prompts)


def keep_layers(backbone: PreTrainedModel, layers: list[int]) -> None:
    """Cut a pretrained encoder, in place, down to the given layers (counted from 0, in the given order).

    Raises:
        ValueError: If a layer is not there, or the model has no single list of layers to cut.
    """
    config, total = backbone.config, backbone.config.num_hidden_layers
    if not layers or any(not 0 <= i < total for i in layers):
        raise ValueError(
            f"StudentModel: layers is {layers}, expected numbers from 0 to {total - 1}: {type(backbone).__name__} has "
            f"{total} layers."
        )
    if layers == list(range(total)):
        return
    stacks = [
        (parent, name)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"StudentModel: {type(backbone).__name__} has {len(stacks)} lists of {total} layers, expected 1. Which one "
            "to cut would be a guess. Keep all layers (layers=None)."
        )
    parent, name = stacks[0]
    setattr(parent, name, nn.ModuleList(getattr(parent, name)[i] for i in layers))
    for position, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = position
    # Settings given layer by layer (ModernBERT's layer_types) are cut the same way.
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[i] for i in layers])
    config.num_hidden_layers = len(layers)


@whole_weights()
def load_safe(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained` from safetensors only, with an error that says so.

    Raises:
        OSError: If the model is not there or holds only a pickle, which could run code when opened.
    """
    try:
        return auto_class.from_pretrained(name, use_safetensors=True, **kwargs)
    except OSError as error:
        if "safetensors" not in str(error):
            raise OSError(
                f"{name} can't be opened, expected a model's folder or Hub id. Check the spelling; without network (or with "
                f"HF_HUB_OFFLINE=1) fetch it first: `hf download {name}`. ({error})"
            ) from error
        raise OSError(
            f"{name} has no weights in safetensors, expected model.safetensors. A pickle (pytorch_model.bin) can run code "
            "when it is opened, so it never is. Convert it where you trust it: load it in transformers and "
            f"`save_pretrained`. ({error})"
        ) from error


def _check_settings(pooling: str, activation: str, projection_dim: int | None) -> None:
    for what, value, known in (("pooling", pooling, POOLINGS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"StudentModel: {what} is {value!r}, expected one of {sorted(known)}.")
    if projection_dim is not None and projection_dim < 1:
        raise ValueError(f"StudentModel: projection_dim is {projection_dim}, expected 1 or more, or None.")
    if activation != "identity" and projection_dim is None:
        raise ValueError(
            f"StudentModel: activation is {activation!r} without a projection, expected projection_dim=... with it. "
            "It would be dropped. Set projection_dim or leave activation out."
        )


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
