"""Serving: requests in a running batch, and OpenAI's HTTP interface before it."""

import contextlib
import dataclasses
import http.client
import inspect
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uvicorn

from common import loopback
from common.errors import UserError
from data.text import chat
from data.text.formats import load as load_tokenizer
from infer import models
from infer.generate import generate
from infer.lm import LM
from infer.sample import Knobs
from infer.serve import Refused, api, connection, messages
from infer.serve.batcher import Batcher, Full
from model.io.export import export_hf
from tests.helpers.adapters import NAMES, PROMPTS, make, store_of
from tests.helpers.serving import running

# --- continuous batching ---


@pytest.fixture(scope="module")
def lm():
    model, base, trees = make()
    return LM(model, base, load_tokenizer("bytes"), store_of(model, base, trees, rank_rows=48)), trees


@pytest.mark.slow
def test_requests_join_and_leave_a_running_batch(lm):
    """More requests than rows, more adapters than the device holds, a ring that turns over: each as if alone."""
    lm, trees = lm
    batcher = Batcher(lm, rows=3, length=40)
    lengths = [9, 30, 3, 25, 14, 34]
    asked = list(zip(PROMPTS, NAMES, lengths))
    requests = [batcher.submit(p, adapter=a, max_new_tokens=n) for p, a, n in asked[:4]]
    for _ in range(7):
        batcher.step()
    requests += [batcher.submit(p, adapter=a, max_new_tokens=n) for p, a, n in asked[4:]]
    while batcher.waiting or any(batcher.rows):
        batcher.step()
    for request, (prompt, name, n) in zip(requests, asked):
        wanted = generate(lm.model, trees.get(name, lm.params), [prompt], max_new_tokens=n, stop_ids=(257,)).tokens[0]
        assert list(request) == wanted, name


@pytest.mark.slow
def test_each_request_has_knobs_of_its_own(lm):
    lm, trees = lm
    knobs = [Knobs(), Knobs(0.9), Knobs(1.5, 5, 0.9, 0.05)]
    batcher = Batcher(lm, rows=3, length=64)
    requests = [batcher.submit(PROMPTS[0], adapter="b", max_new_tokens=10, knobs=k, seed=3) for k in knobs]
    while any(batcher.rows) or batcher.waiting:
        batcher.step()
    for request, k in zip(requests, knobs):
        alone = generate(lm.model, trees["b"], [PROMPTS[0]], max_new_tokens=10, seed=3, **k._asdict(), stop_ids=(257,))
        assert list(request) == alone.tokens[0]
    assert len({tuple(r.tokens) for r in requests}) == 3


def test_what_cannot_be_answered_is_refused(lm):
    batcher = Batcher(lm[0], rows=1, length=16, waiting=1)
    with pytest.raises(UserError, match="exceed the 16"):
        batcher.submit([1] * 9, max_new_tokens=8)
    with pytest.raises(UserError, match="no adapter"):
        batcher.submit([1], adapter="x", max_new_tokens=1)
    first = batcher.submit([1], max_new_tokens=8)
    with pytest.raises(Full):
        batcher.submit([1], max_new_tokens=1)
    batcher.step()
    first.cancelled = True
    batcher.step()
    assert not any(batcher.rows) and len(list(first)) == 3


# --- over HTTP ---

LENGTH = 96


@pytest.fixture(scope="module")
def batcher():
    model, base, trees = make()
    adapters = {name: trees[name] for name in "cd"}
    lm = LM(model, base, load_tokenizer("bytes"), store_of(model, base, adapters))
    return Batcher(lm, rows=4, length=LENGTH)


@pytest.fixture(scope="module")
def port(batcher):
    with running(batcher) as (port, errors):
        yield port
    assert not errors


def ask(port, path="/v1/chat/completions", method="POST", headers=(), body=None, **content):
    """Status, body (read as JSON, or the events of a stream) and headers of an answer."""
    if path == "/v1/chat/completions":
        content = {"messages": USER} | content
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": "base"} | content) if body is None else body
    connection.request(method, path, body, {"Content-Type": "application/json", **dict(headers)})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    kind = answer.headers["Content-Type"]
    if kind.startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return answer.status, [json.loads(e) for e in events], answer.headers
    return answer.status, json.loads(text) if kind == "application/json" else text, answer.headers


def choice(port, **content):
    status, answer, _ = ask(port, **content)
    assert status == 200, answer
    return answer["choices"][0]


def streamed(port, **content):
    """The text and the last reason of a stream's only choice, and all its events."""
    status, events, _ = ask(port, stream=True, **content)
    assert status == 200
    parts = [c for e in events for c in e["choices"]]
    said = "".join(p["delta"].get("content", "") if "delta" in p else p["text"] for p in parts)
    return said, parts[-1]["finish_reason"], events


USER = [{"role": "user", "content": "2+3="}]


def test_answers_are_those_of_the_model_alone(batcher, port):
    names, out = ["base", "c", "d", "c", "base"], {}

    def fetch(i):
        out[i] = ask(port, model=names[i], max_tokens=8 + i, temperature=0)

    threads = [threading.Thread(target=fetch, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, name in enumerate(names):
        adapter = None if name == "base" else name
        want = batcher.lm.generate("2+3=", adapters=[adapter], max_new_tokens=8 + i)[0]
        status, answer, _ = out[i]
        assert status == 200 and answer["choices"][0]["message"]["content"] == want
        used = answer["usage"]
        assert used["prompt_tokens"] == 4 and used["total_tokens"] == 4 + used["completion_tokens"]
        assert used["completion_tokens"] == 8 + i or answer["choices"][0]["finish_reason"] == "stop"


def test_a_stream_is_the_whole_answer_and_ends_before_a_stop_string(port):
    """Every character is a token here, so that a stop string of three spans as many."""
    asked = dict(model="c", max_tokens=24, temperature=8, seed=4)
    text = choice(port, **asked)["message"]["content"]
    said, finish, events = streamed(port, **asked, stream_options={"include_usage": True})
    assert said == text and finish == "length" and len(events) > 5
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 24
    assert all(e["usage"] is None and e["choices"][0]["delta"] is not None for e in events[:-1])
    stop = text[3:6]
    at = text.index(stop)
    assert at == 3
    for stops in (stop, ["never there", stop]):
        cut = choice(port, stop=stops, **asked)
        assert cut["message"]["content"] == text[:at] and cut["finish_reason"] == "stop"
        assert streamed(port, stop=stops, **asked)[:2] == (text[:at], "stop")
    assert "usage" not in streamed(port, **asked)[2][-1]


def test_neutral_parameters_are_accepted_and_change_nothing(port):
    asked = dict(max_tokens=6, temperature=0)
    neutral = {name: next(reversed(values), None) for name, values in api.NEUTRAL.items()}
    labels = dict(user="me", metadata={"a": "b"}, safety_identifier="x", prompt_cache_key="y")
    used = dict(n=1, top_p=1, top_k=-1, min_p=0, stop=[], stream=False, seed=1)
    nothing = dict.fromkeys(("logprobs", "top_logprobs", "stop", "tools", "max_completion_tokens", "anything"))
    plain = choice(port, **asked)
    assert choice(port, **asked, **neutral, **labels, **used, logprobs=False) == plain
    assert choice(port, **asked, **nothing) == plain
    complete = dict(path="/v1/completions", prompt="2+3=", **asked)
    assert choice(port, **complete, **neutral, **labels, **used) == choice(port, **complete)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models(batcher, port, stream):
    """At temperature 1, whatever the sampling; their bytes are the answer's."""
    asked = dict(max_tokens=7, temperature=3, top_k=100, seed=5, logprobs=True, top_logprobs=3)
    if stream:
        parts = [e["choices"][0] for e in streamed(port, **asked)[2]]
        text = "".join(p["delta"].get("content", "") for p in parts)
        entries = [entry for p in parts for entry in (p["logprobs"] or {"content": []})["content"]]
    else:
        answer = choice(port, **asked)
        text, entries = answer["message"]["content"], answer["logprobs"]["content"]
    assert bytes(b for e in entries for b in e["bytes"]).decode(errors="replace") == text
    tokens = [e["bytes"][0] for e in entries]
    prompt = list(b"2+3=")
    want = jax.nn.log_softmax(batcher.lm.logits(prompt + tokens))[len(prompt) - 1 : -1]
    np.testing.assert_allclose([e["logprob"] for e in entries], want[jnp.arange(7), jnp.array(tokens)], atol=1e-4)
    for row, entry in zip(want, entries):
        best = [t["logprob"] for t in entry["top_logprobs"]]
        np.testing.assert_allclose(best, jnp.sort(row)[::-1][:3], atol=1e-4)


def test_completions_take_texts_and_ids(batcher, port):
    complete = dict(path="/v1/completions", temperature=0, max_tokens=5)
    texts, ids = (ask(port, prompt=p, n=2, **complete)[1] for p in (["ab", "cd"], [[97, 98], [99, 100]]))
    assert texts["object"] == "text_completion" and texts["choices"] == ids["choices"]
    assert [c["index"] for c in texts["choices"]] == [0, 1, 2, 3]
    assert texts["usage"] == {"prompt_tokens": 4, "completion_tokens": 20, "total_tokens": 24}
    wanted = batcher.lm.generate(["ab", "cd"], max_new_tokens=5)
    assert [c["text"] for c in texts["choices"]] == [w for w in wanted for _ in "nn"]
    scored = choice(port, prompt=[97, 98], logprobs=2, **complete)
    assert scored["text"] == wanted[0] and streamed(port, prompt="ab", **complete)[0] == wanted[0]
    logprobs = scored["logprobs"]
    assert [max(t, key=t.get) for t in logprobs["top_logprobs"]] == logprobs["tokens"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4] and len(logprobs["token_logprobs"]) == 5
    drawn = choice(port, prompt="ab", logprobs=0, **complete | {"temperature": 3, "seed": 1})["logprobs"]
    assert [[*t.items()] for t in drawn["top_logprobs"]] == [[p] for p in zip(drawn["tokens"], drawn["token_logprobs"])]
    default = ask(port, path="/v1/completions", prompt="ab", seed=1)[1]["usage"]["completion_tokens"]
    assert default <= 16
    assert api.ids(batcher.lm, "a<|eos|>") == [97, 257]
    with_bos = dataclasses.replace(batcher.lm, tokenizer=load_tokenizer("bytes"))
    with_bos.tokenizer.prefix = (256,)
    assert api.ids(with_bos, "a") == api.ids(with_bos, "<|bos|>a") == [256, 97]


def test_a_seed_repeats_an_answer_and_none_draws_anew(batcher, port):
    asked = dict(max_tokens=12, temperature=8)
    texts = lambda **more: [c["message"]["content"] for c in ask(port, n=3, **asked, **more)[1]["choices"]]
    first = texts(seed=7)
    assert first == texts(seed=7) and len(set(first)) == 3
    assert first[0] == batcher.lm.generate("2+3=", max_new_tokens=12, temperature=8.0, seed=7)[0]
    assert texts(seed=1 << 60) == texts(seed=1 << 60) != first
    assert texts() != texts()


def test_more_tokens_than_fit_are_clamped(port):
    for name in ("max_tokens", "max_completion_tokens"):
        status, answer, _ = ask(port, temperature=0, **{name: 32000})
        assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == LENGTH
    status, answer, _ = ask(port, messages=[{"role": "user", "content": "x" * LENGTH}])
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("status", "param", "request_"),
    [
        (404, None, dict(method="GET", path="/")),
        (405, None, dict(method="GET")),
        (404, "model", dict(model="other")),
        (404, "model", dict(method="GET", path="/v1/models/other")),
        (400, "model", dict(model=None)),
        (400, None, dict(body="{")),
        (400, None, dict(body="[1]")),
        (400, None, dict(body='{"a":' * 100_000)),
        (400, None, dict(messages=[{"role": "user", "content": "\ud800"}])),
        (400, None, dict(body=b'{"model": "\xff"}')),
        (400, "messages", dict(messages=[])),
        (400, "messages[0].content", dict(messages=[{"role": "user"}])),
        (400, "messages[0]", dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])),
        (400, "messages[0].audio", dict(messages=[{"role": "user", "content": "", "audio": {"id": "1"}}])),
        (400, "messages", dict(messages=[{"role": "user", "content": "a", "name": "Ann"}])),  # has no template
        (400, "max_tokens", dict(max_tokens=0)),
        (400, "max_tokens", dict(max_tokens=True)),
        (400, "max_tokens", dict(max_tokens=1, max_completion_tokens=2)),
        (400, "temperature", dict(temperature="1")),
        (400, "temperature", dict(temperature=float("nan"))),
        (400, "n", dict(n=0)),
        (400, "n", dict(n=1000)),
        (400, "tools", dict(tools=[{}])),
        (400, "response_format", dict(response_format={"type": "json_object"})),
        (400, "frequency_penalty", dict(frequency_penalty=0.1)),
        (400, "logit_bias", dict(logit_bias={"1": 5})),
        (400, "made_up", dict(made_up=0)),
        (400, "prompt", dict(prompt="a")),
        (400, "top_logprobs", dict(top_logprobs=2)),
        (400, "top_logprobs", dict(logprobs=True, top_logprobs=21)),
        (400, "stop", dict(stop=["a"] * 5)),
        (400, "stop", dict(stop=[""])),
        (400, "user", dict(user=1)),
        (400, "stream_options", dict(stream_options={"include_usage": True})),
        (400, "stream_options", dict(stream=True, stream_options={"other": True})),
        (400, "prompt", dict(path="/v1/completions")),
        (400, "prompt", dict(path="/v1/completions", prompt=[[]])),
        (400, "n", dict(path="/v1/completions", prompt=["a"] * 5, n=20)),
        (400, None, dict(path="/v1/completions", prompt="")),
        (400, None, dict(path="/v1/completions", prompt=[320])),
        (400, "echo", dict(path="/v1/completions", prompt="a", echo=True)),
        (413, None, dict(headers={"Content-Length": str(1 << 30)}, body=b"")),
        (400, None, dict(headers={"Content-Length": "-1"}, body=b"")),
        (400, None, dict(headers={"Content-Length": "9" * 5000}, body=b"")),
        (400, None, dict(headers={"A": "b" * 1_000_000})),
        (415, None, dict(headers={"Content-Type": "text/plain"})),
        (403, None, dict(headers={"Host": "evil.example"}, method="GET", path="/v1/models")),
    ],
)
def test_requests_are_refused_in_one_line(port, status, param, request_):
    got, answer, _ = ask(port, **request_)
    error = answer["error"]
    assert (got, error["param"]) == (status, param) and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}


def test_models_health_and_metrics(port):
    get = lambda path: ask(port, path, "GET")[:2]
    assert [m["id"] for m in get("/v1/models")[1]["data"]] == ["base", "c", "d"]
    assert get("/v1/models/c")[1]["id"] == "c"
    assert get("/health") == (200, {"status": "ok"})

    def count():
        lines = [line.split(" ") for line in get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = count()
    ask(port, max_tokens=5, temperature=0)
    after = count()
    gained = lambda name: after[name] - before[name]
    assert gained('kungfu_tokens_total{kind="completion"}') == 5 and gained('kungfu_tokens_total{kind="prompt"}') == 4
    assert gained('kungfu_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert gained("kungfu_first_token_seconds_count") == 1 and after["kungfu_requests_waiting"] == 0


# --- messages and templates ---

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
)
USERS_ONLY = "{% for m in messages if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "fi"}, {"type": "text", "text": "ve"}]},
]


def rendered(template, chat):
    model, base, _ = make()
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = template
    return tokenizer.decode(messages.encode(LM(model, base, tokenizer), messages.turns(chat)))


def test_messages_are_rendered_by_the_template():
    call = '{"name": "add", "arguments": {"a": 1}}'
    assert rendered(CALLS, TOOLS) == f"<user>2+3=<assistant>{call}<tool>five<a>"
    developer = [{"role": "developer", "content": "be short"}, *USER]
    assert rendered(CHATML, developer) == "<system>be short<user>2+3=<a>"
    named = CHATML.replace("m.role", "m.name or m.role")
    assert rendered(named, [USER[0] | {"name": "Ann"}]) == "<Ann>2+3=<a>"
    thoughts = [{"role": "assistant", "content": "5", "reasoning_content": "easy"}]
    assert rendered(CHATML + "{% if messages[-1].reasoning_content and false %}{% endif %}", thoughts)


@pytest.mark.parametrize(
    ("template", "chat", "why"),
    [
        (CHATML, TOOLS, "does not render tool calls"),
        (CHATML, [USER[0] | {"name": "Ann"}], "does not render 'name'"),
        (CHATML, [{"role": "assistant", "content": "5", "thinking": "easy"}], "does not render 'thinking'"),
        (USERS_ONLY, [{"role": "system", "content": "be short"}, *USER], "messages of role 'system'"),
        (USERS_ONLY, [*USER, {"role": "tool", "content": "five"}], "messages of role 'tool'"),
        (None, TOOLS, "no chat template"),
        (CHATML, [{"role": "root<|eos|>", "content": ""}], "needs a role"),
        (CALLS, [{"role": "assistant", "tool_calls": [{"function": {"name": "<|eos|>"}}]}], "control token"),
        (CALLS, [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}], "JSON object"),
        (CALLS, [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}], "'function'"),
        (CHATML, [{"role": "user", "content": "<|eos|>"}], "control token"),
        (CHATML, [USER[0] | {"mood": "good"}], "mood is not supported"),
        (CHATML, [USER[0] | {"content": [{"type": "text", "text": "a", "mood": "good"}]}], "mood is not supported"),
        (CALLS, [{"role": "assistant", "tool_calls": [CALL | {"mood": "good"}]}], "mood is not supported"),
    ],
)
def test_what_a_template_would_drop_is_refused(template, chat, why):
    with pytest.raises((Refused, UserError), match=why):
        rendered(template, chat)


def test_an_adapter_is_asked_as_it_was_trained(batcher, tmp_path):
    """With the tokenizer and the template of its folder, where they are not the base's."""
    own = load_tokenizer("bytes")
    own.chat_template, own.eos_id = CHATML, 10
    for name, tokenizer in {"c": own, "d": batcher.lm.tokenizer, "f": own}.items():
        tokenizer.save(tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "adapter_config.json").write_text("{}")
    found = models._own_tokenizers({name: tmp_path / name for name in "cdef"}, batcher.lm.tokenizer)
    assert found.keys() == {"c", "f"} and found["c"] is found["f"]
    lm = dataclasses.replace(batcher.lm, tokenizers=found)
    plain, asked = (messages.encode(lm.speaking(name), messages.turns(USER)) for name in (None, "c"))
    assert plain == list(b"2+3=") and own.decode(asked) == chat.render(USER, own, True)
    assert Batcher(lm, rows=1, length=16).ends == {None: (257,), "c": (10,), "d": (257,)}
    ask = lambda *names: lm.generate(["a"] * len(names), adapters=names, max_new_tokens=20)
    assert ask("c", "d") == [ask("c")[0], ask("d")[0]]  # each ends at its own tokens


def test_text_is_held_back_while_it_may_begin_a_stop_string():
    assert [api._held_back(t, ["abc", "ca"]) for t in ("", "x", "xa", "ab", "abx", "xc", "abcc")] == [
        0, 0, 1, 2, 0, 1, 1]  # fmt: skip


# --- clients that misbehave, and many of them ---


def head_of(length, path="/v1/chat/completions"):
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    return head.encode()


def request_of(**content):
    body = json.dumps({"model": "base", "messages": USER} | content).encode()
    return head_of(len(body)) + body


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(batcher, port, monkeypatch, stream):
    step = batcher.step
    monkeypatch.setattr(batcher, "step", lambda: (step(), time.sleep(0.05)))  # 92 tokens would take 5 seconds
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(request_of(n=6, temperature=0, stream=stream))  # two of them wait for a row
        wait(lambda: all(batcher.rows) and len(batcher.waiting) == 2)
        requests = [*batcher.rows, *batcher.waiting]
    wait(lambda: not any(batcher.rows) and not batcher.waiting)  # a step may have to be compiled first
    assert all(len(r.tokens) < 60 for r in requests)


def test_a_request_has_a_deadline_however_it_drips(port, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.5)
    monkeypatch.setattr(connection, "LINGER", 0.2)
    whole = request_of(max_tokens=1)
    for start in (0, len(head_of(len(whole))) + 2):  # within the headers, within the body
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            begin = time.monotonic()
            client.sendall(whole[:start])
            with contextlib.suppress(OSError):
                for at in range(start, start + 40):
                    client.sendall(whole[at : at + 1])
                    time.sleep(0.05)
            assert time.monotonic() - begin < 2
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(whole[:20])
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:  # one after the other is no drip
        for _ in range(4):
            client.sendall(request_of(max_tokens=1))
            assert client.recv(10_000).startswith(b"HTTP/1.1 200")
            time.sleep(0.2)


def test_a_client_that_does_not_read_is_cut(monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    sent = []

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})) is None:
            sent.append(time.monotonic())
            if not server.server_state.connections:
                return

    config = uvicorn.Config(endless, http=connection.Connection, ws="none", lifespan="off", log_level="error")
    server, listening = uvicorn.Server(config), loopback.listen(0)
    port, thread = listening.getsockname()[1], threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait(lambda: sent and not server.server_state.connections, 5)
    assert sent[-1] - sent[-2] > 0.2
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_clients_and_waiting_requests_are_bounded(batcher, port, monkeypatch):
    monkeypatch.setattr(batcher, "limit", 0)
    status, answer, headers = ask(port)
    assert status == 429 and headers["Retry-After"] and answer["error"]["type"] == "rate_limit_error"
    monkeypatch.setattr(connection, "CONNECTIONS", 0)
    status, answer, headers = ask(port, path="/health", method="GET")
    assert status == 429 and headers["Retry-After"] and answer["error"]["type"] == "rate_limit_error"


class Broken(Batcher):
    def step(self):
        raise ArithmeticError("the step broke")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_batch_is_answered_and_ends_the_server(batcher, stream):
    broken = Broken(batcher.lm, rows=1, length=16)
    with running(broken) as (port, errors), socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request_of(stream=stream))
        text = b"".join(iter(lambda: client.recv(1000), b"")).decode()
    assert "the step broke" in text and "server_error" in text and "[DONE]" not in text
    assert [str(e) for e in errors] == ["the step broke"]


@pytest.mark.slow
def test_64_clients_are_all_answered(port):
    """Each of them connects anew for each of its 15 requests."""
    statuses = []

    def client():
        for _ in range(15):
            status, _, headers = ask(port, max_tokens=4, temperature=0)
            statuses.append(status)
            assert status == 200 or headers["Retry-After"]

    threads = [threading.Thread(target=client) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 960 and set(statuses) <= {200, 429} and statuses.count(200) > 480


@pytest.mark.slow
def test_200_clients_that_drip_do_not_slow_an_honest_one(port, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 5.0)

    def p95():
        seconds = []
        for _ in range(60):
            begin = time.perf_counter()
            assert ask(port, max_tokens=8, temperature=0)[0] == 200
            seconds.append(time.perf_counter() - begin)
        return sorted(seconds)[56]

    p95()
    alone = p95()
    whole = request_of()
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(200)]
    done = threading.Event()

    def drip():
        for at in range(60):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(whole[at : at + 1])
            if done.wait(1):
                return

    thread = threading.Thread(target=drip)
    thread.start()
    among = p95()
    time.sleep(6)
    done.set()
    thread.join()
    for client in clients:  # all are cut
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
        client.close()
    assert among < 2 * alone + 0.005


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model, base, _ = make()
    export_hf(model, base, load_tokenizer("bytes"), folder, check=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(exported, number):
    command = [sys.executable, "-m", "tools.serve", str(exported), "--name=tiny", "--port=0", "--length=128"]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert line.endswith("/v1 serves tiny\n"), process.stderr.read()
        port = int(line.split("/")[2].split(":")[1])
        ask(port, model="tiny", max_tokens=2)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(request_of(model="tiny", stream=True, max_tokens=120, temperature=0))
            text = client.recv(100)
            process.send_signal(number)
            text += b"".join(iter(lambda: client.recv(10_000), b""))
        assert b'"finish_reason": "length"' in text and b"data: [DONE]" in text
        assert process.wait(60) == 0
        assert not process.stderr.read()


# --- the official client ---


@pytest.fixture
def openai_client(port):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


ASKED = dict(model="c", messages=USER, max_tokens=24, temperature=8, seed=4)


@pytest.mark.parity
def test_every_parameter_of_the_openai_client_is_in_a_table():
    """So that none is refused as unknown."""
    from openai.resources.chat.completions import Completions as Chat
    from openai.resources.completions import Completions

    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "messages", "prompt"}
    for create, fields in ((Chat.create, api.CHAT), (Completions.create, api.COMPLETION)):
        asked = inspect.signature(create).parameters.keys() - own
        assert not asked - {*fields, *api.READ, *api.LABELS, *api.NEUTRAL}


@pytest.mark.parity
def test_openai_client_chats(openai_client, batcher):
    create = openai_client.chat.completions.create
    answer = create(**ASKED, n=2, frequency_penalty=0, logit_bias={}, response_format={"type": "text"}, tools=[])
    first, second = answer.choices
    want = batcher.lm.generate("2+3=", adapters=["c"], max_new_tokens=24, temperature=8.0, seed=4)[0]
    assert first.message.content == want != second.message.content and first.message.role == "assistant"
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == 48
    stopped = create(**ASKED, stop=[want[3:6]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (want[:3], "stop")
    history = [*USER, first.message.model_dump(), *USER]
    assert create(**ASKED | {"messages": history, "max_tokens": 2}).usage.completion_tokens == 2

    events = list(create(**ASKED, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2))
    parts = [e.choices[0] for e in events if e.choices]
    assert "".join(p.delta.content or "" for p in parts) == want and parts[-1].finish_reason == "length"
    assert events[-1].usage.total_tokens == 28
    whole = create(**ASKED, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    entries = [entry for p in parts if p.logprobs for entry in p.logprobs.content]
    assert [e.token for e in entries] == [e.token for e in whole] and len(whole) == 24
    assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in whole], abs=1e-4)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in whole)
    with create(**ASKED | {"max_tokens": 10_000}, stream=True) as stream:
        next(iter(stream))  # and leaves
    wait(lambda: not any(batcher.rows))


@pytest.mark.parity
def test_openai_client_completes_and_lists(openai_client, batcher):
    create = openai_client.completions.create
    asked = dict(model="base", prompt="2+3=", max_tokens=5, temperature=0)
    want = batcher.lm.generate("2+3=", max_new_tokens=5)[0]
    answer = create(**asked, logprobs=1, best_of=1, echo=False)
    assert answer.choices[0].text == want and len(answer.choices[0].logprobs.tokens) == 5
    assert "".join(e.choices[0].text for e in create(**asked, stream=True)) == want
    assert [m.id for m in openai_client.models.list()] == ["base", "c", "d"]
    assert openai_client.models.retrieve("d").id == "d"


@pytest.mark.parity
def test_openai_client_raises_its_own_errors(openai_client, batcher, monkeypatch):
    import openai

    create = openai_client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="other", messages=USER)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="json_object") as refused:
        create(**ASKED, response_format={"type": "json_object"})
    assert refused.value.param == "response_format" and refused.value.type == "invalid_request_error"
    monkeypatch.setattr(batcher, "limit", 0)
    with pytest.raises(openai.RateLimitError):
        create(**ASKED)
