"""What a flow has learned about its conditions: ``python -m benchmarks.models.condition_gain MODEL --data QM9.npz``.

On the path x_t = (1 − t) x + t z, the bound of log p(x) that diffusion models optimise is, up to a constant,
−∫ (1 − t)/t ‖v(x_t) − (z − x)‖² dt (Kingma et al. 2021, written for a velocity). For test molecules it is computed with
the velocity conditioned by a property and with the unconditional one, with the same noise. The difference, in nats, is
the information that the flow has found between x and the property; for an ideal flow it is the mutual information of
molecules and property at a given size. No molecules are drawn. The table also gives the guidance weight that minimises
the error of the velocity, ⟨v_c − v, (z − x) − v⟩ / ‖v_c − v‖², which is 1 if the conditional velocity is optimal.

Writes ``results/condition_gain``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.batch import Batch, to_batch
from ase_enf.data import qm9
from ase_enf.data.properties import property_table
from ase_enf.flow.model import ENF
from ase_enf.geometry import center
from benchmarks.report import write_results

TIMES = (0.05, 0.1, 0.15, 0.2, 0.27, 0.35, 0.5, 0.7, 0.9)
BATCH = 64
BOOTSTRAPS = 1000


def main() -> None:
    """Measures and writes ``results/condition_gain``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or .safetensors of a flow with conditions")
    parser.add_argument("--data", help="QM9 in any form with its properties (default: what ASE_ENF_QM9 names)")
    parser.add_argument("-n", type=int, default=384, help="molecules of the test split (default: 384)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    names = [condition.name for condition in flow.config.conditions]
    if not names:
        raise SystemExit(f"{options.model}: has no conditions; use a flow that was trained with some")
    flow.use_backend("auto")
    test = qm9.load(options.data, split="test")
    chosen = [test[k] for k in np.random.default_rng(options.seed).permutation(len(test))[: options.n]]
    chosen.sort(key=len)  # batches of molecules of about one size
    values = torch.from_numpy(property_table(chosen, names, required=True)).to(flow.dtype)
    known = {name: [k] for k, name in enumerate(names)} | (
        {"all of them": list(range(len(names)))} if names[1:] else {}
    )
    generator, products = torch.Generator().manual_seed(options.seed), []
    for start in tqdm(range(0, len(chosen), BATCH), disable=None):
        batch = to_batch(chosen[start : start + BATCH], flow.species).to(dtype=flow.dtype)
        products.append(overlaps(flow, batch, values[start : start + BATCH], list(known.values()), generator))
    every = torch.cat(products).double().numpy()
    rng = np.random.default_rng(options.seed)
    rows = [(name, *_summary(every[:, k], rng), len(every)) for k, name in enumerate(known)]
    columns = ("what the flow knows", "gain, nats a molecule", "best weight at 0.15 < t < 0.4", "molecules")
    notes = (
        f"Molecules of the test split, seed {options.seed}; times {', '.join(map(str, TIMES))}, trapezoids in log t. "
        f"Errors are standard deviations over {BOOTSTRAPS} bootstraps of the molecules. See the module for what is "
        "measured."
    )
    write_results(
        pd.DataFrame(rows, columns=columns), "condition_gain", "What a flow has learned of its conditions", notes
    )


@torch.no_grad()
def overlaps(flow: ENF, batch: Batch, values: Tensor, known: Sequence[list[int]], generator: torch.Generator) -> Tensor:
    """Returns ⟨v_c − v, (z − x) − v⟩ and ‖v_c − v‖² for each molecule, set of known conditions and time.

    Args:
        flow: A flow with C conditions.
        batch: B molecules, without conditions.
        values: Values of their conditions, shape (B, C).
        known: Sets of known conditions, as indices.
        generator: Source of the noise.

    Returns:
        Both products, shape (B, sets, times, 2).
    """
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(values)  # noqa: E731
    data = flow.encode(batch, draw(*batch.mask.shape, flow.config.flow_features))
    z_x = center(draw(*data.x.shape), batch.mask)
    z_h = draw(*data.h.shape) * batch.mask.unsqueeze(-1)
    target = torch.cat([z_x - data.x, z_h - data.h], dim=-1)
    found = []
    for t in TIMES:
        states = torch.tensor(t).to(values), torch.lerp(data.x, z_x, t), torch.lerp(data.h, z_h, t)

        def velocity(conditions: Tensor | None, states: tuple[Tensor, ...] = states) -> Tensor:
            context = flow.context(batch._replace(conditions=conditions))
            return torch.cat(flow.velocity(batch.mask, context)(*states), dim=-1)

        free = velocity(None)
        for columns in known:
            conditions = torch.full_like(values, torch.nan)
            conditions[:, columns] = values[:, columns]
            change = velocity(conditions) - free
            found.append(torch.stack([(change * other).sum(dim=(1, 2)) for other in (target - free, change)], dim=-1))
    return torch.stack(found, dim=1).unflatten(1, (len(TIMES), len(known))).transpose(1, 2)


def gain(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ∫ (1 − t)/t (‖v − u‖² − ‖v_c − u‖²) dt with u = z − x, nats, from the result of :func:`overlaps`.

    With d = v_c − v, the difference is 2 ⟨d, u − v⟩ − ‖d‖².

    Args:
        products: Shape (..., times, 2).
    """
    times = np.array(TIMES)
    lowered = (1.0 - times) * (2.0 * products[..., 0] - products[..., 1])
    return np.trapezoid(lowered, np.log(times), axis=-1)


def _summary(products: NDArray[np.float64], rng: np.random.Generator) -> tuple[str, str]:
    """Returns the mean gain and the best weight, each with its error, from products of shape (B, times, 2)."""
    inside = [k for k, t in enumerate(TIMES) if 0.15 < t < 0.4]
    gains, by_molecule = gain(products), products[:, inside].sum(axis=1)
    chosen = rng.integers(len(gains), size=(BOOTSTRAPS, len(gains)))
    sums = by_molecule[chosen].sum(axis=1)
    total = by_molecule.sum(axis=0)
    return (
        f"{gains.mean():.2f} ± {gains[chosen].mean(axis=1).std():.2f}",
        f"{total[0] / total[1]:.2f} ± {(sums[:, 0] / sums[:, 1]).std():.2f}",
    )


if __name__ == "__main__":
    main()
