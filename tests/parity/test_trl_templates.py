"""Chats by the templates of TRL: the text is transformers', and what is learnt is what their training twins mark.

The tables say where it is not, and why; a test fails when a template no longer belongs there.
"""

import copy
import json
import re
from pathlib import Path

import pytest

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from common.errors import UserError  # noqa: E402
from data.text import chat, formats, template  # noqa: E402

pytestmark = pytest.mark.parity
TEMPLATES = Path(trl.__file__).with_name("chat_templates")
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
PICTURES = {"idefics3", "smolvlm"}  # take no text but in parts beside pictures
FAMILIES = [name for name in NAMES if f"{name}_training" in NAMES and name not in PICTURES]
CONTROL = r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|<(?:start|end)_of_turn>|<\w+\|>|<\|\w+>"

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "one"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "3"}
SYSTEM, ASKED, MORE = ({"role": role, "content": text} for role, text in
                       (("system", "Be brief."), ("user", "Hi"), ("user", " How? \n")))  # fmt: skip


def said(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


THOUGHT = said("Hello", reasoning_content="Hm, let me see.")
CHATS = {
    "one": [ASKED, said("Hello")],
    "system": [SYSTEM, ASKED, said("Hello")],
    "turns": [ASKED, said("Hello"), MORE, said("  So.\n")],
    "thought": [ASKED, THOUGHT],
    "thoughts": [SYSTEM, ASKED, THOUGHT, MORE, said("So", reasoning_content="Now.")],
    "thought in the text": [ASKED, said("<think>\nHm.\n</think>\n\nHello")],
    "tools": [ASKED, said("Hello")],
    "tools, system": [SYSTEM, ASKED, said("Hello")],
    "call": [ASKED, said("", tool_calls=[CALL]), RESULT, said("3 it is")],
    "call and text": [ASKED, said("I do.", tool_calls=[CALL]), RESULT, said("3 it is"), MORE, said("Bye")],
    "two calls": [ASKED, said("", tool_calls=[CALL, CALL]), RESULT, RESULT, said("3 it is")],
    "call and thought": [ASKED, said("", reasoning_content="Add.", tool_calls=[CALL]), RESULT, said("It is 3")],
}


def tools(name: str) -> list[dict] | None:
    return [TOOL] if "tools" in name or "call" in name else None


def tokenizer(name: str):
    """Bytes, and the control tokens that a template and its twin write."""
    text = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    twin = TEMPLATES / f"{name}_training.jinja"
    tokens = sorted(set(re.findall(CONTROL, text + (twin.read_text("utf-8") if twin.is_file() else ""))))
    made = formats.byte_tokenizer()
    made.core.add_special_tokens(tokens)
    made.chat_template = text
    return made


def reference(ours):
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=ours.core, chat_template=ours.chat_template, **names)


def as_json(messages: list[dict]) -> list[dict]:
    """The calls with their arguments written out."""
    written = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)
    call = CALL | {"function": CALL["function"] | {"arguments": written}}
    return [m | ({"tool_calls": [call] * len(m["tool_calls"])} if "tool_calls" in m else {}) for m in messages]


# ---- the text ----

NO_CALLS = {"llama3", "phi3", "phi3_5", "lfm2", "cohere2", "idefics3", "smolvlm", "qwen2_5_vl", "deepseek_r1_distill"}
NO_CALLS |= {"gptoss"}  # all but the first


@pytest.mark.parametrize("name", NAMES)
def test_text(name):
    ours = tokenizer(name)
    theirs, family, dropped = reference(ours), name.removesuffix("_training"), False
    for case, messages in CHATS.items():
        for prompt in (False, True):
            asked = {"tools": tools(case), "tokenize": False, "add_generation_prompt": prompt}
            shown = messages[:-1] if prompt else messages
            have = refused_or(chat.render, copy.deepcopy(shown), ours, prompt, tools(case))
            want = refused_or(theirs.apply_chat_template, copy.deepcopy(shown), **asked)
            if isinstance(have, Exception) and isinstance(want, Exception):
                continue
            if "does not render tool calls" in str(have):
                dropped = True
            elif name == "deepseekv3" and "call" in case:  # it adds arguments to a text: they must be one
                assert have == theirs.apply_chat_template(as_json(shown), **asked), case
            elif family == "deepseek_r1_distill" and "call" in case:  # shows them where the content is null, which
                assert "<｜tool▁sep｜>add" in have and "<｜tool▁sep｜>" not in want, case  # transformers takes away
            else:
                assert have == want, case
    assert dropped == (family in NO_CALLS)


def refused_or(render, *args, **more):
    try:
        return render(*args, **more)
    except (UserError, Exception) as error:  # templates raise whatever they like
        return error


# ---- what is learnt ----

ALL = [*CHATS]
OPENED = "the model's own prompt opens a thought, which the twin does not close"
FORGETS = "the twin drops earlier thoughts; ours writes each answer as the model is asked for it"
TWINS_DIFFER = {  # reason, chats
    "deepseek_r1_distill": (OPENED, [c for c in ALL if c not in ("thought in the text", "call and text")]),
    "deepseekv3": (OPENED + "; the last answer alone where tools are called", [c for c in ALL if c != "call and text"]),
    "glm4moe": ("the twin writes the head of the next turn as the end of an answer", ALL),
    "gptoss": ("earlier answers end otherwise than the model is asked for: the last alone", ["turns", "thoughts"]),
    "diffusion_gemma": (
        FORGETS + "; a call's result goes on within the turn, but the prompt behind it does not",
        ["thoughts", *(case for case in ALL if "call" in case)],
    ),
    "qwen3_5_nothink": ("the prompt closes the thought: the last answer alone", ["call and thought"]),
    **{
        f"nemotron_{name}": (f"{OPENED}; {FORGETS}", [c for c in ALL if c not in ("thought", "thought in the text")])
        for name in ("3_nano", "3_super", "3_ultra", "3_5_lightning")
    },
}


def learnt_by_twin(name: str, messages: list[dict], given: list[dict] | None) -> tuple[str, list[str]]:
    """The text of a chat by the training twin, and what its mask covers."""
    twin = tokenizer(f"{name}_training")
    asked = {"tools": given, "return_dict": True, "return_assistant_tokens_mask": True}
    found = reference(twin).apply_chat_template(copy.deepcopy(messages), **asked)
    return covered(twin, found["input_ids"], found["assistant_masks"])


def covered(tok, ids: list[int], mask: list[int]) -> tuple[str, list[str]]:
    """The text, and each stretch of it that a mask covers."""
    edges = [i for i in range(len(ids) + 1) if (i < len(ids) and mask[i]) != (i > 0 and mask[i - 1])]
    return tok.decode(ids), [tok.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_twin(name):
    """By the twin itself the ids and every mask are equal."""
    for case, messages in CHATS.items():
        ours = tokenizer(f"{name}_training")
        have = refused_or(chat.tokens_and_mask, copy.deepcopy(messages), ours, tools(case))
        want = refused_or(learnt_by_twin, name, messages, tools(case))
        if not isinstance(have, Exception):
            no_calls = name == "deepseek_r1_distill" and "call" in case  # as in test_text
            assert no_calls or covered(ours, *have) == want, case
        elif "does not render tool calls" not in str(have) and "leaves out the text of an answer" not in str(have):
            assert isinstance(want, Exception), (case, have)


TWINS = {"qwen3": "qwen3", "qwen3_instruct_2507": "chatml", "deepseek_r1_distill": "deepseek_r1", "llama3": "llama3"}
TWINS |= {"gemma": "gemma", "gemma3": "gemma", "phi3": "phi3", "phi3_5": "phi3"}


@pytest.mark.parametrize("name", TWINS)
def test_named_twin(name):
    """Our own twin of a family learns what the model's template does, behind the same first prompt."""
    for case, messages in CHATS.items():
        own, twin = tokenizer(name), tokenizer(name)
        twin.chat_template = template.named(TWINS[name])
        want = refused_or(chat.tokens_and_mask, copy.deepcopy(messages), own)
        if tools(case) or isinstance(want, Exception):
            continue
        assert covered(own, *want)[1] == covered(twin, *chat.tokens_and_mask(copy.deepcopy(messages), twin))[1], case
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        assert chat.render(messages[:first], own, True) == chat.render(messages[:first], twin, True), case


@pytest.mark.parametrize("name", FAMILIES)
def test_own_template(name):
    """By the model's own template: equal, less what the prompt has written and what follows the end of an answer."""
    differs = {}
    for case, messages in CHATS.items():
        ours = tokenizer(name)
        have = refused_or(chat.tokens_and_mask, copy.deepcopy(messages), ours, tools(case))
        want = refused_or(learnt_by_twin, name, messages, tools(case))
        if isinstance(have, Exception) or isinstance(want, Exception):
            continue
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [chat.render(copy.deepcopy(messages[:i]), ours, True, tools(case)) for i in answers]
        (text, mine), (whole, theirs) = covered(ours, *have), want
        if (text, cut(mine, [])) != (whole, cut(theirs, prompts)):
            differs[case] = mine, theirs
    assert set(differs) == set(TWINS_DIFFER.get(name, ("", []))[1]), differs


def cut(stretches: list[str], prompts: list[str]) -> list[str]:
    """Stretches less what a prompt ends with at their heads, and less space and EOS behind their end tokens."""
    found = []
    for stretch in stretches:
        heads = [stretch[:n] for n in range(len(stretch), 0, -1) for prompt in prompts if prompt.endswith(stretch[:n])]
        stretch = stretch.removeprefix(heads[0] if heads else "")
        found.append(re.sub(r"(?<=>)(\s|<\|eos\|>)+$", "", stretch))
    return found
