"""Properties as conditions: in info, in training, in sampling and in scoring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write

from ase_enf.data import qm9
from ase_enf.data.properties import property_of, property_table
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import Condition
from ase_enf.flow.model import ENF
from ase_enf.sampling.generate import generate
from ase_enf.sampling.properties import PropertyRequest, read_properties, read_range
from ase_enf.scoring.score import score
from ase_enf.training.config import TrainConfig
from ase_enf.training.loop import train

GAP = Condition.of("gap", "eV", np.array([3.0, 5.0, 7.0, 9.0]), np.array([3, 5, 5, 5]))
RAW = "tests/data/raw"


@pytest.fixture
def joint() -> ENF:
    torch.manual_seed(0)
    config = ENFConfig(species=("H", "C", "O"), sizes={3: 1, 5: 3}, hidden=16, layers=2, conditions=(GAP,))
    flow = ENF(config).eval().requires_grad_(False)
    with torch.no_grad():
        flow.dynamics.network.embed.weight.normal_(std=1.0)
    return flow


def test_raw_files_bring_their_properties(tmp_path):
    methane, water = qm9.load(RAW)[:2]
    assert methane.info["gap"] == pytest.approx(0.5048 * 27.211386, abs=1e-4) and methane.info["alpha"] == 13.21
    assert water.info["mu"] == 1.8511 and water.info["Cv"] == 6.002
    published = read(f"{RAW}/dsgdb9nsd_000001.xyz")  # by ASE: as published
    assert published.info["qm9_gap"] == 0.5048 and property_of(published, "gap") == methane.info["gap"]
    qm9.save_npz([methane, water], tmp_path / "two.npz")
    assert [atoms.info for atoms in qm9.load(tmp_path / "two.npz")] == [methane.info, water.info]


def test_properties_may_lie_in_a_file_beside(tmp_path):
    atoms = qm9.load(RAW)
    bare = [Atoms(a.numbers, a.positions, info={"qm9_index": a.info["qm9_index"]}) for a in atoms]
    qm9.save_npz(bare, tmp_path / "some.npz")
    index = np.array([a.info["qm9_index"] for a in atoms])[[3, 0, 1]]  # others, in another order
    np.savez(tmp_path / "some_properties.npz", gdb_index=index, alpha=np.array([30.0, 13.21, 6.31]))
    found = [a.info.get("alpha") for a in qm9.load(tmp_path / "some.npz")]
    assert found[:2] == [13.21, 6.31] and found[3] == 30.0 and math.isnan(found[2])


def test_what_info_holds_must_be_a_number():
    with pytest.raises(ValueError, match=r"info\['gap'\] of H2 is 'wide', no finite number"):
        property_of(Atoms("H2", info={"gap": "wide"}), "gap")
    assert property_of(Atoms("H2", info={"key_value_pairs": {"gap": 3}}), "gap") == 3.0  # of an ASE database
    with pytest.raises(ValueError, match=r"structure 1 \(CH4\): has no property 'gap' in its info, which has alpha"):
        property_table([Atoms("H2", info={"gap": 1.0}), Atoms("CH4", info={"alpha": 2.0})], ["gap"], required=True)


def test_an_energy_that_ase_keeps_with_the_calculator_is_found_out(tmp_path):
    water = molecule("H2O")
    water.info["energy"] = -76.4
    write(tmp_path / "water.extxyz", water)
    with pytest.raises(ValueError, match="'energy' in its info; it is a result of its calculator: copy it to info"):
        property_table([read(tmp_path / "water.extxyz")], ["energy"], required=True)


def test_training_learns_what_its_conditions_are(tmp_path):
    rng = np.random.default_rng(0)
    atoms = []
    for _ in range(24):
        item = molecule("H2O")
        item.positions *= 1.0 + 0.2 * rng.random()
        item.info["size"] = float(np.ptp(item.positions))
        atoms.append(item)
    settings = {"features": "given", "steps": 3, "batch_size": 8, "hidden": 16, "layers": 2, "validation_size": 2}
    config = TrainConfig(**settings, condition=("size",), out=str(tmp_path / "run"), warmup=0)
    flow = train(config, atoms[:20], atoms[20:])
    (condition,) = flow.config.conditions
    values = [item.info["size"] for item in atoms[:20]]
    assert condition.name == "size" and condition.mean == pytest.approx(np.mean(values), rel=1e-6)
    assert (condition.low, condition.high) == pytest.approx((min(values), max(values)), rel=1e-6)
    again = ENF(ENFConfig(**_plain(flow.config)))
    assert again.config.conditions == flow.config.conditions
    assert train(config, atoms[:20], atoms[20:], resume=True).config.conditions == flow.config.conditions
    flow.save(tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match="has the conditions size; leave condition out"):
        train(
            TrainConfig(**settings, condition="other", init_from=str(tmp_path / "flow.safetensors")),
            atoms[:20],
            atoms[20:],
        )
    with pytest.raises(ValueError, match="training set: structure 0 .* has no property 'gap' in its info"):
        train(TrainConfig(**settings, condition="gap"), atoms[:20], atoms[20:])


def _plain(config: ENFConfig) -> dict:
    import dataclasses
    import json

    return json.loads(json.dumps(dataclasses.asdict(config)))


def test_drawn_molecules_carry_what_conditioned_them(joint, tmp_path):
    fixed = generate(joint, 3, properties={"gap": 7.0}, steps=2, solver="euler")
    assert {atoms.info["enf_condition_gap"] for atoms in fixed} == {7.0}
    ranged = generate(joint, 20, properties={"gap": "4.9:7.1"}, steps=2, solver="euler")
    values = [atoms.info["enf_condition_gap"] for atoms in ranged]
    assert 4.9 <= min(values) < 5.2 and 6.9 < max(values) <= 7.1
    assert {len(atoms) for atoms in ranged} == {5}  # no molecule of three atoms has such a gap
    free = generate(joint, 20, steps=2, solver="euler")
    assert not any("enf_condition_gap" in atoms.info for atoms in free)
    assert {len(atoms) for atoms in free} == {3, 5}
    low, high = (generate(joint, 1, n_atoms=5, properties={"gap": gap}, steps=2, solver="euler")[0] for gap in (3, 9))
    assert np.abs(low.positions - high.positions).max() > 1e-5  # the same noise, another condition
    write(tmp_path / "some.extxyz", ranged)
    assert [atoms.info["enf_condition_gap"] for atoms in read(tmp_path / "some.extxyz", index=":")] == values


def test_scores_are_conditional(joint):
    water = molecule("H2O")
    known = water.copy()
    known.info["gap"] = 6.5
    how = {"importance_samples": 1, "seed": 1}
    plain = score(joint, water, **how).log_likelihood[0]
    by_info = score(joint, known, **how).log_likelihood[0]
    by_name = score(joint, water, properties={"gap": 6.5}, **how).log_likelihood[0]
    assert by_info == by_name != plain
    assert score(joint, known, properties={}, **how).log_likelihood[0] == plain  # nothing is known


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"weight": 3.0}, r"property 'weight': is unknown to this model, which knows gap \(eV\)"),
        ({"gap": 30.0}, "gap=30 eV: is outside what this model was trained on, 3 to 9 eV"),
        ({"gap": "wide"}, "gap='wide': must be a number, or a range low:high"),
        ({"gap": "7:5"}, "low:high in that order"),
        ({"gap": float("nan")}, "must be a finite number"),
    ],
)
def test_what_cannot_be_asked_for(joint, properties, message):
    with pytest.raises(ValueError, match=message):
        generate(joint, 1, properties=properties)
    with pytest.raises(ValueError, match=message):
        score(joint, molecule("H2O"), properties=properties)


def test_flows_without_conditions_say_so():
    flow = ENF(ENFConfig(species=("H", "O"), sizes={3: 1}, hidden=8, layers=1))
    with pytest.raises(ValueError, match="has no conditions; train one with --condition"):
        PropertyRequest(flow, {"gap": 3.0})
    with pytest.raises(ValueError, match="has no conditions"):
        score(flow, molecule("H2O"), properties={"gap": 3.0})


def test_texts_of_the_command_line():
    assert read_properties(["gap=5.2", "alpha=70:80"]) == {"gap": "5.2", "alpha": "70:80"}
    assert read_properties(None) == {} and read_range("gap", "-3:-2.5") == (-3.0, -2.5)
    for wrong in (["gap"], ["gap=1", "gap=2"], ["=3"]):
        with pytest.raises(ValueError, match="NAME=VALUE or NAME=LOW:HIGH"):
            read_properties(wrong)


def test_a_trained_flow_obeys_and_does_without():
    """One flow of H2 draws molecules of a requested length to 0.02 Å, and of all lengths if none is requested."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.6, 1.4, 400)
    atoms = [
        Atoms("H2", [(0, 0, 0), (0, 0, d + 0.02 * rng.standard_normal())], info={"length": float(d)}) for d in lengths
    ]
    config = TrainConfig(
        features="given", condition="length", steps=350, batch_size=64, hidden=16, layers=2, radial=4, warmup=20,
        learning_rate=3e-3, ema_decay=0.98, validate_every=10**6, validation_size=2, optimizer="adamw",
    )  # fmt: skip
    flow = train(config, atoms[:390], atoms[390:])
    drawn = {}
    for asked in (None, 0.75, 1.25):
        properties = {} if asked is None else {"length": asked}
        molecules = generate(flow, 24, formula="H2", properties=properties, churn=0, steps=12)
        drawn[asked] = np.array([item.get_distance(0, 1) for item in molecules])
    assert abs(drawn[0.75].mean() - 0.75) < 0.06 and abs(drawn[1.25].mean() - 1.25) < 0.06
    assert drawn[0.75].std() < 0.1 < drawn[None].std() and drawn[1.25].std() < 0.1
    right, wrong = (
        score(flow, atoms[0], properties={"length": lengths[0] + off}).log_likelihood[0] for off in (0, 0.3)
    )
    assert right > wrong + 2 and right > score(flow, atoms[0], properties={}).log_likelihood[0]
