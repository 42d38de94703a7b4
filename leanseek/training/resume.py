"""Resumes a run whose configuration may have changed: decides what to keep, what to report and what to refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from leanseek.checkpoint import CheckpointError
from leanseek.checkpoint.training import Resumed
from leanseek.config import ConfigError
from leanseek.data.loader import TokenDataset
from leanseek.training.config import RunConfig
from leanseek.training.origin import check_tokenizer
from leanseek.training.schedules import batch_size, bias_update_speed, learning_rate, mtp_weight


class Position(NamedTuple):
    """How far a run is in its data."""

    samples: int  # windows of the data's endless stream that are done, which is the next one's number
    tokens: int  # tokens trained on

    def after(self, samples: int, seq_len: int) -> Position:
        return Position(self.samples + samples, self.tokens + samples * seq_len)


def check_data(then: RunConfig, now: RunConfig, data: TokenDataset, found: Resumed) -> None:
    """Check that the checkpoint's position in the data is valid in `data` too.

    Raises:
        ConfigError: the shards have another tokenizer, or the documents come in another order.
    """
    if (stored := found.folder / "tokenizer.json").is_file():
        check_tokenizer(stored, found.folder, data.folder)
    check_kept(then, now, {"train.seed": "the order of the data", "data.fim_rate": "every position in the data"})


def check_kept(then: RunConfig, now: RunConfig, settings: dict[str, str]) -> None:
    """Check that settings are as they were; what depends on each stands beside it.

    Raises:
        ConfigError: one has changed.
    """
    for key, what in settings.items():
        section, name = key.split(".")
        before, after = (getattr(getattr(run, section), name) for run in (then, now))
        if before != after:
            raise ConfigError(
                f"{key} = {after}, but the run continues with {before}: {what} depends on it; keep it, or start a new "
                "run"
            )


def position(then: RunConfig, now: RunConfig, data: TokenDataset, found: Resumed) -> tuple[Position, list[str]]:
    """The stored position from which to continue, and lines about what could not be kept exactly.

    With another seq_len, a token is in a window with another number; the rest of a started window is skipped.
    """
    where = Position(_count(found, "samples"), _count(found, "tokens"))
    lines, held = [], found.state.get("data", size(data))
    if held != size(data):
        what = "{:,} documents of {:,} tokens in all"
        lines.append(
            f"{data.folder} holds {what.format(*size(data))}, the checkpoint's data held {what.format(*held)}: "
            f"the run continues at window {where.samples} of the new"
        )
    if then.data.seq_len == now.data.seq_len:
        return where, lines
    length = now.data.seq_len
    epoch, place = divmod(where.samples, (size(data)[1] - now.model.lookahead) // then.data.seq_len)
    behind = place * then.data.seq_len
    windows = -(-behind // length)  # of the new length, in this epoch
    line = f"windows of {length} tokens go on {windows * length - behind} tokens after those of {then.data.seq_len}"
    return Position(epoch * data.samples_per_epoch + windows, where.tokens), [*lines, line]


def size(data: TokenDataset) -> list[int]:
    """Number of documents and of tokens, which tells the checkpoint's shards from others."""
    return [len(data), sum(map(len, data.shards))]


def _count(found: Resumed, key: str) -> int:
    value = found.state.get(key)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{found.folder / 'state.json'}: {key} is {value!r}, not a number of {key}")
    return value


def changes(then: RunConfig, now: RunConfig, step: int) -> list[str]:
    """A line with every setting that differs from the checkpoint's, and one with what that does to the next step."""
    before, after = dict(_flat(then)), dict(_flat(now))
    differ = [f"{key} {before[key]} -> {value}" for key, value in after.items() if before.get(key, value) != value]
    if not differ:
        return []
    lines = [f"resumed with other settings: {', '.join(differ)}"]
    scheduled = {
        "learning rate": learning_rate,
        "batch size": batch_size,
        "bias update speed": bias_update_speed,
        "MTP weight": mtp_weight,
    }
    last = min(step, then.train.steps - 1)  # a finished run has no next step of its own
    jumps = [
        f"{name} {schedule(then, last):.3g} -> {schedule(now, step):.3g}"
        for name, schedule in scheduled.items()
        if step < now.train.steps and schedule(then, last) != schedule(now, step)
    ]
    if jumps:
        stretched = " (schedules are shares of train.steps)" if then.train.steps != now.train.steps else ""
        lines.append(f"step {step + 1} by the old and the new settings{stretched}: {', '.join(jumps)}")
    return lines


def _flat(run: RunConfig) -> Iterator[tuple[str, Any]]:
    for section in run.sections():
        for key, value in dataclasses.asdict(getattr(run, section)).items():
            yield f"{section}.{key}", run.moments if key == "moments" else value  # auto depends on train.precision
