"""Repositories, commits and contents, in memory."""

import hashlib
import time
from dataclasses import dataclass, field
from typing import NamedTuple


# What .gitattributes of a new repository lists, as far as students, caches and dictionaries have such files.
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".npy", ".npz", ".faiss", ".onnx", ".parquet", ".gz", ".zip")


class File(NamedTuple):
    """A path's content: by its sha256; large ones have that as their git name, too."""

    sha256: str
    size: int
    oid: str
    large: bool


class Commit(NamedTuple):
    """What every path holds after it."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, File]
    time: str


@dataclass
class Repo:
    """A repository: its commits by sha, and where its branches stand."""

    kind: str  # "models" or "datasets"
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {})

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        """Move a branch on to these files."""
        parent, now = self.branches.get(branch), time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        sha = hashlib.sha1(repr((self.id, parent, title, sorted(files.items()), time.time_ns())).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files, now)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit | None:
        """Return the commit that a branch, or a sha or its beginning, names."""
        sha = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        found = [commit for name, commit in self.commits.items() if name == sha or (len(sha) > 6 and name.startswith(sha))]
        return found[0] if len(found) == 1 else None

    def history(self, revision: str) -> list[Commit]:
        """Return the commits from a revision back to the first."""
        found, commit = [], self.at(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent)
        return found


@dataclass
class Store:
    """Everything the server keeps."""

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)  # by sha256

    def keep(self, data: bytes) -> str:
        """Keep a content; return its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.contents[sha256] = data
        return sha256

    def file(self, data: bytes) -> File:
        """Keep a small content as a file."""
        return File(self.keep(data), len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), large=False)

    def large_file(self, sha256: str) -> File | None:
        """Return a file whose content was uploaded before."""
        found = self.contents.get(sha256)
        return None if found is None else File(sha256, len(found), sha256, large=True)


def is_large(path: str) -> bool:
    """Return whether a path's content goes to the large file storage."""
    return path.endswith(LARGE)
