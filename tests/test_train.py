"""train.py and sample.py as a user runs them, on a small copy of the digits."""
import csv
import os
import shutil
import time

import numpy as np
import pytest
import torch
import torchdiffeq
from PIL import Image

import baselines
import model as lapflow
import sample as sampler
from conftest import TINY, finish, start_two, started
from data import Dataset, make_digits, training_order
from model import LapFlow, LapFlowConfig


def load(folder, name='ckpt.pt'):
    return torch.load(os.path.join(folder, name), weights_only=True)


def same(a, b, **tolerance):
    """Whether two nested structures of tensors and plain values are equal, bit for bit unless a tolerance is given."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], **tolerance) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, **tolerance) for x, y in zip(a, b))
    return a == b


def losses(folder):
    with open(os.path.join(folder, 'log.csv')) as f:
        return [{key: row[key] for key in row if key != 'images_per_s'} for row in csv.DictReader(f)]


def same_but_for_rounding(one, other):
    """Asserts it of the logs and weights of two runs."""
    assert len(losses(one)) == len(losses(other))
    for a, b in zip(losses(one), losses(other)):
        for key in a:
            assert a[key] == b[key] or abs(float(a[key]) - float(b[key])) < 1e-5, key
    # Adam divides by small gradients
    assert same(load(one)['model'], load(other)['model'], rtol=0, atol=2e-4)


def test_a_run_leaves_a_checkpoint_a_log_and_a_picture(trained):
    checkpoint = load(trained)
    assert checkpoint['iter_num'] == 6 and checkpoint['data']['source'] == 'digits'
    assert checkpoint['model_args']['n_classes'] == 10 and checkpoint['config']['learning_rate'] == 1e-2
    rows = losses(trained)
    assert [int(row['iter']) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row['heldout_0'] and row['heldout_1']) for row in rows] == [False, False, True, False, False, True]
    assert all(np.isfinite(float(row['loss'])) for row in rows)
    assert Image.open(trained / 'samples.png').size == (320, 64)


def test_a_killed_run_resumes_bit_for_bit(trained, workplace, run):
    """
    kill -9 as soon as there is a checkpoint, then the same command: weights, EMA, optimizer and log of a run never
    stopped.
    """
    with started(workplace, 'train.py', *TINY, '--out_dir=out-killed') as job:
        while not os.path.exists(workplace / 'out-killed' / 'ckpt.pt'):
            assert job.poll() is None, job.communicate()
            time.sleep(0.001)
    assert load(workplace / 'out-killed')['iter_num'] == 3
    with open(workplace / 'out-killed' / 'log.csv', 'a') as f:
        f.write('4,9,9,9,9,,\n')     # as if it had come to log more before the end
    printed, message = run('train.py', *TINY, '--out_dir=out-killed')
    assert 'resuming' in printed and message == ''
    whole, resumed = load(trained), load(workplace / 'out-killed')
    assert all(same(whole[key], resumed[key]) for key in ('model', 'ema', 'optimizer', 'iter_num', 'data'))
    assert losses(trained) == losses(workplace / 'out-killed')
    assert not same(whole['ema'], whole['model'])


def test_a_run_of_more_than_a_million_iterations_resumes(trained, run, tmp_path):
    """Its log is in the checkpoint, and its iterations are whole numbers: 1e+06 is not."""
    torch.save(load(trained) | dict(iter_num=1_000_000, log=[]), tmp_path / 'ckpt.pt')
    for last in (1_000_002, 1_000_004):
        _, message = run('train.py', *TINY, f'--out_dir={tmp_path}', f'--max_iters={last}')
        assert message == '' and load(tmp_path)['iter_num'] == last
    assert [row['iter'] for row in losses(tmp_path)] == ['1000001', '1000002', '1000003', '1000004']


def test_a_lost_log_is_written_anew_from_the_checkpoint(trained, run, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    assert run('train.py', *TINY, f'--out_dir={tmp_path}', '--max_iters=7')[1] == ''
    assert losses(tmp_path)[:6] == losses(trained) and len(losses(tmp_path)) == 7
    assert len(load(tmp_path)['log']) == 7


def test_a_resumed_run_takes_the_new_settings_of_the_optimizer(trained, run, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    new = ('--beta1=0.8', '--beta2=0.9', '--weight_decay=0.5', '--learning_rate=1e-3', '--min_lr=1e-3')
    printed, message = run('train.py', *TINY, f'--out_dir={tmp_path}', '--max_iters=8', '--eval_interval=1', *new)
    assert message == '' and 'weight_decay is 0.0 there and 0.5 here' in printed
    group, = load(tmp_path)['optimizer']['param_groups']
    assert (group['betas'], group['weight_decay'], group['lr']) == ((0.8, 0.9), 0.5, 1e-3)
    whole, resumed = load(trained), load(tmp_path)
    moment = whole['optimizer']['state'][0]['exp_avg_sq']
    assert not same(moment, resumed['optimizer']['state'][0]['exp_avg_sq'])     # and goes on from the old moments
    assert resumed['optimizer']['state'][0]['step'] == 8


def test_an_ema_that_is_new_in_a_resumed_run_starts_at_the_weights(trained, run, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    assert run('train.py', *TINY, f'--out_dir={tmp_path}', '--max_iters=7', '--ema_decay=0')[1] == ''
    without = load(tmp_path)
    assert without['ema'] is None
    assert run('train.py', *TINY, f'--out_dir={tmp_path}', '--max_iters=8', '--ema_decay=0.5')[1] == ''
    resumed = load(tmp_path)
    middle = {name: (without['model'][name] + resumed['model'][name]) / 2 for name in resumed['model']}
    assert same(resumed['ema'], middle, rtol=0, atol=1e-6)


def test_a_checkpoint_from_before_a_setting_was_added_is_taken_with_its_default(trained, run, tmp_path):
    checkpoint = load(trained)
    del checkpoint['model_args']['path'], checkpoint['model_args']['shared']
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    for folder in (tmp_path, trained):
        sample(run, folder, f'{tmp_path}/{folder.name}.npz', '--num_samples=2')
    old, new = (np.load(f'{tmp_path}/{folder.name}.npz')['arr_0'] for folder in (tmp_path, trained))
    assert np.array_equal(old, new)
    args = [*TINY, f'--out_dir={tmp_path}', '--max_iters=7']
    assert 'path' in run('train.py', *args, '--path=gvp')[1]
    assert run('train.py', *args)[1] == '' and load(tmp_path)['iter_num'] == 7
    assert load(tmp_path)['model_args']['path'] == 'linear'


def test_a_device_may_be_named_as_on_other_scripts(trained, run, tmp_path):
    _, message = run('sample.py', '--ckpt', str(trained / 'ckpt.pt'), '--device=auto', '--num_samples=1',
                     f'--out={tmp_path}/x.png')
    assert message == '' and (tmp_path / 'x.png').exists()


def test_a_finished_run_says_so_and_changes_nothing(trained, run):
    before = {name: (trained / name).read_bytes() for name in os.listdir(trained)}
    printed, message = run('train.py', *TINY, '--out_dir=out-whole')
    assert 'finished: 6 iterations' in printed and message == ''
    assert {name: (trained / name).read_bytes() for name in os.listdir(trained)} == before


@pytest.mark.parametrize('how', ('two processes', 'two accumulation steps'))
def test_processes_and_accumulation_change_nothing_but_rounding(how, trained, workplace, run):
    out = f'out-{how.replace(" ", "-")}'
    if how == 'two processes':
        finish(*start_two(workplace, 'train.py', *TINY, f'--out_dir={out}'))
    else:
        assert run('train.py', *TINY, f'--out_dir={out}', '--gradient_accumulation_steps=2')[1] == ''
    same_but_for_rounding(trained, workplace / out)


@pytest.mark.parametrize('changes', (
    ('--T=0.67,0.33', '--patch=2', '--loss_weights=1,2,3'),
    ('--T=()', '--mask=none', '--ema_decay=0.0'),
    ('--T=0.67,0.33', '--patch=2', '--image_tokens=True'),
    ('--mask=self', '--n_classes=0', '--cfg=1', '--shared=ffn,mod'),
    ('--path=gvp', '--mask=none', '--dtype=bfloat16'),
    ('pyramidal', '--T=0.67,0.33', '--patch=2', '--shared=qkv,proj,ffn,mod'),
    ('edify', '--path=quadratic', '--n_classes=0', '--cfg=1'),
    ('--T=0.75,0.5,0.25', '--patch=2', '--path=cubic', '--shared=qkv,proj'),
    ('--T=0.3', '--checkpoint_blocks=True', '--min_lr=1e-2', '--grad_clip=0.0', '--epochs=1', '--batch_size=60'),
))
def test_variants_train_and_sample_from_their_checkpoint_alone(changes, run, tmp_path):
    flow, changes = (changes[:1], changes[1:]) if changes[0] in ('pyramidal', 'edify') else ((), changes)
    script = lambda name: ['tests/baselines.py', *flow, name] if flow else [name]
    printed, message = run(*script('train.py'), *TINY, '--max_iters=2', '--eval_interval=2', f'--out_dir={tmp_path}',
                           *changes)
    assert message == '' and 'left' in printed
    assert load(tmp_path)['iter_num'] == (5 if '--epochs=1' in changes else 2)
    draw = ['--ckpt', str(tmp_path / 'ckpt.pt'), '--num_samples=3', f'--out={tmp_path}/x.npz']
    for refusing in (('sample.py', *draw), ('train.py', *TINY, f'--out_dir={tmp_path}')) if flow else ():
        _, message = run(*refusing)
        assert 'is not a checkpoint of train.py' in message and "'flow'" in message and '\n' not in message
    assert run(*script('sample.py'), *draw)[1] == ''
    assert np.load(tmp_path / 'x.npz')['arr_0'].shape == (3, 32, 32, 1)


@pytest.mark.parametrize('flow', ('lapflow', 'pyramidal', 'edify'))
def test_every_flow_trains_and_samples_with_its_own_functions(flow, run, tmp_path, monkeypatch):
    """
    The second loss is that of the first checkpoint, on images, labels, noise and times that depend on (seed, iteration)
    alone, and the samples are the solver's with the flow's own hand-over.
    """
    script, module, network, config = ([], lapflow, LapFlow, LapFlowConfig) if flow == 'lapflow' else (
        ['tests/baselines.py', flow], baselines, baselines.OneScale, baselines.FlowConfig)
    train = lambda iterations: run(*script, 'train.py', *TINY, f'--max_iters={iterations}', f'--out_dir={tmp_path}')[1]
    assert train(1) == ''
    model = network(config(**load(tmp_path)['model_args']))
    model.load_state_dict(load(tmp_path)['model'])
    assert train(2) == ''
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((0, 0, 1)).generate_state(1)[0]))
    noise = torch.randn(12, 1, 32, 32, generator=generator)
    uniform, drop = torch.rand(2, 12, generator=generator)
    x1, y = Dataset('digits').batch(training_order(12, 12, 300, 0))
    t = module.stage_times(torch.tensor([0] * 6 + [1] * 6), uniform, model.config)
    x_t, u = module.states_and_targets(x1, noise, t, (6, 12), model.config)
    with torch.no_grad():
        v = model(x_t, t, torch.where(drop < 0.1, 10, y))
    loss = sum(((v_k - u_k) ** 2).flatten(1).mean(1).sum().item() for v_k, u_k in zip(v, u)) / 12
    assert abs(float(losses(tmp_path)[1]['loss']) - loss) < 1e-5
    assert run(*script, 'sample.py', '--ckpt', f'{tmp_path}/ckpt.pt', '--num_samples=12', '--cfg=1',
               f'--out={tmp_path}/x.npz')[1] == ''
    model.load_state_dict(load(tmp_path)['ema'])
    monkeypatch.setattr(sampler, 'hand_over', module.hand_over)
    x, _ = sampler.generate(model, sampler.noise_of(0, range(12), (1, 32, 32)), torch.arange(12) % 10, 'euler', 4)
    drawn = np.load(tmp_path / 'x.npz')['arr_0'].astype(int)
    assert np.abs(drawn - sampler.to_uint8(x)).max() <= 1


def test_a_baseline_trains_alike_in_two_processes(run, workplace):
    command = lambda out: ['tests/baselines.py', 'edify', 'train.py', *TINY, '--max_iters=3', f'--out_dir={out}']
    assert run(*command('edify-one'))[1] == ''
    finish(*start_two(workplace, *command('edify-two')))
    same_but_for_rounding(workplace / 'edify-one', workplace / 'edify-two')


@pytest.mark.parametrize('args', ([], ['lapflow', 'train.py'], ['edify']))
def test_a_baseline_needs_a_name_and_a_script(args, run):
    _, message = run('tests/baselines.py', *args)
    assert 'pyramidal or edify' in message and '\n' not in message


def test_training_lowers_the_loss(run, tmp_path):
    run('train.py', *TINY, '--max_iters=40', '--eval_interval=20', f'--out_dir={tmp_path}',
        '--learning_rate=4e-3', '--sample_images=1')
    first, last = [row for row in losses(tmp_path) if row['heldout_0']]
    assert float(last['heldout_0']) < float(first['heldout_0']) and float(last['heldout_1']) < float(first['heldout_1'])
    # untrained, the outputs are 0 and the errors the mean squares of the targets: 0.75 + 4 mean r^2 and 0.25 + mean x^2
    # at least
    assert float(last['heldout_0']) < 0.75 and float(last['heldout_1']) < 0.6


def test_dropped_labels_train_the_null_label_and_no_other(run, tmp_path):
    for drop in (0.0, 1.0):
        run('train.py', *TINY, '--max_iters=3', f'--label_drop={drop}', f'--out_dir={tmp_path}/{drop}')
        checkpoint = load(tmp_path / str(drop))
        torch.manual_seed(0)
        start = LapFlow(LapFlowConfig(**checkpoint['model_args'])).state_dict()['y_embed.weight']
        moved = (checkpoint['model']['y_embed.weight'] != start).any(1)
        assert moved[10] == (drop == 1) and moved[:10].any() == (drop == 0)


def test_learning_rate_and_ema_are_their_closed_forms(run, tmp_path):
    run('train.py', *TINY, '--max_iters=8', '--warmup_iters=3', '--min_lr=2e-5', '--ema_decay=0.5',
        '--eval_interval=1', f'--out_dir={tmp_path}')
    rates = [float(row['lr']) for row in losses(tmp_path)]
    cosine = [2e-5 + (1e-2 - 2e-5) * (1 + np.cos(np.pi * i / 5)) / 2 for i in range(5)]
    np.testing.assert_allclose(rates, [2.5e-3, 5e-3, 7.5e-3, *cosine], rtol=1e-5)
    run('train.py', *TINY, '--max_iters=1', '--ema_decay=0.5', f'--out_dir={tmp_path}/one')
    checkpoint = load(tmp_path / 'one')
    torch.manual_seed(0)
    start = LapFlow(LapFlowConfig(**checkpoint['model_args'])).state_dict()
    decay = 2 / 11      # the warm-up (1 + i) / (10 + i) after the first iteration
    for name, ema in checkpoint['ema'].items():
        torch.testing.assert_close(ema, decay * start[name] + (1 - decay) * checkpoint['model'][name],
                                   rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_blocks_in_two_processes_train_the_same_weights(trained, workplace, compiling):
    finish(*compiling)
    same_but_for_rounding(trained, workplace / 'out-compiled')


# ----------------------------------------------------------------------------------------------------------------------
# sample.py


def sample(run, trained, out, *args):
    printed, message = run('sample.py', '--ckpt', str(trained / 'ckpt.pt'), f'--out={out}', *args)
    assert message == '' and ('NFE' in printed or '--trajectory=True' in args) and str(out) in printed
    return printed


def test_batches_change_no_pixel_by_more_than_one_grey_level(trained, run, tmp_path):
    for batch in (1, 4, 7):
        sample(run, trained, tmp_path / f'{batch}.npz', '--num_samples=7', f'--batch_size={batch}',
               '--method=midpoint', '--steps=6')
    arrays = [np.load(tmp_path / f'{batch}.npz') for batch in (1, 4, 7)]
    assert all(np.abs(a['arr_0'].astype(int) - arrays[0]['arr_0']).max() <= 1 for a in arrays)
    assert all(a['arr_1'].tolist() == [0, 1, 2, 3, 4, 5, 6] for a in arrays)
    assert arrays[0]['arr_0'].dtype == np.uint8 and arrays[0]['arr_0'].std() > 10


def test_many_processes_draw_exactly_the_samples_of_one(trained, run, workplace):
    """Exactly N, whatever the world size, and within one grey level for a fixed-step solver."""
    args = ['--num_samples=7', '--seed=2', '--device=cpu']
    sample(run, trained, 'one.npz', *args, '--batch_size=7')
    jobs = start_two(workplace, 'sample.py', '--ckpt', f'{trained}/ckpt.pt', *args, '--out=two.npz', '--batch_size=2')
    printed = finish(*jobs)
    assert '7 samples, euler, NFE 4.0: two.npz' in printed and '2/2' in printed     # batches of 4 of the 7 samples
    one, two = (np.load(workplace / f'{name}.npz') for name in ('one', 'two'))
    assert one['arr_0'].shape == (7, 32, 32, 1) and one['arr_1'].tolist() == two['arr_1'].tolist() == [*range(7)]
    assert np.abs(one['arr_0'].astype(int) - two['arr_0']).max() <= 1
    assert not list(workplace.glob('*.samples'))


def test_outputs_are_the_same_images_in_every_form(trained, run, tmp_path):
    sample(run, trained, tmp_path / 'x.npz', '--num_samples=12', '--cls=3', '--seed=5')
    sample(run, trained, f'{tmp_path}/x/', '--num_samples=12', '--cls=3', '--seed=5')
    sample(run, trained, tmp_path / 'x.png', '--num_samples=12', '--cls=3', '--seed=5')
    assert sorted(os.listdir(tmp_path)) == ['x', 'x.npz', 'x.png']
    arrays = np.load(tmp_path / 'x.npz')
    assert arrays['arr_1'].tolist() == [3] * 12
    files = sorted(name for name in os.listdir(tmp_path / 'x') if name.endswith('.png'))
    assert len(files) == 12
    picture = np.asarray(Image.open(tmp_path / 'x.png'))
    for i, (image, file) in enumerate(zip(arrays['arr_0'][..., 0], files)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / 'x' / file)), image)
        assert np.array_equal(picture[i // 10 * 32:i // 10 * 32 + 32, i % 10 * 32:i % 10 * 32 + 32], image)


def test_the_checkpoints_defaults_hold_unless_given(trained, run, tmp_path):
    assert 'euler, NFE 4.0' in sample(run, trained, tmp_path / 'x.npz', '--num_samples=2')      # TINY's steps
    assert 'midpoint, NFE 12.0' in sample(run, trained, tmp_path / 'x.npz', '--num_samples=2', '--method=midpoint',
                                          '--steps=6')
    sample(run, trained, tmp_path / 'y.npz', '--num_samples=2', '--cfg=2.0')
    sample(run, trained, tmp_path / 'x.npz', '--num_samples=2')
    sample(run, trained, tmp_path / 'z.npz', '--num_samples=2', '--cfg=1.0')
    x, y, z = (np.load(tmp_path / f'{name}.npz')['arr_0'] for name in 'xyz')
    assert np.array_equal(x, y) and not np.array_equal(x, z)


def test_bfloat16_where_the_hardware_has_it_is_for_solvers_with_fixed_steps(trained, run, tmp_path, monkeypatch):
    for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    for method in ('euler', 'dopri5'):
        for dtype in ('float32', 'auto'):
            sample(run, trained, f'{tmp_path}/{method}-{dtype}.npz', '--num_samples=4', f'--method={method}',
                   '--tol=0.1', f'--dtype={dtype}')
        exact, fast = (np.load(f'{tmp_path}/{method}-{dtype}.npz')['arr_0'] for dtype in ('float32', 'auto'))
        assert np.array_equal(exact, fast) == (method == 'dopri5')
        assert np.abs(exact.astype(int) - fast).mean() < 3


def test_help_shows_the_checkpoints_defaults_and_what_is_given_over_them(trained, run, tmp_path):
    printed, _ = run('sample.py', f'--ckpt={trained}/ckpt.pt', '--help')
    lines = printed.split('\n')
    assert {"--method='euler'", '--steps=4', '--cfg=2.0', '--tol=1e-05', '--num_samples=100'} <= {*lines}
    (tmp_path / 'mine.py').write_text('cfg = 3')
    printed, _ = run('sample.py', '--help', '--steps=7', '--ckpt', f'{trained}/ckpt.pt', f'{tmp_path}/mine.py')
    assert {"--method='euler'", '--steps=7', '--cfg=3.0'} <= {*printed.split('\n')}


def test_a_stopped_npz_goes_on_and_equals_one_drawn_at_once(trained, run, tmp_path, monkeypatch):
    args = ['--num_samples=7', '--batch_size=2', '--seed=3']
    sample(run, trained, tmp_path / 'whole.npz', *args)
    solve, calls, out = torchdiffeq.odeint, [], tmp_path / 'x.npz'

    def stopped(*args, **options):
        calls.append(args)
        if len(calls) > 4:      # of two segments: in the third batch
            raise KeyboardInterrupt
        return solve(*args, **options)
    monkeypatch.setattr(torchdiffeq, 'odeint', stopped)
    with pytest.raises(KeyboardInterrupt):
        sample(run, trained, out, *args)
    monkeypatch.setattr(torchdiffeq, 'odeint', solve)
    begun = {file: file.stat().st_mtime_ns for file in (tmp_path / 'x.npz.samples').glob('*.png')}
    assert sorted(file.name for file in begun) == [f'{i:06}.png' for i in range(4)] and not out.exists()
    (tmp_path / 'x.npz.samples' / '0.tmp').write_bytes(b'half of one')
    for other in ('--num_samples=5', '--seed=4', '--cfg=1.5'):
        _, message = run('sample.py', '--ckpt', f'{trained}/ckpt.pt', f'--out={out}', *args, other)
        assert 'other settings' in message and other[2:other.index('=')] in message
    assert {file: file.stat().st_mtime_ns for file in begun} == begun
    calls.clear()
    monkeypatch.setattr(torchdiffeq, 'odeint', lambda *args, **options: calls.append(args) or solve(*args, **options))
    sample(run, trained, out, *args)
    assert len(calls) == 4      # two batches more, and no file of the first two is drawn again
    whole, resumed = (np.load(tmp_path / f'{name}.npz') for name in ('whole', 'x'))
    assert all(np.array_equal(whole[key], resumed[key]) for key in ('arr_0', 'arr_1'))
    assert sorted(os.listdir(tmp_path)) == ['whole.npz', 'x.npz']


def test_the_trajectory_ends_in_the_sample(trained, run, tmp_path):
    sample(run, trained, tmp_path / 'strip.png', '--trajectory=True', '--steps=20', '--cls=4')
    sample(run, trained, tmp_path / 'x.npz', '--num_samples=1', '--steps=20', '--cls=4')
    strip = np.asarray(Image.open(tmp_path / 'strip.png'))[..., 0]
    image = np.load(tmp_path / 'x.npz')['arr_0'][0, ..., 0]
    corner = strip[-98:-2, -98:-2][1::3, 1::3]      # bottom right: the reconstruction at t = 1, three times enlarged
    assert np.array_equal(corner, image)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize('script, args, words', (
    ('train.py', ['--widht=64'], ("'widht'", "'width'")),
    ('train.py', ['--width=wide'], ('width', 'int')),
    ('train.py', ['--T=0.3,0.6'], ('T', 'decrease')),
    ('train.py', ['--T=1.5'], ('T', '(0, 1)')),
    ('train.py', ['--patch=5'], ('divide',)),
    ('train.py', ['--T=0.8,0.6,0.4,0.2'], ('divide',)),
    ('train.py', ['--dataset=nothing'], ('nothing', 'data.py')),
    ('train.py', ['--size=64'], ("no setting 'size'",)),
    ('train.py', ['--flow=edify'], ("no setting 'flow'",)),
    ('train.py', ['--n_classes=4'], ('10 classes',)),
    ('train.py', ['--n_classes=0'], ('cfg',)),
    ('train.py', ['--batch_size=7', '--gradient_accumulation_steps=2'], ('batch_size',)),
    ('train.py', ['--batch_size=1'], ('batch_size', 'scale')),
    ('train.py', ['--batch_size=0', '--epochs=1'], ('batch_size',)),
    ('train.py', ['--loss_weights=1,1,1'], ('loss_weights',)),
    ('train.py', ['--device=cuda:9'], ('device',)),
    ('sample.py', ['--device=gpu'], ('device', 'gpu')),
    ('sample.py', ['--trajectory=True', '--out=x.npz'], ('.png',)),
    ('train.py', ['--dtype=float8'], ('dtype',)),
    ('train.py', ['--method=heun'], ('method',)),
    ('train.py', ['--out_dir=out-whole', '--width=64', '--max_iters=12'],
     ('is of other settings', 'width', '32', '64')),
    ('train.py', ['--out_dir=out-whole', '--T=0.25', '--max_iters=12'], ('is of other settings', 'T')),
    ('sample.py', ['--ckpt', 'no.pt'], ('no.pt', 'train')),
    ('sample.py', ['--ckpt', 'data/digits/meta.json'], ('meta.json', 'not a checkpoint')),
    ('sample.py', ['--ckpt', 'other.pt'], ('other.pt', 'not a checkpoint', 'model_args')),
    ('sample.py', ['--ckpt', 'cut.pt'], ('cut.pt', 'damaged')),
    ('sample.py', ['--cls=10'], ('cls', 'below 10')),
    ('sample.py', ['--cls=-2'], ('cls',)),
    ('sample.py', ['--method=magic'], ('method', 'dopri5')),
    ('sample.py', ['--dtype=bfloat16', '--method=dopri5'], ('bfloat16', 'euler')),
    ('sample.py', ['--out=x.jpg'], ('.png', '.npz')),
))
def test_bad_input_gets_one_sentence_and_destroys_nothing(script, args, words, trained, run, workplace):
    torch.save({'model': {}}, workplace / 'other.pt')
    (workplace / 'cut.pt').write_bytes((trained / 'ckpt.pt').read_bytes()[:100_000])
    if script == 'train.py':
        args = [*TINY, '--out_dir=out-bad', *args]
    elif '--ckpt' not in args:
        args = ['--ckpt', 'out-whole/ckpt.pt', *args]
    before = {name: (trained / name).read_bytes() for name in os.listdir(trained)}
    _, message = run(script, *args)
    assert all(word in message for word in words) and '\n' not in message, message
    assert {name: (trained / name).read_bytes() for name in os.listdir(trained)} == before
    assert not os.path.exists(workplace / 'out-bad')


def test_guidance_and_classes_are_refused_on_an_unconditional_model(run, tmp_path):
    run('train.py', *TINY, '--max_iters=1', f'--out_dir={tmp_path}', '--n_classes=0', '--cfg=1')
    for args, words in ((['--cfg=2'], ('cfg', 'unconditional')), (['--cls=1'], ('cls', 'below 0'))):
        _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), *args)
        assert all(word in message for word in words) and '\n' not in message


def test_a_checkpoint_of_another_dataset_is_refused(trained, run, workplace, tmp_path):
    make_digits(str(tmp_path / 'other'), train=100, heldout=20)
    _, message = run('train.py', *TINY, '--out_dir=out-whole', f'--dataset={tmp_path}/other', '--max_iters=12')
    assert 'is of other settings or data' in message and 'count' in message


def test_a_diverged_run_stops_with_a_sentence_and_keeps_its_checkpoint(run, tmp_path):
    run('train.py', *TINY, '--max_iters=3', f'--out_dir={tmp_path}')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    _, message = run('train.py', *TINY, '--max_iters=50', f'--out_dir={tmp_path}', '--learning_rate=1e30',
                     '--grad_clip=0.0', '--log_interval=7', '--eval_interval=21')
    assert 'not finite at or before iteration 7;' in message and 'learning_rate' in message
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
