import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, utils
from safetensors.torch import save_file
from typer.testing import CliRunner

import hf_distill
from hf_distill import PCAProjection, StudentModel
from hf_distill.cli import app
from hf_distill.hub import publish
from hf_distill.layout import check_layout
from hf_distill.multi_sense import MultiSenseStudent
from hf_distill.sense_builder import build_senses
from hf_distill.token_teacher import TokenTeacher
from hub_server import CUT, HANG, HubServer


CLIENT = Path(__file__).with_name("hub_client.py")
modes = pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])


SECRETS = {"WANDB_API_KEY": "not-for-anybody-1", "AWS_SECRET_ACCESS_KEY": "not-for-anybody-2"}


def start(hub, home, scenario, **options):
    env = {**os.environ, **hub.env(home), **SECRETS, "PYTHONPATH": str(Path(hf_distill.__file__).parents[1])}
    env |= {"HF_HUB_OFFLINE": "1"} if options.pop("offline", False) else {}
    command = [sys.executable, str(CLIENT), scenario, json.dumps(options)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def client(hub, home, scenario, **options):
    """Do something in a fresh process with a cache of its own; return what it says."""
    process = start(hub, home, scenario, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


both = pytest.mark.parametrize("hub", [False, True], ids=["lfs", "xet"], indirect=True)


@pytest.fixture
def folder(tmp_path):
    """A small repository: a card, and weights that go to the storage."""
    made = tmp_path / "student"
    made.mkdir()
    torch.manual_seed(0)
    save_file({"weight": torch.randn(64, 64)}, made / "model.safetensors")
    (made / "config.json").write_text("{}")
    (made / "README.md").write_text("---\nlicense: mit\n---\n\n# A student\n")
    return made


def pushed(hub, folder):
    """Return whether the repository holds what the folder holds."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return hub.files("alice/student") == files


@modes
def test_the_whole_flow(xet, teacher_folder, backbone_folder, texts, tmp_path):
    options = {"teacher": teacher_folder, "backbone": backbone_folder, "texts": texts, "max_steps": 20}
    hubbed = {"push_to_hub": True, "hub_model_id": "alice/tiny", "hub_strategy": "checkpoint", "hub_always_push": True}
    secret = "hf_alice"
    with HubServer(xet=xet) as hub:
        hubbed["hub_token"] = secret
        run = client(hub, tmp_path / "0", "train", folder=str(tmp_path / "tiny"), save_strategy="steps", **options, **hubbed)
        assert run["address"] == f"{hub.url}/alice/tiny"
        assert run["step"] == 20
        titles = [commit.title for commit in hub.store.repos["models", "alice/tiny"].history("main")]
        assert titles[-3:] == ["Training in progress, step 20", "Training in progress, step 10", "initial commit"]
        # The last step was pushed whole; safetensors writes what stands in a file's head in any order.
        assert titles[:-3] in ([], ["End of training"])

        files = hub.files("alice/tiny")
        layout = {"config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"}
        layout |= {"student.py", "tokenizer.json", "README.md", "distillation.json", "teacher_projection.safetensors"}
        assert layout <= files.keys()
        root = {path for path in files if "/" not in path}
        assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"} & root
        assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= files.keys()
        hidden = [word.encode() for word in (secret, *SECRETS.values(), str(tmp_path), f"{Path.home()}/")]
        assert not [(path, word) for path, data in files.items() for word in hidden if word in data]
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "sentence-transformers"
        assert "alice/tiny" in card.text

        # Mid-training pushes are whole, too.
        step = next(c for c in hub.store.repos["models", "alice/tiny"].history("main") if c.title.endswith("step 10"))
        for path, data in hub.files("alice/tiny", step.sha).items():
            kept = tmp_path / "step-10" / path
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        assert check_layout(tmp_path / "step-10")["SentenceTransformer"] >= 0.99999

        weights = r"/xorb/|/lfs/"
        scenarios = ("open_ours", "open_transformers", "open_sentence_transformers", "open_plain")
        for number, scenario in enumerate(scenarios, 1):
            before = len(hub.sent(weights))
            more = {"projected": True} if scenario == "open_ours" else {}
            found = client(hub, tmp_path / str(number), scenario, repo="alice/tiny", texts=texts[:4], **more)
            assert len(hub.sent(weights)) > before, scenario  # over HTTP, not from a cache
            if scenario == "open_plain":
                assert found == {"class": "BertModel", "lost": []}
            else:
                assert np.allclose(found["vectors"], run["vectors"], atol=1e-5), scenario
            if scenario == "open_transformers":
                assert "transformers_modules" in found["file"]
                assert found["class"] == "StudentModel"
        resumed = client(
            hub, tmp_path / "5", "resume", repo="alice/tiny", folder=str(tmp_path / "more"), **{**options, "max_steps": 30}
        )
        assert (resumed["resumed"], resumed["step"]) == (20, 30)


@both
def test_a_push_is_one_commit_and_says_where(hub, folder):
    assert publish(folder, "student") == f"{hub.url}/alice/student"
    assert pushed(hub, folder)
    assert len(hub.store.repos["models", "alice/student"].commits) == 2
    assert bool(hub.storage.files) == hub.xet  # that way, and no other
    tip = hub.tip("alice/student")
    publish(folder, "student")
    assert hub.tip("alice/student") == tip  # nothing new
    (folder / "config.json").write_text('{"changed": 1}')
    publish(folder, "alice/student", revision="trial", message="Try")
    assert hub.tip("alice/student") == tip
    assert hub.files("alice/student", "trial")["config.json"] == b'{"changed": 1}'
    publish(folder, "acme/student", private=True)
    assert hub.store.repos["models", "acme/student"].private


def test_a_projection_in_a_students_repository_leaves_the_student(hub, folder):
    publish(folder, "student")
    (folder / "config.json").rename(folder / "other.json")
    (folder / "model.safetensors").rename(folder / "teacher_projection.safetensors")
    publish(folder, "student")
    assert {"config.json", "model.safetensors", "teacher_projection.safetensors"} <= hub.files("alice/student").keys()


def test_private_is_not_pushed_to_what_is_public(hub, folder):
    publish(folder, "student")
    tip = hub.tip("alice/student")
    (folder / "config.json").write_text('{"secret": 1}')
    with pytest.raises(ValueError, match=r"alice/student is there already, and public, expected a private one"):
        publish(folder, "student", private=True)
    assert hub.tip("alice/student") == tip
    publish(folder, "hidden", private=True)
    publish(folder, "hidden", private=True)
    assert hub.store.repos["models", "alice/hidden"].private


def test_what_names_the_machine_stays(hub, folder):
    for path in ("runs/Nov23_host/events.out.tfevents.1.host.2.0", "emissions.csv", "events.out.tfevents.3"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"host")
    publish(folder, "student")
    assert hub.files("alice/student").keys() == {"README.md", "config.json", "model.safetensors"}


def test_weights_of_an_earlier_push_go_with_the_next(hub, folder):
    save_file({"weight": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / "results.json").write_text("{}")
    (folder / "index.png").write_bytes(b"drawn")
    checkpoint = folder.parent / "checkpoint"
    checkpoint.mkdir()
    save_file({"weight": torch.ones(3)}, checkpoint / "model.safetensors")
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    publish(folder, "student", also={"last-checkpoint": checkpoint})
    gone = ("model-00002-of-00002.safetensors", "2_Dense/config.json", "notes.txt", "results.json", "index.png")
    for name in gone:
        (folder / name).unlink()
    publish(folder, "student")
    left = hub.files("alice/student").keys() - {"README.md", "config.json", "model.safetensors"}
    assert left == {"notes.txt", "last-checkpoint/model.safetensors", "last-checkpoint/optimizer.pt"}


STORAGE = {False: ("PUT", "/lfs/"), True: ("POST", "/v1/xorbs/")}


@both
@pytest.mark.parametrize("answer", [500, CUT], ids=["500", "dropped"])
def test_storage_that_fails_twice_is_asked_again(hub, folder, answer, monkeypatch):
    monkeypatch.setattr(utils._http.time, "sleep", lambda seconds: None)  # it backs off for 1 + 2 s
    with hub.fail(*STORAGE[hub.xet], answer, times=2) as fault:
        publish(folder, "student")
    assert fault.fired == 2
    assert pushed(hub, folder)


@both
@pytest.mark.parametrize("answer", [500, CUT], ids=["500", "dropped"])
def test_a_commit_that_fails_twice_is_sent_again(hub, folder, answer):
    with hub.fail("POST", "/commit/", answer, times=2) as fault:
        publish(folder, "student")
    assert fault.fired == 2
    assert pushed(hub, folder)


@both
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, folder, monkeypatch):
    answer, lost = type(hub)._answer, []

    async def lose(self, request, path):
        response = await answer(self, request, path)
        if "/commit/" in path and not lost:
            lost.append(response.status_code)
            response.status_code = 500
        return response

    (folder / "modules.json").write_text("[]")
    publish(folder, "student")
    (folder / "modules.json").unlink()  # the next push deletes it, too
    (folder / "config.json").write_text("{} ")
    monkeypatch.setattr(type(hub), "_answer", lose)
    publish(folder, "student")
    assert lost == [200]
    assert pushed(hub, folder)
    assert len(hub.store.repos["models", "alice/student"].commits) == 3


@both
def test_failing_for_good_leaves_the_branch_and_running_again_completes(hub, folder):
    publish(folder, "student")
    tip = hub.tip("alice/student")
    save_file({"weight": torch.ones(64, 64)}, folder / "model.safetensors")
    with (
        hub.fail("POST", "/commit/", 500, times=9) as fault,
        pytest.raises(ConnectionError, match=r"The branch main of student is as it was\. Run it again"),
    ):
        publish(folder, "student")
    assert fault.fired == 3
    save_file({"weight": torch.zeros(64, 64)}, folder / "model.safetensors")
    with hub.fail(*STORAGE[hub.xet], 403, times=9) as fault, pytest.raises(OSError, match=r"as it was"):
        publish(folder, "student")
    assert fault.fired >= 1
    assert hub.tip("alice/student") == tip
    publish(folder, "student")
    assert pushed(hub, folder)


@modes
def test_killed_in_mid_upload_the_branch_stays_and_running_again_completes(xet, folder, tmp_path):
    with HubServer(xet=xet) as hub:
        with hub.fail(*STORAGE[xet], HANG) as fault:
            process = start(hub, tmp_path / "home", "push", folder=str(folder), repo="alice/student")
            assert fault.reached.wait(60)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
        assert fault.fired == 1
        assert hub.files("alice/student") == {}
        client(hub, tmp_path / "home", "push", folder=str(folder), repo="alice/student")
        assert pushed(hub, folder)


def test_somebody_else_who_pushed_meanwhile_is_not_overwritten(hub, folder, monkeypatch):
    publish(folder, "student")
    (folder / "config.json").write_text("{} ")
    repo, answer = hub.store.repos["models", "alice/student"], type(hub)._answer

    async def between(self, request, path):
        if "/preupload/" in path and len(repo.commits) == 2:
            repo.commit("main", "theirs", repo.at("main").files)
        return await answer(self, request, path)

    monkeypatch.setattr(type(hub), "_answer", between)
    with pytest.raises(ConnectionError, match=r"somebody has pushed to student meanwhile.*Run again"):
        publish(folder, "student")
    assert repo.at("main").title == "theirs"
    publish(folder, "student")
    assert pushed(hub, folder)


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_nobody", "alice/student", r"no token, or one that the Hub does not know.*hf auth login"),
        ("hf_reader", "alice/student", r"this token may not write to alice/student.*write access"),
        ("hf_alice", "bob/student", r"this token may not write to bob/student.*namespace"),
        ("hf_alice", "bob/taken", r"this token may not write to bob/taken.*namespace"),
        ("hf_alice", "bob/secret", r"this token may not write to bob/secret.*namespace"),
    ],
)
def test_who_may_not_write_is_told_so(hub, folder, token, name, message):
    publish(folder, "bob/taken", token="hf_bob")
    publish(folder, "bob/secret", token="hf_bob", private=True)
    publish(folder, "alice/student")
    before = {key: dict(repo.branches) for key, repo in hub.store.repos.items()}
    with pytest.raises(PermissionError, match=message):
        publish(folder, name, token=token)
    assert {key: repo.branches for key, repo in hub.store.repos.items()} == before


def test_without_a_token_one_is_told_to_log_in(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"there is no token.*hf auth login"):
        publish(folder, "alice/student")


def test_bad_input_is_refused_before_anything_is_sent(hub, folder):
    with pytest.raises(ValueError, match=r"'a/b/c' is no name of a repository"):
        publish(folder, "a/b/c")
    with pytest.raises(ValueError, match=r"holds no file to publish"):
        publish(folder.parent / "nothing", "student")
    for data, message in (
        ('{"token": "hf_alice"}', r"config.json holds a token"),
        (f'{{"a": "hf_{"x" * 34}"}}', r"config.json holds a token"),
        (f'{{"a": "{Path.home()}/data"}}', r"config.json names"),
    ):
        (folder / "config.json").write_text(data)
        with pytest.raises(ValueError, match=message):
            publish(folder, "student")
    assert hub.log == []
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: none-of-your-business\n---\n")
    with pytest.raises(ValueError, match=r"the Hub refuses the card.*\n.*\"license\" must be one of the known"):
        publish(folder, "student")
    assert hub.files("alice/student") == {}


def test_a_student_at_hand_is_pushed_with_a_card(hub, student, tmp_path):
    student.push_to_hub("alice/by-hand", private=True, commit_message="By hand")
    assert hub.store.repos["models", "alice/by-hand"].at("main").title == "By hand"
    files = hub.files("alice/by-hand")
    assert {"student.py", "modules.json", "2_Dense/model.safetensors", "README.md"} <= files.keys()
    assert "alice/by-hand" in files["README.md"].decode()
    student.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "training.png").write_bytes(b"png")
    again = StudentModel.from_pretrained(tmp_path / "run")
    again.push_to_hub("alice/by-hand")
    assert hub.files("alice/by-hand")["training.png"] == b"png"
    with torch.no_grad():
        again.projection.weight += 1
    again.push_to_hub("alice/changed")  # what was measured is not of these weights
    assert "training.png" not in hub.files("alice/changed")


def test_a_download_that_breaks_off_goes_on(hub, folder, tmp_path):
    publish(folder, "student")
    pattern = "/xorb/" if hub.xet else "/lfs/"
    env = hub.env(tmp_path / "home")
    code = "from huggingface_hub import hf_hub_download as d; print(d('alice/student', 'model.safetensors'))"
    with hub.fail("GET", pattern, CUT) as fault:
        started = time.time()
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert fault.fired == 1, time.time() - started
    assert Path(done.stdout.strip()).read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_teacher_cache_and_a_projection_open_by_id_in_place_of_being_made(hub, cache, texts, tmp_path):
    projection = PCAProjection.fit(cache, dim=8)
    assert cache.push_to_hub("alice/vectors") == f"{hub.url}/datasets/alice/vectors"
    assert projection.push_to_hub("alice/pca") == f"{hub.url}/alice/pca"
    assert {"manifest.json", "README.md"} <= hub.files("alice/vectors", kind="datasets").keys()
    found = client(hub, tmp_path / "home", "open_pieces", vectors="alice/vectors", projection="alice/pca", texts=texts)
    assert str(tmp_path / "home") in found["folder"]
    assert np.array_equal(found["vectors"], cache.encode(texts).numpy())
    assert np.array_equal(found["projected"], projection(cache.encode(texts)).numpy())


def test_a_student_that_speaks_senses_finds_its_dictionary_beside_it(hub, backbone_folder, texts, tmp_path):
    teacher = TokenTeacher(backbone_folder, dtype="float32")
    dictionary = build_senses(teacher, texts, tmp_path / "states", k=3, cap=20)
    student = MultiSenseStudent.from_backbone(backbone_folder, layers=[0, 2])
    student.attach(dictionary, "../speaker-senses")
    assert dictionary.push_to_hub("alice/speaker-senses", private=True) == f"{hub.url}/alice/speaker-senses"
    assert {"senses.safetensors", "tokenizer.json", "README.md"} <= hub.files("alice/speaker-senses").keys()
    assert len(hub.store.repos["models", "alice/speaker-senses"].commits) == 2  # it was made, and filled at once
    assert hub.store.repos["models", "alice/speaker-senses"].private
    card = hub.files("alice/speaker-senses")["README.md"].decode()
    assert "up to 3 vectors of 16 dimensions" in card
    assert f"| texts | {dictionary.facts['texts']} |" in card
    student.push_to_hub("alice/speaker")
    before = len(hub.log)
    found = client(hub, tmp_path / "home", "open_transformers", repo="alice/speaker", texts=texts[:4])
    assert any("speaker-senses" in one.path for one in hub.sent("", before))
    assert found["class"] == "MultiSenseStudent"
    assert np.allclose(found["vectors"], student.eval().encode(texts[:4]), atol=1e-5)
    plain = student.encode(texts[:4], replace=False)
    assert not np.allclose(found["vectors"], plain, atol=1e-2)


@pytest.mark.parametrize("way", ["line", "hand"])
def test_a_push_takes_the_dictionary_beside_the_student_along_and_an_earlier_one_stays(
    way, hub, backbone_folder, texts, tmp_path, monkeypatch
):
    teacher, wanted, commits = TokenTeacher(backbone_folder, dtype="float32"), [], []
    for number in (3, 2):  # the second in place of the first
        dictionary = build_senses(teacher, texts, tmp_path / "states", k=number, cap=20)
        dictionary.save_pretrained(tmp_path / "out-senses")
        student = MultiSenseStudent.from_backbone(backbone_folder, layers=[0, 2], dropout=0.0)
        student.attach(dictionary, "../out-senses")
        student.save_pretrained(tmp_path / "out")
        wanted.append(student.eval().encode(texts[:4]))
        if way == "line":
            monkeypatch.chdir(tmp_path / "out")
            done = CliRunner().invoke(app, ["push", ".", "alice/speaker", "--private"])
            assert done.exit_code == 0, done.output
        else:
            MultiSenseStudent.from_pretrained(tmp_path / "out").push_to_hub("alice/speaker", private=True)
        assert hub.store.repos["models", "alice/out-senses"].private
        commits.append(hub.tip("alice/speaker"))
        assert hub.files("alice/out-senses", revision=dictionary.digest)["senses.safetensors"]
    assert not np.allclose(wanted[0], wanted[1], atol=1e-3)
    for vectors, revision in zip(wanted, commits, strict=True):
        found = client(hub, tmp_path / "home", "open_transformers", repo="alice/speaker", texts=texts[:4], revision=revision)
        assert found["class"] == "MultiSenseStudent"
        assert np.allclose(found["vectors"], vectors, atol=1e-5)
    looked = client(hub, tmp_path / "home", "inspect", repo="alice/speaker")  # the Hub's cache is a folder, too
    assert looked["exit_code"] == 0, looked["output"]
    assert "AutoModel(trust_remote_code=True)" in looked["output"]


def test_a_dictionary_elsewhere_on_this_machine_is_not_named_to_others(hub, backbone_folder, texts, tmp_path):
    dictionary = build_senses(TokenTeacher(backbone_folder, dtype="float32"), texts, tmp_path / "states", k=3, cap=20)
    student = MultiSenseStudent.from_backbone(backbone_folder, layers=[0, 2])
    for place in (str(tmp_path / "senses"), "../../senses", "./senses"):
        student.attach(dictionary, place)
        before = len(hub.log)
        with pytest.raises(ValueError, match=r"sense dictionary is .*senses, expected one beside it \(\.\./name\)"):
            student.push_to_hub("alice/speaker")
        assert len(hub.log) == before


@pytest.mark.parametrize("scenario", ["open_ours", "open_transformers", "open_sentence_transformers"])
def test_a_revision_can_be_pinned_and_what_came_once_opens_offline(scenario, hub, student, texts, tmp_path):
    student.eval().push_to_hub("alice/pinned")
    first, wanted = hub.tip("alice/pinned"), student.encode(texts[:4])
    with torch.no_grad():
        student.projection.weight.normal_(generator=torch.Generator().manual_seed(1))
    student.push_to_hub("alice/pinned")
    assert hub.tip("alice/pinned") != first
    options = {"repo": "alice/pinned", "texts": texts[:4], "revision": first}
    found = client(hub, tmp_path / "home", scenario, **options)
    assert np.allclose(found["vectors"], wanted, atol=1e-5)
    assert not np.allclose(wanted, student.encode(texts[:4]), atol=1e-2)
    asked = len(hub.log)
    again = client(hub, tmp_path / "home", scenario, **options, offline=True)
    assert again["vectors"] == found["vectors"]
    assert len(hub.log) == asked


def test_every_committed_card_is_valid_and_a_broken_one_is_not(hub):
    cards = sorted((Path(hf_distill.__file__).parents[1] / "model_cards").glob("*.md"))
    assert len(cards) >= 6
    for path in cards:
        card = ModelCard.load(path)
        card.validate()
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", card.text):
            assert (path.parent / link).is_file(), link
        assert not re.search(r"\{\{|\}\}|\b(TODO|TBD|None|undefined)\b|More Information", card.content)
    card.data.license = "somebody-elses"
    with pytest.raises(ValueError, match=r"must be one of the known license ids"):
        card.validate()
    assert [one.status for one in hub.log if one.path == "/api/validate-yaml"] == [200] * len(cards) + [400]
