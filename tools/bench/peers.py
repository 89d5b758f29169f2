"""Implements the benchmarks of tools.bench with torch and transformers, PEFT and TRL, and with llama.cpp.

Each function imports only the packages that it needs, since the memory of its process is measured.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.worker import Round, asked, decoding, serve, timed

LORA = dict(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _load(model: str) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def train(model: str, peft: str, batch: int, length: int, steps: int) -> Callable[[], Round]:
    """Runs eager training steps without recomputing activations, with the default optimizer settings of
    train/optim.py."""
    import torch
    from peft import LoraConfig, get_peft_model

    net = _load(model).train()
    vocab = net.config.vocab_size
    if peft:
        net = get_peft_model(net, LoraConfig(**LORA))
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    def run() -> Round:
        seconds, cpu = timed(lambda: [step() for _ in range(steps)])
        return {"tokens": steps * batch * length, "seconds": seconds, "cpu_seconds": cpu}

    return run


def sft(model: str, data: str, batch: int, length: int, steps: int, packing: bool) -> Callable[[], Round]:
    """Runs TRL's SFTTrainer with PEFT, timed from the second step. Padding tokens are not counted."""
    import datasets
    import peft
    import transformers
    import trl

    seen, times = [], []

    class Trainer(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: dict, *args: Any) -> Any:
            seen.append(int(inputs.get("attention_mask", inputs["input_ids"] >= 0).sum()))
            return super().training_step(model, inputs, *args)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    rows = [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    config = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),  # nothing is saved
        per_device_train_batch_size=batch, max_steps=steps, max_length=length, packing=packing,
        gradient_checkpointing=False, bf16=False, use_cpu=True,
        save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    pairs = datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in rows])

    def run() -> Round:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        trainer = Trainer(
            _load(model), config, train_dataset=pairs, processing_class=tokenizer,
            peft_config=peft.LoraConfig(**LORA), callbacks=[Clock()],
        )  # fmt: skip
        seen.clear(), times.clear()
        trainer.train()
        seconds, cpu = (b - a for a, b in zip(times[0], times[-1], strict=True))
        return {"tokens": sum(seen[1:]), "seconds": seconds, "cpu_seconds": cpu}

    return run


def decode(model: str, batch: int, prompt: int, new_tokens: int) -> Callable[[], Round]:
    """Runs the greedy `generate` of transformers, with its key-value cache."""
    import torch

    net = _load(model).eval()
    tokens = torch.randint(0, net.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def generate(n: int) -> None:
        counts = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False)
        net.generate(tokens, attention_mask=torch.ones_like(tokens), **counts)

    return lambda: decoding(generate, batch, new_tokens)


def adapters(model: str, ranks: list[int], batch: int, prompt: int, new_tokens: int) -> Callable[[], Round]:
    """Runs greedy `generate` with a different adapter on each row, using PEFT's `adapter_names`."""
    import peft
    import torch

    net = _load(model).eval()
    vocab = net.config.vocab_size
    of = lambda r: peft.LoraConfig(r=r, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    net = peft.get_peft_model(net, of(ranks[0]), adapter_name="0")
    for i, rank in enumerate(ranks[1:], 1):
        net.add_adapter(str(i), of(rank))
    net.eval()
    tokens = torch.randint(0, vocab, (batch, prompt), generator=torch.Generator().manual_seed(0))
    names = [str(i % len(ranks)) for i in range(batch)]

    @torch.inference_mode()
    def generate(n: int) -> None:
        counts = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, adapter_names=names)
        net.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **counts)

    return lambda: decoding(generate, batch, new_tokens)


def lm_eval(model: str, data: str, questions: int, shots: int, new_tokens: int, rows: int) -> Callable[[], Round]:
    """Answers the same questions as `ask` in tools/bench/ours.py, with lm-evaluation-harness."""
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lm = HFLM(pretrained=_load(model).eval(), tokenizer=tokenizer, batch_size=rows)
    knobs = {"until": ["\n"], "max_gen_toks": new_tokens, "do_sample": False}
    texts = asked(data, questions, shots)
    requests = [Instance("generate_until", {}, (text, dict(knobs)), i) for i, text in enumerate(texts)]
    tokens = sum(len(lm.tok_encode(text)) for text in texts)

    def run() -> Round:
        seconds, cpu = timed(lambda: lm.generate_until(requests, disable_tqdm=True))
        return {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}

    return run


def llama_cpp(gguf: str, prompt: int, new_tokens: int) -> Callable[[], Round]:
    """Decodes one row greedily, with the weights as they are stored in the file."""
    import os

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = gguf, prompt + new_tokens, os.cpu_count()
    server = xllamacpp.Server(params)
    request = {"prompt": list(range(100, 100 + prompt)), "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}

    def generate(n: int) -> None:
        answer = server.handle_completions(request | {"max_tokens": n})
        if answer["usage"]["completion_tokens"] != n:
            raise RuntimeError(f"llama.cpp was asked for {n} tokens and reports {answer['usage']}")

    return lambda: decoding(generate, 1, new_tokens)


if __name__ == "__main__":
    serve(
        {"train": train, "sft": sft, "decode": decode, "adapters": adapters, "llama_cpp": llama_cpp, "lm_eval": lm_eval}
    )
