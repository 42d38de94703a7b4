"""Names the rank that holds up the others.

A collective waits for its slowest rank. If that one sleeps, is stopped or is gone, the backend's own time-out says at
best which connection it lost. So each rank notes what it waits for (`phase`: an assignment), a thread publishes the
note every second in a store, and a rank that has waited too long reads all notes, prints one line that names the rank
at fault, and ends its process with exit code 1, so that the launcher stops the others:

    rank 3 has not moved for 61 s: at work after dispatch of layer 7, step 12; ranks 0-2 wait in combine of layer 7, ...

A rank at work is left alone for as long as nobody waits for it. In one process the notes are written and never read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

from torch.distributed import PrefixStore, Store

from leanseek.errors import RunError
from leanseek.reading import shorten

BEAT = 1.0  # seconds between two notes of a rank
SILENT = 4  # beats without a note after which a rank counts as stopped


class _Now(NamedTuple):
    waits: bool
    what: str  # what it waits for; at work: what it waited for last
    since: float  # time.monotonic


class _Board:
    """What this process does at the moment: written by the thread that works, read by the one that watches."""

    now = _Now(False, "", time.monotonic())
    step: int | None = None
    watcher: _Watcher | None = None


_board = _Board()


class phase:
    """Around a wait for other ranks: `with watch.phase("dispatch", layer=7): dist.all_to_all_single(...)`.

    Raises:
        RunError: in place of what a collective raises when another rank is gone; names that rank.
    """

    __slots__ = ("before", "what")

    def __init__(self, what: str, layer: int | None = None):
        self.what = what if layer is None else f"{what} of layer {layer}"

    def __enter__(self) -> None:
        self.before = _board.now
        _board.now = _Now(True, self.what, time.monotonic())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, RuntimeError) and _board.watcher is not None and not isinstance(error, RunError):
            raise RunError(_board.watcher.reason(error)) from error
        _board.now = self.before if self.before.waits else _Now(False, self.what, time.monotonic())


def step(number: int) -> None:
    """Notes the step that this rank is in."""
    _board.step = number
    _board.now = _Now(False, "", time.monotonic())


@contextlib.contextmanager
def watching(store: Store, rank: int, world: int, timeout: float, holder: str = "rank 0") -> Iterator[None]:
    """Publishes this rank's notes, and ends the process once it has waited for more than `timeout` seconds.

    `timeout` must be longer than any rank's longest work between two waits, and shorter than the backend's own. `store`
    is this attempt's alone (`meet`); `holder` says who holds it and is at fault when it does not answer.
    """
    _board.now = _Now(False, "", time.monotonic())
    watcher = _board.watcher = _Watcher(store, rank, world, timeout, holder)
    try:
        yield
    except BaseException as error:
        watcher.close(f"{type(error).__name__}: {shorten(str(error), 300)}")
        raise
    else:
        watcher.close("its work was done")
    finally:
        _board.watcher = None


# ---- what the notes of all ranks say ----


class Note(NamedTuple):
    """What a rank published last."""

    beat: int
    waits: bool
    what: str
    step: int | None
    age: float  # seconds in this state
    ended: str = ""  # why it watches no more

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}"
        return ", ".join(part for part in (self.what, step) if part) or "its start"


def verdict(notes: Mapping[int, Note], silent: set[int], world: int, timeout: float) -> tuple[str, str]:
    """Which ranks are at fault (may be empty), and what the others wait for.

    Args:
        notes: by rank; a rank that never wrote one is missing.
        silent: ranks that have stopped publishing.
    """
    faults: dict[str, list[int]] = {}
    others: dict[str, list[int]] = {}
    for rank in range(world):
        note = notes.get(rank)
        if note is None:
            faults.setdefault("not started to work", []).append(rank)
        elif note.ended:
            faults.setdefault(f"ended after {note}: {note.ended}", []).append(rank)
        elif rank in silent:
            faults.setdefault(f"stopped, or is gone with its process or machine; last seen {_place(note)}", []).append(
                rank
            )
        elif not note.waits and note.age > timeout / 2:
            faults.setdefault(f"not moved for {note.age:.0f} s: {_place(note)}", []).append(rank)
        else:
            others.setdefault(f"in {note}" if note.waits else f"for it, {_place(note)}", []).append(rank)
    found = [f"{ranks_in_words(ranks)} {'has' if len(ranks) == 1 else 'have'} {what}" for what, ranks in faults.items()]
    waits = [
        f"{ranks_in_words(ranks)} {'waits' if len(ranks) == 1 else 'wait'} {what}" for what, ranks in others.items()
    ]
    return "; ".join(found), "; ".join(waits)


def _place(note: Note) -> str:
    return f"in {note}" if note.waits else f"at work after {note}"


def ranks_in_words(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join("-".join(map(str, span)) for span in spans)


# ---- the thread ----


class _Watcher:
    def __init__(self, store: Store, rank: int, world: int, timeout: float, holder: str):
        self.rank, self.world, self.timeout, self.holder = rank, world, timeout, holder
        # connections of their own: a store's is taken while one of its users waits, which may be for ever
        self.notes, self.court = (PrefixStore("watch", store.clone()) for _ in range(2))  # type: ignore[attr-defined]
        self.beat = 0
        self.failed = False  # the thread that works is free again, and says itself what is wrong
        self.judging = threading.Lock()
        self.closed = threading.Event()
        self._publish()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.thread.start()

    def close(self, ended: str) -> None:
        self.closed.set()
        self.thread.join()
        self._publish(ended)

    def reason(self, error: RuntimeError) -> str:
        """Why a collective failed in this process."""
        with self.judging:
            self.failed = True
            line, _ = self._verdict()
            time.sleep(SILENT * BEAT)
        said = shorten(str(error).splitlines()[0], 100) if str(error) else type(error).__name__
        return f"{line} ({_board.now.what} failed: {said})"

    def _publish(self, ended: str = "") -> None:
        self.beat += 1
        now = _board.now
        note = Note(self.beat, now.waits, now.what, _board.step, time.monotonic() - now.since, ended)
        with contextlib.suppress(RuntimeError):  # the store is gone: whoever waits for something will notice
            self.notes.set(str(self.rank), json.dumps(note))

    def _watch(self) -> None:
        while not self.closed.wait(BEAT):
            self._publish()
            now = _board.now
            if now.waits and time.monotonic() - now.since > self.timeout:
                with self.judging:
                    if not self.failed:
                        self._end(now)

    def _end(self, now: _Now) -> None:
        """Ends the process, unless it goes on with its work meanwhile (the machine was asleep)."""
        line, first = self._verdict()
        if _board.now is now:
            if first:
                print(f"leanseek: {line}", file=sys.stderr, flush=True)
            time.sleep(SILENT * BEAT)  # this process may hold the store, and others have not asked yet
            os._exit(1)  # the thread that works is inside the backend and cannot be interrupted
        if first:
            self.court.delete_key("verdict")
            self.court.delete_key("judges")

    def _verdict(self) -> tuple[str, bool]:
        """What is wrong, and whether this rank was the first to ask; the others get its line. Takes a bounded time."""
        found: list[tuple[str, bool]] = []
        thread = threading.Thread(target=lambda: found.append(self._judge()), daemon=True)  # may never return
        thread.start()
        for _ in range(4 * SILENT):
            thread.join(BEAT)
            if found:
                return found[0]
            self._publish()
        waited = time.monotonic() - _board.now.since
        lost = f"{self.holder}, which holds the store, does not answer; rank {self.rank} has waited for {waited:.0f} s"
        return lost, True

    def _judge(self) -> tuple[str, bool]:
        try:
            if self.court.add("judges", 1) > 1:
                for _ in range(2 * SILENT):
                    if self.court.check(["verdict"]):
                        return self.court.get("verdict").decode(), False
                    time.sleep(BEAT)
                # the first is lost itself
            before = self._read()
            time.sleep(SILENT * BEAT)
            notes = self._read()
            silent = {rank for rank, note in notes.items() if rank in before and note.beat == before[rank].beat}
            fault, waits = verdict(notes, silent, self.world, self.timeout)
            line = f"{fault or 'no rank is at fault alone, each waits for something else'}; {waits}"
            self.court.set("verdict", line)
            return line, True
        except RuntimeError:
            return f"{self.holder}, which held the store, is gone", True

    def _read(self) -> dict[int, Note]:
        there = [rank for rank in range(self.world) if self.court.check([str(rank)])]
        return {rank: Note(*json.loads(self.court.get(str(rank)))) for rank in there}
