"""The page and its data over HTTP: for the person who started the command, and for nobody else."""

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal
from urllib.parse import unquote

import numpy as np
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..apis.predictor import Undecodable
from ..datasets.checks import LabelError
from .album import MOST_PIXELS, Album, Busy
from .labels import VOID, LabelFiles

MOST_BYTES = 2**26  # of a dropped file
HEADERS = {
    'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
    'Cache-Control': 'no-store',
}


class AsciiJSON(JSONResponse):
    """JSON that can hold the names of all files: those that are not valid text have no UTF-8."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, separators=(',', ':')).encode()


class OwnPageOnly:
    """Refuses requests that another site makes, or made under a name of its own (DNS rebinding); adds ``HEADERS``."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message['type'] == 'http.response.start':
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = _why_foreign(scope) if scope['type'] == 'http' else None
        app = JSONResponse(dict(detail=problem), 403) if problem else self.app
        await app(scope, receive, send_with_headers)


def _why_foreign(scope: Scope) -> str | None:
    headers = Headers(scope=scope)
    host = headers.get('host', '')
    if host.partition(':')[0] not in ('127.0.0.1', 'localhost'):
        return f'this server answers to 127.0.0.1 and localhost, not to {host!r}'
    if headers.get('origin', f'http://{host}') != f'http://{host}':
        return 'requests from other pages are refused'
    # A link to the page itself, which holds no data, may be anywhere.
    if headers.get('sec-fetch-site', 'none') not in ('none', 'same-origin') and scope['path'] != '/':
        return 'requests from other sites are refused'
    return None


def make_app(album: Album, files: LabelFiles, title: str, token: str) -> FastAPI:
    """Build the server; each request for data must send ``token`` as ``X-Token``."""

    def with_token(x_token: Annotated[str, Header()] = '') -> None:
        if not secrets.compare_digest(x_token.encode(), token.encode()):
            raise HTTPException(401, 'open the whole address that the command printed: it holds a token')

    def known(number: int) -> int:
        if number not in album.entries:
            raise HTTPException(404, f'there is no picture {number}')
        return number

    def size_of(number: int) -> tuple[int, int]:
        return album.entries[number].size or album.result(number).size

    Number = Annotated[int, Depends(known)]
    api = APIRouter(prefix='/api', dependencies=[Depends(with_token)])

    @api.get('/album')
    def get_album() -> dict:
        entries = [album.entries[i] for i in range(album.count)]
        pictures = [(entry.name, place.is_file()) for entry, place in zip(entries, files.places, strict=True)]
        model = dict(classes=album.predictor.classes, palette=album.predictor.palette, void=VOID)
        return dict(model, title=title, pictures=pictures, mostBytes=MOST_BYTES)

    @api.get('/ranked')
    def get_ranked(since: Annotated[int, Query(ge=0)]) -> list[tuple[int, float | None, str | None]]:
        entries = [(i, album.entries[i]) for i in album.ranked[since:]]
        return [(i, entry.confidence, entry.problem) for i, entry in entries]

    @api.post('/pictures')
    async def drop(request: Request, x_name: Annotated[str, Header()] = 'picture') -> dict:
        content = await _body(request, MOST_BYTES)
        try:
            return dict(number=await run_in_threadpool(album.drop, content, unquote(x_name)[:200]))
        except OSError as error:
            raise HTTPException(507, f'the picture could not be stored ({error.strerror})') from None

    @api.get('/pictures/{number}')
    def describe(number: Number) -> dict:
        height, width = size_of(number)
        saved = number < album.count and files.places[number].is_file()
        name = album.entries[number].name
        return dict(name=name, width=width, height=height, truth=number in files.truth, saved=saved)

    @api.get('/pictures/{number}/view')
    def view(
        number: Number,
        left: Annotated[int, Query(ge=0)] = 0,
        top: Annotated[int, Query(ge=0)] = 0,
        width: Annotated[int, Query(ge=1)] = MOST_PIXELS,
        height: Annotated[int, Query(ge=1)] = MOST_PIXELS,
    ) -> Response:
        return Response(album.view(number, left, top, width, height), media_type='image/jpeg')

    @api.get('/pictures/{number}/{plane}')
    def get_plane(number: Number, plane: Literal['labels', 'confidence', 'truth', 'saved']) -> Response:
        if plane in ('labels', 'confidence'):
            content, version = getattr(album.result(number), plane), ''
        elif found := files.read(number, plane, size_of(number)):
            content, version = found
        else:
            raise HTTPException(404, f'picture {number} has no such labels')
        headers = {'Content-Encoding': 'deflate', 'X-Version': version}
        return Response(content, headers=headers, media_type='application/octet-stream')

    @api.put('/pictures/{number}/saved')
    async def save(number: Number, request: Request, x_version: Annotated[str, Header()]) -> dict:
        if number >= album.count:
            raise HTTPException(409, 'a dropped picture is not in the folder, so its labels are not saved')
        height, width = size = await run_in_threadpool(size_of, number)
        content = await _body(request, height * width)
        if len(content) != height * width:
            raise HTTPException(422, f'{len(content)} ids for {width} x {height} pixels')
        return await run_in_threadpool(write, number, np.frombuffer(content, np.uint8).reshape(size), x_version)

    def write(number: int, ids: np.ndarray, expected: str) -> dict:
        if problem := files.form.why_not(ids):
            raise HTTPException(422, problem)
        try:
            version = files.write(number, ids, expected)
        except OSError as error:
            raise HTTPException(507, f'the labels could not be saved ({error.strerror})') from None
        if version is None:
            raise HTTPException(412, 'these labels were saved elsewhere since this page loaded them')
        return dict(version=version, file=files.places[number].name)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        album.start()
        yield
        await run_in_threadpool(album.close)

    app = FastAPI(lifespan=running, default_response_class=AsciiJSON, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(api)
    app.mount('/', StaticFiles(directory=Path(__file__).parent / 'page', html=True))
    app.add_middleware(OwnPageOnly)
    for kind, status, sentence in (
        (Undecodable, 422, str),
        (LabelError, 422, lambda error: error.args[0]),  # without the path
        (Busy, 503, lambda _: 'the model is busy; try again'),
        (ClientDisconnect, 400, lambda _: 'the request ended early'),
    ):
        app.exception_handler(kind)(lambda _, error, s=status, w=sentence: AsciiJSON(dict(detail=w(error)), s))
    return app


class Server(uvicorn.Server):
    """A server that stops the model as soon as it is told to end, and finishes the requests that have begun."""

    def __init__(self, app: FastAPI, album: Album):
        super().__init__(uvicorn.Config(app, log_level='warning', access_log=False, server_header=False, ws='none'))
        self._album = album

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._album.end()
        super().handle_exit(sig, frame)


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            ended = {'Connection': 'close'}  # or the rest would be read, too
            raise HTTPException(413, f'the request holds more than {most} bytes', ended)
    return bytes(body)
