"""Molecular graphs: reading, writing, and conformers that are drawn and scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from ase.io import read, write

from ase_enf.chem.convert import PerceptionError, to_smiles
from ase_enf.chem.graph import bonds_of, graph_of_atoms, graph_of_smiles, perceived_bonds, read_bonds, write_bonds
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF
from ase_enf.sampling.generate import generate
from ase_enf.scoring.calculator import ENFCalculator
from ase_enf.scoring.reweight import reweight
from ase_enf.scoring.score import score


@pytest.fixture
def flow(stir) -> ENF:
    config = ENFConfig(features="given", species=("H", "C", "O"), sizes={3: 1, 9: 3}, hidden=16, layers=2, graph=True)
    return stir(ENF(config), 0.5).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("smiles", "formula", "kinds"),
    [
        ("CCO", "C2H6O", [8, 0, 0, 0]),
        ("c1ccccc1", "C6H6", [6, 0, 0, 6]),
        ("C1=CC=CC=C1", "C6H6", [6, 0, 0, 6]),  # a Kekulé structure is the same graph
        ("N#CC=O", "C2HNO", [2, 1, 1, 0]),
    ],
)
def test_a_smiles_becomes_a_graph_with_hydrogens(smiles, formula, kinds):
    graph = graph_of_smiles(smiles)
    assert Atoms(graph.numbers).get_chemical_formula() == formula
    assert np.array_equal(graph.bonds, graph.bonds.T) and not graph.bonds.diagonal().any()
    assert [int((graph.bonds == kind).sum()) // 2 for kind in (1, 2, 3, 4)] == kinds


@pytest.mark.parametrize("name", ["CH3CH2OH", "C6H6", "HCOOH", "CH3CN", "CH3CONH2", "C5H5N"])
def test_perception_finds_the_graph_of_the_smiles(name):
    atoms = molecule(name)
    found, expected = perceived_bonds(atoms), graph_of_smiles(to_smiles(atoms, "rdkit"))
    assert sorted(map(tuple, np.sort(found, axis=1))) == sorted(map(tuple, np.sort(expected.bonds, axis=1)))


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("C(", "RDKit cannot read it"),
        ("", "RDKit cannot read it"),
        ("[NH4+]", "has formal charges"),
        ("C[N+](=O)[O-]", "has formal charges"),
        ("[CH3]", "has unpaired electrons"),
        ("O.O", "has several fragments"),
        ("[2H]O", "has isotopes"),
        ("C*", "has an atom of no element"),
        ("CCl", "element.s. Cl unknown to this model, which knows H, C, O"),
        ("CCCCCC", "has 20 atom.s. with hydrogens; this model saw at most 9"),
    ],
)
def test_what_is_no_graph_of_this_model(flow, smiles, message):
    with pytest.raises(ValueError, match=message):
        generate(flow, 1, smiles=smiles)


def test_requests_that_do_not_fit(flow):
    with pytest.raises(ValueError, match="give its smiles, such as CCO"):
        generate(flow, 1)
    with pytest.raises(ValueError, match="leave formula out"):
        generate(flow, 1, smiles="CCO", formula="C2H6O")
    with pytest.raises(ValueError, match="has 9 atoms, hydrogens too; leave n_atoms out"):
        generate(flow, 1, smiles="CCO", n_atoms=3)
    with pytest.raises(ValueError, match="knows no molecular graphs; use one that does, such as qm9-conformers"):
        generate(ENF(ENFConfig(hidden=8, layers=1)), 1, smiles="CCO")
    with pytest.raises(ValueError, match="is one of molecular graphs; give the molecule, as a structure or a SMILES"):
        reweight(flow, LennardJones(), n=1, temperature=300.0, formula="H2O")
    with pytest.raises(ValueError, match="leave formula out"):
        reweight(flow, LennardJones(), n=1, temperature=300.0, formula="H2O", molecule="O")
    with pytest.raises(ValueError, match="molecule: CH3 has.* unpaired electrons; use a flow of given elements"):
        reweight(flow, LennardJones(), n=1, temperature=300.0, molecule=molecule("CH3"))
    with pytest.raises(ValueError, match="knows no molecular graphs; give a formula instead"):
        reweight(
            ENF(ENFConfig(features="none", hidden=8, layers=1)), LennardJones(), n=1, temperature=300.0, molecule="O"
        )
    with pytest.warns(UserWarning, match="knows no stereochemistry"):
        generate(flow, 1, smiles="O/C=C/O", steps=1, solver="euler")


def test_conformers_keep_elements_and_carry_their_graph(flow, tmp_path):
    drawn = generate(flow, 3, smiles="OCC", steps=2, solver="euler")
    graph = graph_of_smiles("OCC")
    for atoms in drawn:
        assert atoms.numbers.tolist() == graph.numbers.tolist() == [8, 6, 6, *[1] * 6]
        assert atoms.info["enf_graph"] == "CCO" and np.array_equal(bonds_of(atoms), graph.bonds)
    assert np.abs(drawn[0].positions - drawn[1].positions).max() > 0.1
    for ending in ("extxyz", "traj"):
        write(tmp_path / f"some.{ending}", drawn)
        again = read(tmp_path / f"some.{ending}", index=":")
        assert all(np.array_equal(bonds_of(atoms), graph.bonds) for atoms in again)


def test_the_graph_conditions_the_score(flow):
    ethanol = molecule("CH3CH2OH")
    perceived = score(flow, ethanol).log_likelihood[0]
    given, wrong = ethanol.copy(), ethanol.copy()
    bonds = perceived_bonds(ethanol)
    given.info["enf_bonds"], wrong.info["enf_bonds"] = write_bonds(bonds), write_bonds(bonds * 2)
    assert score(flow, given).log_likelihood[0] == perceived
    assert abs(score(flow, wrong).log_likelihood[0] - perceived) > 1e-3
    order = np.random.default_rng(0).permutation(9)
    assert score(flow, ethanol[order]).log_likelihood[0] == pytest.approx(perceived, abs=1e-3)
    turned = ethanol.copy()
    turned.rotate(40, (1, 2, 3))
    assert score(flow, turned).log_likelihood[0] == pytest.approx(perceived, abs=1e-3)


def test_a_calculator_of_a_graph_has_forces(flow):
    water = molecule("H2O")
    water.calc = ENFCalculator(flow, kT=1.0)
    forces = water.get_forces()
    assert np.isfinite(forces).all() and np.abs(forces).max() > 1e-3 and np.abs(forces.sum(axis=0)).max() < 1e-4


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2]])
def test_draws_of_a_graph_are_weighted_by_their_density(flow, order, dtype):
    """log w = -U / kT - log p(x | graph), with the density that ``score`` gives to the draw."""
    flow, water = flow.to(dtype), molecule("H2O")[order]
    result = reweight(flow, LennardJones(rc=20), n=4, temperature=3000.0, molecule=water, seed=2)
    assert all(np.array_equal(atoms.numbers, water.numbers) for atoms in result.samples)
    assert all(np.array_equal(bonds_of(atoms), perceived_bonds(water)) for atoms in result.samples)
    scores = score(flow, result.samples, trace="exact").log_likelihood
    assert np.allclose(result.log_prob, scores, atol=1e-3 if flow.dtype == torch.float32 else 1e-4)
    assert np.allclose(result.log_weights, -result.energies / result.kT - result.log_prob, atol=1e-9)
    # A SMILES gives the same density, with the atoms in its own order.
    other = reweight(flow, LennardJones(rc=20), n=4, temperature=3000.0, molecule="O", seed=2)
    assert other.samples[0].get_chemical_symbols() == ["O", "H", "H"]


@pytest.mark.parametrize("name", ["CH3CH2OH", "C6H6", "HCOOH", "C5H5N"])
def test_the_graph_of_a_structure_has_its_order_and_its_smiles(name):
    atoms = molecule(name)[::-1]
    graph = graph_of_atoms(atoms)
    assert np.array_equal(graph.numbers, atoms.numbers) and np.array_equal(graph.bonds, perceived_bonds(atoms))
    assert graph.smiles == to_smiles(atoms, "rdkit")


def test_structures_without_a_graph_are_refused(flow):
    with pytest.raises(ValueError, match="structure 0: .*unpaired electrons; a flow of molecular graphs"):
        score(flow, molecule("CH3"))
    with pytest.raises(PerceptionError):
        perceived_bonds(Atoms("H2", [(0, 0, 0), (0, 0, 9.0)]))
    for text in ("0-1", "0-5-1", "0-1-7", "a-b-c", "1-1-1"):
        with pytest.raises(ValueError, match="is no list of bonds i-j-kind between 3 atoms"):
            read_bonds(text, 3)


def test_training_reads_graphs(tmp_path):
    from ase_enf.training.config import TrainConfig
    from ase_enf.training.loop import train

    atoms = [molecule(name) for name in ("H2O", "CH4", "CH3OH", "CH3CH2OH", "CH3")] * 3
    settings = {"steps": 2, "batch_size": 4, "hidden": 16, "layers": 2, "validation_size": 2, "warmup": 0}
    with pytest.warns(UserWarning, match="training set: 3 of 15 structures are left out"):
        model = train(TrainConfig(features="given", graph=True, **settings), atoms, atoms[:4])
    assert model.config.graph and max(model.config.sizes) == 9
    with pytest.raises(ValueError, match="graph=True conditions an EGNN of given types"):
        TrainConfig(graph=True)
    with (
        pytest.raises(ValueError, match="bonds for none of the structures; train without graph"),
        pytest.warns(UserWarning),
    ):
        train(TrainConfig(features="given", graph=True, **settings), [molecule("CH3")], atoms[:1])
