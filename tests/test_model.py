"""The paper's mathematics and the network, against closed forms, autograd, plain loops and a dense-mask transformer."""
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import model as lapflow
from bench import attention_cost, trajectory_average
from conftest import config_in_place, variant_in_place
from model import (LapFlow, LapFlowConfig, laplacian_pyramid, multiscale_loss, packed_stages, reconstruct, stage_times,
                   state_and_velocity, states_and_velocities, up)
from variants import check_variant

SCHEDULES = ('', 'schedule=gvp', 'schedule=quadratic', 'schedule=cubic')       # '' is the linear one
MASKS = ('', 'mask=none', 'mask=self')      # '' is the causal one


def small(double=True, **changes):
    """
    A small model, of the variant that is in place, whose every weight is random, zero-initialised ones too: otherwise
    most of it would be silent.
    """
    settings = dict(size=16, channels=3, patch=2, width=16, depth=2, heads=2, T=(0.6, 0.25), n_classes=5) | changes
    model = lapflow.LapFlow(config_in_place(**settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double() if double else model


def random_batch(config, counts, dtype=torch.float64):
    """Noisy states, times and labels of a packed batch, {k: B_k} images of the active scales."""
    x_t = {k: torch.randn(n, config.channels, config.size >> k, config.size >> k, dtype=dtype)
           for k, n in counts.items()}
    B = counts[max(counts)]
    y = torch.randint(config.n_classes + 1, (B,)) if config.n_classes else None
    return x_t, torch.rand(B, dtype=dtype), y


# ----------------------------------------------------------------------------------------------------------------------
# The pyramid


@pytest.mark.parametrize('K', (1, 2, 3, 4, 5))
def test_pyramid_reconstructs_any_image(K):
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    pyramid = laplacian_pyramid(x, K)
    assert [p.shape for p in pyramid] == [(2, 3, 32 >> k, 48 >> k) for k in range(K)]
    torch.testing.assert_close(reconstruct(pyramid), x, atol=1e-14, rtol=0)


def test_pyramid_is_equation_1_pixel_by_pixel():
    x = np.random.default_rng(0).standard_normal((8, 8))
    means = [x]
    for n in (4, 2):
        means.append(np.array([[means[-1][2 * i:2 * i + 2, 2 * j:2 * j + 2].mean() for j in range(n)]
                               for i in range(n)]))
    up = lambda a: np.array([[a[i // 2, j // 2] for j in range(2 * len(a))] for i in range(2 * len(a))])
    expected = [means[0] - up(means[1]), means[1] - up(means[2]), means[2]]
    for actual, wanted in zip(laplacian_pyramid(torch.from_numpy(x)[None, None], 3), expected):
        np.testing.assert_allclose(actual[0, 0].numpy(), wanted, atol=1e-15)


# ----------------------------------------------------------------------------------------------------------------------
# Paths and velocities


@pytest.mark.parametrize('variant', SCHEDULES)
@pytest.mark.parametrize('start', (0.0, 0.33, 0.67))
def test_velocity_is_the_time_derivative_of_the_path(variant, start, use):
    use(variant)
    x1, x0 = torch.randn(2, 7, 3, 4, 4, dtype=torch.float64)
    t = start + (1 - start) * torch.rand(7, dtype=torch.float64)
    state = lambda t: state_and_velocity(x1, x0, t, start)[0]
    _, derivative = torch.func.jvp(state, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(state_and_velocity(x1, x0, t, start)[1], derivative, atol=1e-12, rtol=0)


@pytest.mark.parametrize('variant', SCHEDULES)
@pytest.mark.parametrize('start', (0.0, 0.33, 0.67))
def test_a_scale_is_only_noise_at_its_start_and_only_data_at_one(variant, start, use):
    use(variant)
    x1, x0 = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    noise = {'': 1 - start, 'schedule=gvp': math.cos(math.pi * start / 2), 'schedule=quadratic': (1 - start) ** 2,
             'schedule=cubic': (1 - start) ** 3}
    at = lambda t: state_and_velocity(x1, x0, torch.tensor([t], dtype=torch.float64), start)[0]
    torch.testing.assert_close(at(start), noise[variant] * x0, atol=1e-15, rtol=0)
    torch.testing.assert_close(at(1.0), x1, atol=1e-15, rtol=0)


def test_paths_are_the_papers_formulas():
    t, start = torch.linspace(0.25, 1, 9, dtype=torch.float64), 0.25
    ramp = (t - 0.25) / 0.75
    for variant, data, noise in (
            ('', ramp, 1 - t), ('schedule=quadratic', ramp, (1 - t) ** 2), ('schedule=cubic', ramp, (1 - t) ** 3),
            ('schedule=gvp', torch.sin(math.pi * (t - 0.25) / (2 * 0.75)), torch.cos(math.pi / 2 * t))):
        with variant_in_place(variant):
            for function, expected in ((lambda t: lapflow.alpha(t, start), data), (lapflow.sigma, noise)):
                value, derivative = function(t)
                torch.testing.assert_close(value, expected, atol=1e-15, rtol=0)
                exact = torch.func.jvp(lambda t: function(t)[0], (t,), (torch.ones_like(t),))[1]
                torch.testing.assert_close(derivative + 0 * t, exact, atol=1e-12, rtol=0)      # it may be one number


def test_stage_times_are_uniform_from_the_stages_start():
    """Kolmogorov-Smirnov for each stage; the odds of a false alarm are 3 in 10,000."""
    T, n = (0.67, 0.33), 4000
    stage = torch.arange(3).repeat_interleave(n)
    t = stage_times(stage, torch.rand(3 * n, dtype=torch.float64), LapFlowConfig(T=T))
    for s, start in enumerate((0.67, 0.33, 0.0)):
        assert scipy.stats.kstest(t[stage == s].numpy(), 'uniform', (start, 1 - start)).pvalue > 1e-4


def test_one_scale_is_plain_flow_matching():
    config = LapFlowConfig(size=8, channels=2, width=16, depth=1, heads=2, T=())
    x1, x0, t = torch.randn(5, 2, 8, 8), torch.randn(5, 2, 8, 8), torch.rand(5)
    x_t, u = states_and_velocities(x1, x0, t, torch.zeros(5, dtype=torch.long), config)
    s = t[:, None, None, None]
    torch.testing.assert_close((x_t, u), ({0: s * x1 + (1 - s) * x0}, {0: x1 - x0}))
    v = torch.randn_like(x1)
    torch.testing.assert_close(multiscale_loss({0: v}, u, (1.0,), 5)[0], ((v - u[0]) ** 2).mean())


# ----------------------------------------------------------------------------------------------------------------------
# The network


def dense_forward(model, x_t, t, y, mask=''):
    """
    LapFlow.forward for one image, {k: (C, H/2^k, W/2^k)}, with one sequence of all tokens, a dense additive mask M_c
    and Eq. (9) as it is printed.
    """
    config, p, D = model.config, model.config.patch, model.config.width
    angles = 1000 * t[None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t_token = model.t_embed(torch.cat([angles.sin(), angles.cos()])[None])
    tokens, scale = [], []
    for k, x in x_t.items():
        n = x.shape[-1] // p
        pixels = torch.stack([x[:, i * p:i * p + p, j * p:j * p + p].flatten() for i in range(n) for j in range(n)])
        tokens.append(model.patch_embed[k].linear(pixels) + lapflow.position_table(n, k, D))
        scale += [k] * n * n
    context = [t_token] if y is None else [t_token, model.y_embed(y)[None]]
    z, scale = torch.cat(tokens + context), torch.tensor(scale + [max(scale)] * len(context))
    c = F.silu(sum(context))[0]
    each = lambda experts, x: torch.stack([experts[k](row) for k, row in zip(scale.tolist(), x)])
    q_scale, k_scale = scale[:, None], scale[None, :]
    hidden = {'': k_scale < q_scale, 'mask=none': torch.zeros(1, 1, dtype=torch.bool),
              'mask=self': k_scale != q_scale}[mask]
    M = torch.zeros(len(z), len(z), dtype=z.dtype).masked_fill(hidden, -torch.inf)
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)
    for block in model.blocks:
        mod = each(block.mod, c.expand(len(z), D)).split(D, dim=-1)
        q, k, v = each(block.qkv, norm(z) * (1 + mod[1]) + mod[0]).split(D, dim=-1)
        heads = []
        for h in range(config.heads):
            d = D // config.heads
            part = slice(h * d, (h + 1) * d)
            heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d) + M, dim=-1) @ v[:, part])
        z = z + mod[2] * each(block.proj, torch.cat(heads, dim=-1))
        z = z + mod[5] * each(block.ffn, norm(z) * (1 + mod[4]) + mod[3])
    out = {}
    for k, x in x_t.items():
        rows = z[:len(z) - len(context)][scale[:len(z) - len(context)] == k]
        shift, factor = model.final[k].mod(c).split(D)
        n, image = x.shape[-1] // p, torch.empty_like(x)
        for i, row in enumerate(model.final[k].linear(norm(rows) * (1 + factor) + shift)):
            image[:, i // n * p:i // n * p + p, i % n * p:i % n * p + p] = row.view(-1, p, p)
        out[k] = image
    return out


@pytest.mark.parametrize('counts', ({0: 2, 1: 2, 2: 2}, {0: 1, 1: 2, 2: 4}, {0: 2, 1: 2, 2: 3}, {1: 1, 2: 3}, {2: 2},
                                    {0: 2}, {1: 2}))
@pytest.mark.parametrize('mask', MASKS)
def test_split_attention_equals_softmax_over_a_dense_mask(mask, counts, use):
    use(mask)
    model = small()
    x_t, t, y = random_batch(model.config, counts)
    with torch.no_grad():
        actual = model(x_t, t, y)
        assert {k: len(v) for k, v in actual.items()} == counts and list(actual) == list(counts)
        for i in range(len(t)):
            alone = {k: x[i] for k, x in x_t.items() if i < len(x)}
            for k, expected in dense_forward(model, alone, t[i], y[i], mask).items():
                torch.testing.assert_close(actual[k][i], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('shared', ('', 'shared=mod', 'shared=qkv+proj', 'shared=qkv+proj+ffn+mod'))
def test_unconditional_shared_network_equals_the_dense_one(shared, use):
    use(shared)
    model = small(n_classes=0)
    x_t, t, _ = random_batch(model.config, {0: 1, 1: 1, 2: 1})
    with torch.no_grad():
        actual = {k: v[0] for k, v in model(x_t, t).items()}
        expected = dense_forward(model, {k: x[0] for k, x in x_t.items()}, t[0], None)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize('variant', ('', 'image_tokens=True'))
def test_coarse_outputs_ignore_finer_inputs_bit_for_bit(variant, use):
    use(variant)
    model = small(double=False)
    x_t, t, y = random_batch(model.config, {0: 4, 1: 4, 2: 4}, torch.float32)
    with torch.no_grad():
        full = model(x_t, t, y)
        other = model(x_t | {0: torch.randn_like(x_t[0])}, t, y)
        coarse = model({2: x_t[2]}, t, y)
        assert torch.equal(full[1], other[1]) and torch.equal(full[2], other[2]) and torch.equal(full[2], coarse[2])
        assert not torch.equal(full[0], model(x_t | {2: torch.randn_like(x_t[2])}, t, y)[0])


def test_image_tokens_show_every_scale_the_image_as_far_as_it_is_known(use):
    """A model with them does with the states what one without does with the images that the states add up to."""
    plain = small()
    use('image_tokens=True')
    model = small()
    model.load_state_dict(plain.state_dict())
    x_t, t, y = random_batch(plain.config, {0: 2, 1: 4, 2: 5})
    fine, middle, coarse = x_t.values()
    image = middle + up(coarse[:4])
    expected = plain({0: fine + up(image[:2]), 1: image, 2: coarse}, t, y)
    torch.testing.assert_close(model(x_t, t, y), expected)
    t, y, coarse = t[:4], y[:4], coarse[:4]
    torch.testing.assert_close(model({1: middle, 2: coarse}, t, y), plain({1: image, 2: coarse}, t, y))
    torch.testing.assert_close(model({1: middle}, t, y), plain({1: middle}, t, y))


def test_every_scale_sees_time_and_label():
    model = small()
    x_t, t, y = random_batch(model.config, {0: 1, 1: 1, 2: 1})
    y = torch.zeros_like(y)
    v = model(x_t, t, y)
    for other in (model(x_t, t + 0.1, y), model(x_t, t, y + 1), model(x_t, t, None)):
        assert all(not torch.allclose(v[k], other[k]) for k in (0, 1, 2))
    of_null, of_none = model(x_t, t, torch.full_like(y, model.config.n_classes)), model(x_t, t, None)
    assert all(torch.equal(of_null[k], of_none[k]) for k in (0, 1, 2))


def test_a_new_network_outputs_zero_and_learns_from_every_parameter():
    config = LapFlowConfig(size=16, channels=3, width=16, depth=2, heads=2, T=(0.5,), n_classes=5)
    model = LapFlow(config)
    x_t, t, y = random_batch(config, {0: 2, 1: 4}, torch.float32)
    assert all(v.abs().max() == 0 for v in model(x_t, t, y).values())
    model = small(double=False)
    x_t, t, y = random_batch(model.config, {0: 1, 1: 2, 2: 4}, torch.float32)
    y = torch.arange(6)[:len(t)]
    sum(v.square().sum() for v in model(x_t, t, y).values()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_activation_checkpointing_changes_no_gradient():
    model = small()
    x_t, t, y = random_batch(model.config, {0: 1, 1: 2, 2: 3})
    gradients = []
    for model.checkpoint_blocks in (False, True):
        model.zero_grad()
        sum(v.square().sum() for v in model(x_t, t, y).values()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_velocities_have_the_precision_of_the_states_under_autocast():
    model = small(double=False)
    x_t, t, y = random_batch(model.config, {0: 1, 1: 2, 2: 3}, torch.float32)
    with torch.no_grad():
        exact = model(x_t, t, y)
        with torch.autocast('cpu', torch.bfloat16):
            rounded = model(x_t, t, y)
    for k in (0, 1, 2):
        assert rounded[k].dtype == torch.float32 and not torch.equal(rounded[k], exact[k])


def test_positions_of_a_coarse_token_are_the_centre_of_the_tokens_it_covers():
    D, n = 64, 8
    fine, coarse = lapflow.position_table(n, 0, D), lapflow.position_table(n // 2, 1, D)
    slow = 15   # the slowest frequency of an axis, 1/10000^(15/16): its sine is linear in the position to 1e-6
    centre = fine.view(n // 2, 2, n // 2, 2, D).mean((1, 3)).view(-1, D)
    torch.testing.assert_close(coarse[:, [slow, 32 + slow]], centre[:, [slow, 32 + slow]], atol=1e-6, rtol=0)
    i, j = 5, 3     # DiT's table: half the channels for one axis, half for the other, sines then cosines
    omega = 10000.0 ** -(torch.arange(16) / 16)
    expected = torch.cat([(j * omega).sin(), (j * omega).cos(), (i * omega).sin(), (i * omega).cos()])
    torch.testing.assert_close(fine[i * n + j], expected, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Packing, cost, errors


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('weights', ((1.0, 1.0, 1.0), (0.5, 2.0, 3.0), 'of each image'))
@pytest.mark.parametrize('stages', ((0, 0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 2, 2, 2), (1, 1, 1, 1, 2, 2, 2),
                                    (2, 2, 2, 2, 2, 2, 2)))
def test_packed_stages_equal_algorithm_1_image_by_image(stages, weights, mask, use):
    """
    Algorithm 1 as it is printed, one image and one stage at a time: same loss, same gradients. Its stages are drawn at
    random, so that any of them may be empty; the weights of Eq. (7) may be each image's own.
    """
    use(mask)
    model = small()
    config, B = model.config, 7
    x1, x0 = torch.randn(2, B, 3, 16, 16, dtype=torch.float64)
    stage, y = torch.tensor(stages), torch.randint(6, (B,))
    counts = {k: sum(s <= k for s in stages) for k in range(stages[0], 3)}
    if weights == 'of each image':
        of_images = torch.rand(3, B, dtype=torch.float64)
        weights = {k: of_images[k, :n] for k, n in counts.items()}
    else:
        of_images = torch.tensor(weights)[:, None].expand(3, B)
    t = stage_times(stage, torch.rand(B, dtype=torch.float64), config)
    x_t, u = states_and_velocities(x1, x0, t, stage, config)
    loss, errors = multiscale_loss(model(x_t, t, y), u, weights, B)
    gradients_of = lambda loss: torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    packed = gradients_of(loss)

    expected, T = 0, (1.0, *config.T, 0.0)
    for i in range(B):
        data, noise = (laplacian_pyramid(x[i:i + 1], 3) for x in (x1, x0))
        s, inputs, targets = stages[i], {}, {}
        for k in range(s, 3):
            alpha, sigma = (t[i] - T[k + 1]) / (1 - T[k + 1]), 1 - t[i]                 # Eq. (4a)
            inputs[k] = alpha * data[k] + sigma * noise[k]                              # Eq. (3)
            targets[k] = data[k] / (1 - T[k + 1]) - noise[k]                            # Eq. (5)
        outputs = model(inputs, t[i:i + 1], y[i:i + 1])
        for k in range(s, 3):
            error = ((outputs[k] - targets[k]) ** 2).mean()
            torch.testing.assert_close(errors[k][i], error, rtol=1e-12, atol=0)
            expected += of_images[k, i] * error / B
    assert {k: len(of_scale) for k, of_scale in errors.items()} == counts
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, plain in zip(packed, gradients_of(expected)):
        if plain is None:       # of a scale that no image has
            assert ours is None
        else:
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10 * plain.abs().max().item())


def test_packed_batches_are_ordered_by_stage_with_as_many_images_in_each():
    for B, K in ((1, 1), (7, 3), (12, 4), (5, 2), (256, 3)):
        stage = packed_stages(B, K)
        counts = [int((stage <= k).sum()) for k in range(K)]
        assert stage.shape == (B,) and stage.tolist() == sorted(stage.tolist()) and counts[-1] == B
        sizes = torch.bincount(stage, minlength=K)
        assert len(sizes) == K and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize('size, T, whole, attention', ((32, (0.5,), 0.7505, 0.69), (128, (0.67, 0.33), 0.535, 0.49)))
def test_the_causal_mask_saves_what_the_design_promises(size, T, whole, attention):
    ours, single = (trajectory_average(LapFlowConfig(size=size, T=T)) for T in (T, ()))
    ratio = ours / single
    assert 0.9 * whole < ratio[0] <= whole and 0.9 * attention < ratio[1] <= attention


def test_attention_costs_appendix_C_for_any_T():
    """Eq. (12) at thirds as printed; a count of every visible pair of tokens; and torch's counter, Eq. (9)'s share."""
    assert round(attention_cost((2 / 3, 1 / 3))[0], 2) == 0.61 and attention_cost(()) == (1, 1)
    for T in ((0.5,), (0.67, 0.33), (0.9, 0.2, 0.1)):
        times, pairs = (1.0, *T, 0.0), np.zeros(2)
        for s in range(len(T) + 1):
            scale = np.concatenate([np.full(64 >> 2 * k, k) for k in range(s, len(T) + 1)])
            visible = scale[None] >= scale[:, None]     # M_c, row by row
            pairs += (times[s] - times[s + 1]) * np.array([visible.size, visible.sum()]) / 64 ** 2
        np.testing.assert_allclose(attention_cost(T), pairs, rtol=1e-12)
        # The one token of t, beside 16,384 at the finest scale, is the difference
        tall = dict(width=8, depth=1, heads=1, size=256, patch=2)
        ours, single = (trajectory_average(LapFlowConfig(**tall, T=T))[1] for T in (T, ()))
        np.testing.assert_allclose(ours / single, attention_cost(T)[1], rtol=1e-3)


@pytest.mark.parametrize('T, shared, millions', (
    ((), '', 457), ((0.5,), '', 912), ((0.5,), 'shared=ffn+mod', 560), ((0.5,), 'shared=qkv+proj+ffn+mod', 459),
    ((0.5,), 'shared=ffn+mod+proj', 535), ((0.67, 0.33), 'shared=ffn+mod+proj', 612),
    ((0.67, 0.33), '', 1368), ((0.67, 0.33), 'shared=qkv+proj+ffn+mod', 461)))
def test_parameters_of_L2(T, shared, millions, use):
    """Closed form: D = 1024; per block and expert 6 D^2 mod, 3 D^2 qkv, D^2 proj, 8 D^2 ffn and their biases."""
    D, K = 1024, len(T) + 1
    parts = {'mod': 6 * D * D + 6 * D, 'qkv': 3 * D * D + 3 * D, 'proj': D * D + D, 'ffn': 8 * D * D + 5 * D}
    block = sum(size * (1 if part in shared else K) for part, size in parts.items())
    per_scale = (16 * D + D) + (2 * D * D + 2 * D) + (16 * D + 16)
    use(shared)
    with torch.device('meta'):
        count = sum(p.numel() for p in LapFlow(config_in_place(T=T)).parameters())
    assert count == 24 * block + K * per_scale + (256 * D + D) + (D * D + D) and round(count / 1e6) == millions


@pytest.mark.parametrize('changes, word', (
    (dict(T=(0.3, 0.6)), 'decrease'), (dict(T=(0.5, 0.5)), 'decrease'), (dict(T=(1.0,)), 'decrease'),
    (dict(T=(0.0,)), 'decrease'), (dict(T=(math.nan,)), 'decrease'), (dict(size=36), 'divide'),
    (dict(width=18), 'width'), (dict(heads=3), 'heads')))
def test_impossible_settings_are_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        LapFlowConfig(**dict(size=32, patch=2, width=32, heads=4, depth=2, T=(0.5, 0.25)) | changes)


@pytest.mark.parametrize('variant, words', (
    ('mask=dense', ('mask', "'dense'", 'self', 'none')), ('schedule=cosine', ('schedule', "'cosine'", 'gvp', 'cubic')),
    ('shared=mlp', ('shared', "'mlp'", 'qkv')), ('shared=ffn+', ('shared', "''")),
    ('image_tokens=False', ('image_tokens', "'False'")), ('mask', ('mask', 'none')), ('path=gvp', ('path', 'schedule')),
    ('', ('KEY=VALUE', 'mask')), ('mask=none,', ('KEY=VALUE', 'mask'))))
def test_impossible_variants_are_refused_by_name(variant, words):
    with pytest.raises(SystemExit) as end:
        check_variant(variant)
    assert all(word in str(end.value) for word in words) and '\n' not in str(end.value)
