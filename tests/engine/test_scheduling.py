"""Who runs when: nobody starves, newcomers are heard, priorities count, and the books are right after every step."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from leanseek import Transformer
from leanseek.engine import Request, SamplingParams
from leanseek.engine.engine import PRIORITY_SECONDS
from leanseek.engine.pages import PagePool
from leanseek.engine.scheduler import Scheduler
from leanseek.engine.sequence import Sequence


def sequence(name: str, length: int, order: float = 0.0, priority: int = 0) -> Sequence:
    request = Request(name, list(range(length)), SamplingParams(), priority)
    return Sequence(request, 0, (order, 0, 0), 0, 100, None, None, None)


def rows_of(scheduler: Scheduler, budget: int, most: int | None = None) -> dict[str, int]:
    """Schedule, and pretend that it was computed."""
    works = scheduler.schedule(budget, most or budget)
    for work in works:
        work.sequence.computed += work.count
        if work.sequence.remaining == 0:
            work.sequence.tokens.append(0)
    return {work.sequence.request.request_id: work.count for work in works}


def test_a_short_prompt_behind_a_long_one_runs_in_the_next_step() -> None:
    scheduler = Scheduler(PagePool(1000, 16), 8)
    scheduler.add(sequence("long", 4000, order=0))
    assert rows_of(scheduler, 100) == {"long": 100}
    scheduler.add(sequence("short", 60, order=1))
    assert rows_of(scheduler, 100) == {"short": 60, "long": 20}  # a quarter of the step, not what is left of it


def test_short_prompts_share_a_longer_step_and_long_ones_do_not() -> None:
    """A newcomer must not find a long prompt's long step before it, and need not read the weights for each short one."""
    scheduler = Scheduler(PagePool(1000, 16), 100)
    scheduler.add(sequence("long", 4000, order=0))
    scheduler.add(sequence("longer", 5000, order=0))
    assert sum(rows_of(scheduler, 50, most=512).values()) <= 50
    scheduler = Scheduler(PagePool(1000, 16), 100)
    for i in range(20):
        scheduler.add(sequence(str(i), 40, order=i))
    assert sum(rows_of(scheduler, 50, most=512).values()) == 200
    assert sum(rows_of(scheduler, 50, most=100).values()) <= 100


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    scheduler = Scheduler(PagePool(1000, 16), 1000)
    long = sequence("long", 1000, order=0)
    scheduler.add(long)
    for step in range(1000 // 16 + 1):
        for i in range(3):
            scheduler.add(sequence(f"{step}.{i}", 90, order=step))
        rows_of(scheduler, 100)
    assert long.output_length > 0


def test_decodes_always_run() -> None:
    scheduler = Scheduler(PagePool(1000, 16), 100)
    for i in range(50):
        scheduler.add(sequence(str(i), 1, order=0))
    rows_of(scheduler, 64)
    scheduler.add(sequence("long", 500, order=1))
    rows = rows_of(scheduler, 20)
    assert len(rows) == 51
    assert rows["long"] == 16


def test_priority_orders_the_queue_but_waiting_counts_too(model: Transformer, make_engine: Callable) -> None:
    """A level is worth PRIORITY_SECONDS of having come earlier."""
    engine = make_engine(model, max_batch=1)
    arrivals = {"first": (0, 0.0), "urgent": (-1, 5.0), "late": (0, 6.0), "patient": (1, 7.0 - PRIORITY_SECONDS - 2)}
    for name, (priority, arrived) in arrivals.items():
        engine.add(Request(name, [3, 4], SamplingParams(max_tokens=2), priority, 1000 + arrived))
    ended = []
    while engine.has_work():
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
    assert ended == ["urgent", "first", "patient", "late"]


def test_a_prompt_that_does_not_fit_yet_is_not_overtaken() -> None:
    scheduler = Scheduler(PagePool(10, 10), 8)
    scheduler.add(sequence("running", 50, order=0))
    rows_of(scheduler, 100)
    scheduler.add(sequence("big", 80, order=1))
    scheduler.add(sequence("small", 5, order=2))
    assert rows_of(scheduler, 100) == {"running": 1}
    scheduler.remove(scheduler.running[0])
    assert rows_of(scheduler, 100) == {"big": 80, "small": 5}


def test_the_youngest_is_preempted_and_the_oldest_goes_on() -> None:
    scheduler = Scheduler(PagePool(8, 4), 8)
    for order, name in enumerate(("old", "middle", "young")):
        scheduler.add(sequence(name, 8, order=order))
    seen = [set(rows_of(scheduler, 100)) for _ in range(12)]
    assert scheduler.preemptions > 0
    assert all("old" in names for names in seen)
    assert all("middle" in names for names in seen if "young" in names)


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 60), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2)),
            st.tuples(st.just("abort"), st.integers(0, 20)),
            st.tuples(st.just("step"), st.integers(1, 4)),
        ),
        min_size=5,
        max_size=30,
    ),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 2),
)
def test_any_mix_of_requests_and_aborts_leaves_the_books_right(
    model: Transformer, make_engine: Callable, cache_gib: Callable, actions: list, page_size: int, drafts: int
) -> None:
    """A scarce cache, random arrivals, choices, priorities and aborts: every choice ends once, no page is lost."""
    engine = make_engine(
        model, page_size=page_size, speculate=drafts, cache_gib=cache_gib(110), max_batch=5, step_tokens=40
    )
    open_choices: dict[str, set[int]] = {}
    counts: dict[tuple[str, int], int] = {}

    def step() -> None:
        for delta in engine.step():
            key = (delta.request_id, delta.index)
            counts[key] = counts.get(key, 0) + len(delta.token_ids)
            assert delta.error is None, delta.error
            if delta.finish_reason:
                open_choices[delta.request_id].remove(delta.index)  # raises if it ended before
                assert delta.usage is not None
                assert delta.usage.completion_tokens == counts[key]
        engine.check_invariants()

    for number, (action, *values) in enumerate(actions):
        name = str(number)
        if action == "add":
            length, max_tokens, n, priority = values
            params = SamplingParams(n=n, max_tokens=max_tokens, seed=number)
            prompt = [2 + (i * i + number % 2) % 50 for i in range(length)]  # two families that share prefixes
            engine.add(Request(name, prompt, params, priority, arrived=1.0 + number))
            open_choices[name] = set(range(n))
        elif action == "abort":
            engine.abort(str(values[0]))
        else:
            for _ in range(values[0]):
                step()
        engine.check_invariants()
    for _ in range(3000):
        if not engine.has_work():
            break
        step()
    assert not any(open_choices.values())
    assert engine.stats().pages_used == 0
