# SPDX-License-Identifier: Apache-2.0
"""The teacher's space reduced: PCA over a cache, saved with the student."""

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from .cache import TeacherCache
from .hub import PROJECTION_FILE, publish


class PCAProjection:
    """A fixed linear map of the teacher's D dimensions to the `dim` directions of largest variance.

    Source: HPD, Zhao et al. 2022, https://huggingface.co/papers/2203.07687, Algorithm 1.
    Differs from the paper: the mean is not subtracted unless center=True. The paper's Algorithm 1 subtracts it, the released
    code does not; it changes cosines, so it is a choice. The directions are the same: the fit itself is always centred.

    Coordinates are ordered by variance, so the first k of `dim` are the PCA to k dimensions.

    Args:
        components: [dim, D], orthonormal rows.
        mean: [D], the mean of the fit.
        variance: [dim], explained by each component.
        total_variance: Of all D dimensions.
        center: Whether the mean is subtracted.
    """

    def __init__(self, components: Tensor, mean: Tensor, variance: Tensor, total_variance: float, center: bool) -> None:
        self.components, self.mean, self.variance = components.float(), mean.float(), variance.double()
        self.total_variance, self.center = float(total_variance), center
        self.dim, self.input_dim = components.shape

    @classmethod
    def fit(cls, targets: Any, dim: int, center: bool = False) -> "PCAProjection":
        """Find the `dim` directions of largest variance.

        Args:
            targets: A `TeacherCache` (read a shard at a time; no full matrix in memory), or blocks [n, D], or one [N, D].
            dim: Dimensions to keep.
            center: Whether targets shall have mean zero.

        Raises:
            ValueError: If dim exceeds the teacher's dimension or the number of texts, or a target is not finite.
        """
        mean, covariance, count = _moments(targets, dim)
        cls.require(dim, dim, count)
        variance, vectors = torch.linalg.eigh(covariance)
        components = vectors.T.flip(0)[:dim]
        # An eigenvector's sign is arbitrary: its largest coordinate is made positive, so that every machine agrees.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        variance = variance.flip(0).clamp(min=0)
        return cls(components * largest.sign(), mean, variance[:dim], variance.sum().item(), center)

    @classmethod
    def centering(cls, targets: Any) -> "PCAProjection":
        """Return what subtracts the mean and leaves all directions as they are; equal on every machine, of any few targets.

        Args:
            targets: As `fit` takes them.

        Raises:
            ValueError: If a target is not finite.
        """
        mean, covariance, _ = _moments(targets)
        variance = covariance.diagonal()
        return cls(torch.eye(len(mean)), mean, variance, variance.sum().item(), center=True)

    @staticmethod
    def require(dim: int, teacher_dim: int, texts: int | None = None) -> None:
        """Raise if so many dimensions can't be had from the teacher and the texts; `fit` does, a recipe before caching."""
        if dim > teacher_dim:
            raise ValueError(
                f"PCAProjection: dim is {dim}, expected at most the teacher's {teacher_dim} dimensions. There are no more "
                "directions. Lower dim."
            )
        if texts is not None and texts < dim:
            raise ValueError(
                f"PCAProjection: {texts} texts for {dim} dimensions, expected at least as many texts. The last directions "
                "would be arbitrary. Add texts to the cache or lower dim."
            )

    @property
    def explained_variance(self) -> float:
        """Share of the teacher's variance that the projection keeps, in [0, 1]."""
        return float(self.variance.sum() / self.total_variance)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What it was fitted to, as a digest, and the choice of centring."""
        digest = hashlib.sha256(self.components.numpy().tobytes() + self.mean.numpy().tobytes())
        return {"pca": digest.hexdigest(), "dim": self.dim, "center": self.center}

    def facts(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {"dim": self.dim, "center": self.center, "explained_variance": self.explained_variance}

    def __call__(self, vectors: Any) -> Tensor:
        """Return [N, dim] for teacher vectors [N, D], torch or numpy."""
        vectors = torch.as_tensor(vectors).float()
        return (vectors - self.mean if self.center else vectors) @ self.components.T

    def save_pretrained(self, folder: str | Path) -> None:
        """Write teacher_projection.safetensors into the folder (the student's, as a rule)."""
        tensors = {"components": self.components, "mean": self.mean, "variance": self.variance}
        metadata = {"total_variance": repr(self.total_variance), "center": str(self.center)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, Path(folder) / PROJECTION_FILE, metadata=metadata)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Publish it in a repository of its own; return the address of its page.

        Args:
            name: Of the repository.
            **options: Of `hf_distill.hub.publish`: private, revision, token, message.

        Raises:
            OSError: As `publish` says.
        """
        data = ModelCardData(library_name="hf_distill", tags=["hf_distill", "pca"])
        facts = "".join(f"* {key}: {value}\n" for key, value in self.facts().items())
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = (
                f"---\n{data.to_yaml()}\n---\n\n# A teacher's space, reduced\n\nPCA of a teacher's vectors.\n\n```python\n"
                f'from hf_distill import PCAProjection\n\nsmall = PCAProjection.from_pretrained("{name}")(vectors)\n```\n\n'
            )
            (Path(folder) / "README.md").write_text(card + facts, "utf-8")
            return publish(folder, name, **{"message": "Upload projection", **options})

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "PCAProjection":
        """Read it from a student's folder or Hub repository: it maps the teacher's own vectors into the student's space.

        Raises:
            OSError: If the student can't be had, or carries no projection.
        """
        try:  # the file alone, not the student beside it
            path = cached_file(str(name), PROJECTION_FILE, revision=revision)
        except OSError as error:
            raise OSError(
                f"PCAProjection: {name} has no {PROJECTION_FILE} that can be had, expected a student trained on a projected "
                f"teacher. ({error})"
            ) from error
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return cls(**tensors, total_variance=float(metadata["total_variance"]), center=metadata["center"] == "True")


def _moments(targets: Any, dim: int = 0) -> tuple[Tensor, Tensor, int]:
    """Return (mean [D], covariance [D, D], both float64; how many), read once; of at least `dim` dimensions."""
    blocks: Iterable[Tensor] = targets.blocks() if isinstance(targets, TeacherCache) else targets
    if isinstance(blocks, Tensor) and blocks.ndim == 2:
        blocks = [blocks]
    count, total, square = 0, 0.0, 0.0
    for block in blocks:
        # Squares of numbers near 1 lose the small variances in float32.
        block = block.double()
        if count == 0:
            PCAProjection.require(dim, block.shape[1])
        count, total, square = count + len(block), total + block.sum(0), square + block.T @ block
    if not count or not torch.isfinite(square).all():
        raise ValueError(
            f"PCAProjection: of {count} targets one is NaN or infinite, or there are none, expected numbers. Every component "
            "would be NaN."
        )
    mean = total / count
    return mean, square / count - torch.outer(mean, mean), count


def centred_map(states: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return (weight [D, H], bias [D]): the main directions of a student's own states, centred, of unit length on average.

    States that all share a large mean have cosines near 1, and a loss on cosines would first have to learn the mean away.
    Where there are fewer directions (texts or H) than D, the last rows are zero.

    Args:
        states: [N, H], the student's pooled states of N texts (`StudentModel.pooled`).
        dim: D.
    """
    mean = states.mean(0)
    directions = torch.linalg.svd(states - mean, full_matrices=False).Vh[:dim]
    weight = torch.cat([directions, states.new_zeros(dim - len(directions), states.shape[1])])
    weight /= ((states - mean) @ weight.T).norm(dim=-1).mean()
    return weight, -weight @ mean


def least_squares(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (weight [E, D], bias [E]) of the Linear that comes closest to the outputs: of several, the smallest.

    Args:
        inputs: [N, D].
        outputs: [N, E].
    """
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    # Directions that hold but rounding (a layer norm's output has no mean) must not be fitted: weights of millions would
    # give the same in float32, and anything in bfloat16.
    found = torch.linalg.lstsq(inputs, outputs.double(), rcond=1e-5, driver="gelsd").solution.float()
    return found[:-1].T.contiguous(), found[-1]


def starting_map(states: Tensor, targets: Tensor, components: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (weight [D, H], bias [D]) with which a student's projection already comes close to its targets.

    Args:
        states: [N, H], the student's pooled states of N texts (`StudentModel.pooled`).
        targets: [N, D], of the same texts.
        components: [D, H], directions to keep, scaled so that the outputs are as long as the targets (pooled states are
            some six times longer than unit targets, and the first hundred steps would only shrink them): the teacher's PCA,
            for a student cut from that teacher. None: the orthonormal map that comes closest (orthogonal Procrustes,
            Schönemann 1966), which keeps the cosines that a pretrained student has; least squares would come closer and
            flatten every direction that it can't predict.

    Raises:
        ValueError: If components are not as wide as the student: such a student has other coordinates than the teacher.
    """
    if components is None:
        left, _, right = torch.linalg.svd(targets.double().T @ states.double(), full_matrices=False)
        components = (left @ right).float()
    if components.shape[1] != states.shape[1]:
        raise ValueError(
            f"starting_map: the components have {components.shape[1]} dimensions, the student's states {states.shape[1]}, "
            "expected as many. Leave components out for the closest orthonormal map."
        )
    scale = targets.norm(dim=-1).mean() / (states @ components.T).norm(dim=-1).mean()
    return scale * components, torch.zeros(len(components))
