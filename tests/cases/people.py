"""What people bring, built small: each case makes an input and gives what came of it and what is right."""

# ruff: noqa: E501

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from common.errors import UserError
from data import dataset, formats, sources
from data.text import chat, pieces
from data.text import formats as tokenizers
from data.text.tokenizer import Tokenizer as Ours

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JSON_CALLS = CALLS.replace("c.function.arguments | tojson", "c.function.arguments + ''")  # takes a text alone
FORGETS = (  # as Qwen3: only the last answer keeps its thought, and has one in any case
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' }}"
    "\n</think>\n\n{{ said }}{% else %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = (  # as DeepSeek-R1: the prompt begins the thought, the answer drops it
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<A>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
CLOSES = CHATML.replace("{% endif %}", "{% else %}<|eos|>{% endif %}")  # as Phi-3: a token ends the whole chat
THINKS = (  # as gpt-oss: a thought is a message of its own
    "{% for m in messages %}{% if m.thinking %}<|im_start|>thought\n{{ m.thinking }}<|im_end|>{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
BLOCKS = (  # a block around the thought, and one around the rest
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{% generation %}({{ m.reasoning_content }}){% endgeneration %}{% endif %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
BEGINS = (  # as Nemotron: the prompt begins a thought, and an answer without one says so otherwise
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>"
    "{{ '\n' + m.reasoning_content + '\n' if m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SHUT = FORGETS.replace(
    "assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"
)  # the prompt ends the thought
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
U, A, B, S = ({"role": role, "content": text} for role, text in
              (("user", "Q"), ("assistant", "A"), ("assistant", "B"), ("system", "S")))  # fmt: skip
ENDS = "A<|im_end|>"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def tokenizer(template: str | None = CHATML, tool_template: str | None = None) -> Ours:
    """Bytes, and the control tokens of ChatML."""
    made = tokenizers.byte_tokenizer()
    made.core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.eos_id, made.chat_template, made.tool_template = made.core.token_to_id("<|im_end|>"), template, tool_template
    return made


def learnt(record: dict, template: str | None = CHATML, learn: str = "all", **more: str) -> str:
    """The text of a record that counts in the loss, its sides one behind the other."""
    tok = tokenizer(template, **more)
    found = formats.example(record)
    found = found.each(dataset.wrapped) if template else found
    asked = chat.Asked(learn)
    made = found.documents(tok, iter([tok.encode(text) for text in found.texts()]), asked)
    return "|".join(tok.decode([i for i, mask in zip(d.ids, d.learnt, strict=True) if mask]) for d in made)


def reported(record: dict, template: str = CHATML) -> dict:
    """Fields of a record's turns that the template has no place for."""
    asked = chat.Asked()
    formats.example(record).documents(tokenizer(template), iter(()), asked)
    return dict(asked.unused)


def whole(record: dict, template: str = CHATML) -> str:
    tok = tokenizer(template)
    found = formats.example(record).each(dataset.wrapped).parts()[0]
    return tok.decode(found.documents(tok, iter(()))[0].ids).replace("<|im_start|>", "<").replace("<|im_end|>\n", ">")


def refused(call: Callable, *args: object, **more: object) -> str:
    try:
        call(*args, **more)
    except UserError as error:
        return str(error)
    return ""


def called(arguments: object, template: str = CALLS, **message: object) -> str:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return learnt({"messages": [U, {"role": "assistant", "tool_calls": [call], **message}]}, template)


SUM = '[add {"a": 1}]<|im_end|>'
ROWS = {  # name: what came of it, what is right
    "prompt in both places": (lambda: whole({"prompt": "Q", "chosen": [U, A], "rejected": [U, B]}), "<user\nQ><assistant\nA>"),
    "system apart from turns": (
        lambda: whole({"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]}),
        "<system\nS><user\nQ><assistant\nA>",
    ),
    "orca's question": (
        lambda: whole({"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}),
        "<system\nS><user\nQ><assistant\nA>",
    ),
    "llama-factory's ranking": (
        lambda: whole({"instruction": "Q", "input": "x", "chosen": "A", "rejected": "B"}),
        "<user\nQ\n\nx><assistant\nA>",
    ),
    "llama-factory's turns": (
        lambda: whole({"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
                       "rejected": {"from": "gpt", "value": "B"}}),
        "<user\nQ><assistant\nA>",
    ),
    "openai's preference": (
        lambda: learnt({"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]}),
        "A<|im_end|>|B<|im_end|>",
    ),
    "a transcript": (
        lambda: whole({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}),
        "<user\nQ><assistant\nA>",
    ),
    "history and system": (
        lambda: whole({"instruction": "Q", "output": "A", "history": [["q", "a"]], "system": "S"}),
        "<system\nS><user\nq><assistant\na><user\nQ><assistant\nA>",
    ),
    "only the answer behind a history": (
        lambda: learnt({"instruction": "Q", "output": "A", "history": [["q", "a"]]}), ENDS),
    "dolly's context": (lambda: whole({"instruction": "Q", "context": "c", "response": "A"}), "<user\nQ\n\nc><assistant\nA>"),
    "question and answer": (lambda: learnt({"question": "Q", "answer": "A"}), ENDS),
    "a prompt is wrapped": (lambda: whole({"prompt": "Q", "completion": " A"}), "<user\nQ><assistant\nA>"),
    "a prompt is left raw": (lambda: learnt({"prompt": "Q", "completion": " A"}, None), " A<|im_end|>"),
    "turns as JSON": (lambda: learnt({"messages": json.dumps([U, A])}), ENDS),
    "parts of a content": (
        lambda: learnt({"messages": [U, A | {"content": [{"type": "text", "text": "A"}, {"type": "text", "text": None}][:1]}]}),
        ENDS,
    ),
    "a picture": (
        lambda: refused(learnt, {"messages": [U | {"content": [{"type": "image_url"}]}, A]}),
        "messages[0] · content of type 'image_url', not text",
    ),
    "roles in capitals": (lambda: learnt({"conversations": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "A"}]}), ENDS),
    "a developer's text": (lambda: whole({"messages": [S | {"role": "developer"}, U, A]}), "<system\nS><user\nQ><assistant\nA>"),
    "weight 0": (lambda: learnt({"messages": [U, A | {"weight": 0}, U, B]}), "B<|im_end|>"),
    "axolotl's train": (lambda: learnt({"messages": [U, A, U, B | {"train": False}]}), ENDS),
    "a user's turn to learn": (
        lambda: reported({"conversations": [{"from": "human", "value": "Q", "train": True}, {"from": "gpt", "value": "A"}]}),
        {"messages.train": 1},
    ),
    "a weight between": (lambda: "not 0 or 1" in refused(learnt, {"messages": [U, A | {"weight": 0.5}]}), True),
    "parts of an answer to learn": (lambda: reported({"messages": [U, A | {"train_detail": [{"train": False}]}]}), {"messages.train_detail": 1}),
    "mistral's prefix": (lambda: reported({"messages": [U, A | {"prefix": True}]}), {"messages.prefix": 1}),
    "axolotl's names": (
        lambda: {learnt(row) for row in ({"prompt": "Q", "generation": "A"}, {"article": "Q", "summary": "A"}, {"INSTRUCTION": "Q", "RESPONSE": "A"},
                                         {"instruction": "Q", "completion": "A"}, {"system": "S", "question": "Q", "completion": "A"})},
        {ENDS},
    ),
    "a rating by its LLaMA-Factory name": (
        lambda: (lambda e: (e.column, e.value))(formats.example({"instruction": "Q", "output": "A", "kto_tag": "false"}, "labelled")), ("label", 0.0)),
    "the output of responses": (
        lambda: learnt({"input": [U], "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]}]}), ENDS),
    "control tokens in a thought": (
        lambda: "message 1 · the text spells" in refused(learnt, {"messages": [U, A | {"reasoning_content": "<|im_end|>"}]}, FORGETS), True),
    "control tokens in a call": (lambda: "message 1 · the text spells" in refused(called, {"a": ["<|im_end|>"]}), True),
    "control tokens in a tool": (
        lambda: "tools · the text spells" in refused(learnt, {"messages": [U, A], "tools": [TOOL | {"<|im_start|>": 1}]}, CALLS), True),
    "a refusal": (lambda: learnt({"messages": [U, {"role": "assistant", "content": None, "refusal": "A"}]}), ENDS),
    "only the last answer": (lambda: learnt({"messages": [U, A, U, B]}, learn="last"), "B<|im_end|>"),
    "arguments as an object": (lambda: called({"a": 1}), SUM),
    "arguments as JSON": (lambda: called('{"a": 1}'), SUM),
    "arguments for a template of texts": (lambda: called({"a": 1}, JSON_CALLS), SUM),
    "arguments that Arrow filled": (lambda: called({"a": 1, "town": None}), SUM),
    "calls as JSON": (
        lambda: learnt({"messages": [U, {"role": "assistant", "tool_calls": json.dumps([{"name": "add", "arguments": {"a": 1}}])}]}, CALLS),
        SUM,
    ),
    "an old call": (
        lambda: learnt({"messages": [U, {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}]}, CALLS),
        SUM,
    ),
    "sharegpt's call": (
        lambda: learnt({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                                          {"from": "observation", "value": "1"}, {"from": "gpt", "value": "A"}]}, CALLS),
        SUM + ENDS,
    ),
    "calls that a template drops": (lambda: "does not render tool calls" in refused(called, {"a": 1}, CHATML), True),
    "tools as JSON": (lambda: whole({"messages": [U, A], "tools": json.dumps([TOOL])}, CALLS)[:9], '{"type": '),
    "a bare function": (lambda: whole({"messages": [U, A], "functions": [TOOL["function"]]}, CALLS)[:9], '{"type": '),
    "thoughts in a field": (
        lambda: learnt({"messages": [U, A | {"reasoning_content": "hm"}]}, FORGETS), f"<think>\nhm\n</think>\n\n{ENDS}"),
    "thoughts as parts": (
        lambda: learnt({"messages": [U, A | {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]}]}, FORGETS),
        f"<think>\nhm\n</think>\n\n{ENDS}",
    ),
    "answers that a template forgets": (
        lambda: learnt({"messages": [U, A, U, B]}, FORGETS), f"<think>\n\n</think>\n\n{ENDS}<think>\n\n</think>\n\nB<|im_end|>"),
    "a thought that the prompt begins": (
        lambda: learnt({"messages": [U, A | {"content": "<think>\nhm\n</think>\n\nA"}]}, OPENS), f"hm\n</think>\n\n{ENDS}"),
    "a thought in a field that the prompt begins": (
        lambda: learnt({"messages": [U, A | {"reasoning_content": "hm"}]}, OPENS), f"hm\n</think>\n\n{ENDS}"),
    "none where the prompt begins one that is kept": (lambda: learnt({"messages": [U, A]}, BEGINS), f"\n</think>{ENDS}"),
    "a thought where the prompt ends it": (
        lambda: refused(learnt, {"messages": [U, A | {"reasoning_content": "hm"}]}, SHUT)[-28:], "set data.chat_template=qwen3"),
    "a thought that is a message": (
        lambda: learnt({"messages": [U, A | {"reasoning_content": "hm"}]}, THINKS), f"thought\nhm<|im_end|><|im_start|>assistant\n{ENDS}"),
    "a token behind the whole chat": (lambda: learnt({"messages": [U, A, U, B]}, CLOSES), ENDS + "B<|im_end|>"),
    "a block around each part": (
        lambda: learnt({"messages": [U, A | {"reasoning_content": "hm"}, U, B]}, BLOCKS), f"(hm){ENDS}B<|im_end|>"),
    "the name of a function in the text": (
        lambda: called({"a": 1}, content="I add."), f"I add.{SUM}"),
    "none where the prompt begins one": (
        lambda: learnt({"messages": [U, A, U, B]}, OPENS), f"\n</think>\n\n{ENDS}\n</think>\n\nB<|im_end|>"),
    "ultrafeedback's ratings": (
        lambda: formats.example({"instruction": "Q", "completions": [{"response": "A", "overall_score": 2}, {"response": "B", "overall_score": 1}]}).values,
        (2.0, 1.0),
    ),
    "nectar's ranks": (
        lambda: formats.example({"prompt": "Q", "answers": [{"answer": "A", "rank": 2}, {"answer": "B", "rank": 1}]}).column, "rank"),
    "unused columns": (lambda: formats.read({"prompt": "Q", "completion": "A", "score": 1, "id": 3, "note": None})[1], {"score"}),
    "a column that repeats the prompt": (lambda: formats.read({"prompt": "Q", "messages": [U, A]})[1], set()),
}  # fmt: skip


# ---- tokenizers ----


def folder(path: Path, config: dict, special: tuple[str, ...] = (), begins: str = "", **files: object) -> Ours:
    """A folder of a byte-level tokenizer.json with these control tokens, and what else lies in it."""
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(tokenizers.byte_characters())}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in special])
    if begins:
        ids = [(begins, core.token_to_id(begins))]
        core.post_processor = processors.TemplateProcessing(f"{begins} $A", special_tokens=ids)
    path.mkdir(exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    for name, content in {"tokenizer_config": config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return tokenizers.load(path)


def spm_folder(path: Path, **config: object) -> Ours:
    lines = [f"line {i} is the word of a stone\n" for i in range(300)]
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(tokenizers.sentencepiece_model(lines, 330, "bpe"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
    (path / "added_tokens.json").write_text(json.dumps({"<new>": pieces_of(path)}))
    return tokenizers.load(path)


def pieces_of(path: Path) -> int:
    return pieces.from_sentencepiece((path / "tokenizer.model").read_bytes(), "m").vocab_size


FOLDERS = {
    "tokens in added_tokens_decoder": (
        lambda p: folder(p, {"added_tokens_decoder": {"256": {"content": "<e>", "special": True}}, "eos_token": "<e>"}).eos_ids,
        (256,),
    ),
    "tokens in added_tokens.json": (lambda p: folder(p, {}, added_tokens={"<t>": 256}).encode("a<t>"), [97, 256]),
    "an id behind a gap": (lambda p: folder(p, {}, added_tokens={"<t>": 260}).encode("<t>"), [260]),
    "an id far behind": (lambda p: "vocabulary ends at 255" in refused(folder, p, {}, added_tokens={"<t>": 10**9}), True),
    "tokens in special_tokens_map": (lambda p: folder(p, {}, special_tokens_map={"eos_token": {"content": "<e>"}}).eos_id, 256),
    "an EOS that is not there": (lambda p: folder(p, {"eos_token": "</s>"}).eos_ids, (256,)),
    "additional special tokens": (lambda p: folder(p, {"additional_special_tokens": ["<x>"]}).special, {"<x>": 256}),
    "add_bos_token beside tokenizer.json": (lambda p: folder(p, {"bos_token": "<b>", "add_bos_token": True}, ("<b>",)).prefix, ()),
    "no add_bos_token": (lambda p: folder(p, {"bos_token": "<b>"}, ("<b>",)).prefix, ()),
    "a post-processor, and flags that deny it": (
        lambda p: folder(p, {"bos_token": "<b>", "add_bos_token": False, "add_eos_token": False}, ("<b>",), begins="<b>").prefix, (256,)),
    "templates with names": (
        lambda p: folder(p, {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}).tool_template,
        "t",
    ),
    "a slow SentencePiece folder": (lambda p: spm_folder(p, add_bos_token=True, bos_token="<s>").prefix, (1,)),
    "its added token": (lambda p: spm_folder(p).encode("<new>") == [pieces_of(p)], True),
    "half a surrogate": (lambda p: refused(folder(p, {}).encode, "\ud800")[:35], "text · the text has a lone surrogate"[:35]),
    "a folder without one": (lambda p: refused(tokenizers.load, p.parent)[-70:][:25], "no tokenizer.json, tokenizer.model, vocabulary or single .gguf in this folder"[-70:][:25]),
}  # fmt: skip


# ---- files ----


def rows_of(path: Path, content: bytes) -> list:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return [row.record or row.reason for row in sources.rows(str(path))]


ROW = {"prompt": "Q", "completion": "A, b"}
TABLE = b'\xef\xbb\xbfprompt,completion\r\nQ,"A, b"\r\n'


def with_a_note(path: Path) -> tuple[list, list[str]]:
    rows_of(path / "rows.csv", TABLE)
    for name in ("note.txt", "table.xlsx", "README.md", ".hidden"):
        (path / name).write_text("no record")
    return list(sources.records(str(path))), sources.passed_over(str(path))


def with_info(path: Path, row: dict, *entries: dict) -> dict:
    """The record of a row beside a dataset_info.json with these entries."""
    named = {f"set{i}": {"file_name": "x.json", **entry} for i, entry in enumerate(entries)}
    rows_of(path / "dataset_info.json", json.dumps(named).encode())
    rows_of(path / "x.json", json.dumps([row]).encode())
    return next(sources.records(str(path / "x.json")))


TALK = {"talk": [{"who": "me", "says": "Q"}, {"who": "you", "says": "A"}], "sys": "S"}
TALKS = {"formatting": "sharegpt", "columns": {"messages": "talk", "system": "sys"}}
TALKS |= {"tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "you"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}


FILES = {
    "a dataset_info.json": (lambda p: whole(with_info(p, TALK, TALKS)), "<system\nS><user\nQ><assistant\nA>"),
    "its turns as OpenAI's": (
        lambda p: learnt(with_info(p, {"chat": [U, CALLED]}, {"formatting": "openai", "columns": {"messages": "chat"}}), CALLS), SUM),
    "its texts to pretrain on": (lambda p: with_info(p, {"body": "t"}, {"columns": {"prompt": "body"}}), {"text": "t"}),
    "its columns, exchanged": (
        lambda p: whole(with_info(p, {"output": "Q", "instruction": "A"}, {"columns": {"prompt": "output", "response": "instruction"}})),
        "<user\nQ><assistant\nA>",
    ),
    "two entries of one file": (
        lambda p: "describe x.json differently" in refused(with_info, p, TALK, TALKS, {"columns": {"prompt": "talk"}}), True),
    "a spreadsheet's CSV": (lambda p: rows_of(p / "x.csv", TABLE), [ROW]),
    "semicolons": (lambda p: rows_of(p / "x.csv", b"prompt;completion\nQ;A, b\n"), [ROW]),
    "tabs": (lambda p: rows_of(p / "x.tsv", b"prompt\tcompletion\nQ\tA, b\n"), [ROW]),
    "a packed CSV": (lambda p: rows_of(p / "x.csv.gz", gzip.compress(TABLE)), [ROW]),
    "a short line of a CSV": (lambda p: rows_of(p / "x.csv", TABLE + b"Q\r\n")[1:], ["1 cells, but the header has 2"]),
    "lines in a .json": (lambda p: rows_of(p / "x.json", json.dumps(ROW).encode() * 1 + b"\n"), [ROW]),
    "a list of JSON": (lambda p: rows_of(p / "x.json", json.dumps([ROW, ROW], indent=1).encode()), [ROW, ROW]),
    "a list that breaks off": (lambda p: len(rows_of(p / "x.json", b'[{"a": 1}, {"b"')), 2),
    "half a surrogate in a row": (lambda p: rows_of(p / "x.jsonl", b'{"text": "\\ud800"}\n')[0][:9], "text with"),
    "5,000 digits": (lambda p: rows_of(p / "x.jsonl", b"[" + b"1" * 5000 + b"]\n")[0][:8], "not JSON"),
    "a broken Parquet": (lambda p: rows_of(p / "x.parquet", b"PAR1")[0][:12], "not readable"),
    "a note beside records": (with_a_note, ([ROW], ["note.txt", "table.xlsx (save it as CSV)"])),
    "a spreadsheet itself": (lambda p: refused(rows_of, p / "x.xlsx", b"PK")[-14:], "save it as CSV"),
}  # fmt: skip
