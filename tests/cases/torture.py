"""Lines that tokenizers stumble over, made from Unicode's tables and Python's code."""

import inspect
import json
import json.decoder
import random
import textwrap
import unicodedata
from collections.abc import Iterator

SCRIPTS = {  # ranges of letters, with the marks and digits among them
    "latin": (0x0041, 0x024F), "greek": (0x0370, 0x03FF), "cyrillic": (0x0400, 0x052F), "armenian": (0x0531, 0x058F),
    "hebrew": (0x0591, 0x05F4), "arabic": (0x0600, 0x06FF), "persian": (0x0750, 0x077F), "devanagari": (0x0900, 0x097F),
    "bengali": (0x0980, 0x09FF), "gurmukhi": (0x0A00, 0x0A7F), "tamil": (0x0B80, 0x0BFF), "telugu": (0x0C00, 0x0C7F),
    "malayalam": (0x0D00, 0x0D7F), "thai": (0x0E00, 0x0E5B), "tibetan": (0x0F00, 0x0FBC), "myanmar": (0x1000, 0x109F),
    "georgian": (0x10A0, 0x10FF), "jamo": (0x1100, 0x11FF), "ethiopic": (0x1200, 0x137F), "cherokee": (0x13A0, 0x13FF),
    "khmer": (0x1780, 0x17F9), "kana": (0x3041, 0x30FF), "han": (0x4E00, 0x9FA5), "han A": (0x3400, 0x4DBF),
    "hangul": (0xAC00, 0xD7A3), "forms": (0xFB00, 0xFDFF), "wide": (0xFF01, 0xFFEE), "gothic": (0x10330, 0x1034A),
    "maths": (0x1D400, 0x1D7FF), "han B": (0x20000, 0x2A6D6), "symbols": (0x2000, 0x2BFF), "tags": (0x1D100, 0x1D1FF),
}  # fmt: skip
SPACES = " \t\n\r\v\f\x1c\x85\xa0\u1680\u2002\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
INVISIBLE = "\xad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u202e\u2060\u2066\u2069\ufe0e\ufe0f\ufeff\ufffc\ufffd"
CONTROL = [
    "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "<|endoftext|>",
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<0x0A>",
    "<0xC3>", "▁", "▁▁", "##", "##ing", "Ġ", "Ċ", "<｜begin▁of▁sentence｜>", "<｜User｜>", "[INST]", "[/INST]",
    "<mask>",
]  # fmt: skip
CONTRACTIONS = [
    "it's",
    "IT'S",
    "we'll",
    "WE'LL",
    "they've",
    "I'M",
    "can't",
    "CAN'T",
    "you'd",
    "'tis",
    "’LL",
    "ſ's",
    "l'été",
]


def lines(seed: int = 0) -> list[str]:
    """More than 2,000 of them; no two are equal, none holds half a surrogate pair."""
    draw = random.Random(seed)
    found = [""]
    for make in (_scripts, _emoji, _accents, _spaces, _control, _numbers, _characters, _code, _mixed):
        found += make(draw)
    return list(dict.fromkeys(found))


def _assigned(first: int, last: int) -> list[str]:
    return [c for c in map(chr, range(first, last + 1)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]


def _word(draw: random.Random, letters: list[str], most: int = 9) -> str:
    return "".join(draw.choices(letters, k=draw.randint(1, most)))


def _scripts(draw: random.Random) -> Iterator[str]:
    for first, last in SCRIPTS.values():
        letters = _assigned(first, last)
        for joint in ("", " ", "  ", "-", ", ", "\u200c", "\u3000", "\n"):
            for _ in range(3):
                yield joint.join(_word(draw, letters) for _ in range(draw.randint(2, 9)))
        yield "".join(letters[:120])


def _emoji(draw: random.Random) -> Iterator[str]:
    """Faces, skin tones, families joined by U+200D, keycaps, flags of letters and of tags, presentation selectors."""
    faces = _assigned(0x1F300, 0x1FAFF)
    tones = [chr(i) for i in range(0x1F3FB, 0x1F400)]
    people, letters = "👨👩👧👦🧑👶", [chr(i) for i in range(0x1F1E6, 0x1F200)]
    for i in range(40):
        yield "\u200d".join(person + draw.choice(["", *tones]) for person in draw.choices(people, k=2 + i % 4))
        yield "".join(draw.choices(faces, k=draw.randint(1, 12)))
        yield " ".join(face + draw.choice(["", "\ufe0e", "\ufe0f", *tones]) for face in draw.choices(faces, k=5))
        yield "".join(draw.choices(letters, k=draw.randint(1, 6))) + f" {i % 10}\ufe0f\u20e3"
    yield "🏴" + "".join(chr(0xE0000 + ord(c)) for c in "gbsct") + "\U000e007f"
    yield "❤️‍🔥 🏳️‍🌈 👩🏽‍💻 🧑‍🤝‍🧑 ☠︎ ☺️"


def _accents(draw: random.Random) -> Iterator[str]:
    """Composed, decomposed, compatible and cased forms of the same words; stacks and loose marks; odd cases of case."""
    composed = [
        c for c in _assigned(0xC0, 0x1EFF) if unicodedata.decomposition(c) and "<" not in unicodedata.decomposition(c)
    ]
    marks = _assigned(0x0300, 0x036F)
    for _ in range(60):
        word = _word(draw, composed, 12)
        yield from (unicodedata.normalize(form, word) for form in ("NFC", "NFD", "NFKC", "NFKD"))
        yield "".join(c + "".join(draw.choices(marks, k=draw.randint(0, 4))) for c in _word(draw, list("aeioubcd Z")))
    yield from ("\u0301a", "e\u0301\u0323", "e\u0323\u0301", "각 각", "Å Å Å", "ﬁ ﬂ ﬃ ﬆ", "ſẛ̣")
    yield from ("İstanbul ıi İi", "Straße STRASSE ẞ", "ΣΊΣΥΦΟΣ σς", "ǅ ǆ Ǆ", "①②③ ㍿ ½ ² ₃ Ⅷ", "ŉ ǰ ΐ ﬓ", "ʼn")


def _spaces(draw: random.Random) -> Iterator[str]:
    for n in (*range(1, 20), 31, 32, 33, 64, 100):
        for space in (" ", "\t", "\n", "\r\n", "\xa0", "\u3000", " \n", "\n "):
            yield space * n
        yield f"a{' ' * n}b"
        yield f"{' ' * n}x = 1{' ' * (n % 5)}\n{chr(9) * (n % 4)}y"
    for _ in range(150):
        yield "".join(draw.choice([*SPACES, *INVISIBLE, "a", "B", "7", "."]) * draw.randint(1, 3) for _ in range(12))
    yield from (f"a{c}b {c}{c} {c}" for c in SPACES + INVISIBLE)


def _control(draw: random.Random) -> Iterator[str]:
    """Control tokens and the alphabets of vocabularies, spelled out in a text: whole, glued, broken and in capitals."""
    for token in CONTROL:
        yield from (
            token,
            f"a{token}b",
            f"a {token} b",
            f"{token}{token}",
            f" {token}\n",
            token.upper(),
            token[:-1],
            f"«{token[1:]}",
        )
    for _ in range(40):
        yield draw.choice(["", " "]).join(draw.choice([*CONTROL, "word", " ", "\n", "é", "1"]) for _ in range(8))


def _numbers(draw: random.Random) -> Iterator[str]:
    digits = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Nd", "Nl", "No")]
    for n in range(1, 14):
        yield "".join(draw.choices("0123456789", k=n))
        yield f"x{10**n:,} -{10**n}.{10**n}e-{n} {n}%"
        yield "".join(draw.choices(digits, k=n)) + " " + "".join(draw.choices(digits, k=n))
    yield from CONTRACTIONS
    yield from (" ".join(draw.choices(CONTRACTIONS, k=6)) for _ in range(20))
    yield from (
        "$1,234.56 €7 ₹8",
        "192.168.0.1:8080",
        "2024-02-29T23:59:60Z",
        "1e10 0x1F 0b101 1_000",
        "C++17 F# .NET5",
    )


def _characters(draw: random.Random) -> Iterator[str]:
    """One character of every block of 64, and all of ASCII and of the controls, alone and between letters."""
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    yield from (f"{c}a{c} {c}" for c in known[:256])
    for start in range(256, 40_000, 64):
        yield "x" + draw.choice(known[start : start + 64]) + "y " + draw.choice(known[start : start + 64])
    yield from ("\ue000 \uf8ff \U000f0000", "\ufdd0 \uffff \U0010ffff", "\u0378 \U000e0fff", "\x00", "a\x00b")
    for n in (5, 50, 300):
        yield from (c * n for c in "aA0.-_=é漢\u0301🙂")


def _code(draw: random.Random) -> Iterator[str]:
    text = inspect.getsource(json.decoder) + inspect.getsource(textwrap)
    yield from text.split("\n")
    rows = text.split("\n\n")
    yield from draw.sample(rows, min(60, len(rows)))
    record = {"name": "Zoë", "n": [1, 2.5, -3e-7, None, True], "deep": {"a": {"b": "c\n\t\"'\\"}}}
    yield from (json.dumps(record), json.dumps(record, indent=2), json.dumps(record, ensure_ascii=False, indent="\t"))
    yield from (
        '<div class="a b">&nbsp;</div>',
        "SELECT * FROM t WHERE x='1';--",
        "if(a&&b||!c){d++;}//e",
        "λx→x∘y ≠ ∅ ∀ε>0",
    )
    yield from (
        "https://example.org/a?b=c&d=%20e#f",
        "me+you@example.org",
        "C:\\Dir\\f.txt",
        "~/.a/b_c-d.tar.gz",
        "```py\nx\n```",
    )


def _mixed(draw: random.Random) -> Iterator[str]:
    """Pieces of all scripts, marks and spaces in one line."""
    scripts = [_assigned(first, last) for first, last in SCRIPTS.values()]
    glue = [" ", "", "", "\n", "  ", ".", "'s", "\u0301", "\u200d", "é", "1", "<s>", "▁", "🙂", "\t"]
    for _ in range(250):
        yield "".join(_word(draw, draw.choice(scripts), 5) + draw.choice(glue) for _ in range(draw.randint(2, 12)))
