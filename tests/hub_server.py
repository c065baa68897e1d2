"""A stand-in for the Hugging Face hub: the routes with which huggingface_hub creates, fills and downloads models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = 'hf_stand_in'
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by hash in order, the hashes of branches and tags, and whether it is private."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, message: str = '') -> str:
        """Add a commit on main with these files and those of the last one."""
        whole = {**self.commits.get(self.refs.get('main', ''), {}), **files}
        oid = hashlib.sha1(json.dumps([len(self.commits), sorted(whole)]).encode()).hexdigest()
        self.commits[oid] = whole
        self.messages.append(message)
        self.refs['main'] = oid
        return oid


@dataclass
class Hub:
    """What the hub stores, and how it misbehaves."""

    url: str = ''
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)  # large files by SHA-256
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    dropped_after: list[int] = field(default_factory=list)  # bytes of the next downloads before the connection ends
    answers: dict[str, int] = field(default_factory=dict)  # statuses by a part of the path
    sizes: dict[str, int] = field(default_factory=dict)  # false sizes by file name

    def downloads(self, name: str) -> list[dict[str, str]]:
        """Headers of the requests for the content of a file."""
        return [headers for method, path, headers in self.requests if method == 'GET' and path.endswith(f'/{name}')]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        path = self.path.partition('?')[0]
        self.hub.requests.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        body = self._body()
        for part, status in self.hub.answers.items():
            if part in path:
                return self._send(status, {'error': 'as asked for'})
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                return method(self, body, *match.groups())
        return self._send(404, {'error': f'no route {path}'})

    def _body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def _send(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        if 'Content_Length' not in headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _is_known(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def _refuses(self) -> bool:
        """Whether a request that needs a token has none or a wrong one, which is then answered."""
        if self._is_known():
            return False
        self._send(401, {'error': 'Invalid credentials'}, X_Error_Message='Invalid credentials in Authorization header')
        return True

    def _create(self, body: bytes) -> None:
        if self._refuses():
            return
        asked = json.loads(body)
        if asked['organization'] == 'others':
            return self._send(403, {'error': "you don't have the rights to create a model under this namespace"})
        name = f'{asked["organization"]}/{asked["name"]}'
        if name in self.hub.repositories:
            return self._send(409, {'error': 'You already created this model repo', 'url': f'{self.hub.url}/{name}'})
        self.hub.repositories[name] = Repository(asked.get('visibility') == 'private')
        return self._send(200, {'url': f'{self.hub.url}/{name}', 'name': name})

    def _validate(self, body: bytes) -> None:
        text = json.loads(body)['content']
        errors = [] if text.startswith('---\n') else [{'message': 'no metadata'}]
        self._send(400 if errors else 200, {'errors': errors, 'warnings': []})

    def _preupload(self, body: bytes, name: str) -> None:
        if self._refuses():
            return
        files = [
            dict(path=file['path'], uploadMode='lfs' if file['path'].endswith('.safetensors') else 'regular')
            for file in json.loads(body)['files']
        ]
        self._send(200, {'files': [file | {'shouldIgnore': False} for file in files]})

    def _batch(self, body: bytes, name: str) -> None:
        if self._refuses():
            return
        objects = []
        for asked in json.loads(body)['objects']:
            action = {'upload': {'href': f'{self.hub.url}/store/{asked["oid"]}', 'header': {}}}
            objects.append(dict(asked, **({} if asked['oid'] in self.hub.objects else {'actions': action})))
        self._send(200, {'transfer': 'basic', 'objects': objects})

    def _store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._send(200)

    def _commit(self, body: bytes, name: str) -> None:
        if self._refuses():
            return
        files, message = {}, ''
        for line in body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                message = value['summary']
            elif item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            else:
                files[value['path']] = self.hub.objects[value['oid']]
        oid = self.hub.repositories[name].commit(files, message)
        self._send(200, {'commitUrl': f'{self.hub.url}/{name}/commit/{oid}', 'commitOid': oid, 'hookOutput': ''})

    def _resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._is_known()):
            return self._send(401, {}, X_Error_Code='RepoNotFound', X_Error_Message='Repository not found')
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            return self._send(404, {}, X_Error_Code='RevisionNotFound', X_Error_Message='Invalid rev id')
        content = repository.commits[oid].get(file)
        if content is None:
            return self._send(404, {}, X_Error_Code='EntryNotFound', X_Repo_Commit=oid, X_Error_Message='no such entry')
        start = int(re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', 'bytes=0-'))[1])
        whole, content = len(content), content[start:]
        headers = dict(
            X_Repo_Commit=oid,
            ETag=f'"{hashlib.sha256(content).hexdigest()}"',
            Content_Length=str(self.hub.sizes.get(file, len(content))),
            Content_Range=f'bytes {start}-{whole - 1}/{whole}',
        )
        if self.command == 'GET' and self.hub.dropped_after:
            content = content[: self.hub.dropped_after.pop(0)]
            self.close_connection = True
        return self._send(206 if start else 200, content, **headers)


ROUTES = [
    (r'/api/repos/create', _Handler._create),
    (r'/api/validate-yaml', _Handler._validate),
    (r'/api/models/([^/]+/[^/]+)/preupload/main', _Handler._preupload),
    (r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', _Handler._batch),
    (r'/store/([0-9a-f]+)', _Handler._store),
    (r'/api/models/([^/]+/[^/]+)/commit/main', _Handler._commit),
    (r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', _Handler._resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a new hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': hub}))
    server.daemon_threads = True
    hub.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
