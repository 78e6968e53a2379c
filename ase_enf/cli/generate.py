"""``ase-enf generate``: draws molecules from a flow and writes them as they come."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ase_enf.cli.arguments import add_command, add_model, add_property, add_replacing, add_sampling
from ase_enf.cli.inputs import check_present, read_structures
from ase_enf.cli.outputs import check_apart, check_free, check_picture, draw_gallery
from ase_enf.cli.progress import counted, kept, progress, say
from ase_enf.cli.requests import check_drawable, check_model, check_solver
from ase_enf.cli.trajectory import Trajectories, add_trajectory, check_trajectory
from ase_enf.values import check_churn, check_counts, check_guidance, check_strength, check_whole

if TYPE_CHECKING:
    from ase import Atoms

# Number of molecules in a gallery.
GALLERY = 24


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
        help="draw molecules K to K + n - 1 of the seed, so that a request can be split",
    )
    command.add_argument(
        "-o", "--output", default="molecules.extxyz", help="file to write: .extxyz, .db or any format that ASE writes"
    )
    add_replacing(command, ".extxyz, .xyz, .db, .traj")
    _add_target(command)
    _add_requirements(command)
    _add_fragment(command)
    command.add_argument("--gallery", default=None, metavar="PNG", help=f"draw the first {GALLERY} molecules")
    add_trajectory(command)
    add_sampling(command, "molecules", batch_size=64)
    command.add_argument(
        "--churn",
        type=float,
        default=None,
        help="how much of the noise each step replaces, so that errors fade and more molecules are stable: 1 is the "
        "reverse diffusion; 0 draws from the flow itself, whose density score computes; by default 50 for flows of "
        "molecules trained by flow matching, and 0, the only choice, for all others",
    )


def _add_target(command: argparse.ArgumentParser) -> None:
    """Adds the properties that can be requested: size, composition, graph and conditions."""
    command.add_argument("--n-atoms", type=int, default=None, help="number of atoms of every molecule")
    command.add_argument(
        "--formula", default=None, help="composition such as C7H10O2; a model that draws types redraws until it fits"
    )
    command.add_argument("--smiles", default=None, help="molecular graph such as CCO, for models of graphs")
    add_property(command, "NAME=VALUE or NAME=LOW:HIGH", "requested property, for models with conditions")
    command.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="strength of the conditions: 1 follows the model; larger values exaggerate them and take twice the time",
    )


def _add_requirements(command: argparse.ArgumentParser) -> None:
    """Adds the requirements on a molecule, and whether its SMILES is written."""
    command.add_argument(
        "--require",
        default=None,
        metavar="NAMES",
        help="keep only molecules that pass these tests, separated by commas: closed_shell (an even number of "
        "electrons), connected, stable, valid",
    )
    command.add_argument("--max-attempts", type=int, default=100, help="fail if one molecule is rejected this often")
    command.add_argument("--closed-shell", action="store_true", help="the same as --require closed_shell")
    command.add_argument("--with-smiles", action="store_true", help="write enf_smiles for valid molecules")


def _add_fragment(command: argparse.ArgumentParser) -> None:
    """Adds the structure that is completed, and how far it may vary."""
    command.add_argument(
        "--fragment",
        default=None,
        metavar="FILE",
        help="structure to complete: atoms under FixAtoms keep their places, or all of them without such a constraint",
    )
    command.add_argument(
        "--strength",
        type=float,
        default=None,
        help="vary the other atoms of --fragment, or all without FixAtoms, from little (near 0) to entirely (1)",
    )


def run_generate(options: argparse.Namespace) -> None:
    """Draws and writes molecules; under torchrun, each process draws its part and the first process writes all."""
    _check(options)
    fragment = _fragment(options.fragment)

    from ase_enf.flow.loading import load  # torch, which takes seconds to import
    from ase_enf.sampling.generate import igenerate
    from ase_enf.sampling.path import paths

    flow = load(options.model, device=own_device(options.device), dtype=options.dtype, backend=options.backend)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    start, stop = options.n * rank // world, options.n * (rank + 1) // world
    told = progress("molecule", " of this process" if world > 1 else "") if rank == 0 else False
    request = _request(options) | {"start": options.start + start, "fragment": fragment, "progress": told}
    trajectories = Trajectories(options)
    if trajectories.wanted:
        stream = trajectories.passed(paths(flow, stop - start, frames=options.frames, **request))
    else:
        stream = igenerate(flow, stop - start, **request) if stop > start else iter(())
    gathered = _gathered(stream, rank, world)
    if rank == 0:
        _write(gathered, options, trajectories)
    else:
        for _ in gathered:  # takes part in gathering; the first process receives them
            pass


def _check(options: argparse.Namespace) -> None:
    """Raises an error, before any work, if the request cannot be drawn or written."""
    from ase_enf.sampling.properties import read_properties
    from ase_enf.sampling.requirements import requirement_names

    check_counts(options.n, options.seed, options.batch_size, options.start)
    check_whole("max_attempts", options.max_attempts, 1)
    check_solver(options)
    for value, check in ((options.churn, check_churn), (options.strength, check_strength)):
        if value is not None:
            check(value)
    check_guidance(options.guidance)
    requirement_names(options.require or ())
    read_properties(options.property)
    if options.fragment is not None:
        check_present(options.fragment)
    check_drawable(options, check_model(options))
    _check_outputs(options)


def _check_outputs(options: argparse.Namespace) -> None:
    """Raises an error if the files cannot be written."""
    from ase_enf.atoms.io import check_append, check_output

    check_output(options.output, options.n)
    if options.append:
        check_append(options.output)
    check_picture(options.gallery)
    check_trajectory(options)
    written = (options.output, options.gallery, options.trajectory, options.gif)
    check_apart(written, [options.fragment])
    check_free(options, *written)


def _request(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords of ``igenerate`` that are options of the command."""
    from ase_enf.sampling.properties import read_properties

    return {
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
        "guidance": options.guidance,
        "smiles": options.smiles,
        "strength": options.strength,
    }


def _write(stream: Iterator[Atoms], options: argparse.Namespace, trajectories: Trajectories) -> None:
    """Writes molecules as they arrive, then the pictures, and reports what was written."""
    from ase_enf.atoms.io import GrowingFile

    shown: list[Atoms] = []
    attempts = 0
    file = GrowingFile(options.output, options.append)
    with kept(file, "molecule", options.n, options.start, by_number=True), file, trajectories:
        for atoms in stream:
            file.add(atoms)
            attempts += atoms.info["enf_attempts"]
            if len(shown) < GALLERY:
                shown.append(atoms)
    if options.gallery:
        draw_gallery(shown, options.gallery)
    trajectories.draw()
    say(f"wrote {counted(file.count, 'molecule')} to {options.output}")
    if required := atoms.info.get("enf_require"):
        say(f"{file.count} of {attempts} drawn passed {required} ({file.count / attempts:.1%})")


def _fragment(path: str | None) -> Atoms | None:
    """Returns the one structure of a file."""
    if path is None:
        return None
    structures = read_structures(path)
    if len(structures) != 1:
        raise ValueError(f"{path}: holds {len(structures)} structures; a fragment is one")
    return structures[0]


def own_device(device: str) -> str:
    """Returns the device of this process; under torchrun, every process of a machine gets its own GPU."""
    import torch

    if device not in ("auto", "cuda") or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _gathered(stream: Iterator[Atoms], rank: int, world: int) -> Iterator[Atoms]:
    """Yields, on the first process, the molecules of all processes of torchrun in order."""
    if world == 1:
        yield from stream
        return
    import torch.distributed as dist

    # The first process waits for the last one however long that takes.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        parts: list[list[Atoms]] | None = [[] for _ in range(world)] if rank == 0 else None
        dist.gather_object(list(stream), parts)
        for part in parts or []:
            yield from part
    finally:
        dist.destroy_process_group()
