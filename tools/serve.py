"""Serve a model and adapters of it over HTTP, on this machine alone, in OpenAI's format for chats.

    python -m tools.serve MODEL [--adapters=[NAME=]FOLDER,...] [--port=8000] [--rows=8] [--length=1024]

    curl -N http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "MODEL", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'

`model` is MODEL or the name of an adapter (a folder's last part, unless NAME= gives another). Requests share one batch
of --rows rows, which they join and leave at any step; --length bounds a prompt with its answer, in tokens. An answer is
what infer.generate samples with the same knobs and seed. Ctrl-C ends it.
"""

import argparse
import contextlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from common.errors import UserError
from tools.chat import named

BODY = 1 << 20  # bytes of a request
PATIENCE = 30  # seconds that a client may take to send or to read
# Fields of a request: type, default, least and most. Others must be unset: they would change the answer.
FIELDS = {
    "max_tokens": (int, None, 1, 1 << 20), "max_completion_tokens": (int, None, 1, 1 << 20), "n": (int, 1, 1, 1),
    "temperature": (float, 1.0, 0, 100), "top_p": (float, 1.0, 1e-6, 1), "top_k": (int, 0, 0, 1 << 30),
    "min_p": (float, 0.0, 0, 1), "seed": (int, 0, -(1 << 31), (1 << 31) - 1), "stream": (bool, False, 0, 1),
}  # fmt: skip
KNOWN = {"model", "messages", "stop", "user", "metadata", "store", "stream_options"}


class Refused(Exception):
    """A request that is not answered: an HTTP status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Asked(NamedTuple):
    """A request, read."""

    model: str
    messages: list[dict]
    stop: list[str]
    options: dict[str, Any]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.serve", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model")
    parser.add_argument("--adapters", default="", help="run or PEFT folders, with commas between them")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--rows", type=int, default=8, help="answers at a time")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt and its answer")
    args = parser.parse_args(argv)
    try:
        if min(args.rows, args.length) < 1:
            raise UserError("must be at least 1", "--rows and --length")
        if not 0 <= args.port < 1 << 16:
            raise UserError(f"{args.port} is no port", "--port", "0 to 65535")
        folders = named(args.adapters)
        from infer.models import load, load_many
        from infer.serve.batcher import Batcher

        try:
            server = Server(args.port, args.model)  # before the model is read: the port may be taken
        except OSError as e:
            raise UserError(e.strerror or str(e), f"port {args.port}", "choose another --port") from None
        with server:
            lm = load_many(args.model, folders) if folders else load(args.model)
            if args.model in folders:
                raise UserError(f"{args.model!r} is the model's own name", "--adapters", "NAME=FOLDER")
            serve(server, Batcher(lm, args.rows, args.length))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def serve(server: "Server", batcher: Any) -> None:
    """Answers until the batcher ends or Ctrl-C is pressed."""
    server.batcher = batcher
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ", ".join([server.model, *batcher.names])
    print(f"http://127.0.0.1:{server.server_port}/v1 serves {names}", flush=True)
    try:
        batcher.run()
    finally:
        server.shutdown()


class Server(ThreadingHTTPServer):
    """Listens on the loopback interface."""

    daemon_threads = True

    def __init__(self, port: int, model: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.batcher = model, None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"/v1/models": self.models})

    def do_POST(self) -> None:
        self.answer({"/v1/chat/completions": self.chat})

    def answer(self, routes: dict[str, Any]) -> None:
        try:
            # Pages of other sites reach this port through the reader's browser, under a name of theirs.
            if self.headers.get("Host", "").split(":")[0] not in ("127.0.0.1", "localhost"):
                raise Refused(403, "the host is not this machine")
            if self.path not in routes:
                raise Refused(404, f"no {self.command} {self.path}")
            routes[self.path]()
        except Refused as e:
            self.send({"error": {"message": str(e), "type": "invalid_request_error", "code": e.status}}, e.status)
        except OSError:  # the client has gone
            self.close_connection = True

    def send(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:  # what is left of the request was not read
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def models(self) -> None:
        names = [self.server.model, *self.server.batcher.names]
        self.send({"object": "list", "data": [{"id": n, "object": "model", "owned_by": "local"} for n in names]})

    def chat(self) -> None:
        asked = read(self.body(), [self.server.model, *self.server.batcher.names])
        lm = self.server.batcher.lm
        request = submit(self.server.batcher, asked, None if asked.model == self.server.model else asked.model)
        try:
            pieces = until(lm.pieces(request.prompt, request), asked.stop, request)
            (self.stream if asked.options["stream"] else self.whole)(asked, request, pieces)
        finally:
            request.cancelled = True

    def body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "send Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "send a Content-Length")
        if int(length) > BODY:
            raise Refused(413, f"a request has at most {BODY} bytes")
        return self.rfile.read(int(length))

    def whole(self, asked: Asked, request: Any, pieces: Iterator[str]) -> None:
        try:
            text = "".join(pieces)
        except Exception as e:
            raise Refused(503, str(e)) from None
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason(request)}
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": len(request.tokens)}
        usage["total_tokens"] = sum(usage.values())
        self.send(head(asked, "chat.completion") | {"choices": [choice], "usage": usage})

    def stream(self, asked: Asked, request: Any, pieces: Iterator[str]) -> None:
        """Server-sent events: one a piece of text."""
        self.send_response(200)
        for header in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"), ("Connection", "close")):
            self.send_header(*header)
        self.end_headers()
        start = head(asked, "chat.completion.chunk")

        def event(delta: dict, finish: str | None = None) -> None:
            content = start | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
            self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

        event({"role": "assistant", "content": ""})
        try:
            for piece in filter(None, pieces):
                event({"content": piece})
        except OSError:
            raise
        except Exception as e:
            self.wfile.write(f"data: {json.dumps({'error': {'message': str(e), 'code': 503}})}\n\n".encode())
            return
        event({}, reason(request))
        self.wfile.write(b"data: [DONE]\n\n")


def read(body: bytes, names: list[str]) -> Asked:
    """A request that can be answered. Raises Refused."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise Refused(400, "the body is no JSON object")
    content = {k: v for k, v in content.items() if v is not None}
    if unknown := content.keys() - FIELDS.keys() - KNOWN:
        raise Refused(400, f"{min(unknown)!r} is not computed here")
    if content.get("model") not in names:
        raise Refused(404, f"no model {str(content.get('model'))[:80]!r}; there are {', '.join(names)}")
    stop = content.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop) or len(stop) > 16:
        raise Refused(400, "stop is a string or a list of up to 16")
    options = {name: option(name, content) for name in FIELDS}
    return Asked(content["model"], messages(content.get("messages")), stop, options)


def option(name: str, content: dict) -> Any:
    kind, default, least, most = FIELDS[name]
    value = content.get(name, default)
    if value is None:
        return None
    right = isinstance(value, bool) if kind is bool else type(value) in ((int,) if kind is int else (int, float))
    if not right or not least <= value <= most:
        raise Refused(400, f"{name} is {'true or false' if kind is bool else f'a number from {least} to {most}'}")
    return value


def messages(value: Any) -> list[dict]:
    """Turns whose content is text, or OpenAI's list of parts of text."""
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages is a list of turns")
    out = []
    for turn in value:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(p["text"] for p in content)
        if not isinstance(content, str) or not isinstance(turn.get("role"), str):
            raise Refused(400, "a turn has a role and a content, both text")
        out.append({"role": turn["role"], "content": content})
    return out


def submit(batcher: Any, asked: Asked, adapter: str | None) -> Any:
    """The request in the batcher's queue. Raises Refused."""
    from infer.sample import Knobs
    from infer.serve.batcher import Full

    lm, o = batcher.lm, asked.options
    try:
        chat = lm.tokenizer.chat_template
        prompt = lm.encode(asked.messages if chat else "\n".join(m["content"] for m in asked.messages))
        room = max(min(batcher.length, lm.config.max_len) - len(prompt), 1)
        n = o["max_completion_tokens"] or o["max_tokens"] or room
        knobs = Knobs(float(o["temperature"]), o["top_k"], float(o["top_p"]), float(o["min_p"]))
        return batcher.submit(prompt, adapter=adapter, max_new_tokens=n, knobs=knobs, seed=o["seed"])
    except UserError as e:
        raise Refused(400, str(e)) from None
    except Full as e:
        raise Refused(503, str(e)) from None


def until(pieces: Iterator[str], stop: list[str], request: Any) -> Iterator[str]:
    """The pieces up to the first of the stop strings, which cancels the request; what may begin one is held back."""
    held = ""
    longest = max(map(len, stop), default=1) - 1
    for piece in pieces:
        held += piece
        if found := [at for s in stop if (at := held.find(s)) >= 0]:
            request.cancelled = True
            yield held[: min(found)]
            return
        ready = len(held) - longest
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    yield held


def reason(request: Any) -> str:
    """ "length" when the answer was cut at its last token, "stop" when it ended by itself or at a stop string."""
    cut = len(request.tokens) == request.max_new_tokens
    return "length" if cut and not request.stopped and not request.cancelled else "stop"


def head(asked: Asked, kind: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))
