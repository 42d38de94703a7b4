"""What runs in a step: who may hold pages, and how a step's rows are shared out.

Decodes always run. Prompts share what is left of the step: the shortest first, so that nobody waits for a long prompt,
and a quarter for the oldest, so that no stream of short ones starves it. Several short prompts make a step longer: many
rows read the weights once, and one after the other the prompts would wait as long. When pages run out the youngest
request gives its pages back and starts again later (its tokens stay): the oldest always gets through.
"""

from __future__ import annotations

import bisect
from array import array

from leanseek.engine.pages import ROOT, PagePool
from leanseek.engine.sequence import Sequence, Work

OLDEST_SHARE = 4  # one part in so many of a step's prompt rows is the oldest prompt's
TOGETHER = 4  # times a step's usual rows, for as many short prompts
MIN_PROMPT_ROWS = 16  # prompts advance by that much in a step, however many decodes there are


class Scheduler:
    def __init__(self, pool: PagePool, max_batch: int):
        self.pool = pool
        self.max_batch = max_batch
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended; its pages are free."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def schedule(self, budget: int, most: int) -> list[Work]:
        """The works of the next step, with pages for all of them; none only if nothing is left.

        About `budget` rows, or up to `most` for several short prompts together.
        """
        while True:
            works = self._decodes()
            self._admit()
            works += self._prompts(works, budget, most)
            if works or not self.running:
                return works
            self._preempt()  # prompts hold all pages, and each needs one more

    def _decodes(self) -> list[Work]:
        """One token, and its drafts, of every sequence whose other tokens are in the cache."""
        works, preemptions = [], self.preemptions
        for sequence in list(self.running):
            if len(sequence.tokens) - sequence.computed != 1:
                continue
            if self.preemptions != preemptions and sequence not in self.running:  # an older one took its pages
                continue
            while not self._grow(sequence, 1 + len(sequence.drafts)):
                if sequence.drafts:
                    sequence.drafts.clear()
                    continue
                self._preempt()
                if sequence not in self.running:
                    break
            else:
                works.append(Work(sequence, 1, True))
        return works

    def _admit(self) -> None:
        """Let waiting sequences in, in order, as long as there are pages for all they bring beside what runs."""
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_batch:
                return
            leader = sequence.leader
            if leader is not None and not leader.prefilled and leader.finish_reason is None:
                continue  # its prompt will soon be in the cache
            found = [] if sequence.scores_prompt else self.pool.match(sequence.tokens)
            promised = sum(self._missing(other, other.remaining) + 1 for other in self.running)
            needed = self._pages_for(len(sequence.tokens)) - len(found)
            if self.running and needed + promised > self.pool.available:
                self.pool.release(found)
                return  # nobody overtakes: a long prompt's turn comes
            self.waiting.remove(sequence)
            bisect.insort(self.running, sequence, key=_order)
            sequence.pages = array("q", found)
            sequence.registered = len(found)
            sequence.serial = self.pool.serial(found[-1]) if found else ROOT
            sequence.computed = len(found) * self.pool.page_size
            if not sequence.output_length:
                sequence.cached_tokens = sequence.computed

    def _prompts(self, decodes: list[Work], budget: int, most: int) -> list[Work]:
        """Shares of the step for the sequences that have more than one token to compute."""
        if len(decodes) == len(self.running):
            return []
        decoding = {work.sequence for work in decodes}
        prompts = [s for s in self.running if s not in decoding]
        short = sum(s.remaining <= TOGETHER * budget for s in prompts)
        rows = min(most, budget * max(1, min(short, TOGETHER)))
        budget = max(MIN_PROMPT_ROWS, rows - sum(work.rows for work in decodes))
        oldest = prompts[0] if prompts else None
        shares: dict[Sequence, int] = {}
        used = 0
        for sequence in sorted(prompts, key=lambda s: (s.request.priority, s.remaining)):
            reserved = 0 if oldest in shares or sequence is oldest else budget // OLDEST_SHARE
            room = budget - used - reserved
            if used and sequence.remaining > room:  # it will not be done: those that will be need not wait for it
                room = min(room, max(MIN_PROMPT_ROWS, used // (OLDEST_SHARE - 1)))
            shares[sequence] = max(0, min(room, sequence.remaining))
            used += shares[sequence]
        return [Work(s, rows, rows == s.remaining) for s, rows in shares.items() if rows and self._grow(s, rows)]

    # ---- pages ----

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)

    def _missing(self, sequence: Sequence, rows: int) -> int:
        return max(0, self._pages_for(sequence.computed + rows) - len(sequence.pages))

    def _grow(self, sequence: Sequence, rows: int) -> bool:
        """Give a sequence the pages for its next `rows` rows; none at all if they are not there."""
        if sequence.computed + rows <= len(sequence.pages) * self.pool.page_size:
            return True
        missing = self._missing(sequence, rows)
        if missing > self.pool.available:
            return False
        sequence.pages.extend(page for _ in range(missing) if (page := self.pool.take()) is not None)
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.registered, sequence.serial = array("q"), 0, 0, ROOT
        sequence.drafts.clear()

    def _preempt(self) -> None:
        """Take all pages from the youngest; its tokens are computed again when there is room."""
        youngest = self.running.pop()
        self._release(youngest)
        self.add(youngest)
        self.preemptions += 1


def _order(sequence: Sequence) -> tuple[float, int, int]:
    return sequence.order
