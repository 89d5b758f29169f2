"""Serves a model and its adapters over HTTP, on this machine only, in OpenAI's format.

    python -m tools.serve MODEL [--name=NAME] [--adapters=[NAME=]FOLDER,...] [--embedder=NAME]
                          [--port=8000] [--rows=8] [--length=1024] [--strict]

    curl -N http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "MODEL", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'

The server has the paths /v1/chat/completions, /v1/completions, /v1/embeddings (with --embedder), /v1/models, /health
and /metrics (for Prometheus). The `model` of a request is the name of the model (--name, by default MODEL) or of an
adapter (NAME=, by default the last part of its folder's path). Requests share one batch of --rows rows, and can join
and leave the batch at any step. --length limits the total number of tokens in a prompt and its answer. If a request has
a `seed`, its answer is the same as that of infer.generate with the same settings. Otherwise the answer is random. A
request with an unsupported parameter is refused, unless the parameter's value has no effect on the answer. After SIGINT
(Ctrl-C) or SIGTERM, the server answers its current requests and exits.
"""

import sys

from common import cli, loopback
from common.errors import UserError


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.serve", __doc__)
    parser.add_argument("model")
    parser.add_argument("--name", default="", help="the name of the model in requests; default: MODEL")
    parser.add_argument("--adapters", default="", help="run folders or PEFT folders, separated by commas")
    parser.add_argument("--embedder", default="", help="embedding model: all-minilm-l6-v2, a folder or a hub id")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes any free port")
    parser.add_argument("--rows", type=int, default=8, help="maximum number of concurrent answers")
    parser.add_argument("--length", type=int, default=1024, help="maximum number of tokens in a prompt plus its answer")
    parser.add_argument("--strict", action="store_true", help="fail if some contents of the files are not used")
    args = parser.parse_args(argv)
    name, folders = args.name or args.model, cli.named(args.adapters)
    if min(args.rows, args.length) < 1:
        raise UserError("the values must be at least 1", "--rows and --length")
    if name in folders:
        raise UserError(f"{name!r} is the name of the model", "--adapters", "choose another: NAME=FOLDER")
    if args.embedder in (name, *folders):
        raise UserError(
            f"{args.embedder!r} is the name of the model or an adapter", "--embedder", "set --name for the model"
        )
    with loopback.listen(args.port) as listening:  # before loading the model, to fail early if the port is taken
        from infer import embed
        from infer.models import load, load_many
        from infer.serve import http
        from infer.serve.batcher import Batcher

        lm = load_many(args.model, folders, strict=args.strict) if folders else load(args.model, strict=args.strict)
        batcher = Batcher(lm, args.rows, args.length)
        embedders = {args.embedder: embed.load(args.embedder)} if args.embedder else {}
        names = ", ".join([name, *batcher.names, *embedders])
        print(f"http://{loopback.HOST}:{listening.getsockname()[1]}/v1 serves {names}", flush=True)
        http.run(http.make(batcher, name, embedders), batcher, listening)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
