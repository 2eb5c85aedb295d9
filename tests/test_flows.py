"""
LapFlow and the baselines of tests/variants.py, Pyramidal Flow and EdifyImage: their training states against the paper's
algorithms as printed, and their samplers against those states: exactly for known data, and in mean and covariance for
Gaussian data.
"""
import pytest
import torch
import torch.nn.functional as F

import model as lapflow
import sample
from conftest import config_in_place, variant_in_place
from model import (LapFlow, LapFlowConfig, down, laplacian_pyramid, multiscale_loss, reconstruct, state_and_velocity,
                   up)
from test_model import small
from variants import VariantConfig, check_variant

FLOWS = ('', 'flow=pyramidal', 'flow=edify')        # '' is LapFlow's
TIMES = {1: (), 2: (0.5,), 3: (0.67, 0.33), 4: (0.75, 0.5, 0.25)}
down_by = lambda x, n: F.avg_pool2d(x, n)


def config_of(T, size=16, channels=2):
    """Of the flow that is in place."""
    return config_in_place(size=size, channels=channels, patch=1, width=8, depth=1, heads=1, T=T)


def one_stage(x1, x0, t, s, config):
    """States and velocities of the scales that stage s trains, for images that are all in stage s."""
    stage = torch.full((len(x1),), s)
    return lapflow.states_and_velocities(x1, x0, t, stage, config)


def active(s, config):
    """The scales of stage s, finest first."""
    return [s] if VariantConfig.applied else list(range(s, config.K))


def segments(calls, config):
    """The calls of each segment, (states, t), {s: calls} in the order of sampling; there must be no others."""
    found = {s: [call for call in calls if list(call[0]) == active(s, config)] for s in reversed(range(config.K))}
    flat = [call for segment in found.values() for call in segment]
    assert len(flat) == len(calls) and all(a is b for a, b in zip(flat, calls)) and all(found.values())
    return found


@pytest.mark.parametrize('k', (0, 1, 2))
def test_pyramidal_states_are_algorithm_3(k, use):
    use('flow=pyramidal')
    T, s, e = (0.67, 0.33), (0.67, 0.33, 0.0)[k], (1.0, 0.67, 0.33)[k]
    x1, x0 = torch.randn(2, 5, 2, 16, 16, dtype=torch.float64)
    t = s + (e - s) * torch.rand(5, dtype=torch.float64)
    noise = down_by(x0, 2 ** k)                                                                     # line 9
    x_s = s * up(down_by(x1, 2 ** (k + 1))) + (1 - s) * noise                                       # line 10
    x_e = e * down_by(x1, 2 ** k) + (1 - e) * noise                                                 # line 11
    a, b = ((e - t) / (e - s)).view(-1, 1, 1, 1), ((t - s) / (e - s)).view(-1, 1, 1, 1)
    expected = {k: a * x_s + b * x_e}, {k: (x_e - x_s) / (e - s)}                                   # lines 12, 13
    torch.testing.assert_close(one_stage(x1, x0, t, k, config_of(T)), expected)


@pytest.mark.parametrize('k', (0, 1, 2))
def test_edify_states_are_equation_14_and_their_derivative(k, use):
    use('flow=edify')
    T, starts = (0.67, 0.33), (0.67, 0.33, 0.0)
    x1, x0 = torch.randn(2, 5, 2, 16, 16, dtype=torch.float64)
    t = starts[k] + (1 - starts[k]) * torch.rand(5, dtype=torch.float64)
    pyramid = laplacian_pyramid(x1, 3)

    def equation_14(t):
        mu = 0
        for j in range(k, 3):
            part = ((t - starts[j]) / (1 - starts[j])).view(-1, 1, 1, 1) * pyramid[j]
            for _ in range(j - k):
                part = up(part)
            mu = mu + part
        return (1 - t).view(-1, 1, 1, 1) * down_by(x0, 2 ** k) + mu
    expected, derivative = torch.func.jvp(equation_14, (t,), (torch.ones_like(t),))                 # Eq. (15)
    states, velocities = one_stage(x1, x0, t, k, config_of(T))
    torch.testing.assert_close((states, velocities), ({k: expected}, {k: derivative}))
    noise = laplacian_pyramid(x0, 3)    # and it is the reconstruction of LapFlow's pyramid
    scales = [state_and_velocity(pyramid[j], noise[j], t, starts[j])[0] for j in range(k, 3)]
    torch.testing.assert_close(states[k], reconstruct(scales))


def test_stage_times_of_the_baselines():
    stage, uniform = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.0, 1.0] * 3)
    for flow, expected in (('edify', [0.67, 1, 0.33, 1, 0, 1]), ('pyramidal', [0.67, 1, 0.33, 0.67, 0, 0.33])):
        with variant_in_place(f'flow={flow}'):
            times = lapflow.stage_times(stage, uniform, config_of((0.67, 0.33)))
        torch.testing.assert_close(times, torch.tensor(expected))


class Guide:
    """
    Stands in for a network that knows each image's data and noise: its velocity is the training target. Writes down the
    states and times with which it is called.
    """

    def __init__(self, config, x1, x0):
        self.config, self.x1, self.x0, self.calls = config, x1, x0, []

    def __call__(self, x_t, t, y=None):
        self.calls.append(({k: x.clone() for k, x in x_t.items()}, t))
        return one_stage(self.x1, self.x0, t.double(), min(x_t), self.config)[1]


@pytest.mark.parametrize('flow', FLOWS)
@pytest.mark.parametrize('K', (1, 2, 3, 4))
def test_the_true_velocity_leads_through_every_training_state_to_the_data(flow, K, use):
    """
    With the same noise in training and sampling the sampler walks through the training states, hand-overs included:
    with Euler's method every state that the network is asked about is one of them.
    """
    use(flow)
    config = config_of(TIMES[K])
    x1, x0 = torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)
    guide, times = Guide(config, x1, x0), (1.0, *TIMES[K], 0.0)
    x, _ = sample.generate(guide, x0, method='euler', steps=20)
    torch.testing.assert_close(x, x1, atol=1e-6, rtol=0)
    assert len(guide.calls) == 20
    for s, segment in segments(guide.calls, config).items():
        assert segment[0][1].tolist() == pytest.approx([times[s + 1]] * 3, abs=1e-7)
        for state, t in segment:
            expected, _ = one_stage(x1, x0, t.double().clamp(times[s + 1], times[s]), s, config)
            torch.testing.assert_close(state, expected, atol=1e-6, rtol=0)


class Gaussian:
    """
    The best possible network for data N(0, Sigma): states and targets are linear in (x1, x0), so that E[u | x_t] =
    Cov(u, x_t) Cov(x_t)^+ x_t with covariances found by pushing unit vectors through `states_and_velocities`. Under the
    causal mask a scale's x_t are the states of the scales that it sees; else (mask=none) they are all. Writes down
    the states and times with which it is called.
    """

    def __init__(self, config, root, causal):
        self.config, self.causal, n = config, causal, config.size ** 2
        unit = torch.eye(n, dtype=torch.float64).view(n, 1, config.size, config.size)
        zero = torch.zeros(n, 1, config.size, config.size).double()
        self.x1 = torch.cat([root.T.reshape_as(unit), zero])    # rows: the factors of data, then those of noise
        self.x0 = torch.cat([zero, unit])
        self.calls = []

    def factors(self, t, s):
        """For each scale of stage s matrices M, U with x_t = M^T z and u = U^T z for one z ~ N(0, I)."""
        times = torch.full((len(self.x1),), t, dtype=torch.float64)
        return [{k: x.flatten(1) for k, x in part.items()}
                for part in one_stage(self.x1, self.x0, times, s, self.config)]

    def __call__(self, x_t, t, y=None):
        self.calls.append(({k: x.clone() for k, x in x_t.items()}, t))
        states, targets = self.factors(t[0].item(), min(x_t))
        v = {}
        for k, U in targets.items():
            seen = [j for j in x_t if j >= k or not self.causal]
            M = torch.cat([states[j] for j in seen], 1)
            x = torch.cat([x_t[j].flatten(1) for j in seen], 1)
            v[k] = (x @ torch.linalg.pinv(M.T @ M, rtol=1e-10, hermitian=True) @ (M.T @ U)).view_as(x_t[k])
        return v


def gaussian_images(config, causal):
    """A network for images whose neighbouring pixels are alike, the unit vectors of noise, the images' covariance."""
    size, n = config.size, config.size ** 2
    row, column = torch.arange(n) // size, torch.arange(n) % size
    distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    covariance = 1.5 * 0.8 ** distance.double()
    unit = torch.eye(n, dtype=torch.float64).view(n, 1, size, size)
    return Gaussian(config, torch.linalg.cholesky(covariance), causal), unit, covariance


@pytest.mark.parametrize('flow', FLOWS)
@pytest.mark.parametrize('T', ((0.5,), (0.6, 0.3)))
def test_samples_and_every_handover_have_the_training_covariance(flow, T, use):
    """
    The sampler is linear in its noise here: unit vectors of noise show the exact covariance of what it draws, and of
    its states where a segment starts, at every step, and where it ends: there LapFlow's are the coarser scales' in the
    next segment, the baselines' what the next one is renoised from, and the image's at last.
    """
    use(flow)
    config = config_of(T, size=8, channels=1)
    gaussian, unit, covariance = gaussian_images(config, causal=False)
    x, _ = sample.generate(gaussian, unit, method='rk4', steps=60)
    torch.testing.assert_close(x.flatten(1).T @ x.flatten(1), covariance, atol=5e-3, rtol=0)
    calls = segments(gaussian.calls, config)
    for s in range(config.K):
        steps = [(state, t[0].item()) for state, t in calls[s][::4]]    # rk4's first call of a step is at its start
        assert steps[0][1] == pytest.approx(config.times[s + 1], abs=1e-7)
        if not flow:
            after = calls[s - 1][0][0] if s else dict(enumerate(laplacian_pyramid(x, config.K)))
            end = {k: after[k] for k in active(s, config)}
        else:
            end = {s: down(calls[s - 1][0][0][s - 1]) if s else x}
        for state, t in (*steps, (end, config.times[s])):
            drawn = torch.cat([x_k.flatten(1) for x_k in state.values()], 1)
            M = torch.cat([*gaussian.factors(t, s)[0].values()], 1)
            torch.testing.assert_close(drawn.T @ drawn, M.T @ M, atol=5e-3, rtol=0)


@pytest.mark.parametrize('T, correlation', ((0.1, 0.7718), (0.5, 0.7927)))
def test_what_the_causal_mask_costs_a_perfect_network(T, correlation):
    """
    README's Departures: the coarse scale's law is exact and the joint one is not; the earlier the fine scale starts,
    the further off it is. Pixels 1 and 2 are neighbours in different 2x2 patches: their correlation should be 0.8.
    """
    config = config_of((T,), size=8, channels=1)
    gaussian, unit, covariance = gaussian_images(config, causal=True)
    x, _ = sample.generate(gaussian, unit, method='rk4', steps=60)
    pixels, pool = x.flatten(1).T @ x.flatten(1), down_by(unit, 2).flatten(1)
    torch.testing.assert_close(pool.T @ pixels @ pool, pool.T @ covariance @ pool, atol=2e-4, rtol=0)
    assert abs(pixels[1, 2] / (pixels[1, 1] * pixels[2, 2]).sqrt() - correlation) < 2e-4


@pytest.mark.parametrize('k', (1, 2))
def test_renoising_has_the_covariance_of_appendix_F2(k):
    """
    Noise that joins scale k-1 in a 2x2 patch: 3/4^k times 1 on the diagonal and -1/3 off it; patches are independent.
    """
    unit = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    joining = laplacian_pyramid(unit, 3)[k - 1]
    side = joining.shape[-1]
    # 2x2 patch by patch
    patches = joining.view(64, side // 2, 2, side // 2, 2).permute(0, 1, 3, 2, 4).reshape(64, -1)
    block = 3 / 4 ** k * (torch.eye(4) * 4 / 3 - 1 / 3).double()
    torch.testing.assert_close(patches.T @ patches, torch.block_diag(*[block] * (side // 2) ** 2))


@pytest.mark.parametrize('stages', ((0, 0, 0, 1, 1, 2), (1, 1, 1, 1, 2, 2), (0, 0, 0, 0, 2, 2)))
@pytest.mark.parametrize('flow', ('flow=pyramidal,shared=qkv+proj+ffn+mod', 'flow=edify'))
def test_one_forward_of_packed_stages_equals_stage_by_stage(flow, stages, use):
    """
    Every image passes through the network alone, at its own scale, with its own time and label; a stage may be empty.
    """
    use(flow)
    model = small()
    config, B = model.config, 6
    x1, x0 = torch.randn(2, B, 3, 16, 16, dtype=torch.float64)
    stage, y = torch.tensor(stages), torch.tensor([1, 4, 0, 3, 5, 2])
    t = lapflow.stage_times(stage, torch.rand(B, dtype=torch.float64), config)
    x_t, u = lapflow.states_and_velocities(x1, x0, t, stage, config)
    assert {k: len(x) for k, x in x_t.items()} == {k: stages.count(k) for k in sorted({*stages})}
    loss, _ = multiscale_loss(model(x_t, t, y), u, (1.0, 2.0, 3.0), B)
    plain_network = LapFlow(config).double()        # with the shared layers of the variant, if it has any
    plain_network.load_state_dict(model.state_dict())
    expected = 0
    for i, s in enumerate(stages):
        states, velocities = one_stage(x1[i:i + 1], x0[i:i + 1], t[i:i + 1], s, config)
        output = plain_network(states, t[i:i + 1], y[i:i + 1])[s]
        expected += (1, 2, 3)[s] * ((output - velocities[s]) ** 2).mean() / B
    torch.testing.assert_close(loss, expected)
    for ours, plain in zip(*(torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
                             for value, network in ((loss, model), (expected, plain_network)))):
        if plain is None:       # of a scale that no image has
            assert ours is None
        else:
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10 * plain.abs().max().item())
    of_none, of_null = model(x_t, t), model(x_t, t, torch.full_like(y, config.n_classes))
    assert list(of_none) == list(of_null) == list(x_t) and all(torch.equal(of_none[k], of_null[k]) for k in x_t)


@pytest.mark.parametrize('variant, word', (('flow=pyramidal,schedule=gvp', 'straight'), ('flow=x', 'edify'),
                                           ('flow=edify,image_tokens=True', 'image tokens')))
def test_impossible_baselines_are_refused_by_name(variant, word):
    with pytest.raises(SystemExit, match=word):
        check_variant(variant)


def test_impossible_settings_of_a_baseline_are_refused_by_name(use):
    use('flow=edify')
    with pytest.raises(ValueError, match='decrease'):
        config_in_place(size=32, patch=2, width=32, heads=4, depth=2, T=(0.3, 0.6))


@pytest.mark.parametrize('other', ('flow=pyramidal', 'mask=none', ''))
def test_a_configuration_that_is_not_of_the_flow_is_not_taken_for_a_baselines(other, use):
    """As the model_args of LapFlow's checkpoints, which tests/variants.py must not draw or go on with."""
    use('flow=edify')
    with pytest.raises(SystemExit, match="of variant '.*', not 'flow=edify'"):
        lapflow.LapFlowConfig(**vars(LapFlowConfig(size=32, width=32, heads=4)), variant=other)
    with pytest.raises(SystemExit, match="of variant '', not 'flow=edify'"):
        lapflow.LapFlowConfig(**vars(LapFlowConfig(size=32, width=32, heads=4)))
