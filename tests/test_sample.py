"""Algorithm 2 against oracle velocities whose solutions are known in closed form, and what sample.py writes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import model as lapflow
from model import laplacian_pyramid, state_and_velocity
from sample import METHODS, generate, noise_of, save_grid, to_uint8
from test_model import SCHEDULES, small

TIMES = {1: (), 2: (0.5,), 3: (0.67, 0.33), 4: (0.75, 0.5, 0.25)}


class Oracle:
    """
    Stands in for the network: calls velocity(k, x, t) for each active scale, and writes down how it was called, as
    (states, t, y).
    """

    def __init__(self, velocity, T, n_classes=0):
        self.velocity, self.calls = velocity, []
        self.config = SimpleNamespace(T=T, times=(1.0, *T, 0.0), K=len(T) + 1, n_classes=n_classes)

    def __call__(self, x_t, t, y=None):
        self.calls.append(({k: x.clone() for k, x in x_t.items()}, t, y))
        return {k: self.velocity(k, x, t) for k, x in x_t.items()}

    def start(self, k):
        return (*self.config.T, 0.0)[k]

    def segments(self):
        """The calls of each segment, the coarsest scale's first."""
        K = self.config.K
        segments = [[call for call in self.calls if list(call[0]) == list(range(s, K))] for s in reversed(range(K))]
        flat = [call for segment in segments for call in segment]
        assert len(flat) == len(self.calls) and all(a is b for a, b in zip(flat, self.calls))
        return segments


def knows_the_data(x1, x0, T):
    """An oracle with the velocity of Eq. (5) towards a known x1."""
    data, noise = laplacian_pyramid(x1, len(T) + 1), laplacian_pyramid(x0, len(T) + 1)
    oracle = Oracle(lambda k, x, t: state_and_velocity(data[k], noise[k], t, oracle.start(k))[1], T)
    return oracle, data, noise


@pytest.mark.parametrize('K', (1, 2, 3, 4))
def test_the_true_velocity_leads_to_the_data_point(K):
    x1, x0 = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    oracle, _, _ = knows_the_data(x1, x0, TIMES[K])
    x, nfe = generate(oracle, x0, method='euler', steps=8)      # the linear path is straight: Euler is exact
    torch.testing.assert_close(x, x1, atol=1e-6, rtol=0)        # times are float32
    assert nfe == 8 == len(oracle.calls)


@pytest.mark.parametrize('variant', SCHEDULES)
def test_the_true_velocity_of_every_path_leads_to_the_data_point(variant, use):
    use(variant)
    x1, x0 = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    x, _ = generate(knows_the_data(x1, x0, (0.67, 0.33))[0], x0, method='dopri5', tol=1e-6)
    torch.testing.assert_close(x, x1, atol=1e-4, rtol=0)


@pytest.mark.parametrize('variant', SCHEDULES)
def test_the_state_at_every_handover_is_the_training_state(variant, use):
    """
    Where a segment starts, every active scale's state is Eq. (3) at T_k: the new one's, and those of the coarser ones,
    which have just ended the segment before.
    """
    use(variant)
    x1, x0 = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    oracle, data, noise = knows_the_data(x1, x0, (0.67, 0.33))
    x, _ = generate(oracle, x0, method='rk4', steps=60)
    joins = [segment[0] for segment in oracle.segments()]
    assert [[round(t_i, 2) for t_i in t.tolist()] for _, t, _ in joins] == [[0.0] * 3, [0.33] * 3, [0.67] * 3]
    assert [list(state) for state, _, _ in joins] == [[2], [1, 2], [0, 1, 2]]
    joins.append((dict(enumerate(laplacian_pyramid(x, 3))), torch.ones(3), None))
    for state, t, _ in joins:
        for k in state:
            expected, _ = state_and_velocity(data[k], noise[k], t.double(), oracle.start(k))
            torch.testing.assert_close(state[k], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('variant', SCHEDULES)
@pytest.mark.parametrize('method', ('dopri5', 'rk4'))
def test_handovers_have_the_marginal_of_gaussian_data(method, variant, use):
    """
    Data N(0, s^2 I) at every scale. The marginal at t is N(0, v), v(t) = alpha^2 s^2 + sigma^2 n with n the variance of
    the scale's noise, the flow's velocity is x v'(t) / 2v(t), and its solution x(t) = x(start) sqrt(v(t) / v(start)):
    in closed form. So is the state at the start of every segment, of every step if they are fixed, and at the end.
    """
    use(variant)
    T, x0 = (0.67, 0.33), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    s2, noise = (0.3, 0.5, 2.0), laplacian_pyramid(x0, 3)
    noise_variance = (3 / 4, 3 / 16, 1 / 16)        # of x - Up(Down(x)), of the same at half size, of Down(Down(x))

    def variance(k, t):
        return lapflow.alpha(t, (*T, 0.0)[k])[0] ** 2 * s2[k] + lapflow.sigma(t)[0] ** 2 * noise_variance[k]

    def marginal_velocity(k, x, t):
        t = t[0].double()
        v, dv = torch.func.jvp(lambda t: variance(k, t), (t,), (torch.ones_like(t),))
        return x * dv / (2 * v)
    oracle, steps = Oracle(marginal_velocity, T), 200 if variant == 'schedule=cubic' else 60
    x, _ = generate(oracle, x0, method=method, steps=steps, tol=1e-7)
    every = 4 if method == 'rk4' else 10 ** 9       # its calls in a step, the first at the step's start
    known = [call for segment in oracle.segments() for call in segment[::every]]
    assert len(known) == (steps if method == 'rk4' else 3)
    known.append((dict(enumerate(laplacian_pyramid(x, 3))), torch.ones(2), None))
    for state, t, _ in known:
        for k in state:
            start, t_ = torch.tensor(oracle.start(k), dtype=torch.float64), t[0].double()
            expected = lapflow.sigma(start)[0] * noise[k] * torch.sqrt(variance(k, t_) / variance(k, start))
            torch.testing.assert_close(state[k], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize('method', METHODS)
def test_no_solver_calls_the_model_outside_its_segment(method):
    """
    Small velocities make dopri5's first probe reach far; every call must still be one that training has seen.
    """
    oracle = Oracle(lambda k, x, t: 1e-3 * x * (1 + t.view(-1, 1, 1, 1)), (0.67, 0.33))
    _, nfe = generate(oracle, torch.randn(2, 1, 8, 8), method=method, steps=9, tol=1e-4)
    assert all(oracle.segments()) and nfe == len(oracle.calls)
    for segment, (low, high) in zip(oracle.segments(), ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0))):
        for _, t, _ in segment:
            assert np.float32(low) <= t.min() and t.max() <= np.float32(high) and t.shape == (2,)
        if method == 'dopri5':      # a step ends there: of the calls only the first probe and the last two are
            at_end = [t[0].item() > high - 1e-6 for _, t, _ in segment]
            assert at_end[2:] == [False] * (len(segment) - 4) + [True] * 2


@pytest.mark.parametrize('method, calls', (('euler', 1), ('midpoint', 2), ('heun2', 2), ('rk4', 4)))
def test_steps_are_shared_in_proportion_to_the_segments(method, calls):
    oracle = Oracle(lambda k, x, t: -x, (0.67, 0.33))
    _, nfe = generate(oracle, torch.randn(1, 1, 8, 8), method=method, steps=100)
    counts = [len(segment) for segment in oracle.segments()]
    assert nfe == 100 * calls and counts == [33 * calls, 34 * calls, 33 * calls]


def test_every_segment_has_a_step():
    """With fewer steps than segments, and for a segment of less than half a step."""
    for T, steps, expected in (((0.67, 0.33), 1, 3), ((0.9,), 4, 5)):
        oracle = Oracle(lambda k, x, t: -x, T)
        assert generate(oracle, torch.randn(1, 1, 8, 8), method='euler', steps=steps)[1] == expected
        assert len(oracle.segments()) == len(T) + 1 and all(oracle.segments())


def test_solvers_solve_the_same_ode():
    x0, exact = torch.randn(2, 1, 8, 8), None
    for method in METHODS:
        oracle = Oracle(lambda k, x, t: torch.sin(3 * x) + t.view(-1, 1, 1, 1), (0.5,))
        x, _ = generate(oracle, x0, method=method, steps=400, tol=1e-5)
        exact = x if exact is None else exact
        torch.testing.assert_close(x, exact, atol=0.03 if method == 'euler' else 1e-3, rtol=0)     # euler: first order


def test_guidance_acts_on_every_channel_and_counts_a_pair_of_calls_once():
    def v(k, x, t):
        labels = oracle.calls[-1][2]
        y = (torch.tensor([5, 5]) if labels is None else labels).double().view(-1, 1, 1, 1)
        return (10 * y + torch.arange(4.0).view(1, 4, 1, 1) * (y == 5)).expand_as(x)
    oracle = Oracle(v, (), n_classes=5)
    x0, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    x, nfe = generate(oracle, x0, y, method='euler', steps=2, cfg=3.0)
    null = 50 + torch.arange(4.0, dtype=torch.float64)
    for i, label in enumerate((1, 3)):
        expected = x0[i] + (null + 3 * (10 * label - null)).view(4, 1, 1)
        torch.testing.assert_close(x[i], expected, atol=1e-5, rtol=0)
    assert nfe == 2 and [labels is None for _, _, labels in oracle.calls] == [False, True] * 2
    assert oracle.calls[0][2].tolist() == [1, 3]


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


@pytest.mark.parametrize('channels', (1, 3))
def test_a_grid_has_ten_images_to_a_row_and_black_after_the_last(channels, tmp_path):
    images = np.random.default_rng(0).integers(1, 256, (23, 4, 5, channels), np.uint8)
    save_grid(tmp_path / 'grid.png', images)
    picture = np.asarray(Image.open(tmp_path / 'grid.png'))
    assert picture.shape == ((12, 50) if channels == 1 else (12, 50, 3))
    for i in range(30):
        cell = picture[i // 10 * 4:i // 10 * 4 + 4, i % 10 * 5:i % 10 * 5 + 5].reshape(4, 5, channels)
        assert np.array_equal(cell, images[i]) if i < 23 else not cell.any()
