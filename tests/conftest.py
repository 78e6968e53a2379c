"""Options and fixtures for all tests; those that need torch import it inside."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

FEATURES = ("joint", "given", "none")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests of tensors run (cpu, cuda)")
    parser.addoption("--dtype", default="float64", choices=("float32", "float64"), help="their floating type")


@pytest.fixture(scope="session")
def device(request):
    import torch

    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request):
    import torch

    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(scope="session")
def tolerance(dtype):
    """Absolute and relative tolerance for equality up to rounding."""
    import torch

    return {"atol": 1e-10, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(autouse=True)
def reproducible():
    """Seeds the global generators, and fails a test that leaves another default dtype behind."""
    np.random.seed(0)
    torch = sys.modules.get("torch")  # does not import torch itself
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    yield
    after = torch.get_default_dtype()
    torch.set_default_dtype(before)
    assert after == before, f"the test left the default dtype at {after}"


@pytest.fixture
def methane() -> Atoms:
    return molecule("CH4")


@pytest.fixture
def water() -> Atoms:
    return molecule("H2O")


@pytest.fixture
def ethanol() -> Atoms:
    return molecule("CH3CH2OH")


@pytest.fixture
def stir():
    """Gives a module weights of ordinary size: with the small initial ones of a flow, most theorems hold trivially."""
    import torch

    def shake(module, scale: float = 0.5, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * scale * (fan_in**-0.5 if parameter.dim() > 1 else 0.3))
        return module

    return shake


@pytest.fixture
def make_flow(device, dtype, stir):
    """Builds a small flow of a feature mode, over H, C, O, with weights far from the identity."""
    from ase_enf.flow.config import ENFConfig
    from ase_enf.flow.model import ENF

    def build(features: str = "joint", scale: float = 0.8, **fields) -> ENF:
        fields = {"hidden": 8, "layers": 2, "sizes": {2: 1, 3: 2, 5: 1, 9: 1}, "position_scale": 1.4} | fields
        fields.setdefault("species", () if features == "none" else ("H", "C", "O"))
        if features == "joint":
            fields.setdefault("feature_shift", (0.6, 0.3, 0.1, 3.5))
            fields.setdefault("feature_scale", (0.4, 0.4, 0.4, 0.2))
        model = ENF(ENFConfig(features=features, **fields))
        return stir(model, scale).to(device=device, dtype=dtype)

    return build


@pytest.fixture(params=FEATURES)
def features(request) -> str:
    return request.param


@pytest.fixture
def flow(features, make_flow):
    """One small flow for each feature mode."""
    return make_flow(features)


@pytest.fixture
def batch_of(device, dtype):
    """Turns ``Atoms`` into a batch for a flow, on the device and in the dtype of the tests."""
    from ase_enf.atoms.batch import to_batch

    def convert(atoms, model=None, **options):
        species = model.species if model is not None else ("H", "C", "O")
        return to_batch(atoms, species, dtype=dtype, **options).to(device=device)

    return convert


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with tiny models, good structures and every kind of bad ones."""
    from commands import fill_workshop

    return fill_workshop(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def here(workshop, monkeypatch) -> Path:
    """The workshop, in which the test runs."""
    monkeypatch.chdir(workshop)
    monkeypatch.delenv("ASE_ENF_QM9", raising=False)
    return workshop
