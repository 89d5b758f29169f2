"""What a compiled program sends between its devices, read from its HLO text.

A loop's body counts as often as it turns. An async collective that XLA cut into several fusions keeps its channel and
counts once. An all-reduce inside an `all-reduce-scatter` fusion moves what a reduce-scatter moves.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

# Bytes that one device sends in a group of g, as a multiple of the bytes of its operand: ring algorithms
# (Thakur et al. 2005). A permute sends its operand once.
SENT = {
    "all-gather": lambda g: g - 1,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1.0,
}
ALIASES = ("parameter", "constant", "get-tuple-element", "tuple", "while", "bitcast", "conditional", "call")
BITS = dict(pred=8, bf16=16, c64=64, c128=128, token=0)
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Op(NamedTuple):
    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    attrs: str


class Collective(NamedTuple):
    kind: str
    axes: tuple[str, ...]  # mesh axes that its groups span
    bytes: float  # that one device sends, over the whole program
    times: float
    source: str  # op_name of the operation it serves


class Program:
    """Computations by name, and how often each one runs."""

    def __init__(self, text: str, unknown_trips: float):
        """`unknown_trips`: turns of a loop whose length depends on data."""
        self.ops: dict[str, dict[str, Op]] = {}
        self.roots: dict[str, Op] = {}
        self.unknown_trips, self.unknown_loops = unknown_trips, 0
        self.entry = self._parse(text)
        self.times: dict[str, float] = collections.defaultdict(float)
        for name in self.entry:
            self._count(name, 1.0)

    def _parse(self, text: str) -> list[str]:
        entry, here = [], ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if line.endswith("{") and (m := re.match(r"(ENTRY )?%?([\w.\-]+) .*->", line)):
                here = m[2]
                self.ops[here] = {}
                entry += [here] if m[1] else []
            elif here and (op := _op(line)):
                self.ops[here][op.name] = op
                if line.lstrip().startswith("ROOT "):
                    self.roots[here] = op
        return entry

    def _count(self, name: str, times: float) -> None:
        self.times[name] += times
        for op in self.ops[name].values():
            turns = self.trips(name, op) if op.kind == "while" else 1.0
            called = CALLED.findall(op.attrs)
            for branches in BRANCHES.findall(op.attrs):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            for inner in called:
                if inner in self.ops and op.kind not in ("reduce", "sort", "scatter", "reduce-window", "map"):
                    self._count(inner, times * turns)

    def trips(self, where: str, loop: Op) -> float:
        """Turns of a while loop that counts up to a constant."""
        if m := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.attrs):
            return int(m[1])
        condition, body = (re.search(rf"\b{k}=%?([\w.\-]+)", loop.attrs)[1] for k in ("condition", "body"))
        root, tuple_of = self.roots[condition], lambda op: op and op.kind == "tuple"
        index = next((i for o in root.operands if (i := self._index(condition, o)) is not None), None)
        limits = [self._constant(condition, o) for o in root.operands]
        limit = next((c for c in limits if c is not None), None)
        if root.kind != "compare" or "direction=LT" not in root.attrs or index is None or limit is None:
            self.unknown_loops += 1
            return self.unknown_trips
        init, step = self.ops[where].get(loop.operands[0]), 1
        start = (self._constant(where, init.operands[index]) if tuple_of(init) else None) or 0
        new = self.ops[body].get(self.roots[body].operands[index]) if tuple_of(self.roots[body]) else None
        if new and new.kind == "add":
            step = next((c for o in new.operands if (c := self._constant(body, o)) is not None), 1)
        return max(math.ceil((limit - start) / step), 0)

    def _index(self, where: str, name: str) -> int | None:
        op = self.ops[where].get(name)
        if op and op.kind == "get-tuple-element":
            return int(re.search(r"index=(\d+)", op.attrs)[1])
        return None

    def _constant(self, where: str, name: str) -> int | None:
        op = self.ops[where].get(name)
        while op and op.kind == "copy":
            op = self.ops[where].get(op.operands[0])
        return int(op.operands[0]) if op and op.kind == "constant" and op.operands[0].isdigit() else None

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """Every collective, largest first."""
        found: dict[str, Collective] = {}
        for where, ops in self.ops.items():
            if not self.times[where]:
                continue
            for op in ops.values():
                kind = op.kind.removesuffix("-start")
                if kind not in SENT:
                    continue
                if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                groups = device_groups(op.attrs, math.prod(mesh_shape.values()))
                operand = sum(nbytes(ops[o].type) for o in op.operands if o in ops)
                sent = operand * SENT[kind](len(groups[0])) * self.times[where]
                channel = re.search(r"channel_id=(\d+)", op.attrs)
                source = re.search(r'op_name="([^"]*)"', op.attrs)
                one = Collective(
                    kind, spanned(groups, mesh_shape), sent, self.times[where], source[1] if source else ""
                )
                key = channel[1] if channel else f"{where}/{op.name}"
                if key not in found or one.bytes < found[key].bytes:
                    found[key] = one
        return sorted(found.values(), key=lambda c: -c.bytes)

    def _outer(self) -> Iterator[tuple[str, Op]]:
        """Operations that run outside of fusions and move arrays, with their computations."""
        inner = {c for ops in self.ops.values() for op in ops.values() if op.kind == "fusion" for c in _called(op)}
        for where, ops in self.ops.items():
            if where not in inner and self.times[where]:
                yield from ((where, op) for op in ops.values() if op.kind not in ALIASES)

    def largest(self, n: int) -> list[tuple[int, str, str]]:
        """(bytes, type, op_name) of the largest arrays that operations write, one a type."""
        seen: dict[str, tuple[int, str, str]] = {}
        for _, op in self._outer():
            source = re.search(r'op_name="([^"]*)"', op.attrs)
            for dtype, dims in ARRAY.findall(op.type) if source else ():
                shape = f"{dtype}[{dims}]"
                seen.setdefault(shape, (nbytes(shape), shape, source[1]))
        return sorted(seen.values(), reverse=True)[:n]

    def traffic(self) -> float:
        """Bytes that operations read and write, but for what the compiler keeps in vector memory (space 1).

        Of an operand that an operation only slices the slices count, and of an update in place the update.
        """
        total = 0.0
        for where, op in self._outer():
            called = _called(op) if op.kind == "fusion" else []
            inside = self.ops.get(called[0], {}) if called else {op.name: op}
            order = {int(o.operands[0]): o.name for o in inside.values() if o.kind == "parameter"}
            for i, operand in enumerate(op.operands):
                if (given := self.ops[where].get(operand)) and "S(1)" not in given.type:
                    total += self.times[where] * _read(inside, order.get(i, operand), nbytes(given.type))
            root = self.roots.get(called[0]) if called else op
            update = inside.get(root.operands[1]) if root and root.kind == "dynamic-update-slice" else None
            if "S(1)" not in op.type:
                total += self.times[where] * nbytes((update or op).type)
        return total


def _read(inside: dict[str, Op], name: str, whole: int) -> int:
    users = [u for u in inside.values() if name in u.operands and u.kind != "parameter"]
    if users and all(u.kind == "dynamic-update-slice" and u.operands[0] == name for u in users):
        return 0
    if users and all(u.kind in ("dynamic-slice", "gather") and u.operands[0] == name for u in users):
        return min(whole, sum(nbytes(u.type) for u in users))
    return whole


def _called(op: Op) -> list[str]:
    return CALLED.findall(op.attrs)


def _op(line: str) -> Op | None:
    """`%name = type kind(operands), attrs`; a tuple's type holds spaces and balanced brackets."""
    m = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not m:
        return None
    rest = line[m.end() :]
    end = _end(rest, 0, " ")
    kind, _, tail = rest[end + 1 :].partition("(")
    close = _end(tail, 1, ")")
    operands = tuple(o.strip().split(" ")[-1].lstrip("%") for o in tail[:close].split(","))
    return Op(m[1], rest[:end], kind, operands, tail[close + 1 :])


def _end(text: str, depth: int, stop: str) -> int:
    """Where `stop` stands outside of all brackets."""
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == stop and not depth:
            return i
    return len(text)


def nbytes(type_: str) -> int:
    """Bytes of all arrays in an HLO type; layouts and padding left out."""
    bits = lambda dtype: BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])
    size = lambda dims: math.prod(int(d) for d in dims.split(",") if d)
    return sum(size(dims) * bits(dtype) for dtype, dims in ARRAY.findall(type_)) // 8


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def device_groups(attrs: str, devices: int) -> np.ndarray:
    """[groups, members] partition ids, from any of the forms in which HLO writes them; of a permute, its pairs."""
    if m := re.search(r"source_target_pairs=\{(\{.*?\})\}", attrs):
        return np.array(_ints(m[1])).reshape(-1, 2)
    if m := re.search(r"replica_groups=\{(\{.*?\})\}", attrs):
        return np.array([_ints(g) for g in m[1].split("},")])
    if m := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attrs):
        return _iota(m[2], m[3]).reshape(_ints(m[1]))
    form = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
    if m := re.search(form, attrs):
        return _named(m)
    return np.arange(devices)[None]


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def _named(m: re.Match) -> np.ndarray:
    """mesh['a'=4,'b'=2] {'a'}: one group a value of b. 'a':(2)2 is a part of a: 2 major positions, then 2 members."""
    names, sizes = zip(*((n, int(s)) for n, s in re.findall(r"'([^']+)'=(\d+)", m[1])))
    ids = _iota(m[2], m[3]) if m[2] else np.arange(math.prod(sizes))
    shape, members = [], []
    parts = dict(re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", m[4]))
    for name, size in zip(names, sizes):
        major, part = _ints(parts[name]) if parts.get(name) else (1, size)
        members += [len(shape) + 1] if name in parts else []
        shape += [major, part, size // (major * part)]
    ids, n = ids.reshape(shape), math.prod(shape[i] for i in members)
    return np.moveaxis(ids, members, range(-len(members), 0)).reshape(-1, n)


def spanned(groups: Iterable, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which members of a group differ; partition i lies at the i-th place of the mesh."""
    coords = np.stack(np.unravel_index(np.asarray(groups), tuple(mesh_shape.values())))  # [axes, groups, members]
    differ = (coords != coords[..., :1]).any(axis=(1, 2))
    return tuple(a for a, d in zip(mesh_shape, differ) if d)


def by_axis(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Bytes by mesh axes ("fsdp", "data+fsdp") and kind."""
    out: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for c in collectives:
        out["+".join(c.axes) or "none"][c.kind] += c.bytes
    return {axes: dict(kinds) for axes, kinds in out.items()}
