"""Parallel work gives the same results as sequential work."""

from __future__ import annotations

import threading

import pytest
import torch

from ase_enf.flow.continuous import ContinuousFlow, Solver
from ase_enf.flow.divergence import exact
from ase_enf.threads import map_threads, share_out, shares


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_keep_their_order_and_the_number_of_threads_stays(threads: int) -> None:
    seen = []

    def work(k: int) -> tuple[int, int]:
        seen.append(threading.current_thread().name)
        return k, torch.get_num_threads()

    assert map_threads(work, range(20)) == [(k, 1) for k in range(20)]
    assert torch.get_num_threads() == threads
    assert all(name.startswith("ase_enf") == (threads > 1) for name in seen)


def test_no_graph_is_recorded_in_any_thread(threads: int) -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not any(t.requires_grad for t in map_threads(lambda k: weight * k, range(4)))


def test_an_error_reaches_the_caller(threads: int) -> None:
    def work(k: int) -> int:
        return 1 // (k - 3)

    with pytest.raises(ZeroDivisionError):
        map_threads(work, range(6))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("size", [1, 2, 7])
def test_shares_cover_everything_once(threads: int, size: int) -> None:
    found = [0] * size

    def work(k: int, first: int, last: int) -> None:
        assert k < shares(size)
        for item in range(first, last):
            found[item] += 1

    share_out(size, work)
    assert found == [1] * size


def test_traces_along_a_path_do_not_depend_on_it(threads: int, make_flow, batch_of, methane, water) -> None:
    flow = make_flow("joint")
    data = flow.encode(batch_of([methane, water], flow), torch.zeros(2, 5, 4, dtype=flow.dtype, device=flow.device))
    transport = ContinuousFlow(flow.velocity(data.mask), data.mask, Solver("rk4", steps=4))
    with torch.no_grad():
        together = transport.forward(data.x, data.h, exact, intervals=8).traces
    one_by_one = transport.forward(data.x, data.h, exact, intervals=8).traces  # a graph may be recorded: no threads
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)


def test_few_items_need_no_pool_of_their_own():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for count in (2, 3, 4, 9):
            map_threads(lambda k: k, range(count))
            share_out(count, lambda k, first, last: None)
        names = {thread.name.rpartition("_")[0] for thread in threading.enumerate() if "ase_enf" in thread.name}
        alive = [thread for thread in threading.enumerate() if "ase_enf" in thread.name]
    finally:
        torch.set_num_threads(before)
    assert names >= {"ase_enf", "ase_enf_kernel"}
    assert len({thread.name for thread in alive if thread.name.startswith("ase_enf_kernel")}) <= 3
