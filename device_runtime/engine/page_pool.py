"""Which KV page belongs to whom; pages hold no data here, a backend owns that.

A page is in exactly one of three states: free (its content is worthless), cached (unused, but
found again by the tokens it holds, least recently used first to go) or held (one or more holders).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from device_runtime.errors import InternalError

DIGEST_BYTES = 16


def root_digest(salt: str) -> bytes:
    """Return the parent of a first page; sequences share pages only under the same salt."""
    return hashlib.blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the name of a full page: its token ids after those of every page before it."""
    content = np.asarray(token_ids, np.int32).tobytes()
    return hashlib.blake2b(parent + content, digest_size=DIGEST_BYTES).digest()


class PagePool:
    """Hands out pages, counts their holders and finds full ones again by their tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # A stack, so that pages used before are used again and neighbours stay neighbours.
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * num_pages
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._released: list[int] = []

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can still give: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Unused pages whose tokens can still be found."""
        return len(self._cached)

    def allocate(self) -> int | None:
        """Return a page with one holder, or None; cached pages go only when none is free."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._num_holders[page] = 1
        return page

    def find_prefix(self, token_ids: Sequence[int], root: bytes, max_tokens: int) -> list[int]:
        """Return the pages that hold the longest known start of ``token_ids``, one holder added.

        Args:
            token_ids: of the sequence.
            root: digest before the first page.
            max_tokens: the pages hold no more tokens than this.
        """
        pages: list[int] = []
        parent = root
        for end in range(self.page_size, min(max_tokens, len(token_ids)) + 1, self.page_size):
            parent = page_digest(parent, token_ids[end - self.page_size : end])
            page = self._page_of.get(parent)
            if page is None:
                break
            pages.append(page)
        self.retain(pages)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add a holder to each page; a cached page is held again."""
        for page in pages:
            self._cached.pop(page, None)
            self._num_holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take a holder from each page, in order; give the last page of a sequence first.

        Raises:
            InternalError: a page has no holder.
        """
        for page in pages:
            if self._num_holders[page] == 0:
                raise InternalError(f"page {page} is released but has no holder")
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            if page in self._digest_of:
                self._cached[page] = None
            else:
                self._free.append(page)
                self._released.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Make a full, held page findable; of two pages with the same tokens the first stays it."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def is_writable(self, page: int) -> bool:
        """Return whether the one holder may overwrite the page."""
        return self._num_holders[page] == 1 and page not in self._digest_of

    def take_released(self) -> list[int]:
        """Return the pages that became free since the last call."""
        released, self._released = self._released, []
        return released

    def drop_cached(self) -> None:
        """Forget every cached page."""
        while self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
            self._free.append(page)
            self._released.append(page)

    def check_integrity(self, holders: Mapping[int, int] | None = None) -> None:
        """Compare the books with each other, and with the holders the caller knows.

        Args:
            holders: number of holders of each held page.

        Raises:
            InternalError: a page is in two states or none, or a count is wrong.
        """
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._num_holders) if count}
        if len(free) != len(self._free) or len(free) + len(cached) + len(held) != self.num_pages:
            raise InternalError(
                f"{len(self._free)} free + {len(cached)} cached + {len(held)} held pages "
                f"do not make {self.num_pages}"
            )
        if free & cached or free & held or cached & held:
            raise InternalError(
                f"pages {sorted(free & cached | free & held | cached & held)[:8]} are in two states"
            )
        if not cached <= set(self._digest_of) or free & set(self._digest_of):
            raise InternalError("a cached page has no digest or a free page has one")
        if {digest: page for page, digest in self._digest_of.items()} != self._page_of:
            raise InternalError("digests and pages do not map onto each other")
        counts = {page: count for page, count in enumerate(self._num_holders) if count}
        if holders is not None and dict(holders) != counts:
            differing = sorted(set(counts.items()) ^ set(dict(holders).items()))
            raise InternalError(f"(page, holders) {differing[:8]} differ between pool and holders")

    def _forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
