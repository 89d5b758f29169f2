"""A feedback server in this process, and requests as its page sends them."""

import contextlib
import http.client
import json
import threading
from pathlib import Path

from common import loopback
from feedback import server
from feedback.items import item
from feedback.store import OWNER, Store

RECORDS = [
    {
        "prompt": "What is 2+2?",
        "answers": [{"text": "4", "model": "a", "sampling": {"temperature": 1}}, {"text": "5", "model": "b"}],
        "judge": {"model": "judge", "ranks": [1, 2], "why": "arithmetic"},
    },
    {"prompt": [{"role": "user", "content": "Name a color."}], "answers": ["red", "loud", "blue"], "aspects": ["true"]},
    {"prompt": "<script>alert(1)</script>", "answers": ["<b>x</b>", "a\u202eb"], "gold": [1, 2]},
]


class Client:
    """What a page would send to a server, as one person."""

    def __init__(self, port: int, token: str):
        self.port, self.token = port, token
        self.link = f"http://127.0.0.1:{port}/{token}/"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def get(self, path: str = "", **headers: str) -> tuple[int, str]:
        return self.ask("GET", f"/{self.token}/{path}", **headers)

    def post(self, path: str, value: object, **headers: str) -> tuple[int, str]:
        usual = {"Origin": f"http://127.0.0.1:{self.port}", "Content_Type": "application/json"}
        return self.ask("POST", f"/{self.token}/{path}", json.dumps(value).encode(), **(usual | headers))

    def vote(self, item: str, ranks: list[int | None], version: int = 0, **more: object) -> tuple[int, str]:
        value = {"item": item, "version": version, "choice": "ranks", "ranks": ranks, "ms": 1200, "key": "k"} | more
        return self.post("vote", value)


@contextlib.contextmanager
def serving(path: Path, names: tuple[str, ...] = ("ann", "bob"), records: list[dict] = RECORDS, **options):
    """(store, {name: client}), with the owner's under its name."""
    store = Store(path)
    store.add(map(item, records))
    with loopback.listen(0) as listening:
        port = listening.getsockname()[1]
        running = server.serve(server.application(store, port, **options))
        worker = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        worker.start()
        try:
            yield store, {name: Client(port, store.link(name)) for name in (*names, OWNER)}
        finally:
            running.should_exit = True
            worker.join()
            store.close()
