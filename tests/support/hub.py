"""A Hugging Face Hub on loopback that speaks as much of its protocol as the real clients ask for.

    with Hub() as hub:
        commit = hub.commit("models/org/x", {"config.json": b"{}"})

Large files live elsewhere, as on the real one: `resolve` redirects to another host name, to which a client
must not send its token. `faults` makes answers go wrong.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest

PAGE = 3  # entries of a listing in one answer; the real one has a thousand
LARGE = (".safetensors", ".parquet", ".bin", ".gz")
_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_ID}(?:/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+)(?P<below>/.*)?)?$"
)
_RESOLVE = re.compile(rf"/(?:(?P<kind>datasets)/)?{_ID}/resolve/(?P<rev>[^/]+)/(?P<file>.+)$")
_COMMIT = re.compile(rf"/api/models/{_ID}/(?P<what>preupload|commit)/(?P<rev>[^/]+)$")
_BATCH = re.compile(rf"/{_ID}\.git/info/lfs/objects/batch$")
_UPLOAD = re.compile(r"/upload/(?P<sha>[0-9a-f]{64})$")
_CDN = re.compile(r"/cdn/(?P<sha>[0-9a-f]{64})$")


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


@dataclass
class Fault:
    """What happens to the next `times` requests that match (METHOD path), but for the first `skip`."""

    pattern: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection is closed
    change: Callable[[bytes], bytes] | None = None  # of the body
    times: int = 1
    skip: int = 0


@dataclass
class Asked:
    method: str
    path: str
    host: str
    token: str | None
    range: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Hub:
    def __init__(self, tokens: tuple[str, ...] = ()) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = tokens  # those that may see what is private or gated
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.writers: tuple[str, ...] = ()  # tokens that may write
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(
        self, repo: str, files: Mapping[str, bytes] | Path, branch: str = "main", **options: bool
    ) -> str:
        """A new commit, which `branch` then is; `files` are its whole content."""
        if isinstance(files, Path):
            found = [file for file in files.rglob("*") if file.is_file()]
            files = {file.relative_to(files).as_posix(): file.read_bytes() for file in found}
        there = self.repos.setdefault(repo, Repo(**options))
        listing = json.dumps(
            [repo, len(there.commits), sorted((n, sha256(b)) for n, b in files.items())]
        )
        sha = hashlib.sha1(listing.encode()).hexdigest()
        there.commits[sha] = dict(files)
        there.refs[branch] = sha
        self.objects |= {sha256(body): body for body in files.values()}
        return sha

    def files_sent(self) -> list[str]:
        """The names of the files whose content was sent, in full or in part."""
        names = {
            sha256(b): n
            for r in self.repos.values()
            for f in r.commits.values()
            for n, b in f.items()
        }
        sent = []
        for asked in self.asked:
            at_cdn, here = _CDN.match(asked.path), _RESOLVE.match(asked.path)
            if asked.method == "GET" and at_cdn:
                sent.append(names[at_cdn["sha"]])
            elif asked.method == "GET" and here and not here["file"].endswith(LARGE):
                sent.append(here["file"])
        return sent

    def fault_for(self, asked: Asked) -> Fault | None:
        with self._lock:
            self.asked.append(asked)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, str(asked)):
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def git_blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self._body().decode())

    def do_PUT(self) -> None:
        """A large file, to an address that needs no token."""
        body, found = self._body(), _UPLOAD.match(self.path)
        self.fault = self.hub.fault_for(
            Asked("PUT", self.path, "", self.headers["Authorization"], None)
        )
        if not found or sha256(body) != found["sha"]:
            return self._refuse(400, "", "not what was announced")
        self.hub.objects[found["sha"]] = body
        return self._send(200, b"", {})

    def _body(self) -> bytes:
        if length := self.headers["Content-Length"]:
            return self.rfile.read(int(length))
        chunks = []  # Transfer-Encoding: chunked
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, form: str = "") -> None:
        url = urlsplit(self.path)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        host = (self.headers["Host"] or "").split(":")[0]
        path = unquote(url.path)
        asked = Asked(self.command, path, host, token, self.headers["Range"])
        self.fault = self.hub.fault_for(asked)
        if self.fault and self.fault.status:
            return self._send(self.fault.status, b"fault", self.fault.headers)
        if cdn := _CDN.match(path):
            return self._content(self.hub.objects[cdn["sha"]], {"ETag": f'"{cdn["sha"]}"'})
        if self.command == "POST" and (written := self._write(url.path, token, form)):
            return self._send(*written)
        if found := _API.match(url.path):  # a branch may hold an escaped slash
            return self._api(found, token, parse_qs(url.query), parse_qs(form))
        if found := _RESOLVE.match(url.path):
            return self._resolve(found, token)
        return self._refuse(404, "RepoNotFound")

    def _write(self, path: str, token: str | None, form: str) -> Any:
        """Status, body and headers of an answer to what writes; None: it does not."""
        found = _COMMIT.match(path) or _BATCH.match(path)
        if not found and path not in ("/api/repos/create", "/api/validate-yaml"):
            return None
        if token not in self.hub.writers:
            status = 403 if token in self.hub.tokens else 401
            return status, b"{}", {"X-Error-Message": "you may not write here"}
        answer: Any = {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            given = json.loads(form)
            name = f"{given['organization']}/{given['name']}"
            if f"models/{name}" in self.hub.repos:
                there = {"error": "it exists", "url": f"{self.hub.url}/{name}"}
                return 409, json.dumps(there).encode(), {}
            self.hub.commit(f"models/{name}", {}, private=given.get("visibility") == "private")
            answer = {"url": f"{self.hub.url}/{name}", "id": name}
        elif found and found.re is _BATCH:
            answer = self._batch(json.loads(form))
        elif found:
            name, branch = f"models/{found['id']}", unquote(found["rev"])
            repo = self.hub.repos[name]
            there = repo.commits[repo.refs[branch]]
            if found["what"] == "preupload":
                answer = {"files": [_mode(f["path"], there) for f in json.loads(form)["files"]]}
            else:
                added = [json.loads(line) for line in form.splitlines()][1:]
                gone = {f["value"]["path"] for f in added if f["key"] == "deletedFile"}
                added = [f for f in added if f["key"] != "deletedFile"]
                files = {name: body for name, body in there.items() if name not in gone}
                files |= {f["value"]["path"]: self._content_of(f) for f in added}
                oid = self.hub.commit(name, files, branch)
                url = f"{self.hub.url}/{found['id']}/commit/{oid}"
                answer = {"commitUrl": url, "commitOid": oid, "success": True}
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}

    def _batch(self, given: Any) -> Any:
        objects = []
        for item in given["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}
            actions = {} if item["oid"] in self.hub.objects else {"actions": upload}
            objects.append({**item, **actions})
        return {"transfer": "basic", "objects": objects}

    def _content_of(self, line: Any) -> bytes:
        value = line["value"]
        if line["key"] == "file":
            return base64.b64decode(value["content"])
        return self.hub.objects[value["oid"]]

    def _repo(self, kind: str, name: str, token: str | None) -> Repo | None:
        """The repository, if the token may know of it; strangers are told 401 for all others."""
        repo = self.hub.repos.get(f"{kind}/{name}")
        if repo is not None and not (repo.private and token not in self.hub.tokens):
            return repo
        if token is not None and token not in self.hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        else:
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return None

    def _commit(self, repo: Repo, escaped: str) -> str | None:
        revision = unquote(escaped)
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha

    def _api(self, found: re.Match[str], token: str | None, query: Any, form: Any) -> None:
        repo = self._repo(found["kind"], found["id"], token)
        sha = repo and self._commit(repo, found["rev"] or "main")
        if not repo or not sha:
            return None
        files = repo.commits[sha]
        if found["what"] == "tree":
            return self._tree(files, found, query)
        if found["what"] == "paths-info":
            folders = {str(p) for n in files for p in Path(n).parents}
            there = [n for n in form["paths"] if n in files or n in folders]
            return self._json([_entry(n, files[n]) if n in files else _folder(n) for n in there])
        return self._json(
            {
                **{"_id": "0", "id": found["id"], "sha": sha, "private": repo.private, "tags": []},
                **{"gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0},
                "siblings": [{"rfilename": name} for name in sorted(files)],
            }
        )

    def _tree(self, files: dict[str, bytes], found: re.Match[str], query: Any) -> None:
        """Files and folders below a folder, in pages; without `recursive` those directly in it."""
        below = unquote(found["below"] or "/").strip("/")
        inside = {n: b for n, b in files.items() if not below or n.startswith(f"{below}/")}
        if not inside and below:
            return self._refuse(404, "EntryNotFound", f"{below} does not exist")
        folders = {str(p) for n in inside for p in Path(n).parents if str(p) not in (".", below)}
        entries = [_entry(name, inside[name]) for name in sorted(inside)]
        entries += [_folder(name) for name in sorted(folders)]
        if query.get("recursive", ["false"])[0].lower() != "true":
            depth = below.count("/") + 1 if below else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        start = int(query.get("cursor", ["0"])[0])
        flat = {name: values[0] for name, values in query.items()} | {"cursor": start + PAGE}
        link = f'<{self.hub.url}{found[0]}?{urlencode(flat)}>; rel="next"'
        more = {"Link": link} if start + PAGE < len(entries) else {}
        return self._json(entries[start : start + PAGE], more)

    def _resolve(self, found: re.Match[str], token: str | None) -> None:
        repo = self._repo(found["kind"] or "models", found["id"], token)
        if not repo:
            return None
        if repo.gated and token not in self.hub.tokens:
            return self._refuse(403 if token else 401, "GatedRepo", "Access to it is restricted.")
        sha = self._commit(repo, found["rev"])
        if not sha:
            return None
        name = unquote(found["file"])
        if name not in repo.commits[sha]:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        body, head = repo.commits[sha][name], {"X-Repo-Commit": sha}
        if not name.endswith(LARGE):
            return self._content(body, {**head, "ETag": f'"{git_blob(body)}"'})
        head |= {"X-Linked-Etag": f'"{sha256(body)}"', "X-Linked-Size": str(len(body))}
        elsewhere = f"http://localhost:{self.hub.port}/cdn/{sha256(body)}?signature={quote(name)}"
        return self._send(302, b"", {**head, "Location": elsewhere})

    def _content(self, body: bytes, headers: Mapping[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not asked:
            return self._send(200, body, {**headers, "Accept-Ranges": "bytes"})
        start, end = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
        if start >= len(body):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        part = {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"}
        return self._send(206, body[start : end + 1], part)

    def _json(self, answer: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(answer).encode()
        self._send(200, body, {"Content-Type": "application/json", **(headers or {})})

    def _refuse(
        self, status: int, code: str, message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), told)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        fault = self.fault
        if fault and fault.change and self.command == "GET":
            body = fault.change(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.cut_after is not None:
            self.wfile.write(body[: fault.cut_after])
            self.close_connection = True
            return
        self.wfile.write(body)


def _mode(name: str, there: Mapping[str, bytes]) -> dict[str, Any]:
    """How a file is to be sent, and the identity of the one that is there."""
    large = name.endswith(LARGE)
    identity = {"oid": (sha256 if large else git_blob)(there[name])} if name in there else {}
    return {
        "path": name,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
        **identity,
    }


def _entry(name: str, body: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": git_blob(body)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(body), "size": len(body), "pointerSize": 130}
    return entry


def _folder(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": git_blob(name.encode()), "size": 0}


def use(hub: Hub, home: Path, patch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Point the real client of this process to the hub; it read the environment when it was imported."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _cache_assets

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the protocol of large files before it
    patch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(home / "assets"))
    patch.setattr(hf_api.api, "endpoint", hub.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token:
        patch.setenv("HF_TOKEN", token)


def go_offline(patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)
