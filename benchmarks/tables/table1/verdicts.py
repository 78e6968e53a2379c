"""Conclusions from the finished cells: means over seeds, which method is best, and when one overtakes another."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from benchmarks.tables.table1.cells import (
    AS_PUBLISHED,
    BOTH,
    FLOW_MATCHING,
    GOALS,
    MISSING,
    NLL,
    NOTHING,
    OBJECTIVES,
    PUBLISHED_BATCH,
    PUBLISHED_STEPS,
    ROWS,
    SIZES,
    Cell,
)


def over_seeds(system: str, results: pd.DataFrame, key: str) -> pd.DataFrame:
    """Returns mean, standard error and number of runs for all rows and sizes; NaN and zero runs if missing."""
    rows = pd.MultiIndex.from_tuples([(*row, size) for row in ROWS for size in SIZES[system]])
    numbers = results[results.system == system].astype({key: float})
    found = numbers.groupby(["method", "objective", "size"])[key].agg(["mean", "sem", "count"])
    return found.reindex(rows.sort_values()).fillna({"count": 0})


def clock(results: pd.DataFrame) -> str:
    """Returns the kind of processor that ran most cells; times of different kinds cannot be averaged."""
    return next(iter(results.processor[results.train_s.notna()].mode()), "")


def verdicts(system: str, results: pd.DataFrame, base: float) -> list[str]:
    """Returns, as text, the best method of each column, how close E-NF is to the floor, and if flow matching leads."""
    lines, most = [], max(SIZES[system])
    combined = over_seeds(system, results, "nll").dropna(subset="mean")
    alone = results.groupby(["method", "objective", "size"]).gap_stderr.mean()  # the error of one run
    for size in SIZES[system]:
        column = combined[combined.index.get_level_values(2) == size].sort_values("mean")
        if len(column) > 1:
            names = [f"{method} by {OBJECTIVES[objective]}" for method, objective, _ in column.index]
            words = f"best of {len(column)} rows with {size} samples: {names[0]}"
            errors = column["sem"].fillna(alone)
            near = column["mean"] - column["mean"].iat[0] < 2 * np.hypot(errors, errors.iat[0])
            if near.sum() > 1:
                words += ", not to be told apart from " + " and ".join(np.array(names)[near][1:])
            lines.append(words)
    gaps = over_seeds(system, results, "gap")
    for method in ("E-NF", "E-NF-16-radial"):
        gap = gaps.loc[method, FLOW_MATCHING, most]
        if math.isfinite(gap["mean"]):
            verdict = f"the goal of {GOALS[system]} is {'reached' if gap['mean'] <= GOALS[system] else 'missed'}"
            error = f" ± {gap['sem']:.3f}" if gap["count"] > 1 else ""
            words = f"{gap['mean']:.3f}{error} nats above the entropy; {verdict}"
            lines.append(f"{method} by flow matching, {most} samples: {words}")
    lines += [
        f"{method} by {OBJECTIVES[objective]}, {most} samples: hardly better than the Gaussian"
        for method, objective in ROWS
        if abs(combined["mean"].get((method, objective, most), math.inf) - base) < NOTHING
    ]
    races = ((method, race(results, method, most)) for method in BOTH)
    return lines + [f"{method}, {most} samples: {words}" for method, words in races if words]


def race(results: pd.DataFrame, method: str, size: int) -> str:
    """Returns, as text, when flow matching first equalled the final maximum-likelihood result on the same samples.

    Validations along one run have the same noise, but not those of different runs. Ends are therefore compared by the
    exact test, and earlier points by the distance of their validation from the best.
    """
    part = results[(results.method == method) & (results["size"] == size) & results.curve.map(bool)]
    fast, slow = (part[part.objective == key].set_index(["seed", "processor"]) for key in OBJECTIVES)
    times, runs = [], fast.index.intersection(slow.index)  # also on one kind of processor
    for run in runs:
        ahead = slow.gap[run] - fast.gap[run]
        seconds, _ = min(slow.curve[run], key=lambda point: point[1])
        least = min(value for _, value in fast.curve[run])
        times += [(when, seconds) for when, value in fast.curve[run] if value - least <= ahead][:1]
    words = f"flow matching becomes as good as maximum likelihood at its best in {len(times)} of {len(runs)} runs"
    quicker = ", after at most {:.0f} s instead of {:.0f} s".format(*np.mean(times, axis=0)) if times else ""
    return f"{words}{quicker}" if len(runs) else ""


def projected(system: str, results: pd.DataFrame) -> str:
    """Returns, as text, the time of cells with the paper's own budget, estimated from ours by maximum likelihood."""
    known = results[(results.system == system) & (results.objective == NLL) & (results.method == "E-NF-16-radial")]
    seconds = known[known.processor == clock(results)].groupby("size").train_s.mean()
    hours = []
    for size, steps in PUBLISHED_STEPS[system].items():
        done = Cell(system, "E-NF-16-radial", NLL, size, 0)
        share = steps * min(PUBLISHED_BATCH, size) / (done.steps * min(done.batch, size))
        hours.append(f"{seconds[size] * share / 3600:.1f}" if size in seconds else MISSING)
    return f"the paper's own budget, {AS_PUBLISHED}: about {' / '.join(hours)} hours a cell, by the steps above"
