# SPDX-License-Identifier: Apache-2.0
"""LEALLA (arXiv 2302.08387): a thin, deep student of a teacher of many languages. Flags: --help, --config file.yaml."""

from dataclasses import dataclass, field

from inputs import begin, open_student, open_teacher
from translations import open_target, open_translations, shape_student, start_student

from hf_distill.arguments import TranslationArguments
from hf_distill.build import LEALLA_SHAPES
from hf_distill.losses import AdditiveMarginSoftmax, FeatureDistillation, LogitDistillation, WeightedLoss
from hf_distill.runs import last_checkpoint
from hf_distill.trainer import DistillationTrainer


@dataclass
class LEALLAArguments(TranslationArguments):
    """What is LEALLA's own."""

    dims: list[int] = field(default_factory=list, metadata={"help": "First dimensions to score, too; not trained for it."})
    dim: int | None = field(
        default=None,
        metadata={"help": "Dimensions of the embedding; if not given the width of a student from scratch, else the teacher's."},
    )
    pooling: str = field(default="mean", metadata={"help": "Of the student: mean, cls (paper) or last."})
    activation: str = field(default="tanh", metadata={"help": "Behind the projection: tanh (paper) or identity."})
    center: bool = field(
        default=False, metadata={"help": "Subtract the teacher's mean: for one whose vectors all lie near each other."}
    )
    margin: float = field(default=0.3, metadata={"help": "Of the additive-margin softmax."})
    scale: float = field(default=20.0, metadata={"help": "What its cosines are multiplied by."})
    ams_weight: float = field(default=1.0, metadata={"help": "Weight of the additive-margin softmax; 0 leaves the part out."})
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of feature distillation."})
    logit_weight: float = field(default=1.0, metadata={"help": "Weight of logit distillation."})
    normalize_targets: bool = field(
        default=True, metadata={"help": "Feature distillation compares with the teacher's vectors at unit length."}
    )
    logit_temperature: float = field(default=1.0, metadata={"help": "What differences of cosines are divided by."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape is not None and self.shape not in LEALLA_SHAPES:
            raise ValueError(f"lealla: shape is {self.shape!r}, expected one of {sorted(LEALLA_SHAPES)}.")
        if not self.loss().parts:  # or it refuses what it can't be made of, before the work
            raise ValueError("lealla: the weights of all parts are 0, expected one above. Nothing would be learned.")

    def loss(self) -> WeightedLoss:
        """Return the weighted parts; what has weight 0 is not computed."""
        weights = {"ams": self.ams_weight, "feature": self.feature_weight, "logit": self.logit_weight}
        losses = [
            AdditiveMarginSoftmax(self.margin, self.scale),
            FeatureDistillation(self.normalize_targets),
            LogitDistillation(self.logit_temperature),
        ]
        kept = [loss for loss in losses if weights[loss.parts[0]]]
        return WeightedLoss(kept, {loss.parts[0]: weights[loss.parts[0]] for loss in kept})


def main(argv: list[str] | None = None) -> None:
    """Cache the teacher, train the student on translations, find them again."""
    recipe, args, report = begin("lealla", AdditiveMarginSoftmax.paper, LEALLAArguments, argv)
    recipe.loss().require_batch(args.train_batch_size * args.world_size, 2)
    data = open_translations(recipe)
    teacher = open_teacher(recipe, recipe.teacher_prompt)
    shape_student(recipe, data)
    width = recipe.dim or (recipe.from_scratch[0] if recipe.from_scratch else teacher.dim)
    options = {"projection_dim": width, "pooling": recipe.pooling, "activation": recipe.activation}
    student = open_student(recipe, data.corpus, data.languages, **options)
    size = student.num_parameters()  # the training-only head comes on top, and goes
    with report.timed("caching"):
        target = open_target(recipe, teacher, data.train)
        teacher.add([text for evaluator in data.evaluators for text in evaluator.texts()])
        start_student(recipe, student, data.train, target)
    report.evaluators = data.evaluators
    if recipe.baselines:
        with report.timed("evaluation"):
            report.add("teacher", teacher.encode, teacher.num_parameters, teacher.dim, prefixes=False)
            report.add("untrained student", student.encode, size, width, prefixes=False)

    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=data.train,
        teacher=target,
        loss=recipe.loss(),
        evaluators=[evaluator for evaluator in data.evaluators if evaluator.name == "dev"],
        peft_config=recipe.peft_config(),
    )
    with report.timed("training"):
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) or args.resume_from_checkpoint)
    trainer.save_model()
    with report.timed("evaluation"):
        report.add("student", student.encode, size, width)
    print(report.finish(trainer, recipe, data.facts))
    trainer.end()


if __name__ == "__main__":
    main()
