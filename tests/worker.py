"""What one of several processes does: `torchrun --nproc_per_node 2 tests/worker.py SCENARIO FOLDER`; see test_distributed."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from conftest import make_texts
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from hf_distill import DistillationTrainer, DistillationTrainingArguments, HPDLoss, PCAProjection, StudentModel, TeacherCache
from hf_distill.losses import AdditiveMarginSoftmax, FeatureDistillation, LogitDistillation, WeightedLoss
from hf_distill.processes import score


FOLDER = Path(sys.argv[2] if __name__ == "__main__" else ".")
ROWS = 96


class Until(TrainerCallback):
    """Ends its process at a step, as a machine does that loses its power."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            (FOLDER / "died").write_text(f"rank {args.process_index} at step {state.global_step} of {state.max_steps}")
            os.kill(os.getpid(), signal.SIGKILL)


class Bad(HPDLoss):
    """Not finite on one process at the fourth batch."""

    calls = 0

    def __call__(self, student, teacher):
        Bad.calls += 1
        return {"mse": super().__call__(student, teacher)["mse"] / float(Bad.calls != 4 or PartialState().process_index == 0)}


def data(stream=False, rows=ROWS):
    dataset = Dataset.from_dict({"text": make_texts(rows)})
    return dataset.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=16) if stream else dataset


def trainer(name, **options):
    torch.manual_seed(0)
    student = options.pop("model", None) or StudentModel.from_backbone(str(FOLDER / "backbone"), projection_dim=24, dropout=0.0)
    objects = ("loss", "callbacks", "evaluators", "train_dataset", "eval_dataset", "peft_config", "teacher")
    given = {key: options.pop(key) for key in objects if key in options}
    defaults = {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3}
    defaults |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8 // PartialState().num_processes}
    args = DistillationTrainingArguments(str(FOLDER / name), **{**defaults, **options})
    given = {"train_dataset": data(), "loss": HPDLoss(), "teacher": TeacherCache.open(FOLDER / "cache"), **given}
    return DistillationTrainer(model=student, args=args, **given)


def translations():
    """Return what trains on pairs; the 7 sentences on the left stand there many times, on either process."""
    torch.manual_seed(0)
    student = StudentModel.from_backbone(str(FOLDER / "backbone"), projection_dim=12, dropout=0.0)
    student.add_training_head(24)
    left, right = make_texts(7), make_texts(ROWS)
    return {
        "model": student,
        "loss": WeightedLoss([AdditiveMarginSoftmax(), FeatureDistillation(), LogitDistillation()]),
        "train_dataset": Dataset.from_dict({"source": [left[i % 7] for i in range(ROWS)], "target": right}),
        "eval_dataset": None,
        "num_train_epochs": 2,
    }


def digest(model):
    return [round(value.double().sum().item(), 12) for value in model.state_dict().values()]


def ddp():
    state = PartialState(cpu=True)
    facts = {"world": state.num_processes, "type": state.distributed_type.value, "runs": {}}
    calls = []

    def evaluator(encode):
        calls.append(state.process_index)
        vectors = encode(make_texts(77))
        assert encode([]).shape == (0, vectors.shape[1])
        return {"sum": float(vectors.sum()), "rows": len(vectors)}

    runs = {
        "sequential": {"num_train_epochs": 2},
        "grouped": {"num_train_epochs": 2, "train_sampling_strategy": "group_by_length"},
        "uneven": {"num_train_epochs": 2, "train_dataset": data(rows=91)},
        "lora": {"num_train_epochs": 2, "peft_config": LoraConfig(r=4, target_modules="all-linear")},
        "translations": translations(),
        "in parts": {**translations(), "mini_batch_size": 3},
        "stream": {"max_steps": 20, "train_dataset": data(stream=True), "train_sampling_strategy": "group_by_length"},
    }
    for name, options in runs.items():
        options = {"eval_dataset": data(rows=32), **options}
        run = trainer(name, evaluators=[evaluator], per_device_eval_batch_size=4, **options)
        run.train()
        scores = run.evaluate()
        run.save_model()
        found = {key: scores[key] for key in ("eval_sum", "eval_rows", "eval_loss") if key in scores}
        everyone = gather_object([(digest(run.student), found)])
        log = [line for line in run.state.log_history if "loss" in line]
        facts["runs"][name] = {
            "losses": [line["loss"] for line in log],
            "norms": [line["grad_norm"] for line in log],
            "parts": [line[f"loss_{part}"] for line in log for part in run.loss.parts],
            "equal": all(other == everyone[0] for other in everyone),
            "scores": everyone[0][1],
        }
    facts["evaluated on"] = sorted(set(gather_object(calls)))
    if state.is_main_process:
        (FOLDER / f"ddp-{state.num_processes}.json").write_text(json.dumps(facts))


def whole():
    trainer("whole", max_steps=10, save_strategy="steps", save_steps=2, train_sampling_strategy="group_by_length").train()


def die():
    rank = PartialState(cpu=True).process_index
    callbacks = [Until(5)] if rank == 1 else []
    trainer(
        "died-run",
        max_steps=10,
        save_strategy="steps",
        save_steps=2,
        callbacks=callbacks,
        train_sampling_strategy="group_by_length",
    ).train()


def go_on():
    from hf_distill.runs import last_checkpoint

    run = trainer("died-run", max_steps=10, save_strategy="steps", save_steps=2, train_sampling_strategy="group_by_length")
    checkpoint = last_checkpoint(FOLDER / "died-run")
    run.train(resume_from_checkpoint=checkpoint)
    if run.is_world_process_zero():
        (FOLDER / "went-on").write_text(f"from {Path(checkpoint).name} in {run.args.world_size}")


def nan():
    trainer("nan", max_steps=10, save_strategy="steps", save_steps=2, loss=Bad()).train()


def other_data():
    rows = make_texts(ROWS)
    trainer(
        "other",
        max_steps=1,
        train_dataset=Dataset.from_dict({"text": rows[:: -1 if PartialState(cpu=True).process_index else 1]}),
    )


def other_cache():
    cache = TeacherCache.open(FOLDER / "cache")
    rows = make_texts(ROWS)[PartialState(cpu=True).process_index :]  # each process fits a projection of its own
    trainer("other", max_steps=1, teacher=cache.project(PCAProjection.fit(cache.encode(rows), 24)))


def failing_evaluator():
    def fail(encode):
        encode(["a cat"])
        raise ZeroDivisionError("no labels")

    trainer("fail", max_steps=1, evaluators=[fail]).evaluate()


def push():
    """Every save is pushed, by the main process; the adapter's merged."""
    from huggingface_hub import constants
    from peft import LoraConfig

    constants.HF_HUB_OFFLINE = False  # conftest goes offline

    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["projection"])
    hub = {
        "push_to_hub": True,
        "hub_strategy": "checkpoint",
        "hub_always_push": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    for name, options in (("plain", {}), ("adapted", {"peft_config": config})):
        made = trainer(f"pushed-{name}", max_steps=4, hub_model_id=f"alice/{name}", **hub, **options)
        assert PartialState().num_processes == 2
        made.train()
        made.push_to_hub()
        (FOLDER / f"pushed-{name}-{PartialState().process_index}").write_text(str(made.state.global_step))


def zero3():
    """DeepSpeed ZeRO-3 on a CPU: as the yaml's, with `auto` filled in by the Trainer."""
    stage = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": stage, "zero_force_ds_cpu_optimizer": False}
    options = {"num_train_epochs": 2, "deepspeed": config, "save_strategy": "steps", "save_steps": 12, "save_total_limit": None}

    def sums(encode):
        return {"sum": float(encode(make_texts(77)).sum())}

    run = trainer("zero3", evaluators=[sums], **options)
    run.train()
    scores = run.evaluate()
    run.save_model()
    sharded = [parameter.numel() for parameter in run.student.parameters()]
    resumed = trainer("zero3", evaluators=[sums], **options)
    resumed.train(resume_from_checkpoint=str(FOLDER / "zero3" / "checkpoint-12"))
    facts = {
        "type": run.accelerator.state.distributed_type.value,
        "stage": run.accelerator.state.deepspeed_plugin.zero_stage,
        "world": run.args.world_size,
        "held here": sum(sharded),
        "losses": [line["loss"] for line in run.state.log_history if "loss" in line],
        "resumed": [line["loss"] for line in resumed.state.log_history if "loss" in line],
        "scores": {"eval_sum": scores["eval_sum"]},
    }
    if run.is_world_process_zero():
        (FOLDER / "zero3.json").write_text(json.dumps(facts))


def senses():
    """Make a dictionary of the same texts in so many processes."""
    from hf_distill import sense_builder
    from hf_distill.token_teacher import TokenTeacher

    state = PartialState(cpu=True)
    sense_builder._NUMBERS = 50 * 16
    teacher = TokenTeacher(str(FOLDER / "backbone"), dtype="float32")
    read = teacher.states
    texts_read = 0

    def counted(batch):
        nonlocal texts_read
        texts_read += len(batch)
        return read(batch)

    teacher.states = counted
    found = sense_builder.build_senses(teacher, make_texts(300), FOLDER / f"senses-{state.num_processes}", k=4, cap=40)
    counts = gather_object([texts_read])
    if state.is_main_process:
        found.save_pretrained(FOLDER / f"dictionary-{state.num_processes}")
        (FOLDER / f"senses-{state.num_processes}.json").write_text(json.dumps({"world": state.num_processes, "read": counts}))


def retrieval():
    """Make queries, mine negatives, train and search as recipes/embed_distill.py does."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    import embed_distill
    import retrieval as recipe

    from hf_distill.queries import SpanQueries, generate_queries

    state = PartialState(cpu=True)
    world, asked, mined, mine = state.num_processes, [], [], recipe.mine_negatives

    class Counted(SpanQueries):
        def __call__(self, documents, seed=0):
            asked.extend(documents)
            return super().__call__(documents, seed)

    def counted(queries, *args, **kwargs):
        mined.append(len(queries))
        return mine(queries, *args, **kwargs)

    recipe.mine_negatives = counted
    embed_distill.DistillationTrainer.end = lambda self: None  # it leaves the launch, and there is more to gather
    made = generate_queries(make_texts(64), Counted(2), FOLDER / f"queries-{world}", shard_size=8)
    flags = f"--collection {FOLDER / 'collection'} --teacher {FOLDER / 'teacher'} --backbone {FOLDER / 'backbone'} --layers 0 2"
    flags += f" --negatives 2 --per_device_train_batch_size {8 // world} --num_train_epochs 2 --learning_rate 5e-3 --spans 1"
    flags += f" --output_dir {FOLDER / f'retrieval-run-{world}'} --cache_dir {FOLDER / f'retrieval-caches-{world}'}"
    flags += " --disable_tqdm true --use_cpu true --bf16 false --attention eager --index_report false --dropout 0"
    embed_distill.main(flags.split())
    counts = gather_object([{"asked": len(asked), "mined": mined, "made": made.to_list()}])
    if state.is_main_process:
        (FOLDER / f"retrieval-{world}.json").write_text(json.dumps(counts))


def fsdp2():
    """What Accelerate does on GPUs, by torch's own `fully_shard` (the Trainer's FSDP does not run on a CPU)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    state = PartialState(cpu=True)
    torch.manual_seed(0)
    student = StudentModel.from_backbone(str(FOLDER / "backbone"), projection_dim=24, dropout=0.0)
    if state.num_processes > 1:
        for layer in student.backbone.encoder.layer:
            fully_shard(layer)
        fully_shard(student)
    cache, loss, losses = TeacherCache.open(FOLDER / "cache"), HPDLoss(), []
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    for start in range(0, ROWS, 8):
        texts = make_texts(ROWS)[start : start + 8][state.process_index :: state.num_processes]
        inputs = student.tokenizer(texts, padding=True, return_tensors="pt")
        value = loss(student(**inputs).projected[:, None], cache.encode(texts)[:, None])["mse"]
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(state_mean(value))
    sums = score([lambda encode: {"sum": float(encode(make_texts(77)).sum())}], student.encode)
    whole = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    student.save_pretrained(FOLDER / f"fsdp2-{state.num_processes}", state_dict=whole, is_main_process=state.is_main_process)
    if state.is_main_process:
        facts = {"world": state.num_processes, "class": type(student).__name__, "losses": losses, "scores": sums}
        facts["local"] = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in student.parameters())
        (FOLDER / f"fsdp2-{state.num_processes}.json").write_text(json.dumps(facts))


def state_mean(value):
    return sum(gather_object([value.item()])) / PartialState().num_processes


def checkpoint_kills():
    """Train once whole; then, for each given write of the second checkpoint, die there and go on, in fresh processes."""
    import random

    import transformers.modeling_utils

    import hf_distill.student
    from hf_distill.runs import last_checkpoint

    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "group_by_length"}
    writes, kill_at = [], 0

    def write(path):
        if "checkpoint-6" in str(path):
            writes.append(Path(path).name)
            if len(writes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(function, place):
        def call(*args, **kwargs):
            write(kwargs.get("filename", args[place] if len(args) > place else ""))
            return function(*args, **kwargs)

        return call

    # Everything Python opens itself, and the two writers that do not go through it.
    sys.addaudithook(lambda event, args: write(args[0]) if event == "open" and "w" in str(args[1]) else None)
    torch.save = watched(torch.save, 1)
    for module, name in ((transformers.modeling_utils, "safe_save_file"), (hf_distill.student, "save_file")):
        setattr(module, name, watched(getattr(module, name), 1))

    def child(work):
        process = os.fork()
        if process == 0:
            work()
            os._exit(0)
        return os.waitpid(process, 0)[1]

    def whole_run():
        trainer("kill-0", **options).train()
        (FOLDER / "writes.json").write_text(json.dumps(writes))

    def go_on(name):
        run = trainer(name, **options)
        checkpoint = last_checkpoint(FOLDER / name)
        run.train(resume_from_checkpoint=checkpoint)
        (FOLDER / f"{name}.json").write_text(json.dumps(Path(checkpoint).name))

    assert child(whole_run) == 0
    total = len(json.loads((FOLDER / "writes.json").read_text()))
    facts = {"writes": total, "kills": {}}
    for number in sorted(random.Random(0).sample(range(1, total + 1), 6)):
        kill_at, name = number, f"kill-{number}"
        died = child(lambda name=name: trainer(name, **options).train())
        kill_at = 0
        again = child(lambda name=name: go_on(name))
        facts["kills"][name] = {"signal": os.WTERMSIG(died) if os.WIFSIGNALED(died) else 0, "again": again}
        facts["kills"][name]["from"] = json.loads((FOLDER / f"{name}.json").read_text())
    (FOLDER / "kills.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    state = PartialState(cpu=True)
    globals()[sys.argv[1]]()
    state.wait_for_everyone()  # gloo's threads may abort a process that leaves while another still works
    state.destroy_process_group()
