"""Pages of the latent cache: which requests hold them, and which contain a known prefix.

A page is `page_size` consecutive rows of every layer's cache. Pages are reference-counted: requests with the same
prefix hold the same pages. A page filled with known tokens is registered under (its predecessor, its tokens) and stays
findable after its last holder releases it, until the page is needed; the least recently used page is reused first.

The lookup is a trie, not a hash: a page matches only if its own tokens are equal and its predecessor matched.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

ROOT = 0  # serial of the predecessor of a first page


class PagePool:
    def __init__(self, pages: int, page_size: int, prefix_cache: bool = True):
        self.pages = pages
        self.page_size = page_size
        self._prefix_cache = prefix_cache
        self._holders = [0] * pages
        self._serial = [0] * pages  # of registered pages; never reused, so an old successor cannot match a new page
        self._key: list[tuple[int, bytes] | None] = [None] * pages  # of registered pages
        self._known: dict[tuple[int, bytes], int] = {}
        self._empty = list(range(pages - 1, -1, -1))  # unregistered, held by nobody
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, held by nobody; oldest first
        self._last_serial = ROOT

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._empty) + len(self._idle)

    @property
    def cached(self) -> int:
        """Available pages that hold a known prefix."""
        return len(self._idle)

    def take(self) -> int | None:
        """A page to write to, with one holder; None if all pages are held."""
        if self._empty:
            page = self._empty.pop()
        elif self._idle:
            page = self._idle.popitem(last=False)[0]
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Release a sequence's pages, given in order; its last page will be reused first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                if self._key[page] is None:
                    self._empty.append(page)
                else:
                    self._idle[page] = None

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Hold and return the pages of the longest known prefix that leaves at least one token to compute."""
        found: list[int] = []
        if not self._prefix_cache:
            return found
        serial = ROOT
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            page = self._known.get((serial, _packed(tokens[start : start + self.page_size])))
            if page is None:
                break
            self._holders[page] += 1
            self._idle.pop(page, None)
            found.append(page)
            serial = self._serial[page]
        return found

    def register(self, page: int, after: int, tokens: Sequence[int]) -> int:
        """Make a filled page findable after the page with serial `after`; returns the serial for its successor.

        If another page already holds the same prefix, that one stays registered, and this page remains private.
        """
        if not self._prefix_cache:
            return ROOT
        key = (after, _packed(tokens))
        known = self._known.setdefault(key, page)
        if known == page and self._key[page] is None:
            self._last_serial += 1
            self._key[page], self._serial[page] = key, self._last_serial
        return self._serial[known]

    def clear(self) -> None:
        """Find nothing again of what was registered: the weights it was computed with have changed. Pages must not be
        held."""
        assert self.available == self.pages, "a page is held"
        while self._idle:
            page = self._idle.popitem()[0]
            self._forget(page)
            self._empty.append(page)

    def serial(self, page: int) -> int:
        return self._serial[page]

    def _forget(self, page: int) -> None:
        key = self._key[page]
        if key is not None:
            del self._known[key]
        self._key[page], self._serial[page] = None, 0

    def check(self, holdings: Iterable[Sequence[int]]) -> None:
        """Check that holder counts match the sequences' page lists, and that each page is either empty, idle or held.

        Raises:
            AssertionError: they do not.
        """
        held = Counter(page for pages in holdings for page in pages)
        assert all(self._holders[page] == held[page] for page in range(self.pages)), "reference counts are off"
        free = [*self._empty, *self._idle]
        assert len(free) == len(set(free)), "a page is free twice"
        assert set(free) == set(range(self.pages)) - set(held), "a page leaked, or is free and held"
        assert all(self._key[page] is None for page in self._empty), "an empty page is registered"
        assert all(self._key[page] is not None for page in self._idle), "an idle page is not registered"
        registered = {key: page for page, key in enumerate(self._key) if key is not None}
        assert registered == self._known, "the prefix table is off"


def _packed(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
