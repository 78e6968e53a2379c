"""Table 1: flows on DW4 and LJ13 by the number of training samples, with the paper's values and the entropy.

python -m benchmarks.tables.particles --work FOLDER [--only E-NF dw4 ...] [--jobs 2]

A cell is one training, defined by system, method, objective, number of samples and seed. Cells are independent.
Finished ones are saved in the folder, an interrupted one continues from its last save, and the tables show all finished
cells. These are also written to ``results/table1_cells.csv``, from which ``--cells`` copies them to another folder.
``--scale 0.1`` runs everything with a tenth of the steps, and leaves its tables in the folder. The row with the paper's
own budget, ``--only E-NF-as-published``, takes hours for each cell and is run only if named; the tables give the
progress of unfinished cells.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.tables.table1.cells import AS_PUBLISHED, KINDS, TEST, chosen, every_cell
from benchmarks.tables.table1.runs import data, ground, open_folder, run, take_cells
from benchmarks.tables.table1.tables import write_tables


def main() -> None:
    """Runs the missing cells and writes ``results/table1*``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and finished cells")
    words = sorted(set().union(*KINDS))
    parser.add_argument("--only", nargs="*", choices=words, default=[], help="systems, methods, objectives, sizes")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell of the table (default: 3)")
    parser.add_argument(
        "--test", type=int, help=f"test samples (default: {TEST['dw4']} of DW4, {TEST['lj13']} of LJ13)"
    )
    parser.add_argument("--cells", type=Path, help="CSV of finished cells to take over: table1_cells.csv of a run")
    parser.add_argument("--no-run", action="store_true", help="run nothing; write the tables of what is finished")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the steps (default: 1)")
    options = parser.parse_args()
    test = TEST if options.test is None else dict.fromkeys(TEST, options.test)
    if not (options.scale > 0 and min(options.jobs, options.seeds) >= 1 and min(test.values()) >= 2):
        raise SystemExit("--scale must be positive, --jobs and --seeds at least 1, --test at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the pool takes its processes with it
    cells = [cell for cell in every_cell(options.seeds) if chosen(cell, options.only)]
    cells = [cell for cell in cells if cell.method != AS_PUBLISHED or AS_PUBLISHED in options.only]
    cells = [] if options.no_run else cells
    open_folder(options.work, options.scale, test)
    if options.cells and (others := take_cells(options.cells, options.work)):
        print(f"{options.cells}: {others} cells are of another budget, --scale or --test, and stay there")
    try:
        for system in {cell.system for cell in cells}:
            ground(system, options.work, options.scale)
            data(system, options.work, test[system])
        if failed := run(cells, options.work, options.scale, options.jobs):
            raise SystemExit("\n".join(["these cells failed:", *failed]))
    finally:
        write_tables(options.work, options.seeds, options.scale)


if __name__ == "__main__":
    main()
