"""Alg. 1 as train.py runs it: against a loop over single images, formulas, and itself."""
import itertools
import math
import os
import runpy
import shutil
import signal
import time

import numpy as np
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

import model
from conftest import (ROOT, TINY, assert_same_run, finish, load, rows_of, run_in, same,
                      start_two)
from data import make_digits, training_order
from model import LapFlow, LapFlowConfig, multiscale_loss
from test_data import write_dataset
from test_model_method import lines


@pytest.fixture
def train(run, tmp_path):
    """train('--key=value', ...) runs TINY in tmp_path, which ends well -> what it printed."""
    def train(*args):
        printed, message = run('train.py', *TINY, f'--out_dir={tmp_path}', *args)
        assert message == ''
        return printed

    return train


# -------------------------------------------------------------------------------------------------
# Algorithm 1, on latents: with labels, mirror images and the noise of the VAE's posterior


@pytest.fixture(scope='module')
def latents(tmp_path_factory, vae_folder):
    """A dataset of random latents in two classes."""
    folder = tmp_path_factory.mktemp('train') / 'latents'
    rows = np.random.default_rng(0).random((40, 2, 8, 16, 16))
    write_dataset(folder, rows.astype(np.float16), np.arange(40) % 2, size=16, channels=4,
                  image_size=32, heldout=10, flips=2, vae=vae_folder, scaling_factor=0.7)
    return folder


@pytest.fixture(scope='module')
def stepped(latents, workplace):
    """Three iterations: what train.py has defined, and the checkpoint after each."""
    names = {}
    settings = ('--T=0.67,0.33', '--patch=2', '--loss_weights=1,2,3', '--label_drop=0.2',
                '--weight_decay=0.1', '--beta1=0.8', '--beta2=0.9', '--grad_clip=0.5',
                '--ema_decay=0.2', '--max_iters=3', '--snapshot_interval=1', '--eval_images=8')
    message = run_in(workplace, 'train.py', *TINY, *settings, f'--dataset={latents}',
                     '--out_dir=out-stepped', names=names)
    assert message == ''
    checkpoints = [torch.load(workplace / f'out-stepped/ckpt-{i}.pt') for i in (1, 2, 3)]
    return names, checkpoints


def network_of(checkpoint, weights):
    network = LapFlow(LapFlowConfig(**checkpoint['model_args']))
    network.load_state_dict(weights)
    return network.double()


def algorithm_1(network, dataset, index, draws):
    """Lines 5 to 9, image by image: a list of {k: mean squared error of scale k}."""
    K, times = network.config.K, network.config.times
    errors = []
    for place, i in enumerate(index):
        draw = {name: torch.as_tensor(draws[name])[place].double() for name in draws}
        row = torch.tensor(dataset.array[i, int(draw['flip'])]).double()
        mean, std = row.chunk(2)
        x1 = 0.7 * (mean + std * draw['eps'])
        line = lines(x1[None], draw['noise'][None], network.config.T)               # line 5
        s = place * K // len(index)
        t = times[s + 1] + (1 - times[s + 1]) * draw['uniform']                     # line 6
        y = 2 if draw['drop'] else dataset.labels[i]
        x_t, u_t = {}, {}
        for k in range(s, K):
            x_t[k], u_t[k] = line(k, t)                                             # lines 7, 8
        v_t = network(x_t, t[None], torch.tensor([y]))                              # line 9
        errors.append({k: (v_t[k] - u_t[k]).square().mean() for k in u_t})
    return errors


def test_an_iteration_is_algorithm_1_image_by_image(stepped, workplace):
    """The second one: its loss, and its gradient, which AdamW's first moment tells, clipped.

    random_draws takes how many images, 0 for training or 1 for evaluation, and the iteration.
    """
    names, (before, after, _) = stepped
    network = network_of(before, before['model'])
    index = training_order(12, 12, 30, 0)
    errors = algorithm_1(network, names['data'], index, names['random_draws'](12, 0, 1))
    loss = sum((k + 1) * error[k] for error in errors for k in error) / 12          # line 10
    gradient = torch.autograd.grad(loss, list(network.parameters()))                # line 11
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    row = rows_of(workplace / 'out-stepped')[2]
    assert float(row[1]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(row[3]) == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.5       # so it is clipped
    for i, g in enumerate(gradient):
        old = before['optimizer']['state'][i]['exp_avg']
        new = after['optimizer']['state'][i]['exp_avg']
        expected = 0.8 * old + 0.2 * g * 0.5 / norm
        assert_close(new.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_ema_is_its_formula(stepped):
    """The decay at iteration i is ema_decay, here 0.2, but at most (1 + i) / (10 + i).

    It starts at the weights that the model has at first, those of seed 0.
    """
    _, checkpoints = stepped
    torch.manual_seed(0)
    ema = LapFlow(LapFlowConfig(**checkpoints[0]['model_args'])).state_dict()
    for checkpoint, decay in zip(checkpoints, (2 / 11, 0.2, 0.2)):
        for name, weight in checkpoint['model'].items():
            ema[name] = decay * ema[name] + (1 - decay) * weight
        assert_close(checkpoint['ema'], ema)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(train, tmp_path):
    train('--max_iters=8', '--warmup_iters=3', '--min_lr=2e-5')
    rates = [float(row[2]) for row in rows_of(tmp_path)[1:]]
    expected = [2.5e-3, 5e-3, 7.5e-3]
    for i in range(5):
        cosine = math.cos(math.pi * i / 5)
        expected.append(2e-5 + (1e-2 - 2e-5) * (1 + cosine) / 2)
    assert rates == pytest.approx(expected)


def test_random_draws_depend_on_seed_and_iteration_alone(stepped, monkeypatch):
    """And follow their laws: 1 seed in 70,000 would miss a bound, of 5 standard errors."""
    draw = stepped[0]['random_draws']
    first, again = draw(2000, 0, 5), draw(2000, 0, 5)
    others = [draw(2000, 0, 6), draw(2000, 1)]
    monkeypatch.setitem(draw.__globals__, 'seed', 1)
    others.append(draw(2000, 0, 5))
    for name, value in first.items():
        assert np.array_equal(value, again[name])
        for other in others:
            assert not np.array_equal(value, other[name])
    normal = torch.stack([first['noise'], first['eps']])
    n = normal[0].numel()
    assert abs(normal.mean()) < 5 / math.sqrt(2 * n)
    assert abs(normal.var() - 1) < 5 * math.sqrt(2 / (2 * n))
    assert abs(normal.prod(0).mean()) < 5 / math.sqrt(n)        # the two are independent
    assert scipy.stats.kstest(first['uniform'], 'uniform').pvalue > 1e-5
    for name, p in dict(drop=0.2, flip=0.5).items():
        assert abs(sum(first[name]) - 2000 * p) < 5 * math.sqrt(2000 * p * (1 - p))


# -------------------------------------------------------------------------------------------------
# Processes, parts of a batch, precision


def assert_alike(out_dir, other):
    """Two runs have the same logs and weights, but for rounding."""
    for row, of_other in zip(rows_of(out_dir)[1:], rows_of(other)[1:], strict=True):
        numbers = [float(number or 0) for number in row]
        assert numbers == pytest.approx([float(number or 0) for number in of_other], abs=1e-5)
    weights = load(out_dir)['model']
    assert_close(load(other)['model'], weights, rtol=0, atol=2e-4)  # AdamW divides by small numbers


def test_two_processes_of_two_micro_batches_are_one_process(workplace, run):
    """Also in evaluation, whose 25 images they share."""
    args = *TINY, '--eval_images=25', '--ema_decay=0.5'
    assert run('train.py', *args, '--out_dir=out-one')[1] == ''
    finish(*start_two(workplace, 'train.py', *args, '--gradient_accumulation_steps=2',
                      '--out_dir=out-two'))
    assert_alike(workplace / 'out-one', workplace / 'out-two')


def test_without_a_compiler_one_is_told_to_leave_it_out(run, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no-compiler')
    _, message = run('train.py', *TINY, '--compile=True', f'--out_dir={tmp_path}')
    assert 'needs a C++ compiler' in message and '--compile=False' in message


ANNOUNCE = """
import torch
_compile = torch.nn.Module.compile
def _announce(module, **options):
    print('compiles a', type(module).__name__)
    _compile(module, **options)
torch.nn.Module.compile = _announce
"""


@pytest.mark.skipif(not shutil.which('c++'), reason='needs a C++ compiler')
def test_compiled_blocks_in_two_processes_train_the_same_weights(workplace, trained, tmp_path):
    """The config file, which is run, announces what is compiled: the two blocks of process 0.

    Process 1 compiles, too, but its output is silenced.
    """
    (tmp_path / 'announce.py').write_text(ANNOUNCE)
    printed = finish(*start_two(workplace, 'train.py', *TINY, f'{tmp_path}/announce.py',
                                '--compile=True', '--out_dir=out-compiled'))
    assert printed.count('compiles a MoTBlock') == 2
    assert_alike(trained, workplace / 'out-compiled')


def test_bfloat16_is_of_products_alone(trained, train, tmp_path):
    """It has 8 bits, so that losses change by less than 1%. What is kept stays float32."""
    train('--dtype=bfloat16')
    for row, rounded in zip(rows_of(trained)[2:], rows_of(tmp_path)[2:]):  # at first v is 0
        assert 0 < abs(float(rounded[1]) / float(row[1]) - 1) < 0.01
    checkpoint = load(tmp_path)
    moments = checkpoint['optimizer']['state'][0]
    for kept in (checkpoint['model'], checkpoint['ema'], moments):
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


# -------------------------------------------------------------------------------------------------
# Runs that stop and go on


def test_a_finished_run_changes_nothing(train, tmp_path):
    train()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    train()
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


def test_snapshots_are_kept_and_go_on_as_the_last_checkpoint_does(trained, train, tmp_path):
    train('--log_interval=5', '--snapshot_interval=2')
    assert_same_run(tmp_path, trained)
    snapshots = sorted(tmp_path.glob('ckpt-*.pt'))
    assert [file.name for file in snapshots] == ['ckpt-2.pt', 'ckpt-4.pt', 'ckpt-6.pt']
    shutil.copy(snapshots[1], tmp_path / 'ckpt.pt')
    assert 'at 4 of 6 iterations' in train()
    assert_same_run(tmp_path, trained)


def test_a_resumed_run_takes_new_settings_of_the_optimizer(trained, train, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    train('--max_iters=7', '--beta1=0.8', '--beta2=0.9', '--weight_decay=0.5',
          '--learning_rate=1e-3', '--min_lr=1e-3')
    optimizer = load(tmp_path)['optimizer']
    group = optimizer['param_groups'][0]
    assert (group['betas'], group['weight_decay'], group['lr']) == ((0.8, 0.9), 0.5, 1e-3)
    assert optimizer['state'][0]['step'] == 7


def test_an_ema_that_is_new_in_a_resumed_run_starts_at_the_weights(trained, train, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    train('--max_iters=7', '--ema_decay=0')
    before = load(tmp_path)
    assert before['ema'] is None
    train('--max_iters=8', '--ema_decay=0.5')
    after = load(tmp_path)
    for name, weight in after['model'].items():
        assert_close(after['ema'][name], (before['model'][name] + weight) / 2)


@pytest.mark.parametrize('part, key, value, words', (
    ('model_args', 'width', 64, 'width is 64 there and 32 here'),
    ('model_args', 'patch', None, 'patch is 2 there and 4 here'),
    ('model_args', 'size', None, ''),
    ('data', 'heldout', 7, 'heldout is 7 there and 60 here'),
    ('data', 'classes', list('abcdefghij'), "classes is ['a', "),
    ('data', 'count', None, ''), ('data', 'source', 'moved', ''), ('data', 'vae', 'moved', '')))
def test_a_run_goes_on_with_its_own_settings_and_data(part, key, value, words, trained, run,
                                                      tmp_path):
    """Pictures and VAE may have moved. A setting that is not there, None, has its default."""
    checkpoint = load(trained)
    checkpoint[part][key] = value
    if value is None:
        del checkpoint[part][key]
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    _, message = run('train.py', *TINY, f'--out_dir={tmp_path}', '--max_iters=7')
    assert words in message and '\n' not in message
    assert load(tmp_path)['iter_num'] == (6 if words else 7)


# -------------------------------------------------------------------------------------------------
# Evaluation and the log


def test_errors_are_those_of_the_ema_on_held_out_images(stepped, workplace):
    """The first eval_images, here 30 to 37, always with the same noise, times and labels."""
    names, (_, _, last) = stepped
    network = network_of(last, last['ema'])
    errors = algorithm_1(network, names['data'], range(30, 38), names['random_draws'](8, 1))
    row = rows_of(workplace / 'out-stepped')[3]
    for k in (0, 1, 2):
        of_scale = [error[k].item() for error in errors if k in error]
        assert float(row[4 + k]) == pytest.approx(np.mean(of_scale), rel=1e-5)


def test_without_held_out_images_the_errors_are_of_training_images_and_named_so(train, tmp_path):
    make_digits(f'{tmp_path}/all', train=30, heldout=0)
    train('--max_iters=1', f'--dataset={tmp_path}/all')
    head, row = rows_of(tmp_path)
    assert head[-2:] == ['training_0', 'training_1']
    assert float(row[-2]) > 0 and float(row[-1]) > 0


def test_no_batch_of_an_evaluation_is_larger_than_those_of_training(train, monkeypatch):
    sizes = set()

    def measured(v, u, weights, B):
        sizes.add(B)
        return multiscale_loss(v, u, weights, B)

    monkeypatch.setattr(model, 'multiscale_loss', measured)
    train('--gradient_accumulation_steps=3', '--eval_images=25')
    assert max(sizes) == 4


def test_samples_png_is_what_sample_py_draws(trained, run, tmp_path):
    args = f'--ckpt={trained}/ckpt.pt', '--num_samples=12', f'--out={tmp_path}/x.png'
    assert run('sample.py', *args, '--device=cpu')[1] == ''
    assert (tmp_path / 'x.png').read_bytes() == (trained / 'samples.png').read_bytes()


def test_the_log_has_rows_for_log_steps_and_evaluations(train, tmp_path, monkeypatch):
    """Here 600 seconds pass from one look at the clock to the next, one look for each row.

    So two iterations of 12 images are 0.04 images/s.
    """
    clock = itertools.count(0, 600)
    monkeypatch.setattr(time, 'time', lambda: next(clock))
    printed = train('--log_interval=2', '--max_iters=5')
    assert '15 minutes left' in printed and '20 minutes left' in printed
    lines = (tmp_path / 'log.csv').read_text().splitlines()
    assert lines[0] == 'iter,loss,lr,grad_norm,images_per_s,heldout_0,heldout_1'
    rows = [line.split(',') for line in lines[1:]]
    assert [row[0] for row in rows] == ['2', '3', '4', '5']
    assert [row[4] for row in rows] == ['0.04', '0.02', '0.02', '0.02']
    assert [row[5] > '' for row in rows] == [False, True, False, True]


def test_a_run_from_the_start_begins_its_log_anew(trained, train, tmp_path):
    """One that goes on gives a lost log its head again."""
    (tmp_path / 'log.csv').write_text('of another run\n')
    train()
    assert rows_of(tmp_path) == rows_of(trained)
    os.remove(tmp_path / 'log.csv')
    train('--max_iters=7')
    head, row = rows_of(tmp_path)
    assert head == rows_of(trained)[0] and row[0] == '7'


# -------------------------------------------------------------------------------------------------
# Gradients that are not finite


@pytest.fixture
def spoil(monkeypatch):
    """spoil('loss', iterations): in these, from 1, of the next run the loss is not a number.

    spoil('gradient', iterations) leaves the loss as it is and makes its gradient infinite.
    """
    def spoil(what, iterations):
        count = itertools.count(1)

        def spoilt(*args):
            loss, errors = multiscale_loss(*args)
            if torch.is_grad_enabled() and next(count) in iterations:
                if what == 'loss':
                    loss = loss * math.nan
                else:
                    loss.register_hook(lambda gradient: gradient * math.inf)
            return loss, errors

        monkeypatch.setattr(model, 'multiscale_loss', spoilt)

    return spoil


@pytest.mark.parametrize('what', ('loss', 'gradient'))
@pytest.mark.parametrize('clip', (0.0, 1.0))
def test_a_gradient_that_is_not_finite_skips_its_update_alone(what, clip, train, tmp_path, spoil):
    """Weights, moments and counts of steps stay, bit for bit."""
    spoil(what, [3])
    printed = train(f'--grad_clip={clip}', '--weight_decay=0.1', '--snapshot_interval=1')
    assert printed.count('skipped 1 updates') == 1
    before, spoilt, after = [torch.load(tmp_path / f'ckpt-{i}.pt') for i in (2, 3, 4)]
    assert same(before['model'], spoilt['model'])
    assert same(before['optimizer']['state'], spoilt['optimizer']['state'])
    assert not same(after['model'], spoilt['model'])


def test_twenty_in_a_row_end_the_run_and_nineteen_do_not(train, run, tmp_path, spoil):
    args = '--eval_interval=80', '--sample_images=1'
    spoil('gradient', [*range(1, 20), *range(21, 40)])
    train(*args, '--max_iters=40')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    spoil('gradient', range(1, 21))
    _, message = run('train.py', *TINY, f'--out_dir={tmp_path}', *args, '--max_iters=80')
    assert '20 gradients in a row are not finite' in message and '\n' not in message
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('iterations, held, stop', (
    ([3], [6], None), ([5, 6], [3], None), ([6], [3, 6], None), ([4], [3, 4], 4)))
def test_a_loss_that_is_not_finite_replaces_no_checkpoint(iterations, held, stop, train, spoil,
                                                          during):
    """Unless it is that of the last iteration alone, which may be chance: else all would be lost.

    A loss of NaN may mean that the weights are broken. Only where the run ends, at 6 or by the
    SIGTERM that comes in iteration `stop`, is it saved after one such loss. The loss is not finite
    in `iterations`; evaluations are after 3 and 6; `held` are those that are saved.
    """
    spoil('loss', iterations)
    if stop:
        during(stop, lambda: signal.raise_signal(signal.SIGTERM))
    printed = train()
    assert [i for i in range(7) if f'ckpt.pt holds iteration {i}' in printed] == held
    assert printed.count('is not written') == 2 - len(held)


# -------------------------------------------------------------------------------------------------
# How a run begins, and that it learns


def test_a_run_begins_with_the_weights_that_fit_of_another(trained, latents, train, tmp_path):
    """Those of its EMA. With other channels and classes the rest is new, and named.

    Of each of the two scales that is a weight of the input, and weight and bias of the output.
    And there are the labels.
    """
    printed = train(f'--init_from={trained}/ckpt.pt', f'--dataset={latents}', '--max_iters=1',
                    '--learning_rate=0', '--min_lr=0')
    assert '2 scales, the finest of 16, 30 images, 1 process(es) on cpu, float32' in printed
    old, own = load(trained)['ema'], load(tmp_path)['model']
    new = [name for name in own if own[name].shape != old[name].shape]
    assert len(new) == 7 and f'these are new: {new}' in printed
    for name in own.keys() - new:
        assert torch.equal(own[name], old[name])


def test_weights_alone_are_begun_with_but_not_gone_on_with(trained, train, run, tmp_path):
    checkpoint = load(trained)
    del checkpoint['optimizer']
    torch.save(checkpoint | dict(ema=None), tmp_path / 'ckpt.pt')
    _, message = run('train.py', *TINY, f'--out_dir={tmp_path}')
    assert 'has only weights' in message
    os.rename(tmp_path / 'ckpt.pt', tmp_path / 'weights.pt')
    args = f'--init_from={tmp_path}/weights.pt', '--learning_rate=0', '--min_lr=0'
    assert 'new: none' in train(*args, '--max_iters=1')
    assert same(load(tmp_path)['model'], checkpoint['model'])
    os.remove(tmp_path / 'weights.pt')
    assert 'weights are from' not in train(*args, '--max_iters=2')     # it has its own by now


TABLE_6 = {
    'celebahq256': (1024, 24, (0.5,), 256, 2e-4, 1e-6, 500, 0),
    'celebahq512': (1024, 24, (0.67, 0.33), 256, 2e-4, 1e-6, 1000, 0),
    'celebahq1024': (1024, 24, (0.67, 0.33), 128, 2e-4, 1e-6, 2000, 0),
    'imagenet256_b2': (768, 12, (0.5,), 256, 1e-4, 1e-4, 1400, 0.9999),
    'imagenet256_xl2': (1152, 28, (0.5,), 256, 1e-4, 1e-4, 120, 0.9999)}


@pytest.mark.parametrize('config', TABLE_6)
def test_the_papers_configs_are_table_6(config):
    """Width and depth are those of DiT-L, B and XL. All have patches of 2."""
    width, depth, T, batch_size, rate, last, epochs, ema = TABLE_6[config]
    found = runpy.run_path(f'{ROOT}/config/{config}.py')
    assert (found['patch'], found['width'], found['depth'], found['T']) == (2, width, depth, T)
    assert (found['learning_rate'], found['min_lr'], found['ema_decay']) == (rate, last, ema)
    images = 30_000 if 'celeba' in config else 1_281_167
    assert found['batch_size'] == batch_size
    assert found['max_iters'] == pytest.approx(epochs * images / batch_size, rel=1e-3)


@pytest.mark.parametrize('config', TABLE_6)
def test_the_papers_configs_train_and_draw(config, latents, run, tmp_path):
    """But narrow."""
    args = ('--width=32', '--depth=1', '--heads=2', '--batch_size=12', '--max_iters=1',
            '--sample_images=1', '--compile=False', '--device=cpu')
    assert run('train.py', f'config/{config}.py', *args, f'--dataset={latents}',
               f'--out_dir={tmp_path}')[1] == ''
    assert run('sample.py', f'--ckpt={tmp_path}/ckpt.pt', '--num_samples=1')[1] == ''


def test_the_digits_config_learns(run, tmp_path):
    """The best velocity that ignores state and label is the mean over images at each pixel.

    Its errors on 8,000 digits, with T = 0.4, were 0.88 and 0.50.
    """
    args = '--width=32', '--depth=2', '--heads=2', '--batch_size=32', '--device=cpu'
    assert run('train.py', 'config/digits.py', *args, '--max_iters=60', '--warmup_iters=10',
               '--sample_images=10', f'--out_dir={tmp_path}')[1] == ''
    last = rows_of(tmp_path)[-1]
    assert float(last[-2]) < 0.7 and float(last[-1]) < 0.45
