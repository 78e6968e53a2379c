"""The benchmarks of reliability: their counts, and that they notice faults."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks.reliability import forked, fuzz, kill, torchrun

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are killed in forked children")


def test_a_fuzz_goes_on_from_its_log_and_calls_every_wrong_end_wrong(tmp_path, monkeypatch):
    ends = {1: fuzz.DONE, 2: fuzz.REFUSED, 3: "IndexError: 7 (io.py:1)"}
    tried = []

    def kind(rng, folder):
        tried.append(len(tried) + 1)
        return "anything", [lambda: ends[tried[-1]]]

    monkeypatch.setitem(fuzz.KINDS, "weights", kind)
    log = tmp_path / "log.csv"
    first = fuzz.fuzz("weights", 2, 10, log)
    assert [end.how for end in first] == [fuzz.DONE, fuzz.REFUSED]
    both = fuzz.fuzz("weights", 3, 10, log)
    assert tried == [1, 2, 3] and both[:2] == first and both[2].how == ends[3]


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (ValueError("n=-1: must be at least 0"), fuzz.REFUSED),
        (ValueError("two\nlines"), "ValueError of several lines or none"),
        (ValueError(), "ValueError of several lines or none"),
        (KeyError("x"), "KeyError: 'x' (test_reliability.py:"),
    ],
)
def test_only_one_line_of_the_right_kind_is_a_refusal(error, how):
    def call():
        raise error

    assert fuzz.python(call).startswith(how)


def test_a_killed_child_is_told_by_what_it_had_counted(tmp_path, monkeypatch):
    class Worker:
        def work(self, amount):
            time.sleep(0.005)

    def command(words):
        for _ in range(int(words[0])):
            Worker().work(2)
        return 0

    monkeypatch.setattr(forked, "command_line", command)
    counters = forked.Counters([(Worker, "work", lambda _, amount: amount)])
    whole = forked.run(["3"], counters, tmp_path / "said.txt")
    assert not whole.killed and whole.counts == (6,)
    cut = forked.run(["100000"], counters, tmp_path / "said.txt", 0.1)
    assert cut.killed and cut.counts[0] < 200_000
    monkeypatch.setattr(forked, "command_line", lambda words: 2)
    with pytest.raises(RuntimeError, match="exit code 2"):
        forked.run(["3"], counters, tmp_path / "said.txt")


def test_losses_litter_and_differences_are_found(tmp_path):
    counters = forked.Counters([])
    task = kill.Task(counters, {"steps": 3}, lambda folder: [], lambda folder: None, lambda one, other: "")
    paths = (tmp_path, tmp_path, tmp_path / "said.txt")
    assert kill.gone_on(task, *paths, (7,), (4,)) == ({"steps": 3}, "")
    assert kill.gone_on(task, *paths, (8,), (4,)) == ({"steps": 4}, "4 steps lost, more than 3")
    (tmp_path / ".m.xyz.0-1-2.part").touch()
    assert kill.gone_on(task, *paths, (4,), (4,))[1] == "left behind: .m.xyz.0-1-2.part"
    different = task._replace(differs=lambda one, other: "other weights")
    assert kill.gone_on(different, *paths, (4,), (4,))[1] == "other weights"


def test_the_processes_of_torchrun_are_found_by_their_rank_and_ended():
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env={'RANK': str(rank)})"
    code = f"import subprocess, sys; [p.wait() for p in [{child} for rank in range(2)]]"
    run = subprocess.Popen([sys.executable, "-c", code])
    torchrun.wait_for(lambda: len(torchrun.ranks_of(run.pid)) == 2, 60, "not started")
    ranks = torchrun.ranks_of(run.pid)
    assert sorted(ranks) == [0, 1] and all(map(torchrun.is_alive, ranks.values()))
    assert torchrun.end(run, ranks) == 3
    torchrun.wait_for(lambda: not any(map(torchrun.is_alive, (run.pid, *ranks.values()))), 60, "alive")
    assert torchrun.end(run, ranks) == 0
    with pytest.raises(TimeoutError, match="never after 0 s"):
        torchrun.wait_for(lambda: False, 0.0, "never")


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("ase-enf: terminated; go on with --resume", ""),
        ("ase-enf: terminated", "does not say how to continue: ase-enf: terminated"),
        ("", "0 lines of ase-enf: "),
        (
            "ase-enf: lost, --resume\nase-enf: terminated",
            "2 lines of ase-enf: ase-enf: lost, --resume / ase-enf: terminated",
        ),
        ("Traceback (most recent call last):\nase-enf: lost, --resume", "2 tracebacks"),
    ],
)
def test_one_line_and_the_traceback_of_torchrun_are_no_fault(said, fault):
    assert torchrun.faults(f"{said}\nTraceback (most recent call last):\nChildFailedError\n") == fault
