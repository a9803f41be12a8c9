"""What no policy can beat: Belady's choice, made knowing what is asked next."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def optimum(requests: Sequence[Ids], capacity: int) -> list[int]:
    """Return the leading blocks that each request would find, with hindsight.

    Of the blocks that are there and those just asked for, the ones asked again
    soonest are kept; a block may be passed by. Among blocks that the same request
    asks for next the later ones go first, so that no prefix goes before its suffix.
    Source: Belady 1966; Mattson et al. 1970.
    """
    following = _following(np.concatenate(requests) if requests else np.empty(0))
    ends = accumulate(map(len, requests), initial=0)
    due: set[int] = set()
    """Where in the sequence of all accesses each kept block is asked for next."""
    latest: list[int] = []
    """The same, negated, as a heap; what has passed by stays and sinks."""
    hits = []
    for start, blocks in zip(ends, requests, strict=False):
        places = range(start, start + len(blocks))
        hits.append(
            next((i for i, at in enumerate(places) if at not in due), len(blocks))
        )
        due.difference_update(places)
        for again in following[start : start + len(blocks)]:
            if again >= 0:
                due.add(again)
                heapq.heappush(latest, -again)
        while len(due) > capacity:
            due.discard(-heapq.heappop(latest))
    return hits


def _following(ids: npt.NDArray[np.float64] | Ids) -> list[int]:
    """Return where each access's block is accessed next; -1 for never."""
    order = np.argsort(ids, kind="stable")
    again = ids[order[1:]] == ids[order[:-1]]
    following = np.full(ids.size, -1)
    following[order[:-1][again]] = order[1:][again]
    places: list[int] = following.tolist()
    return places
