"""Pages of a key/value cache: which are free, who uses each, and what prompt prefix each holds."""

from __future__ import annotations

import collections
from collections.abc import Sequence


class PagePool:
    """Hands out the pages of a cache and counts their users.

    A full page of a prompt is known by the tokens in it and by the pages before it, so that a later prompt with the
    same beginning uses it again. A page that nobody uses keeps its content until it is handed out; those used least
    recently go first.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages = pages
        self._users = [0] * pages
        self._key: list[tuple | None] = [None] * pages
        self._content = [0] * pages  # a number that no other content of any page ever has
        self._contents = 0
        self._page_of: dict[tuple, int] = {}
        self._unused = collections.OrderedDict.fromkeys(range(pages))  # the first is handed out next

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._unused)

    def users(self, page: int) -> int:
        """How many requests use a page."""
        return self._users[page]

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one user each, or None and nothing taken if there are not as many."""
        if count > len(self._unused):
            return None
        return [self._take_first() for _ in range(count)]

    def _take_first(self) -> int:
        page, _ = self._unused.popitem(last=False)
        self._forget(page)
        self._users[page] = 1
        return page

    def drop(self, pages: Sequence[int]) -> None:
        """One user less for each. Later pages of a text are handed out before earlier ones, which more texts share."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._unused[page] = None
                if self._key[page] is None:  # nothing that anyone could use again
                    self._unused.move_to_end(page, last=False)

    def find_prefix(self, tokens: Sequence[int]) -> list[int]:
        """The pages that hold the longest known beginning of a text, each with one user more."""
        found, before = [], 0
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            page = self._page_of.get((before, *tokens[start : start + self.page_size]))
            if page is None:
                break
            found.append(page)
            before = self._content[page]
        for page in found:
            if self._users[page] == 0:
                del self._unused[page]
            self._users[page] += 1
        return found

    def register(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remember what the full pages of a text hold, whose keys and values are there."""
        before = 0
        for index in range(len(tokens) // self.page_size):
            page = pages[index]
            key = (before, *tokens[index * self.page_size : (index + 1) * self.page_size])
            if self._page_of.setdefault(key, page) != page:
                return  # the same text in other pages: theirs stay known, these are not
            if self._key[page] != key:
                self._key[page] = key
                self._contents += 1
                self._content[page] = self._contents
            before = self._content[page]

    def _forget(self, page: int) -> None:
        key, self._key[page] = self._key[page], None
        if key is not None:
            del self._page_of[key]
