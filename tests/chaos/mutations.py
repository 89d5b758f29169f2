"""Damaged and hostile versions of a file: of its bytes, of its JSON, and of the fields of its header."""

import contextlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import gguf_header
from model.io import saved

Mutated = tuple[str, bytes]  # what was done, and the file
DEEP = 100_000  # levels of nesting
HOLE = "\x00hole\x00"
# JSON that takes the place of a value, as text: other types, what JSON has no word for, sizes beyond every machine.
STRANGE = (
    "null", "true", "false", "[]", "{}", '""', '"x"', '"nan"', "0", "1", "-1", "2", "0.5", "-0.0", "1e-320", "1e30",
    "NaN", "Infinity", "-Infinity", "1e400", "2147483648", "1000000000", "9223372036854775808", "1" + "0" * 40,
    "9" * 5000, r'"\ud800"', r'"\u0000"', '"../../etc/passwd"', '["x"]', '{"x": [null]}', "[[1, 2], [3]]",
    '"' + "a" * 200_000 + '"', "[" + "1," * 100_000 + "1]", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP,
    '"(a+)+$"', '"(.*)*x"', '"' + "(a|a)*" * 30 + '"',
)  # fmt: skip
NUMBERS = (0, 1, 2, 255, 65535, 10**6, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
FLOATS = (0.0, -1.0, 1e38, float("nan"), float("inf"), -float("inf"))


def of_bytes(data: bytes, r: random.Random) -> Mutated:
    """Flipped bits, a cut, a part that is gone, twice there, or overwritten."""
    at, end = sorted(r.randrange(len(data) + 1) for _ in range(2))
    near = min(at + r.choice((1, 2, 8, 64)), len(data))
    match r.choice(("flip", "flip", "cut", "drop", "twice", "fill", "noise")):
        case "flip":
            out = bytearray(data)
            for _ in range(r.choice((1, 1, 2, 8))):
                if out:
                    out[r.randrange(len(out))] ^= 1 << r.randrange(8)
            return "bits flipped", bytes(out)
        case "cut":
            return f"cut at {at}", data[:at]
        case "drop":
            return f"bytes {at} to {end} gone", data[:at] + data[end:]
        case "twice":
            return f"bytes {at} to {end} twice", data[:end] + data[at:]
        case "fill":
            return f"bytes {at} to {near} are one", data[:at] + bytes([r.choice((0, 255))]) * (near - at) + data[near:]
        case _:
            return f"noise at {at}", data[:at] + r.randbytes(near - at) + data[near:]


def of_json(data: bytes, r: random.Random) -> Mutated:
    """A value, an entry or a key of a JSON text changed, gone, added or moved."""
    whole = json.loads(data)
    places = list(_places(whole))
    box, key = r.choice(places)
    strange = r.choice(STRANGE)
    match r.choice(("value", "value", "value", "gone", "moved", "added", "key", "whole")):
        case "value":
            box[key] = HOLE
            what = f"{key!r} is {strange[:20]}"
        case "gone":
            del box[key]
            what = f"{key!r} is gone"
        case "moved":
            other, name = r.choice(places)
            box[key], what = other[name], f"{key!r} is the value of {name!r}"
        case "added":
            box = r.choice([b for b, _ in places if isinstance(b, dict)])
            box[r.choice(places)[1] if r.random() < 0.5 else "new"] = HOLE
            what = f"an entry added, {strange[:20]}"
        case "key" if isinstance(box, dict):
            box[r.choice(("", "x", "0", str(key).upper(), "\ud800", str(key) * 2))] = box.pop(key)
            what = f"{key!r} has another name"
        case _:
            return f"the whole is {strange[:20]}", strange.encode()
    try:
        return what, json.dumps(whole).replace(json.dumps(HOLE), strange).encode()
    except ValueError:  # moved into itself
        return "cut at 0", b""


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside; of long lists some."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys if len(keys) < 50 else keys[:: len(keys) // 20]:
            yield value, key
            yield from _places(value[key])


def of_lines(data: bytes, r: random.Random) -> Mutated:
    """One line of a .jsonl changed as JSON."""
    lines = data.splitlines(keepends=True)
    at = r.randrange(len(lines))
    what, line = of_json(lines[at], r)
    return f"line {at + 1}: {what}", b"".join([*lines[:at], line, b"\n", *lines[at + 1 :]])


def of_safetensors(data: bytes, r: random.Random) -> Mutated:
    """The header changed as JSON, its length, or numbers that are none."""
    (size,) = struct.unpack_from("<Q", data)
    header, body = data[8 : 8 + size], data[8 + size :]
    choice = r.random()
    if choice < 0.15:
        length = r.choice((*NUMBERS, size + 1, size - 1, len(data)))
        return f"a header of {length}", struct.pack("<Q", length) + data[8:]
    if choice < 0.3:
        at, number = r.randrange(len(body) // 4 + 1) * 4, r.choice(FLOATS)
        n = r.choice((1, 100, len(body)))
        body = body[:at] + struct.pack("<f", number) * min(n, (len(body) - at) // 4) + body[at + 4 * n :]
        return f"{number} from {at}", data[: 8 + size] + body
    what, header = of_json(header, r)
    return f"header: {what}", struct.pack("<Q", len(header)) + header + body


def of_manifest(data: bytes, r: random.Random) -> Mutated:
    """A manifest whose checksum is right again."""
    what, manifest = of_json(json.dumps(json.loads(data)["manifest"]).encode(), r)
    with contextlib.suppress(ValueError, RecursionError):
        return f"sealed: {what}", saved.seal(json.loads(manifest)).encode()
    return what, manifest


class _Spots(gguf_header._Reader):
    """Reads a header and notes where each of its values is."""

    def __init__(self, data: Any):
        super().__init__(data)
        self.spots: list[tuple[int, str]] = []

    def unpack(self, layout: str) -> tuple:
        self.spots.append((self.at, layout))
        return super().unpack(layout)


def of_gguf(data: bytes, r: random.Random) -> Mutated:
    """A number of the header changed: a count, a length, a type, a value, an offset."""
    reader = _Spots(data)
    reader.header()
    at, layout = r.choice(reader.spots)
    size = struct.calcsize("<" + layout)
    if r.random() < 0.2:
        return of_bytes(data[: reader.at], r)[0], of_bytes(data[: reader.at], r)[1] + data[reader.at :]
    if layout in ("f", "d"):
        number = r.choice(FLOATS)
        return f"{number} at {at}", data[:at] + struct.pack("<" + layout, number) + data[at + size :]
    number, width = r.choice(NUMBERS), min(size, r.choice((1, 4, 8)))
    at += r.randrange(0, size - width + 1, width)
    value = (number % 256**width).to_bytes(width, "little")
    return f"{number} at {at}, {layout}", data[:at] + value + data[at + width :]


def of_text(words: tuple[str, ...]) -> Callable[[bytes, random.Random], Mutated]:
    """Puts one of `words` somewhere into a text, in place of nothing or of a part."""

    def mutate(data: bytes, r: random.Random) -> Mutated:
        word, at = r.choice(words), r.randrange(len(data) + 1)
        end = min(at + r.choice((0, 0, 1, 10)), len(data))
        return f"{word[:30]!r} at {at}", data[:at] + word.encode("utf-8", "surrogatepass") + data[end:]

    return mutate


BY_ENDING = {
    ".json": of_json, ".jsonl": of_lines, ".safetensors": of_safetensors, ".gguf": of_gguf,
    ".csv": of_text((",", '"', "\n", "\r", ";", '""', "\ud800", "x" * 200_000, "," * 5000)),
    ".jinja": of_text((
        "{{", "}}", "{%", "%}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**9 }}",
        "{{ messages * 99999999 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ messages | map('string') | join('x' * 100000) }}", "{{ 9 ** 9 ** 9 }}", "{{ ''.__class__ }}",
        "{{ cycler }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ '%1000000000d' % 1 }}", "{{ 'x'.ljust(10**10) }}",
        "{{ messages | tojson(indent=10**9) }}", "{% include 'x' %}", "{{ raise_exception('x') }}",
    )),
}  # fmt: skip


def mutated(path: Path, r: random.Random) -> Mutated:
    """What was done to the file, and the file; two in three times by what its kind has for a structure."""
    data = path.read_bytes()
    structured = of_manifest if path.name == saved.MANIFEST else BY_ENDING.get(path.suffix)
    return structured(data, r) if structured and data and r.random() < 0.67 else of_bytes(data, r)
