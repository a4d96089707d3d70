"""The endpoints, the faults and the running server."""

import asyncio
import base64
import contextlib
import json
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from .metadata import head_of, problems_of
from .page import page_of
from .store import File, Repo, Store, is_large
from .xet import XetStorage, Xorb


CUT, HANG = "cut", "hang"  # ends of a request that are no answer
_ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, pattern: str) -> Callable:
    """Register a handler for paths of the pattern: ID, KIND and REV stand for what they say, URL-quoted."""
    for name, part in {"KIND": "models|datasets", "ID": "(?!api/)[^/]+/[^/]+", "REV": "[^/]+"}.items():
        pattern = pattern.replace(f"<{name}>", f"(?P<{name.lower()}>{part})")

    def register(handler: Callable) -> Callable:
        _ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class HubError(Exception):
    """An answer that is an error: its status, message and code."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Logged(NamedTuple):
    """A request that was answered."""

    method: str
    path: str
    status: int
    size: int  # bytes of the answer


@dataclass
class Fault:
    """What goes wrong with the next requests that fit; `fired` counts them."""

    method: str
    pattern: str
    answer: int | str  # a status, CUT (half an answer) or HANG (none)
    times: int
    fired: int = 0
    reached: threading.Event = field(default_factory=threading.Event)


class User(NamedTuple):
    """Who a token is of, and whether it may write."""

    name: str
    role: str  # "write" or "read"


class Hub:
    """The server's application.

    Args:
        tokens: Token -> its user.
        orgs: Organisation -> its members.
        xet: Whether large files go through Xet, where the client can.
    """

    def __init__(self, tokens: dict[str, User], orgs: dict[str, list[str]], xet: bool) -> None:
        self.tokens, self.orgs, self.xet = tokens, orgs, xet
        self.store, self.storage = Store(), XetStorage()
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.url = self.cdn = ""

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer a request."""
        request, path = Request(scope, receive), scope["raw_path"].decode()
        response = await self._fail(request, path) or await self._answer(request, path)
        size = int(response.headers.get("content-length", 0))
        self.log.append(Logged(request.method, path, response.status_code, size))
        if request.method == "HEAD":
            response.body = b""
        await response(scope, receive, send)

    async def _fail(self, request: Request, path: str) -> Response | None:
        for fault in self.faults:
            if fault.fired < fault.times and fault.method == request.method and re.search(fault.pattern, path):
                fault.fired += 1
                fault.reached.set()
                if fault.answer == HANG:
                    while not await request.is_disconnected():
                        await asyncio.sleep(0.01)
                if isinstance(fault.answer, str):
                    whole = await self._answer(request, path) if request.method == "GET" else Response(b"0" * 64)
                    return _Half(whole)
                await request.body()
                return Response("a fault", fault.answer)
        return None

    async def _answer(self, request: Request, path: str) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, handler in _ROUTES:
            found = pattern.fullmatch(path)
            if wanted == method and found:
                parts = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                try:
                    return await handler(self, request, **parts)
                except HubError as error:
                    return JSONResponse({"error": error.message}, error.status, error.headers)
                except Exception:
                    traceback.print_exc()
                    raise
        return JSONResponse({"error": f"no route for {request.method} {path}"}, 404)

    # Who may do what

    def user(self, request: Request) -> User | None:
        """Return whose token came along."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def owns(self, user: User | None, namespace: str) -> bool:
        """Return whether a user belongs to a namespace."""
        return user is not None and (user.name == namespace or user.name in self.orgs.get(namespace, ()))

    def repo(self, request: Request, kind: str, name: str, write: bool = False) -> Repo:
        """Return a repository that may be read, or written; what may not be seen does not exist."""
        user, found = self.user(request), self.store.repos.get((kind, name))
        namespace = name.split("/")[0]
        if found is None or (found.private and not self.owns(user, namespace)):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and (not self.owns(user, namespace) or user.role != "write"):
            raise HubError(403, f"Forbidden: you must have write access to {name}; this token may {user.role}")
        return found

    @staticmethod
    def commit(repo: Repo, revision: str) -> Any:
        """Return what a revision names."""
        found = repo.at(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def address(self, repo: Repo) -> str:
        """Return the address of a repository's page."""
        return f"{self.url}/{'datasets/' if repo.kind == 'datasets' else ''}{repo.id}"

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    async def whoami(self, request: Request) -> Response:
        """Who a token is of."""
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"name": org, "type": "org"} for org, members in self.orgs.items() if user.name in members]
        auth = {"type": "access_token", "accessToken": {"displayName": "token", "role": user.role}}
        return JSONResponse({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})

    @route("POST", "/api/repos/create")
    async def create(self, request: Request) -> Response:
        """Make a repository."""
        asked, user = await request.json(), self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        kind = f"{asked.get('type', 'model')}s"
        name = f"{asked.get('organization') or user.name}/{asked['name']}"
        known = self.store.repos.get((kind, name))
        if not self.owns(user, name.split("/")[0]) or user.role != "write":
            raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {name.split('/')[0]!r}")
        if known is not None:
            answer = {"error": f"You already created this {kind[:-1]} repo", "url": self.address(known)}
            return JSONResponse(answer, 409, {"X-Error-Message": answer["error"]})
        repo = self.store.repos[kind, name] = Repo(kind, name, asked.get("visibility") == "private")
        return JSONResponse({"url": self.address(repo), "name": name, "id": name})

    @route("POST", "/api/<KIND>/<ID>/branch/<REV>")
    async def branch(self, request: Request, kind: str, id: str, rev: str) -> Response:
        """Make a branch."""
        repo = self.repo(request, kind, id, write=True)
        if rev in repo.branches:
            raise HubError(409, f"Reference already exists: {rev}")
        start = (await request.json()).get("startingPoint", "main") if await request.body() else "main"
        repo.branches[rev] = self.commit(repo, start).sha
        return JSONResponse({})

    @route("GET", "/api/<KIND>/<ID>")
    @route("GET", "/api/<KIND>/<ID>/revision/<REV>")
    async def info(self, request: Request, kind: str, id: str, rev: str = "main") -> Response:
        """What a repository holds at a revision."""
        repo = self.repo(request, kind, id)
        commit = self.commit(repo, rev)
        facts = {"id": id, "author": id.split("/")[0], "sha": commit.sha, "private": repo.private, "disabled": False}
        facts |= {"lastModified": commit.time, "createdAt": repo.history("main")[-1].time, "gated": False, "downloads": 0}
        card = commit.files.get("README.md")
        head = head_of(self.store.contents[card.sha256].decode()) if card else None
        data = yaml.safe_load(head) if head else {}
        facts |= {"cardData": data, "tags": data.get("tags", []), "pipeline_tag": data.get("pipeline_tag"), "likes": 0}
        facts |= {"library_name": data.get("library_name"), "modelId": id}
        facts["siblings"] = [{"rfilename": path, **self._blob(file)} for path, file in sorted(commit.files.items())]
        return JSONResponse(facts)

    def _blob(self, file: File) -> dict[str, Any]:
        large = {"lfs": {"sha256": file.sha256, "oid": file.sha256, "size": file.size, "pointerSize": 130}}
        return {"size": file.size, "blobId": file.oid, **(large if file.large else {})}

    @route("GET", "/api/<KIND>/<ID>/tree/<REV>(?P<folder>/.*)?")
    async def tree(self, request: Request, kind: str, id: str, rev: str, folder: str | None = None) -> Response:
        """What lies in a folder, or under it."""
        files = self.commit(self.repo(request, kind, id), rev).files
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        inside = {path: file for path, file in sorted(files.items()) if path.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        rows, folders = [], {}
        for path, file in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                folders[prefix + "/".join(parts[:depth])] = {"type": "directory", "size": 0, "oid": "0" * 40}
            rows.append({"type": "file", "path": path, "oid": file.oid, **self._blob(file)})
        rows = [{"path": path, **row} for path, row in folders.items()] + rows
        if request.query_params.get("recursive", "").lower() not in ("true", "1"):
            rows = [row for row in rows if "/" not in row["path"].removeprefix(prefix)]
        return JSONResponse(rows)

    @route("POST", "/api/<KIND>/<ID>/paths-info/<REV>")
    async def paths_info(self, request: Request, kind: str, id: str, rev: str) -> Response:
        """What lies at some paths."""
        files = self.commit(self.repo(request, kind, id), rev).files
        asked = (await request.body()).decode()
        paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked).get("paths", [])
        rows = [(path, files[path]) for path in paths if path in files]
        return JSONResponse([{"type": "file", "path": path, "oid": file.oid, **self._blob(file)} for path, file in rows])

    @route("GET", "/api/<KIND>/<ID>/commits/<REV>")
    async def commits(self, request: Request, kind: str, id: str, rev: str) -> Response:
        """The history of a revision."""
        repo = self.repo(request, kind, id)
        self.commit(repo, rev)
        rows = [{"id": c.sha, "title": c.title, "message": "", "date": c.time, "authors": []} for c in repo.history(rev)]
        return JSONResponse(rows)

    @route("GET", "/api/<KIND>/<ID>/refs")
    async def refs(self, request: Request, kind: str, id: str) -> Response:
        """The branches."""
        branches = self.repo(request, kind, id).branches.items()
        rows = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return JSONResponse({"branches": rows, "tags": [], "converts": []})

    # Writing

    @route("POST", "/api/validate-yaml")
    async def validate(self, request: Request) -> Response:
        """Whether a card's metadata are accepted."""
        asked = await request.json()
        errors, warnings = problems_of(asked["content"], asked.get("repoType", "model"))
        answer = {kind: [{"message": text} for text in found] for kind, found in (("errors", errors), ("warnings", warnings))}
        return JSONResponse(answer, 400 if errors else 200)

    @route("POST", "/api/<KIND>/<ID>/preupload/<REV>")
    async def preupload(self, request: Request, kind: str, id: str, rev: str) -> Response:
        """How each file is to be uploaded."""
        files = self.commit(self.repo(request, kind, id, write=True), rev).files
        found = []
        for asked in (await request.json())["files"]:
            path = asked["path"]
            mode = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            found.append({**mode, **({"oid": files[path].oid} if path in files else {})})
        return JSONResponse({"files": found})

    @route("POST", "/(?P<prefix>datasets/)?<ID>.git/info/lfs/objects/batch")
    async def batch(self, request: Request, id: str, prefix: str | None = None) -> Response:
        """Where to put large files."""
        self.repo(request, "datasets" if prefix else "models", id, write=True)
        objects = []
        for asked in (await request.json())["objects"]:
            known = asked["oid"] in self.store.contents
            actions = {} if known else {"actions": {"upload": {"href": f"{self.cdn}/lfs/{asked['oid']}"}}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        return JSONResponse({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    async def put(self, request: Request, oid: str) -> Response:
        """Take a large file."""
        data = await request.body()
        if Store().keep(data) != oid:
            raise HubError(400, "the content is not what its oid says")
        self.store.keep(data)
        return Response()

    @route("POST", "/api/<KIND>/<ID>/commit/<REV>")
    async def post_commit(self, request: Request, kind: str, id: str, rev: str) -> Response:
        """Move a branch on: all of it, or nothing."""
        repo, title = self.repo(request, kind, id, write=True), ""
        tip = self.commit(repo, rev)
        files = dict(tip.files)
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, tip.sha):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = self.store.file(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                file = self.store.large_file(value["oid"])
                if file is None:
                    raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = file
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        made = repo.commit(rev, title, files)
        return JSONResponse({"commitOid": made.sha, "commitUrl": f"{self.address(repo)}/commit/{made.sha}", "success": True})

    # Reading

    @route("GET", "/(?P<prefix>datasets/)?<ID>/resolve/<REV>/(?P<path>.+)")
    async def resolve(self, request: Request, id: str, rev: str, path: str, prefix: str | None = None) -> Response:
        """A file of a revision; large ones lie elsewhere."""
        kind = "datasets" if prefix else "models"
        commit = self.commit(self.repo(request, kind, id), rev)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", **headers)
        file = commit.files[path]
        if not file.large:
            return _ranged(request, self.store.contents[file.sha256], {**headers, "ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if self.xet and file.sha256 in self.storage.by_sha256:
            link = f"{self.url}/api/{kind}/{id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": self.storage.by_sha256[file.sha256], "Link": f'<{link}>; rel="xet-auth"'}
        return RedirectResponse(f"{self.cdn}/lfs/{file.sha256}", 302, headers)

    @route("GET", "/lfs/(?P<oid>[0-9a-f]{64})")
    async def get(self, request: Request, oid: str) -> Response:
        """A large file."""
        return _ranged(request, self.store.contents[oid], {"ETag": f'"{oid}"'})

    # Xet

    @route("GET", "/api/<KIND>/<ID>/xet-(?P<access>read|write)-token/<REV>")
    async def xet_token(self, request: Request, kind: str, id: str, access: str, rev: str) -> Response:
        """Where the storage is, and a token for it."""
        self.repo(request, kind, id, write=access == "write")
        if not self.xet:
            raise HubError(404, "this server has no Xet")
        until = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": self.cdn, "X-Xet-Access-Token": access, "X-Xet-Token-Expiration": str(until)}
        return JSONResponse({"casUrl": self.cdn, "exp": until, "accessToken": access}, headers=headers)

    @route("POST", "/v1/xorbs/default/(?P<name>[0-9a-f]{64})")
    async def put_xorb(self, request: Request, name: str) -> Response:
        """Take a xorb."""
        known = name in self.storage.xorbs
        self.storage.xorbs[name] = Xorb(await request.body())
        return JSONResponse({"was_inserted": not known})

    @route("POST", "/v1/shards")
    async def put_shard(self, request: Request) -> Response:
        """Take what a shard says, and keep its files."""
        for data in self.storage.add_shard(await request.body()):
            self.store.keep(data)
        return JSONResponse({"result": 1})

    @route("GET", "/v1/reconstructions/(?P<name>[0-9a-f]{64})")
    async def reconstruction(self, request: Request, name: str) -> Response:
        """Where a file's bytes lie."""
        if name not in self.storage.files:
            raise HubError(404, "unknown file")
        found = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("range", "bytes=0-"))
        end = int(found[2]) if found[2] else None
        answer = self.storage.reconstruction(name, int(found[1]), end, f"{self.cdn}/xorb")
        return Response(status_code=416) if answer is None else JSONResponse(answer)

    @route("GET", "/xorb/(?P<name>[0-9a-f]{64})")
    async def get_xorb(self, request: Request, name: str) -> Response:
        """Bytes of a xorb."""
        return _ranged(request, self.storage.xorbs[name].data, {})

    # Last, for its pattern fits others, too

    @route("GET", "/(?P<prefix>datasets/)?<ID>")
    async def page(self, request: Request, id: str, prefix: str | None = None) -> Response:
        """The page of a repository: its card."""
        repo = self.repo(request, "datasets" if prefix else "models", id)
        return HTMLResponse(page_of(repo, self.store, self.address(repo)))


class _Half(Response):
    """Half of another answer, and the end of the connection."""

    def __init__(self, whole: Response) -> None:
        super().__init__(whole.body, whole.status_code, dict(whole.headers))

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2]})  # fewer than were said


def _ranged(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """Return the bytes that were asked for."""
    found = re.match(r"bytes=(\d+)-(\d*)$", request.headers.get("range", ""))
    headers = {**headers, "Accept-Ranges": "bytes"}
    if not found:
        return Response(data, 200, headers)
    first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
    if first >= len(data):
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(data)}"})
    return Response(data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


class HubServer(Hub):
    """A running server: `with HubServer() as hub`, then `hub.url`, `hub.env()`, `hub.log`, `hub.fail(...)`.

    Args:
        xet: As in `Hub`.
        port: Of the Hub; any free one if 0. The storage gets another port: a redirect within one would not be followed.
        tokens: As in `Hub`; `hf_alice` may write, `hf_reader` is Alice's, too, and may only read, `hf_bob` is another's.
    """

    def __init__(self, xet: bool = True, port: int = 0, tokens: dict[str, User] | None = None) -> None:
        users = {"hf_alice": User("alice", "write"), "hf_reader": User("alice", "read"), "hf_bob": User("bob", "write")}
        super().__init__(tokens or users, {"acme": ["alice"]}, xet)
        self.port = port

    def __enter__(self) -> "HubServer":
        sockets = []
        for port in (self.port, 0):
            sockets.append(socket.socket())
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sockets[-1].bind(("127.0.0.1", port))
        self.url, self.cdn = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in sockets)
        options = {"http": "h11", "log_level": "critical", "lifespan": "off", "timeout_graceful_shutdown": 1}
        self._server = uvicorn.Server(uvicorn.Config(self, **options))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": sockets}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def env(self, home: Any, token: str | None = "hf_alice") -> dict[str, str]:
        """Return the environment of a client: this server, a folder of its own, quick retries."""
        found = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        found |= {"HF_HUB_DISABLE_XET": "0" if self.xet else "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or ""}
        return {**found, "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}

    def tip(self, name: str, branch: str = "main", kind: str = "models") -> str:
        """Return where a branch stands."""
        return self.store.repos[kind, name].branches[branch]

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Return what a repository holds."""
        files = self.store.repos[kind, name].at(revision).files
        return {path: self.store.contents[file.sha256] for path, file in files.items()}

    @contextlib.contextmanager
    def fail(self, method: str, pattern: str, answer: int | str = 500, times: int = 1) -> Iterator[Fault]:
        """Let the next requests that fit go wrong; see `Fault`."""
        fault = Fault(method, pattern, answer, times)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def sent(self, pattern: str, since: int = 0) -> list[Logged]:
        """Return the requests, from a place of the log on, that were answered with content: what came over HTTP."""
        return [
            one for one in self.log[since:] if one.method == "GET" and one.status in (200, 206) and re.search(pattern, one.path)
        ]
