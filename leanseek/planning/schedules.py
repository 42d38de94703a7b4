"""Pipeline schedules (3.2.1) as tables: for each rank a list of what it computes, in order. Pure Python.

A network is cut into stages; a batch goes through them in micro-batches. `distributed/pipeline.py` runs these lists,
`simulate` times them, `faults` checks them, `timeline.py` draws them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from leanseek.config import ConfigError


class Action(NamedTuple):
    """What a rank does with one micro-batch in one of its stages.

    kind: "F" forward, "B" backward, or a backward in two halves: "I" gives the gradient of the stage's input, which
    the stage before waits for, and "W" the gradients of the weights, for which nobody waits.
    """

    kind: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}"


Step = tuple[Action, ...]  # one action, or F and B of two micro-batches overlapped


class Message(NamedTuple):
    """What goes to another stage after an action: "F" the hidden states that `stage` takes, "B" the gradients of those
    that it gave."""

    kind: str
    stage: int
    micro: int


class Schedule(NamedTuple):
    """A schedule of `micro_batches` on `ranks`; steps[r] is what rank r computes."""

    name: str
    ranks: int
    micro_batches: int
    stages: int
    steps: list[list[Step]]

    def rank_of(self, stage: int) -> int:
        """Ranks go down and, where each holds two stages, up again: rank 0 has the first and the last."""
        return stage if stage < self.ranks else 2 * self.ranks - 1 - stage

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]

    def needs(self, action: Action) -> tuple[int, Message] | None:
        """What an action needs of another stage, and the rank that makes it."""
        kind, stage, micro = action
        maker = stage - 1 if kind == "F" else stage + 1
        if kind == "W" or not 0 <= maker < self.stages:
            return None
        return self.rank_of(maker), Message("F" if kind == "F" else "B", stage, micro)

    def gives(self, action: Action) -> tuple[int, Message] | None:
        """What an action makes for another stage, and the rank that holds it."""
        kind, stage, micro = action
        taker = stage + 1 if kind == "F" else stage - 1
        if kind == "W" or not 0 <= taker < self.stages:
            return None
        return self.rank_of(taker), Message("F" if kind == "F" else "B", taker, micro)

    def actions(self, rank: int) -> list[Action]:
        return [action for step in self.steps[rank] for action in step]

    def link(self, sender: int, receiver: int) -> list[Message]:
        """What goes from one rank to another, in the order in which one sends and the other receives.

        It need not be the order in which the receiver uses it: in DualPipeV gradients overtake hidden states. A rank
        that posted its receives in the order of use would wait for what the other sends later, for ever
        (pytorch#172668).
        """
        found = filter(None, map(self.gives, self.actions(sender)))
        return [message for rank, message in found if rank == receiver]


# ---- the schedules ----


def one_forward_one_backward(ranks: int, micro_batches: int) -> Schedule:
    """1F1B: forwards until the first backward arrives, then one of each in turn. Idle (PP-1)(F+B)."""
    steps = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        own: list[Step] = [(Action("F", rank, m),) for m in range(ahead)]
        for m in range(micro_batches):
            if m + ahead < micro_batches:
                own.append((Action("F", rank, m + ahead),))
            own.append((Action("B", rank, m),))
        steps.append(own)
    return Schedule("1f1b", ranks, micro_batches, ranks, steps)


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P (arXiv 2401.10241, ZB-H1): 1F1B with backward in halves. Idle (PP-1)(F+B-2W).

    Rank r lets r weight gradients wait, so that each rank holds PP activations, as 1F1B's first does; those fill the
    end, where 1F1B waits for the gradients of the ranks behind.
    """
    steps = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        own: list[Step] = [(Action("F", rank, m),) for m in range(ahead)]
        for m in range(micro_batches):
            if m + ahead < micro_batches:
                own.append((Action("F", rank, m + ahead),))
            own.append((Action("I", rank, m),))
            if m >= rank:
                own.append((Action("W", rank, m - rank),))
        own += [(Action("W", rank, m),) for m in range(max(0, micro_batches - rank), micro_batches)]
        steps.append(own)
    return Schedule("zb1p", ranks, micro_batches, ranks, steps)


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """DualPipeV: two stages a rank, down and up again, so that forwards of one and backwards of the other overlap.

    The eight steps are those of github.com/deepseek-ai/DualPipe. With PP = 2 · ranks stages, idle is
    (PP/2-1)(F&B+B-3W) and each rank holds at most PP + 1 activations.

    Raises:
        ConfigError: fewer micro-batches than stages.
    """
    if micro_batches < 2 * ranks:
        raise ConfigError(
            f"schedule dualpipev on {ranks} ranks needs at least {2 * ranks} micro-batches, not {micro_batches}: "
            "make micro-batches smaller or the batch larger, or take zb1p"
        )
    steps = [_dualpipe_v_rank(rank, ranks, micro_batches) for rank in range(ranks)]
    return Schedule("dualpipev", ranks, micro_batches, 2 * ranks, steps)


def _dualpipe_v_rank(rank: int, ranks: int, micro_batches: int) -> list[Step]:
    down, up, behind = rank, 2 * ranks - 1 - rank, ranks - 1 - rank
    done: Counter[tuple[str, int]] = Counter()
    waiting: list[Action] = []  # weight gradients put off
    steps: list[Step] = []

    def take(kind: str, stage: int) -> Action:
        place = ("F" if kind == "F" else "B"), stage
        done[place] += 1
        action = Action(kind, stage, done[place] - 1)
        if kind == "I":
            waiting.append(Action("W", stage, action.micro))
        return action

    def alone(kind: str, stage: int) -> None:
        steps.append((take(kind, stage),))

    def overlapped(forward: int, backward: int) -> None:
        steps.append((take("F", forward), take("B", backward)))

    def weights() -> None:
        steps.append((waiting.pop(0),))

    for _ in range(2 * behind):  # 1: forwards of the way down
        alone("F", down)
    for _ in range(rank + 1):  # 2: forwards of both ways
        alone("F", down)
        alone("F", up)
    for _ in range(behind):  # 3: the first gradients arrive
        alone("I", up)
        weights()
        alone("F", up)
    for i in range(micro_batches - 2 * ranks + rank + 1):  # 4: forward and backward overlap
        if i == 0 and rank == ranks - 1:  # the turn: apart, so that the gradient leaves sooner
            alone("F", down)
            alone("B", up)
        else:
            overlapped(down, up)
        overlapped(up, down)
    for _ in range(behind):  # 5: no more forwards down
        alone("B", up)
        overlapped(up, down)
    for i in range(2 * (rank + 1)):  # 6: backwards; the second half puts weights off
        alone("I" if i > rank else "B", down if i % 2 else up)
    for _ in range(behind):  # 7: the weights fill the waits
        weights()
        alone("I", down)
    for _ in range(rank + 1):  # 8
        weights()
    return steps


def forwards(ranks: int, micro_batches: int, two: bool) -> Schedule:
    """Forwards alone, for evaluation; `two` stages a rank as in DualPipeV, or one."""
    steps: list[list[Step]] = []
    for rank in range(ranks):
        behind, own = ranks - 1 - rank, []
        for m in range(micro_batches + behind * two):
            own += [Action("F", rank, m)] * (m < micro_batches)
            own += [Action("F", 2 * ranks - 1 - rank, m - behind)] * (two and m >= behind)
        steps.append([(action,) for action in own])
    return Schedule("forwards", ranks, micro_batches, ranks * (1 + two), steps)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_forward_one_backward,
    "zb1p": zero_bubble,
    "dualpipev": dualpipe_v,
}


def build(name: str, ranks: int, micro_batches: int) -> Schedule:
    """The schedule of that name.

    Raises:
        ConfigError: there is none; or it needs more micro-batches, in which case the line says how many.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is not one of {', '.join(SCHEDULES)}")
    if ranks < 1 or micro_batches < 1:
        raise ConfigError(f"a pipeline has ranks and micro-batches: {ranks} and {micro_batches} are too few")
    return SCHEDULES[name](ranks, micro_batches)


# ---- time ----


class Times(NamedTuple):
    """How long a stage takes for a micro-batch, in any unit. `backward` is the whole of it, `weight` of that the
    weights' part; `pair` is a forward and a backward overlapped."""

    forward: float = 1.0
    backward: float = 2.0
    weight: float = 1.0
    pair: float = 3.0

    def of(self, step: Step) -> float:
        if len(step) > 1:
            return self.pair
        own = {"F": self.forward, "B": self.backward, "I": self.backward - self.weight, "W": self.weight}
        return own[step[0].kind]


class Span(NamedTuple):
    """A step and when it ran."""

    step: Step
    start: float
    end: float


Timeline = list[list[Span]]  # of each rank


class Stuck(RuntimeError):
    """Ranks wait for each other for ever."""


def simulate(schedule: Schedule, times: Times | None = None) -> Timeline:
    """When each step runs, if messages take no time: as soon as its rank is free and its inputs are there.

    Raises:
        Stuck: the schedule cannot be run to its end.
    """
    times = times or Times()
    spans: Timeline = [[] for _ in range(schedule.ranks)]
    ready: dict[Message, float] = {}
    done: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(schedule.steps):
            while len(spans[rank]) < len(steps):
                step = steps[len(spans[rank])]
                wanted = [message for _, message in filter(None, map(schedule.needs, step))]
                if not (ready.keys() >= set(wanted) and _before(step) <= done):
                    break
                start = max([spans[rank][-1].end if spans[rank] else 0.0, *(ready[message] for message in wanted)])
                end = start + times.of(step)
                spans[rank].append(Span(step, start, end))
                done.update(step)
                ready |= {message: end for _, message in filter(None, map(schedule.gives, step))}
                moved = True
    if waiting := [
        f"rank {rank} at {'&'.join(map(str, steps[len(own)]))}"
        for rank, (own, steps) in enumerate(zip(spans, schedule.steps, strict=True))
        if len(own) < len(steps)
    ]:
        raise Stuck(f"{schedule.name}: " + ", ".join(waiting))
    return spans


def _before(step: Step) -> set[Action]:
    """Actions of its own stages that must come before a step."""
    first = {"B": "F", "I": "F", "W": "I"}
    return {action._replace(kind=first[action.kind]) for action in step if action.kind in first}


def idle(timeline: Timeline) -> list[float]:
    """How long each rank waits, from the first start of any to the last end of any."""
    length = max(own[-1].end for own in timeline) - min(own[0].start for own in timeline)
    return [length - sum(span.end - span.start for span in own) for own in timeline]


def bubble(timeline: Timeline) -> float:
    """The share of the time that ranks wait."""
    busy = sum(span.end - span.start for own in timeline for span in own)
    return 1 - busy / (busy + sum(idle(timeline)))


def measured(timeline: Timeline) -> Times:
    """The mean times of what was recorded."""
    found: dict[str, list[float]] = {}
    for step, start, end in (span for own in timeline for span in own):
        found.setdefault("".join(action.kind for action in step), []).append(end - start)
    mean = {kind: sum(times) / len(times) for kind, times in found.items()}
    weight = mean.get("W", 0.0)
    backward = mean["B"] if "B" in mean else mean["I"] + weight
    return Times(mean["F"], backward, weight, mean.get("FB", mean["F"] + backward))


def activations(schedule: Schedule) -> list[int]:
    """The most micro-batches, counted in each stage, that each rank keeps something of for backward."""
    peaks = []
    for rank in range(schedule.ranks):
        held = peak = 0
        for action in schedule.actions(rank):
            held += {"F": 1, "I": 0}.get(action.kind, -1)
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


# ---- what can be wrong ----


def faults(schedule: Schedule) -> list[str]:
    """What is wrong with a schedule, a line each: nothing, if it can be run.

    Every micro-batch goes forward once and backward once through every stage, on the rank that holds it, weights after
    inputs; what one rank sends another uses, once; and no rank waits for ever.
    """
    found = []
    for rank in range(schedule.ranks):
        own = schedule.actions(rank)
        for stage in {action.stage for action in own} - set(schedule.stages_of(rank)):
            found.append(f"rank {rank} does not hold stage {stage}")
        for stage in schedule.stages_of(rank):
            for micro in range(schedule.micro_batches):
                order = "".join(a.kind for a in own if a[1:] == (stage, micro))
                if order not in ("FB", "FIW"):
                    found.append(f"stage {stage}, micro-batch {micro}: {order or 'nothing'} instead of FB or FIW")
    used: Counter[tuple[int, int, Message]] = Counter()
    sent: Counter[tuple[int, int, Message]] = Counter()
    for rank in range(schedule.ranks):
        used.update((maker, rank, m) for maker, m in filter(None, map(schedule.needs, schedule.actions(rank))))
        sent.update((rank, taker, m) for taker, m in filter(None, map(schedule.gives, schedule.actions(rank))))
    for sender, receiver, message in (used - sent) + (sent - used):
        found.append(f"rank {sender} to rank {receiver}: {message} is not sent once and used once")
    try:
        simulate(schedule)
    except Stuck as error:
        found.append(str(error))
    return found
