"""Implements the benchmarks of tools.bench with this project's code.

Each function prepares a benchmark, and returns a function that runs one round.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from common import record
from configs.models import SHAPES
from infer.models import load
from model import build
from model.config import ModelConfig
from model.net.transformer import Transformer
from model.weights import Params
from tools.bench.worker import Round, asked, decoding, peak_memory, serve, timed


def opened(model: str, dtype: str) -> tuple[Transformer, Params]:
    """Opens a model by name. If the name is a key of SHAPES, the weights are random; the model then runs as fast as a
    trained one."""
    if model in SHAPES:
        random = build.network(ModelConfig.from_dict(SHAPES[model]), dtype)
        return random, jax.jit(random.init)(jax.random.key(0))
    lm = load(model, dtype=dtype)
    return lm.model, lm.params


def train(model: str, peft: str, batch: int, length: int, steps: int, dtype: str) -> Callable[[], Round]:
    """Runs training steps on random tokens that all count in the loss. Trains the whole model or, if `peft` is given,
    the adapters of this method with default arguments.

    `dtype` is the data type of the activations. The weights are float32.
    """
    from configs import base
    from train import init, inputs
    from train.keep import flags
    from train.mesh import make_mesh
    from train.step import compile_step

    flags.trim_after_compiling()
    cfg = base.get_config()
    cfg.model.dtype, cfg.peft.name = dtype, peft
    cfg.model.shape, cfg.init = (model, "") if model in SHAPES else ("", model)
    start = inputs.pretrained(cfg)
    planned = init.blueprint(cfg, build.model(cfg, start), make_mesh(cfg.mesh))
    step = compile_step(planned)
    tokens = np.random.default_rng(0).integers(0, planned.model.config.vocab_size, (batch, length + 1), np.int32)
    ones = np.ones((batch, length), np.int32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": ones.astype(np.float32)}
    rows |= {"segments": ones, "positions": ones.cumsum(1, dtype=np.int32) - 1}
    state = init.first_state(cfg, planned, start)

    def run() -> Round:
        def steps_of_a_round() -> None:
            nonlocal state
            for _ in range(steps):
                state, _ = step(state, rows)
            jax.block_until_ready(state)

        seconds, cpu = timed(steps_of_a_round)
        return {"tokens": steps * batch * length, "seconds": seconds, "cpu_seconds": cpu}

    return run


def sft(model: str, data: str, batch: int, length: int, steps: int, dtype: str) -> Callable[[], Round]:
    """Runs `train.main` on prompts and completions, timed from the second step. Padding tokens are not counted."""
    from configs import schema
    from train.main import run as train_main

    def run() -> Round:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(Path(__file__).parents[2]):
            argv = {
                "init": model, "model.dtype": dtype, "steps": steps, "log_every": steps, "eval_every": 0,
                "eval_batches": 1, "samples": "()",
                "data.source": data, "data.packing": "best_fit", "data.seq_len": length, "data.batch_size": batch,
                "ckpt.every": 0,
            }  # fmt: skip
            argv = [f"--config.{key}={value}" for key, value in argv.items()]
            train_main(schema.load(["--config=configs/sft/smollm2_lora.py", f"--workdir={folder}/run", *argv]))
            lines = record.read(Path(folder, "run", "metrics.jsonl"))
            line = next(line for line in lines if line["kind"] == "train")
        seconds = line["seconds_per_step"] * (steps - 1)
        return {"tokens": line["tokens_per_second"] * seconds, "seconds": seconds, "cpu_seconds": None}

    return run


def decode(
    model: str,
    batch: int,
    prompt: int,
    new_tokens: int,
    dtype: str,
    peft: str = "",
    merged: bool = False,
    quant: dict | None = None,
) -> Callable[[], Round]:
    """Decodes greedily after random prompts, optionally with quantized weights or with an adapter of the method `peft`.
    Noise is added to the adapter's weights."""
    from infer.generate import generate, unrolled
    from model import weights
    from model.build import find

    model, params = opened(model, dtype)
    specs, key = model.specs, jax.random.key(0)

    def moved(params: dict) -> dict:
        params = find("model.peft", ConfigDict({"name": peft}))()(params, specs, key)
        train, frozen = weights.partition(params, weights.trainable(params, "adapters"))
        noise = lambda path, x: x + 0.01 * jax.random.normal(weights.key_for(key, path), x.shape, x.dtype)
        return weights.combine(weights.map_named(noise, train), frozen)

    params = jax.jit(moved)(params) if peft else params
    if quant:
        params = jax.jit(lambda p: find("model.quant", ConfigDict(quant))()(p, specs, key))(params)
    params = unrolled(model, weights.dense(params, specs) if merged else params)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    return lambda: decoding(lambda n: generate(model, params, prompts, max_new_tokens=n), batch, new_tokens)


def adapters(model: str, ranks: list[int], batch: int, prompt: int, new_tokens: int, dtype: str) -> Callable[[], Round]:
    """Decodes greedily with a different adapter on each row. Each round takes the next adapters of the list.

    The time to move the adapters to the device is included.
    """
    from infer.generate import generate
    from infer.serve.store import Store

    (model, base), rng = opened(model, dtype), np.random.default_rng(0)
    specs = model.specs["layers"]["attn"]
    draw = lambda *shape: (rng.random(shape, np.float32) * 0.02 - 0.01).astype(np.float16)

    def adapter(rank: int) -> dict:
        shapes = {f"layers/attn/{name}": specs[name].shape for name in ("wq", "wv")}  # [L,D,N,H]
        return {p: (draw(s[0], rank, s[1]), draw(s[0], rank, *s[2:])) for p, s in shapes.items()}

    store = Store(model, base, {str(i): adapter(r) for i, r in enumerate(ranks)}, batch * max(ranks) * 2)
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    turn = itertools.count()

    def run() -> Round:
        names = [str(next(turn) % len(ranks)) for _ in range(batch)]
        seconds, cpu = timed(lambda: jax.block_until_ready(store.serving(names, batch)))
        ask = lambda n: generate(model, None, prompts, adapters=names, store=store, max_new_tokens=n)
        done = decoding(ask, batch, new_tokens)
        return done | {"seconds": done["seconds"] + seconds, "cpu_seconds": done["cpu_seconds"] + cpu}

    return run


def ask(
    model: str, data: str, questions: int, shots: int, new_tokens: int, rows: int, shared: bool, dtype: str
) -> Callable[[], Round]:
    """Answers questions greedily, with the same solved examples before each question. All prompt tokens are counted,
    also those that are computed only once. No cache is kept from one round to the next."""
    from infer import prefix
    from infer.generate import generate

    lm = load(model, dtype=dtype)
    prompts, params = [lm.encode(text) for text in asked(data, questions, shots)], lm.unrolled
    if not shared:
        prefix.WORTH = 1 << 62
    ended = lambda tokens: "\n" in lm.tokenizer.decode(tokens)
    how = dict(max_new_tokens=new_tokens, rows=rows, stop=ended, stop_ids=lm.tokenizer.eos_ids)

    def run() -> Round:
        seconds, cpu = timed(lambda: generate(lm.model, params, prompts, **how))
        return {"tokens": sum(map(len, prompts)), "seconds": seconds, "cpu_seconds": cpu}

    return run


def device_memory() -> int:
    """Returns the peak memory of this process in bytes: on its accelerator or, if there is none, in host memory."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or peak_memory()


if __name__ == "__main__":
    serve({"train": train, "sft": sft, "decode": decode, "adapters": adapters, "ask": ask}, device_memory)
