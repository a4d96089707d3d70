# SPDX-License-Identifier: Apache-2.0
"""HPD (arXiv 2203.07687): a small student that gives its teacher's PCA coordinates. Flags: --help, --config file.yaml."""

from dataclasses import dataclass, field
from itertools import islice

from inputs import begin, open_student, open_teacher, sts_evaluators, training_texts

from hf_distill.arguments import TextArguments
from hf_distill.evaluation.similarity import FidelityEvaluator
from hf_distill.losses import HPDLoss, SimilarityLoss, WeightedLoss
from hf_distill.projection import PCAProjection, starting_map
from hf_distill.runs import last_checkpoint
from hf_distill.trainer import DistillationTrainer


STARTS = ("auto", "pca", "orthogonal", "random")


@dataclass
class HPDArguments(TextArguments):
    """What is HPD's own."""

    dim: int = field(default=128, metadata={"help": "Dimensions of the embedding: the teacher's PCA to so many."})
    center: bool = field(default=False, metadata={"help": "Subtract the teacher's mean (paper); the released code does not."})
    activation: str = field(default="identity", metadata={"help": "Behind the projection: identity, or tanh (paper)."})
    start: str = field(default="auto", metadata={"help": "Projection from pca, orthogonal, random; auto: see README."})
    normalize_loss: bool = field(default=True, metadata={"help": "Compare directions: both sides at unit length."})
    similarity_weight: float = field(default=0.0, metadata={"help": "Weight of `SimilarityLoss` beside the paper's loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise ValueError(f"hpd: start is {self.start!r}, expected one of {STARTS}.")


def main(argv: list[str] | None = None) -> None:
    """Cache the teacher, reduce it, train the student, measure all of them."""
    recipe, args, report = begin("hpd", HPDLoss.paper, HPDArguments, argv)
    sts = sts_evaluators(recipe)
    seen = [text for evaluator in sts for text in evaluator.texts()]
    texts = training_texts(recipe, args, seen)

    teacher = open_teacher(recipe)
    student = open_student(recipe, texts.corpus(), projection_dim=recipe.dim, activation=recipe.activation)
    # What does not fit is refused now, not after the teacher's hours.
    PCAProjection.require(recipe.dim, teacher.dim, len(texts.train))
    as_wide = student.config.hidden_size == teacher.dim
    start = ("pca" if as_wide else "orthogonal") if recipe.start == "auto" else recipe.start
    if start == "pca" and not as_wide:
        raise ValueError(f"hpd: start pca needs a student as wide as the teacher ({teacher.dim}). Use orthogonal.")

    with report.timed("caching"):
        teacher.add(*texts.text_columns())
        teacher.add(texts.held_out, seen)
    projection = PCAProjection.fit(teacher.blocks(texts.all()), recipe.dim, recipe.center)
    projected = teacher.project(projection)
    if start != "random":
        sample = list(islice(texts.all(), 256 if start == "pca" else 10_000))
        components = projection.components if start == "pca" else None
        student.start_projection(*starting_map(student.pooled(sample), projected.encode(sample), components))

    fidelity = FidelityEvaluator(texts.held_out, teacher.encode(texts.held_out), recipe.dims)
    report.evaluators = [fidelity, *sts]
    size = student.num_parameters()  # adapters come on top, and are merged in the end
    if recipe.baselines:
        with report.timed("evaluation"):
            report.add("teacher", teacher.encode, teacher.num_parameters, teacher.dim, prefixes=False)
            report.add(f"teacher, PCA {recipe.dim}", projected.encode, teacher.num_parameters, recipe.dim)
            report.add("untrained student", student.encode, size, recipe.dim)

    parts = [HPDLoss(normalize=recipe.normalize_loss), SimilarityLoss()]
    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=texts.train,
        teacher=projected,
        loss=WeightedLoss(parts, {"similarity": recipe.similarity_weight}) if recipe.similarity_weight else parts[0],
        evaluators=[fidelity],
        peft_config=recipe.peft_config(),
    )
    with report.timed("training"):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) or args.resume_from_checkpoint)
    trainer.save_model()
    with report.timed("evaluation"):
        report.add("student", student.encode, size, recipe.dim)
    print(report.finish(trainer, recipe, texts.facts(recipe.texts_name), projection=projection.facts()))
    trainer.end()


if __name__ == "__main__":
    main()
