"""Where pictures go."""

from __future__ import annotations

from pathlib import Path


def writable(path: str | Path) -> Path:
    """The path, when its folder exists."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist, create it first")
    return target
