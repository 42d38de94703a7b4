"""A rank that holds up the others is named, whatever became of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from leanseek.distributed import watch
from leanseek.distributed.watch import Note, verdict

Ends = list[tuple[int | None, str]]  # of each rank: exit code (None: it had to be killed) and words


@pytest.fixture(scope="module")
def groups() -> dict[str, Ends]:
    script = [sys.executable, str(Path(__file__).with_name("watched.py"))]
    return json.loads(subprocess.run(script, stdout=subprocess.PIPE, check=True, timeout=100).stdout)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "culprit", "says"),
    [
        ("sleeps", 1, "rank 1 has not moved for N s: at work after dispatch of layer 3, step 12; ranks 0, 2 wait in dispatch of layer 7, step 12"),
        ("stopped", 2, "rank 2 has stopped, or is gone with its process or machine; last seen at work after dispatch of layer 3, step 12; ranks 0-1 wait in"),
        ("holder stopped", 0, "rank 0, which holds the store, does not answer; rank"),
        ("exits", 1, "rank 1 has stopped, or is gone with its process or machine; last seen at work after dispatch of layer 3, step 12"),
        ("raises", 1, "rank 1 has ended after dispatch of layer 3, step 12: ValueError: no such shard; ranks 0, 2 wait in dispatch of layer 7"),
        ("elsewhere", None, "no rank is at fault alone, each waits for something else; ranks 0, 2 wait in dispatch of layer 7, step 12; rank 1 waits in combine of layer 7, step 12"),
        ("doctor", 1, "rank 1 has stopped, or is gone with its process or machine; last seen at work after send_recv of 4,096 bytes; ranks 0, 2 wait in the exchange of figures"),
    ],
)  # fmt: skip
def test_the_rank_at_fault_is_named(groups: dict[str, Ends], case: str, culprit: int | None, says: str) -> None:
    """By the others, once, before they end; in place of what their backend says, if that notices."""
    others = [end for rank, end in enumerate(groups[case]) if rank != culprit]
    assert [code for code, _ in others] == [1] * len(others), others
    lines = [line for _, text in others for line in text.splitlines() if line.startswith("leanseek: ")]
    assert len(lines) == (2 if case in ("exits", "holder stopped") else 1)
    assert [line for line in lines if says not in re.sub(r"\d+ s\b", "N s", line)] == []


def test_a_rank_at_work_is_left_alone_until_somebody_waits() -> None:
    """Ages below half the time-out are no fault; a rank that never wrote a note is."""
    notes = {
        0: Note(9, True, "reduce", 1, 61.0),
        1: Note(9, False, "reduce", 1, 5.0),
        2: Note(9, False, "", None, 61.0),
    }
    fault, waits = verdict(notes, set(), 4, 60.0)
    assert fault == "rank 2 has not moved for 61 s: at work after its start; rank 3 has not started to work"
    assert waits == "rank 0 waits in reduce, step 1; rank 1 waits for it, at work after reduce, step 1"


def test_many_ranks_are_one_line() -> None:
    notes = {rank: Note(9, True, "dispatch of layer 7", 12, 61.0) for rank in range(2048)}
    notes[5] = Note(9, False, "combine of layer 6", 12, 61.0)
    fault, waits = verdict(notes, {7, 8, 9}, 2048, 60.0)
    assert "ranks 7-9 have stopped" in fault and "rank 5 has not moved for 61 s" in fault
    assert waits == "ranks 0-4, 6, 10-2047 wait in dispatch of layer 7, step 12"


def test_phases_of_one_process_are_notes_that_nobody_reads() -> None:
    with pytest.raises(RuntimeError, match="as it was"), watch.phase("dispatch", layer=1):
        raise RuntimeError("as it was")
    with watch.phase("a"):
        with watch.phase("b"):
            pass
        assert watch._board.now[:2] == (True, "a")
    assert watch._board.now[:2] == (False, "a")
