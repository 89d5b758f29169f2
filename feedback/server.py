"""Serves the feedback page with starlette. Every request is checked for its host, its origin and a person's secret
link."""

import functools
import itertools
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
import uvicorn
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UserError
from common.loopback import BACKLOG
from common.types import Json
from feedback import overview, votes
from feedback.items import LETTERS, SCALE, Item
from feedback.queue import Queue
from feedback.store import OWNER, Stale, Store
from feedback.votes import REASON

BODY = 32 << 20  # maximum size of a request, in bytes; it may contain four edited answers
CLIENTS = 512
PAGES = Path(__file__).parent / "pages"
STATIC = {"page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Characters that are invisible, or that change how the characters around them are displayed. Zero-width joiners are not
# included, because some scripts and emoji need them.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
MARKED = 2000  # this many of these characters per text get an HTML element each; the others are marked in plain text
PART = 8000  # maximum length of each part of a long text, in characters


def serve(app: Starlette) -> uvicorn.Server:
    options = dict(ws="none", lifespan="off", log_level="error", access_log=False, server_header=False)
    limits = dict(backlog=BACKLOG, limit_concurrency=CLIENTS, timeout_graceful_shutdown=5)
    return uvicorn.Server(uvicorn.Config(app, **options, **limits))  # type: ignore[arg-type]


def application(store: Store, port: int, base: str = "", wanted: int = 0) -> Starlette:
    """Returns the web application. `base` is the public address of a proxy in front of this server. `wanted` is the
    number of votes per item; 0 means that everybody votes on every item."""
    service = Service(store, Queue(store, wanted))
    page, act = service.page, service.act
    routes = [
        Route("/static/{name}", static),
        Route("/{token}/", page(service.task)),
        Route("/{token}/settle", page(service.settle)),
        Route("/{token}/me", page(service.me)),
        Route("/{token}/people/{name}", page(service.person)),
        Route("/{token}/answer", page(service.answer)),
        Route("/{token}/vote", act(service.vote), methods=["POST"]),
        Route("/{token}/undo", act(service.undo), methods=["POST"]),
        Route("/{token}/draft", act(service.draft), methods=["POST"]),
    ]
    origins = {f"http://{host}:{port}" for host in ("127.0.0.1", "localhost")} | ({base} if base else set())
    app = Starlette(routes=routes, middleware=[Middleware(Guard, origins=origins)])
    app.router.redirect_slashes = False
    return app


class Guard:
    """Refuses requests with a host name that is not this server's, and POST requests from pages of other sites. Adds
    HEADERS to all responses."""

    def __init__(self, app: ASGIApp, origins: set[str]):
        self.app = app
        parts = [urlsplit(origin) for origin in origins]
        self.origins = {f"{part.scheme}://{part.netloc}".encode() for part in parts}
        self.hosts = {part.netloc.encode() for part in parts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = dict(scope["headers"])
        refused = ""
        if headers.get(b"host") not in self.hosts:
            refused = "the host name of the request is not this server's"
        elif scope["method"] not in ("GET", "HEAD") and headers.get(b"origin") not in self.origins:
            refused = "the request comes from a page of another site"
        answer = PlainTextResponse(refused, 403) if refused else self.app
        await answer(scope, receive, headed)


class Service:
    """Serves each person's pages and handles their actions. The owner sees statistics about all people, and resolves
    disagreements."""

    def __init__(self, store: Store, queue: Queue):
        self.store, self.queue = store, queue
        self.pages = jinja2.Environment(
            loader=jinja2.FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        self.pages.filters |= {"shown": shown}

    def who(self, request: Request) -> str:
        name = self.store.person(request.path_params["token"])
        if name is None:
            raise HTTPException(404, "no such page: open your personal link")
        return name

    def page(self, make: Callable[[str, Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(lambda: make(self.who(request), request))

        return endpoint

    def act(self, make: Callable[[str, Item, Json], Json]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
                raise HTTPException(415, "send Content-Type: application/json")
            body = await body_of(request)
            return await run_in_threadpool(self._done, make, request, body)

        return endpoint

    def _done(self, make: Callable[[str, Item, Json], Json], request: Request, body: bytes) -> Response:
        name = self.who(request)
        try:
            given = votes.parse(body)
            item = self.item(given.get("item"))
            if type(given.get("version")) is not int:
                raise UserError("version is not a whole number")
            return JSONResponse(make(name, item, given))
        except UserError as e:
            raise HTTPException(400, str(e)) from None
        except Stale:
            raise HTTPException(409, "you have already decided on this item, perhaps in another tab") from None

    def item(self, name: object) -> Item:
        if not isinstance(name, str) or name not in self.store.items:
            raise HTTPException(404, "no such item")
        return self.store.items[name]

    def render(self, template: str, depth: int = 1, **values: Any) -> Response:
        return HTMLResponse(self.pages.get_template(template).render(root="../" * depth, **values))

    # --- pages ---

    def task(self, name: str, request: Request) -> Response:
        """Shows the annotator's next item, or the item given by the query parameter `item`. The owner gets the overview
        instead."""
        if name == OWNER:
            return self.render("overview.html.j2", **overview.everybody(self.store))
        asked = request.query_params.get("item")
        item = self.item(asked) if asked else self.queue.take(name)
        if item and self.store.state.decision(name, item.hash):
            item = self.queue.take(name)
        return self.ask(name, item, "vote")

    def settle(self, name: str, request: Request) -> Response:
        """Shows the owner the next disagreement to resolve."""
        if name != OWNER:
            raise HTTPException(404, "only the owner can resolve disagreements")
        left = self.queue.disputed()
        asked = request.query_params.get("item")
        return self.ask(name, self.item(asked) if asked in left else next(map(self.item, left), None), "resolve")

    def ask(self, name: str, item: Item | None, kind: str) -> Response:
        state, guidelines = self.store.state, self.store.guidelines()
        last = state.newest.get(name)
        at = votes.shown(name, item) if item else []
        others = state.votes.get(item.hash, {}).values() if item and kind == "resolve" else ()
        done, total = self.queue.progress(name) if kind == "vote" else (len(state.resolved), None)
        read = {event.content["guidelines"] for event in state.of(name)}
        return self.render(
            "task.html.j2", name=name, kind=kind, item=item, done=done, total=total, letters=LETTERS, scale=SCALE,
            answers=[item.texts[i] for i in at] if item else [],
            version=state.versions.get((name, item.hash), 0) if item else 0,
            draft=self.store.draft(name, item.hash) if item else None,
            guidelines=guidelines, unread=bool(guidelines) and guidelines[0].version not in read,
            last=self.result(name, last) if last else None,
            others=[overview.sentence(event, at) for event in others],
        )  # fmt: skip

    def result(self, name: str, event: Any) -> Json:
        """Returns the person's newest decision, which can still be undone, and the judge's ranks for the same
        answers."""
        judge = self.store.items[event.item].judge
        at = event.content["order"]
        agrees = bool(judge) and overview.agree(event, judge["ranks"])
        view = overview.spelled([judge["ranks"][i] for i in at]) if judge else ""
        return {
            "item": event.item, "version": event.version + 1, "mine": overview.sentence(event, at),
            "judge": judge and {
                "model": judge.get("model", "the judge")[:100], "why": judge.get("why", "")[:REASON], "view": view,
                "agrees": agrees,
            },
        }  # fmt: skip

    def me(self, name: str, request: Request) -> Response:
        return self.render("person.html.j2", whole=False, **overview.person(self.store, name))

    def person(self, name: str, request: Request) -> Response:
        who = request.path_params["name"]
        if name != OWNER or who not in self.store.people():
            raise HTTPException(404, "no such page")
        return self.render("person.html.j2", depth=2, whole=True, **overview.person(self.store, who))

    def answer(self, name: str, request: Request) -> Response:
        """Returns the original text of an answer that a person is about to edit."""
        item, place = self.item(request.query_params.get("item")), request.query_params.get("place", "")
        at = votes.shown(name, item)
        if place not in map(str, range(len(at))):
            raise HTTPException(404, "no such answer")
        return PlainTextResponse(item.texts[at[int(place)]])

    # --- decisions ---

    def vote(self, name: str, item: Item, given: Json) -> Json:
        newest = next((g.version for g in self.store.guidelines()), 0)
        content = votes.decision(given, item, votes.shown(name, item), newest)
        content["informed"] = bool(given["version"] and item.judge)
        self.store.append("resolve" if name == OWNER else "vote", name, item.hash, given["version"], content)
        return {}

    def undo(self, name: str, item: Item, given: Json) -> Json:
        event = self.store.state.decision(name, item.hash)
        self.store.append("undo", name, item.hash, given["version"], {"key": str(given.get("key", ""))[:64]})
        if event:
            self.store.keep(name, item.hash, votes.undone(event.content))
        return {}

    def draft(self, name: str, item: Item, given: Json) -> Json:
        """Saves a draft. Raises Stale if the person has decided on the item in the meantime."""
        if self.store.state.versions.get((name, item.hash), 0) != given["version"]:
            raise Stale
        self.store.keep(name, item.hash, given)
        return {}


async def static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        raise HTTPException(404, "no such file")
    return Response(_file(name), media_type=STATIC[name])


@functools.cache
def _file(name: str) -> bytes:
    return (PAGES / name).read_bytes()


async def body_of(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise HTTPException(413, f"the request is larger than {BODY} bytes")
    return bytes(body)


def shown(text: str) -> Markup:
    """Returns a text as HTML, with a visible mark in place of each character that is invisible or that reorders other
    characters.

    A long text is divided into parts, and each part becomes a separate element, so the browser computes the layout of
    visible parts only.
    """
    parts = list(cut(text.replace("\r\n", "\n")))
    if len(parts) < 2:
        return Markup("").join(marked(part, MARKED) for part in parts)
    return Markup("").join(Markup('<div class="part">{}</div>').format(marked(part, MARKED // 20)) for part in parts)


def cut(text: str) -> Iterator[str]:
    """Splits a text into parts of at most PART characters, at the end of a line or a word if possible."""
    start = 0
    while len(text) - start > PART:
        ends = (text.rfind(space, start, start + PART) + 1 for space in "\n ")
        end = next((end for end in ends if end > start), start + PART)
        yield text[start:end]
        start = end
    yield text[start:]


def marked(text: str, most: int) -> Markup:
    out, end = [], 0
    for match in itertools.islice(UNSEEN.finditer(text), most):
        out += [text[end : match.start()], Markup('<span class="unseen">{}</span>').format(code(match))]
        end = match.end()
    return Markup("").join([*out, UNSEEN.sub(lambda match: f"‹{code(match)}›", text[end:])])


def code(match: re.Match) -> str:
    return f"U+{ord(match[0]):04X}"
