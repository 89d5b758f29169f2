"""Chats: what is learnt is what the assistant wrote, on every path; templates cannot get out of their sandbox."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from data import dataset
from data.text import chat, formats, template
from data.text import tokenizer as tokenizer_module

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "A: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "\n Hello, 42!"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Ünïcode 世界 "},
]


def make(chat_template: str | None = None, spec: str = "bytes"):
    words = "Hello Hi More assistant user Hello Hi\n\n A: U: Hello\n"
    tok = formats.load(spec, lambda: [words] * 20)
    tok.chat_template = chat_template
    return tok


def learnt(tok, ids, mask) -> str:
    return tok.decode([i for i, inside in zip(ids, mask) if inside])


@pytest.mark.parametrize("spec", ["bytes", "bpe:300", "spm:300"])
@pytest.mark.parametrize("text", [None, MARKED])
def test_learns_the_assistant_and_its_end_token(spec, text):
    tok = make(text, spec)
    end = tok.core.id_to_token(tok.eos_id)
    ids, mask = chat.tokens_and_mask(TURNS, tok)
    assert learnt(tok, ids, mask) == f"\n Hello, 42!{end}Ünïcode 世界 {end}"
    assert tok.decode(ids) == chat.render(TURNS, tok)


def test_by_hand():
    """The prompt is only read; Yo and the end token are learnt, the newline behind it is not."""
    tok = make()
    ids, mask = chat.tokens_and_mask([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], tok)
    prompt = b"### user\nHi\n### assistant\n"
    assert ids == [*prompt, *b"Yo", 257, 10]
    assert mask == [0] * len(prompt) + [1, 1, 1, 0]


def test_first_leaves_earlier_turns_out():
    for text in (None, MARKED):
        tok = make(text)
        ids, mask = chat.tokens_and_mask(TURNS, tok, first=2)
        assert learnt(tok, ids, mask) == "Ünïcode 世界 <|eos|>"


def test_training_ids_start_with_the_ids_of_serving():
    """The prompt's ids do not change when the answer is known, even where a merge would cross the boundary."""
    for spec in ("bytes", "bpe:300", "spm:300"):
        tok = make(None, spec)
        asked = chat.encode(TURNS[:1], tok)
        assert chat.tokens_and_mask(TURNS[:2], tok)[0][: len(asked)] == asked


def test_exactly_one_bos():
    tok = make(MARKED)
    assert chat.tokens_and_mask(TURNS, tok)[0].count(tok.bos_id) == 1
    assert chat.encode(TURNS[:1], tok).count(tok.bos_id) == 1


def test_boundary_token_goes_to_neither_side():
    """A merge of "\\n" and "\\n" across the edge is undone; the mask then starts exactly at the answer."""
    tok = make(None, "bpe:300")
    text = "A:\n\nHello\n"
    ids, mask = chat.mask_ids(text, [(3, 9)], tok)
    assert tok.decode(ids) == text and learnt(tok, ids, mask) == "\nHello"


@pytest.mark.parametrize(
    "messages, chat_template, said",
    [
        ([{"role": "user", "content": "x"}], None, "no assistant turn"),
        ([TURNS[0], {"role": "assistant", "content": ""}], "{{ messages[0].content }}", "the loss mask covers ''"),
        (TURNS, "{{ messages|length }}", "not a prefix of the whole"),
        (TURNS, "{% if %}", "chat template"),
        (TURNS, "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ([{"role": "user", "content": "a<|eos|>"}], None, "spells the control token"),
        ([{"content": "a"}], None, "needs a role"),
    ],
)
def test_refusals(messages, chat_template, said):
    with pytest.raises(UserError, match=said) as error:
        chat.tokens_and_mask(messages, make(chat_template))
    assert "\n" not in str(error.value)


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages|attr('__class__').__name__ }}",
    "{{ lipsum.__globals__['os'].popen('id') }}",
    "{{ _tick.__self__.globals }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ range(1000000000) }}",
    "{{ 'a' * 1000000000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'aaaa'|replace('a', 'b' * 1000000)|replace('b', 'c' * 1000) }}",
    "{% set n = namespace(x='aa') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "{{ range(99)|random }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_sandbox_refuses(attack):
    start = time.perf_counter()
    with pytest.raises(UserError):
        template.render(attack, messages=TURNS)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "attack, limit",
    [
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "rendering takes more than 2 s of CPU time",
        ),
        ("{% set a = 'a' * 10 ** 9 %}", "rendering takes more than 512 MiB of memory"),
        (
            "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
            "the template writes more than 16,777,216 characters",
        ),
    ],
)
def test_a_limit_is_one_line_that_names_the_template_and_the_next_chat_is_rendered(attack, limit):
    with pytest.raises(template.TemplateLimit) as error:
        template.render(attack, messages=TURNS)
    assert str(error.value).startswith(f"chat template {attack[:60]!r} · {limit}")
    assert template.render("{{ messages[0].content }}", messages=TURNS) == "Hi"


def test_a_template_that_takes_too_much_ends_the_reading_of_data(tmp_path):
    """No row is at fault, and every one would take as long."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9)
    with pytest.raises(UserError, match="more than 512 MiB of memory"):
        dataset.prepare(str(rows), make("{{ 'a' * 10 ** 9 }}"), folder=tmp_path / "cache", max_bad=1.0)


def test_a_fork_and_threads_render_apart():
    say = lambda i: template.render("{{ i }}" * 50, i=i) == str(i) * 50
    assert say(1)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(say, range(300)))
    if not (pid := os.fork()):
        os._exit(0 if all(map(say, range(20))) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and say(2)


def test_the_process_is_slim_and_ends_with_ours():
    """However ours ends, and even while a template runs: then it has two seconds left."""
    program = (
        "import os, sys\nfrom data.text import template\ntemplate.render('{{ 1 }}')\n"
        "print(template._RENDERER._process.pid, flush=True)\nassert 'jinja2' not in sys.modules\n"
        "sys.stdin.read(1)\nos.kill(os.getpid(), 9) if len(sys.argv) > 1 else None"
    )
    for killed in ([], ["killed"]):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        ours = subprocess.Popen([sys.executable, "-c", program, *killed], cwd=ROOT, **pipes)
        place = Path("/proc", ours.stdout.readline().decode().strip())
        libraries = (place / "maps").read_text()
        assert "_json" in libraries and "jaxlib" not in libraries and "numpy" not in libraries
        ours.communicate(b".")
        end = time.monotonic() + 5
        while place.exists() and (place / "stat").read_text().split()[2] != "Z":  # no child of ours to wait for
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.slow
def test_5000_chats_are_rendered_a_second():
    chats = [
        [{"role": "user", "content": f"{i}? " * 30}, {"role": "assistant", "content": "A. " * 60}] for i in range(5000)
    ]
    template.render(CHATML, messages=TURNS)
    start = time.perf_counter()
    for messages in chats:
        template.render(CHATML, messages=messages)
    rate = len(chats) / (time.perf_counter() - start)
    print(f"{rate:,.0f} chats/s")
    assert rate > 5000


def test_templates_get_what_they_use():
    text = (
        "{%- for m in messages if m['role'] == 'user' -%}{{ loop.index0 }}{{ m['content'] | trim }}{%- endfor -%}"
        "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.content.split('\\n') | last %}"
        "{% endfor %}{{ ns.last }}{{ ', '.join(['a', 'b']) }}{{ {'k': 'é'} | tojson }}{{ tools is none }}"
        "{{ messages[-1:] | map(attribute='role') | join }}{{ strftime_now('%Y') | length }}"
    )
    assert template.render(text, messages=TURNS[:3], tools=None) == '0Hi1MoreMorea, b{"k": "é"}Trueuser4'


@pytest.mark.parametrize("path", sorted(template.TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_named_templates_mark_what_is_learnt(path):
    """What is learnt stands behind the prompt that is served, and ends with an end token."""
    tok = make(template.named(path.stem))
    tok.core.add_special_tokens(["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"])
    turns = [{"role": "system", "content": "S"}, TURNS[0], {"role": "assistant", "content": "Yo"}, *TURNS[2:]]
    ids, mask = chat.tokens_and_mask(turns, tok)
    prompt = chat.encode(turns[:2], tok)
    assert ids[: len(prompt)] == prompt and mask[: len(prompt)] == [0] * len(prompt) and mask[len(prompt)] == 1
    last = [i for i, inside in zip(ids, mask) if inside][-1]
    assert "Yo" in learnt(tok, ids, mask) and tok.core.id_to_token(last) in tok.special
    with pytest.raises(UserError, match="no such file or template"):
        template.named("nonesuch")


def test_a_kept_system_text_is_for_chats_without_one():
    own, text = make(), 'Say "hé"\n{{ x }} %}'
    system = {"role": "system", "content": text}
    kept = make(template.with_system(tokenizer_module.DEFAULT_TEMPLATE, text))
    assert chat.render(TURNS[:1], kept, True) == chat.render([system, *TURNS[:1]], own, True)
    other = [{"role": "system", "content": "Other"}, *TURNS[:1]]
    assert chat.render(other, kept, True) == chat.render(other, own, True)
