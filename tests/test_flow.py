"""The flow compared with closed forms, with autograd, and with its inverse."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from ase_enf.flow import divergence
from ase_enf.flow.continuous import ADAPTIVE, EVALUATIONS_PER_STEP, ContinuousFlow, Solver, SolverError
from ase_enf.flow.likelihood import log_base, path_error
from ase_enf.geometry import center, masked_mean

TIGHT = Solver("dopri5", rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def _float64_only(dtype):
    if dtype != torch.float64:
        pytest.skip("closed forms and Jacobians are compared in float64")


def mask_of(*sizes: int) -> torch.Tensor:
    return torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def linear(rate, mask: torch.Tensor):
    """dx/dt = rate(t) · (x without its mean), dh/dt = rate(t) h."""
    return lambda t, x, h: (rate(t) * center(x, mask), rate(t) * h * mask.unsqueeze(-1))


@pytest.fixture
def state():
    def draw(mask: torch.Tensor, n: int = 3, features: int = 0):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(*mask.shape, n, generator=generator, dtype=torch.float64)
        h = torch.randn(*mask.shape, features, generator=generator, dtype=torch.float64)
        return center(x, mask), h * mask.unsqueeze(-1)

    return draw


@pytest.fixture
def real_flow(flow, device, state):
    """A small model of each feature mode as a flow: (solver, sizes) → flow, x, h."""

    def build(solver: Solver = TIGHT, sizes=(3, 2)):
        mask = mask_of(*sizes).to(device)
        x, h = (part.to(device) for part in state(mask.cpu(), 3, flow.config.flow_features))
        context = None
        if flow.features == "given":
            kinds = torch.randint(3, mask.shape, generator=torch.Generator().manual_seed(6))
            context = torch.nn.functional.one_hot(kinds, 3).to(x) * mask.unsqueeze(-1)
        return flow.flow(mask, context, solver), x, h

    return build


# Closed forms


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "midpoint"])
@pytest.mark.parametrize("features", [0, 2])
def test_linear_field_has_its_closed_form(state, n, method, features):
    """ladj = a ((M − 1) n + M F) and x(1) = eᵃ x(0), forth and back, with padding."""
    mask, rate = mask_of(4, 2), 0.7
    x, h = state(mask, n, features)
    solver = Solver(method, steps=400, rtol=1e-9, atol=1e-9)
    flow = ContinuousFlow(linear(lambda t: rate, mask), mask, solver)
    size = mask.sum(dim=1)
    expected = rate * ((size - 1) * n + size * features).double()
    z = flow.forward(x, h, divergence.exact)
    assert torch.allclose(z.x, math.exp(rate) * x, atol=1e-5) and torch.allclose(z.h, math.exp(rate) * h, atol=1e-5)
    assert torch.allclose(z.ladj, expected, atol=1e-10) and (z.error < 1e-10).all()
    back = flow.inverse(x, h, divergence.exact)
    assert torch.allclose(back.x, math.exp(-rate) * x, atol=1e-5)
    assert torch.allclose(back.ladj, -expected, atol=1e-10)


@pytest.mark.parametrize("warp", [0.5, 1.0, 2.0, 3.0])
def test_rate_that_varies_in_time_is_integrated(state, warp):
    mask = mask_of(3)
    x, h = state(mask)
    solver = Solver("rk4", steps=4, warp=warp)
    flow = ContinuousFlow(linear(lambda t: torch.cos(4 * t), mask), mask, solver)
    assert flow.forward(x, h, divergence.exact).ladj.item() == pytest.approx(6 * math.sin(4) / 4, abs=1e-9)


@pytest.mark.parametrize("intervals", [16, 24, 48])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_quadrature_error_covers_the_true_error(state, intervals, direction):
    """∫₀¹ dt / (t + c) = log((1 + c) / c): a peak at the data, as flows have."""
    mask, c = mask_of(3), 0.01
    x, h = state(mask)
    flow = ContinuousFlow(linear(lambda t: 0.01 / (t + c), mask), mask, Solver("rk4", steps=4))
    z = getattr(flow, direction)(x, h, divergence.exact, intervals=intervals)
    truth = (1 if direction == "forward" else -1) * 0.06 * math.log((1 + c) / c)
    assert abs(z.ladj.item() - truth) <= z.error.item() < 0.01


def test_a_warped_quadrature_resolves_a_peak_at_the_data(state):
    mask, c = mask_of(3), 0.01
    x, h = state(mask)
    errors = []
    for warp in (1.0, 2.0):
        flow = ContinuousFlow(linear(lambda t: 0.01 / (t + c), mask), mask, Solver("rk4", steps=4, warp=warp))
        z = flow.forward(x, h, divergence.exact, intervals=16)
        errors.append(abs(z.ladj.item() - 0.06 * math.log((1 + c) / c)))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize(("method", "order"), [("rk4", 4), ("midpoint", 2), ("euler", 1)])
@pytest.mark.parametrize("warp", [1.0, 1.5])
def test_fixed_step_methods_converge_at_their_order(state, method, order, warp):
    mask = mask_of(3)
    x, h = state(mask)

    def velocity(t, x, h):
        return 3 * (1 + t**2) * x / (1 + x.square().sum(dim=(1, 2), keepdim=True)), h

    truth = ContinuousFlow(velocity, mask, Solver("rk4", steps=256)).forward(x, h).x
    errors = []
    for steps in (20, 40):
        z = ContinuousFlow(velocity, mask, Solver(method, steps=steps, warp=warp)).forward(x, h)
        assert z.nfe == steps * EVALUATIONS_PER_STEP[method]
        errors.append((z.x - truth).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_kinetic_and_jacobian_terms_have_their_closed_forms(state):
    """For dx/dt = a P x: ∫‖f‖² = a ‖x‖² (e²ᵃ − 1) / 2 and ‖vᵀJ‖² = a² ‖P v‖²."""
    mask, rate = mask_of(4, 3), 0.6
    x, h = state(mask)
    v, _ = divergence.draw_probes(x, h, 1, torch.Generator().manual_seed(0))
    flow = ContinuousFlow(linear(lambda t: rate, mask), mask, TIGHT)
    z = flow.forward_regularised(x, h, (v[0], h), [])
    squared = x.square().sum(dim=(1, 2))
    assert torch.allclose(z.kinetic, rate * squared * (math.exp(2 * rate) - 1) / 2, rtol=1e-6)
    assert torch.allclose(z.jacobian, rate**2 * center(v[0], mask).square().sum(dim=(1, 2)), rtol=1e-6)
    assert torch.allclose(z.ladj, rate * center(v[0], mask).square().sum(dim=(1, 2)), rtol=1e-6)


# A real model compared with autograd and with itself


@pytest.mark.parametrize("solver", [TIGHT, Solver("rk4", steps=40)])
def test_inverse_undoes_forward_and_its_ladj_has_the_opposite_sign(real_flow, solver):
    flow, x, h = real_flow(solver, sizes=(3,) if solver.adaptive else (3, 2))
    z = flow.forward(x, h, divergence.exact)
    assert (z.x - x).abs().max() > 0.05 and z.ladj.abs().min() > 1e-3
    back = flow.inverse(z.x, z.h, divergence.exact)
    assert torch.allclose(back.x, x, atol=1e-6) and torch.allclose(back.h, h, atol=1e-6)
    assert torch.allclose(back.ladj, -z.ladj, atol=1e-6)


def test_ladj_is_the_log_determinant_of_the_map_ambient_and_on_the_subspace(real_flow, request):
    """slogdet(P J Pᵀ) = slogdet(J) = ladj, because the field has zero mean (eq. 10)."""
    model = request.getfixturevalue("flow")
    with torch.no_grad():  # milder weights, for which fewer steps reach the accuracy
        for parameter in model.parameters():
            parameter.mul_(0.7)
    flow, x, h = real_flow(Solver("rk4", steps=20), sizes=(3,) if model.features == "none" else (2,))
    n, size, width = x.shape[-1], x.shape[1], x.shape[-1] + h.shape[-1]

    def move(y):
        z = flow.forward(y[..., :n], y[..., n:])
        return torch.cat([z.x, z.h], dim=-1)

    y = torch.cat([x, h], dim=-1)
    jacobian = torch.autograd.functional.jacobian(move, y).reshape(size * width, size * width)
    basis = torch.linalg.svd(torch.eye(size, dtype=x.dtype) - 1 / size)[2][: size - 1]  # (M − 1, M)
    rows = [torch.einsum("ki,c->kic", basis, torch.eye(width, dtype=x.dtype)[c]) for c in range(n)]
    rows += [
        torch.einsum("ki,c->kic", torch.eye(size, dtype=x.dtype), torch.eye(width, dtype=x.dtype)[c])
        for c in range(n, width)
    ]
    projector = torch.cat(rows).flatten(1).to(x)  # ((M − 1) n + M F, M (n + F))
    ambient = torch.linalg.slogdet(jacobian).logabsdet.item()
    projected = torch.linalg.slogdet(projector @ jacobian @ projector.T).logabsdet.item()
    z = flow.forward(x, h, divergence.exact)
    assert projected == pytest.approx(ambient, abs=1e-6)
    assert z.ladj.item() == pytest.approx(ambient, abs=1e-6)
    assert z.error.item() < 1e-4


def test_centre_of_mass_stays_where_it_is(real_flow):
    flow, x, h = real_flow()
    z = flow.forward(x, h)
    assert masked_mean(z.x, flow.mask).abs().max() < 1e-10
    assert (z.x[~flow.mask] == 0).all() and (z.h[~flow.mask] == 0).all()


def test_batch_mates_change_nothing_on_a_fixed_grid_and_little_with_dopri5(real_flow, flow):
    for solver, tolerance in ((Solver("rk4", steps=6), 1e-11), (Solver("dopri5", rtol=1e-6, atol=1e-6), 1e-4)):
        together, x, h = real_flow(solver)
        context = together.velocity.context
        alone = flow.flow(together.mask[1:, :2], None if context is None else context[1:, :2], solver)
        both = together.forward(x, h, divergence.exact)
        single = alone.forward(x[1:, :2], h[1:, :2], divergence.exact)
        assert torch.allclose(single.x[0], both.x[1, :2], atol=tolerance, rtol=0)
        assert torch.allclose(single.ladj[0], both.ladj[1], atol=tolerance, rtol=0)


def test_padding_does_not_loosen_the_adaptive_tolerance(real_flow, flow):
    """The masked norm: with 60 padded rows, the solver takes the same steps as without."""
    together, x, h = real_flow(Solver("dopri5", rtol=1e-5, atol=1e-5), sizes=(3,))
    context = together.velocity.context

    def pad(t):
        return torch.cat([t, t.new_zeros(1, 60, *t.shape[2:])], dim=1)

    padded = flow.flow(pad(together.mask), None if context is None else pad(context), together.solver)
    plain, wide = together.forward(x, h), padded.forward(pad(x), pad(h))
    assert wide.nfe == plain.nfe
    assert torch.allclose(wide.x[:, :3], plain.x, atol=1e-12)


def test_hutchinson_samples_integrate_each_probe(real_flow):
    """The samples of the probes of a basis sum to the exact ladj."""
    flow, x, h = real_flow(Solver("rk4", steps=8), sizes=(2,))
    n, width = x.shape[-1], x.shape[-1] + h.shape[-1]
    basis = torch.eye(2 * width, dtype=x.dtype).reshape(2 * width, 1, 2, width).to(x.device)
    probes = (basis[..., :n], basis[..., n:])
    z = flow.forward(x, h, functools.partial(_probed, probes=probes))
    exact = flow.forward(x, h, divergence.exact)
    assert z.samples.shape == (2 * width, 1)
    assert torch.allclose(z.samples.sum(dim=0), exact.ladj, atol=1e-10)
    assert torch.allclose(z.samples.mean(dim=0), z.ladj, atol=1e-12)
    assert torch.equal(exact.samples[0], exact.ladj)


def _probed(field, x, h, probes):
    return divergence.hutchinson(field, x, h, probes)


@pytest.mark.parametrize("adjoint", [False, True])
def test_regularised_forward_summed_over_a_basis_is_forward(real_flow, flow, adjoint):
    solver = Solver("dopri5", rtol=1e-8, atol=1e-8)
    plain, x, h = real_flow(solver, sizes=(2,))
    n, width = x.shape[-1], x.shape[-1] + h.shape[-1]
    parameters = list(flow.dynamics.parameters())
    expected = plain.forward(x, h, divergence.exact)
    # Copies of one molecule, each with its own probe, need one solve only.
    size = 2 * width
    basis = torch.eye(size, dtype=x.dtype).reshape(size, 2, width).to(x.device)
    context = plain.velocity.context
    copies = flow.flow(plain.mask.expand(size, -1), None if context is None else context.expand(size, -1, -1), solver)
    z = copies.forward_regularised(
        x.expand(size, -1, -1), h.expand(size, -1, -1), (basis[..., :n], basis[..., n:]), parameters, adjoint
    )
    assert z.ladj.sum().item() == pytest.approx(expected.ladj.item(), abs=1e-5)
    assert torch.allclose(z.x, expected.x.expand(size, -1, -1), atol=1e-6)
    assert torch.allclose(z.h, expected.h.expand(size, -1, -1), atol=1e-6)
    assert z.nfe == copies.nfe > 0


@pytest.mark.parametrize("solver", [Solver("dopri5", rtol=1e-6, atol=1e-7), Solver("rk4", steps=10)])
def test_adjoint_gradients_are_those_of_back_propagation(real_flow, flow, solver):
    """With respect to every parameter, and to data that is itself computed (by a learned q)."""
    gradients = []
    for adjoint in (False, True):
        plain, leaf, h = real_flow(solver, sizes=(2,))
        leaf.requires_grad_(True)
        x = 1.0 * leaf
        probes = tuple(v[0] for v in divergence.draw_probes(x, h, 1, torch.Generator().manual_seed(0)))
        parameters = list(flow.dynamics.parameters())
        z = plain.forward_regularised(x, h, probes, parameters, adjoint)
        loss = z.x.square().sum() + z.h.square().sum() - z.ladj.sum() + 0.1 * (z.kinetic + z.jacobian).sum()
        gradients.append(torch.autograd.grad(loss, [leaf, *parameters]))
    assert all(g.abs().sum() > 0 for g in gradients[0])
    for direct, adjoint in zip(*gradients, strict=True):
        assert torch.allclose(direct, adjoint, atol=1e-4, rtol=1e-4)


# Paths, solvers and their failures


def test_trajectory_visits_the_times_asked_for(state):
    mask = mask_of(3)
    x, h = state(mask)
    times = torch.tensor([1.0, 0.75, 0.2, 0.0])
    for solver in (TIGHT, Solver("rk4", steps=50)):
        path = ContinuousFlow(linear(lambda t: 0.5, mask), mask, solver).trajectory(x, h, times)
        assert len(path) == 4 and torch.equal(path[0][0], x)
        for t, (x_t, _) in zip(times.double(), path, strict=True):
            assert torch.allclose(x_t, torch.exp(0.5 * (t - 1.0)) * x, atol=1e-7)


def test_no_trace_leaves_ladj_at_zero_and_counts_evaluations(state):
    mask = mask_of(3, 2)
    x, h = state(mask)
    flow = ContinuousFlow(linear(lambda t: 0.5, mask), mask, Solver("midpoint", steps=3))
    z = flow.forward(x, h)
    assert z.ladj.tolist() == z.error.tolist() == [0.0, 0.0] and z.nfe == 6
    calls = []
    counting = ContinuousFlow(lambda t, x, h: (calls.append(t), x, h)[1:], mask, Solver("midpoint", steps=3))
    assert counting.forward(x, h, divergence.exact).nfe == len(calls)


@pytest.mark.parametrize("direction", ["forward", "inverse", "forward_regularised"])
@pytest.mark.parametrize("kind", ["explosion", "nan"])
def test_failure_of_the_solver_is_one_line_with_the_remedy(state, kind, direction):
    mask = mask_of(3)
    x, h = state(mask)
    sign = -1 if direction == "inverse" else 1

    def velocity(t, x, h):
        squared = x.square().sum(dim=(1, 2), keepdim=True)
        return sign * 20 * x * squared if kind == "explosion" else x * math.nan, h

    flow = ContinuousFlow(velocity, mask)
    arguments = ((torch.ones_like(x), h), []) if direction == "forward_regularised" else ()
    with pytest.raises(
        SolverError, match=r"dopri5 failed .*loosen rtol and atol \(now 1e-05 and 1e-05\) or use a fixed-step"
    ) as caught:
        getattr(flow, direction)(x, h, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rk45"}, "'rk45' is unknown; choose one of dopri5"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5: must be a whole number"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"atol": -1.0}, "atol=-1.0"),
        ({"warp": 0.0}, "warp=0.0"),
    ],
)
def test_solver_refuses_what_it_cannot_do(options, words):
    with pytest.raises(ValueError, match=r"^solver ") as caught:
        Solver(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("warp", [0.5, 1.0, 2.0])
def test_grid_rises_from_zero_to_one_denser_near_the_data(warp):
    grid = Solver("rk4", steps=10, warp=warp).grid()
    step = grid.diff()
    assert grid[0] == 0 and grid[-1] == 1 and len(grid) == 11 and (step > 0).all()
    assert (step[0] < step[-1] - 1e-9) == (warp > 1)


@pytest.mark.parametrize("method", [*ADAPTIVE, *EVALUATIONS_PER_STEP])
def test_every_method_runs_both_ways_in_both_precisions(state, method):
    mask = mask_of(3)
    for dtype in (torch.float32, torch.float64):
        x, h = (part.to(dtype) for part in state(mask))
        flow = ContinuousFlow(linear(lambda t: 0.1, mask), mask, Solver(method, steps=20))
        z = flow.forward(x, h, divergence.exact)
        assert z.x.dtype == z.ladj.dtype == z.error.dtype == dtype
        assert torch.allclose(flow.inverse(z.x, z.h).x, x, atol=1e-2 if method == "euler" else 1e-4)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "midpoint", "euler"])
def test_a_finer_solver_errs_less_and_a_coarser_one_more(real_flow, method):
    def latent(solver: Solver) -> torch.Tensor:
        flow, x, h = real_flow(solver, sizes=(3,))
        return flow.forward(x, h).x

    solver = Solver(method, steps=24, rtol=1e-4, atol=1e-4)
    truth = latent(TIGHT)
    errors = [(latent(s) - truth).abs().max().item() for s in (solver.coarser(), solver, solver.finer())]
    assert errors[0] > 1.4 * errors[1] > 2 * errors[2]


def test_a_finer_tolerance_stays_within_what_the_numbers_resolve():
    tight = Solver(rtol=1e-7, atol=1e-12)
    single, double = tight.finer(torch.float32), tight.finer(torch.float64)
    assert (single.rtol, single.atol) == (1e-7, 1e-12)  # requested tolerances are never loosened
    assert double.rtol == pytest.approx(1e-8) and double.atol == pytest.approx(1e-13)


# Errors


@pytest.mark.parametrize("rate", [5.0, 20.0, 400.0])
@pytest.mark.parametrize("method", ["rk4", "midpoint", "dopri5"])
def test_the_error_of_a_stiff_well_is_stated(method, rate):
    """dx/dt = −k ε tanh(x / ε): sinh(x / ε) decays as exp(−k t), and ladj is by how much log tanh(x / ε) changes."""
    x = torch.tensor([[[0.05], [-0.05]]], dtype=torch.float64)
    h, mask, width = x.new_zeros(1, 2, 0), mask_of(2), 0.1

    def well(t, x, h):
        return -rate * width * torch.tanh(center(x, mask) / width), h

    flow = ContinuousFlow(well, mask, Solver(method, steps=1))
    z = flow.forward(x, h, divergence.exact)
    end = width * torch.asinh(torch.sinh(x / width) * math.exp(-rate))
    truth = torch.log(torch.tanh(end / width) / torch.tanh(x / width))[0, 0] + log_base(end, h, mask)
    base = log_base(z.x, z.h, mask)
    by_path, _ = path_error(flow, x, h, base, z.traces, divergence.exact)
    assert abs(z.ladj + base - truth) <= 3 * (z.error + by_path)
    # 48 steps are stable for the first two rates, and the error stays small there.
    stable = rate < 50.0 or method == "dopri5"
    assert (flow.unresolved(x, h, z.traces) == 0) == stable and (not stable or by_path < 0.01)


@pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5"])
@pytest.mark.parametrize("rate", [1.0, 3.0, 6.0])
def test_parts_of_an_error_that_cancel_are_no_accuracy(method, rate):
    """dh/dt = sin k h from many h: for some, changes of log p_Z and of the trace cancel, and the next order does not.

    The solution has tan(k h / 2) = tan(k h_0 / 2) exp(k t), and ladj is the change of log sin k h.
    """
    h = torch.arange(0.01, 3.0 / rate, 0.005, dtype=torch.float64)[:, None, None]
    x, mask = h.new_zeros(len(h), 1, 3), torch.ones(len(h), 1, dtype=torch.bool)
    flow = ContinuousFlow(lambda t, x, h: (0.0 * x, torch.sin(rate * h)), mask, Solver(method, steps=1))
    z = flow.forward(x, h, divergence.exact)
    end = 2.0 / rate * torch.atan(torch.tan(rate * h / 2) * math.exp(rate))
    truth = torch.log(torch.sin(rate * end) / torch.sin(rate * h))[:, 0, 0] + log_base(x, end, mask)
    base = log_base(z.x, z.h, mask)
    by_path, _ = path_error(flow, x, h, base, z.traces, divergence.exact)
    assert ((z.ladj + base - truth).abs() <= 3 * (z.error + by_path)).all()
