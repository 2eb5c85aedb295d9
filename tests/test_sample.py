"""Alg. 2 against velocities whose solutions are known, and what sample.py makes of a checkpoint."""
import math
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from conftest import finish, load, start_two
from model import LapFlow, LapFlowConfig, laplacian_pyramid, up
from sample import METHODS, generate, labels_of, noise_of, save_grid, to_uint8
from test_model_method import lines

close = partial(assert_close, rtol=0, atol=1e-6)        # times are float32


def network(T, n_classes=5):
    """A small network with random weights."""
    config = LapFlowConfig(size=16, patch=2, width=16, depth=2, heads=2, T=T, n_classes=n_classes)
    model = LapFlow(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model.requires_grad_(False)


class Oracle:
    """Stands in for a network: velocity(x_t, t) gives a dict like x_t. Keeps its calls."""

    def __init__(self, T, velocity):
        self.config = LapFlowConfig(T=T)
        self.velocity = velocity
        self.calls = []

    def __call__(self, x_t, t, y=None):
        t = t[0].double()
        self.calls.append((x_t, t))
        return self.velocity(x_t, t)


# -------------------------------------------------------------------------------------------------
# Algorithm 2


def test_generate_is_algorithm_2_line_by_line():
    """With 8 steps of Euler's method. Segments are 1/4, 1/2 and 1/4 long: they have 2, 4 and 2."""
    model = network((0.75, 0.25))
    y = torch.tensor([1, 4])
    noise = torch.randn(2, 4, 16, 16)

    def odeint(start, end, x):
        for t in np.arange(start, end, 1 / 8):
            v = model(x, torch.full([2], t), y)
            x = {k: x[k] + v[k] / 8 for k in x}
        return x

    x0 = laplacian_pyramid(noise, 3)                                                        # line 2
    x = odeint(0.0, 0.25, {2: x0[2]})                                                       # line 3
    x = odeint(0.25, 0.75, {1: 0.75 * x0[1], **x})                                          # line 4
    x = odeint(0.75, 1.0, {0: 0.25 * x0[0], **x})                                           # line 5
    expected = x[0] + up(x[1]) + up(up(x[2]))                                               # line 6
    drawn, _ = generate(model, noise, y, 'euler', 8)
    assert_close(drawn, expected)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('T', ((), (0.5,), (0.67, 0.33), (0.75, 0.5, 0.25)))
def test_the_true_velocity_leads_through_training_states_to_the_data(T, method):
    """One scale is plain flow matching. The lines are straight, so that every solver is exact."""
    x1, x0 = torch.randn(2, 3, 2, 16, 16).double()
    line = lines(x1, x0, T)

    def velocity(x_t, t):
        v = {}
        for k in x_t:
            state, v[k] = line(k, t)
            close(x_t[k], state)
        return v

    x, _ = generate(Oracle(T, velocity), x0, method=method, steps=8)
    close(x, x1)


# -------------------------------------------------------------------------------------------------
# ODEINT


@pytest.mark.parametrize('method, order', (('euler', 1), ('midpoint', 2), ('heun2', 2), ('rk4', 4)))
def test_twice_the_steps_divide_the_error_by_two_to_the_order(method, order):
    """dx/dt = -2 t x^2, whose solution is x0 / (1 + x0 t^2)."""
    oracle = Oracle((), lambda x_t, t: {0: -2 * t * x_t[0] ** 2})
    x0 = torch.linspace(0.5, 2, 64).double().view(1, 1, 8, 8)
    errors = []
    for steps in (32, 64):
        x, nfe = generate(oracle, x0, method=method, steps=steps)
        assert nfe == steps * order     # so many evaluations these methods need in a step
        error = x - x0 / (1 + x0)
        errors.append(error.abs().max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def swing(x_t, t):
    """dx/dt = x cos 20 t, whose solution is x0 exp(sin(20 t) / 20)."""
    factor = torch.cos(20 * t)
    return {k: factor * x_t[k] for k in x_t}


def test_the_tolerance_is_relative_for_large_states_and_absolute_for_small_ones():
    nfe = []
    for x0, tol in ((1e9, 1e-3), (1e-2, 1e-6), (1e9, 1e-6), (1e6, 1e-6)):
        noise = torch.full((1, 1, 8, 8), x0).double()
        x, n = generate(Oracle((0.5,), swing), noise, tol=tol)
        nfe.append(n)
    loose, small, large, medium = nfe
    assert large == medium
    assert large > 2 * loose
    assert large > 2 * small
    exact = math.exp(math.sin(20) / 20)
    assert (x / x0 - exact).abs().max() < 1e-5


@pytest.mark.parametrize('T, steps, finest', (
    ((0.67, 0.33), 5, [2, 2, 1, 0, 0]),
    ((0.9, 0.5), 4, [2, 2, 1, 1, 0])))
def test_each_segment_has_its_share_of_the_steps_and_at_least_one(T, steps, finest):
    """Its ends are rounded to steps: 0.33 of 5 is 2, 0.67 of 5 is 3. An empty one gets a step."""
    oracle = Oracle(T, swing)
    generate(oracle, torch.randn(1, 1, 8, 8), method='euler', steps=steps)
    assert [min(x_t) for x_t, _ in oracle.calls] == finest


@pytest.mark.parametrize('method', METHODS)
def test_no_solver_asks_outside_its_segment(method):
    """Small velocities make dopri5's first trial reach far. And NFE counts what is asked."""
    oracle = Oracle((0.67, 0.33), lambda x_t, t: {k: x_t[k] / 1000 for k in x_t})
    _, nfe = generate(oracle, torch.randn(2, 1, 8, 8), method=method, steps=9)
    assert nfe == len(oracle.calls)
    times = np.float32(oracle.config.times)
    for x_t, t in oracle.calls:
        k = min(x_t)
        assert times[k + 1] <= t.item() <= times[k]


def test_a_velocity_that_is_not_finite_is_an_error_at_its_time():
    """One number of one scale is enough."""
    def velocity(x_t, t):
        v = swing(x_t, t)
        if t > 0.65:
            v[1][0, 0, 2, 3] = math.inf
        return v

    oracle = Oracle((0.5,), velocity)
    with pytest.raises(FloatingPointError, match='t = 0.700'):
        generate(oracle, torch.randn(2, 1, 8, 8), method='euler', steps=10)


# -------------------------------------------------------------------------------------------------
# Guidance, noise, labels, pixels


@pytest.mark.parametrize('cfg', (0, 1, 1.5))
def test_guidance_acts_on_every_channel_and_a_pair_counts_once(cfg):
    """It is v_null + cfg (v_y - v_null), here in one step of Euler's method from 0 to 1.

    The pair is one evaluation in NFE. (DiT's own code guides the first three channels only.)
    """
    model = network(())
    x0 = torch.randn(2, 4, 16, 16)
    y = torch.tensor([1, 4])
    t = torch.zeros(2)
    v = model({0: x0}, t, y)[0]
    v_null = model({0: x0}, t)[0]
    x, nfe = generate(model, x0, y, 'euler', 1, cfg=cfg)
    assert_close(x, x0 + v_null + cfg * (v - v_null))
    assert nfe == 1


def test_noise_is_standard_normal_and_depends_on_seed_and_number_alone():
    index = range(5, 9)
    shape = (2, 4, 4)
    together = noise_of(3, index, shape)
    alone = [noise_of(3, [i], shape) for i in index]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.isin(together, noise_of(4, index, shape)).any()
    noise = noise_of(0, range(500), shape)
    # Within 5 standard errors, which 1 seed in 900,000 would miss
    assert abs(noise.mean()) < 5 / math.sqrt(16_000)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / 16_000)


def test_samples_go_through_the_classes_in_turn():
    assert labels_of(range(4, 9), [7, 2, 3]).tolist() == [2, 3, 7, 2, 3]


def test_pixels_are_rounded_and_clipped():
    grey = torch.tensor([-300, 0, 0.4, 0.6, 255, 300])
    x = grey / 127.5 - 1
    pixels = to_uint8(x.view(1, 6, 1, 1))
    assert pixels.tolist() == [[[[0, 0, 0, 1, 255, 255]]]]


@pytest.mark.parametrize('channels', (1, 3))
def test_a_grid_has_ten_images_to_a_row_and_black_after_the_last(channels, tmp_path):
    images = np.random.default_rng(0).integers(1, 256, (23, 4, 5, channels), np.uint8)
    save_grid(tmp_path / 'grid.png', images)
    picture = np.asarray(Image.open(tmp_path / 'grid.png'))
    rows = picture.reshape(3, 4, 10, 5, channels)
    for i in range(30):
        cell = rows[i // 10, :, i % 10]
        expected = images[i] if i < 23 else 0 * cell
        assert np.array_equal(cell, expected)


# -------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture
def draw(run, trained, tmp_path):
    """draw('--key=value', ...) -> the arrays of an .npz of samples, and what was printed."""
    def draw(*args):
        defaults = f'--ckpt={trained}/ckpt.pt', '--num_samples=12', '--device=cpu'
        printed, message = run('sample.py', *defaults, f'--out={tmp_path}/x.npz', *args)
        assert message == ''
        with np.load(tmp_path / 'x.npz') as arrays:
            return dict(arrays), printed

    return draw


def grey_levels(a, b):
    """The largest difference."""
    return np.abs(a.astype(int) - b).max()


@pytest.mark.parametrize('args, solver, words', (
    ([], ('euler', 4, 0, 2), 'euler, 4 steps, NFE 4.0'),
    (['--method=dopri5', '--tol=0.1', '--cfg=1'], ('dopri5', 0, 0.1, 1), 'dopri5, tol 0.1, NFE')))
def test_samples_are_the_emas_by_the_checkpoints_solver_unless_told(args, solver, words, trained,
                                                                    draw):
    checkpoint = load(trained)
    model = LapFlow(LapFlowConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['ema'])
    noise = noise_of(3, range(12), (1, 32, 32))
    y = torch.arange(12) % 10
    x, _ = generate(model, noise, y, *solver)
    arrays, printed = draw('--seed=3', *args)
    assert grey_levels(arrays['arr_0'], to_uint8(x)) <= 1
    assert np.array_equal(arrays['arr_1'], y)
    assert f'12 samples, {words}' in printed.splitlines()[-1]


def test_batches_and_processes_change_no_pixel_by_more_than_a_grey_level(workplace, trained, draw):
    whole, _ = draw('--num_samples=7')
    apart, _ = draw('--num_samples=7', '--batch_size=1')
    args = f'--ckpt={trained}/ckpt.pt', '--num_samples=7', '--batch_size=2', '--device=cpu'
    finish(*start_two(workplace, 'sample.py', *args, '--out=two.npz'))
    for other in (apart, np.load(workplace / 'two.npz')):
        assert grey_levels(whole['arr_0'], other['arr_0']) <= 1
        assert other['arr_1'].tolist() == list(range(7))
    assert not list(workplace.glob('*.npy'))


def test_every_form_of_output_has_the_same_images(draw, trained, run, tmp_path):
    """Without --out they are beside the checkpoint. A folder that holds something is left alone."""
    arrays, _ = draw()
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    args = f'--ckpt={tmp_path}/ckpt.pt', '--num_samples=12', '--device=cpu'
    out = f'--out={tmp_path}/folder/'
    assert run('sample.py', *args)[1] == ''
    assert run('sample.py', *args, out)[1] == ''
    save_grid(tmp_path / 'grid.png', arrays['arr_0'])
    grid = (tmp_path / 'grid.png').read_bytes()
    assert grid == (tmp_path / 'samples.png').read_bytes()
    files = sorted(os.listdir(tmp_path / 'folder'))
    assert files == [f'{i:06}.png' for i in range(12)]
    for file, image in zip(files, arrays['arr_0']):
        picture = np.asarray(Image.open(tmp_path / 'folder' / file))
        assert np.array_equal(picture, image[:, :, 0])
    assert 'folder/ is not empty' in run('sample.py', *args, out)[1]


@pytest.mark.parametrize('cls, label', (('cat', 0), ('2', 1), ('3', 3)))
def test_a_class_is_given_by_its_name_or_else_by_its_number(cls, label, trained, draw, tmp_path):
    checkpoint = load(trained)
    checkpoint['data']['classes'] = ['cat', '2', *'bcdefghi']
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    named, _ = draw(f'--ckpt={tmp_path}/ckpt.pt', f'--cls={cls}')
    numbered, _ = draw(f'--cls={label}')
    assert named['arr_1'].tolist() == [label] * 12
    assert np.array_equal(named['arr_0'], numbered['arr_0'])


@pytest.mark.parametrize('classes, y', (([], None), (['one'], torch.zeros(12).long())))
def test_latents_are_decoded_by_the_vae_where_it_is_now(classes, y, trained, vae_folder, draw,
                                                        tmp_path):
    """By hand that is vae.decode(latents / scaling factor). Without classes there are no labels."""
    from diffusers import AutoencoderKL
    model = network((0.5,), len(classes))
    checkpoint = load(trained)
    checkpoint['ema'] = None
    checkpoint['model'] = model.state_dict()
    checkpoint['model_args'] = vars(model.config)
    checkpoint['data'] = dict(size=16, channels=4, image_size=32, classes=classes, vae='gone',
                              scaling_factor=0.7)
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    arrays, _ = draw(f'--ckpt={tmp_path}/ckpt.pt', f'--vae={vae_folder}', '--cfg=1')
    x, _ = generate(model, noise_of(0, range(12), (4, 16, 16)), y, 'euler', 4)
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    pixels = vae.decode(x / 0.7).sample.detach() * 127.5 + 127.5
    pixels = pixels.clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert ('arr_1' in arrays) == (y is not None)
    assert grey_levels(arrays['arr_0'], pixels) <= 1


@pytest.mark.parametrize('method', ('euler', 'dopri5'))
def test_bfloat16_is_for_solvers_with_fixed_steps(method, draw):
    """dopri5 stays in float32, because its step control would chase the rounding."""
    args = f'--method={method}', '--tol=0.1'
    full, _ = draw(*args)
    half, _ = draw(*args, '--dtype=bfloat16')
    equal = np.array_equal(full['arr_0'], half['arr_0'])
    assert equal == (method == 'dopri5')
    assert grey_levels(full['arr_0'], half['arr_0']) < 30


@pytest.mark.parametrize('arg, words', (
    ('--vae=somewhere', 'it has no VAE'),
    ('--ckpt=undropped.pt', 'train with label_drop, or --cfg=1'),
    ('--cls=10', 'number below 10'), ('--cls=cat', 'name of a class'),
    ('--num_samples=0', 'at least 1'), ('--batch_size=0', 'at least 1'),
    ('--steps=0', 'at least 1'), ('--tol=0', 'tol must be more than 0'),
    ('--method=bosh3', "one of ('dopri5', 'euler', 'midpoint', 'heun2', 'rk4')"),
    ('--out=x.jpg', 'NAME.png, NAME.npz or NAME/'),
    ('--out=folder.png', 'folder.png is a folder')))
def test_what_cannot_be_drawn_ends_with_a_sentence(arg, words, trained, workplace, run):
    (workplace / 'folder.png').mkdir(exist_ok=True)
    checkpoint = load(trained)
    checkpoint['config']['label_drop'] = 0.0
    torch.save(checkpoint, workplace / 'undropped.pt')
    _, message = run('sample.py', f'--ckpt={trained}/ckpt.pt', '--out=bad.png', arg)
    assert words in message and '\n' not in message
    assert not (workplace / 'bad.png').exists()
