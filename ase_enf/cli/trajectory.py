"""``--trajectory`` and ``--gif`` of ``ase-enf generate``: the path of each molecule from noise to data."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ase_enf.cli.progress import counted, say

if TYPE_CHECKING:
    from ase import Atoms

    from ase_enf.sampling.path import MoleculePath

ANIMATED = 4
"""Number of molecules in an animation."""


def add_trajectory(command: argparse.ArgumentParser) -> None:
    """Adds the options that write paths."""
    command.add_argument(
        "--trajectory",
        default=None,
        metavar="FILE",
        help="also write the path of each molecule from noise to data, all in one file (.traj, .extxyz), molecule by "
        "molecule; the path is that of the sampler: smooth with --churn 0, otherwise jittery from fresh noise",
    )
    command.add_argument(
        "--gif", default=None, metavar="GIF", help=f"animate the paths of the first {ANIMATED} molecules"
    )
    command.add_argument("--frames", type=int, default=60, help="number of frames of a path, at most one for each step")


def check_trajectory(options: argparse.Namespace) -> None:
    """Raises an error, before any work, if trajectory or animation cannot be written."""
    from ase_enf.atoms.io import check_output
    from ase_enf.plot import check_animation

    if not (options.trajectory or options.gif):
        return
    if options.frames < 2:
        raise ValueError(f"--frames {options.frames}: a path has at least 2, noise and molecule")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--trajectory and --gif work in one process only; leave out torchrun or these options")
    if options.trajectory:
        check_output(options.trajectory, options.n * options.frames)
    if options.gif:
        check_animation(options.gif)
    paths = [os.path.realpath(path) for path in (options.output, options.trajectory, options.gif) if path]
    if len(set(paths)) < len(paths):
        raise ValueError(f"--trajectory {options.trajectory}: another output has that name; name a file for each")


class Trajectories:
    """Collects the paths of molecules from noise to data, and passes the molecules on."""

    def __init__(self, options: argparse.Namespace) -> None:
        from ase_enf.atoms.io import GrowingFile

        self._gif = options.gif
        self._file = GrowingFile(options.trajectory) if options.trajectory else None
        self._animated: list[list[Atoms]] = []

    @property
    def wanted(self) -> bool:
        """Whether paths are requested."""
        return bool(self._file or self._gif)

    def __enter__(self) -> Trajectories:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file:
            self._file.__exit__(*error)

    def passed(self, stream: Iterator[MoleculePath]) -> Iterator[Atoms]:
        """Yields the molecule of each path, after its frames are written or kept."""
        for path in stream:
            for frame in path.frames if self._file else ():
                self._file.add(frame)
            if self._gif and len(self._animated) < ANIMATED:
                self._animated.append(path.frames)
            yield path.molecule

    def draw(self) -> None:
        """Draws the animation, and reports what was written."""
        from ase_enf.plot import animate

        if self._file:
            say(f"wrote {counted(self._file.count, 'frame')} to {self._file.path}")
        if self._gif:
            animate(self._animated, self._gif)
            say(f"drew the path of {counted(len(self._animated), 'molecule')} in {self._gif}")
