"""torch's number of threads while pools are entered, and after."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from speedk.workers import Pool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three():
    """torch has three threads, here and in every new thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(work):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_threads_at_once_leave_it_as_it_was(first_out):
    threads = [ThreadPoolExecutor(1) for _ in range(2)]
    pools = [thread.submit(lambda: Pool(CPU).__enter__()).result() for thread in threads]  # the second begins with 1
    assert [pool.threads for pool in pools] == [3, 3]
    assert [thread.submit(torch.get_num_threads).result() for thread in threads] == [1, 1]
    for place in (first_out, 1 - first_out):
        threads[place].submit(pools[place].__exit__).result()
        assert threads[place].submit(torch.get_num_threads).result() == 3
    assert in_a_new_thread(torch.get_num_threads) == torch.get_num_threads() == 3
    for thread in threads:
        thread.shutdown()


def test_a_pool_inside_another_leaves_it_to_the_outer_one():
    with Pool(CPU):
        with Pool(CPU, 2):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert in_a_new_thread(torch.get_num_threads) == torch.get_num_threads() == 3


def test_a_number_of_ones_own_stays():
    def own():
        torch.set_num_threads(2)
        with Pool(CPU) as pool:
            assert (pool.threads, torch.get_num_threads()) == (2, 1)
        return torch.get_num_threads()

    with Pool(CPU):
        assert in_a_new_thread(own) == 2
    assert torch.get_num_threads() == 3


def test_the_threads_of_a_pool_have_one():
    def piece():
        with Pool(CPU) as inner:  # if it had threads it could wait for itself
            return inner.threads, torch.get_num_threads()

    with Pool(CPU, 2) as pool:
        assert pool.map(piece, [()] * 4) == [(1, 1)] * 4
        assert pool.map(torch.get_num_threads, [()] * 4) == [1] * 4
    assert in_a_new_thread(torch.get_num_threads) == torch.get_num_threads() == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_knows_nothing_of_the_pools_of_other_threads():
    def child() -> int:
        torch.set_num_threads(1)  # its own: no pool is entered
        return Pool(CPU).threads

    with ThreadPoolExecutor(1) as thread:
        pool = thread.submit(lambda: Pool(CPU).__enter__()).result()
        if not (process := os.fork()):
            try:
                os._exit(child())
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
        thread.submit(pool.__exit__).result()
