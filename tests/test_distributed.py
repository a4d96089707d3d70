import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_texts
from safetensors.torch import load_file

from hf_distill import StudentModel, TeacherCache
from hf_distill.layout import check_layout
from hf_distill.trainer import last_checkpoint


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
        for name in ("sequential", "grouped", "uneven", "stream"):
            (folder / name).rename(folder / f"models-{processes}" / name)
    return {n: json.loads((folder / f"ddp-{n}.json").read_text()) for n in (1, 2)}


def test_two_processes_are_two_and_end_with_equal_parameters(runs):
    assert (runs[1]["world"], runs[2]["world"]) == (1, 2)
    assert runs[2]["type"] == "MULTI_CPU"
    assert all(run["equal"] for run in runs[2]["runs"].values())
    assert runs[2]["evaluated on"] == [0]


@pytest.mark.parametrize("name", ["sequential", "grouped", "stream"])
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


def test_processes_with_other_data_are_refused(folder):
    done = launch("other_data", folder)
    assert done.returncode != 0
    assert "process 1 has another data than process 0" in done.stderr
    assert not list((folder / "other").glob("checkpoint-*"))


def test_an_evaluator_that_fails_on_the_main_process_ends_all(folder):
    done = launch("failing_evaluator", folder)
    assert "ZeroDivisionError: no labels" in done.stderr
    assert "an evaluator failed on the main process: ZeroDivisionError('no labels')" in done.stderr
