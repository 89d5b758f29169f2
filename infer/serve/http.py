"""Serves a model through OpenAI's HTTP API, with continuous batching. The routes use starlette, and uvicorn listens on
the loopback interface.

The batcher runs in its own thread and passes each token to the event loop. There are limits on the number of clients,
on the size of a request, and on the time to send and receive data. When a client disconnects, its requests are
canceled. After a signal, the server finishes the current answers and exits.
"""

import asyncio
import contextlib
import functools
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UserError
from common.loopback import BACKLOG
from infer.embed import Embedder
from infer.serve import Refused, api, embeddings, messages
from infer.serve.batcher import Batcher, Full, Item
from infer.serve.connection import Connection

BODY = 1 << 20  # maximum bytes of a request
KEEP_ALIVE = 60  # seconds that an idle connection stays open, longer than clients' own timeouts
DRAIN = 60  # seconds in which the server may finish its answers after a signal
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/health", "/metrics")
Embedders = Mapping[str, Embedder]


def make(batcher: Batcher, name: str, embedders: Embedders | None = None) -> uvicorn.Server:
    """Makes a server whose base model is called `name`. `embedders` maps names to the models for /v1/embeddings."""
    options = dict(http=Connection, ws="none", lifespan="off", log_level="error", access_log=False, server_header=False)
    limits = dict(backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=DRAIN)
    return uvicorn.Server(uvicorn.Config(application(batcher, name, embedders), **options, **limits))


def run(server: uvicorn.Server, batcher: Batcher, listening: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, finishes the current requests, and returns. Raises the error that stopped the
    batcher, if any."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            batcher.run()
        except BaseException as e:
            errors.append(e)
        server.should_exit = True

    if threading.current_thread() is threading.main_thread():
        # uvicorn replaces these handlers while it runs, and afterwards raises the received signals again.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    worker = threading.Thread(target=work)
    worker.start()
    try:
        server.run(sockets=[listening])
    finally:
        batcher.close()
        worker.join()
    if errors:
        raise errors[0]


def application(batcher: Batcher, name: str, embedders: Embedders | None = None) -> Starlette:
    """Makes the application that handles HTTP requests. `name` is the name of the base model. Adapters and embedders
    have their own names."""
    service = Service(batcher, name, embedders or {})
    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/embeddings", service.embed, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.model),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    handlers = {Refused: refuse, HTTPException: no_route, UserError: user_error, Exception: broken}
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Guard, meters=service.meters)])


class Meters:
    """The metrics that the server shows at /metrics."""

    def __init__(self, batcher: Batcher):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("kungfu_requests", "HTTP requests answered", ["path", "status"], registry=r)
        self.tokens = Counter("kungfu_tokens", "Tokens in prompts and in answers", ["kind"], registry=r)
        self.seconds = Histogram("kungfu_request_seconds", "Seconds until an answer is complete", ["path"], registry=r)
        self.first = Histogram("kungfu_first_token_seconds", "Seconds from the request to its first token", registry=r)
        waiting = Gauge("kungfu_requests_waiting", "Answers waiting for a row of the batch", registry=r)
        waiting.set_function(lambda: len(batcher.waiting))
        running = Gauge("kungfu_requests_running", "Rows of the batch in use", registry=r)
        running.set_function(lambda: sum(row is not None for row in batcher.rows))


class Service:
    """The HTTP endpoints of one batcher."""

    def __init__(self, batcher: Batcher, name: str, embedders: Embedders):
        self.batcher, self.name, self.meters, self.embedders = batcher, name, Meters(batcher), embedders
        self.created = int(time.time())

    @property
    def names(self) -> list[str]:
        return [self.name, *self.batcher.names, *self.embedders]

    async def chat(self, request: Request) -> "Reply":
        return await self.reply(request, chat=True)

    async def complete(self, request: Request) -> "Reply":
        return await self.reply(request, chat=False)

    async def embed(self, request: Request) -> Response:
        content = api.object_of(await body_of(request))
        response = await run_in_threadpool(embeddings.answer, content, self.embedders)
        self.meters.tokens.labels("prompt").inc(response["usage"]["prompt_tokens"])
        return JSONResponse(response)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.card(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.names:
            raise Refused(
                404, f"no model {name[:80]!r}; available: {', '.join(self.names)}", "model", "model_not_found"
            )
        return JSONResponse(self.card(name))

    def card(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "local"}

    async def health(self, _: Request) -> Response:
        if self.batcher.closed:
            raise Refused(503, "the server is closing")
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.meters.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def reply(self, request: Request, chat: bool) -> "Reply":
        begin = time.perf_counter()
        asked = api.read(await body_of(request), chat, [self.name, *self.batcher.names])
        inbox: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        put = functools.partial(_post, asyncio.get_running_loop(), inbox)
        choices = await run_in_threadpool(self.submit, asked, put)
        return Reply(asked, choices, inbox, self.meters, begin)

    def submit(self, asked: api.Asked, put: Callable[[int, Item], None]) -> list[api.Choice]:
        """Queues all answers that a request asks for, or none of them. Raises Refused or UserError if an answer cannot
        be queued."""
        adapter = None if asked.model == self.name else asked.model
        lm, choices = self.batcher.lm.speaking(adapter), []
        try:
            for prompt in asked.prompts:
                ids = messages.encode(lm, prompt) if asked.chat else api.ids(lm, prompt)
                room = self.batcher.length - len(ids)
                if room < 1:
                    what = f"the prompt has {len(ids)} tokens; prompt and answer share {self.batcher.length} tokens"
                    raise Refused(400, what, "messages" if asked.chat else "prompt", "context_length_exceeded")
                for choice in range(asked.n):
                    request = self.batcher.submit(
                        ids, adapter=adapter, max_new_tokens=min(asked.max_tokens or room, room), knobs=asked.knobs,
                        seed=api.seed(asked.seed, choice), top=asked.top, put=functools.partial(put, len(choices)),
                    )  # fmt: skip
                    choices.append(api.Choice(lm, request, asked.stop))
        except BaseException as e:
            for choice in choices:
                choice.request.cancelled = True
            if isinstance(e, Full):
                code = None if self.batcher.closed else "rate_limit_exceeded"
                raise Refused(429 if code else 503, str(e), code=code) from None
            raise
        return choices


def _post(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue, i: int, item: Item) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop has ended, so nobody waits for this item
        loop.call_soon_threadsafe(inbox.put_nowait, (i, item))


class Reply:
    """The response to a queued request, sent as one object or as server-sent events."""

    def __init__(
        self, asked: api.Asked, choices: list[api.Choice], inbox: asyncio.Queue[tuple[int, Item]], meters: Meters,
        begin: float,
    ):  # fmt: skip
        self.asked, self.choices, self.inbox, self.meters, self.begin = asked, choices, inbox, meters, begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self.watch(receive))
        try:
            if self.asked.stream:
                await self.stream(send)
            else:
                while not self.ended:
                    await self.advance()
                await JSONResponse(api.whole(self.asked, self.choices))(scope, receive, send)
        finally:
            watcher.cancel()
            self.cancel()
            for kind, number in api.usage(self.choices, self.asked.n).items():
                if kind != "total_tokens":
                    self.meters.tokens.labels(kind.removesuffix("_tokens")).inc(number)

    @property
    def ended(self) -> bool:
        return all(choice.finish for choice in self.choices)

    async def watch(self, receive: Receive) -> None:
        """Cancels the requests when the client disconnects."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def cancel(self) -> None:
        for choice in self.choices:
            choice.request.cancelled = True

    async def advance(self) -> list[int]:
        """Waits for tokens, adds all available tokens to their choices, and returns the indices of the choices that
        have changed. Raises Refused if an error ended an answer."""
        moved: dict[int, None] = {}
        while not moved or not self.inbox.empty():
            i, item = await self.inbox.get()
            if isinstance(item, BaseException):
                raise Refused(503 if isinstance(item, Full) else 500, str(item) or type(item).__name__)
            if self.begin and item is not None:
                self.meters.first.observe(time.perf_counter() - self.begin)
                self.begin = 0.0
            self.choices[i].add(item)
            moved[i] = None
        return list(moved)

    async def stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        start = api.head(self.asked) | ({"usage": None} if self.asked.usage else {})

        async def events(contents: list[dict], last: bytes | None = None) -> None:
            data = b"".join(b"data: %b\n\n" % json.dumps(content).encode() for content in contents)
            await send({"type": "http.response.body", "body": data + (last or b""), "more_body": last is None})

        if self.asked.chat:
            role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            await events([start | {"choices": [{"index": i, **role}]} for i in range(len(self.choices))])
        try:
            open_ = set(range(len(self.choices)))
            while open_:
                moved = [i for i in await self.advance() if i in open_]
                parts = [part for i in moved for part in api.chunks(self.asked, i, self.choices[i])]
                open_ -= {i for i in moved if self.choices[i].finish}
                if parts:
                    await events([start | {"choices": [part]} for part in parts])
        except Refused as e:  # the HTTP status was sent already, so the error becomes an event
            return await events([e.content], b"")
        total = {"choices": [], "usage": api.usage(self.choices, self.asked.n)}
        await events([start | total] if self.asked.usage else [], b"data: [DONE]\n\n")


async def body_of(request: Request) -> bytes:
    """Reads the body of a request. Raises Refused if the body is too large, or if its type is not JSON."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send Content-Type: application/json")  # web pages of other sites cannot send this type
    too_large = Refused(413, f"a request can have at most {BODY} bytes")
    if int(request.headers.get("Content-Length", 0)) > BODY:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise too_large
    return bytes(body)


class Guard:
    """Refuses requests whose Host header does not name this machine. Counts and times all requests."""

    def __init__(self, app: ASGIApp, meters: Meters):
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin, status = time.perf_counter(), 499  # 499: the client disconnected before any answer was sent

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        host = next((value for key, value in scope["headers"] if key == b"host"), b"")
        path = next((p for p in PATHS if scope["path"] == p or scope["path"].startswith(f"{p}/")), "other")
        try:
            # A page of another website can reach this port through the user's browser, but then the Host header names
            # that website.
            if host.partition(b":")[0] not in (b"127.0.0.1", b"localhost"):
                await error_response(Refused(403, "the Host header does not name this machine"))(
                    scope, receive, counted
                )
            else:
                await self.app(scope, receive, counted)
        except ClientDisconnect:
            pass  # the client disconnected before its request was complete, so nobody waits for an answer
        except Exception:
            status = 500
            raise
        finally:
            self.meters.requests.labels(path, status).inc()
            self.meters.seconds.labels(path).observe(time.perf_counter() - begin)


def error_response(e: Refused) -> Response:
    return JSONResponse(e.content, e.status, {"Retry-After": "1"} if e.status in (429, 503) else None)


async def refuse(_: Request, e: Refused) -> Response:
    return error_response(e)


async def no_route(request: Request, e: HTTPException) -> Response:
    return error_response(Refused(e.status_code, f"no {request.method} {request.url.path[:80]}", code="not_found"))


async def user_error(_: Request, e: UserError) -> Response:
    return error_response(Refused(400, str(e)))


async def broken(_: Request, e: Exception) -> Response:
    return error_response(Refused(500, f"the server failed: {type(e).__name__}"))
