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
"""Molecules in an animation."""


def add_trajectory(command: argparse.ArgumentParser) -> None:
    """Adds the options of paths."""
    command.add_argument(
        "--trajectory",
        default=None,
        metavar="FILE",
        help="write the path of each molecule from noise to data as well, in one file (.traj, .extxyz), the frames of "
        "one molecule after those of another; the path is that of the sampler that draws: smooth with --churn 0, "
        "trembling where noise is renewed",
    )
    command.add_argument(
        "--gif", default=None, metavar="GIF", help=f"animation of these paths, of the first {ANIMATED} molecules"
    )
    command.add_argument("--frames", type=int, default=60, help="frames of a path, one a step at most")


def check_trajectory(options: argparse.Namespace) -> None:
    """Raises before any work if trajectory or animation could not be written."""
    from ase_enf.atoms.io import check_output
    from ase_enf.plot import check_animation

    if not (options.trajectory or options.gif):
        return
    if options.frames < 2:
        raise ValueError(f"--frames {options.frames}: a path has at least 2, noise and molecule")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--trajectory and --gif are for one process; leave torchrun out, or these options")
    if options.trajectory:
        check_output(options.trajectory, options.n * options.frames)
    if options.gif:
        check_animation(options.gif)
    paths = [os.path.realpath(path) for path in (options.output, options.trajectory, options.gif) if path]
    if len(set(paths)) < len(paths):
        raise ValueError(f"--trajectory {options.trajectory}: molecules and their paths need a file each; name another")


class Trajectories:
    """Where the paths of molecules from noise to data go, while the molecules go on."""

    def __init__(self, options: argparse.Namespace) -> None:
        from ase_enf.atoms.io import GrowingFile

        self._gif = options.gif
        self._file = GrowingFile(options.trajectory) if options.trajectory else None
        self._animated: list[list[Atoms]] = []

    @property
    def wanted(self) -> bool:
        """Whether paths are asked for."""
        return bool(self._file or self._gif)

    def __enter__(self) -> Trajectories:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file:
            self._file.__exit__(*error)

    def passed(self, stream: Iterator[MoleculePath]) -> Iterator[Atoms]:
        """Yields the molecules of paths, of which the frames are kept."""
        for path in stream:
            for frame in path.frames if self._file else ():
                self._file.add(frame)
            if self._gif and len(self._animated) < ANIMATED:
                self._animated.append(path.frames)
            yield path.molecule

    def draw(self) -> None:
        """Draws the animation, and says what was written."""
        from ase_enf.plot import animate

        if self._file:
            say(f"wrote {counted(self._file.count, 'frame')} to {self._file.path}")
        if self._gif:
            animate(self._animated, self._gif)
            say(f"drew the path of {counted(len(self._animated), 'molecule')} in {self._gif}")
