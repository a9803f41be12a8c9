"""Threads that share one large copy."""

from __future__ import annotations

from collections import Counter
from threading import Barrier, Event, Thread, current_thread

import pytest

from kvcore.copy.copy_threads import CALLING_THREAD, CopyThreads

WAIT_S = 20


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("num_items", [0, 1, 2, 1000])
def test_every_item_is_done_once(num_threads: int, num_items: int) -> None:
    """For any number of threads, every item is done exactly once."""
    threads, done = CopyThreads(num_threads), Counter[int]()
    threads.each(lambda item: done.update([item]), range(num_items))
    threads.close()
    assert done == Counter(range(num_items))


def test_items_run_concurrently() -> None:
    """Two threads meet at a barrier, each with its own item."""
    threads, meeting = CopyThreads(2), Barrier(2)
    threads.each(lambda _: meeting.wait(WAIT_S), [1, 2])
    threads.close()


def test_one_thread_is_the_calling_thread() -> None:
    """With one thread, no helper is started."""
    seen = set()
    CALLING_THREAD.each(lambda _: seen.add(current_thread()), range(9))
    assert seen == {current_thread()}


def test_a_call_does_not_wait_for_busy_helpers() -> None:
    """A caller whose helpers are busy with another copy does every item itself."""
    threads, begun, free = CopyThreads(2), Barrier(3), Event()

    def occupy(_: int) -> None:
        begun.wait(WAIT_S)
        free.wait(WAIT_S)

    other = Thread(target=threads.each, args=(occupy, [1, 2]))
    other.start()
    begun.wait(WAIT_S)
    seen = []
    threads.each(lambda item: seen.append((item, current_thread())), [1, 2, 3])
    free.set()
    other.join(WAIT_S)
    threads.close()
    assert seen == [(item, current_thread()) for item in (1, 2, 3)]


def test_a_helpers_error_is_raised_after_all_items_end() -> None:
    """A helper's exception reaches the caller, after the caller's own item."""
    threads, meeting, ended = CopyThreads(2), Barrier(2), Event()
    caller = current_thread()

    def work(_: int) -> None:
        meeting.wait(WAIT_S)
        if current_thread() is not caller:
            raise LookupError("a helper's")
        ended.set()

    with pytest.raises(LookupError, match="a helper's"):
        threads.each(work, [1, 2])
    threads.close()
    assert ended.is_set()


def test_a_callers_error_waits_for_the_helper() -> None:
    """Memory may be freed once the call has ended, so no helper still writes."""
    threads, meeting, failed, ended = CopyThreads(2), Barrier(2), Event(), Event()
    caller = current_thread()

    def work(_: int) -> None:
        meeting.wait(WAIT_S)
        if current_thread() is caller:
            failed.set()
            raise LookupError("the caller's")
        failed.wait(WAIT_S)
        ended.set()

    with pytest.raises(LookupError, match="the caller's"):
        threads.each(work, [1, 2])
    assert ended.is_set()
    threads.close()


def test_a_helpers_error_waits_for_the_other_helper() -> None:
    """Whichever thread fails, no thread still works when the call has ended."""
    threads, meeting, left = CopyThreads(3), Barrier(3), Event()
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
        threads.each(work, [1, 2, 3])
    left.set()
    threads.close()
    assert was_left == [False]
