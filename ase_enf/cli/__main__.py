"""The command ``ase-enf`` as ``python -m ase_enf.cli``."""

from __future__ import annotations

import sys

from ase_enf.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
