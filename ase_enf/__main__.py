"""The command ``ase-enf`` as ``python -m ase_enf``."""

from __future__ import annotations

import sys

from ase_enf.cli import main

if __name__ == "__main__":
    sys.exit(main())
