"""The scheduler of a serving engine, made small: KV blocks, chunks of prompts, a prefix cache that
shares blocks as soon as they are scheduled, and preemption."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from engraphy.engines.chunks import Chunks, past_slots


@dataclass
class Request:
    """ids: the whole text, of which the last third counts as generated. done: tokens computed."""

    ids: list[int]
    done: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """One forward. parts: (request, first token, behind the last token) of each chunk."""

    chunks: Chunks
    lengths: list[int]
    parts: list[tuple[int, int, int]]


class PagedEngine:
    """Requests of which some begin alike, in random steps.

    past: how many slots before a chunk are wanted. counts: how often what is to be tested happened.
    """

    def __init__(self, seed: int, blocks: int, block_size: int, vocab: int, past: int) -> None:
        self.random = random.Random(seed)
        self.size = block_size
        self.past = past
        self.free = list(range(blocks))
        self.random.shuffle(self.free)
        self.cached: dict[tuple[int, ...], int] = {}  # prefix of full blocks -> its last block
        self.users: dict[int, int] = {}  # block -> requests that have it
        self.fresh: set[int] = set()  # blocks that this very forward fills
        shared = self._ids(3 * block_size + 1, vocab)
        self.requests = []
        for number in range(6):
            text = self._ids(self.random.randint(3, 18), vocab)
            self.requests.append(Request(shared * (number < 4) + text))
        self.counts = dict.fromkeys(
            ("chunks", "mixed", "hits", "hits in one forward", "preemptions"), 0
        )

    def unfinished(self) -> bool:
        return any(request.done < len(request.ids) for request in self.requests)

    def schedule(self) -> Plan:
        """The next forward: some of the requests, each with its next chunk."""
        self.fresh = set()
        parts: list[tuple[int, int, int]] = []
        order = [n for n, request in enumerate(self.requests) if request.done < len(request.ids)]
        self.random.shuffle(order)
        running = self.random.randint(1, len(order))
        for number in order[:running]:
            part = self._next(number, [other for other, _, _ in parts])
            if part is not None:
                parts.append(part)
        self.random.shuffle(parts)  # engines order the requests of a forward as they like
        for number, _, last in parts:
            self.requests[number].done = last
        lengths = [last - first for _, first, last in parts]
        self.counts["mixed"] += len(set(lengths)) > 1
        return Plan(self._chunks(parts, lengths), lengths, parts)

    def _next(self, number: int, scheduled: list[int]) -> tuple[int, int, int] | None:
        request = self.requests[number]
        if not request.blocks:
            self._take_cached(request)
        left = len(request.ids) - request.done
        length = 1
        if request.done < 2 * len(request.ids) // 3:
            length = self.random.randint(1, left)
            self.counts["chunks"] += 0 < length < left
        while len(request.blocks) * self.size < request.done + length:
            if not self.free and not self._preempt({number, *scheduled}):
                if not self._evict():
                    return None
                continue
            if self.free:
                block = self.free.pop()
                self._forget(block)
                self.users[block] = 1
                request.blocks.append(block)
        for end in range(self.size, request.done + length + 1, self.size):
            block = request.blocks[end // self.size - 1]
            if tuple(request.ids[:end]) not in self.cached:
                self.cached[tuple(request.ids[:end])] = block
                self.fresh.add(block)
        return number, request.done, request.done + length

    def _take_cached(self, request: Request) -> None:
        """A request that begins takes the blocks that are there, but computes its last token."""
        for end in range(self.size, len(request.ids), self.size):
            block = self.cached.get(tuple(request.ids[:end]))
            if block is None:
                return
            self.users[block] = self.users.get(block, 0) + 1
            if block in self.free:
                self.free.remove(block)
            request.blocks.append(block)
            request.done = end
            self.counts["hits"] += 1
            self.counts["hits in one forward"] += block in self.fresh

    def _preempt(self, kept: set[int]) -> bool:
        """Takes the blocks of a request that is not in this forward; it begins again later."""
        for number, request in enumerate(self.requests):
            if number not in kept and request.blocks and request.done < len(request.ids):
                self._release(request)
                request.done = 0
                self.counts["preemptions"] += 1
                return True
        return False

    def _evict(self) -> bool:
        """Takes the blocks of requests that are finished."""
        for request in self.requests:
            if request.blocks and request.done == len(request.ids):
                self._release(request)
                return True
        return False

    def _release(self, request: Request) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
                if self.random.random() < 0.5:  # the others stay in the cache until they are used
                    self._forget(block)
        request.blocks = []

    def _forget(self, block: int) -> None:
        self.cached = {prefix: other for prefix, other in self.cached.items() if other != block}

    def _chunks(self, parts: list[tuple[int, int, int]], lengths: list[int]) -> Chunks:
        requests = [self.requests[number] for number, _, _ in parts]
        most = max(len(request.blocks) for request in requests)
        table_RM = np.array([r.blocks + [0] * (most - len(r.blocks)) for r in requests])
        starts = np.array([first for _, first, _ in parts])
        ids: list[int] = []
        slots: list[int] = []
        for request, (_, first, last) in zip(requests, parts, strict=True):
            ids += request.ids[first:last]
            slots += [
                request.blocks[at // self.size] * self.size + at % self.size
                for at in range(first, last)
            ]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        past_RP = past_slots(table_RM, self.size, starts, self.past)
        return Chunks(torch.tensor(ids), bounds, np.array(slots), past_RP)

    def _ids(self, count: int, vocab: int) -> list[int]:
        return [self.random.randrange(1, vocab) for _ in range(count)]
