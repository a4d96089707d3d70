"""What a client of the Hub does in a process of its own: `python tests/hub_client.py SCENARIO JSON`; see test_hub."""

import json
import sys


def hide(*packages):
    """Be a machine without them."""
    for package in packages:
        sys.modules[package] = None


def open_transformers(repo, texts, revision=None):
    hide("hf_distill", "sentence_transformers")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
    facts = {"vectors": model.encode(texts).tolist(), "class": type(model).__name__}
    return {**facts, "file": sys.modules[type(model).__module__].__file__}


def open_plain(repo, texts):
    hide("hf_distill", "sentence_transformers")
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(repo, output_loading_info=True)
    return {"class": type(model).__name__, "lost": sorted([*info["missing_keys"], *info["unexpected_keys"]])}


def open_sentence_transformers(repo, texts, revision=None):
    hide("hf_distill")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(repo, revision=revision, device="cpu")
    return {"vectors": model.encode(texts).tolist(), "file": sys.modules[type(model).__module__].__file__}


def open_ours(repo, texts, revision=None, projected=False):
    hide("sentence_transformers")
    from hf_distill import PCAProjection, StudentModel

    model = StudentModel.from_pretrained(repo, revision=revision)
    facts = {"vectors": model.encode(texts).tolist(), "file": sys.modules[type(model).__module__].__file__}
    return {**facts, "projection": PCAProjection.from_pretrained(repo).dim if projected else None}


def inspect(repo):
    from typer.testing import CliRunner

    from hf_distill.cli import app

    done = CliRunner().invoke(app, ["inspect", repo, "--check"], env={"COLUMNS": "200"})
    return {"exit_code": done.exit_code, "output": done.output}


def open_pieces(vectors, projection, texts):
    from hf_distill import PCAProjection, TeacherCache

    cache = TeacherCache.open(vectors)
    found = cache.encode(texts)
    projected = PCAProjection.from_pretrained(projection)(found)
    return {"folder": str(cache.folder), "vectors": found.tolist(), "projected": projected.tolist()}


def trainer(folder, teacher, backbone, texts, **options):
    import torch
    from datasets import Dataset

    from hf_distill import DistillationTrainer, DistillationTrainingArguments, EncoderTeacher, PCAProjection, StudentModel
    from hf_distill.losses import HPDLoss

    torch.manual_seed(0)
    live = EncoderTeacher(teacher, dtype="float32", device="cpu")
    defaults = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "save_steps": 10}
    return DistillationTrainer(
        model=StudentModel.from_backbone(backbone, projection_dim=8, dropout=0.0),
        args=DistillationTrainingArguments(folder, **{**defaults, **options}),
        train_dataset=Dataset.from_dict({"text": texts}),
        teacher=live.project(PCAProjection.fit(live.encode(texts), 8)),
        loss=HPDLoss(),
    )


def train(texts, **options):
    made = trainer(texts=texts, **options)
    made.train()
    address = made.push_to_hub()
    return {"address": address, "vectors": made.student.encode(texts[:4]).tolist(), "step": made.state.global_step}


def resume(repo, texts, **options):
    from huggingface_hub import snapshot_download

    folder = snapshot_download(repo, allow_patterns="last-checkpoint/*")
    made = trainer(texts=texts, **options)
    made.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
    return {"resumed": made.resumed_at, "vectors": made.student.encode(texts[:4]).tolist(), "step": made.state.global_step}


def push(folder, repo, **options):
    from hf_distill.hub import publish

    return {"address": publish(folder, repo, **options)}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
