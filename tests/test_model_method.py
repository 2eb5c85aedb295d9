"""The method, Sec. 3, Sec. 4.1 and 4.2, against the paper's formulas as printed."""
import pytest
import scipy.stats
import torch
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from model import (LapFlowConfig, laplacian_pyramid, multiscale_loss, packed_stages, reconstruct,
                   stage_times, state_and_velocity, states_and_velocities)

pytestmark = pytest.mark.usefixtures('float64')

# -------------------------------------------------------------------------------------------------
# Sec. 3: the Laplacian pyramid


def Down(x):
    top, bottom = x[..., ::2, :], x[..., 1::2, :]
    pairs = (top + bottom) / 2
    left, right = pairs[..., ::2], pairs[..., 1::2]
    return (left + right) / 2


def Up(x):
    x = x.repeat_interleave(2, dim=-1)
    return x.repeat_interleave(2, dim=-2)


def test_the_pyramid_is_equation_1():
    """Eq. (1)."""
    x = torch.randn(2, 3, 8, 12)
    fine, middle, coarse = laplacian_pyramid(x, 3)
    assert_close(coarse, Down(Down(x)))
    assert_close(middle, Down(x) - Up(coarse))
    assert_close(fine, x - Up(Down(x)))


def test_scales_add_up_by_equation_2():
    """Eq. (2), of any three tensors: what a network draws need not be residuals."""
    fine = torch.randn(2, 3, 8, 12)
    middle = torch.randn(2, 3, 4, 6)
    coarse = torch.randn(2, 3, 2, 3)
    x = reconstruct([fine, middle, coarse])
    assert_close(x, fine + Up(middle) + Up(Up(coarse)))


@pytest.mark.parametrize('K', (1, 2, 5))
def test_the_pyramid_reconstructs_any_image(K):
    x = torch.randn(2, 3, 32, 48)
    pyramid = laplacian_pyramid(x, K)
    widths = [scale.shape[-1] for scale in pyramid]
    assert widths == [48, 24, 12, 6, 3][:K]
    assert_close(reconstruct(pyramid), x, rtol=0, atol=1e-14)


def residual_covariance(n):
    """That of white noise, n x n, from which the means of its 2 x 2 patches are taken."""
    pixel = torch.arange(n * n)
    row, column = pixel // n, pixel % n
    patch = row // 2 * n + column // 2
    together = patch[:, None] == patch
    return torch.eye(n * n) - together / 4


def test_the_noise_of_a_pyramid_has_the_covariance_of_appendix_F2():
    """In a 2 x 2 patch of residual k it is 3/4^(k+1) times 1 on the diagonal and -1/3 off it.

    The coarsest of K scales is white: 1/4^(K-1). (F.2 counts k from 1, and prints -1 off the
    diagonal, which cannot be: config/README.md, Departures.) Scales are independent. Unit vectors
    in the place of noise show the covariance exactly. The roots of its diagonal are the standard
    deviations 0.87, 0.43 and 0.25.
    """
    unit = torch.eye(64).view(64, 1, 8, 8)
    pyramid = laplacian_pyramid(unit, 3)
    noise = torch.cat([scale.flatten(1) for scale in pyramid], dim=1)
    fine, middle = residual_covariance(8), residual_covariance(4) / 4
    covariance = torch.block_diag(fine, middle, torch.eye(4) / 16)
    assert_close(noise.T @ noise, covariance)
    deviations = covariance.diag()[[0, 64, 80]].sqrt()      # of the first pixels
    assert deviations.tolist() == pytest.approx([0.87, 0.43, 0.25], abs=0.005)


# -------------------------------------------------------------------------------------------------
# Sec. 4.1: a path for each scale


def lines(x1, x0, T):
    """Of known x1 and x0, (B, C, H, W): line(k, t) is the state of scale k and its velocity."""
    data = laplacian_pyramid(x1, len(T) + 1)
    noise = laplacian_pyramid(x0, len(T) + 1)

    def line(k, t):
        start = (*T, 0)[k]
        alpha = (t - start) / (1 - start)                       # Eq. (4a)
        sigma = 1 - t
        state = alpha * data[k] + sigma * noise[k]              # Eq. (3)
        velocity = data[k] / (1 - start) - noise[k]             # Eq. (5)
        return state, velocity

    return line


@pytest.mark.parametrize('start', (0.0, 0.33, 0.67))
def test_a_scale_is_only_noise_at_its_start_and_only_data_at_one(start):
    """Eq. (3) with Eq. (4a): the two key properties."""
    x1, x0 = torch.randn(2, 1, 3, 4, 4)
    first, _ = state_and_velocity(x1, x0, torch.tensor([start]), start)
    last, _ = state_and_velocity(x1, x0, torch.tensor([1.0]), start)
    assert torch.equal(first, (1 - start) * x0)
    assert_close(last, x1, rtol=0, atol=1e-15)


# -------------------------------------------------------------------------------------------------
# Sec. 4.2: stages, and the loss


@pytest.mark.parametrize('B, K', ((7, 3), (256, 4)))
def test_a_batch_is_ordered_by_stage_with_as_many_images_in_each(B, K):
    """For the s that Alg. 1, line 6, draws. If K does not divide B, they differ by one image."""
    stage = packed_stages(B, K).tolist()
    sizes = [stage.count(s) for s in range(K)]
    assert len(stage) == sum(sizes) == B
    assert stage == sorted(stage)
    assert max(sizes) - min(sizes) <= 1


def test_times_are_uniform_from_the_start_of_the_stage():
    """Alg. 1, line 6. Kolmogorov-Smirnov tests; the odds of a false alarm are 3 in 10,000."""
    stage = torch.arange(3).repeat_interleave(4000)
    uniform = torch.rand(12_000)
    t = stage_times(stage, uniform, LapFlowConfig(T=(0.67, 0.33)))
    for s, start in enumerate((0.67, 0.33, 0.0)):
        drawn = t[stage == s].numpy()
        interval = start, 1 - start         # scipy wants its first point and its length
        test = scipy.stats.kstest(drawn, 'uniform', interval)
        assert test.pvalue > 1e-4


@pytest.mark.parametrize('T, stages', (
    ((0.6, 0.25), (0, 0, 0, 1, 1, 2)),
    ((0.6, 0.25), (0, 0, 2, 2)),
    ((0.6, 0.25), (1, 2, 2)),
    ((), (0, 0, 0))))
def test_a_packed_batch_holds_what_algorithm_1_makes_of_each_image(T, stages):
    """Alg. 1, lines 5, 7 and 8, image after image. A fork that draws stages has empty ones.

    Image i has the scales k >= s, and is the i-th image of each. The finest scale comes first.
    Without T there is one scale: that is plain flow matching.
    """
    config = LapFlowConfig(T=T)
    x1, x0 = torch.randn(2, len(stages), 3, 8, 8)
    t = torch.rand(len(stages))
    stage = torch.tensor(stages)
    x_t, u_t = states_and_velocities(x1, x0, t, stage, config)
    for i, s in enumerate(stages):
        line = lines(x1[[i]], x0[[i]], config.T)
        for k in range(s, config.K):
            image = x_t[k][[i]], u_t[k][[i]]
            assert_close(image, line(k, t[i]))
    scales = list(range(stages[0], config.K))
    counts = [sum(s <= k for s in stages) for k in scales]
    for batch in (x_t, u_t):
        assert list(batch) == scales
        assert [len(x) for x in batch.values()] == counts


def test_the_loss_is_equation_7_of_each_image():
    """Eq. (7), averaged over the images, each with the scales that it has.

    Its norm is taken as the mean over elements: config/README.md, Departures. w_k may also be each
    image's own, as that of the coarsest scale here, for a fork that weights by t.
    """
    B, counts = 4, {0: 1, 1: 3, 2: 4}
    weights = (0.5, 2.0, torch.rand(B))
    v, u = {}, {}
    for k, n in counts.items():
        side = 8 // 2 ** k
        v[k] = torch.randn(n, 3, side, side)
        u[k] = torch.randn(n, 3, side, side)
    loss, errors = multiscale_loss(v, u, weights, B)
    expected = 0
    for k, n in counts.items():
        assert len(errors[k]) == n
        for i in range(n):
            error = mse_loss(v[k][i], u[k][i])
            assert_close(errors[k][i], error)
            w = weights[k][i] if k == 2 else weights[k]
            expected += w * error / B
    assert_close(loss, expected)
