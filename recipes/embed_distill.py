# SPDX-License-Identifier: Apache-2.0
"""EmbedDistill (arXiv 2301.12005): a small query encoder over the teacher's own index. Flags: --help, --config file.yaml."""

import logging
from dataclasses import dataclass, field

from demo import demo_defaults, fill_in
from inputs import document_teacher, open_collection, open_reranker, open_student, open_teacher, retrieval_rows
from transformers import set_seed

from hf_distill.arguments import DistillationTrainingArguments, RecipeArguments, RetrievalArguments, parse_arguments
from hf_distill.evaluation.report import RunReport
from hf_distill.evaluation.retrieval import DualEncoder, RetrievalEvaluator
from hf_distill.losses import ContrastiveLoss, EmbeddingMatching, ScoreDistillation, WeightedLoss
from hf_distill.projection import PCAProjection, starting_map
from hf_distill.teachers import TwoTowerTeacher
from hf_distill.trainer import DistillationTrainer, claim_output_dir, last_checkpoint


@dataclass
class EmbedDistillArguments(RetrievalArguments, RecipeArguments):
    """What is EmbedDistill's own."""

    symmetric: bool = field(default=False, metadata={"help": "Both towers small; else documents keep the teacher's vectors."})
    dim: int | None = field(default=None, metadata={"help": "Reduce the teacher's space to so many dimensions by PCA (HPD)."})
    metric: str = field(default="l2", metadata={"help": "Of embedding matching: l2 (paper), cosine or mse."})
    form: str = field(default="softmax", metadata={"help": "Of score distillation: softmax (paper) or margin_mse."})
    temperature: float = field(default=0.05, metadata={"help": "What cosines are divided by in scores and labels."})
    query_weight: float = field(default=1.0, metadata={"help": "Weight of query matching; 0 leaves the part out."})
    document_weight: float = field(default=1.0, metadata={"help": "Weight of document matching, of a symmetric student."})
    score_weight: float = field(default=1.0, metadata={"help": "Weight of score distillation."})
    label_weight: float = field(default=1.0, metadata={"help": "Weight of the labels."})

    def loss(self) -> WeightedLoss:
        """Return the weighted parts; one of weight 0 is not computed at all."""
        score = ScoreDistillation(self.form, self.temperature, in_batch=False, reranker=self.reranker is not None)
        weights = {"query": self.query_weight, "document": self.document_weight}
        losses = [
            *([EmbeddingMatching(self.metric)] if any(weights.values()) else []),
            *([score] if self.score_weight else []),
            *([ContrastiveLoss(self.temperature)] if self.label_weight else []),
        ]
        weights |= {"score": self.score_weight, "label": self.label_weight}
        return WeightedLoss(losses, {part: weights[part] for loss in losses for part in loss.parts})
