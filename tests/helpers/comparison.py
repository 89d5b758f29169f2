"""A record of a comparison, as tools.compare writes it: several methods, seeds, stopped ones, a hosted one."""

import json
import random
from pathlib import Path
from typing import Any

from common import stats
from tests.helpers.pages import EVIL

ROWS, WIDTH = 100, 1e9  # test rows; FLOPs per token
MODEL = "smollm2-135m-instruct"
PRICE = {"name": "v5e", "kind": "planned", "usd_hour": [0.24, 1.2, 1.42], "seconds_per_flop": 1 / 5e13}
CPU = {"name": "AMD EPYC", "kind": "measured", "usd_hour": None, "seconds_per_flop": 1 / 1e11}


def result(share: float, seed: int = 0, rows: int = ROWS, tokens: float = 60, answers: Any = None) -> dict:
    """Right on about `share` of the rows; which rows are hard is nearly the same for all methods and seeds."""
    noise, hard = random.Random(f"{share} {seed}"), random.Random(7)
    scores = [float(hard.random() + noise.uniform(-0.1, 0.1) < share) for _ in range(rows)]
    low, high = stats.of_scores(scores)
    half = scores[: rows // 2]
    part = dict(zip(("low", "high"), stats.of_scores(half), strict=True)) | {
        "n": len(half),
        "mean": sum(half) / len(half),
    }
    asked = lambda i, s: {
        "prompt": f"When was speech {i} given? {EVIL}", "answer": "1901-12-03", "score": s,
        "completion": "1901-12-03" if s else "December",
    }  # fmt: skip
    return {
        "task": "dates", "mean": sum(scores) / rows, "n": rows, "low": low, "high": high, "score": sum(scores),
        "scores": scores, "rows": [f"row{i}" for i in range(rows)], "task_hash": "abc", "scorer": "exact",
        "answers": answers or [["1901-12-03", 3], ["December", rows - int(sum(scores))]],
        "slices": {"century=19": part}, "samples": [asked(i, s) for i, s in enumerate(scores[:20])],
        "prompt_tokens": tokens, "completion_tokens": 8.0, "flops": rows * tokens * WIDTH, "seconds": 9.0, "seed": 0,
    }  # fmt: skip


def method(name: str, label: str, shares: list[float], tokens: float = 60, **more: Any) -> dict:
    """`shares`: of right answers, one per seed."""
    trained = more.get("trained", False)
    flops, run = (5e15 if trained else 0.0), f"runs/{name}"
    tests = [
        {
            "seed": seed, "result": result(share, seed, tokens=tokens), "flops": flops, "seconds": flops / 1e11,
            "peak_bytes": 2.1e9 if trained else None, "store_bytes": 19.5e6 if trained else 0, "run": f"{run}-{seed}",
            "text": None, "trained_before": False,
            "commands": [["evals.main", f"--model={run}-{seed}", "--tasks=dates"]],
        }
        for seed, share in enumerate(shares)
    ]  # fmt: skip
    request = {
        "flops": tokens * WIDTH, "prompt_tokens": tokens, "completion_tokens": 8.0, "usd": None,
        "latency": {"p50": 0.4 * tokens / 60, "p95": 0.7 * tokens / 60, "n": 20},
    }  # fmt: skip
    return {
        "name": name, "model": MODEL, "label": label, "how": f"This is how {label} works.",
        "status": "tested", "why": "", "candidate": f"{name}:lr=1e-3", "documents": "rag" in name, "trained": trained,
        "leaves": False, "tests": tests, "request": request, "forgetting": 0.25 if trained else 0.0,
        "spent": {"flops": 2e14 + len(shares) * flops, "seconds": 600.0},
    } | more  # fmt: skip


def stopped(name: str, label: str, status: str, why: str) -> dict:
    return method(name, label, [], trained=True) | {"status": status, "why": why}


def record(**changes: Any) -> dict:
    """LoRA gets 90 of 100 right, a little behind full tuning, far above prompts; requests of few-shot cost most."""
    full = method("full", "full fine-tuning", [0.91, 0.9, 0.92], trained=True, forgetting=0.02)
    for test in full["tests"]:
        test |= {"flops": 4e16, "store_bytes": 538e6, "peak_bytes": 6.3e9}
    hosted = method("hosted", "a hosted model", [0.7], leaves=True)
    hosted["request"] |= {"flops": None, "usd": 2e-5, "latency": None}
    lora = method("lora", "LoRA, rank 16", [0.9, 0.88, 0.91], trained=True)
    weak = "clearly worse than LoRA, rank 16, on 40 validation rows: -55 points, 95 % interval -70 to -38"
    found = [
        method("zero_shot", "zero-shot", [0.04]), method("few_shot", "4 examples", [0.31], 250),
        method("rag", "retrieval", [0.2], 320), lora, full, hosted,
        stopped("qlora", "LoRA on 4 bits", "stopped", weak),
        stopped("rag_lora", "LoRA that reads passages", "refused", "training rows with passages exceed the context"),
    ]  # fmt: skip
    learning = [
        {
            "method": "lora",
            "model": MODEL,
            "n": 60,
            "rows": n,
            "mean": mean,
            "low": mean - 0.1,
            "high": min(mean + 0.08, 0.97),
            "run": "runs/x",
        }
        for n, mean in ((50, 0.55), (150, 0.8), (450, 0.9))
    ]
    spent = {key: sum(m["spent"][key] for m in found) for key in ("flops", "seconds")}
    candidates = [
        {"id": m["candidate"], "method": m["name"], "model": MODEL, "label": m["label"], "settings": {}, "rungs": []}
        for m in found
    ]
    return {
        "format": 1,
        "task": {"name": "dates", "source": "rows.csv", "hash": "abc", "scorer": "exact", "duplicates": [],
                 "rows": {"train": 450, "validation": 60, "test": ROWS}, "notes": ["scorer exact: answers are short"]},
        "models": [MODEL], "documents": "wiki", "requests": 1e5, "seeds": [0, 1, 2],
        "epochs": 3.0, "rungs": [], "methods_asked": [m["name"] for m in found],
        "index": {"chunks": 900, "bytes": 2e6, "flops": 1e12, "seconds": 10.0, "usd": 0.0},
        "budget": {"asked": "30 min", "flops": 3e17, "rate": 1e11, "rate_from": "measured on AMD EPYC, 2 cores"},
        "machine": {"name": "AMD EPYC", "devices": 1, "chip": None}, "prices": [PRICE, CPU],
        "decisions": [{"rung": 0, "rows": 40, "share": 0.3, "kept": ["lora:lr=1e-3", "full:lr=1e-3"],
                       "dropped": [{"candidate": "qlora:lr=1e-3", "why": weak}]}],
        "candidates": candidates, "methods": found, "learning": learning,
        "spent": spent, "unspent": {"flops": 3e17 - spent["flops"]},
    } | changes  # fmt: skip


def write(out: Path, made: dict) -> Path:
    """A folder with the record, and run folders that say how fast LoRA and full tuning trained."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(made))
    for name, speed in (("lora-0", 466.0), ("full-0", 316.0)):
        (out / "runs" / name).mkdir(parents=True, exist_ok=True)
        done = {"step": 24, "kind": "event", "event": "done", "time": 1e9, "tokens_per_second": speed, "flops": 1e12}
        (out / "runs" / name / "metrics.jsonl").write_text(json.dumps(done) + "\n")
    return out
