import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_texts
from safetensors.torch import load_file

from hf_distill import StudentModel, TeacherCache
from hf_distill.layout import check_layout
from hf_distill.runs import last_checkpoint
from hf_distill.senses import SenseDictionary
from hub_server import HubServer


pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ROOT = HERE.parent
_PORT = 29710


def launch(scenario, folder, processes=2, timeout=240, **environment):
    """Run a scenario of worker.py in so many processes."""
    global _PORT
    _PORT += 1
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={_PORT}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command += [str(HERE / "worker.py"), scenario, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def succeed(scenario, folder, processes=2, **environment):
    done = launch(scenario, folder, processes, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher):
    from conftest import make_backbone

    folder = tmp_path_factory.mktemp("distributed")
    make_backbone(folder / "backbone")
    TeacherCache(teacher, folder / "cache", dtype="float32", shard_size=20, batch_size=8).add(make_texts(96))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Return what one and two processes did."""
    for processes in (1, 2):
        succeed("ddp", folder, processes)
        (folder / f"models-{processes}").mkdir()
        for name in ("sequential", "grouped", "uneven", "lora", "translations", "in parts", "stream"):
            (folder / name).rename(folder / f"models-{processes}" / name)
    return {n: json.loads((folder / f"ddp-{n}.json").read_text()) for n in (1, 2)}


def test_two_processes_are_two_and_end_with_equal_parameters(runs):
    assert (runs[1]["world"], runs[2]["world"]) == (1, 2)
    assert runs[2]["type"] == "MULTI_CPU"
    assert all(run["equal"] for run in runs[2]["runs"].values())
    assert runs[2]["evaluated on"] == [0]


@pytest.mark.parametrize("name", ["sequential", "grouped", "lora", "translations", "in parts", "stream"])
def test_two_halves_of_a_batch_are_the_batch(name, runs, folder):
    one, two = (runs[n]["runs"][name] for n in (1, 2))
    assert len(one["losses"]) >= 20
    for what in ("losses", "norms", "parts"):
        assert two[what] == pytest.approx(one[what], rel=2e-4)
    for key, value in one["scores"].items():
        assert two["scores"][key] == pytest.approx(value, rel=1e-3)
    first, second = (load_file(folder / f"models-{n}" / name / "2_Dense" / "model.safetensors") for n in (1, 2))
    assert torch.allclose(first["linear.weight"], second["linear.weight"], atol=1e-5)
    check_layout(folder / "models-2" / name)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_in_parts_is_the_batch(processes, runs):
    whole, parts = (runs[processes]["runs"][name] for name in ("translations", "in parts"))
    for what in ("losses", "norms", "parts"):
        assert parts[what] == pytest.approx(whole[what], rel=2e-4)


def test_uneven_last_batches_are_filled_and_nobody_waits(runs):
    one, two = (runs[n]["runs"]["uneven"] for n in (1, 2))
    assert len(two["losses"]) == len(one["losses"]) == 24
    assert two["losses"][:11] == pytest.approx(one["losses"][:11], rel=2e-4)
    assert two["scores"]["eval_rows"] == 77


def test_a_process_that_dies_ends_the_other_and_leaves_a_checkpoint_that_goes_on(folder):
    succeed("whole", folder)
    dead = launch("die", folder)
    assert (folder / "died").read_text() == "rank 1 at step 5 of 10"
    assert dead.returncode != 0
    assert "rank      : 1" in dead.stderr
    assert "Signal 9 (SIGKILL)" in dead.stderr
    assert Path(last_checkpoint(folder / "died-run")).name == "checkpoint-4"
    succeed("go_on", folder)
    assert (folder / "went-on").read_text() == "from checkpoint-4 in 2"
    one, other = (StudentModel.from_pretrained(folder / name / "checkpoint-10").state_dict() for name in ("whole", "died-run"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_loss_that_is_not_finite_on_one_process_ends_both(folder):
    done = launch("nan", folder)
    assert done.returncode != 0
    assert "FloatingPointError: DistillationTrainer: at step 3 the loss is {'mse': inf}" in done.stderr
    assert Path(last_checkpoint(folder / "nan")).name == "checkpoint-2"


@pytest.mark.parametrize(("scenario", "what"), [("other_data", "data"), ("other_cache", "teacher_fingerprint")])
def test_processes_with_other_data_or_targets_are_refused(scenario, what, folder):
    done = launch(scenario, folder)
    assert done.returncode != 0
    assert f"process 1 has another {what} than process 0" in done.stderr
    assert not list((folder / "other").glob("checkpoint-*"))


def test_an_evaluator_that_fails_on_the_main_process_ends_all(folder):
    done = launch("failing_evaluator", folder)
    assert "ZeroDivisionError: no labels" in done.stderr
    assert "an evaluator failed on the main process: ZeroDivisionError('no labels')" in done.stderr


def test_two_processes_push_once_and_whole(folder):
    with HubServer() as hub:
        succeed("push", folder, **hub.env(folder / "home"))
        for name in ("plain", "adapted"):
            assert [(folder / f"pushed-{name}-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
            history = hub.store.repos["models", f"alice/{name}"].history("main")
            steps = [commit for commit in history if "step" in commit.title]
            assert [commit.title[-1] for commit in steps] == ["4", "2"]
            for number, commit in enumerate(history[:-1]):
                files = hub.files(f"alice/{name}", commit.sha)
                assert not [path for path, data in files.items() if str(folder).encode() in data]
                assert "last-checkpoint/trainer_state.json" in files
                for path, data in files.items():
                    place = folder / f"{name}-{number}" / path
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(data)
                assert check_layout(folder / f"{name}-{number}")["SentenceTransformer"] >= 0.99999


def test_zero3_trains_saves_and_goes_on(runs, folder):
    succeed("zero3", folder, DS_ACCELERATOR="cpu")
    found = json.loads((folder / "zero3.json").read_text())
    assert (found["type"], found["stage"], found["world"]) == ("DEEPSPEED", 3, 2)
    assert found["held here"] == 0  # nothing lies whole on a process between two steps
    plain = runs[1]["runs"]["sequential"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert found["resumed"][-12:] == found["losses"][-12:]
    assert found["scores"]["eval_sum"] == pytest.approx(plain["scores"]["eval_sum"], rel=1e-3)
    check_layout(folder / "zero3")
    one, other = (load_file(folder / name / "model.safetensors") for name in ("models-1/sequential", "zero3"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


def test_fully_sharded_student_computes_what_the_whole_one_does_and_is_saved(folder):
    for processes in (1, 2):
        succeed("fsdp2", folder, processes)
    one, two = (json.loads((folder / f"fsdp2-{n}.json").read_text()) for n in (1, 2))
    assert (one["class"], two["class"]) == ("StudentModel", "FSDPStudentModel")
    assert (one["world"], two["world"]) == (1, 2)
    assert two["local"] <= 0.6 * one["local"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["scores"]["sum"] == pytest.approx(one["scores"]["sum"], rel=1e-3)
    check_layout(folder / "fsdp2-2")


STEPS = ["--max_steps", "2", "--bf16", "false", "--disable_tqdm", "true", "--held_out", "20"]
HPD = ["--dims", "4", "--dim", "8"]


def accelerate_launch(options, folder, teacher_folder, output, recipe="hpd", own=HPD):
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(120, seed=3)))
    flags = [*STEPS, *own, "--teacher", teacher_folder, "--backbone", str(folder / "backbone"), "--texts", str(texts)]
    flags += ["--output_dir", str(folder / output), "--cache_dir", str(folder / f"{recipe}-cache"), "--use_cpu", "true"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(ROOT / "recipes" / f"{recipe}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_recipe_in_two_processes_ends_with_one_table(folder, teacher_folder):
    config = ROOT / "recipes" / "accelerate" / "two_processes_cpu.yaml"
    done = accelerate_launch(["--config_file", str(config), "--main_process_port", "29790"], folder, teacher_folder, "out")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["hyperparameters"]["batch"] == 128  # 64 on each
    assert done.stdout.count("from sentence_transformers import") == 1
    check_layout(folder / "out")


def test_the_recipe_of_senses_in_two_processes_makes_one_dictionary_and_one_student(folder):
    config = ROOT / "recipes" / "accelerate" / "two_processes_cpu.yaml"
    options = ["--config_file", str(config), "--main_process_port", "29791"]
    own = ["--layers", "0", "2", "--k", "3"]
    done = accelerate_launch(options, folder, str(folder / "backbone"), "senses-student", "multi_sense", own)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "senses-student" / "results.json").read_text())
    assert results["hyperparameters"]["batch"] == 128  # 64 on each
    assert done.stdout.count("student, without senses") == 1  # the table
    dictionary = SenseDictionary.from_pretrained(folder / "senses-student-senses")
    assert dictionary.facts["texts"] == 100
    assert results["dictionary"]["senses"] == len(dictionary.senses)
    assert results["dictionary"]["sense_accuracy"] > 0
    check_layout(folder / "senses-student")


@pytest.mark.parametrize(
    "options",
    [["--cpu", "--num_processes", "2"], ["--config_file", "CONFIG"]],
)
def test_a_launch_that_would_run_one_process_is_refused(options, folder, teacher_folder):
    (folder / "multi_cpu.yaml").write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n")
    options = [str(folder / "multi_cpu.yaml") if option == "CONFIG" else option for option in options]
    done = accelerate_launch(options, folder, teacher_folder, "refused")
    assert done.returncode != 0
    assert "was asked for several processes, but runs this one alone" in done.stderr
    assert not (folder / "refused" / "model.safetensors").exists()


def test_fsdp_on_a_cpu_is_refused(folder, teacher_folder):
    config = (ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text()
    (folder / "fsdp_cpu.yaml").write_text(config.replace("num_processes: 8", "num_processes: 2\nuse_cpu: true"))
    done = accelerate_launch(["--config_file", str(folder / "fsdp_cpu.yaml")], folder, teacher_folder, "fsdp")
    assert done.returncode != 0
    assert "the launch asks for FSDP, but what runs is MULTI_CPU" in done.stderr


def test_killed_at_any_write_of_a_checkpoint_training_goes_on_and_ends_the_same(folder):
    succeed("checkpoint_kills", folder, processes=1)
    found = json.loads((folder / "kills.json").read_text())
    assert found["writes"] > 15
    assert len(found["kills"]) == 6
    whole = StudentModel.from_pretrained(folder / "kill-0" / "checkpoint-9").state_dict()
    state = json.loads((folder / "kill-0" / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    for name, kill in found["kills"].items():
        assert kill == {"signal": signal.SIGKILL, "again": 0, "from": "checkpoint-3"}  # work was left
        other = StudentModel.from_pretrained(folder / name / "checkpoint-9").state_dict()
        assert all(torch.equal(whole[key], other[key]) for key in whole)
        history = json.loads((folder / name / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
        assert [line["loss"] for line in history] == [line["loss"] for line in state]


def test_two_processes_make_the_dictionary_of_one(folder):
    for processes in (1, 2):
        succeed("senses", folder, processes)
    facts = [json.loads((folder / f"senses-{n}.json").read_text()) for n in (1, 2)]
    assert [len(fact["read"]) for fact in facts] == [fact["world"] for fact in facts] == [1, 2]
    assert facts[0]["read"][0] > 250  # a text whose tokens are all above the sample is not read
    assert all(100 < count < 200 for count in facts[1]["read"])
    one, two = (SenseDictionary.from_pretrained(folder / f"dictionary-{n}") for n in (1, 2))
    assert torch.equal(one.offsets, two.offsets)
    assert torch.equal(one.counts, two.counts)
    assert (one.senses - two.senses).abs().max() < 2e-3  # float16, and batches of other lengths


def test_two_processes_make_queries_mine_and_search_as_one(folder, collection, teacher_folder):
    shutil.copytree(collection[0], folder / "collection")
    shutil.copytree(teacher_folder, folder / "teacher")
    for processes in (1, 2):
        succeed("retrieval", folder, processes)
    [one], two = (json.loads((folder / f"retrieval-{n}.json").read_text()) for n in (1, 2))
    assert len(two) == 2
    assert one["asked"] == 64
    assert [each["asked"] for each in two] == [32, 32]
    assert one["made"] == two[0]["made"] == two[1]["made"]
    assert len(one["mined"]) == 1
    assert [each["mined"] for each in two] == [one["mined"], []]
    results = [json.loads((folder / f"retrieval-run-{n}" / "results.json").read_text()) for n in (1, 2)]
    assert results[0]["data"] == results[1]["data"]
    scores = [result["rows"]["student"]["scores"] for result in results]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)
    assert scores[0] != results[0]["rows"]["untrained student"]["scores"]
    log = (folder / "retrieval-caches-2" / "test-evaluations.jsonl").read_text().splitlines()
    assert len(log) == 3  # teacher, untrained student, student: once each, whatever the processes
