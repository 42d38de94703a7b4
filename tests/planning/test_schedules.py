"""Pipeline schedules: every one can be run, waits as long as its formula says, and is the one torch makes."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining import schedules as peer

from leanseek.config import ConfigError
from leanseek.planning.schedules import (
    SCHEDULES,
    Action,
    Schedule,
    Step,
    Stuck,
    Times,
    activations,
    build,
    faults,
    forwards,
    idle,
    measured,
    simulate,
)

CASES = [
    (name, ranks, micro_batches)
    for name in SCHEDULES
    for ranks in range(1, 17)
    for micro_batches in sorted({1, 2, ranks, 2 * ranks, 2 * ranks + 1, 3 * ranks + 2})
    if name != "dualpipev" or micro_batches >= 2 * ranks
]


@pytest.mark.parametrize("name", SCHEDULES)
def test_send_recv_order_checked_over_all_schedules_pytorch_172668(name: str) -> None:
    """Up to 16 ranks: each micro-batch once through each stage, inputs before their step, nobody waits for ever."""
    assert not [(case, found) for case in CASES if case[0] == name and (found := faults(build(*case)))]


def test_gradients_overtake_hidden_states_in_dualpipev() -> None:
    """The order of use is not the order of sending: why receives are posted by `link`."""
    schedule = build("dualpipev", 4, 8)
    used = [m for rank, m in filter(None, map(schedule.needs, schedule.actions(1))) if rank == 0]
    sent = schedule.link(0, 1)
    assert used != sent and sorted(used) == sorted(sent)


def broken(*changes: tuple[int, int, Step | None]) -> Schedule:
    """1F1B of two ranks and three micro-batches with steps (rank, place, step or None) put in another's place."""
    schedule = build("1f1b", 2, 3)
    for rank, place, step in changes:
        schedule.steps[rank][place : place + 1] = [] if step is None else [step]
    return schedule


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (broken((0, 0, None)), "stage 0, micro-batch 0: B instead of FB or FIW"),
        (broken((0, 0, None)), "rank 0 to rank 1: Message(kind='F', stage=1, micro=0) is not sent once and used once"),
        (broken((1, 1, (Action("B", 1, 1),))), "stage 1, micro-batch 0: F instead of FB or FIW"),
        (broken((0, 0, (Action("B", 0, 0),)), (0, 2, (Action("F", 0, 0),))), "1f1b: rank 0 at 0B0, rank 1 at 1F0"),
        (broken((1, 1, (Action("W", 1, 0),))), "1f1b: rank 0 at 0B0, rank 1 at 1W0"),
        (broken((0, 5, (Action("I", 0, 2),))), "stage 0, micro-batch 2: FI instead of FB or FIW"),
        (broken((0, 0, (Action("F", 1, 0),))), "rank 0 does not hold stage 1"),
    ],
)
def test_the_checker_says_what_is_wrong(schedule: Schedule, said: str) -> None:
    assert said in faults(schedule)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    with pytest.raises(Stuck, match="rank 0 at 0B1, rank 1 at 1F1"):
        simulate(broken((0, 1, (Action("B", 0, 1),)), (0, 4, (Action("F", 0, 1),))))


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_are_the_tables(name: str) -> None:
    for ranks in (1, 2, 4, 8, 16):
        for micro_batches in (2 * ranks, 3 * ranks + 1):
            found = activations(build(name, ranks, micro_batches))
            if name == "1f1b":
                assert found == [ranks - rank for rank in range(ranks)]
            else:  # PP of DualPipeV counts its stages
                assert found == [ranks if name == "zb1p" else 2 * ranks + 1] * ranks


@pytest.mark.parametrize("pp", [4, 8, 16])
def test_idle_time_is_the_formula(pp: int) -> None:
    """DualPipeV holds PP stages on PP/2 ranks. Formulas assume that inputs' gradients take as long as a forward."""
    for times in (Times(), Times(2.0, 3.5, 1.5, 5.5), Times(2.0, 3.0, 1.0, 4.2)):
        f, b, w, pair = times
        for micro_batches in (2 * pp, 3 * pp + 1):
            assert idle(simulate(build("1f1b", pp, micro_batches), times)) == pytest.approx([(pp - 1) * (f + b)] * pp)
            found = idle(simulate(build("zb1p", pp, micro_batches), times))
            assert found == pytest.approx([(pp - 1) * (f + b - 2 * w)] * pp)
            found = idle(simulate(build("dualpipev", pp // 2, micro_batches), times))
            assert max(found) == pytest.approx((pp / 2 - 1) * (pair + b - 3 * w))  # others overlap more pairs
            if pair == f + b:
                assert found == pytest.approx([max(found)] * (pp // 2))
    assert idle(simulate(build("dualpipev", pp // 2, 2 * pp))) == [{4: 2, 8: 6, 16: 14}[pp]] * (pp // 2)


def test_micro_batches_below_stages_torchtitan_775() -> None:
    """The line says how many it takes; 1F1B and ZB1P run with any number."""
    with pytest.raises(ConfigError, match=r"dualpipev on 4 ranks needs at least 8 micro-batches, not 7: .*zb1p"):
        build("dualpipev", 4, 7)
    for name in ("1f1b", "zb1p"):
        assert not faults(build(name, 4, 1))


@pytest.mark.parametrize(("name", "ranks", "micro_batches"), [("gpipe", 2, 4), ("1f1b", 0, 4), ("zb1p", 2, 0)])
def test_what_is_no_schedule_is_refused(name: str, ranks: int, micro_batches: int) -> None:
    with pytest.raises(ConfigError, match=r"is not one of 1f1b, zb1p, dualpipev|are too few"):
        build(name, ranks, micro_batches)


@pytest.mark.parametrize("name", SCHEDULES)
def test_measured_times_are_those_of_a_simulation(name: str) -> None:
    times = Times(2.0, 3.5, 1.5, 4.5)
    found = measured(simulate(build(name, 4, 9), times))
    assert found.forward == 2.0 and found.backward == 3.5
    assert found.weight == (1.5 if name != "1f1b" else 0.0)
    assert found.pair == (4.5 if name == "dualpipev" else 5.5)


@pytest.mark.parametrize("two", [False, True])
def test_forwards_alone_can_be_run(two: bool) -> None:
    for ranks in range(1, 9):
        for micro_batches in (1, 2, 7):
            schedule = forwards(ranks, micro_batches, two)
            found = sorted(span.step[0] for own in simulate(schedule) for span in own)
            assert found == [Action("F", s, m) for s in range(schedule.stages) for m in range(micro_batches)]
            assert all(a.stage in schedule.stages_of(r) for r, own in enumerate(schedule.steps) for (a,) in own)


# ---- torch's tables, made without its process groups ----


def torch_steps(name: str, ranks: int, micro_batches: int) -> list[list[str]]:
    """What torch's schedule computes on each rank, without its waits and its reduction of gradients."""
    kind = {"1f1b": "Schedule1F1B", "zb1p": "ScheduleInterleavedZeroBubble", "dualpipev": "ScheduleDualPipeV"}[name]
    made = object.__new__(getattr(peer, kind))
    made.pp_group_size = made._num_stages = ranks
    made._n_microbatches = made.microbatches_per_round = micro_batches
    made.n_local_stages = 1
    if name == "1f1b":
        found = made._get_pipeline_order()
    else:
        found = {rank: made._calculate_single_rank_operations(rank) for rank in range(ranks)}
    return [[_words(action) for action in found[rank] if _computes(action)] for rank in range(ranks)]


def _computes(action: peer._Action | None) -> bool:
    return action is not None and action.computation_type.name != "REDUCE_GRAD"


LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def _words(action: peer._Action) -> str:
    parts = action.sub_actions or (action,)
    return "&".join(f"{a.stage_index}{LETTERS[a.computation_type.name]}{a.microbatch_index}" for a in parts)


def own_steps(name: str, ranks: int, micro_batches: int) -> list[list[str]]:
    return [["&".join(map(str, step)) for step in own] for own in build(name, ranks, micro_batches).steps]


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_are_torchs(name: str) -> None:
    """But for the last rank of torch's 1F1B table, which counts forwards from 1: micro-batch 0 is missing there, and
    one follows the last."""
    for ranks in range(1, 17):
        for micro_batches in (2 * ranks, 2 * ranks + 1, 3 * ranks + 2):
            case = (name, ranks, micro_batches)
            compared = slice(ranks - 1 if name == "1f1b" else ranks)
            assert own_steps(*case)[compared] == torch_steps(*case)[compared], case


def test_steps_with_fewer_micro_batches_than_stages() -> None:
    """ZB1P is torch's there too; torch's 1F1B has forwards of micro-batches that there are not."""
    for micro_batches in (1, 2, 3):
        assert own_steps("zb1p", 4, micro_batches) == torch_steps("zb1p", 4, micro_batches)
    assert own_steps("1f1b", 4, 2)[0] == ["0F0", "0F1", "0B0", "0B1"]
    assert own_steps("1f1b", 4, 2)[3] == ["3F0", "3B0", "3F1", "3B1"]
