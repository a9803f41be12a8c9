"""Threads that share one copy."""

from __future__ import annotations

from collections import Counter
from threading import Barrier, Event, Thread, current_thread

import pytest

from kvcore.copy.copy_threads import CALLING_THREAD, CopyThreads

WAIT_S = 20


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("num_items", [0, 1, 2, 1000])
def test_every_item_is_done_once(num_threads: int, num_items: int) -> None:
    """However many threads there are, nothing is left out and nothing done twice."""
    crew, done = CopyThreads(num_threads), Counter[int]()
    crew.each(lambda item: done.update([item]), range(num_items))
    crew.close()
    assert done == Counter(range(num_items))


def test_items_are_worked_on_at_once() -> None:
    """Two threads meet, each at an item of its own."""
    crew, meeting = CopyThreads(2), Barrier(2)
    crew.each(lambda _: meeting.wait(WAIT_S), [1, 2])
    crew.close()


def test_alone_means_this_thread() -> None:
    """A crew of one wakes nobody."""
    seen = set()
    CALLING_THREAD.each(lambda _: seen.add(current_thread()), range(9))
    assert seen == {current_thread()}


def test_busy_helpers_are_not_waited_for() -> None:
    """A caller whose helpers are at another copy does all of its own."""
    crew, begun, free = CopyThreads(2), Barrier(3), Event()

    def occupy(_: int) -> None:
        begun.wait(WAIT_S)
        free.wait(WAIT_S)

    other = Thread(target=crew.each, args=(occupy, [1, 2]))
    other.start()
    begun.wait(WAIT_S)
    seen = []
    crew.each(lambda item: seen.append((item, current_thread())), [1, 2, 3])
    free.set()
    other.join(WAIT_S)
    crew.close()
    assert seen == [(item, current_thread()) for item in (1, 2, 3)]


def test_an_error_ends_the_call_when_nobody_is_at_it_any_more() -> None:
    """What a helper raises reaches the caller, after the caller's own item."""
    crew, meeting, ended = CopyThreads(2), Barrier(2), Event()
    caller = current_thread()

    def work(_: int) -> None:
        meeting.wait(WAIT_S)
        if current_thread() is not caller:
            raise LookupError("a helper's")
        ended.set()

    with pytest.raises(LookupError, match="a helper's"):
        crew.each(work, [1, 2])
    crew.close()
    assert ended.is_set()


def test_a_callers_error_waits_for_the_helper() -> None:
    """Memory may be given back once the call has ended, so no helper still writes."""
    crew, meeting, failed, ended = CopyThreads(2), Barrier(2), Event(), Event()
    caller = current_thread()

    def work(_: int) -> None:
        meeting.wait(WAIT_S)
        if current_thread() is caller:
            failed.set()
            raise LookupError("the caller's")
        failed.wait(WAIT_S)
        ended.set()

    with pytest.raises(LookupError, match="the caller's"):
        crew.each(work, [1, 2])
    assert ended.is_set()
    crew.close()


def test_a_helpers_error_waits_for_the_other_helper() -> None:
    """Whichever of them fails, nobody is at it any more when the call has ended."""
    crew, meeting, left = CopyThreads(3), Barrier(3), Event()
    caller, failing, was_left = current_thread(), [], []

    def work(_: int) -> None:
        meeting.wait(WAIT_S)
        if current_thread() is caller:
            return
        if not failing:
            failing.append(current_thread())
            raise LookupError("a helper's")
        was_left.append(left.wait(0.2))

    with pytest.raises(LookupError, match="a helper's"):
        crew.each(work, [1, 2, 3])
    left.set()
    crew.close()
    assert was_left == [False]
