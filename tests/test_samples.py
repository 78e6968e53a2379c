"""Sets of samples: reproducible, without duplicates, from different ladders, and unchanged by writing and reading."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from ase_enf.data import DataError, DataNotFoundError
from ase_enf.data.mcmc import Diagnostics
from ase_enf.data.particles import lennard_jones, resolve
from ase_enf.data.samples import dataset, fingerprint, load, sample, save

FAST = {"ladders": 8, "burn_in": 60}
SIZES = {"train": 200, "valid": 40, "test": 50}


@pytest.fixture(scope="module")
def sets():
    return dataset("dw4", SIZES, seed=1, **FAST)


def test_sizes_and_contents(sets):
    assert {name: len(samples) for name, samples in sets.items()} == SIZES
    for samples in sets.values():
        assert samples.positions.shape[1:] == (4, 2) and samples.positions.dtype == np.float64
        assert np.abs(samples.positions.mean(axis=1)).max() < 1e-12
        assert np.array_equal(samples.energies, resolve("dw4").evaluate(samples.positions).energy)
        assert set(samples.ladder) == set(range(8))


def test_no_duplicates_and_nothing_in_two_sets(sets):
    rows = [{row.tobytes() for row in np.round(samples.positions, 6)} for samples in sets.values()]
    assert sum(map(len, rows)) == len(set().union(*rows)) == sum(SIZES.values())


def test_a_set_is_a_function_of_seed_name_and_size(sets):
    alone = dataset("dw4", {"test": 50}, seed=1, **FAST)["test"]
    other = dataset("dw4", {"test": 50}, seed=2, **FAST)["test"]
    assert np.array_equal(alone.positions, sets["test"].positions)
    assert alone.info == sets["test"].info
    assert other.info["sha256"] != alone.info["sha256"]


def test_any_first_part_is_of_all_ladders(sets):
    assert len(set(sets["train"].ladder[:40])) >= 7


def test_the_hash_is_that_of_rounded_coordinates(sets):
    positions = sets["test"].positions
    assert sets["test"].info["sha256"] == fingerprint(positions) == fingerprint(positions + 1e-11)
    assert fingerprint(positions + 1e-5) != fingerprint(positions)
    micro = [round(float(value) * 1e6) for value in positions.ravel()]
    packed = b"".join(value.to_bytes(8, "little", signed=True) for value in micro)
    assert hashlib.sha256(packed).hexdigest() == fingerprint(positions)


def test_info_says_where_they_come_from(sets):
    info = json.loads(json.dumps(sets["train"].info))
    assert info == sets["train"].info
    assert info["system"] == "dw4" and info["seed"][0] == 1 and info["ladders"] == 8
    assert info["sweeps"] >= 100 and info["diagnostics"]["sweeps"] == info["sweeps"]


def test_written_and_read(sets, tmp_path):
    save(tmp_path / "dw4.npz", sets)
    again = load(tmp_path / "dw4.npz")
    assert list(again) == list(sets)
    for name, samples in sets.items():
        assert again[name].info == samples.info
        for key in ("positions", "energies", "ladder"):
            assert np.array_equal(getattr(again[name], key), getattr(samples, key))
    with np.load(tmp_path / "dw4.npz", allow_pickle=False) as archive:
        assert all(archive[key].dtype != object for key in archive.files)


def test_damage_is_noticed(sets, tmp_path):
    path = tmp_path / "dw4.npz"
    with pytest.raises(DataNotFoundError, match="no such file"):
        load(path)
    save(path, {"test": sets["test"]})
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["test/positions"] = arrays["test/positions"] + 0.1
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="differ from their hash"):
        load(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(DataError, match="holds no samples"):
        load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a file of samples"):
        load(path)


def test_atoms(sets):
    atoms = sets["test"].to_atoms()
    assert len(atoms) == 50
    assert np.array_equal(atoms[7].positions[:, :2], sets["test"].positions[7])


def test_what_cannot_be_drawn():
    with pytest.raises(DataError, match="n=0"):
        sample("dw4", 0)
    with pytest.raises(DataError, match="ladders=1"):
        sample("dw4", 5, ladders=1)
    with pytest.raises(DataError, match="none of dw4"):
        sample("lj55", 5)


def test_a_system_of_ones_own_becomes_atoms():
    drawn = sample(lennard_jones(1.5, n_atoms=3), 20, ladders=8, burn_in=20)
    assert [len(atoms) for atoms in drawn.to_atoms()] == [3] * 20
    assert np.array_equal(drawn.to_atoms()[7].positions, drawn.positions[7])


def test_chains_that_have_not_come_to_rest_are_named():
    """A cluster of lj13 has not yet condensed if its chains are measured from the start."""
    with pytest.warns(UserWarning, match=r"lj13: <U> changed by -\d.*not samples of exp.*longer burn_in"):
        sample("lj13", 8, ladders=8, burn_in=0)


def test_trouble_is_found_by_equipartition_and_by_the_chains():
    good = dict.fromkeys(Diagnostics._fields, 0.0)
    good |= {"drift_stderr": 1.0, "equipartition": 6.1, "equipartition_stderr": 0.1, "r_hat": 1.02, "ladders": 64}
    assert Diagnostics(**good).trouble(6) == ""
    assert "by equipartition it is 6" in Diagnostics(**good | {"equipartition": 7.0}).trouble(6)
    assert "disagree (r_hat 1.50)" in Diagnostics(**good | {"r_hat": 1.5}).trouble(6)
    assert "<U> changed by 5" in Diagnostics(**good | {"drift": 5.0}).trouble(6)
    assert Diagnostics(**good | {"drift": 5.0, "ladders": 2}).trouble(6) == ""  # two ladders give no error


def test_thin_is_positive():
    with pytest.raises(DataError, match="thin=-5"):
        sample("dw4", 100, thin=-5)
