"""Work in threads keeps its order and stays only a few items ahead."""

import threading
import time

import pytest

from mmseg_volo.apis.threads import in_threads


def test_results_keep_the_order_of_the_items():
    def slow_at_first(number: int) -> int:
        time.sleep(0.05 if number % 4 == 0 else 0)
        return number

    with in_threads(slow_at_first, range(12), threads=4, ahead=4) as results:
        assert list(results) == list(range(12))


@pytest.mark.parametrize('ahead', [1, 3])
def test_a_slow_reader_or_writer_lets_only_a_few_items_wait(ahead):
    alive = most = 0
    lock = threading.Lock()

    def read(number: int) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return number

    def write(number: int) -> None:
        nonlocal alive
        time.sleep(0.005)  # the disk is slower than everything else
        with lock:
            alive -= 1

    with in_threads(read, range(50), ahead=ahead) as items, in_threads(write, items, ahead=ahead) as written:
        assert sum(1 for _ in written) == 50
    assert alive == 0 and 2 < most <= 2 * ahead + 3


def test_the_caller_computes_while_threads_work():
    started, computed = threading.Event(), threading.Event()

    def write(number: int) -> bool:
        if number == 0:
            started.set()
            return computed.wait(10)
        return True

    def numbers():
        yield 0
        assert started.wait(10)
        computed.set()
        yield 1

    with in_threads(write, numbers()) as written:
        assert list(written) == [True, True]


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_exception_of_the_caller_waits_for_the_calls_that_have_begun(error):
    finished = []

    def write(number: int) -> None:
        time.sleep(0.1)
        finished.append(number)

    def numbers():
        yield 0
        raise error

    with pytest.raises(error), in_threads(write, numbers()) as written:
        list(written)
    assert finished == [0]


def test_an_exception_in_a_thread_is_raised_where_its_result_is_due():
    with pytest.raises(ZeroDivisionError), in_threads(lambda number: 1 / number, [1, 0, 1]) as results:
        assert next(results) == 1
        next(results)
