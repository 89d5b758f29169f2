"""The commands that are disturbed, each at a tiny size, and what they start from.

Launchers start their commands by `Forked` here: in a process that has imported everything, as the one that it forks.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common import jobs
from tools import demo, prepare, quantize, serve
from tools import export as tool_export
from tools.sweep import __main__ as sweeping
from train import main as training

TINY = [
    "--config.steps=4", "--config.log_every=1", "--config.ckpt.every=2", "--config.eval_batches=1",
    "--config.eval_every=2", "--config.data.batch_size=4", "--config.data.source=synthetic:add?n=60&digits=1",
    "--config.data.tokenizer=bpe:270",
]  # fmt: skip


TWO = """from configs.sft.tiny import get_config  # noqa: F401

def sweep():
    yield {"seed": 0}
    yield {"seed": 1}
"""


class Command(NamedTuple):
    """`main(argv(root))` runs in `root`, which `start` has filled, in one process or, of a run, in two."""

    main: Callable[[list[str]], int]
    argv: Callable[[Path], list[str]]
    start: Callable[[Path], None] = lambda root: None
    processes: int = 1


def commands(base: Path) -> dict[str, Command]:
    """`base` holds a finished run, a run that was stopped behind its first checkpoint, and texts."""
    config = ["--config=configs/sft/tiny.py", '--config.samples=("2+3=",)', *TINY]
    train = lambda root: [*config, f"--workdir={root / 'run'}", f"--config.data.cache={root / 'cache'}"]
    quick = ["--config.samples=()", "--config.eval_every=0", "--config.eval_batches=0"]
    source = f"--model={base / 'run'}"
    sizes = ["--rows=2", "--seq_len=16", "--eval_tokens=32", "--dtype=float32"]
    calibration = [source, "--quant=int8", f"--data={base / 'texts.jsonl'}", *sizes]
    sweep = [f"--config={base / 'two.py'}", *TINY, "--config.steps=2", "--config.samples=()", "--jobs=2"]
    return {
        "train": Command(training.main, train),
        "short": Command(training.main, lambda root: [*train(root), *quick, "--config.steps=2"]),
        "continue": Command(training.main, lambda root: [*train(root), "--config.ckpt.on_error=continue"]),
        "resume": Command(training.main, train, lambda root: copy(base / "half", root)),
        "pair": Command(training.main, lambda root: [*train(root), *quick], processes=2),
        "quantize": Command(quantize.main, lambda root: [*calibration, f"--out={root / 'out'}"]),
        "export": Command(tool_export.main, lambda root: [f"--from={base / 'run'}", f"--to={root / 'out'}"]),
        "gguf": Command(
            tool_export.main, lambda root: [f"--from={base / 'run'}", f"--to={root / 'm.gguf'}", "--format=gguf"]
        ),
        "prepare": Command(prepare.main, lambda root: [a for a in train(root) if "workdir" not in a]),
        "sweep": Command(
            _sweep, lambda root: [*sweep, f"--out={root / 'out'}", f"--config.data.cache={root / 'cache'}"]
        ),
        "demo": Command(lambda argv: _demo(argv, base), lambda root: [f"--out={root / 'out'}"]),
        "serve": Command(_serve, lambda root: [str(base / "run"), "--rows=1", "--length=32"]),
    }


def copy(source: Path, root: Path) -> None:
    shutil.copytree(source, root, dirs_exist_ok=True)


# --- launchers ---


SPAWN = jobs.start


class Forked:
    """`python -m ARGV` as common.jobs.start gives it, in a fork of this process. A comparison reads its model with
    tensorstore, which forbids forks from then on, so the commands that a comparison starts are spawned."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] = {}, pass_fds: Sequence[int] = ()):
        self.returncode: int | None = None
        sys.stdout.flush()
        if pid := os.fork():
            self.pid = pid
            return
        code = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                signal.signal(number, handler)
            os.environ.update(env)
            if argv[0] == "tools.compare":
                jobs.start = SPAWN
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                package = (Path(__file__).parents[2] / argv[0].replace(".", "/")).is_dir()
                code = importlib.import_module(argv[0] + ".__main__" * package).main(list(argv[1:]))
            except Exception:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(status[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _sweep(argv: list[str]) -> int:
    jobs.start = Forked
    return sweeping.main(argv)


def _demo(argv: list[str], base: Path) -> int:
    """The rows of a task, and a comparison of two methods on them."""
    jobs.start, demo.MODEL, demo.COMPARED = Forked, str(base / "run"), {"sums": (120, 1, "zero_shot,lora", 60)}
    demo.CREDITS = {"sums": "Made of two numbers."}
    return demo.main(argv)


def _serve(argv: list[str]) -> int:
    """Serves until one request is answered."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def ask() -> None:
        place = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{place}/health").read()
                break
            time.sleep(0.05)
        body = json.dumps({"model": argv[0], "prompt": "2+3=", "max_tokens": 2}).encode()
        asked = urllib.request.Request(f"{place}/v1/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(asked).read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask, daemon=True).start()
    return serve.main([*argv, f"--port={port}"])
