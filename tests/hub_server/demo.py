"""`make hub-demo`: a student is trained, published, opened by people who never heard of us, and described, all over HTTP.

The Hub is the server of this folder; the clients are the real ones. `--once` ends it after the last step.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer


NAME = "alice/minilm-128"
HIDE = "import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
WAYS = [  # what somebody's machine lacks, and what they type
    (["hf_distill"], f'from sentence_transformers import SentenceTransformer\nmodel = SentenceTransformer("{NAME}")'),
    (
        ["hf_distill", "sentence_transformers"],
        f'from transformers import AutoModel\nmodel = AutoModel.from_pretrained("{NAME}", trust_remote_code=True)',
    ),
    (["sentence_transformers"], f'from hf_distill import StudentModel\nmodel = StudentModel.from_pretrained("{NAME}")'),
]


def main() -> None:
    """Show the flow."""
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:

        def run(home: str, *command: str) -> str:
            env = {**os.environ, **hub.env(Path(folder, home)), "PYTHONPATH": str(ROOT)}
            done = subprocess.run([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True, cwd=folder)
            if done.returncode:
                sys.exit(f"hub-demo: {command[0]} ended with {done.returncode}; what it said stands above.")
            return done.stdout

        print(f"A Hub at {hub.url}. Twenty steps of training, then a push:\n")
        recipe = "--max_steps 20 --max_texts 2000 --held_out 200 --disable_tqdm true --push_to_hub true --output_dir student"
        print(run("author", str(ROOT / "recipes" / "hpd.py"), *recipe.split(), "--hub_model_id", NAME))
        print("Commits:", *(commit.title for commit in hub.store.repos["models", NAME].history("main")), sep="\n  ")
        for number, (hidden, code) in enumerate(WAYS):
            before = len(hub.log)
            show = '\nimport json; print(json.dumps(model.encode(["A cat sat on the mat."])[0][:4].tolist()))'
            found = json.loads(run(f"reader-{number}", "-c", HIDE.format(hidden=hidden) + code + show).splitlines()[-1])
            came = sum(one.size for one in hub.sent("", before))
            print(f"\n{code}\n  -> {[round(value, 4) for value in found]} …  ({came / 1e6:.1f} MB over HTTP, without {hidden})")
        print(f"\nIts page: {hub.url}/{NAME}")
        if "--once" not in sys.argv:
            print("Ctrl-C ends the server.")
            threading.Event().wait()


if __name__ == "__main__":
    main()
