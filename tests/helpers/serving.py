"""Servers in a thread: that of tools.serve, and one that replies as it is scripted."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common import loopback
from infer.serve import http as serving


@contextlib.contextmanager
def running(batcher, name="base"):
    """The port of a server in a thread, and a list of what ended it."""
    listening, server, errors = loopback.listen(0), serving.make(batcher, name), []

    def work():
        try:
            serving.run(server, batcher, listening)
        except BaseException as e:
            errors.append(e)

    port, thread = listening.getsockname()[1], threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield port, errors
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def scripted(*replies):
    """The URL of a server that gives these (status, headers, body) in turn, the last one forever; and what it got."""
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, headers, content = replies[min(len(asked), len(replies) - 1)]
                asked.append((self.path, dict(self.headers), body))
            content = content(body) if callable(content) else content
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def said(text, **usage):
    message = {"choices": [{"message": {"content": text}, "text": text, "finish_reason": "stop"}]}
    return 200, {}, message | ({"usage": usage} if usage else {})
