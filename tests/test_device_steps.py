"""Steps that stay on the device are those of the host; such a run is saved, resumed and stopped like any other."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from ase_enf.training import captured, device_steps, loop
from ase_enf.training.config import TrainConfig
from ase_enf.training.device_steps import padded_widths, stays_on_device
from ase_enf.training.distributed import Ranks
from ase_enf.training.loop import TrainingError, train
from tests.test_train import TRAIN, VALID, assert_same_run, log_of, state_of, stop_at, tiny

CPU = torch.device("cpu")


def on_device(**fields) -> TrainConfig:
    return tiny(capture="always", **fields)


def weights(flow) -> torch.Tensor:
    return torch.cat([value.flatten() for value in flow.state_dict().values() if value.is_floating_point()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("features", ["joint", "none"])
def test_the_run_is_that_of_the_host(tmp_path, optimizer, features):
    # Noise has the shape of a padded batch, so that one size alone makes it the same.
    data = [atoms for atoms in TRAIN if len(atoms) == 3]
    common = {"optimizer": optimizer, "features": features, "steps": 12, "long_ema_decay": 0.99, "weight_decay": 0.1}
    flows = [
        train(make(out=str(tmp_path / name), **common), data, data[:2])
        for make, name in ((tiny, "host"), (on_device, "device"))
    ]
    # Muon rounds to bfloat16, in another order.
    close = 1e-5 if optimizer == "adamw" else 3e-3
    torch.testing.assert_close(weights(flows[0]), weights(flows[1]), rtol=close, atol=close)
    for mine, theirs in zip(log_of(tmp_path / "device"), log_of(tmp_path / "host"), strict=True):
        for name in mine:
            assert mine[name] == theirs[name] or float(mine[name]) == pytest.approx(float(theirs[name]), rel=close), (
                name
            )
    states = [state_of(tmp_path / name) for name in ("host", "device")]
    for name in ("step", "noted", "skipped", "world"):
        assert states[0][name] == states[1][name]
    assert states[0]["norms"] == pytest.approx(states[1]["norms"], rel=close)
    assert [s["ema"]["n_averaged"].item() for s in states] == [12, 12]
    for mine, theirs in zip(states[1]["optimizer"], states[0]["optimizer"], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        for key, entries in theirs["state"].items():
            for name, value in entries.items():
                torch.testing.assert_close(mine["state"][key][name], value, rtol=0.1, atol=close)


def test_a_run_resumed_after_a_stop_is_the_same(tmp_path, monkeypatch):
    config = on_device(out=str(tmp_path / "once"), long_ema_decay=0.99)
    train(config, TRAIN, VALID)
    again = dataclasses.replace(config, out=str(tmp_path / "twice"))
    with monkeypatch.context() as patch:
        stop_at(patch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(again, TRAIN, VALID)
    assert state_of(tmp_path / "twice")["step"] == 5
    train(again, TRAIN, VALID, resume=True)
    assert_same_run(tmp_path / "once", tmp_path / "twice")


@pytest.mark.parametrize("order", [("never", "always"), ("always", "never")])
def test_host_and_device_go_on_with_each_others_runs(tmp_path, monkeypatch, order):
    data = [atoms for atoms in TRAIN if len(atoms) == 3]
    whole = train(tiny(out=str(tmp_path / "whole"), optimizer="adamw", steps=10), data, data[:2])
    config = tiny(out=str(tmp_path / "both"), optimizer="adamw", steps=10, capture=order[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(config, data, data[:2])
    both = train(dataclasses.replace(config, capture=order[1]), data, data[:2], resume=True)
    torch.testing.assert_close(weights(both), weights(whole), rtol=1e-5, atol=1e-5)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    config = on_device(out=str(tmp_path), steps=9, log_every=3)
    take = captured.CapturedSteps.__call__

    def spoiled(self, k, index, seed=None):
        if seed == bad:
            self.data.positions.fill_(torch.nan)
        take(self, k, index, seed)
        self.data.positions.copy_(clean)

    clean = torch.cat([torch.as_tensor(atoms.positions - atoms.positions.mean(axis=0)) for atoms in TRAIN])
    bad = None
    monkeypatch.setattr(captured.CapturedSteps, "__call__", spoiled)
    plain, counted = loop.start_step, []

    def watched(run, steps, index):
        nonlocal bad
        bad = run.seed_of(4)
        plain(run, steps, index)
        counted.append(run.step)

    monkeypatch.setattr(loop, "start_step", watched)
    flow = train(config, TRAIN, VALID)
    state = state_of(tmp_path)
    assert counted[-1] == 9 and state["skipped"] == 1 and state["consecutive_skips"] == 0
    assert state["ema"]["n_averaged"].item() == 8 and len(state["norms"]) == 8
    assert torch.isfinite(weights(flow)).all()
    bad = None


def test_a_loss_that_stays_nan_ends_the_run(tmp_path, monkeypatch):
    class Spoiled(captured.DeviceSet):
        def batch(self, index, width):
            batch = super().batch(index, width)
            return batch._replace(positions=batch.positions * torch.nan)

    monkeypatch.setattr(device_steps, "DeviceSet", Spoiled)
    with pytest.raises(TrainingError, match=r"20 steps in a row .*lower learning_rate \(now 0\.001\)"):
        train(on_device(steps=200, log_every=1000, validate_every=1000, checkpoint_every=1000), TRAIN, VALID)


class Repeated:
    """Stands in for a CUDA graph: it repeats the work."""

    def __init__(self, work, pool=None, generator=None):
        for _ in range(3):
            work()
        self.replay = work

    def pool(self):
        return None


@pytest.mark.parametrize("works", [True, False])
def test_capturing_changes_no_number(tmp_path, monkeypatch, works):
    def record(work, pool=None, generator=None):
        if not works:
            work()
            raise RuntimeError("operation not permitted when stream is capturing")
        return Repeated(work, pool, generator)

    monkeypatch.setattr(captured, "cuda_graph", record)
    config = on_device(out=str(tmp_path / "plain"))
    train(config, TRAIN, VALID)
    monkeypatch.setattr(device_steps.DeviceSteps, "__init__", _capturing)
    again = dataclasses.replace(config, out=str(tmp_path / "captured"))
    if works:
        train(again, TRAIN, VALID)
    else:
        with pytest.warns(UserWarning, match="cannot capture steps as CUDA graphs .*trains without"):
            train(again, TRAIN, VALID)
    assert_same_run(tmp_path / "plain", tmp_path / "captured")


def _capturing(self, capture):
    self.capture, self.unread, self.ready = True, 0, False


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_padding_is_the_least(count):
    rng = np.random.default_rng(0)
    sizes = rng.choice([2, 5, 6, 9, 17, 18, 30], 40)
    unique = np.unique(sizes)

    def cost(widths):
        return sum(min(w for w in widths if w >= size) ** 2 for size in sizes)

    found = padded_widths(sizes, count)
    inner = itertools.combinations(unique[:-1], min(count, len(unique)) - 1)
    assert cost(found) == min(cost((*some, unique[-1])) for some in inner)
    assert found == tuple(sorted(set(found))) and found[-1] == unique[-1] and len(found) <= count


def test_where_steps_stay_on_the_device():
    gpu, one, two = torch.device("cuda"), Ranks(), Ranks(0, 2)
    assert stays_on_device(tiny(), one, gpu) and not stays_on_device(tiny(), one, CPU)
    assert not stays_on_device(tiny(), two, gpu) and not stays_on_device(tiny(objective="nll"), one, gpu)
    assert not stays_on_device(tiny(network="gnn", augment=True), one, gpu)
    assert not stays_on_device(tiny(capture="never"), one, gpu) and stays_on_device(on_device(), one, CPU)
    with pytest.raises(ValueError, match=r"capture='always' .* 2 processes.*use capture='auto'"):
        stays_on_device(on_device(), two, gpu)


@pytest.mark.parametrize("wrong", [{"objective": "nll"}, {"network": "gnn", "augment": True}])
def test_what_cannot_stay_there_is_refused(wrong):
    with pytest.raises(ValueError, match=r"capture='always' is for flow matching"):
        on_device(**wrong)
