"""A stand-in for the hub on this machine: enough of its HTTP protocol for huggingface_hub.

What a request looks like and what the client reads of the answer is taken from the sources of
huggingface_hub (hf_api, file_download, _commit_api, lfs). Large files are redirected to another
host name, as the hub does, where no token may arrive. There is no Xet: HF_HUB_DISABLE_XET is set.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

# Bytes. Larger files, and those of these kinds, go to the storage of large files.
LARGE, LARGE_KINDS = 100_000, (".safetensors", ".mp4", ".png", ".model", ".parquet")
# Bytes of a part, where a file is uploaded in parts.
PART = 1 << 20
OWNER, READER = "hf_owner", "hf_reader"  # tokens
USERS = {
    OWNER: {"name": "me", "role": "write", "orgs": ["lab"]},
    READER: {"name": "me", "role": "read", "orgs": []},
}


@dataclass
class Repo:
    kind: str
    name: str
    private: bool = False
    accepted: set[str] | None = None  # gated: the users who may read it
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by name
    names: dict[str, str] = field(default_factory=dict)  # branches and tags

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = "".join(f"{name} {sha256(files[name])}\n" for name in sorted(files))
        number = f"{self.kind} {self.name} {len(self.commits)}\n{text}"
        sha = hashlib.sha1(number.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.names[branch] = sha
        return sha

    def sha_of(self, revision: str) -> str | None:
        sha = self.names.get(revision, revision)
        return sha if sha in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """The newest, by name."""
        return self.commits[self.names["main"]]


@dataclass
class Fault:
    """What goes wrong with requests that match: a status, a cut, or a wrong byte."""

    method: str
    path: str  # a regular expression
    status: int | None = None
    after: int | None = None  # bytes of the body that still arrive
    damaged: bool = False  # the last byte of the body is another
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)

    def meets(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method == method and bool(re.search(self.path, path))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str, content_or_size) -> bool:
    size = content_or_size if isinstance(content_or_size, int) else len(content_or_size)
    return size > 0 and (size > LARGE or name.endswith(LARGE_KINDS))


class StandIn:
    """The server, its repositories, and every request that it got."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}  # uploaded large files
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []  # "GET /api/models/me/lora"
        self.ranges: list[str] = []
        self.faults: list[Fault] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes] | Path, kind: str = "model", **how) -> Repo:
        """A repository with these files, or with those of a folder."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repo = self.repos[kind, name] = Repo(kind, name, **how)
        repo.commit(files)
        return repo

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, each) is not None for each in self.requests)

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """What a process needs to use it instead of the hub. home: the cache's folder."""
        env = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        env |= {"NO_PROXY": "*", "no_proxy": "*"} | more
        return env if token is None else env | {"HF_TOKEN": token}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection to the stand-in."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def hub(self) -> StandIn:
        return self.server.hub

    def handle_one_request(self):
        # A client that ends in the middle.
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do_GET(self):
        self.take("GET")

    def do_HEAD(self):
        self.take("HEAD")

    def do_POST(self):
        self.take("POST")

    def do_PUT(self):
        self.take("PUT")

    # -- what every request goes through -----------------------------------------------------

    def take(self, method: str) -> None:
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path)
        self.asked = urllib.parse.parse_qs(address.query)
        self.hub.requests.append(f"{method} {path}")
        fault = next((each for each in self.hub.faults if each.meets(method, path)), None)
        self.cut_after, self.damaged = None, False
        if fault is not None:
            fault.times -= 1
            self.cut_after, self.damaged = fault.after, fault.damaged
            if method in ("POST", "PUT") and fault.after is not None:
                self.rfile.read(fault.after)
                return self.hang_up()
            if fault.status is not None:
                self.body()
                return self.refuse(fault.status, "the stand-in was told to", **fault.headers)
        if path.startswith("/storage/"):
            return self.from_storage(method, path)
        for pattern, answer in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return answer(self, **found.groupdict())
        self.body()
        return self.refuse(404, "no such page")

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self.chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def send(self, content: bytes, status: int = 200, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.cut_after is None:
            self.wfile.write(content)
        else:
            self.wfile.write(content[: self.cut_after])
            self.hang_up()

    def say(self, values: object, status: int = 200, **headers) -> None:
        self.send(json.dumps(values).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, status: int, message: str, code: str | None = None, **headers) -> None:
        headers |= {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.say({"error": message}, status, **headers)

    # -- who asks ----------------------------------------------------------------------------

    def user(self) -> dict | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return USERS.get(token)

    def token_is_wrong(self) -> bool:
        return "Authorization" in self.headers and self.user() is None

    def names_of(self, user: dict | None) -> set[str]:
        return set() if user is None else {user["name"], *user["orgs"]}

    def may_write(self, owner: str) -> bool:
        user = self.user()
        return owner in self.names_of(user) and user["role"] == "write"

    def repo(self, kind: str, name: str) -> Repo | None:
        """None, after a refusal, if there is none that this user may see."""
        if self.token_is_wrong():
            self.refuse(401, "Invalid credentials in Authorization header")
            return None
        found = self.hub.repos.get((kind, name))
        owner = name.partition("/")[0]
        if found is None or (found.private and owner not in self.names_of(self.user())):
            status = 401 if self.user() is None else 404
            self.refuse(status, "Repository not found", "RepoNotFound")
            return None
        return found

    # -- reading -----------------------------------------------------------------------------

    def who(self) -> None:
        user = self.user()
        if user is None:
            return self.refuse(401, "Invalid credentials in Authorization header")
        orgs = [{"name": name} for name in user["orgs"]]
        access = {"accessToken": {"displayName": "a token", "role": user["role"]}}
        self.say({"type": "user", "name": user["name"], "orgs": orgs, "auth": access})

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        repo = self.repo(kind, name)
        if repo is None:
            return
        sha = repo.sha_of(revision or "main")
        if sha is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        values = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repo.private}
        values |= {"gated": "manual" if repo.accepted is not None else False, "tags": []}
        values |= {"siblings": [{"rfilename": each} for each in repo.commits[sha]]}
        self.say(values | {"downloads": 0, "likes": 0})

    def entry(self, name: str, content: bytes) -> dict:
        found = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        if is_large(name, content):
            found["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return found

    def tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        repo = self.repo(kind, name)
        if repo is None:
            return
        sha, prefix = repo.sha_of(revision), f"{folder}/" if folder else ""
        if sha is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = {k: v for k, v in repo.commits[sha].items() if k.startswith(prefix)}
        if folder and not files:
            return self.refuse(404, f"{folder} does not exist", "EntryNotFound")
        deep = self.asked.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = {}
        for each, content in files.items():
            first, slash, _ = each.removeprefix(prefix).partition("/")
            parts = each.split("/")[:-1]
            folders = ["/".join(parts[: n + 1]) for n in range(len(parts))] if deep else []
            folders = [f for f in folders if f.startswith(prefix)]
            if slash and not deep:
                folders = [prefix + first]
            for one in folders:
                found[one] = {"type": "directory", "path": one, "size": 0, "oid": "0" * 40}
            if deep or not slash:
                found[each] = self.entry(each, content)
        self.say(list(found.values()))

    def paths(self, kind: str, name: str, revision: str) -> None:
        asked = self.body()
        repo = self.repo(kind, name)
        if repo is None:
            return
        try:
            wanted = json.loads(asked)["paths"]
        except ValueError:
            wanted = urllib.parse.parse_qs(asked.decode()).get("paths", [])
        sha, found = repo.sha_of(revision), []
        if sha is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        for path in [wanted] if isinstance(wanted, str) else wanted:
            if path in repo.commits[sha]:
                found.append(self.entry(path, repo.commits[sha][path]))
            elif any(each.startswith(f"{path}/") for each in repo.commits[sha]):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.say(found)

    def refs(self, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        if repo is not None:
            branches = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha}
                for n, sha in repo.names.items()
            ]
            self.say({"branches": branches, "tags": [], "converts": []})

    def file(self, name: str, revision: str, path: str, kind: str | None = None) -> None:
        repo = self.repo("dataset" if kind else "model", name)
        if repo is None:
            return
        sha = repo.sha_of(revision)
        if sha is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if self.is_gated(repo):
            return
        content = repo.commits[sha].get(path)
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        headers = {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if not is_large(path, content):
            return self.send_range(content, ETag=f'"{git_sha1(content)}"', **headers)
        oid = sha256(content)
        self.hub.stored[oid] = content
        headers |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(content)}
        self.send(b"", 302, Location=f"{self.hub.storage}/storage/{oid}", **headers)

    def is_gated(self, repo: Repo) -> bool:
        """Whether this user has not accepted the conditions; then after a refusal."""
        if repo.accepted is None or repo.accepted & self.names_of(self.user()):
            return False
        status = 401 if self.user() is None else 403
        self.refuse(status, f"Access to {repo.name} is restricted.", "GatedRepo")
        return True

    def check(self, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        if repo is not None and not self.is_gated(repo):
            self.say({})

    def send_range(self, content: bytes, **headers) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(content, **headers)
        self.hub.ranges.append(asked[0])
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        shown = f"bytes {first}-{last}/{len(content)}"
        self.send(content[first : last + 1], 206, Content_Range=shown, **headers)

    def from_storage(self, method: str, path: str) -> None:
        if "Authorization" in self.headers:
            return self.refuse(400, "the token was sent to another host")
        oid, _, part = path.removeprefix("/storage/").partition("/")
        if method != "PUT":
            return self.send_range(self.hub.stored[oid], ETag=f'"{oid}"', Accept_Ranges="bytes")
        content = self.body()
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = content
            return self.send(b"", ETag=f'"{sha256(content)}"')
        if sha256(content) != oid:
            return self.refuse(400, "the content has another hash")
        self.hub.stored[oid] = content
        return self.send(b"")

    # -- writing -----------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body())
        if self.user() is None:
            return self.refuse(401, "Invalid credentials in Authorization header")
        owner = asked.get("organization") or self.user()["name"]
        name, kind = f"{owner}/{asked['name']}", asked.get("type") or "model"
        if not self.may_write(owner):
            message = f"You don't have the rights to create a {kind} under the namespace {owner}"
            return self.refuse(403, message)
        url = f"{self.hub.endpoint}/{name}"
        if (kind, name) in self.hub.repos:
            return self.say({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repo = self.hub.repos[kind, name] = Repo(kind, name, private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.say({"url": url, "name": name})

    def yaml(self) -> None:
        import yaml

        content = json.loads(self.body())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = [] if found else [{"message": "there is no metadata"}]
        metadata = yaml.safe_load(found[1]) if found else {}
        if metadata.get("license") == "other" and not metadata.get("license_name"):
            errors.append({"message": '"license_name" is required'})
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(metadata.get("base_model", "a/b"))):
            errors.append({"message": '"base_model" must be a model id'})
        self.say({"errors": errors, "warnings": []}, 400 if errors else 200)

    def writable(self, kind: str, name: str) -> Repo | None:
        content = self.body()
        repo = self.repo(kind, name)
        if repo is None:
            return None
        if not self.may_write(name.partition("/")[0]):
            self.refuse(403, "Forbidden: you need the write role")
            return None
        self.content = content
        return repo

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self.writable(kind, name)
        if repo is None:
            return
        found = []
        for each in json.loads(self.content)["files"]:
            path, there = each["path"], repo.files.get(each["path"])
            large = is_large(path, each["size"])
            oid = None
            if there is not None:
                oid = sha256(there) if large else git_sha1(there)
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.say({"files": found})

    def batch(self, name: str) -> None:
        if self.writable("model", name) is None:
            return
        found = []
        for each in json.loads(self.content)["objects"]:
            oid, size = each["oid"], each["size"]
            place = f"{self.hub.storage}/storage/{oid}"
            actions = {"verify": {"href": f"{self.hub.endpoint}/verify/{oid}"}}
            if size <= PART:
                actions["upload"] = {"href": place}
            else:
                parts = {str(n + 1): f"{place}/{n + 1}" for n in range(-(-size // PART))}
                header = {"chunk_size": str(PART), **parts}
                whole = f"{self.hub.endpoint}/complete/{oid}"
                actions["upload"] = {"href": whole, "header": header}
            known = oid in self.hub.stored
            found.append({"oid": oid, "size": size} | ({} if known else {"actions": actions}))
        self.say({"transfer": "basic", "objects": found})

    def complete(self, oid: str) -> None:
        self.body()
        parts = self.hub.parts.get(oid, {})
        content = b"".join(parts[number] for number in sorted(parts))
        if sha256(content) != oid:
            return self.refuse(400, "the parts have another hash")
        self.hub.stored[oid] = content
        self.say({})

    def verify(self, oid: str) -> None:
        asked = json.loads(self.body())
        right = len(self.hub.stored.get(oid, b"")) == asked["size"]
        self.say({}) if right else self.refuse(400, "not what was announced")

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.writable(kind, name)
        if repo is None:
            return
        files = dict(repo.files)
        for line in self.content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return self.refuse(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] in ("deletedFile", "deletedFolder"):
                gone = value["path"]
                files = {k: v for k, v in files.items() if k != gone}
                files = {k: v for k, v in files.items() if not k.startswith(gone + "/")}
        sha = repo.commit(files)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self.say({"commitUrl": url, "commitOid": sha, "success": True})


API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", Handler.who),
    (rf"GET {API}", Handler.info),
    (rf"GET {API}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    (rf"POST {API}/paths-info/(?P<revision>.+)", Handler.paths),
    (rf"GET {API}/refs", Handler.refs),
    (rf"GET {API}/auth-check", Handler.check),
    (
        r"(?:GET|HEAD) (?P<kind>/datasets)?/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)"
        r"/(?P<path>.+)",
        Handler.file,
    ),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.yaml),
    (rf"POST {API}/preupload/(?P<revision>.+)", Handler.preupload),
    (r"POST /(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("POST /complete/(?P<oid>.+)", Handler.complete),
    ("POST /verify/(?P<oid>.+)", Handler.verify),
    (rf"POST {API}/commit/(?P<revision>.+)", Handler.commit),
]


def reread_environment() -> None:
    """The hub's client reads its settings when it is imported: this reads them again."""
    import importlib
    import sys

    import huggingface_hub
    from huggingface_hub import constants, hf_api

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT
    huggingface_hub.close_session()
    if "datasets" in sys.modules:
        from datasets import config

        config.HF_ENDPOINT = constants.ENDPOINT
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = constants.HF_HUB_OFFLINE
        config.HF_DATASETS_CACHE = Path(constants.HF_HOME) / "datasets"
