"""A search among shares that are all there, to its end, and who did not agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mesh.core.search import Search
from mesh.core.secret import Buffer
from mesh.core.sharing import Blame, blame


class Found(NamedTuple):
    """What came out."""

    secret: bytes
    used: tuple[int, ...]
    blame: Blame = Blame()


def find_secret(
    shares: Mapping[int, Buffer],
    k: int,
    accept: Callable[[bytes], bool],
    order: Sequence[int] | None = None,
    *,
    randomness: Callable[[int], bytes] | None = None,
) -> Found | None:
    """Shares in that order of arrival, ascending by default."""
    search = Search(k, accept, randomness=randomness)
    for index in order or sorted(shares):
        search.add(index, shares[index])
    found = search.run()
    assert found is not None or search.is_over
    return found and Found(*found, blame(shares, k, found.used, randomness=randomness))
