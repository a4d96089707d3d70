# SPDX-License-Identifier: Apache-2.0
"""EmbedDistill (arXiv 2301.12005): a small query encoder over the teacher's own index. Flags: --help, --config file.yaml."""

import logging
from dataclasses import dataclass, field

from demo import demo_defaults, fill_in
from inputs import open_collection, open_reranker, open_student, open_towers, retrieval_evaluators, retrieval_rows
from transformers import set_seed

from hf_distill.arguments import DistillationTrainingArguments, RetrievalArguments, parse_arguments
from hf_distill.evaluation.report import RunReport
from hf_distill.losses import ContrastiveLoss, EmbeddingMatching, ScoreDistillation, WeightedLoss
from hf_distill.projection import PCAProjection, starting_map
from hf_distill.trainer import DistillationTrainer, claim_output_dir, last_checkpoint


@dataclass
class EmbedDistillArguments(RetrievalArguments):
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
        """Return the weighted parts; what has weight 0 is not computed."""
        weights = {"query": self.query_weight, "document": self.document_weight}
        losses = [EmbeddingMatching(self.metric)] if any(weights.values()) else []
        weights |= {"score": self.score_weight, "label": self.label_weight}
        if self.score_weight:
            losses.append(ScoreDistillation(self.form, self.temperature, reranker=self.reranker is not None))
        if self.label_weight:
            losses.append(ContrastiveLoss(self.temperature))
        return WeightedLoss(losses, {part: weights[part] for loss in losses for part in loss.parts})


def main(argv: list[str] | None = None) -> None:
    """Cache the teacher, mine negatives, train the student, search with all of them."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)
    defaults = demo_defaults("embed_distill")
    recipe, args = parse_arguments(EmbedDistillArguments, DistillationTrainingArguments, argv=argv, **defaults)
    claim_output_dir(args.output_dir, {"recipe": "embed_distill", "settings": recipe.identity()})
    fill_in(recipe)
    set_seed(args.seed)
    report = RunReport("embed_distill", EmbeddingMatching.paper)
    collections = open_collection(recipe)
    documents = list(collections.train.documents.values())

    with report.timed("caching"):
        towers = open_towers(recipe, documents)
        rows, facts = retrieval_rows(recipe, collections, towers, args.seed)
        reranker = open_reranker(recipe, rows)
    inherited = [] if recipe.symmetric else rows.column_names[1:]
    projection = PCAProjection.fit(towers.documents.blocks(documents), recipe.dim) if recipe.dim else None
    teacher = towers.project(projection) if projection else towers
    student = open_student(recipe, [*documents, *rows["query"]], projection_dim=teacher.dim)
    sample = list(dict.fromkeys(rows["query"]))[:10_000]
    student.start_projection(*starting_map(student.pooled(sample), teacher.encode(sample)))
    if inherited:
        student.settings["document_encoder"] = towers.documents.name

    with report.timed("evaluation"):
        for name, encoder in {"teacher": towers, **({f"teacher, PCA {recipe.dim}": teacher} if recipe.dim else {})}.items():
            report.evaluators = retrieval_evaluators(recipe, collections, encoder.encode(documents, prompt_name="document"))
            report.add(name, encoder.encode, towers.num_parameters, encoder.dim, prefixes=False)
        index = teacher.encode(documents, prompt_name="document") if inherited else None
        report.evaluators = retrieval_evaluators(recipe, collections, index)
        report.add("untrained student", student.encode, student.num_parameters(), teacher.dim, prefixes=False)

    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=rows,
        teacher=teacher,
        loss=recipe.loss(),
        reranker=reranker,
        inherited_columns=inherited,
        evaluators=report.evaluators[:1],  # dev
        peft_config=recipe.peft_config(),
    )
    with report.timed("training"):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.save_model()
    with report.timed("evaluation"):
        report.add("student", student.encode, student.num_parameters(), teacher.dim, prefixes=False)
    print(report.finish(trainer, recipe, facts, **({"projection": projection.facts()} if projection else {})))
    trainer.end()


if __name__ == "__main__":
    main()
