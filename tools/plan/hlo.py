"""Counts the bytes that a compiled program sends between devices and moves through memory, as read from its HLO text.

The body of a loop is counted once per iteration. XLA may split an asynchronous collective into several fusions. All of
these fusions have a chain_id, and they share one channel. Such a collective is counted once. An all-reduce in an
`all-reduce-scatter` fusion is counted as a reduce-scatter.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

# Bytes that each of g devices sends in a collective with a ring algorithm, divided by the bytes of the operand.
# Source: Thakur et al. 2005, Optimization of Collective Communication Operations in MPICH.
SENT = {
    "all-gather": lambda g: g - 1,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1.0,
}
BETWEEN = "data, between slices"
ALIASES = (
    "parameter", "constant", "get-tuple-element", "tuple", "while", "bitcast", "conditional", "call", "fusion-done",
)  # fmt: skip
FUSIONS = ("fusion", "fusion-start")
BITS = dict(pred=8, token=0)
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


class Op(NamedTuple):
    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    attrs: str

    @property
    def called(self) -> list[str]:
        return [name for names in CALLED.findall(self.attrs) for name in re.findall(r"%([\w.\-]+)", names)]

    @property
    def source(self) -> str:
        """The name of the JAX operation that this HLO operation was compiled from."""
        found = re.search(r'op_name="([^"]*)"', self.attrs)
        return found[1] if found else ""


class Program:
    """The computations of an HLO program by name, and how often each computation runs. A loop whose length depends on
    the data is assumed to have `unknown_trips` iterations."""

    def __init__(self, text: str, unknown_trips: float):
        self.ops: dict[str, dict[str, Op]] = {}
        self.roots: dict[str, Op] = {}
        self.times: dict[str, float] = collections.defaultdict(float)
        self.unknown_trips = unknown_trips
        entry = here = ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if line.endswith("{") and (m := re.match(r"(ENTRY )?%?([\w.\-]+) .*->", line)):
                here, entry = m[2], m[2] if m[1] else entry
                self.ops[here] = {}
            elif here and (op := parse(line)):
                self.ops[here][op.name] = op
                if line.lstrip().startswith("ROOT "):
                    self.roots[here] = op
        self._count(entry, 1.0)

    def _count(self, name: str, times: float) -> None:
        self.times[name] += times
        for op in self.ops[name].values():
            for inner in op.called:
                self._count(inner, times * (self.trips(name, op) if op.kind == "while" else 1.0))

    def trips(self, where: str, loop: Op) -> float:
        """Returns the number of iterations of a while loop. If the HLO does not contain `known_trip_count`, as on TPUs,
        the number is computed from the start, step and limit of the loop counter."""
        if m := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.attrs):
            return int(m[1])
        condition, body = (re.search(rf"\b{k}=%([\w.\-]+)", loop.attrs)[1] for k in ("condition", "body"))
        test, new, init = self.roots[condition], self.roots[body], self.ops[where].get(loop.operands[0])
        counter = [o for o in map(self.ops[condition].get, test.operands) if o and o.kind == "get-tuple-element"]
        limit = self._constant(condition, test.operands)
        if test.kind != "compare" or "direction=LT" not in test.attrs or not counter or limit is None:
            return self.unknown_trips
        index = int(re.search(r"index=(\d+)", counter[0].attrs)[1])
        start = self._constant(where, init.operands[index : index + 1]) if init and init.kind == "tuple" else 0
        add = self.ops[body].get(new.operands[index]) if new.kind == "tuple" else None
        step = self._constant(body, add.operands) if add and add.kind == "add" else 1
        return max(math.ceil((limit - (start or 0)) / (step or 1)), 0)

    def _constant(self, where: str, names: Iterable[str]) -> int | None:
        for op in map(self.ops[where].get, names):
            while op and op.kind == "copy":
                op = self.ops[where].get(op.operands[0])
            if op and op.kind == "constant" and op.operands[0].isdigit():
                return int(op.operands[0])
        return None

    def sent(self, mesh_shape: dict[str, int]) -> dict[str, dict[str, float]]:
        """Returns {mesh axes: {kind of collective: bytes that each device sends}}. The axes are those that the
        collectives span, such as "fsdp" or "data+fsdp"."""
        found: dict[str, tuple[float, str, str]] = {}
        for where, ops in self.ops.items():
            for op in ops.values() if self.times[where] else ():
                kind = op.kind.removesuffix("-start")
                if kind == "send" and (m := re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', op.attrs)):
                    kind, slices = m[1].lower().replace("_", "-"), _megascale(op.attrs)
                    size = nbytes(ops[op.operands[0]].type) * SENT[kind](slices) * self.times[where]
                    found[f"{where}/{op.name}"] = size, BETWEEN, kind
                    continue
                if kind not in SENT:
                    continue
                if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                groups = device_groups(op.attrs, math.prod(mesh_shape.values()))
                operand = sum(nbytes(ops[o].type) for o in op.operands if o in ops)
                size = operand * SENT[kind](groups.shape[1]) * self.times[where]
                channel = "chain_id" in op.attrs and re.search(r"channel_id=\d+", op.attrs)
                key = channel[0] if channel else f"{where}/{op.name}"
                found[key] = min(
                    found.get(key, (math.inf, "", "")), (size, "+".join(spanned(groups, mesh_shape)), kind)
                )
        out: dict[str, dict[str, float]] = {}
        for size, axes, kind in found.values():
            kinds = out.setdefault(axes or "none", {})
            kinds[kind] = kinds.get(kind, 0.0) + size
        return out

    def _outer(self) -> Iterator[tuple[str, Op]]:
        """Yields (computation, operation) for each operation that moves arrays. A fusion counts as one operation."""
        inner = {c for ops in self.ops.values() for op in ops.values() if op.kind in FUSIONS for c in op.called}
        for where, ops in self.ops.items():
            if where not in inner and self.times[where]:
                yield from ((where, op) for op in ops.values() if op.kind not in ALIASES)

    def largest(self, n: int) -> list[tuple[int, str, str]]:
        """Returns (bytes, type, source) of the n largest arrays that operations write. Arrays of the same type are
        listed once."""
        seen: dict[str, tuple[int, str, str]] = {}
        for _, op in self._outer():
            for shape in (f"{m[0]}[{m[1]}]" for m in ARRAY.findall(op.type) if op.source):
                seen.setdefault(shape, (nbytes(shape), shape, op.source))
        return sorted(seen.values(), reverse=True)[:n]

    def traffic(self) -> float:
        """Returns the bytes that operations read and write, except for arrays in vector memory (memory space 1).

        If an operation reads only slices of an operand, only the slices are counted. If an operation updates an array
        in place, only the update is counted.
        """
        total = 0.0
        for where, op in self._outer():
            inside = self.ops[op.called[0]] if op.kind in FUSIONS else {op.name: op}
            root = self.roots[op.called[0]] if op.kind in FUSIONS else op
            order = {int(o.operands[0]): o.name for o in inside.values() if o.kind == "parameter"}
            update = inside.get(root.operands[1]) if root.kind == "dynamic-update-slice" else None
            made = root if op.kind == "fusion-start" else op  # the type of a fusion-start includes its operands
            moved = nbytes((update or made).type) if "S(1)" not in op.type else 0
            for i, operand in enumerate(op.operands):
                if (given := self.ops[where].get(operand)) and "S(1)" not in given.type:
                    moved += _read(inside, order.get(i, operand), nbytes(given.type))
            total += self.times[where] * moved
        return total


def _read(inside: dict[str, Op], name: str, whole: int) -> int:
    users = [u for u in inside.values() if name in u.operands]
    if any(u.operands[0] != name for u in users) or not users:
        return whole
    if any(u.kind not in ("dynamic-slice", "gather", "dynamic-update-slice") for u in users):
        return whole
    return min(whole, sum(nbytes(u.type) for u in users if u.kind != "dynamic-update-slice"))


def parse(line: str) -> Op | None:
    """Parses a line `%name = type kind(operands), attrs`. The type of a tuple has brackets with spaces in them."""
    m = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not m:
        return None
    type_, rest = _until(line[m.end() :], 0, " ")
    kind, _, rest = rest.partition("(")
    operands, attrs = _until(rest, 1, ")")
    return Op(m[1], type_, kind, tuple(o.strip().split(" ")[-1].lstrip("%") for o in operands.split(",")), attrs)


def _until(text: str, depth: int, stop: str) -> tuple[str, str]:
    """Splits text at the first `stop` outside all brackets. `depth` brackets are already open where the text starts."""
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == stop and not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def nbytes(type_: str) -> int:
    """Returns the total bytes of the arrays in an HLO type, without padding."""
    bits = lambda dtype: BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])
    return sum(math.prod(_ints(dims)) * bits(dtype) for dtype, dims in ARRAY.findall(type_)) // 8


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _megascale(attrs: str) -> int:
    """Returns the number of slices that a transfer connects: 2 for {1,2}x{0:3}, which means slices 1 and 2, and 4 for
    {1:4}x{0:3}, which means slices 1 to 4."""
    inside = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', attrs)[1]
    ranges = [_ints(part) for part in inside.split(",")]
    return sum(r[-1] - r[0] + 1 for r in ranges)


def device_groups(attrs: str, devices: int) -> np.ndarray:
    """Returns an array [groups, members] of the partition ids in each group of a collective. Reads every HLO notation
    for groups. The groups of a collective permute are its (source, target) pairs."""
    if m := re.search(r"(source_target_pairs|replica_groups)=\{(\{.*?\})\}", attrs):
        return np.array([_ints(g) for g in m[2].split("},")])
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
    """Parses groups written as mesh['a'=4,'b'=2] {'a'}. There is one group for each index of axis b, and its members
    are all the indices of axis a. 'a':(2)2 splits axis a into three axes, whose sizes are 2, 2 and the rest. The
    members of a group are then the indices of the second one."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", m[1])}
    ids = _iota(m[2], m[3]) if m[2] else np.arange(math.prod(sizes.values()))
    shape, members = [], []
    parts = dict(re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", m[4]))
    for name, size in sizes.items():
        major, part = _ints(parts[name]) if parts.get(name) else (1, size)
        members += [len(shape) + 1] if name in parts else []
        shape += [major, part, size // (major * part)]
    n = math.prod(shape[i] for i in members)
    return np.moveaxis(ids.reshape(shape), members, range(-len(members), 0)).reshape(-1, n)


def spanned(groups: Iterable, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the members of a group differ. Partition i is device i of the mesh, in
    row-major order."""
    coords = np.stack(np.unravel_index(np.asarray(groups), tuple(mesh_shape.values())))  # [axes, groups, members]
    differ = (coords != coords[..., :1]).any(axis=(1, 2))
    return tuple(a for a, d in zip(mesh_shape, differ) if d)
