"""The scheduler's plans: order, budgets, pages, preemption, sessions."""

import pytest

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.page_pool import PagePool, root_digest
from device_runtime.engine.scheduler import Scheduler
from device_runtime.engine.sequence import Sequence
from device_runtime.engine.session import Session
from device_runtime.errors import InternalError

ROOT = root_digest("test")


def scheduler(num_pages=32, page_size=4, batch=4, budget=16):
    pool = PagePool(num_pages, page_size)
    return Scheduler(pool, max_batch_size=batch, max_tokens_per_step=budget)


def sequence(number, length, *, max_tokens=100, session=None, first_token=0):
    tokens = list(range(first_token, first_token + length))
    return Sequence(
        number, tokens, length, max_tokens, SamplingParams(), 1e4, ROOT, session=session
    )


def run(plan, rows, token=7):
    """Collect a step at once, with the same token for everyone."""
    drawn = [(row.sequence.sequence_id, token) for row in rows if row.is_sampled]
    return plan.collect(rows, drawn)


def shape(rows):
    return [(row.sequence.sequence_id, row.start, row.end, row.is_sampled) for row in rows]


def test_a_prompt_goes_in_chunks_and_draws_after_the_last() -> None:
    plan = scheduler(budget=16)
    plan.add(sequence(1, 40))
    rows = plan.schedule()
    assert shape(rows) == [(1, 0, 16, False)]
    assert rows[0].is_new
    run(plan, rows)
    rows = plan.schedule()
    assert shape(rows) == [(1, 16, 32, False)]
    assert not rows[0].is_new
    run(plan, rows)
    rows = plan.schedule()
    assert shape(rows) == [(1, 32, 40, True)]
    run(plan, rows)
    assert shape(plan.schedule()) == [(1, 40, 41, True)]


def test_decoding_goes_first_and_prompts_share_the_step_in_order() -> None:
    plan = scheduler(budget=16)
    plan.add(sequence(1, 3))
    run(plan, plan.schedule())
    plan.add(sequence(2, 20, first_token=100))
    plan.add(sequence(3, 20, first_token=200))
    rows = plan.schedule()
    assert shape(rows) == [(1, 3, 4, True), (2, 0, 16, False)]
    run(plan, rows)
    # The third's first chunk does not fit beside the rest of the second.
    rows = plan.schedule()
    assert shape(rows) == [(1, 4, 5, True), (2, 16, 20, True)]
    assert plan.num_waiting == 0
    run(plan, rows)
    rows = plan.schedule()
    assert shape(rows) == [(1, 5, 6, True), (2, 20, 21, True), (3, 0, 16, False)]


@pytest.mark.parametrize("lengths", [[40], [7, 40, 3], [15, 2, 40], [16, 40, 33], [1, 1, 40]])
def test_a_prompt_is_cut_at_the_same_tokens_whatever_shares_the_step(lengths) -> None:
    plan = scheduler(budget=16)
    for number, length in enumerate(lengths):
        plan.add(sequence(number, length, max_tokens=30, first_token=100 * number))
    cuts = []
    for _ in range(20):
        rows = plan.schedule()
        assert sum(row.num_tokens for row in rows if row.num_tokens > 1) <= 16
        cuts += [row[1:3] for row in shape(rows) if row[0] == lengths.index(40) and row[1] < 40]
        run(plan, rows)
    assert cuts == [(0, 16), (16, 32), (32, 40)]


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_session_keeps_its_pages_while_its_turn_waits_for_a_step(is_cancelled) -> None:
    plan = scheduler(budget=16)
    session = Session(0)
    first = sequence(1, 9, session=session)
    plan.add(first)
    run(plan, plan.schedule())
    plan.finish(first)
    assert len(session.token_ids) == 9  # the last page is not full
    plan.add(sequence(2, 12, first_token=100))
    again = sequence(3, 20, session=session)
    plan.add(again)
    assert shape(plan.schedule()) == [(2, 0, 12, True)]
    if is_cancelled:
        plan.finish(again)
        assert session.token_ids == first.token_ids[:9]
    else:
        assert shape(plan.schedule()) == [(2, 12, 13, True), (3, 9, 20, True)]
    plan.check_integrity()


def test_no_more_sequences_run_than_the_batch_holds() -> None:
    plan = scheduler(batch=2)
    for number in range(4):
        plan.add(sequence(number, 2, first_token=10 * number))
    assert [row.sequence.sequence_id for row in plan.schedule()] == [0, 1]
    assert (plan.num_running, plan.num_waiting) == (2, 2)


def test_steps_can_be_planned_ahead_of_their_tokens() -> None:
    plan = scheduler()
    plan.add(sequence(1, 3, max_tokens=4))
    steps = [plan.schedule() for _ in range(5)]
    assert [shape(rows) for rows in steps] == [
        [(1, 0, 3, True)],
        [(1, 3, 4, True)],
        [(1, 4, 5, True)],
        [(1, 5, 6, True)],
        [],  # the fourth token is on its way, no more are wanted
    ]
    assert [rows[0].is_chained for rows in steps[:4]] == [False, True, True, True]
    for rows in steps[:4]:
        assert len(run(plan, rows)) == 1
    assert steps[0][0].sequence.token_ids == [0, 1, 2, 7, 7, 7, 7]


def test_a_finished_sequence_ignores_what_was_still_on_its_way() -> None:
    plan = scheduler()
    one = sequence(1, 3)
    plan.add(one)
    steps = [plan.schedule() for _ in range(3)]
    run(plan, steps[0])
    plan.finish(one)
    assert plan.take_forgettable() == []
    assert run(plan, steps[1]) == []
    assert plan.take_forgettable() == []
    run(plan, steps[2])
    assert plan.take_forgettable() == [1]
    assert one.token_ids == [0, 1, 2, 7]
    plan.check_integrity()
    assert plan.pool.num_available == 32


def test_the_newest_sequence_gives_way_when_pages_run_out_and_comes_back() -> None:
    plan = scheduler(num_pages=4, page_size=4)
    old, new = sequence(1, 7), sequence(2, 7, first_token=50)
    plan.add(old)
    plan.add(new)
    rows = plan.schedule()  # two pages each
    assert shape(rows) == [(1, 0, 7, True), (2, 0, 7, True)]
    run(plan, rows)
    run(plan, plan.schedule())  # position 7 is the last of both second pages
    rows = plan.schedule()
    assert shape(rows) == [(1, 8, 9, True)]
    assert (plan.num_running, plan.num_waiting, plan.num_preemptions) == (1, 1, 1)
    assert new.pages == [] and new.num_planned == 0
    plan.check_integrity()
    assert plan.take_forgettable() == [2]
    run(plan, rows)
    # One page is free and one cached; nine tokens of `new` need three pages.
    assert shape(plan.schedule()) == [(1, 9, 10, True)]
    plan.finish(old)
    plan.take_forgettable()
    rows = plan.schedule()
    assert [row.sequence for row in rows] == [new]
    assert rows[0].end == 9
    assert rows[0].is_new
    plan.check_integrity()


def test_a_preempted_sequence_waits_for_the_tokens_still_on_their_way() -> None:
    plan = scheduler(num_pages=4, page_size=4)
    old, new = sequence(1, 7), sequence(2, 7, first_token=50)
    plan.add(old)
    plan.add(new)
    first = plan.schedule()
    second = plan.schedule()
    third = plan.schedule()  # preempts `new`, two of whose tokens nobody has seen
    assert shape(third) == [(1, 8, 9, True)]
    assert (new.num_pending, new.num_in_flight) == (2, 2)
    plan.finish(old)
    assert plan.schedule() == ()  # there is room, but not all of the tokens
    run(plan, first)
    assert plan.schedule() == ()
    run(plan, second)
    assert new.token_ids[-2:] == [7, 7]
    assert plan.take_forgettable() == [2]
    run(plan, third)
    assert plan.take_forgettable() == [1]
    assert shape(plan.schedule()) == [(2, 0, 9, True)]


def test_a_sequence_that_was_preempted_in_a_step_is_not_in_it() -> None:
    plan = scheduler(num_pages=5, page_size=4, budget=7)
    decoding = sequence(2, 3)
    plan.add(decoding)
    run(plan, plan.schedule())
    plan.add(sequence(1, 16, first_token=50))  # older, so it wins
    rows = plan.schedule()
    assert shape(rows) == [(2, 3, 4, True), (1, 0, 7, False)]
    run(plan, rows)
    # The decoding one takes its second page first; then tokens 7 to 13 need two more of one left.
    assert shape(plan.schedule()) == [(1, 7, 14, False)]
    assert plan.num_preemptions == 1
    plan.check_integrity()


def test_a_prompt_found_in_the_cache_is_computed_from_its_end_only() -> None:
    plan = scheduler()
    first = sequence(1, 10)
    plan.add(first)
    run(plan, plan.schedule())
    plan.finish(first)
    again = sequence(2, 10)
    plan.add(again)
    assert shape(plan.schedule()) == [(2, 8, 10, True)]
    assert again.num_cached_tokens == 8


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    plan = scheduler()
    first = sequence(1, 8)
    plan.add(first)
    run(plan, plan.schedule())
    plan.finish(first)
    plan.add(sequence(2, 8))
    assert shape(plan.schedule()) == [(2, 4, 8, True)]  # both pages are full and known


def test_a_session_goes_on_in_its_last_page() -> None:
    plan = scheduler()
    session = Session(9)
    turn = sequence(1, 5, session=session)
    plan.add(turn)
    run(plan, plan.schedule())
    run(plan, plan.schedule())
    plan.finish(turn)
    assert session.token_ids == [0, 1, 2, 3, 4, 7]  # the last drawn token has no key yet
    assert len(session.pages) == 2
    plan.check_integrity()
    kept = list(session.pages)
    later = sequence(2, 5, session=session)
    later.token_ids = [0, 1, 2, 3, 4, 7, 7, 20, 21]
    plan.add(later)
    rows = plan.schedule()
    assert shape(rows) == [(2, 6, 9, True)]
    assert later.pages[:2] == kept
    assert later.num_cached_tokens == 6
    plan.check_integrity()


def test_a_session_that_branches_off_inside_a_full_page_leaves_that_page_alone() -> None:
    plan = scheduler()
    session = Session(9)
    turn = sequence(1, 10, session=session)
    plan.add(turn)
    run(plan, plan.schedule())
    plan.finish(turn)
    branch = sequence(2, 8, session=session)
    branch.token_ids = [0, 1, 2, 3, 4, 5, 60, 61]
    plan.add(branch)
    assert shape(plan.schedule()) == [(2, 4, 8, True)]  # 4 and 5 share a page others may read
    plan.check_integrity()


def test_a_session_that_branches_off_in_its_own_last_page_keeps_it() -> None:
    plan = scheduler()
    session = Session(9)
    turn = sequence(1, 11, session=session)
    plan.add(turn)
    run(plan, plan.schedule())
    plan.finish(turn)
    branch = sequence(2, 11, session=session)
    branch.token_ids[10] = 99
    plan.add(branch)
    assert shape(plan.schedule()) == [(2, 10, 11, True)]


def test_what_others_computed_of_a_prompt_is_used_when_it_is_more_than_the_session_has() -> None:
    plan = scheduler()
    session = Session(9)
    turn = sequence(1, 2, session=session)
    plan.add(turn)
    run(plan, plan.schedule())
    plan.finish(turn)
    other = sequence(2, 14)
    plan.add(other)
    run(plan, plan.schedule())
    later = sequence(3, 14, session=session)
    plan.add(later)
    assert shape(plan.schedule()) == [(2, 14, 15, True), (3, 12, 14, True)]
    plan.check_integrity()


def test_idle_sessions_give_their_pages_back_longest_idle_first() -> None:
    plan = scheduler(num_pages=4, page_size=4)
    sessions = [Session(90), Session(91)]
    for number, session in enumerate(sessions):
        turn = sequence(number, 3, session=session, first_token=20 * number)
        plan.add(turn)
        run(plan, plan.schedule())
        plan.finish(turn)
    assert [len(session.pages) for session in sessions] == [1, 1]
    plan.add(sequence(5, 9, first_token=200))  # three pages, two are free
    assert len(plan.schedule()) == 1
    assert [len(session.pages) for session in sessions] == [0, 1]
    assert sessions[0].token_ids == []
    plan.check_integrity()


def test_closing_a_session_frees_its_pages() -> None:
    plan = scheduler()
    session = Session(9)
    turn = sequence(1, 3, session=session)
    plan.add(turn)
    run(plan, plan.schedule())
    plan.finish(turn)
    plan.close_session(session)
    assert plan.pool.num_available == 32
    plan.check_integrity()


def test_a_cancelled_sequence_that_never_ran_leaves_its_session_as_it_was() -> None:
    plan = scheduler()
    session = Session(9)
    turn = sequence(1, 6, session=session)
    plan.add(turn)
    run(plan, plan.schedule())
    plan.finish(turn)
    waiting = sequence(2, 9, session=session)
    plan.add(waiting)
    plan.finish(waiting)
    assert session.token_ids == [0, 1, 2, 3, 4, 5]
    plan.check_integrity()


def test_one_sequence_larger_than_the_cache_is_our_mistake() -> None:
    plan = scheduler(num_pages=1, page_size=4, budget=4)
    plan.add(sequence(1, 4))
    run(plan, plan.schedule())
    with pytest.raises(InternalError, match="sequence 1 alone needs more than the 1 pages"):
        plan.schedule()


def test_integrity_sees_lost_pages_and_pages_of_the_waiting() -> None:
    plan = scheduler()
    one = sequence(1, 9)
    plan.add(one)
    run(plan, plan.schedule())
    lost = one.pages.pop()
    with pytest.raises(InternalError, match="differ between pool and holders"):
        plan.check_integrity()
    plan.pool.release([lost])
    with pytest.raises(InternalError, match="sequence 1 has 2 pages for 9 tokens"):
        plan.check_integrity()
    waiting = sequence(2, 3)
    waiting.pages = [5]
    plan.finish(one)
    plan.add(waiting)
    with pytest.raises(InternalError, match="sequence 2 waits with pages"):
        plan.check_integrity()
