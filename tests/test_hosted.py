"""A model behind OpenAI's HTTP format: our own server, and a scripted one that is busy, broken or away."""

import json
import socket

import pytest

from common.errors import UserError
from evals import main
from evals.run import evaluate
from infer import hosted
from infer.lm import LM
from infer.serve.batcher import Batcher
from tests.cases import people
from tests.helpers.adapters import make
from tests.helpers.serving import running, said, scripted

ROWS = [{"question": f"{i}?", "answer": str(i)} for i in range(10)]


@pytest.fixture(scope="module")
def served():
    model, params, _ = make()
    lm = LM(model, params, people.tokenizer())
    with running(Batcher(lm, rows=4, length=160)) as (port, errors):
        yield lm, f"openai:http://127.0.0.1:{port}/v1#base"
    assert not errors


@pytest.mark.slow
def test_answers_and_tokens_are_those_of_the_served_model(served):
    lm, name = served
    there = hosted.parse(name + "?in=2&out=10")
    prompts = ["2+3=", "ab", "2+3="]
    assert there.generate(prompts, max_new_tokens=8) == lm.generate(prompts, max_new_tokens=8)
    used = there.used()
    read, written = sum(map(len, prompts)), used.completion_tokens or 0
    assert used[:2] == (3, read) and 3 <= written <= 24
    assert used.usd == pytest.approx((2 * read + 10 * written) / 1e6)
    chat = [[{"role": "user", "content": "2+3="}]]
    assert there.generate(chat, max_new_tokens=8) == lm.generate(chat, max_new_tokens=8)
    drawn = there.generate(["ab"] * 4, max_new_tokens=8, temperature=8.0, seed=1)
    assert len(set(drawn)) == 4 and drawn == there.generate(["ab"] * 4, max_new_tokens=8, temperature=8.0, seed=1)


def test_an_evaluation_of_it_is_that_of_the_model(served, tmp_path, capsys):
    lm, name = served
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    task = f"{tmp_path}/rows.jsonl"
    assert main.main([f"--model={name}?in=1&out=1", f"--tasks={task}", f"--out={tmp_path}/out"]) == 0
    [line] = map(json.loads, (tmp_path / "out" / "evals.jsonl").read_text().splitlines())
    ours = evaluate(task, lm)
    assert line["scores"] == ours.scores and line["flops"] is None and line["gas"]["usd"] == line["usd"] > 0
    assert line["usd"] == pytest.approx((line["prompt_tokens"] + line["completion_tokens"]) * line["n"] / 1e6)
    assert "on this machine" in capsys.readouterr().out
    assert main.main([f"--model={name}", "--text=pydocs"]) == 2


def test_a_busy_endpoint_is_asked_again(monkeypatch):
    monkeypatch.setenv(hosted.KEY, "secret")
    busy = (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}})
    with scripted(busy, busy, said("4", prompt_tokens=5, completion_tokens=1)) as (url, asked):
        [reply] = hosted.parse(f"openai:{url}#m").ask([[{"role": "user", "content": "2+2="}]], stop=["\n"])
    assert (reply.text, reply.prompt_tokens, len(asked)) == ("4", 5, 3)
    path, headers, body = asked[-1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["stop"], body["temperature"], "seed" in body) == ("m", ["\n"], 0, False)


BROKEN = {
    "no answer": (200, {}, {"choices": []}),
    "cannot be read": (200, {}, b"<html>"),
    "answers 401: no key.*OPENAI_API_KEY": (401, {}, {"error": {"message": "no key"}}),
    "answers 404: no model": (404, {}, {"error": "no model"}),
    "answers 503.*4 attempts": (503, {"Retry-After": "0"}, b"down"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_endpoint_is_one_line(problem):
    with scripted(BROKEN[problem]) as (url, asked), pytest.raises(UserError, match=problem) as found:
        hosted.parse(f"openai:{url}#m").generate(["x"] * 40)
    assert "\n" not in str(found.value) and f"{url}#m" in str(found.value)
    assert len(asked) <= hosted.AT_ONCE * hosted.TRIES  # the rest is not paid


def test_an_endpoint_that_is_away_is_one_line(monkeypatch):
    monkeypatch.setattr(hosted, "WAIT", 0.01)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        name = f"openai:http://127.0.0.1:{s.getsockname()[1]}/v1#m"
        with pytest.raises(UserError, match=r"no reply: .*refused \(4 attempts\)"):
            hosted.parse(name).generate("x")


def test_usage_that_is_not_sent_is_unknown():
    with scripted(said("4")) as (url, _):
        there = hosted.parse(f"openai:{url}#m?in=1&out=1")
        there.generate("x")
    assert there.used() == (1, None, None, None) and "n/a prompt + n/a answer tokens · $ n/a" in str(there)


@pytest.mark.parametrize(
    "name",
    ["openai:x#m", "openai:http://h", "openai:http://h#m?in=1", "openai:http://h#m?in=x&out=1", "openai:ftp://h#m"],
)
def test_a_name_that_cannot_be_read_is_one_line(name):
    with pytest.raises(UserError, match=r"hosted model needs|not two prices"):
        hosted.parse(name)
    assert hosted.parse("openai:https://api.example.com/v1#m").leaves
    with pytest.raises(UserError, match="password") as found:
        hosted.parse("openai:https://me:pw@example.com/v1#m")
    assert "pw@" not in str(found.value)
