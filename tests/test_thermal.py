"""Thermal ensembles: known averages of harmonic and anharmonic systems, equipartition, bonds, resuming."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.calculators.emt import EMT
from ase.units import kB
from scipy.integrate import quad

from ase_enf.chem.mmff import MMFF94, conformers
from ase_enf.data import DataError, thermal
from ase_enf.data.series import autocorrelation_time, standard_error
from ase_enf.data.walkers import Walkers

KELVIN = 300.0
KT = kB * KELVIN


class Pairs(Calculator):
    """U = Σ_{i<j} u(r_ij) from a function that returns u and u'; it fails after ``limit`` calls."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, function, limit: float = math.inf) -> None:
        super().__init__()
        self.function, self.left = function, limit

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        i, j = np.triu_indices(len(atoms), 1)
        difference = atoms.positions[i] - atoms.positions[j]
        r = np.linalg.norm(difference, axis=1)
        u, slope = self.function(r)
        force, pull = np.zeros((len(atoms), 3)), (slope / r)[:, None] * difference
        np.add.at(force, i, -pull)
        np.add.at(force, j, pull)
        self.results = {"energy": float(np.sum(u)), "forces": force}


def springs(r, k=2.0):
    return 0.5 * k * r**2, k * r


def two_wells(r, barrier=0.15):
    """Minima at 2 and 3 Å, the outer one slightly lower, with a barrier of 6 kT."""
    s = 2.0 * (r - 2.5)
    return barrier * (s**2 - 1) ** 2 - 0.02 * s, 2.0 * (4 * barrier * s * (s**2 - 1) - 0.02)


def radial(function, observable, temperature=KELVIN) -> float:
    """Returns the average of a function of one distance, by quadrature of r² exp(−u / kT)."""
    weight = lambda r: r**2 * math.exp(-float(function(r)[0]) / (kB * temperature))  # noqa: E731
    grid = [0.5, 1.5, 2.0, 2.5, 3.0, 3.5, 4.5]
    parts = [
        [quad(f, a, b)[0] for a, b in zip(grid, grid[1:], strict=False)]
        for f in (lambda r: weight(r) * observable(r), weight)
    ]
    return sum(parts[0]) / sum(parts[1])


def close(series, truth, errors=4.0, at_most=math.inf) -> bool:
    error = float(standard_error(series))
    assert 0 < error < at_most
    return abs(series.mean() - truth) < errors * error


def test_a_harmonic_molecule_of_unequal_masses_is_exact():
    """Every mode of U = ½ k Σ_{i<j} |x_i − x_j|² has the variance kT / (k M), whatever the masses."""
    atoms = Atoms("CHOH", np.random.default_rng(0).standard_normal((4, 3)))
    found = thermal.run(atoms, Pairs(springs), KELVIN, 2000, leapfrog=5, burn_in=60, keep_bonds=False, seed=1)
    positions = np.array([frame.positions for frame in found.frames]).reshape(-1, 8, 4, 3)
    assert np.abs(positions.mean(axis=2)).max() < 1e-12
    variance = KT / (2.0 * 4)
    for atom in range(4):  # (1 − 1/M) of a mode's variance, in three directions
        assert close(np.square(positions[:, :, atom]).sum(axis=-1), 3 * variance * 3 / 4, at_most=0.15 * variance)
    energies = found.energies.reshape(-1, 8)
    assert close(energies, 4.5 * KT, at_most=0.15 * KT)
    # U is a Gamma variate of shape 9/2: its variance too is that of the canonical density, 9/2 kT².
    assert close(np.square(energies - 4.5 * KT), 4.5 * KT**2)
    d = found.diagnostics
    assert d.energy == pytest.approx(energies.mean()) and not d.trouble(KELVIN)
    assert 0.6 < d.acceptance[0] < 0.95 and d.exchange == () and d.refused == 0
    assert d.calls == 8 * (1 + 5 * (60 + 250))


def test_an_anharmonic_bond_has_the_radial_density_of_quadrature():
    """With the factor r² of three dimensions, which rotation and centring must not change."""
    bond = lambda r: (3.0 * (r - 1.1) ** 2 - 2.0 * (r - 1.1) ** 3 + (r - 1.1) ** 4,  # noqa: E731
                      6.0 * (r - 1.1) - 6.0 * (r - 1.1) ** 2 + 4 * (r - 1.1) ** 3)  # fmt: skip
    atoms = Atoms("HCl", [[0, 0, 0], [0, 0, 1.1]])
    frames = thermal.sample(atoms, Pairs(bond), 900.0, 2000, leapfrog=5, burn_in=60, keep_bonds=False)
    r = np.array([frame.get_distance(0, 1) for frame in frames]).reshape(-1, 8)
    assert close(r, radial(bond, lambda r: r, 900.0), at_most=1e-2)
    assert close(r**2, radial(bond, lambda r: r**2, 900.0))


def test_hotter_replicas_cross_a_barrier_that_one_temperature_does_not():
    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 2.0]])
    options = {"leapfrog": 3, "burn_in": 60, "keep_bonds": False, "seed": 2}
    outside = lambda frames: np.array([f.get_distance(0, 1) > 2.5 for f in frames], float).reshape(-1, 8)  # noqa: E731
    high = lambda r: two_wells(r, 0.45)  # noqa: E731 (17 kT)
    alone = thermal.run(atoms, Pairs(high), KELVIN, 400, **options)
    assert outside(alone.frames).mean() == 0
    ladder = thermal.run(atoms, Pairs(high), KELVIN, 1200, hotter=(800.0, 2200.0), **options)
    share = outside(ladder.frames)
    assert close(share, radial(high, lambda r: float(r > 2.5)), at_most=0.12)
    assert len(ladder.diagnostics.exchange) == 2 and min(ladder.diagnostics.exchange) > 0.1


def test_walkers_that_do_not_meet_are_noticed():
    starts = [Atoms("Ar2", [[0, 0, 0], [0, 0, r]]) for r in (2.0, 3.0)]
    high = Pairs(lambda r: two_wells(r, 0.45))
    with pytest.warns(UserWarning, match="Ar2 at 300 K: the walkers disagree"):
        thermal.sample(starts, high, KELVIN, 800, leapfrog=4, burn_in=50, keep_bonds=False)


def test_equipartition_of_a_molecule():
    atoms = molecule("CH3OH")
    found = thermal.run(conformers(atoms, 8), MMFF94(atoms), KELVIN, 800, leapfrog=8, burn_in=60, seed=3)
    d = found.diagnostics
    assert not d.trouble(KELVIN) and d.temperature_stderr < 0.4 * KELVIN
    assert d.effective_size > 50 and d.r_hat < 1.1 and d.refused == 0
    frame = found.frames[3]
    assert frame.get_potential_energy() == frame.info["thermal_energy"] == found.energies[3]
    frame.calc = MMFF94(atoms)
    assert frame.get_potential_energy() == pytest.approx(found.energies[3], abs=1e-9)
    assert [f.info["thermal_walker"] for f in found.frames[:9]] == [*range(8), 0]


def test_a_molecule_that_could_react_stays_the_molecule():
    """With a bond that is easily broken, bonds are kept and no frame has others."""
    soft = lambda r: (0.02 * (r - 1.0) ** 2, 0.04 * (r - 1.0))  # noqa: E731
    atoms = Atoms("HF", [[0, 0, 0], [0, 0, 1.0]])
    options = {"leapfrog": 5, "burn_in": 50}
    kept = thermal.run(atoms, Pairs(soft), KELVIN, 400, **options)
    free = thermal.run(atoms, Pairs(soft), KELVIN, 400, keep_bonds=False, **options)
    longest = lambda found: max(frame.get_distance(0, 1) for frame in found.frames)  # noqa: E731
    assert longest(kept) < 1.3 * (0.31 + 0.57) < longest(free)
    assert kept.diagnostics.refused > 0 == free.diagnostics.refused


def test_a_run_that_was_cut_off_goes_on_to_the_same_structures(tmp_path, monkeypatch):
    monkeypatch.setattr(thermal, "SAVE_EVERY", 10)
    atoms = Atoms("Ar3", [[0, 0, 0], [0, 0, 2.0], [0, 2.0, 0]])
    options = {"leapfrog": 3, "burn_in": 15, "keep_bonds": False, "hotter": (500.0,), "walkers": 4, "spacing": 2}
    whole = thermal.run(atoms, Pairs(two_wells), KELVIN, 60, **options)
    state = tmp_path / "state.npz"
    for calls in (300, 700):  # in the burn-in, and after it
        with pytest.raises(KeyboardInterrupt):
            thermal.run(atoms, Pairs(two_wells, calls), KELVIN, 60, out=state, **options)
    resumed = thermal.run(atoms, Pairs(two_wells), KELVIN, 60, out=state, **options)
    assert np.array_equal(resumed.energies, whole.energies)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(resumed.frames, whole.frames, strict=True))
    assert resumed.diagnostics == whole.diagnostics
    # A finished run is read, can give fewer frames, and can be extended.
    fewer = thermal.run(atoms, Pairs(two_wells, 16), KELVIN, 9, out=state, **options)
    assert np.array_equal(fewer.energies, whole.energies[:9])
    longer = thermal.run(atoms, Pairs(two_wells), KELVIN, 80, out=state, **options)
    assert np.array_equal(longer.energies[:60], whole.energies) and len(longer.frames) == 80
    with pytest.raises(DataError, match="holds a run with seed=0, not 1"):
        thermal.run(atoms, Pairs(two_wells), KELVIN, 60, out=state, seed=1, **options)
    with pytest.raises(DataError, match="other energies"):
        thermal.run(atoms, Pairs(springs), KELVIN, 60, out=state, **options)
    state.write_bytes(b"nothing")
    with pytest.raises(DataError, match="not the state of a thermal run"):
        thermal.run(atoms, Pairs(two_wells), KELVIN, 60, out=state, **options)


def test_a_run_goes_on_to_the_last_digit_by_a_calculator_that_sees_the_centre(tmp_path, monkeypatch):
    """The last digits of an energy depend on the position of the centre, and trajectories are chaotic."""
    monkeypatch.setattr(thermal, "SAVE_EVERY", 4)
    water, options = molecule("H2O"), {"leapfrog": 3, "burn_in": 8, "walkers": 2, "spacing": 1}
    whole = thermal.run(water, MMFF94(water), KELVIN, 20, **options)
    plain, seen = Walkers.sweep, []

    def cut(state, **how):
        seen.append(how)
        if len(seen) in (7, 14):
            raise KeyboardInterrupt
        return plain(state, **how)

    monkeypatch.setattr(Walkers, "sweep", cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            thermal.run(water, MMFF94(water), KELVIN, 20, out=tmp_path / "state.npz", **options)
    resumed = thermal.run(water, MMFF94(water), KELVIN, 20, out=tmp_path / "state.npz", **options)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(resumed.frames, whole.frames, strict=True))


def test_a_calculator_that_fails_on_some_structures_refuses_them():
    def wall(r):
        if np.any(r > 2.4):
            raise CalculationFailed("too far")
        return springs(r)

    pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 0.3]])
    frames = thermal.run(pair, Pairs(wall), 6000.0, 400, leapfrog=3, keep_bonds=False).frames
    r = np.array([frame.get_distance(0, 1) for frame in frames])
    assert 1.0 < r.max() <= 2.4
    with pytest.raises(DataError, match="no energy for a structure to start from .CalculationFailed: too far"):
        thermal.sample(Atoms("Ar2", [[0, 0, 0], [0, 0, 9.0]]), Pairs(wall), KELVIN, 4, keep_bonds=False)


def test_metals_by_emt():
    atoms = Atoms("Cu4", [[0, 0, 0], [2.3, 0, 0], [0, 2.3, 0], [0, 0, 2.3]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = thermal.run(atoms, EMT(), KELVIN, 80, leapfrog=5, burn_in=60, keep_bonds=False)
    assert found.diagnostics.acceptance[0] > 0.5 and np.isfinite(found.energies).all()


def test_gfn2():
    tblite = pytest.importorskip("tblite.ase")
    atoms = molecule("H2O")
    found = thermal.run(
        atoms, tblite.TBLite(method="GFN2-xTB", verbosity=0), KELVIN, 160, walkers=2, leapfrog=6, burn_in=60
    )
    assert found.diagnostics.acceptance[0] > 0.5
    assert abs(found.diagnostics.temperature - KELVIN) < 5 * found.diagnostics.temperature_stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be a positive"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"hotter": (400.0, 350.0)}, "must ascend from above temperature=300 K"),
        ({"hotter": (200.0,)}, "must ascend"),
        ({"n": 0}, "n=0: must be at least 1"),
        ({"walkers": 0}, "walkers=0"),
        ({"seed": -1}, "seed=-1"),
        ({"atoms": []}, "give one ase.Atoms or several"),
        ({"atoms": [molecule("CH4"), molecule("H2O")]}, "structure 1 is OH2, the first CH4"),
        ({"atoms": Atoms("He2", [[0, 0, 0], [0, 0, 3]], pbc=True, cell=[9, 9, 9])}, "structure 0 is periodic"),
        ({"atoms": [molecule("CH3CH2OH"), molecule("CH3CH2OH")[[1, 0, *range(2, 9)]]]}, "the bonds of the first"),
    ],
)
def test_bad_input(options, message):
    given = {"atoms": molecule("CH4"), "calculator": EMT(), "temperature": KELVIN, "n": 8} | options
    with pytest.raises(DataError, match=message):
        thermal.run(**given)


def test_autocorrelation_of_an_autoregressive_process():
    """τ = (1 + a) / (1 − a), and the standard error is the spread of repetitions."""
    rng = np.random.default_rng(0)
    for a in (0.0, 0.5, 0.9, -0.4):
        x = np.zeros((1300, 4, 300))
        for k in range(1, len(x)):
            x[k] = a * x[k - 1] + rng.standard_normal((4, 300))
        x = x[100:]
        assert autocorrelation_time(x).mean() == pytest.approx((1 + a) / (1 - a), rel=0.05)
        assert standard_error(x).mean() == pytest.approx(x.mean(axis=(0, 1)).std(ddof=1), rel=0.2)
    assert standard_error(np.ones((10, 2))) == 0


def test_turns_about_a_bond_reach_rotamers_that_trajectories_do_not():
    """For 6 (1 − cos 2φ) + ½ cos φ of one torsion, in kT, the density is known, and 12 kT separate the minima."""

    class Torsion(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            x, h = atoms.positions, 1e-5
            i, j = np.triu_indices(4, 1)
            held = j - i < 3

            def energy(x):
                r = np.linalg.norm(x[i] - x[j], axis=1)
                bonds = 20.0 * np.square(r - lengths)[held].sum()
                b = np.diff(x, axis=0)
                n, m = np.cross(b[0], b[1]), np.cross(b[1], b[2])
                c = n @ m / np.linalg.norm(n) / np.linalg.norm(m)
                return bonds + KT * (6.0 * (1.0 - (2 * c * c - 1)) + 0.5 * c)

            steps = h * np.eye(12).reshape(12, 4, 3)
            gradient = np.array([(energy(x + step) - energy(x - step)) / (2 * h) for step in steps]).reshape(4, 3)
            self.results = {"energy": energy(x), "forces": -gradient}

    start = np.array([[0.0, 1.0, 0.3], [0.0, 0.0, 0.0], [1.4, 0.0, 0.0], [1.4, 1.0, -0.3]])
    atoms = Atoms("HOOH", start)
    i, j = np.triu_indices(4, 1)
    lengths = np.linalg.norm(start[i] - start[j], axis=1)
    options = {"leapfrog": 4, "burn_in": 40, "seed": 1}
    trans = lambda found: np.array([f.get_dihedral(0, 1, 2, 3) for f in found.frames]).reshape(-1, 8)  # noqa: E731
    stuck = thermal.run(atoms, Torsion(), KELVIN, 160, **options)
    assert (np.abs(trans(stuck) - 180) > 90).all() and stuck.diagnostics.turned == ()
    found = thermal.run(atoms, Torsion(), KELVIN, 1600, turn=[(2, 1)], **options)
    weight = lambda f: math.exp(-6.0 * (1.0 - math.cos(2 * f)) - 0.5 * math.cos(f))  # noqa: E731
    share = quad(weight, math.pi / 2, 3 * math.pi / 2, points=[math.pi])[0] / (
        quad(weight, 0, math.pi / 2)[0] * 2 + quad(weight, math.pi / 2, 3 * math.pi / 2, points=[math.pi])[0]
    )
    assert close((np.abs(trans(found) - 180) < 90).astype(float), share, at_most=0.05)
    assert 0.05 < found.diagnostics.turned[0] < 0.6 and found.diagnostics.exchange == ()
    assert found.diagnostics.calls == 8 * (1 + (4 + 1) * (40 + 200))


def test_bonds_to_turn_about_are_checked():
    ring = Atoms("C3", [[0, 0, 0], [1.5, 0, 0], [0.75, 1.3, 0]])
    for two, words in (((0, 1), "in a ring"), ((0, 0), "indices of two bonded"), ((0, 1, 2), "indices of two bonded")):
        with pytest.raises(DataError, match=words):
            thermal.run(ring, Pairs(springs), KELVIN, 8, turn=[two])
