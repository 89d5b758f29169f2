"""Talk to a model in the terminal.

    python -m tools.chat MODEL [--adapter=RUN] [--system=TEXT] [--temperature=0.7] [--cache=int8] [--max-new-tokens=256]
                         [--strict]
    python -m tools.chat MODEL --adapters=[NAME=]RUN,...
    echo "What is the capital of France?" | python -m tools.chat MODEL

MODEL is a packaged model's name, a Hugging Face folder, a .gguf file, a hub id, a run folder or a bundle. In a
terminal, each line is a message, /reset clears the conversation, and /exit ends it. With --adapters, a conversation
starts with the first adapter; /adapter NAME switches to another one, and /adapter without a name to the base model. If
the input comes from a pipe, all of it is one question. A model without a chat template continues the text. The speed
and the time to the first token are printed to stderr.
"""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common import cli
from common.cli import named
from common.errors import UserError

if TYPE_CHECKING:  # jax is imported only after the options have been read
    from infer.lm import LM


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.chat", __doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", help="a run or PEFT folder whose adapter is added to MODEL")
    parser.add_argument("--adapters", default="", help="several such folders; /adapter chooses one of them")
    parser.add_argument("--system", default="", help="the system message of every conversation")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache", default="float", choices=("float", "int8", "fp8"), help="number format of the key-value cache"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--strict", action="store_true", help="fail if the model's files have unused contents")
    args = vars(parser.parse_args(argv))
    model, adapter, several, system, strict = (
        args.pop(k) for k in ("model", "adapter", "adapters", "system", "strict")
    )
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace")
    from infer.models import load, load_many

    if adapter and several:
        raise UserError("only one of these options can be used", "--adapter and --adapters", "give only one")
    folders = named(several)
    lm = load_many(model, folders, strict=strict) if folders else load(model, adapter, strict=strict)
    chat = Chat(lm, system, args)
    return converse(chat) if sys.stdin.isatty() else ask(chat, sys.stdin.read().strip())


class Chat:
    """A conversation. An answer that fails or is interrupted leaves the conversation unchanged."""

    def __init__(self, lm: "LM", system: str, knobs: dict[str, float | int | str]):
        self.lm, self.knobs = lm, knobs
        self.adapter = next(iter(lm.store.adapters)) if lm.store else None
        self.compiled = False  # becomes True with the first answer, which waits for compilation
        self.start = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.start)

    def answer(self, text: str) -> Iterator[str]:
        """Yields the pieces of the answer as they are generated."""
        turns = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        asked = turns if self.lm.speaking(self.adapter).tokenizer.chat_template else text
        for piece in self.lm.stream(asked, adapter=self.adapter, **self.knobs):
            pieces.append(piece)
            yield piece
        self.messages = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def choose(self, name: str) -> str:
        """Chooses the adapter for the next answers; "" stands for the base model. Returns a message for the user."""
        known = list(self.lm.store.adapters) if self.lm.store else []
        if name and name not in known:
            return f"no adapter {name!r}; known: {', '.join(known) or 'none, start with --adapters'}"
        self.adapter = name or None
        return f"{name or 'the base'} answers"


def ask(chat: Chat, text: str) -> int:
    """Prints the answer to `text`, then its speed."""
    if not chat.compiled:
        print("[compiling for the first answer]", file=sys.stderr)
        chat.compiled = True
    begin, times = time.perf_counter(), []
    for piece in chat.answer(text):
        times.append(time.perf_counter())
        print(piece, end="", flush=True)
    print(flush=True)
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])  # the second token may have waited for a compilation
        print(f"[{rate:.1f} tok/s, first token after {times[0] - begin:.1f} s]", file=sys.stderr)
    return 0


def converse(chat: Chat) -> int:
    """Reads messages from a terminal until /exit or the end of the input. Ctrl-C stops an answer."""
    import readline  # noqa: F401  gives input() line editing and history

    temperature = chat.knobs["temperature"]
    print(f"[temperature {temperature}; --temperature=0 makes answers reproducible; /exit ends]", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        if line == "/exit":
            return 0
        if line == "/reset":
            chat.reset()
        elif line.split(" ")[0] == "/adapter":
            print(chat.choose(line.removeprefix("/adapter").strip()), file=sys.stderr)
        elif line:
            try:
                ask(chat, line)
            except KeyboardInterrupt:
                print()
            except UserError as e:
                print(f"{e} (/reset starts a new conversation)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
