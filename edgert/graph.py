"""What a model is made of, as data: a chain of blocks along the residual stream. No device library in here."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from edgert.errors import BundleError
from edgert.fields import build

_PLACE = {"index", "name", "input", "output", "states"}  # fields that say where a block is, not what it does
BOUNDARY = "hidden"  # name of the residual stream as output of one submodel and input of the next


class BlockKind(StrEnum):
    """What a block does, judged by what is inside it (see `edgert.partition`)."""

    EMBED = "embed"
    ATTENTION = "attention"
    FFN = "ffn"
    MOE = "moe"
    SSM = "ssm"
    BLOCK = "block"  # anything else, e.g. attention and FFN in parallel
    HEAD = "head"
    TOWER = "tower"  # makes rows of features of an image or a sound; beside the chain


@dataclass(frozen=True)
class Block:
    """The operations between two points of the residual stream.

    Attributes:
        index: position in the chain, from 0.
        kind: what the block does.
        name: kind and number, e.g. `attention.3`; unique in its graph.
        input: tensor that enters, as `node:port`; None for the first block, which takes the model's own inputs.
        output: tensor that leaves, as `node:port`; for the last block, what feeds the model's result.
        states: ids of the state variables (keys and values, recurrent states) that live in the block.
        weight_bytes: bytes of constants by element type, e.g. `{"u4": 1835008, "f16": 57344}`, scales and zero
            points included. What several blocks share (RoPE tables) is counted in none; a tied embedding in both.
        flops_per_token: multiply-adds of the matrix products with weights, times two, for one token. For a mixture of
            experts only the experts that one token uses. Scores against the KV cache are not in it.
        kv_bytes_per_token: bytes by which the block's states grow with every token, at the precision in the file.
        recurrent_bytes: bytes of the states that do not grow.
        score_flops: operations for one query token against one key token, in all heads: scores and their use, a
            multiply-add being two. 0 where there is no attention or nobody knows.
        window: the number of tokens, itself included, that a token attends to at most; None for all of them, and where
            the block computes all and hides some.
    """

    index: int
    kind: BlockKind
    name: str
    input: str | None
    output: str
    states: tuple[str, ...]
    weight_bytes: dict[str, int]
    flops_per_token: int
    kv_bytes_per_token: int
    recurrent_bytes: int
    score_flops: int = 0
    window: int | None = None

    @cached_property
    def total_weight_bytes(self) -> int:
        return sum(self.weight_bytes.values())

    @cached_property
    def signature(self) -> str:
        """What blocks have in common that take equally long: their kind, and a hash of all sizes."""
        sizes = {name: value for name, value in asdict(self).items() if name not in _PLACE} | {
            "states": len(self.states)
        }
        return f"{self.kind}-{hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Edge:
    """What passes from one block to the next.

    Attributes:
        source, target: block indices, `target == source + 1`.
        tensor: `node:port`.
        bytes_per_token: size of the tensor for one token at f32.
        carried: what else is computed before the boundary and used behind it, as `node:port`: embeddings of each layer,
            keys and values that layers share, a second stream, a conditioning.
        carried_bytes_per_token: size of the carried tensors for one new token at f32.
        carried_bytes_per_past: their bytes for every token of the past, in each call: keys and values that later layers
            share. The cost model leaves them out.
    """

    source: int
    target: int
    tensor: str
    bytes_per_token: int
    carried: tuple[str, ...] = ()
    carried_bytes_per_token: int = 0
    carried_bytes_per_past: int = 0

    @property
    def crossing_bytes_per_token(self) -> int:
        """Bytes at f32 that pass the boundary with every new token, whatever the past holds."""
        return self.bytes_per_token + self.carried_bytes_per_token


@dataclass(frozen=True)
class BlockGraph:
    """A model as a chain of blocks.

    Attributes:
        blocks: in order of execution; at least one.
        edges: `len(blocks) - 1` boundaries.
        reason: why the model stays in one piece; None where it could be cut.
        towers: of images and sound, beside the chain; `name` is the folder.
    """

    blocks: tuple[Block, ...]
    edges: tuple[Edge, ...]
    reason: str | None = None
    towers: tuple[Block, ...] = ()

    @cached_property
    def signature(self) -> str:
        """What models have in common that take equally long: a hash of their blocks' signatures."""
        chain = [[b.signature for b in self.blocks], [e.crossing_bytes_per_token for e in self.edges]]
        return f"model-{hashlib.sha256(json.dumps(chain).encode()).hexdigest()[:12]}"

    @property
    def has_embedding(self) -> bool:
        """Whether the lookup of embeddings is a block of its own."""
        return len(self.blocks) > 1 and self.blocks[0].kind is BlockKind.EMBED

    @property
    def keeps_cache(self) -> bool:
        """Whether some block keeps anything between tokens."""
        return any(block.states for block in self.blocks)

    def select(self, selector: str) -> list[int]:
        """The blocks of a kind, of a name, at an index or in a range of indices, or all for `*`; none if none fits."""
        if selector == "*":
            return [b.index for b in self.blocks]
        if selector in {str(kind) for kind in BlockKind}:
            return [b.index for b in self.blocks if b.kind == selector]
        if match := re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", selector):
            first, last = int(match[1]), int(match[2] or match[1])
            return list(range(first, last + 1)) if last < len(self.blocks) else []
        return [b.index for b in self.blocks if b.name == selector]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BlockGraph:
        """Rebuild a graph from `to_json`.

        Raises:
            BundleError: a field is missing, unknown or of the wrong kind, or the chain is broken.
        """
        try:
            graph = build(cls, data, "block graph")
        except ValueError as error:
            raise BundleError(str(error)) from error
        blocks = graph.blocks
        tensors = [
            (a.output, edge.tensor, b.input) for a, edge, b in zip(blocks, graph.edges, blocks[1:], strict=False)
        ]
        chained = all(len(set(names)) == 1 for names in tensors) and blocks[:1] and blocks[0].input is None
        numbered = [b.index for b in blocks] == list(range(len(blocks))) and len(graph.edges) == len(blocks) - 1
        if not chained or not numbered:
            raise BundleError(f"block graph: {len(blocks)} blocks and {len(graph.edges)} edges do not form a chain")
        for tower in graph.towers:
            if tower.kind is not BlockKind.TOWER or tower.states or tower.input is not None:
                raise BundleError(f"block graph: {tower.name} is no tower: of kind {tower.kind}, with input or states")
        return graph
