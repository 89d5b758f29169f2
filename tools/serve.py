"""Serve a model and adapters of it over HTTP, on this machine alone, in OpenAI's format.

    python -m tools.serve MODEL [--name=NAME] [--adapters=[NAME=]FOLDER,...] [--port=8000] [--rows=8] [--length=1024]
                          [--strict]

    curl -N http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "MODEL", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'

Paths: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics (Prometheus). A request's `model` is MODEL,
or NAME, or the name of an adapter (a folder's last part, unless NAME= gives another). Requests share one batch of
--rows rows, which they join and leave at any step; --length bounds a prompt with its answer, in tokens. An answer with
a `seed` is what infer.generate samples with the same settings; without one it is drawn anew. Parameters that are not
supported are refused unless they change nothing. SIGINT (Ctrl-C) or SIGTERM ends the server when the requests at work
are answered.
"""

import sys

from common import cli
from common.errors import UserError


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.serve", __doc__)
    parser.add_argument("model")
    parser.add_argument("--name", default="", help="what requests call the model; MODEL by default")
    parser.add_argument("--adapters", default="", help="run or PEFT folders, with commas between them")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--rows", type=int, default=8, help="answers at a time")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt and its answer")
    parser.add_argument("--strict", action="store_true", help="what the files hold and nothing uses is an error")
    args = parser.parse_args(argv)
    name, folders = args.name or args.model, cli.named(args.adapters)
    if min(args.rows, args.length) < 1:
        raise UserError("must be at least 1", "--rows and --length")
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"{args.port} is no port", "--port", "0 to 65535")
    if name in folders:
        raise UserError(f"{name!r} is the model's own name", "--adapters", "NAME=FOLDER")
    from infer.models import load, load_many
    from infer.serve import http
    from infer.serve.batcher import Batcher

    with http.listen(args.port) as listening:  # before the model is read: the port may be taken
        lm = load_many(args.model, folders, strict=args.strict) if folders else load(args.model, strict=args.strict)
        batcher = Batcher(lm, args.rows, args.length)
        names = ", ".join([name, *batcher.names])
        print(f"http://{http.HOST}:{listening.getsockname()[1]}/v1 serves {names}", flush=True)
        http.run(http.make(batcher, name), batcher, listening)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
