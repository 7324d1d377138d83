"""Parse a cubin's machine code, as printed by Triton's disassembler: basic blocks and the main loop."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

__all__ = ["Code", "Loop", "disassemble"]

_MATRIX = re.compile(r"\b(HGMMA|HMMA|QGMMA|UTCHMMA|UTCQMMA)\b")
_SHAPE = re.compile(r"\bHGMMA\.(\d+x\d+x\d+)")
_LABEL = re.compile(r"^\s*(\.L\w*):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_JUMP = re.compile(r"\b(BRA|EXIT|RET|BRX|JMP)\b")
_ALWAYS = re.compile(r"^(EXIT|RET\S*|JMP|BRA(?:\.(?!DIV|CONV)\S+)*)\s*(?:`\(|$)")
# A loop over tiles has an epilogue beside the loop over the depth: half as long again as that.
_PERSISTENT = 1.5


@dataclass(frozen=True)
class Loop:
    """The loop with the most matrix instructions per instruction.

    instructions, matrix, barriers: per iteration. outside: a tile's instructions outside the loop. persistent: whether
    one program iterates over tiles, so that this loop is nested in another.
    """

    instructions: int
    matrix: int
    barriers: int
    outside: int
    persistent: bool


@dataclass(frozen=True)
class Code:
    """blocks: basic blocks of instructions; follows: for each, the blocks that may come next."""

    blocks: tuple[tuple[str, ...], ...]
    follows: tuple[tuple[int, ...], ...]

    @staticmethod
    def parse(text: str) -> Code:
        """Parse the output of nvdisasm -c for one function."""
        labels: dict[str, int] = {}
        blocks: list[list[str]] = [[]]
        for line in text.splitlines():
            label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
            if label:
                if blocks[-1]:
                    blocks.append([])
                labels[label[1]] = len(blocks) - 1
            elif instruction:
                blocks[-1].append(instruction[1].strip())
                if _JUMP.search(blocks[-1][-1]):
                    blocks.append([])
        follows = []
        for i, block in enumerate(blocks):
            last = block[-1] if block else ""
            target = re.search(r"`\((\.L\w+)\)", last) if "BRA" in last else None
            after = [labels[target[1]]] if target else []
            if not _ALWAYS.match(last) and i + 1 < len(blocks):
                after.append(i + 1)
            follows.append(tuple(after))
        return Code(tuple(map(tuple, blocks)), tuple(follows))

    @cached_property
    def total(self) -> int:
        """Return the number of instructions without no-ops."""
        return sum(map(_working, self.blocks))

    @property
    def matrix_shapes(self) -> dict[str, int]:
        """Return the count of each shape of wgmma in the code."""
        return dict(Counter(found[1] for block in self.blocks for i in block for found in _SHAPE.finditer(i)))

    @property
    def barriers(self) -> int:
        """Return the number of barriers between the warps of a program."""
        return sum(_plain(instruction).startswith("BAR.") for block in self.blocks for instruction in block)

    def loop(self, *, matrix: bool = True) -> Loop | None:
        """Return the main loop: of matrix instructions, or the longest if not `matrix`; None without loops."""
        best: tuple[float, tuple[int, ...], set[int]] | None = None
        for part in _circles(self.follows):
            for block in part:
                if matrix and not _count(self.blocks[block], _MATRIX):
                    continue
                turn = self._shortest_turn(block, part)
                length = sum(_working(self.blocks[i]) for i in turn)
                worth = sum(_count(self.blocks[i], _MATRIX) for i in turn) / length if matrix else float(length)
                if best is None or worth > best[0]:
                    best = (worth, turn, part)
        if best is None:
            return None
        _, turn, part = best
        inside, around = (sum(_working(self.blocks[i]) for i in blocks) for blocks in (turn, part))
        persistent = around > _PERSISTENT * inside
        return Loop(
            instructions=inside,
            matrix=sum(_count(self.blocks[i], _MATRIX) for i in turn),
            barriers=sum(_plain(instruction).startswith("BAR.") for i in turn for instruction in self.blocks[i]),
            outside=(around if persistent else self.total) - inside,
            persistent=persistent,
        )

    def _shortest_turn(self, start: int, part: set[int]) -> tuple[int, ...]:
        """Return the blocks of the shortest path from a block back to it."""
        best, before = {start: 0}, dict[int, int]()
        heap = [(0, start)]
        while heap:
            far, here = heapq.heappop(heap)
            if far > best.get(here, far):
                continue
            for after in self.follows[here]:
                if after == start:
                    turn = [here]
                    while turn[-1] != start:
                        turn.append(before[turn[-1]])
                    return tuple(turn)
                farther = far + len(self.blocks[after])
                if after in part and farther < best.get(after, farther + 1):
                    best[after], before[after] = farther, here
                    heapq.heappush(heap, (farther, after))
        raise RuntimeError("a block of a cycle has no path back to itself")


def disassemble(cubin: bytes) -> Code:
    """Return the code of a cubin that holds one function."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return Code.parse(said.stdout)


def _plain(instruction: str) -> str:
    """Return an instruction without its predicate."""
    return instruction.split(maxsplit=1)[-1] if instruction.startswith("@") else instruction


def _working(block: tuple[str, ...]) -> int:
    return sum(not instruction.startswith("NOP") for instruction in block)


def _count(block: tuple[str, ...], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.search(instruction)) for instruction in block)


def _circles(follows: tuple[tuple[int, ...], ...]) -> Iterator[set[int]]:
    """Yield strongly connected components that contain a cycle (Tarjan's algorithm, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    open_, inside = list[int](), set[int]()
    for root in range(len(follows)):
        if root in order:
            continue
        work = [(root, 0)]
        while work:
            block, at = work.pop()
            if at == 0:
                order[block] = low[block] = len(order)
                open_.append(block)
                inside.add(block)
            for i in range(at, len(follows[block])):
                after = follows[block][i]
                if after not in order:
                    work += [(block, i + 1), (after, 0)]
                    break
                if after in inside:
                    low[block] = min(low[block], order[after])
            else:
                if low[block] == order[block]:
                    part = set[int]()
                    while block not in part:
                        part.add(open_.pop())
                    inside -= part
                    if len(part) > 1 or block in follows[block]:
                        yield part
                if work:
                    above = work[-1][0]
                    low[above] = min(low[above], low[block])
