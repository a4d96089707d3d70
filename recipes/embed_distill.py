# SPDX-License-Identifier: Apache-2.0
"""EmbedDistill (arXiv 2301.12005): a small query encoder over the teacher's own index. Flags: --help, --config file.yaml."""

from dataclasses import dataclass, field

import retrieval
from inputs import begin, open_student

from hf_distill.arguments import RetrievalArguments
from hf_distill.losses import ContrastiveLoss, EmbeddingMatching, ScoreDistillation, WeightedLoss
from hf_distill.projection import starting_map
from hf_distill.runs import last_checkpoint
from hf_distill.trainer import DistillationTrainer


@dataclass
class EmbedDistillArguments(RetrievalArguments):
    """What is EmbedDistill's own."""

    metric: str = field(default="l2", metadata={"help": "Of embedding matching: l2 (paper), cosine or mse."})
    form: str = field(default="softmax", metadata={"help": "Of score distillation: softmax (paper) or margin_mse."})
    temperature: float = field(default=0.05, metadata={"help": "What cosines are divided by in scores and labels."})
    query_weight: float = field(default=1.0, metadata={"help": "Weight of query matching; 0 leaves the part out."})
    document_weight: float = field(default=1.0, metadata={"help": "Weight of document matching, of a symmetric student."})
    score_weight: float = field(default=1.0, metadata={"help": "Weight of score distillation."})
    label_weight: float = field(default=1.0, metadata={"help": "Weight of the labels."})
    score_temperature: float = field(default=1.0, metadata={"help": "Of a reranker's scores: 1 for logits, 0.05 for [0, 1]."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss()  # refuses before the work what it can't be made of
        if self.score_weight and self.negatives < 1:
            raise ValueError("EmbedDistillArguments: scores of lists are distilled, expected --negatives 1 or more to list.")

    def loss(self) -> WeightedLoss:
        """Return the weighted parts; what has weight 0 is not computed."""
        weights = {"query": self.query_weight, "document": self.document_weight}
        losses = [EmbeddingMatching(self.metric)] if any(weights.values()) else []
        weights |= {"score": self.score_weight, "label": self.label_weight}
        if self.score_weight:
            reranker = {"reranker": self.reranker is not None, "score_temperature": self.score_temperature}
            losses.append(ScoreDistillation(self.form, self.temperature, **reranker))
        if self.label_weight:
            losses.append(ContrastiveLoss(self.temperature))
        return WeightedLoss(losses, {part: weights[part] for loss in losses for part in loss.parts})


def main(argv: list[str] | None = None) -> None:
    """Cache the teacher, mine negatives, train the student, search with all of them."""
    recipe, args, report = begin("embed_distill", EmbeddingMatching.paper, EmbedDistillArguments, argv)
    collections = retrieval.open_collection(recipe)
    documents = list(collections.train.documents.values())

    with report.timed("caching"):
        towers = retrieval.open_towers(recipe, documents)
        rows, facts = retrieval.rows(recipe, collections, towers, args.seed)
        reranker = retrieval.open_reranker(recipe, rows)
        space, space_facts = retrieval.open_space(recipe, towers, documents, reranker, rows)
    inherited = [] if recipe.symmetric else rows.column_names[1:]
    student = open_student(recipe, [*documents, *rows["query"]], projection_dim=space.dim)
    sample = list(zip(*rows[:10_000].values(), strict=True))
    states = student.pooled([query for query, *_ in sample])
    student.start_projection(*starting_map(states, space.targets(sample)[:, 0]))
    if inherited:
        student.settings["document_encoder"] = retrieval.document_encoder(recipe, towers)

    spaces = {"teacher": towers, **({f"teacher, PCA {recipe.dim}": space} if recipe.dim else {})}
    with report.timed("evaluation"):
        for name, encoder in spaces.items() if recipe.baselines else ():
            report.evaluators = retrieval.evaluators(recipe, collections, encoder)
            report.add(name, encoder.encode, towers.num_parameters, encoder.dim, prefixes=encoder is not towers)
        report.evaluators = retrieval.evaluators(recipe, collections, space if inherited else None)
        if recipe.baselines:
            report.add("untrained student", student.encode, student.num_parameters(), space.dim, prefixes=bool(recipe.dim))

    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=rows,
        teacher=space,
        loss=recipe.loss(),
        reranker=reranker,
        inherited_columns=inherited,
        evaluators=report.evaluators[:1],  # dev
        peft_config=recipe.peft_config(),
    )
    with report.timed("training"):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) or args.resume_from_checkpoint)
    trainer.save_model()
    with report.timed("evaluation"):
        report.add("student", student.encode, student.num_parameters(), space.dim, prefixes=bool(recipe.dim))
    with report.timed("index report"):
        space_facts |= retrieval.measure_indexes(recipe, collections, towers, space, student)
    print(report.finish(trainer, recipe, facts, **space_facts))
    trainer.end()


if __name__ == "__main__":
    main()
