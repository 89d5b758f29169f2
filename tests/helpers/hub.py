"""A stand-in for the hub's HTTP interface on this machine, with repositories of a few files."""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator

COMMITS = {"main": "a" * 40, "old": "b" * 40}  # revision: its commit; that of "old" holds files of its own


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, dict[str, bytes]]]  # "datasets/me/rows": {revision: {file: its bytes}}
    gated: set[str]

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        api = parts[0] == "api"
        kind = "datasets" if "datasets" in parts[:2] else "models"
        rest = parts[1 + (kind in parts[:2]) :] if api else parts[kind == "datasets" :]
        repo, rest = f"{kind}/{'/'.join(rest[:2])}", rest[2:]
        if repo not in self.repos:
            return self.reply(401, error="RepoNotFound")
        name = rest[1] if len(rest) > 1 else "main"
        name = next((known for known, commit in COMMITS.items() if name in (known, commit)), name)
        if name not in self.repos[repo]:
            return self.reply(404, error="RevisionNotFound")
        files = self.repos[repo][name]
        entries = [{"type": "file", "path": p, "size": len(x), "oid": f"{hash(x):x}"} for p, x in files.items()]
        if api and (not rest or rest[0] == "revision"):
            siblings = [{"rfilename": file} for file in files]
            info = {"id": repo.partition("/")[2], "sha": COMMITS[name], "siblings": siblings, "private": False}
            return self.reply(200, json.dumps(info | {"gated": repo in self.gated and "auto", "tags": []}).encode())
        if repo in self.gated:
            return self.reply(401 if "Authorization" not in self.headers else 403, error="GatedRepo")
        if api and rest[0] == "tree":
            inside = "/".join(rest[2:])
            folders = {p.rpartition("/")[0] for p in files if "/" in p}
            entries += [{"type": "directory", "path": p, "size": 0, "oid": p} for p in folders]
            return self.reply(200, json.dumps([e for e in entries if e["path"].startswith(inside)]).encode())
        if api and rest[0] == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            return self.reply(200, json.dumps([e for e in entries if e["path"] in asked]).encode())
        file = files.get("/".join(rest[2:])) if rest[:1] == ["resolve"] else None
        if file is None:
            return self.reply(404, error="EntryNotFound")
        return self.reply(200, file, commit=COMMITS[name])

    do_HEAD = do_POST = do_GET

    def reply(self, status: int, body: bytes = b"{}", error: str = "", commit: str = "") -> None:
        self.send_response(status)
        for name, value in {"X-Error-Code": error, "X-Error-Message": error, "X-Repo-Commit": commit}.items():
            if value:
                self.send_header(name, value)
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(repos: dict[str, dict[str, dict[str, bytes]]], gated: set[str]) -> Iterator[str]:
    """The endpoint, for HF_ENDPOINT, of a hub with these repositories."""
    handler = type("Handler", (Handler,), {"repos": repos, "gated": gated})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
