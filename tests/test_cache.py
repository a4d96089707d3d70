import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_texts

from hf_distill import EncoderTeacher, PCAProjection, TeacherCache
from hf_distill.cache import cache_folder
from hf_distill.shards import KeySet, keys_of, write_whole
from hf_distill.teachers import Teacher


class Counting(Teacher):
    """A teacher that counts what it encodes: three numbers that depend on the text alone."""

    name, dim, fingerprint = "counting", 3, {"weights": "w", "prompt": ""}

    def __init__(self):
        self.encoded = []

    def encode(self, texts, batch_size=64, show_progress_bar=None):
        self.encoded += texts
        return torch.tensor([[len(text), len(set(text)), ord(text[0])] for text in texts], dtype=torch.float32)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_cached_targets_equal_the_live_teacher_on_the_same_batches(teacher, tmp_path):
    texts = make_texts(8)
    cache = TeacherCache(teacher, tmp_path, dtype="float32", shard_size=8, batch_size=8)
    cache.add(texts)
    assert torch.equal(cache.encode(texts), teacher.encode(texts, batch_size=8))  # to the bit


def test_half_precision_rounds_and_no_more(teacher, texts, tmp_path):
    cache = TeacherCache(teacher, tmp_path)
    cache.add(texts)
    live = teacher.encode(texts)
    assert torch.allclose(cache.encode(texts), live, rtol=2**-11, atol=1e-6)
    assert not torch.equal(cache.encode(texts), live)


def test_targets_belong_to_the_text_not_to_the_row(cache, teacher, texts):
    mixed = [texts[i] for i in (50, 3, 3, 95, 0)]
    assert torch.allclose(cache.encode(mixed), teacher.encode(mixed), atol=1e-6)


def test_each_text_is_encoded_once_across_columns_calls_and_processes_starts(tmp_path):
    texts, teacher = make_texts(30), Counting()
    cache = TeacherCache(teacher, tmp_path, shard_size=8)
    assert cache.add(texts[:20] + texts[:20], texts[10:25]) == 25
    assert cache.add(texts) == 5
    assert TeacherCache(teacher, tmp_path).add(iter(texts)) == 0
    assert sorted(teacher.encoded) == sorted(texts)
    assert len(cache) == 30


def test_estimate_comes_before_the_work(caplog, tmp_path):
    teacher, texts = Counting(), make_texts(3000)
    with caplog.at_level("INFO", logger="hf_distill"):
        TeacherCache(teacher, tmp_path, shard_size=1000).add(texts)
    said = [record.getMessage() for record in caplog.records]
    assert "3000 new texts" in said[0]
    assert "MB" in said[0]
    assert "minutes" in said[0]
    assert "texts/s" in said[1]


def test_generator_of_unknown_length_is_streamed(tmp_path):
    texts = make_texts(50)
    cache = TeacherCache(Counting(), tmp_path, shard_size=16)
    assert cache.add(text for text in texts) == 50
    assert cache.encode(texts)[:, 0].tolist() == [len(text) for text in texts]


def test_blocks_hold_every_target_once_or_those_of_given_texts(cache, teacher, texts):
    everything = torch.cat(list(cache.blocks()))
    assert torch.allclose(everything, teacher.encode(texts), atol=1e-6)  # shards keep the order of the texts
    some = [texts[9], texts[2], texts[9]]
    assert torch.allclose(torch.cat(list(cache.blocks(some))), teacher.encode(some), atol=1e-6)


def test_reading_lets_go_of_its_pages(cache, texts):
    cache.encode(texts)
    assert "safetensors" not in "".join(line for line in Path("/proc/self/maps").read_text().splitlines() if "add0" in line)


BUILD = """
import os, signal, sys
import torch
from hf_distill import EncoderTeacher, TeacherCache
import hf_distill.cache as module
sys.path.insert(0, sys.argv[1])
from conftest import make_texts
torch.set_num_threads(1)
folder, teacher_folder, kill_at = sys.argv[2], sys.argv[3], int(sys.argv[4])
replace, count = os.replace, 0
def dying(source, target):
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
cache = TeacherCache(EncoderTeacher(teacher_folder, dtype="float32"), folder, shard_size=10, batch_size=4)
cache.add(make_texts(25)); cache.add(make_texts(60, seed=1))
print(f"writes {count}\\n", end="")
"""


def build(folder, teacher_folder, kill_at=0):
    command = [sys.executable, "-c", BUILD, str(Path(__file__).parent), str(folder), teacher_folder, str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(teacher_folder, tmp_path_factory):
    """The folder of a build that ran through: 16 writes (manifest; 3 shards, index, manifest; 6 or 7 more, the same)."""
    folder = tmp_path_factory.mktemp("whole")
    done = build(folder, teacher_folder)
    assert "writes 16" in done.stdout, done.stderr + done.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, 3, 5, 7, 9, 12])
def test_killed_build_goes_on_and_ends_with_the_same_bytes(kill_at, teacher_folder, whole, tmp_path):
    killed = build(tmp_path / "killed", teacher_folder, kill_at)
    assert killed.returncode == -signal.SIGKILL
    assert contents(tmp_path / "killed") != contents(whole)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("add*.safetensors")}
    again = build(tmp_path / "killed", teacher_folder)
    assert again.returncode == 0, again.stderr
    for stale in (tmp_path / "killed").glob(".*"):
        stale.unlink()  # the draft of the write that died
    assert contents(tmp_path / "killed") == contents(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())  # nothing finished was done again


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(teacher_folder, whole, tmp_path):
    script = tmp_path / "build.py"
    world = (
        'from accelerate import PartialState\nprint(f"world {PartialState().num_processes} '  # in one write: two of them mix
    )
    script.write_text(BUILD.replace('print(f"', world))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", str(script)]
    arguments = [str(Path(__file__).parent), str(tmp_path / "two"), teacher_folder, "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch + arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("world 2") == 2
    assert contents(tmp_path / "two") == contents(whole)


LARGE = """
import sys
from pathlib import Path
import torch
from hf_distill import PCAProjection, TeacherCache
from hf_distill.teachers import Teacher

class Wide(Teacher):
    name, dim, fingerprint = "wide", 1024, {"wide": 1}
    def encode(self, texts, batch_size=64, show_progress_bar=None):
        numbers = torch.tensor([float(text) for text in texts])
        return torch.sin(numbers[:, None] * torch.arange(1, 1025) / 700)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

folder = Path(sys.argv[1])
TeacherCache(Wide(), folder / "small", dtype="float32", shard_size=512).add(map(str, range(2000)))
PCAProjection.fit(TeacherCache.open(folder / "small"), 8)
before = peak()
cache = TeacherCache(Wide(), folder / "large", dtype="float32", shard_size=512)
cache.add(map(str, range(120_000)))  # a generator: neither texts nor vectors are ever in memory as a whole
PCAProjection.fit(cache, 8)
for start in range(0, 120_000, 5000):
    found = cache.encode([str(start + i) for i in range(64)])
    assert torch.equal(found, Wide().encode([str(start + i) for i in range(64)]))
print(len(cache), sum(path.stat().st_size for path in folder.glob("large/*.safetensors")) / 2**20, peak() - before)
"""


@pytest.mark.slow
def test_what_is_cached_may_be_larger_than_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, written, grown = map(float, done.stdout.split())
    assert (count, written > 450) == (120_000, True)
    assert grown < 100  # MB, of which the keys take 24 bytes a text while it grows


def test_another_teacher_never_reuses_old_targets(teacher_folder, tmp_path):
    def open_with(**options):
        return TeacherCache(EncoderTeacher(teacher_folder, **{"dtype": "float32", **options}), tmp_path)

    open_with().add(make_texts(5))
    for options, message in (
        ({"prompt": "a "}, "prompt: '' there, 'a ' now"),
        ({"max_length": 9}, "max_length: 40 there, 9 now"),
        ({"normalize": False}, "normalize: True there, False now"),
        ({"dtype": "bfloat16"}, "dtype.*float32.*bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"made otherwise .*{message}"):
            open_with(**options)
    with pytest.raises(ValueError, match="cache dtype: 'float16' there, 'float32' now"):
        TeacherCache(EncoderTeacher(teacher_folder, dtype="float32"), tmp_path, dtype="float32")
    assert open_with().add(make_texts(5)) == 0
    centred = EncoderTeacher(teacher_folder, dtype="float32").project(
        PCAProjection.centering(open_with().encode(make_texts(5)))
    )
    assert centred.dim == open_with().dim
    TeacherCache(centred, tmp_path / "centred").add(make_texts(5))
    with pytest.raises(ValueError, match="made otherwise .*projection: .* there, None now"):
        TeacherCache(EncoderTeacher(teacher_folder, dtype="float32"), tmp_path / "centred")


def test_each_setting_of_a_teacher_has_its_own_folder(teacher_folder, tmp_path):
    one = cache_folder(tmp_path, EncoderTeacher(teacher_folder, dtype="float32"))
    other = cache_folder(tmp_path, EncoderTeacher(teacher_folder, dtype="float32", prompt="a "))
    assert one.parent == other.parent == tmp_path
    assert one != other


def damage(folder, at=-5):
    path = sorted(folder.glob("add0000-*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    return path


def test_a_flipped_bit_is_found_before_training_and_while_reading(cache, texts):
    damage(cache.folder)
    fresh = TeacherCache.open(cache.folder)
    with pytest.raises(ValueError, match=r"add0000-000001.safetensors is damaged.*cache.add"):
        fresh.require(texts)
    assert len(fresh.encode(texts[:20])) == 20  # another shard
    with pytest.raises(ValueError, match="is damaged"):
        fresh.encode(texts[20:21])


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "length"])
def test_a_damaged_shard_is_encoded_again(harm, teacher, texts, tmp_path):
    folder = tmp_path / "cache"
    first = TeacherCache(teacher, folder, dtype="float32", shard_size=20, batch_size=8)
    first.add(texts)
    before = first.encode(texts)
    path = damage(folder)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:100])
    if harm == "gone":
        path.unlink()
    if harm == "length":  # what is said of the header's length is no length
        path.write_bytes(path.read_bytes()[:7] + b"\x80" + path.read_bytes()[8:])
    again = TeacherCache(teacher, folder, dtype="float32")
    assert again.add(texts) == 20
    assert torch.allclose(again.encode(texts), before, atol=1e-6)
    again.require(texts)


def test_a_damaged_unfinished_shard_is_encoded_again(tmp_path):
    texts, teacher = make_texts(30), Counting()
    cache = TeacherCache(teacher, tmp_path, shard_size=10)
    cache.add(texts)
    (tmp_path / "manifest.json").write_text(json.dumps({**json.loads((tmp_path / "manifest.json").read_text()), "adds": []}))
    damage(tmp_path)
    again = Counting()
    assert TeacherCache(again, tmp_path).add(texts) == 30
    assert again.encoded == texts[10:20]


def test_vectors_from_elsewhere(tmp_path):
    texts = make_texts(30)
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    cache = TeacherCache.from_embeddings(texts, vectors, tmp_path, "api/v1", dtype="float32", shard_size=8)
    assert np.array_equal(cache.encode(texts[::-1]).numpy(), vectors[::-1])
    assert (cache.name, cache.dim) == ("api/v1", 5)
    with pytest.raises(ValueError, match="source: 'api/v1' there, 'api/v2' now"):
        TeacherCache.from_embeddings(texts, vectors, tmp_path, "api/v2", dtype="float32")
    given = torch.from_numpy(vectors).bfloat16().requires_grad_()
    cache = TeacherCache.from_embeddings(texts, given, tmp_path / "torch", "api/v1", dtype="float32", shard_size=8)
    assert torch.equal(cache.encode(texts), given.detach().float())
    with pytest.raises(ValueError, match="29 texts but 30 vectors"):
        TeacherCache.from_embeddings(texts[1:], vectors, tmp_path, "api/v1")


def test_of_equal_texts_the_first_vector_counts(tmp_path):
    vectors = np.array([[1.0], [2.0], [3.0]], np.float32)
    cache = TeacherCache.from_embeddings(["a", "b", "a"], vectors, tmp_path, "x", dtype="float32")
    assert cache.encode(["a", "b"]).tolist() == [[1.0], [2.0]]


def test_opened_without_teacher_it_reads_but_does_not_add(cache, texts):
    opened = TeacherCache.open(cache.folder)
    assert torch.equal(opened.encode(texts), cache.encode(texts))
    assert opened.fingerprint == cache.fingerprint
    with pytest.raises(ValueError, match="opened without its teacher"):
        opened.add(["new text"])


def test_no_cache_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json"):
        TeacherCache.open(tmp_path)


def test_missing_texts_are_named(cache, texts):
    with pytest.raises(ValueError, match=r"no target for 2 of the texts.*first in row 1: 'unheard of'.*cache.add"):
        cache.require([texts[0], "unheard of", "neither"])
    with pytest.raises(KeyError, match="unheard of"):
        cache.encode([texts[0], "unheard of"])


@pytest.mark.parametrize("bad", ["", "  \n", None, 3])
def test_empty_and_non_string_texts_are_named_before_any_work(bad, tmp_path):
    teacher = Counting()
    with pytest.raises(ValueError, match=r"row 2 is .*, expected a non-empty string"):
        TeacherCache(teacher, tmp_path).add(["a", "b", bad])
    assert not teacher.encoded


def test_vectors_that_are_not_finite_are_refused_and_not_stored(tmp_path):
    texts = make_texts(20)

    class Broken(Counting):
        def encode(self, texts, batch_size=64, show_progress_bar=None):
            vectors = super().encode(texts)
            vectors[[text == make_texts(20)[13] for text in texts]] = float("nan")
            return vectors

    cache = TeacherCache(Broken(), tmp_path, shard_size=8)
    with pytest.raises(ValueError, match=f"not finite in float16 for 1 texts, the first '{texts[13]}'"):
        cache.add(texts)
    assert len(TeacherCache(Broken(), tmp_path)) == 0


def test_vectors_too_large_for_half_precision_are_refused(tmp_path):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="dtype='float32'"):
        TeacherCache.from_embeddings(["a"], np.array([[1e6]], np.float32), tmp_path, "x")


def test_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        TeacherCache(Counting(), tmp_path, dtype="int8")


def test_too_small_a_disk_is_found_before_the_work(tmp_path, monkeypatch):
    teacher = Counting()
    cache = TeacherCache(teacher, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"50 texts need .* MB are free") as caught:
        cache.add(make_texts(50))
    assert caught.value.errno == errno.ENOSPC
    assert not teacher.encoded


def test_disk_that_fills_up_keeps_what_is_finished(tmp_path, monkeypatch):
    texts, count, sync = make_texts(30), 0, os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    cache = TeacherCache(Counting(), tmp_path, shard_size=10)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*What is finished stays.*run the same command again"):
        cache.add(texts)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*"))
    again = Counting()
    assert TeacherCache(again, tmp_path).add(texts) == 30
    assert again.encoded == texts[20:]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="can't be written .*Use a folder that is yours"):
        TeacherCache(Counting(), tmp_path / "file" / "cache")


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": b"old"}


def test_key_set_against_a_python_set():
    rng, ours, theirs = np.random.default_rng(0), KeySet(keys_of(["7"])), {"7"}
    for _ in range(50):
        words = [str(i) for i in rng.integers(0, 400, 20)]
        expected = []
        for i, word in enumerate(words):
            if word not in theirs:
                theirs.add(word)
                expected.append(i)
        assert ours.add(keys_of(words)).tolist() == expected
    assert len(ours._parts) < 10


def test_keys_depend_on_the_whole_text():
    assert len(np.unique(keys_of(["a", "A", "a ", "a\x00", "ä", "a\ud800"]))) == 6


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_any_iterable_of_texts(kind, tmp_path):
    assert TeacherCache(Counting(), tmp_path).add(kind(["a", "b", "a"])) == 2
