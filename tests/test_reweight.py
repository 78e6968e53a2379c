"""Reweighting: weights follow their definition; free energies and averages of a harmonic well are the known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.units import kB

from ase_enf.atoms.batch import to_batch
from ase_enf.data import particles
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.continuous import Solver, SolverError
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.sampling.generate import generate
from ase_enf.scoring import energies as module
from ase_enf.scoring.density import DensitySampler
from ase_enf.scoring.reweight import Reweighted, ReweightingError, reweight

KELVIN = 300.0
KT = kB * KELVIN


@pytest.fixture(autouse=True)
def _float64_only(dtype):
    if dtype != torch.float64:
        pytest.skip("weights are compared in float64")


class Harmonic(Calculator):
    """U = ½ k Σ |x_i − x̄|², eV; ``trouble`` is called first and may raise an error or return another energy."""

    implemented_properties = ["energy"]  # noqa: RUF012

    def __init__(self, k: float, trouble=None) -> None:
        super().__init__()
        self.k, self.trouble, self.calls = k, trouble, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=()) -> None:
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        other = self.trouble(self.calls) if self.trouble else None
        self.results["energy"] = harmonic(atoms.positions, self.k) if other is None else other

    def free_energy(self, dimensions: int) -> float:
        """−kT ln ∫ exp(−U / kT) dx over the subspace."""
        return -0.5 * KT * dimensions * math.log(2 * math.pi * KT / self.k)


class Together(Harmonic):
    """The same for many configurations together."""

    def batch_energies(self, positions: np.ndarray) -> np.ndarray:
        self.shapes = [*getattr(self, "shapes", []), positions.shape]
        return np.array([harmonic(x, self.k) for x in positions])


def harmonic(positions: np.ndarray, k: float) -> float:
    return 0.5 * k * np.square(positions - positions.mean(axis=0)).sum()


def gaussian(scale: float = 0.8, n_atoms: int = 4, dimension: int = 3) -> ENF:
    """Returns an identity flow: p is Gaussian with this standard deviation, Å, in every dimension of the subspace."""
    config = ENFConfig(
        features="none", sizes={n_atoms: 1}, dimension=dimension, network="kernel", hidden=4, layers=2,
        position_scale=scale,
    )  # fmt: skip
    flow = ENF(config).double()
    torch.nn.init.zeros_(flow.dynamics.network.weight)
    return flow


@pytest.fixture
def curved(stir):
    """Returns a flow far from the identity, over H and O or of positions only."""

    def build(features: str = "none", n_atoms: int = 3, **fields) -> ENF:
        fields = {"hidden": 8, "layers": 2, "sizes": {n_atoms: 1}, "position_scale": 1.3} | fields
        species = () if features == "none" else ("H", "O")
        return stir(ENF(ENFConfig(features=features, species=species, **fields)), 0.8).double()

    return build


# Known answers


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_flow_that_is_the_target_has_every_sample_and_the_free_energy(dimension):
    scale, n = 0.8, 20
    calculator = Harmonic(KT / scale**2)
    result = reweight(gaussian(scale, dimension=dimension), calculator, n, KELVIN)
    free_energy = calculator.free_energy(3 * dimension)
    assert result.effective_sample_size == pytest.approx(n, abs=1e-6)
    assert np.allclose(result.log_weights, -free_energy / KT, atol=1e-9, rtol=0)
    assert result.free_energy == pytest.approx(free_energy, abs=1e-10)
    assert result.free_energy_stderr < 1e-6 and result.integration_error < 1e-9
    assert result.failed == result.redrawn == result.clipped == 0


def test_free_energy_and_averages_of_another_well():
    """For a Gaussian by a Gaussian, F, the effective sample size and the averages are known."""
    scale, n, dimensions = 0.8, 4000, 9
    k = 1.4 * KT / scale**2
    calculator = Together(k)
    result = reweight(gaussian(scale), calculator, n, KELVIN, seed=3, batch_size=1000, intervals=8)
    assert 1e-4 < result.free_energy_stderr < 0.02 * KT
    assert abs(result.free_energy - calculator.free_energy(dimensions)) < 3 * result.free_energy_stderr
    # E[w]² / E[w²] = (a (2 − a))^(D / 2) with a = σ² of the target / σ² of the flow.
    a = KT / k / scale**2
    assert result.effective_sample_size / n == pytest.approx((a * (2 - a)) ** (dimensions / 2), rel=0.05)
    energy = result.average(result.energies)
    assert abs(energy.value - dimensions * KT / 2) < 3 * energy.stderr < 0.1 * dimensions * KT / 2
    squares = result.average(lambda atoms: np.square(atoms.positions).mean(axis=0))  # by component
    assert squares.value.shape == squares.stderr.shape == (3,)
    assert np.all(abs(squares.value - KT / k * 3 / 4) < 4 * squares.stderr)
    unweighted = np.mean([np.square(atoms.positions).mean() for atoms in result.samples])
    assert unweighted > KT / k * 3 / 4 * 1.2  # the flow alone is elsewhere


def test_error_bars_are_the_spread_of_repetitions():
    """A Gaussian of variance 1 is repeatedly reweighted to one of variance 1/1.4."""
    rng, runs = np.random.default_rng(0), []
    for _ in range(300):
        x = rng.standard_normal((100, 5))
        energies, log_prob = 0.7 * np.square(x).sum(axis=1) * KT, -0.5 * np.square(x).sum(axis=1)
        result = Reweighted([], -energies / KT - log_prob, energies, log_prob, np.zeros(100), KELVIN)
        runs.append((result.free_energy, result.free_energy_stderr, *result.average(x[:, 0])))
    free_energy, stderr, average, average_stderr = np.array(runs).T
    assert free_energy.std(ddof=1) == pytest.approx(stderr.mean(), rel=0.12)
    assert average.std(ddof=1) == pytest.approx(average_stderr.mean(), rel=0.12)


@pytest.mark.parametrize("network", ["egnn", "kernel", "simple", "gnn"])
def test_weights_are_energy_and_density_whatever_the_network(curved, network):
    """log w = −U / kT − log p, with log p computed independently, from data to latent space."""
    flow, calculator = curved(network=network), Harmonic(0.05)
    result = reweight(flow, calculator, 6, KELVIN, solver="rk4", steps=96)
    batch = to_batch(result.samples, (), dtype=torch.float64)
    log_prob = flow.log_prob(batch, solver=Solver("dopri5", rtol=1e-10, atol=1e-10), intervals=96).log_prob.numpy()
    energies = [harmonic(atoms.positions, 0.05) for atoms in result.samples]
    assert np.allclose(result.log_prob, log_prob, atol=2e-4)
    assert (abs(result.log_prob - log_prob) <= result.log_prob_error + 1e-7).all() and result.integration_error < 1e-2
    assert np.allclose(result.energies, energies, rtol=1e-12)
    assert np.array_equal(result.log_weights, -result.energies / KT - result.log_prob)
    gauss = -0.5 * np.array([np.square(atoms.positions / 1.3).sum() for atoms in result.samples])
    assert np.ptp(result.log_prob - gauss) > 0.1  # far from the identity, or this would say little


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_integration_error_covers_the_true_one_and_is_not_much_larger(curved, method):
    flow = curved(network="simple")
    result = reweight(flow, Harmonic(0.05), 8, KELVIN, solver=Solver(method, steps=1), intervals=32)
    batch = to_batch(result.samples, (), dtype=torch.float64)
    exact = flow.log_prob(batch, solver=Solver("dopri5", rtol=1e-11, atol=1e-11), intervals=96).log_prob.numpy()
    true, said = abs(exact - result.log_prob), result.log_prob_error
    # The inverse with half as many steps must not underestimate: its error exceeds the one it estimates.
    assert (true <= said).all() and 1.4 * true.mean() < said.mean() < 6 * true.mean()


@pytest.mark.parametrize(("method", "steps"), [("midpoint", 32), ("midpoint", 100), ("rk4", 32)])
def test_a_grid_finer_than_the_quadrature_is_no_reason_for_trust(curved, method, steps):
    """On the same grid forwards and backwards, the errors of even-order methods cancel."""
    flow = curved(network="simple")
    result = reweight(flow, Harmonic(0.05), 8, KELVIN, solver=Solver(method, steps=steps), intervals=16)
    batch = to_batch(result.samples, (), dtype=torch.float64)
    exact = flow.log_prob(batch, solver=Solver("dopri5", rtol=1e-11, atol=1e-11), intervals=96).log_prob.numpy()
    assert (abs(exact - result.log_prob) <= result.log_prob_error).mean() > 0.8


def test_free_energy_by_a_curved_flow(curved):
    """The free energy depends on the calculator and not on the flow."""
    flow, calculator = curved(network="kernel", dimension=2), Together(KT / 1.3**2)
    with torch.no_grad():
        flow.dynamics.network.weight.mul_(0.1)
    result = reweight(flow, calculator, 1000, KELVIN, batch_size=500, intervals=16)
    assert 0.05 < result.effective_sample_size / 1000 < 0.95 and result.free_energy_stderr < 0.1 * KT
    assert abs(result.free_energy - calculator.free_energy(4)) < 3 * result.free_energy_stderr


def test_the_shipped_dw4_gives_its_free_energy():
    result = reweight(load("dw4", "cpu"), particles.DW4(), n=64, temperature=1 / kB)
    assert result.effective_sample_size > 0.8 * 64
    assert abs(result.free_energy + particles.quadrature("dw4").log_z) < 5 * result.free_energy_stderr < 0.3


def test_given_types_reach_the_calculator(curved):
    flow = curved("given")
    seen = []
    calculator = Harmonic(0.05)
    calculator.trouble = lambda call: seen.append(calculator.atoms.get_chemical_formula())
    result = reweight(flow, calculator, 3, KELVIN, formula="H2O")
    assert seen == ["H2O"] * 3 == [atoms.get_chemical_formula() for atoms in result.samples]
    batch = to_batch(result.samples, flow.species, dtype=torch.float64)
    assert np.allclose(result.log_prob, flow.log_prob(batch).log_prob, atol=1e-3)


# Samples


def test_samples_are_those_of_generate(curved):
    flow = curved()
    solver = Solver("rk4", steps=64)
    result = reweight(flow, Harmonic(0.05), 5, KELVIN, seed=7, solver=solver)
    for atoms, twin in zip(result.samples, generate(flow, 5, seed=7, solver=solver), strict=True):
        assert np.allclose(atoms.positions, twin.positions, atol=1e-6)
        for key in ("enf_seed", "enf_index", "enf_attempts", "enf_solver"):
            assert atoms.info[key] == twin.info[key]


def test_a_sample_depends_on_seed_and_index_alone(curved):
    flow = curved(network="kernel")
    whole = reweight(flow, Harmonic(0.05), 7, KELVIN, seed=2)
    again = reweight(flow, Harmonic(0.05), 7, KELVIN, seed=2)
    part = reweight(flow, Harmonic(0.05), 4, KELVIN, seed=2, batch_size=3)
    other = reweight(flow, Harmonic(0.05), 4, KELVIN, seed=3)
    assert np.array_equal(whole.log_weights, again.log_weights)
    assert np.allclose(whole.log_weights[:4], part.log_weights, atol=1e-10)
    assert abs(whole.log_weights[:4] - other.log_weights).min() > 1e-3


def test_samples_carry_energy_and_weight_through_files(tmp_path, curved):
    result = reweight(curved(), Harmonic(0.05), 3, KELVIN, symbols="Ar3")
    write(tmp_path / "samples.extxyz", result.samples)
    for k, atoms in enumerate(read(tmp_path / "samples.extxyz", index=":")):
        assert atoms.get_chemical_formula() == "Ar3"
        assert atoms.get_potential_energy() == pytest.approx(result.energies[k], abs=1e-6)
        assert atoms.info["enf_log_weight"] == pytest.approx(result.log_weights[k])
        assert atoms.info["enf_log_likelihood"] == pytest.approx(result.log_prob[k])


def test_any_ase_calculator_and_dummy_symbols(curved):
    flow = curved()
    lj = reweight(flow, LennardJones(rc=50, sigma=0.5), 3, KELVIN, symbols=["Ar", "Ar", "Ar"])
    twin = [Atoms("Ar3", positions=atoms.positions, calculator=LennardJones(rc=50, sigma=0.5)) for atoms in lj.samples]
    assert np.allclose(lj.energies, [atoms.get_potential_energy() for atoms in twin])
    assert reweight(flow, Harmonic(1.0), 1, KELVIN).samples[0].get_chemical_formula() == "X3"


def test_many_at_once_are_one_by_one(curved, monkeypatch):
    flow = curved(dimension=2)
    monkeypatch.setattr(module, "ENERGY_BATCH", 4)
    together, alone = Together(0.05), Harmonic(0.05)
    result = reweight(flow, together, 6, KELVIN)
    assert np.allclose(result.energies, reweight(flow, alone, 6, KELVIN).energies, rtol=1e-12)
    assert together.shapes == [(4, 3, 2), (2, 3, 2)] and together.calls == 0 and alone.calls == 6


# Clipping and failures


def test_clipping_lowers_the_largest_weights_and_says_so():
    log_weights = np.array([0.0, 1.0, 5.0, 3.0])
    zeros = np.zeros(4)
    plain = Reweighted([], log_weights, zeros, zeros, zeros, KELVIN)
    clipped = Reweighted([], log_weights, zeros, zeros, zeros, KELVIN, clip=0.5)
    expected = np.exp([0.0, 1.0, 3.0, 3.0])
    assert np.allclose(clipped.weights, expected / expected.sum()) and clipped.clipped == 1
    assert clipped.effective_sample_size == pytest.approx(expected.sum() ** 2 / (expected**2).sum())
    assert clipped.free_energy == pytest.approx(-KT * math.log(expected.mean()))
    assert plain.free_energy == pytest.approx(-KT * math.log(np.exp(log_weights).mean()))
    assert "no clipping" in str(plain) and "1 largest weights clipped (clip=0.5)" in str(clipped)
    assert "of n = 4" in str(plain) and plain.clipped == 0
    assert Reweighted([], log_weights, zeros, zeros, zeros, KELVIN, clip=0.0).clipped == 0


def test_failed_energies_count_with_weight_zero():
    def trouble(call):
        if call == 2:
            raise RuntimeError("no convergence")
        return {3: math.nan, 5: math.inf, 6: -math.inf}.get(call)

    with pytest.warns(UserWarning, match="4 of 10 structures have no finite energy and count with weight zero"):
        result = reweight(gaussian(), Harmonic(KT / 0.8**2, trouble), 10, KELVIN)
    bad = [1, 2, 4, 5]
    assert result.failed == 4 and (result.weights[bad] == 0).all() and len(result.samples) == 10
    assert np.isnan(result.energies[1]) and result.effective_sample_size == pytest.approx(6)
    assert result.free_energy == pytest.approx(Harmonic(KT / 0.8**2).free_energy(9) - KT * math.log(6 / 10))
    good = np.delete(np.arange(10), bad)
    assert result.average(result.energies).value == pytest.approx(result.energies[good].mean())
    asked = []
    result.average(lambda atoms: asked.append(atoms.info["enf_index"]) or 1.0)
    assert asked == list(good) and "4 energies failed" in str(result)
    with pytest.raises(RuntimeError):
        result.samples[1].get_potential_energy()


def test_failed_integrations_are_drawn_again_and_counted(monkeypatch):
    """A draw that cannot be integrated has zero weight in the free energy, and is replaced as in ``generate``."""
    plain = DensitySampler.sample

    def broken(self, drafts):
        batch = plain(self, drafts)
        lost = torch.tensor([draft.index % 2 == 0 and draft.attempt == 0 for draft in drafts])
        return batch._replace(positions=torch.where(lost[:, None, None], math.nan, batch.positions))

    monkeypatch.setattr(DensitySampler, "sample", broken)
    calculator = Harmonic(KT / 0.8**2)
    with pytest.warns(UserWarning, match="4 of 12 integrations failed and were drawn again"):
        result = reweight(gaussian(), calculator, 8, KELVIN)
    assert result.redrawn == 4 and [atoms.info["enf_attempts"] for atoms in result.samples] == [2, 1] * 4
    assert np.allclose(result.log_weights, -calculator.free_energy(9) / KT)  # each with the density of its own draw
    assert result.free_energy == pytest.approx(calculator.free_energy(9) - KT * math.log(8 / 12))


def test_a_density_that_is_not_finite_is_drawn_again(monkeypatch):
    class Lost:
        def __init__(self, flow):
            self.flow = flow

        def __getattr__(self, name):
            return getattr(self.flow, name)

        def inverse(self, *args, **options):
            out = self.flow.inverse(*args, **options)
            return out._replace(ladj=torch.full_like(out.ladj, math.nan))

    flow = gaussian()
    honest, calls = flow.flow, []

    def first_time_lost(*args):
        calls.append(1)
        return Lost(honest(*args)) if len(calls) == 1 else honest(*args)

    monkeypatch.setattr(flow, "flow", first_time_lost)
    with pytest.warns(UserWarning, match="2 of 4 integrations failed"):
        result = reweight(flow, Harmonic(1.0), 2, KELVIN)
    assert np.isfinite(result.log_prob).all() and result.redrawn == 2


def test_a_coarse_integration_is_named(curved):
    flow = curved(network="kernel")
    with torch.no_grad():
        flow.dynamics.network.weight.mul_(12.0)
    with pytest.warns(UserWarning, match=r"integration error of the weights is .* nats; use intervals=16"):
        result = reweight(flow, Harmonic(0.05), 4, KELVIN, solver="euler", steps=1, intervals=8)
    assert result.integration_error > 0.1 and result.free_energy_stderr > 0.1 * KT


def hopeless(call):
    raise RuntimeError("no parameters for X\nsecond line")


def test_a_calculator_that_never_works_stops_early():
    calculator = Harmonic(1.0, hopeless)
    with pytest.raises(ReweightingError, match=r"Harmonic gave no finite energy \(RuntimeError: no parameters for X\)"):
        reweight(gaussian(), calculator, 40, KELVIN)
    assert calculator.calls == 10
    with pytest.raises(ReweightingError, match="its energies are not finite"):
        reweight(gaussian(), Harmonic(1.0, lambda call: math.nan), 3, KELVIN)
    with pytest.raises(ReweightingError, match="no finite energy"):  # ASE's own error for another structure
        reweight(gaussian(), SinglePointCalculator(Atoms("H"), energy=1.0), 3, KELVIN)


def test_energies_of_many_must_be_one_each():
    class Sum(Together):
        def batch_energies(self, positions):
            return super().batch_energies(positions).sum()

    class Raises(Together):
        def batch_energies(self, positions):
            raise KeyError("charge")

    with pytest.raises(ReweightingError, match=r"energies\(\) gave shape \(\) for 3 structures"):
        reweight(gaussian(), Sum(1.0), 3, KELVIN)
    with pytest.raises(ReweightingError, match=r"\(batch_energies\(\) of 3 structures: KeyError: 'charge'\)"):
        reweight(gaussian(), Raises(1.0), 3, KELVIN)


@pytest.mark.parametrize("energies", [[1.0], lambda positions: np.zeros(len(positions))], ids=["list", "method"])
def test_an_attribute_that_happens_to_be_called_energies_is_left_alone(energies):
    calculator = Harmonic(1.0)
    calculator.energies = energies
    plain = reweight(gaussian(), Harmonic(1.0), 3, KELVIN)
    assert np.array_equal(reweight(gaussian(), calculator, 3, KELVIN).energies, plain.energies)
    assert calculator.calls == 3


def test_a_later_batch_that_fails_costs_no_other(monkeypatch):
    class Sometimes(Together):
        def batch_energies(self, positions):
            if len(positions) == 4:
                raise MemoryError("too many")
            return super().batch_energies(positions)

    monkeypatch.setattr(module, "ENERGY_BATCH", 4)
    with pytest.warns(UserWarning, match=r"4 of 9 .*zero .batch_energies\(\) of 4 structures: MemoryError: too many."):
        result = reweight(gaussian(), Sometimes(1.0), 9, KELVIN, batch_size=3)  # energies of 3, then of 4 and 2
    assert np.isfinite(result.energies).tolist() == [True] * 3 + [False] * 4 + [True] * 2


def test_a_calculator_that_cannot_ends_it_after_the_first_batch(monkeypatch):
    def trouble(call):
        raise RuntimeError("no parameters for X")

    drawn = []
    plain = DensitySampler.sample
    monkeypatch.setattr(DensitySampler, "sample", lambda self, part: drawn.extend(part) or plain(self, part))
    with pytest.raises(ReweightingError, match="no finite energy .RuntimeError: no parameters for X.; check symbols"):
        reweight(gaussian(), Harmonic(1.0, trouble), 40, KELVIN, batch_size=4)
    assert len(drawn) == 4


def test_a_few_effective_samples_give_no_error_bar():
    """Far from the calculator's ensemble, a few samples dominate, and their spread does not measure the error."""
    stiff = Harmonic(100 * KT)
    with pytest.warns(UserWarning, match=r"effective samples of 50 are too few for averages"):
        result = reweight(gaussian(n_atoms=10), stiff, 50, KELVIN)
    assert result.too_few and "too few to be believed" in str(result)
    assert result.free_energy - stiff.free_energy(27) > 3 * KT  # what the delta method calls an error is below kT
    assert result.free_energy_stderr == math.inf and result.average(result.energies).stderr == math.inf
    assert np.isinf(result.average(lambda atoms: atoms.positions).stderr).all()


# Wrong uses


def test_joint_flows_are_refused(curved):
    with pytest.raises(ValueError, match="features='joint': its likelihood is a bound, not a density for weights"):
        reweight(curved("joint"), Harmonic(1.0), 2, KELVIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": 0.0}, "temperature=0.0: must be a positive number of K"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"clip": 1.0}, "clip=1.0: must be a fraction"),
        ({"clip": -0.1}, "clip=-0.1"),
        ({"intervals": 12}, "intervals"),
        ({"formula": "H2O"}, "formula='H2O': this model has features='none'"),
        ({"symbols": "Ar3"}, "n_atoms=3: this model saw sizes 4 to 4 only"),
        ({"symbols": "Ar4", "n_atoms": 3}, "symbols='Ar4' are 4 atoms, but n_atoms=3"),
        ({"symbols": "Qq4"}, "symbols='Qq4': not chemical symbols"),
        ({"solver": "dopri5", "steps": 4}, "chooses its own steps"),
    ],
)
def test_bad_options_are_named(options, message):
    options = {"n": 2, "temperature": KELVIN} | options
    with pytest.raises(ValueError, match=message):
        reweight(gaussian(), Harmonic(1.0), **options)


def test_what_is_no_calculator():
    with pytest.raises(TypeError, match="expected an ASE calculator, got bytes"):
        reweight(gaussian(), b"EMT", 2, KELVIN)


def test_one_composition_is_asked_for(curved):
    with pytest.raises(ValueError, match="one composition; give a formula"):
        reweight(curved("given"), Harmonic(1.0), 2, KELVIN)
    with pytest.raises(ValueError, match="symbols='H2O': this model has types of its own; give a formula"):
        reweight(curved("given"), Harmonic(1.0), 2, KELVIN, symbols="H2O")
    several = curved(sizes={3: 1, 4: 1})
    with pytest.raises(ValueError, match="compare within one size, and this model saw 3 to 4; give n_atoms"):
        reweight(several, Harmonic(1.0), 2, KELVIN)
    assert len(reweight(several, Harmonic(0.05), 2, KELVIN, n_atoms=4).samples[0]) == 4
    assert len(reweight(several, Harmonic(0.05), 2, KELVIN, symbols="Ar3").samples[0]) == 3


def test_observables_must_fit():
    zeros = np.zeros(3)
    result = Reweighted([], np.array([0.0, -math.inf, 0.0]), zeros, zeros, zeros, KELVIN)
    with pytest.raises(ValueError, match=r"observable of shape \(2,\): need one value for each of 3"):
        result.average(np.ones(2))
    with pytest.raises(ValueError, match="not finite for sample 2"):
        result.average(np.array([1.0, 1.0, math.nan]))
    assert result.average(np.array([1.0, math.nan, 3.0])).value == 2.0  # no weight, no voice


def test_adaptive_solver_agrees(curved):
    flow = curved()
    fixed = reweight(flow, Harmonic(0.05), 3, KELVIN)
    adaptive = reweight(flow, Harmonic(0.05), 3, KELVIN, solver=Solver("dopri5", rtol=1e-8, atol=1e-8))
    assert np.allclose(fixed.log_weights, adaptive.log_weights, atol=1e-2)
    with pytest.raises(SolverError):
        flow.flow(torch.ones(1, 3, dtype=torch.bool), None, Solver("dopri5")).inverse(
            torch.full((1, 3, 3), math.nan, dtype=torch.float64), torch.zeros(1, 3, 0, dtype=torch.float64)
        )
