"""``ase-enf boltzmann``: from a file to a report, and resumed."""

from __future__ import annotations

import warnings
from functools import partial

from ase.build import molecule
from ase.io import write

from ase_enf.cli import main, progress
from ase_enf.training.config import TrainConfig


def test_from_a_file_to_a_report(tmp_path, monkeypatch, capsys):
    from ase_enf.ensemble import study

    tiny = TrainConfig(features="given", hidden=8, layers=1, steps=2, batch_size=8, validation_size=2, warmup=1)
    monkeypatch.setattr(study, "default_training", lambda *_: tiny)
    write(tmp_path / "water.xyz", molecule("H2O"))
    words = ["boltzmann", str(tmp_path / "water.xyz"), "--calculator", "mmff", "-n", "32", "--draws", "40"]
    words += ["-o", str(tmp_path / "out"), "--temperature", "400"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(words)
        said = capsys.readouterr()
        # After two training steps, forty draws may or may not hold the molecule; both cases are reported.
        assert code in (0, 2)
        assert ("# H2O at 400 K" in said.out) if code == 0 else ("none of 40 draws is the molecule" in said.err)
        assert (tmp_path / "out" / "thermal.extxyz").exists()
        assert main(words) == code
        assert main([*words, "--seed", "1"]) == 2
    assert "holds a run with seed=0, not 1; name another file" in capsys.readouterr().err


def test_each_stage_says_what_it_does_and_how_far_it_is_where_no_terminal_shows_a_bar(tmp_path, monkeypatch, capsys):
    from ase_enf.data import thermal
    from ase_enf.ensemble import study

    tiny = TrainConfig(features="given", hidden=8, layers=1, steps=3, batch_size=8, validation_size=2, warmup=1)
    monkeypatch.setattr(study, "default_training", lambda *_: tiny)
    monkeypatch.setattr(thermal, "run", partial(thermal.run, leapfrog=2, burn_in=1))
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    write(tmp_path / "water.xyz", molecule("H2O"))
    words = ["boltzmann", str(tmp_path / "water.xyz"), "-n", "16", "--draws", "2", "-o", str(tmp_path / "out")]
    main(words)
    left = "about 1 minute left"
    said = [line.removeprefix("ase-enf: ") for line in capsys.readouterr().err.splitlines()]
    assert [line for line in said if left in line or line.split()[0].endswith("ing")] == [
        "sampling 16 frames of H2O at 300 K by MMFF94",
        *(f"{done} of 3 sweeps, {left}" for done in (0, 1, 2)),
        "training a flow on 8 frames of H2O at 300 K",
        *(f"{done} of 3 steps, {left}" for done in (1, 2)),
        "drawing 2 structures from the flow and weighting them by MMFF94",
        *(f"{done} of 2 draws, {left}" for done in (1, 1)),
    ]
    main(words)  # what is finished is not said again
    assert "sampling" not in (again := capsys.readouterr().err) and left not in again


def test_turns_reach_the_walkers(tmp_path, monkeypatch, capsys):
    from ase_enf.ensemble import study

    asked = {}

    def boltzmann(*_: object, **options: object) -> None:
        asked.update(options)
        raise ValueError("enough is known")

    monkeypatch.setattr(study, "boltzmann", boltzmann)
    write(tmp_path / "ethanol.xyz", molecule("CH3CH2OH"))
    assert main(["boltzmann", str(tmp_path / "ethanol.xyz"), "-o", "new", "--turn", "1", "2", "--turn", "0", "1"]) == 2
    assert asked["sampling"] == {"turn": [[1, 2], [0, 1]]} and "enough is known" in capsys.readouterr().err
