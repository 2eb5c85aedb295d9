"""Algorithm 2 against oracle velocities whose solutions are known in closed form, and what sample.py writes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from model import laplacian_pyramid, noisy_state, path, velocity
from sample import ADAPTIVE, FIXED, generate, noise_of, save_trajectory, to_uint8
from test_model import PATHS, small

TIMES = {1: (), 2: (0.5,), 3: (0.67, 0.33), 4: (0.75, 0.5, 0.25)}


class Oracle:
    """Stands in for the network: calls velocity(k, x, t) for each active scale, and writes down how it was called."""

    def __init__(self, velocity, T, kind='linear', n_classes=0):
        self.velocity, self.calls = velocity, []
        self.config = SimpleNamespace(T=T, times=(1.0, *T, 0.0), K=len(T) + 1, path=kind, n_classes=n_classes)

    def __call__(self, x_t, t, y=None):
        self.calls.append(([k for k, x in enumerate(x_t) if x is not None], t, y))
        return [None if x is None else self.velocity(k, x, t) for k, x in enumerate(x_t)]

    def start(self, k):
        return (*self.config.T, 0.0)[k]


def knows_the_data(x1, x0, T, kind='linear'):
    """An oracle with the velocity of Eq. (5) towards a known x1."""
    data, noise = laplacian_pyramid(x1, len(T) + 1), laplacian_pyramid(x0, len(T) + 1)
    oracle = Oracle(lambda k, x, t: velocity(data[k], noise[k], t, oracle.start(k), kind), T, kind)
    return oracle, data, noise


@pytest.mark.parametrize('K', (1, 2, 3, 4))
def test_the_true_velocity_leads_to_the_data_point(K):
    x1, x0 = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    oracle, _, _ = knows_the_data(x1, x0, TIMES[K])
    x, nfe = generate(oracle, x0, method='euler', steps=8)      # the linear path is straight: Euler is exact
    torch.testing.assert_close(x, x1, atol=1e-6, rtol=0)        # times are float32
    assert nfe == 8 == len(oracle.calls)


@pytest.mark.parametrize('kind', PATHS)
def test_the_true_velocity_of_every_path_leads_to_the_data_point(kind):
    x1, x0 = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    x, _ = generate(knows_the_data(x1, x0, (0.67, 0.33), kind)[0], x0, method='dopri5', tol=1e-6)
    torch.testing.assert_close(x, x1, atol=1e-4, rtol=0)


@pytest.mark.parametrize('kind', PATHS)
def test_the_state_at_every_handover_is_the_training_state(kind):
    """Where scales join, every active scale's state is Eq. (3) at T_k, the new one's too."""
    x1, x0 = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    oracle, data, noise = knows_the_data(x1, x0, (0.67, 0.33), kind)
    frames = []
    generate(oracle, x0, method='rk4', steps=60, frames=frames)
    joins = [(t, state) for t, state in frames if round(t, 4) in (0.0, 0.33, 0.67, 1.0)]
    assert [round(t, 2) for t, _ in joins] == [0.0, 0.33, 0.33, 0.67, 0.67, 1.0]
    assert [sum(x is not None for x in state) for _, state in joins] == [1, 1, 2, 2, 3, 3]
    for t, state in joins:
        for k, x in enumerate(state):
            if x is not None:
                times = torch.full((3,), t, dtype=torch.float64)
                expected = noisy_state(data[k], noise[k], times, oracle.start(k), kind)
                torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', PATHS)
def test_handovers_have_the_marginal_of_gaussian_data(kind):
    """
    Data N(0, s^2 I) at every scale. The marginal at t is N(0, v), v(t) = alpha^2 s^2 + sigma^2 n with n the variance of
    the scale's noise, the flow's velocity is x v'(t) / 2v(t), and its solution x(t) = x(start) sqrt(v(t) / v(start)):
    in closed form.
    """
    T, x0 = (0.67, 0.33), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    s2, noise = (0.3, 0.5, 2.0), laplacian_pyramid(x0, 3)
    noise_variance = (3 / 4, 3 / 16, 1 / 16)        # of x - Up(Down(x)), of the same at half size, of Down(Down(x))

    def variance(k, t):
        alpha, _, sigma, _ = path(t, (*T, 0.0)[k], kind)
        return alpha ** 2 * s2[k] + sigma ** 2 * noise_variance[k]

    def marginal_velocity(k, x, t):
        t = t[0].double()
        v, dv = torch.func.jvp(lambda t: variance(k, t), (t,), (torch.ones_like(t),))
        return x * dv / (2 * v)
    frames = []
    generate(Oracle(marginal_velocity, T, kind), x0, method='dopri5', tol=1e-7, frames=frames)
    for t, state in frames:
        for k, x in enumerate(state):
            if x is not None:
                start, t_ = torch.tensor((*T, 0.0)[k], dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
                at_start = path(start, start.item(), kind)[2] * noise[k]
                expected = at_start * torch.sqrt(variance(k, t_) / variance(k, start))
                torch.testing.assert_close(x, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize('method', ADAPTIVE + FIXED)
def test_no_solver_calls_the_model_outside_its_segment(method):
    """
    Small velocities make the adaptive solvers' first probe reach far; every call must still be one that training has
    seen.
    """
    oracle = Oracle(lambda k, x, t: 1e-3 * x * (1 + t.view(-1, 1, 1, 1)), (0.67, 0.33))
    _, nfe = generate(oracle, torch.randn(2, 1, 8, 8), method=method, steps=9, tol=1e-4)
    segments = {3: (0.67, 1.0), 2: (0.33, 0.67), 1: (0.0, 0.33)}
    active = [scales for scales, _, _ in oracle.calls]
    assert sorted(set(map(tuple, active))) == [(0, 1, 2), (1, 2), (2,)] and active == sorted(active, reverse=True)
    for scales, t, _ in oracle.calls:
        low, high = segments[len(scales)]
        assert np.float32(low) <= t.min() and t.max() <= np.float32(high) and t.shape == (2,)
    assert nfe == len(oracle.calls)


@pytest.mark.parametrize('method, calls', (('euler', 1), ('midpoint', 2), ('heun2', 2), ('rk4', 4)))
def test_steps_are_shared_in_proportion_to_the_segments(method, calls):
    oracle = Oracle(lambda k, x, t: -x, (0.67, 0.33))
    _, nfe = generate(oracle, torch.randn(1, 1, 8, 8), method=method, steps=100)
    counts = [sum(len(scales) == n for scales, _, _ in oracle.calls) for n in (1, 2, 3)]
    assert nfe == 100 * calls and counts == [33 * calls, 34 * calls, 33 * calls]


def test_every_segment_has_a_step():
    """With fewer steps than segments, and for a segment of less than half a step."""
    for T, steps, expected in (((0.67, 0.33), 1, 3), ((0.9,), 4, 5)):
        oracle = Oracle(lambda k, x, t: -x, T)
        assert generate(oracle, torch.randn(1, 1, 8, 8), method='euler', steps=steps)[1] == expected
        assert len({tuple(scales) for scales, _, _ in oracle.calls}) == len(T) + 1


def test_solvers_solve_the_same_ode():
    x0, exact = torch.randn(2, 1, 8, 8), None
    for method in ADAPTIVE + FIXED:
        oracle = Oracle(lambda k, x, t: torch.sin(3 * x) + t.view(-1, 1, 1, 1), (0.5,))
        x, _ = generate(oracle, x0, method=method, steps=400, tol=1e-5)
        exact = x if exact is None else exact
        loose = method in ('euler', 'fehlberg2')    # first order; torchdiffeq's fehlberg2 does not hold its tolerance
        torch.testing.assert_close(x, exact, atol=0.03 if loose else 1e-3, rtol=0)


def test_guidance_acts_on_every_channel_in_one_batched_call():
    def v(k, x, t):
        y = oracle.calls[-1][2].double().view(-1, 1, 1, 1)
        return (10 * y + torch.arange(4.0).view(1, 4, 1, 1) * (y == 5)).expand_as(x)
    oracle = Oracle(v, (), n_classes=5)
    x0, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    x, nfe = generate(oracle, x0, y, method='euler', steps=2, cfg=3.0)
    null = 50 + torch.arange(4.0, dtype=torch.float64)
    for i, label in enumerate((1, 3)):
        expected = x0[i] + (null + 3 * (10 * label - null)).view(4, 1, 1)
        torch.testing.assert_close(x[i], expected, atol=1e-5, rtol=0)
    assert nfe == 2 == len(oracle.calls) and oracle.calls[0][2].tolist() == [1, 3, 5, 5]


def test_cfg_1_is_the_conditional_model_and_cfg_0_the_unconditional_one():
    model, y = small(double=False, size=8, T=(0.5,)), torch.tensor([0, 3])
    x0 = torch.randn(2, 3, 8, 8)
    sample = lambda **args: generate(model, x0, method='midpoint', steps=4, **args)[0]
    torch.testing.assert_close(sample(y=y, cfg=1.0), sample(y=y, cfg=1 + 1e-7), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(y=y, cfg=0.0), sample(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(y=y, cfg=0.0), sample(y=y, cfg=1.0), atol=1e-2)


def test_noise_of_a_sample_depends_on_seed_and_number_alone():
    together, apart = noise_of(3, range(5, 9), (2, 4, 4)), torch.cat([noise_of(3, [i], (2, 4, 4)) for i in range(5, 9)])
    assert torch.equal(together, apart)
    assert len({noise_of(seed, [i], (1,)).item() for seed in range(20) for i in range(20)}) == 400
    many = noise_of(0, range(2000), (8,)).numpy()
    # 5 sigma
    assert abs(many.mean()) < 5 / math.sqrt(many.size) and abs(many.var() - 1) < 5 * math.sqrt(2 / many.size)


def test_pixels_are_rounded_once_and_clipped():
    grey = torch.arange(256.0) / 127.5 - 1
    assert to_uint8(grey.view(1, 1, 16, 16)).flatten().tolist() == list(range(256))
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.4 / 127.5 - 1]).view(3, 1, 1, 1)).flatten().tolist() == [0, 255, 0]


def test_every_column_of_a_trajectory_ends_in_the_reconstruction_also_of_one_scale_at_a_time(tmp_path):
    """Frames of LapFlow have K states, those of the baselines k + 1, the last of which is the image so far."""
    coarse, fine = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 1, 8, 8), -0.5)
    whole = [None, coarse]
    for name, states, last in (('lapflow', (whole, [fine, coarse]), 0), ('edify', (whole, [fine]), -0.5)):
        save_trajectory(tmp_path / f'{name}.png', list(zip((0.0, 1.0), states)), None, {})
        strip = np.asarray(Image.open(tmp_path / f'{name}.png').convert('L'))
        assert strip.shape == (316, 200)
        grey = [round((value + 1) * 127.5) for value in (0.5, last)]
        assert np.abs(strip[-50, [50, 150]] - np.array(grey)).max() <= 1
        assert strip[150, 50] == 0 and abs(int(strip[150, 150]) - round(0.5 * 127.5)) <= 1     # the fine scale's row
