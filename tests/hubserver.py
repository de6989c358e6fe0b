"""A model hub on this machine: directories served, and uploads taken, in the protocol of the huggingface_hub client.

    with HubServer() as server:
        commit = server.add_repo("org/name", "some/directory")
        ...  # HF_ENDPOINT=server.endpoint HF_HUB_DISABLE_XET=1

    python tests/hubserver.py DIR org/name --port 8080 --counts counts.json     # until SIGTERM

Files are sent from where they lie. Every *.safetensors file is an LFS file: `resolve` redirects to a signed URL of a
second port, which wants no token and refuses links that were tampered with or have expired; all other files are sent
at once. Xet is not announced. Faults are queued in `faults`; everything asked is listed in `requests`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import hmac
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

CHUNK = 4 << 20
REGULAR_BYTES = 10 << 20  # of uploads; what is larger, or binary, becomes an LFS file
KINDS = ("drop", "429", "500", "503", "short", "wrong_length", "expired", "changed", "slow", "no_range", "lost")
WRITER, READER = "hf_writer", "hf_reader"  # tokens that every server knows, both of the user `tester`
_KEY = b"signs the links of this server"


class Request(NamedTuple):
    """One request that was answered, or broken off."""

    method: str
    path: str  # unquoted, without the query
    range: str | None
    status: int  # 0: the connection was closed instead of an answer
    bytes_sent: int  # of the body


@dataclass
class Fault:
    """What goes wrong with the next `count` requests whose path, without the query, `match` is found in.

    drop closes the connection, after so many bytes of the body, or before any answer where `after` is 0;
    429, 500 and 503 answer so, with Retry-After; short sends half the range, well formed but for Content-Range;
    wrong_length says that the file has one byte more; expired redirects to, or answers as, a link out of date;
    changed is another commit, another ETag and another first byte; slow waits `retry_after` seconds, after `after`
    bytes of the body; no_range answers a range with 200 and the whole file; lost does what was asked, and closes the
    connection without an answer.
    """

    kind: str
    match: str = "."
    count: int = 1
    after: int = 0
    retry_after: float = 0
    method: str = "."

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected one of {KINDS}, found {self.kind!r}")


@dataclass(frozen=True)
class File:
    """A file of a repository: where its bytes lie, and how it is stored."""

    path: Path
    nbytes: int
    lfs: bool


@dataclass
class Repo:
    """Commits, each a table of files, and what branches point to."""

    name: str
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    token: str | None = None
    writable: bool = True

    def commit(self, branch: str, files: Mapping[str, File], message: str) -> str:
        """Add a commit to a branch; the same history gives the same id."""
        rows = [[name, str(f.path), f.nbytes, f.path.stat().st_mtime_ns] for name, f in sorted(files.items())]
        text = json.dumps([self.name, self.refs.get(branch), len(self.commits), message, rows])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.messages[sha] = dict(files), message
        self.refs[branch] = sha
        return sha


@dataclass
class _Record:
    method: str
    path: str
    range: str | None
    status: int = 0
    sent: int = 0
    repo: str = ""
    drawn: str = ""  # the kind of random fault that is to hit it, and at which share of the bytes
    drawn_at: float = 0


class _Reply(Exception):
    """An answer other than the one looked for."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer:
    """The server; `with` starts and stops it."""

    def __init__(self, *, port: int = 0, part_bytes: int | None = None, link_seconds: float = 3600) -> None:
        """Make a server.

        Args:
            port: of the endpoint; 0 takes a free one.
            part_bytes: uploads larger than this are taken in parts of it; None takes everything in one.
            link_seconds: how long signed URLs are good for.

        """
        self.port, self.part_bytes, self.link_seconds = port, part_bytes, link_seconds
        self.page_size = 1000  # entries of a tree in one answer
        self.ignored: set[str] = set()  # files that the repositories' .gitignore keeps from being committed
        self.repos: dict[str, Repo] = {}
        self.users = {
            WRITER: {"name": "tester", "orgs": ["org"], "role": "write"},
            READER: {"name": "tester", "orgs": ["org"], "role": "read"},
        }
        self.faults: list[Fault] = []
        self.fired: list[tuple[str, str]] = []  # kind of fault, path
        self.uploads: list[tuple[str, int, bool]] = []  # SHA-256, bytes received, whether it was completed
        self.tokens_leaked = 0  # requests at the signed URLs that carried a token
        self.records: list[_Record] = []
        self.lock = threading.Lock()
        self._digests: dict[tuple[str, str, int, int], str] = {}
        self._random: tuple[random.Random, float, tuple[str, ...], str] | None = None
        self._random_left = 0
        self._servers: list[_Server] = []
        self._store: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> HubServer:
        self._store = tempfile.TemporaryDirectory(prefix="hubserver-")
        self._servers = [_Server(self, self.port, _Hub), _Server(self, 0, _Links)]
        self.port, self.link_port = (server.server_address[1] for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.close_connections()
        if self._store:
            self._store.cleanup()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.port}"

    def env(self, home: str | os.PathLike[str], token: str | None = None) -> dict[str, str]:
        """Environment of a client process: this one's, without what it says of the hub."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ours |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        ours |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")  # a proxy does not know this machine's servers
        return ours | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def add_repo(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        gated: bool = False,
        private: bool = False,
        token: str | None = None,
        revisions: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> str:
        """Serve a directory as branch main, or as a further commit of it; an empty repository where None.

        Args:
            name: owner/name.
            path: the directory; hidden files are left out.
            gated: files are sent only to those who give `token`.
            private: nothing is told but to those who give `token`.
            token: the token for that; None: WRITER or READER.
            revisions: further branches, each a directory.

        Returns:
            the commit of main.

        """
        repo = self.repos.setdefault(name, Repo(name))
        repo.gated, repo.private, repo.token = gated, private, token
        for branch, folder in {"main": path, **(revisions or {})}.items():
            files = _files_of(Path(folder)) if folder is not None else {}
            repo.commit(branch, files, "initial commit" if not repo.commits else f"new {branch}")
        return repo.refs["main"]

    def random_faults(self, seed: int, rate: float, kinds: Iterable[str], count: int, match: str = ".") -> None:
        """Break a share `rate` of the GET requests for files whose path matches, until `count` are broken."""
        with self.lock:
            self._random = (random.Random(seed), rate, tuple(kinds), match)
            self._random_left = count

    @property
    def requests(self) -> list[Request]:
        """Everything asked so far, in the order of asking."""
        with self.lock:
            return [Request(r.method, r.path, r.range, r.status, r.sent) for r in self.records]

    def data_bytes(self, repo: str) -> int:
        """Bytes of *.safetensors and *.gguf files sent so far, broken answers included."""
        with self.lock:
            files = [r for r in self.records if r.repo == repo and r.path.endswith((".safetensors", ".gguf"))]
            return sum(r.sent for r in files if r.status in (200, 206))

    def counts(self) -> dict[str, Any]:
        """What the process writes at its end."""
        return {
            "requests": [list(request) for request in self.requests],
            "data_bytes": {name: self.data_bytes(name) for name in self.repos},
            "fired": self.fired,
            "uploads": self.uploads,
            "tokens_leaked": self.tokens_leaked,
        }

    def reset_counts(self) -> None:
        """Forget what was asked, sent and received."""
        with self.lock:
            self.records, self.fired, self.uploads, self.tokens_leaked = [], [], [], 0

    def digest(self, path: Path, algorithm: str) -> str:
        """SHA-256, or the id of a git blob (sha1), of a file; computed once."""
        stat = path.stat()
        key = (algorithm, str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            digest = hashlib.new(algorithm, b"" if algorithm == "sha256" else b"blob %d\0" % stat.st_size)
            with path.open("rb") as file:
                while piece := file.read(CHUNK):
                    digest.update(piece)
            self._digests[key] = digest.hexdigest()
        return self._digests[key]

    def oid(self, file: File) -> str:
        """What its ETag says: SHA-256 of LFS files, the blob's id of others."""
        return self.digest(file.path, "sha256" if file.lfs else "sha1")

    def stored(self, repo: str, oid: str) -> Path:
        """Where an upload to a repository comes to lie."""
        assert self._store is not None
        if not re.fullmatch(r"(blob-)?[0-9a-f]{64}(\.\d+)?", oid):
            raise _Reply(422, message=f"expected a SHA-256, found {oid!r}")
        folder = Path(self._store.name, repo.replace("/", "--"))
        folder.mkdir(exist_ok=True)
        return folder / oid

    def sign(self, path: str, seconds: float | None = None) -> str:
        """A URL of the second port that is good for a while."""
        expires = str(int(time.time() + (self.link_seconds if seconds is None else seconds)))
        query = urlencode({"Expires": expires, "Signature": _signature(path, expires)})
        return f"http://127.0.0.1:{self.link_port}{quote(path)}?{query}"

    def draw(self, path: str) -> tuple[str, float]:
        """Choose the random fault of a GET request for a file, and where in the file it hits; none: an empty kind."""
        with self.lock:
            if not self._random or not self._random_left:
                return "", 0
            random_, rate, kinds, match = self._random
            hit, kind, where = random_.random() < rate, random_.choice(kinds), random_.random()
            return (kind if hit and re.search(match, path) else ""), where

    def take_fault(self, record: _Record, kinds: Iterable[str], nbytes: int = 0) -> Fault | None:
        """The fault that is due for this request, if it is of one of these kinds; it counts as used."""
        with self.lock:
            for fault in self.faults:
                fits = re.search(fault.match, record.path) and re.search(fault.method, record.method)
                if fault.count > 0 and fault.kind in kinds and fits:
                    fault.count -= 1
                    self.fired.append((fault.kind, record.path))
                    return fault
            if record.drawn not in kinds or not self._random_left:
                return None
            self._random_left -= 1
            self.fired.append((record.drawn, record.path))
            seconds = 0.2 if record.drawn == "slow" else 0
            return Fault(record.drawn, after=int(record.drawn_at * nbytes), retry_after=seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, hub: HubServer, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.hub = hub
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """End the connections that clients keep alive."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """What both ports have in common: records, faults, bodies."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def answer(self) -> None:
        """Answer one request, and record it."""
        split = urlsplit(self.path)
        self.hub, self.parts = self.server.hub, [unquote(part) for part in split.path.split("/")[1:]]
        self.query, self.route = dict(parse_qsl(split.query)), unquote(split.path)
        self.record = _Record(self.command, self.route, self.headers.get("Range"))
        self.unread, self.lost = self._body(), False
        if self.command == "GET" and (self._sends_file() or self.parts[2:3] == ["resolve"]):
            self.record.drawn, self.record.drawn_at = self.hub.draw(self.route)
        with self.hub.lock:
            self.hub.records.append(self.record)
        try:
            if not self.plain_fault():
                self.lost = self.fault(("lost",)) is not None
                self.respond()
        except _Reply as reply:
            self.drain()
            headers = {"X-Error-Code": reply.code} if reply.code else {}
            if reply.message:
                headers["X-Error-Message"] = reply.message
            self.send(reply.status, json.dumps({"error": reply.message}).encode(), headers)
        except OSError:  # the client went away
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def respond(self) -> None:
        raise NotImplementedError

    def log_message(self, *_: Any) -> None:
        pass

    def fault(self, kinds: Iterable[str], nbytes: int = 0) -> Fault | None:
        """The fault that is due."""
        return self.hub.take_fault(self.record, kinds, nbytes)

    def plain_fault(self) -> bool:
        """Faults that need no file; whether the request was answered by one."""
        fault = self.fault(("429", "500", "503"))
        if fault:
            self.drain()
            headers = {} if fault.kind == "500" else {"Retry-After": f"{fault.retry_after:g}"}
            self.send(int(fault.kind), b'{"error": "a fault"}', headers)
            return True
        fault = None if self._sends_file() or self.parts[2:3] == ["resolve"] else self.fault(("drop", "slow"))
        if fault and fault.kind == "drop":
            received = 0
            while received < fault.after and (piece := next(self.unread, b"")):
                received += len(piece)
            self.hang_up()
        elif fault:
            time.sleep(fault.retry_after)
        return False

    def _sends_file(self) -> bool:
        return False

    def hang_up(self) -> None:
        """Close the connection so that the client notices at once."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def _body(self) -> Iterator[bytes]:
        """The body of the request, a piece at a time."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while nbytes := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(nbytes)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, 1 << 20))
            if not piece:
                raise ConnectionResetError
            left -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read what is left of the body, so that the connection can be used again."""
        for _ in self.unread:
            pass

    def json(self) -> Any:
        """The body of the request, as JSON."""
        return json.loads(b"".join(self.unread) or b"{}")

    def send_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answer with 200 and a value."""
        self.drain()
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Status and headers."""
        if self.lost:
            self.hang_up()
        self.record.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """A whole answer."""
        self.send_head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.record.sent += len(body)
            self.wfile.write(body)

    def send_file(self, file: File, etag: str, headers: Mapping[str, str]) -> None:
        """A file or the range of it that was asked for, with whatever fault is due."""
        start, stop, total = 0, file.nbytes, file.nbytes
        wanted = _range_of(self.record.range, total)
        status = 206 if wanted else 200
        kinds = ("drop", "short", "wrong_length", "changed", "slow", *(("no_range",) if wanted else ()))
        low, high = wanted or (start, stop)
        fault = self.fault(kinds, nbytes=high - low) or Fault("slow")
        if fault.kind == "no_range":
            wanted, status = None, 200
        if fault.kind == "drop" and (not fault.after or self.command == "HEAD"):
            self.hang_up()
        start, stop = wanted or (start, stop)
        if start >= stop and total:
            self.send(416, b"", {"Content-Range": f"bytes */{total}"})
            return
        said = total + (fault.kind == "wrong_length")
        length = said if status == 200 else stop - start
        if fault.kind == "short":
            stop = start + (stop - start) // 2
            length = stop - start
        full = {"Accept-Ranges": "bytes", "ETag": f'"{etag[::-1] if fault.kind == "changed" else etag}"'}
        if wanted:
            full["Content-Range"] = f"bytes {wanted[0]}-{wanted[1] - 1}/{said}"
        self.send_head(status, {**full, **headers, "Content-Length": str(length)})
        if self.command != "HEAD":
            self._send_bytes(file.path, start, stop, fault)
            if status == 200 and said > total:
                self.hang_up()

    def _send_bytes(self, path: Path, start: int, stop: int, fault: Fault) -> None:
        with path.open("rb") as file:
            if fault.kind == "changed" and start < stop:
                self.record.sent += 1
                self.connection.sendall(bytes([os.pread(file.fileno(), 1, start)[0] ^ 255]))
                start += 1
            cut = min(start + fault.after, stop) if fault.kind in ("drop", "slow") else start
            self._pump(file.fileno(), start, cut)
            if fault.kind == "drop":
                self.hang_up()
            time.sleep(fault.retry_after if fault.kind == "slow" else 0)
            self._pump(file.fileno(), cut, stop)

    def _pump(self, source: int, start: int, stop: int) -> None:
        """Send bytes from file to socket; they count before they can have arrived."""
        while start < stop:
            wanted = min(CHUNK, stop - start)
            self.record.sent += wanted
            sent = 0
            try:
                sent = os.sendfile(self.connection.fileno(), source, start, wanted)
            finally:
                self.record.sent -= wanted - sent
            if not sent:
                raise ConnectionAbortedError  # the file became shorter
            start += sent


class _Links(_Handler):
    """The second port: signed downloads and uploads, where a token is neither needed nor wanted."""

    def _sends_file(self) -> bool:
        return self.parts[0] == "lfs" and self.command in ("GET", "HEAD")

    def respond(self) -> None:
        if "Authorization" in self.headers:
            with self.hub.lock:
                self.hub.tokens_leaked += 1
        expires = self.query.get("Expires", "")
        if not hmac.compare_digest(self.query.get("Signature", ""), _signature(self.route, expires)):
            self.refuse("SignatureDoesNotMatch")
        elif time.time() > int(expires) or self.fault(("expired",)):
            self.refuse("Request has expired")
        elif self._sends_file():
            self.download()
        elif self.command == "PUT":
            self.upload("/".join(self.parts[1:3]), *self.parts[3:])
        else:
            self.complete("/".join(self.parts[1:3]), self.parts[3])

    def refuse(self, why: str) -> None:
        """As an object store says it."""
        self.drain()
        text = f"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>{why}</Message></Error>"
        self.send(403, text.encode(), {"Content-Type": "application/xml"})

    def download(self) -> None:
        """`/lfs/OWNER/NAME/SHA256/PATH`."""
        self.record.repo, oid, name = "/".join(self.parts[1:3]), self.parts[3], "/".join(self.parts[4:])
        repo = self.hub.repos[self.record.repo]
        for files in reversed(repo.commits.values()):
            if name in files and self.hub.oid(files[name]) == oid:
                self.send_file(files[name], oid, {"Content-Type": "binary/octet-stream"})
                return
        self.refuse("NoSuchKey")

    def upload(self, repo: str, oid: str, part: str = "") -> None:
        """`/upload/OWNER/NAME/SHA256[/PART]`: taken only if the bytes are those that were announced."""
        target = self.hub.stored(repo, oid + (f".{part}" if part else ""))
        nbytes, digest, whole = 0, hashlib.sha256(), False
        fd, name = tempfile.mkstemp(dir=target.parent, prefix="incoming-")
        try:
            with os.fdopen(fd, "wb") as file:
                for piece in self.unread:
                    nbytes += file.write(piece)
                    digest.update(piece)
            whole = bool(part) or digest.hexdigest() == oid
            if whole:
                os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)
            with self.hub.lock:
                self.hub.uploads.append((oid, nbytes, whole))
        self.send(200 if whole else 400, b"", {"ETag": f'"{digest.hexdigest()[:32]}"'})

    def complete(self, repo: str, oid: str) -> None:
        """`/complete/OWNER/NAME/SHA256`: the parts become one file."""
        numbers = [part["partNumber"] for part in self.json()["parts"]]
        target, digest = self.hub.stored(repo, oid), hashlib.sha256()
        with target.with_suffix(".whole").open("wb") as file:
            for number in numbers:
                data = self.hub.stored(repo, f"{oid}.{number}").read_bytes()
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != oid:
            raise _Reply(400, message="the parts have another SHA-256")
        target.with_suffix(".whole").rename(target)
        self.send_json({"success": True})


class _Hub(_Handler):
    """The endpoint: the API, `resolve`, and the LFS batch."""

    def respond(self) -> None:
        self.user = self._user()
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, action in _ROUTES:
            if method == wanted and _fits(pattern, self.parts):
                action(self)
                return
        raise _Reply(404, message=f"no such route: {self.command} {self.route}")

    def _user(self) -> Mapping[str, Any] | None:
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not self.token:
            return None
        known = self.token in self.hub.users or any(repo.token == self.token for repo in self.hub.repos.values())
        if not known:
            raise _Reply(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(self.token, {"name": "guest", "orgs": [], "role": "read"})

    def repo(self, at: int, files: bool = False, write: bool = False) -> Repo:
        """The repository that parts `at` and the next name, if this user may have it.

        Args:
            at: where the name begins in the path.
            files: its files are asked for, which may be gated.
            write: it is to be changed.

        """
        name = "/".join(self.parts[at : at + 2]).removesuffix(".git")
        repo = self.hub.repos.get(name)
        allowed = repo is not None and self.token in ([repo.token] if repo.token else self.hub.users)
        if repo is None or (repo.private and not allowed):
            raise _Reply(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated and not allowed:
            raise _Reply(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted.")
        if write:
            self.refuse_reader(name.split("/")[0])
            if not repo.writable:
                raise _Reply(403, message="You don't have the rights to change this repository")
        self.record.repo = name
        return repo

    def refuse_reader(self, owner: str) -> None:
        """Refuse who may not write to what `owner` has."""
        if self.user is None:
            raise _Reply(401, message="Invalid username or password.")
        if self.user["role"] != "write":
            raise _Reply(403, message="Forbidden: you must use a write token to upload to a repository.")
        if owner not in (self.user["name"], *self.user["orgs"]):
            raise _Reply(403, message=f"You don't have the rights to create a model under the namespace {owner}")

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        """Commit and files of a branch or commit."""
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _Reply(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def whoami(self) -> None:
        if self.user is None:
            raise _Reply(401, message="Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.user["orgs"]]
        role = {"accessToken": {"displayName": "test", "role": self.user["role"]}}
        self.send_json({"type": "user", "name": self.user["name"], "orgs": orgs, "auth": role})

    def info(self) -> None:
        """`/api/models/OWNER/NAME[/revision/REV]`."""
        repo = self.repo(2)
        sha, files = self.files(repo, self.parts[5] if len(self.parts) > 5 else "main")
        if self.fault(("changed",)):
            sha = sha[::-1]
        blobs = self.query.get("blobs", "").lower() in ("true", "1")
        siblings = [{"rfilename": name, **(self._blob(files[name]) if blobs else {})} for name in sorted(files)]
        about = {"id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0], "sha": sha}
        state = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        rest: dict[str, Any] = {"tags": [], "downloads": 0, "likes": 0, "createdAt": "2025-01-01T00:00:00.000Z"}
        self.send_json({**about, **state, **rest, "siblings": siblings})

    def _blob(self, file: File) -> dict[str, Any]:
        out: dict[str, Any] = {"size": file.nbytes, "blobId": self._blob_id(file)}
        if file.lfs:
            out["lfs"] = {"size": file.nbytes, "sha256": self.hub.oid(file), "pointerSize": len(self._pointer(file))}
        return out

    def _pointer(self, file: File) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.hub.oid(file)}\nsize {file.nbytes}\n"
        return text.encode()

    def _blob_id(self, file: File) -> str:
        """Of an LFS file it is the pointer's."""
        if not file.lfs:
            return self.hub.oid(file)
        pointer = self._pointer(file)
        return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()

    def _entry(self, name: str, file: File | None) -> dict[str, Any]:
        if file is None:
            oid = hashlib.sha1(name.encode()).hexdigest()
            return {"type": "directory", "oid": oid, "size": 0, "path": name}
        out = {"type": "file", "oid": self._blob_id(file), "size": file.nbytes, "path": name}
        if file.lfs:
            out["lfs"] = {"oid": self.hub.oid(file), "size": file.nbytes, "pointerSize": len(self._pointer(file))}
        return out

    def tree(self) -> None:
        """`/api/models/OWNER/NAME/tree/REV[/PATH]`, a page at a time."""
        _, files = self.files(self.repo(2, files=True), self.parts[5])
        below = "/".join(self.parts[6:])
        entries = _tree(files, below, self.query.get("recursive", "").lower() in ("true", "1"))
        if below and not entries:
            raise _Reply(404, "EntryNotFound", f"{below} does not exist")
        at = int(self.query.get("cursor", 0))
        page = entries[at : at + self.hub.page_size]
        query = urlencode({**self.query, "cursor": at + self.hub.page_size})
        url = f"{self.hub.endpoint}{urlsplit(self.path).path}?{query}"
        more = {"Link": f'<{url}>; rel="next"'} if at + self.hub.page_size < len(entries) else {}
        self.send_json([self._entry(name, files.get(name)) for name in page], more)

    def paths_info(self) -> None:
        """`POST /api/models/OWNER/NAME/paths-info/REV`: those of the paths that there are."""
        _, files = self.files(self.repo(2, files=True), self.parts[5])
        body = b"".join(self.unread)
        typed = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if typed else [v for k, v in parse_qsl(body.decode()) if k == "paths"]
        folders = set(_tree(files, "", recursive=True)) - set(files)
        self.send_json([self._entry(path, files.get(path)) for path in paths if path in files or path in folders])

    def refs(self) -> None:
        refs = self.repo(2).refs
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in refs.items()]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def auth_check(self) -> None:
        self.repo(2, files=True, write=self.parts[-1] == "write")
        self.send_json({})

    def resolve(self) -> None:
        """`/OWNER/NAME/resolve/REV/PATH`: the file, or a redirect to where it lies."""
        repo = self.repo(0, files=True)
        sha, files = self.files(repo, self.parts[3])
        name = "/".join(self.parts[4:])
        if name not in files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        file = files[name]
        if not file.lfs:
            self.send_file(file, self.hub.oid(file), {"X-Repo-Commit": sha, "Content-Type": "text/plain"})
            return
        kinds = ("drop", "expired", "changed", "wrong_length", "slow")
        fault = self.fault(kinds) or Fault("slow")
        if fault.kind == "drop":
            self.hang_up()
        time.sleep(fault.retry_after if fault.kind == "slow" else 0)
        oid, changed = self.hub.oid(file), fault.kind == "changed"
        location = self.hub.sign(f"/lfs/{repo.name}/{oid}/{name}", -1 if fault.kind == "expired" else None)
        headers = {
            "Location": location,
            "X-Repo-Commit": sha[::-1] if changed else sha,
            "X-Linked-ETag": f'"{oid[::-1] if changed else oid}"',
            "X-Linked-Size": str(file.nbytes + (fault.kind == "wrong_length")),
            "Accept-Ranges": "bytes",
        }
        self.send(302, b"Found. Redirecting", headers)

    def create(self) -> None:
        """`POST /api/repos/create`."""
        asked = self.json()
        owner = asked.get("organization") or (self.user or {}).get("name", "")
        self.refuse_reader(owner)
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            text = json.dumps({"error": "You already created this model repo", "url": url})
            self.send(409, text.encode(), {"X-Error-Message": "You already created this model repo"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.hub.repos[name] = Repo(name, private=private)
        attributes = self._keep(name, b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo.commit("main", {".gitattributes": attributes}, "initial commit")
        self.send_json({"url": url, "name": name, "id": hashlib.sha1(name.encode()).hexdigest()[:24]})

    def branch(self) -> None:
        """`POST /api/models/OWNER/NAME/branch/BRANCH`."""
        repo, name = self.repo(2, write=True), self.parts[5]
        start = self.json().get("startingPoint", "main")
        if name in repo.refs:
            raise _Reply(409, message="Reference already exists")
        repo.refs[name] = self.files(repo, start)[0]
        self.send_json({})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self) -> None:
        """`POST /api/models/OWNER/NAME/preupload/REV`: which files are to become LFS files."""
        _, files = self.files(self.repo(2, write=True), self.parts[5])
        out = []
        for asked in self.json()["files"]:
            binary = asked["path"].endswith(".safetensors") or b"\0" in base64.b64decode(asked["sample"])
            mode = "lfs" if binary or asked["size"] > REGULAR_BYTES else "regular"
            there, ignored = files.get(asked["path"]), asked["path"] in self.hub.ignored
            oid = {"oid": self.hub.oid(there)} if there else {}
            out.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": ignored, **oid})
        self.send_json({"files": out})

    def batch(self) -> None:
        """`POST /OWNER/NAME.git/info/lfs/objects/batch`: no actions for what is there."""
        repo = self.repo(0, write=True).name
        asked = self.json()
        base = f"{self.hub.endpoint}/{'/'.join(self.parts[:-1])}"
        out = []
        for item in asked["objects"]:
            oid = item["oid"]
            if not self.hub.stored(repo, oid).exists():
                upload = self._upload_action(f"{repo}/{oid}", item["size"])
                out.append({**item, "actions": {"upload": upload, "verify": {"href": f"{base}/verify", "header": {}}}})
            else:
                out.append(item)
        self.send_json({"transfer": "basic", "objects": out})

    def _upload_action(self, name: str, size: int) -> dict[str, Any]:
        part = self.hub.part_bytes
        if not part or size <= part:
            return {"href": self.hub.sign(f"/upload/{name}"), "header": {}}
        parts = {str(n): self.hub.sign(f"/upload/{name}/{n}") for n in range(1, -(-size // part) + 1)}
        return {"href": self.hub.sign(f"/complete/{name}"), "header": {"chunk_size": str(part), **parts}}

    def verify(self) -> None:
        """The last step of an upload."""
        repo, asked = self.repo(0, write=True).name, self.json()
        path = self.hub.stored(repo, asked["oid"])
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise _Reply(404, message=f"no object {asked['oid']} of {asked['size']} bytes")
        self.send_json({"message": "ok"})

    def commit(self) -> None:
        """`POST /api/models/OWNER/NAME/commit/BRANCH`: a line of JSON for every file, all or nothing."""
        repo, branch = self.repo(2, write=True), self.parts[5]
        lines = [json.loads(line) for line in b"".join(self.unread).splitlines()]
        with self.hub.lock:
            if branch not in repo.refs:
                raise _Reply(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            header = lines[0]["value"]
            if header.get("parentCommit", repo.refs[branch]) != repo.refs[branch]:
                raise _Reply(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[repo.refs[branch]])
            for line in lines[1:]:
                self._apply(repo.name, files, line)
            sha = repo.commit(branch, files, header["summary"])
        url = f"{self.hub.endpoint}/{repo.name}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def _apply(self, repo: str, files: dict[str, File], line: Mapping[str, Any]) -> None:
        key, value = line["key"], line["value"]
        name = value["path"].rstrip("/")
        if key == "file":
            files[name] = self._keep(repo, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            path = self.hub.stored(repo, value["oid"])
            if not path.exists():
                raise _Reply(400, message=f"LFS pointer of {name} points to a file that does not exist")
            files[name] = File(path, path.stat().st_size, lfs=True)
        else:
            for gone in [n for n in files if n == name or (key == "deletedFolder" and n.startswith(f"{name}/"))]:
                del files[gone]

    def _keep(self, repo: str, data: bytes) -> File:
        path = self.hub.stored(repo, "blob-" + hashlib.sha256(data).hexdigest())
        path.write_bytes(data)
        return File(path, len(data), lfs=False)


_MODEL = ("api", "models", "*", "*")
_ROUTES: tuple[tuple[str, tuple[str, ...], Callable[[_Hub], None]], ...] = (
    ("GET", ("api", "whoami-v2"), _Hub.whoami),
    ("POST", ("api", "repos", "create"), _Hub.create),
    ("POST", ("api", "validate-yaml"), _Hub.validate_yaml),
    ("GET", (*_MODEL, "revision", "*"), _Hub.info),
    ("GET", (*_MODEL, "tree", "*", "**"), _Hub.tree),
    ("POST", (*_MODEL, "paths-info", "*"), _Hub.paths_info),
    ("GET", (*_MODEL, "refs"), _Hub.refs),
    ("GET", (*_MODEL, "auth-check"), _Hub.auth_check),
    ("GET", (*_MODEL, "auth-check", "write"), _Hub.auth_check),
    ("POST", (*_MODEL, "branch", "*"), _Hub.branch),
    ("POST", (*_MODEL, "preupload", "*"), _Hub.preupload),
    ("POST", (*_MODEL, "commit", "*"), _Hub.commit),
    ("GET", _MODEL, _Hub.info),
    ("POST", ("*", ".git", "info", "lfs", "objects", "batch"), _Hub.batch),
    ("POST", ("*", ".git", "info", "lfs", "objects", "verify"), _Hub.verify),
    ("GET", ("*", "*", "resolve", "*", "**"), _Hub.resolve),
)


def _fits(pattern: tuple[str, ...], parts: list[str]) -> bool:
    """Whether a path has this form: `*` is any name, `.git` one that ends so, `**` whatever follows."""
    if pattern[-1] == "**":
        pattern, parts = pattern[:-1], parts[: len(pattern) - 1]
    return len(pattern) == len(parts) and all(
        want in ("*", part) or (want == ".git" and part.endswith(want))
        for want, part in zip(pattern, parts, strict=True)
    )


def _files_of(root: Path) -> dict[str, File]:
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                relative = path.relative_to(root).as_posix()
                found[relative] = File(path, path.stat().st_size, name.endswith(".safetensors"))
    return found


def _tree(files: Iterable[str], below: str, recursive: bool) -> list[str]:
    """Names of files and folders below a folder."""
    prefix = f"{below}/" if below else ""
    found = set()
    for name in files:
        if name.startswith(prefix):
            inner = name.removeprefix(prefix).split("/")
            found |= {prefix + "/".join(inner[:depth]) for depth in range(1, len(inner) + 1 if recursive else 2)}
    return sorted(found)


def _range_of(header: str | None, nbytes: int) -> tuple[int, int] | None:
    """First byte and the one after the last that a Range header asks for; None for the whole file."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not found or found.group(0) == "bytes=-":
        return None
    first, last = found.groups()
    if not first:
        return max(nbytes - int(last), 0), nbytes
    return int(first), min(int(last) + 1, nbytes) if last else nbytes


def _signature(path: str, expires: str) -> str:
    return hmac.new(_KEY, f"{path}?{expires}".encode(), "sha256").hexdigest()


def _main() -> None:
    parser = argparse.ArgumentParser(description="Serve a directory as a repository of a model hub.")
    parser.add_argument("folder")
    parser.add_argument("name", help="owner/name")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--counts", help="a file that tells at the end what was asked and sent")
    parser.add_argument("--faults", metavar="SEED,RATE,COUNT", help="faults at random, of the kinds that pass by")
    args = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with HubServer(port=args.port) as server:
        commit = server.add_repo(args.name, args.folder)
        if args.faults:
            seed, rate, count = args.faults.split(",")
            kinds = ("drop", "429", "500", "503", "short", "expired", "no_range")
            server.random_faults(int(seed), float(rate), kinds, int(count))
        print(server.endpoint, commit, flush=True)
        stopped.wait()
        if args.counts:
            Path(args.counts).write_text(json.dumps(server.counts(), indent=1) + "\n")


if __name__ == "__main__":
    _main()
