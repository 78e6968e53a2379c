"""``ase-enf generate``: draws molecules from a flow and writes them as they come."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ase_enf.cli.arguments import add_command, add_model, add_property, add_replacing, add_sampling
from ase_enf.cli.outputs import check_free, check_picture, draw_gallery
from ase_enf.cli.progress import counted, kept, minutely, say
from ase_enf.cli.trajectory import Trajectories, add_trajectory, check_trajectory

if TYPE_CHECKING:
    from ase import Atoms


def add_generate(commands: Any) -> None:
    """Adds the command ``generate``."""
    command = add_command(commands, "generate", "Draw molecules from a flow and write them.", run_generate)
    add_model(command)
    command.add_argument("-n", type=int, default=100, help="number of molecules")
    command.add_argument(
        "--start",
        type=int,
        default=0,
        metavar="K",
        help="the molecules are those from K to K + n - 1 of the seed; a request can be met in parts",
    )
    command.add_argument("-o", "--output", default="molecules.extxyz", help=".extxyz, .db or any ending ASE writes")
    add_replacing(command, ".extxyz, .xyz, .db, .traj")
    command.add_argument("--n-atoms", type=int, default=None, help="atoms of every molecule")
    command.add_argument(
        "--formula", default=None, help="composition such as C7H10O2; models that draw types try until it comes"
    )
    command.add_argument("--smiles", default=None, help="molecular graph such as CCO, for models of graphs")
    add_property(command, "NAME=VALUE or NAME=LOW:HIGH", "what the molecules are to have, for models with conditions")
    command.add_argument(
        "--require",
        default=None,
        metavar="NAMES",
        help="keep only molecules that pass, with commas: closed_shell (electron parity), connected, stable, valid",
    )
    command.add_argument("--max-attempts", type=int, default=100, help="how often one molecule may be rejected")
    command.add_argument("--closed-shell", action="store_true", help="the same as --require closed_shell")
    command.add_argument("--with-smiles", action="store_true", help="write enf_smiles of molecules that are valid")
    command.add_argument(
        "--fragment", default=None, metavar="FILE", help="structure to complete: its atoms under FixAtoms, or all, stay"
    )
    command.add_argument(
        "--strength", type=float, default=None, help="vary the fragment's free atoms, from so far to noise: 0 to 1"
    )
    command.add_argument("--gallery", default=None, metavar="PNG", help="picture of the first 24 molecules")
    add_trajectory(command)
    add_sampling(command, "molecules", batch_size=64)
    command.add_argument(
        "--churn",
        type=float,
        default=None,
        help="how much noise is renewed on the way, for more stable molecules: 1 is the reverse diffusion, 0 draws "
        "from the flow itself, whose density score gives, and is all that is possible for a flow that flow matching "
        "did not train; when left out, 50 for molecules",
    )


def run_generate(options: argparse.Namespace) -> None:
    """Draws and writes molecules; under torchrun, each process draws its part and the first one writes."""
    from ase_enf.atoms.io import GrowingFile, check_append, check_output
    from ase_enf.flow.loading import load
    from ase_enf.sampling.generate import check_counts, igenerate
    from ase_enf.sampling.path import paths
    from ase_enf.sampling.properties import read_properties

    check_output(options.output, options.n)
    if options.append:
        check_append(options.output)
    check_picture(options.gallery)
    check_trajectory(options)
    check_counts(options.n, options.seed, options.batch_size, options.start)
    check_free(options, options.output, options.gallery, options.trajectory, options.gif)
    flow = load(options.model, device=own_device(options.device), dtype=options.dtype)
    flow.use_backend(options.backend)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bounds = [options.n * k // world for k in range(world + 1)]
    start, count = bounds[rank], bounds[rank + 1] - bounds[rank]
    request = {
        "seed": options.seed,
        "n_atoms": options.n_atoms,
        "formula": options.formula,
        "solver": options.solver,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "churn": options.churn,
        "closed_shell": options.closed_shell,
        "require": options.require or (),
        "max_attempts": options.max_attempts,
        "with_smiles": options.with_smiles,
        "properties": read_properties(options.property),
        "smiles": options.smiles,
        "fragment": _fragment(options.fragment),
        "strength": options.strength,
    }
    request |= {"start": options.start + start}
    trajectories = Trajectories(options)
    if trajectories.wanted:
        stream = trajectories.passed(paths(flow, count, frames=options.frames, **request))
    else:
        stream = igenerate(flow, count, **request) if count else iter(())
    if rank:
        for _ in _gathered(stream, rank, world):
            pass
        return
    shown: list[Atoms] = []
    attempts = 0
    file = GrowingFile(options.output, options.append)
    with kept(file, "molecule", options.n, options.start, by_number=True), file, trajectories:
        for atoms in minutely(_gathered(stream, rank, world), options.n, "molecule"):
            file.add(atoms)
            attempts += atoms.info["enf_attempts"]
            if len(shown) < 24:
                shown.append(atoms)
    if options.gallery:
        draw_gallery(shown, options.gallery)
    trajectories.draw()
    say(f"wrote {counted(file.count, 'molecule')} to {options.output}")
    if required := atoms.info.get("enf_require"):
        say(f"{file.count} of {attempts} drawn passed {required} ({file.count / attempts:.1%})")


def _fragment(path: str | None) -> Atoms | None:
    """Returns the one structure of a file."""
    from ase_enf.cli.inputs import read_structures

    if path is None:
        return None
    structures = read_structures(path)
    if len(structures) != 1:
        raise ValueError(f"{path}: holds {len(structures)} structures; a fragment is one")
    return structures[0]


def own_device(device: str) -> str:
    """Returns the GPU of this process among those that torchrun started on this machine."""
    import torch

    if device not in ("auto", "cuda") or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _gathered(stream: Iterator[Atoms], rank: int, world: int) -> Iterator[Atoms]:
    """Yields the molecules of all processes of torchrun, in order, on the first one."""
    if world == 1:
        yield from stream
        return
    import torch.distributed as dist

    # The first process waits for the last one, however long that takes.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        parts: list[list[Atoms]] | None = [[] for _ in range(world)] if rank == 0 else None
        dist.gather_object(list(stream), parts)
        for part in parts or []:
            yield from part
    finally:
        dist.destroy_process_group()
