"""train.py and sample.py as a user runs them, on a small copy of the digits."""
import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchdiffeq
from PIL import Image

import data
import model as lapflow
import sample as sampler
from conftest import ROOT, TINY, finish, run_in, start_two, started, variant_in_place
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
    kill -9 as soon as there is a checkpoint, then the same command: weights, EMA and optimizer of a run never stopped,
    and its log, but for what was logged between the checkpoint and the end: that stands twice.
    """
    with started(workplace, 'train.py', *TINY, '--out_dir=out-killed') as job:
        while not os.path.exists(workplace / 'out-killed' / 'ckpt.pt'):
            assert job.poll() is None, job.communicate()
            time.sleep(0.001)
    assert load(workplace / 'out-killed')['iter_num'] == 3
    rows = (trained / 'log.csv').read_text().splitlines(keepends=True)      # the header and iterations 1 to 6
    (workplace / 'out-killed' / 'log.csv').write_text(''.join(rows[:5]))    # as if it had come to log more
    printed, message = run('train.py', *TINY, '--out_dir=out-killed')
    assert 'resuming' in printed and message == ''
    whole, resumed = load(trained), load(workplace / 'out-killed')
    assert all(same(whole[key], resumed[key]) for key in ('model', 'ema', 'optimizer', 'iter_num', 'data'))
    expected = losses(trained)
    assert losses(workplace / 'out-killed') == [*expected[:4], *expected[3:]]
    assert not same(whole['ema'], whole['model'])


def test_a_run_of_more_than_a_million_iterations_resumes(trained, run, tmp_path):
    """Its iterations are whole numbers: 1e+06 is not."""
    torch.save(load(trained) | dict(iter_num=1_000_000), tmp_path / 'ckpt.pt')
    (tmp_path / 'log.csv').write_text((trained / 'log.csv').read_text().splitlines(keepends=True)[0])
    for last in (1_000_002, 1_000_004):
        _, message = run('train.py', *TINY, f'--out_dir={tmp_path}', f'--max_iters={last}')
        assert message == '' and load(tmp_path)['iter_num'] == last
    assert [row['iter'] for row in losses(tmp_path)] == ['1000001', '1000002', '1000003', '1000004']


def test_a_log_that_is_lost_is_begun_anew_and_one_that_is_there_goes_on(trained, run, tmp_path):
    for folder, there in (('lost', []), ('kept', ['log.csv'])):
        (tmp_path / folder).mkdir()
        for name in ('ckpt.pt', *there):
            shutil.copy(trained / name, tmp_path / folder)
        assert run('train.py', *TINY, f'--out_dir={tmp_path}/{folder}', '--max_iters=7')[1] == ''
    lost, kept = losses(tmp_path / 'lost'), losses(tmp_path / 'kept')
    assert kept[:6] == losses(trained) and kept[6:] == lost and [row['iter'] for row in lost] == ['7']


def test_a_run_that_ended_before_its_first_checkpoint_begins_its_log_anew(run, tmp_path, monkeypatch):
    args = [*TINY, f'--out_dir={tmp_path}', '--max_iters=2', '--eval_interval=2']

    def order(first, *args):
        if first == 12:     # in the second iteration
            raise KeyboardInterrupt
        return training_order(first, *args)
    monkeypatch.setattr(data, 'training_order', order)
    with pytest.raises(KeyboardInterrupt):
        run('train.py', *args)
    assert os.listdir(tmp_path) == ['log.csv']
    before = losses(tmp_path)
    monkeypatch.undo()
    assert run('train.py', *args)[1] == ''
    assert [row['iter'] for row in losses(tmp_path)] == ['1', '2'] and losses(tmp_path)[:1] == before


def test_a_resumed_run_takes_the_new_settings_of_the_optimizer(trained, run, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    new = ('--beta1=0.8', '--beta2=0.9', '--weight_decay=0.5', '--learning_rate=1e-3', '--min_lr=1e-3')
    _, message = run('train.py', *TINY, f'--out_dir={tmp_path}', '--max_iters=8', '--eval_interval=1', *new)
    assert message == ''
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
    del checkpoint['model_args']['T']       # its default is that of LapFlowConfig
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    for folder in (tmp_path, trained):
        sample(run, folder, f'{tmp_path}/{folder.name}.npz', '--num_samples=2')
    old, new = (np.load(f'{tmp_path}/{folder.name}.npz')['arr_0'] for folder in (tmp_path, trained))
    assert np.array_equal(old, new)
    args = [*TINY, f'--out_dir={tmp_path}', '--max_iters=7']
    assert 'T is (0.5,) there and (0.25,) here' in run('train.py', *args, '--T=0.25')[1]
    assert run('train.py', *args)[1] == '' and load(tmp_path)['iter_num'] == 7
    assert load(tmp_path)['model_args']['T'] == (0.5,)


def test_a_device_may_be_named_as_on_other_scripts(trained, run, tmp_path):
    _, message = run('sample.py', '--ckpt', str(trained / 'ckpt.pt'), '--device=auto', '--num_samples=1',
                     f'--out={tmp_path}/x.png')
    assert message == '' and (tmp_path / 'x.png').exists()


def test_a_finished_run_changes_nothing(trained, run):
    before = {name: (trained / name).read_bytes() for name in os.listdir(trained)}
    printed, message = run('train.py', *TINY, '--out_dir=out-whole')
    assert 'at 6 of 6 iterations' in printed and message == ''
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
    ('mask=none', '--T=()', '--ema_decay=0.0'),
    ('image_tokens=True', '--T=0.67,0.33', '--patch=2'),
    ('mask=self,shared=ffn+mod', '--dataset=plain', '--cfg=1'),
    ('mask=none,schedule=gvp', '--dtype=bfloat16'),
    ('flow=pyramidal,shared=qkv+proj+ffn+mod', '--T=0.67,0.33', '--patch=2'),
    ('schedule=quadratic,flow=edify', '--dataset=plain', '--cfg=1'),
    ('schedule=cubic,shared=qkv+proj', '--T=0.75,0.5,0.25', '--patch=2'),
    ('--T=0.3', '--checkpoint_blocks=True', '--min_lr=1e-2', '--grad_clip=0.0', '--batch_size=60'),
))
def test_variants_train_and_sample_from_their_checkpoint_alone(changes, run, tmp_path, plain):
    variant, changes = ('', changes) if changes[0].startswith('--') else (changes[0], changes[1:])
    script = lambda name, variant=variant: ['tests/variants.py', variant, name] if variant else [name]
    printed, message = run(*script('train.py'), *TINY, '--max_iters=2', '--eval_interval=2', f'--out_dir={tmp_path}',
                           *changes)
    assert message == '' and 'left' in printed
    checkpoint = load(tmp_path)
    assert checkpoint['iter_num'] == 2
    assert checkpoint['model_args']['n_classes'] == (0 if f'--dataset={plain}' in changes else 10)
    draw = ['--ckpt', str(tmp_path / 'ckpt.pt'), '--num_samples=3', f'--out={tmp_path}/x.npz']
    for name, args in (('sample.py', draw), ('train.py', [*TINY, *changes, f'--out_dir={tmp_path}'])):
        for other in {'', 'mask=none'} - {variant}:
            _, message = run(*script(name, other), *args)
            assert '\n' not in message
            if other:
                assert 'the checkpoint is of variant' in message and f"not '{other}'" in message
            else:
                assert 'is of another model than this LapFlow' in message and "'variant'" in message
    assert run(*script('sample.py'), *draw)[1] == ''
    drawn = np.load(tmp_path / 'x.npz')
    assert drawn['arr_0'].shape == (3, 32, 32, 1) and ('arr_1' in drawn) == (f'--dataset={plain}' not in changes)


@pytest.mark.parametrize('flow', ('', 'flow=pyramidal', 'flow=edify'))
def test_every_flow_trains_and_samples_with_its_own_functions(flow, run, tmp_path):
    """
    The second loss is that of the first checkpoint, on images, labels, noise and times that depend on (seed, iteration)
    alone, and the samples are the solver's with the flow's own hand-over.
    """
    script = ['tests/variants.py', flow] if flow else []
    train = lambda iterations: run(*script, 'train.py', *TINY, f'--max_iters={iterations}', f'--out_dir={tmp_path}')[1]
    assert train(1) == ''
    first = load(tmp_path)
    assert train(2) == ''
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((0, 0, 1)).generate_state(1)[0]))
    noise = torch.randn(12, 1, 32, 32, generator=generator)
    uniform, drop = torch.rand(2, 12, generator=generator)
    x1, y = Dataset('digits').batch(training_order(12, 12, 300, 0))
    stage = torch.tensor([0] * 6 + [1] * 6)
    with variant_in_place(flow), torch.no_grad():
        model = lapflow.LapFlow(lapflow.LapFlowConfig(**first['model_args']))
        model.load_state_dict(first['model'])
        t = lapflow.stage_times(stage, uniform, model.config)
        x_t, u = lapflow.states_and_velocities(x1, noise, t, stage, model.config)
        v = model(x_t, t, torch.where(drop < 0.1, 10, y))
    loss = sum(((v[k] - u[k]) ** 2).flatten(1).mean(1).sum().item() for k in (0, 1)) / 12
    assert abs(float(losses(tmp_path)[1]['loss']) - loss) < 1e-5
    assert run(*script, 'sample.py', '--ckpt', f'{tmp_path}/ckpt.pt', '--num_samples=12', '--cfg=1',
               f'--out={tmp_path}/x.npz')[1] == ''
    model.load_state_dict(load(tmp_path)['ema'])
    with variant_in_place(flow):
        x, _ = sampler.generate(model, sampler.noise_of(0, range(12), (1, 32, 32)), torch.arange(12) % 10, 'euler', 4)
    drawn = np.load(tmp_path / 'x.npz')['arr_0'].astype(int)
    assert np.abs(drawn - sampler.to_uint8(x)).max() <= 1


def test_a_baseline_trains_alike_in_two_processes(run, workplace):
    command = lambda out: ['tests/variants.py', 'flow=edify', 'train.py', *TINY, '--max_iters=3', f'--out_dir={out}']
    assert run(*command('edify-one'))[1] == ''
    finish(*start_two(workplace, *command('edify-two')))
    same_but_for_rounding(workplace / 'edify-one', workplace / 'edify-two')


@pytest.mark.parametrize('args, words', (([], 'give a variant and a script'), (['flow=edify'], 'give a variant and a'),
                                         (['flow=lapflow', 'train.py'], "['pyramidal', 'edify']"),
                                         (['edify', 'train.py'], 'is no variant'),
                                         (['flow=edify,mask=none', 'train.py'], 'without a mask')))
def test_a_variant_needs_a_name_and_a_script(args, words, run):
    _, message = run('tests/variants.py', *args)
    assert words in message and '\n' not in message


def test_the_order_of_a_variants_options_does_not_matter(run, tmp_path):
    train = [*TINY, f'--out_dir={tmp_path}', '--min_lr=1e-2']
    for variant, last in (('schedule=gvp,mask=self', 1), ('mask=self,schedule=gvp', 2)):
        assert run('tests/variants.py', variant, 'train.py', *train, f'--max_iters={last}')[1] == ''
    assert load(tmp_path)['iter_num'] == 2 and load(tmp_path)['model_args']['variant'] == 'mask=self,schedule=gvp'


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
        assert run('train.py', *TINY, '--max_iters=3', f'--label_drop={drop}', '--cfg=1',
                   f'--out_dir={tmp_path}/{drop}')[1] == ''
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


def test_numbered_checkpoints_are_kept_and_go_on_as_the_last_one_does(trained, run, tmp_path):
    """snapshot_interval need not be a multiple of the other intervals."""
    args = [*TINY, '--log_interval=5', '--snapshot_interval=2']
    assert run('train.py', *args, f'--out_dir={tmp_path}')[1] == ''
    names = sorted(name for name in os.listdir(tmp_path) if 'ckpt' in name)
    assert names == ['ckpt-2.pt', 'ckpt-4.pt', 'ckpt-6.pt', 'ckpt.pt']
    assert [load(tmp_path, name)['iter_num'] for name in names] == [2, 4, 6, 6]
    whole = load(trained)
    (tmp_path / 'again').mkdir()
    shutil.copy(tmp_path / 'ckpt-2.pt', tmp_path / 'again' / 'ckpt.pt')
    assert run('train.py', *args, f'--out_dir={tmp_path}/again')[1] == ''
    for checkpoint in (load(tmp_path), load(tmp_path, 'ckpt-6.pt'), load(tmp_path / 'again')):
        assert all(same(whole[key], checkpoint[key]) for key in ('model', 'ema', 'optimizer', 'iter_num', 'data'))
    assert not same(whole['model'], load(tmp_path, 'ckpt-4.pt')['model'])


@pytest.fixture(params=(signal.SIGINT, signal.SIGTERM))
def number(request):
    """Of a signal, which would end the tests if a script did not handle it."""
    handler = signal.signal(request.param, lambda *_: pytest.fail('the script does not handle the signal'))
    yield request.param
    signal.signal(request.param, handler)


def test_ctrl_c_and_sigterm_save_at_the_next_log_step_and_lose_nothing(number, trained, run, tmp_path, monkeypatch):
    args = [*TINY, f'--out_dir={tmp_path}', '--log_interval=2']

    def order(first, *args):
        if first == 36:     # in the fourth iteration; the last checkpoint is of the third
            signal.raise_signal(number)
        return training_order(first, *args)
    monkeypatch.setattr(data, 'training_order', order)
    printed, message = run('train.py', *args)
    assert message == '' and 'holds iteration 4' in printed and load(tmp_path)['iter_num'] == 4
    monkeypatch.undo()
    printed, message = run('train.py', *args)
    assert message == '' and 'ckpt.pt at 4' in printed
    whole, resumed = load(trained), load(tmp_path)
    assert all(same(whole[key], resumed[key]) for key in ('model', 'ema', 'optimizer', 'iter_num', 'data'))
    rows = losses(trained)
    assert losses(tmp_path) == [rows[1], rows[2], rows[3], rows[5]]


def test_a_second_ctrl_c_ends_at_once(run, tmp_path, monkeypatch):
    def order(first, *args):
        for _ in range(2 if first == 48 else 0):    # in the fifth iteration
            signal.raise_signal(signal.SIGINT)
        return training_order(first, *args)
    monkeypatch.setattr(data, 'training_order', order)
    with pytest.raises(KeyboardInterrupt):
        run('train.py', *TINY, f'--out_dir={tmp_path}')
    assert load(tmp_path)['iter_num'] == 3 and [row['iter'] for row in losses(tmp_path)] == ['1', '2', '3', '4']


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_held_out_errors_are_their_definition_in_one_process_and_in_two(run, workplace):
    """Of the EMA, at noise, times and dropped labels that depend on the seed alone; 25 images do not divide by two."""
    args = [*TINY, '--max_iters=2', '--eval_interval=1', '--eval_images=25', '--ema_decay=0.5']
    assert run('train.py', *args, '--out_dir=heldout-one')[1] == ''
    finish(*start_two(workplace, 'train.py', *args, '--out_dir=heldout-two'))
    one, two = losses(workplace / 'heldout-one'), losses(workplace / 'heldout-two')
    assert one[0]['heldout_0'] != one[1]['heldout_0']
    same_but_for_rounding(workplace / 'heldout-one', workplace / 'heldout-two')
    checkpoint = load(workplace / 'heldout-one')
    model = LapFlow(LapFlowConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['ema'])
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((0, 1)).generate_state(1)[0]))
    noise = torch.randn(25, 1, 32, 32, generator=generator)
    uniform, drop = torch.rand(2, 25, generator=generator)
    x1, y = Dataset('digits').batch(np.arange(300, 325))        # the first of those that are held out
    stage = torch.tensor([0] * 13 + [1] * 12)
    t = lapflow.stage_times(stage, uniform, model.config)
    x_t, u = lapflow.states_and_velocities(x1, noise, t, stage, model.config)
    with torch.no_grad():
        v = model(x_t, t, torch.where(drop < 0.1, 10, y))
    for k in (0, 1):
        for row in (one[1], two[1]):
            assert abs(float(row[f'heldout_{k}']) - ((v[k] - u[k]) ** 2).mean().item()) < 1e-5


def test_fewer_held_out_images_than_processes_are_evaluated_all_the_same(run, workplace):
    args = [*TINY, '--max_iters=1', '--eval_images=1', '--sample_images=1']
    assert run('train.py', *args, '--out_dir=few-one')[1] == ''
    finish(*start_two(workplace, 'train.py', *args, '--out_dir=few-two'))
    assert np.isfinite(float(losses(workplace / 'few-one')[0]['heldout_1']))
    same_but_for_rounding(workplace / 'few-one', workplace / 'few-two')


def test_without_held_out_images_the_errors_are_of_training_images_and_named_so(run, tmp_path):
    make_digits(str(tmp_path / 'all'), train=30, heldout=0)
    assert run('train.py', *TINY, '--max_iters=1', f'--dataset={tmp_path}/all', f'--out_dir={tmp_path}')[1] == ''
    row, = losses(tmp_path)
    assert [*row][-2:] == ['training_0', 'training_1'] and all(np.isfinite(float(row[key])) for key in [*row][-2:])


def test_a_picture_that_fails_leaves_the_checkpoint_saved_and_training_going_on(trained, workplace, capsys, tmp_path,
                                                                                monkeypatch):
    """With a traceback."""
    saved = []

    def broken(*args, **options):
        saved.append(load(tmp_path)['iter_num'])
        raise ArithmeticError('planted')
    monkeypatch.setattr(sampler, 'draw', broken)
    assert run_in(workplace, 'train.py', *TINY, f'--out_dir={tmp_path}') == ''
    assert capsys.readouterr().err.count('ArithmeticError: planted') == 2 and saved == [3, 6]
    whole, other = load(trained), load(tmp_path)
    assert all(same(whole[key], other[key]) for key in ('model', 'ema', 'optimizer', 'iter_num'))
    assert not (tmp_path / 'samples.png').exists()
    assert losses(tmp_path) == losses(trained)


def test_an_evaluation_that_fails_in_one_of_two_processes_stops_neither(trained, workplace):
    """Process 0 alone writes the picture, here over a folder; the errors are as ever."""
    os.makedirs(workplace / 'out-no-picture' / 'samples.png')
    printed = finish(*start_two(workplace, 'train.py', *TINY, '--out_dir=out-no-picture'))
    assert printed.count('IsADirectoryError') == 2
    same_but_for_rounding(trained, workplace / 'out-no-picture')


# ----------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


def plant(monkeypatch, value, iterations):
    """Makes one number of the gradient this value in these iterations of a run."""
    clip, iteration = torch.nn.utils.clip_grad_norm_, itertools.count()

    def planted(parameters, *args):
        if next(iteration) in iterations:
            parameters[3].grad.view(-1)[5] = value
        return clip(parameters, *args)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', planted)


@pytest.mark.parametrize('value, clip', ((np.inf, 1.0), (np.inf, 0.0), (np.nan, 1.0)))
def test_a_gradient_that_is_not_finite_skips_the_update(value, clip, trained, run, tmp_path, monkeypatch):
    """Weights, moments and counts of steps are bit for bit those of a run that goes from iteration 2 to iteration 4."""
    args = [*TINY, f'--grad_clip={clip}', '--weight_decay=0.1']
    assert run('train.py', *args, f'--out_dir={tmp_path}', '--snapshot_interval=2')[1] == ''
    before = load(tmp_path, 'ckpt-2.pt')
    final = {}
    for name, iteration in (('planted', 2), ('never-seen', 3)):
        (tmp_path / name).mkdir()
        torch.save(before | dict(iter_num=iteration), tmp_path / name / 'ckpt.pt')
        if name == 'planted':
            plant(monkeypatch, value, [0])
        printed, message = run('train.py', *args, f'--out_dir={tmp_path}/{name}')
        assert message == '' and ('skipped 1 updates' in printed) == (name == 'planted')
        monkeypatch.undo()
        final[name] = load(tmp_path / name)
        assert final[name]['optimizer']['state'][0]['step'] == 5
    planted, never_seen = final.values()
    assert same(planted['model'], never_seen['model']) and same(planted['optimizer'], never_seen['optimizer'])
    assert not same(planted['model'], load(tmp_path)['model'])


def test_the_first_update_may_be_skipped(run, tmp_path, monkeypatch):
    plant(monkeypatch, np.inf, [0])
    assert run('train.py', *TINY, '--max_iters=1', f'--out_dir={tmp_path}')[1] == ''
    checkpoint = load(tmp_path)
    torch.manual_seed(0)
    start = LapFlow(LapFlowConfig(**checkpoint['model_args'])).state_dict()
    assert same(checkpoint['model'], start) and same(checkpoint['ema'], start)
    for state in checkpoint['optimizer']['state'].values():
        assert not any(value.any() for value in state.values())


def test_twenty_skipped_updates_in_a_row_end_the_run_and_nineteen_do_not(run, tmp_path, monkeypatch):
    """At the next log step, each of which says how many were skipped; 19, 1 that is finite, and 19 are no twenty."""
    args = [*TINY, f'--out_dir={tmp_path}', '--eval_interval=50', '--sample_images=1']
    assert run('train.py', *args, '--max_iters=3')[1] == ''
    before = (tmp_path / 'ckpt.pt').read_bytes()
    for log_interval, skipped, last in ((7, 25, 21), (1, 20, 22)):      # at iterations 28 and 23
        plant(monkeypatch, np.inf, range(skipped))
        printed, message = run('train.py', *args, '--max_iters=50', f'--log_interval={log_interval}')
        counts = ['4', '7', '7', '7'] if log_interval == 7 else ['1'] * 20
        assert re.findall(r'skipped (\d+) updates', printed) == counts
        assert f'{skipped} gradients in a row are not finite' in message and '\n' not in message
        assert 'is the data bad?' in message and 'learning_rate' in message
        assert (tmp_path / 'ckpt.pt').read_bytes() == before and losses(tmp_path)[-1]['iter'] == str(last)
        monkeypatch.undo()
    plant(monkeypatch, np.inf, [*range(19), *range(20, 39)])
    printed, message = run('train.py', *args, '--max_iters=43')
    assert message == '' and printed.count('skipped 1 updates') == 38
    assert load(tmp_path)['optimizer']['state'][0]['step'] == 3 + 2


# ----------------------------------------------------------------------------------------------------------------------
# sample.py


def sample(run, trained, out, *args):
    printed, message = run('sample.py', '--ckpt', str(trained / 'ckpt.pt'), f'--out={out}', *args)
    assert message == '' and 'NFE' in printed and str(out) in printed
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
    assert '7 samples, euler, 4 steps, NFE 4.0: two.npz' in printed and '2/2' in printed     # batches of 4 of the 7
    one, two = (np.load(workplace / f'{name}.npz') for name in ('one', 'two'))
    assert one['arr_0'].shape == (7, 32, 32, 1) and one['arr_1'].tolist() == two['arr_1'].tolist() == [*range(7)]
    assert np.abs(one['arr_0'].astype(int) - two['arr_0']).max() <= 1
    assert not list(workplace.glob('*.npy'))


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
    assert 'euler, 4 steps, NFE 4.0:' in sample(run, trained, tmp_path / 'x.npz', '--num_samples=2')      # TINY's steps
    printed = sample(run, trained, tmp_path / 'x.npz', '--num_samples=2', '--method=midpoint', '--steps=6')
    assert 'midpoint, 6 steps, NFE 12.0:' in printed
    sample(run, trained, tmp_path / 'y.npz', '--num_samples=2', '--cfg=2.0')
    sample(run, trained, tmp_path / 'x.npz', '--num_samples=2')
    sample(run, trained, tmp_path / 'z.npz', '--num_samples=2', '--cfg=1.0')
    x, y, z = (np.load(tmp_path / f'{name}.npz')['arr_0'] for name in 'xyz')
    assert np.array_equal(x, y) and not np.array_equal(x, z)


def test_bfloat16_where_the_hardware_has_it_is_for_solvers_with_fixed_steps(trained, run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True)
    for method in ('euler', 'dopri5'):
        drawn = {}
        for dtype in ('float32', 'auto', 'bfloat16'):
            sample(run, trained, tmp_path / 'x.npz', '--num_samples=4', f'--method={method}', '--tol=0.1',
                   f'--dtype={dtype}')
            drawn[dtype] = np.load(tmp_path / 'x.npz')['arr_0'].astype(int)
        assert np.array_equal(drawn['auto'], drawn['bfloat16'])
        assert np.array_equal(drawn['float32'], drawn['auto']) == (method == 'dopri5')
        assert np.abs(drawn['float32'] - drawn['auto']).mean() < 3


def test_a_stopped_draw_leaves_no_samples_and_the_same_command_draws_them(trained, run, tmp_path, monkeypatch):
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
    assert not out.exists()
    monkeypatch.undo()
    sample(run, trained, out, *args)
    whole, again = (np.load(tmp_path / f'{name}.npz') for name in ('whole', 'x'))
    assert all(np.array_equal(whole[key], again[key]) for key in ('arr_0', 'arr_1'))
    assert sorted(os.listdir(tmp_path)) == ['whole.npz', 'x.npz']


def test_a_class_may_be_given_by_its_name_which_comes_before_its_number(trained, run, tmp_path):
    checkpoint = load(trained)
    checkpoint['data']['classes'] = ['cat', '2', *'bcdefghi']
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    for cls, label in (('cat', 0), ('2', 1), ('3', 3), ('i', 9)):
        sample(run, tmp_path, tmp_path / 'named.npz', '--num_samples=2', f'--cls={cls}')
        sample(run, trained, tmp_path / 'x.npz', '--num_samples=2', f'--cls={label}')
        named, numbered = (np.load(tmp_path / f'{name}.npz') for name in ('named', 'x'))
        assert named['arr_1'].tolist() == numbered['arr_1'].tolist() == [label] * 2
        assert np.array_equal(named['arr_0'], numbered['arr_0'])


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize('script, args, words', (
    ('train.py', ['--widht=64'], ("'widht'", "'width'")),
    ('train.py', ['--width=wide'], ('width', 'like 32')),
    ('train.py', ['--T=0.3,0.6'], ('T', 'decrease')),
    ('train.py', ['--T=1.5'], ('T', '(0, 1)')),
    ('train.py', ['--patch=5'], ('divide',)),
    ('train.py', ['--T=0.8,0.6,0.4,0.2'], ('divide',)),
    ('train.py', ['--dataset=nothing'], ('data/nothing', 'not a dataset')),
    ('train.py', ['--size=64'], ("no setting 'size'",)),
    ('train.py', ['--flow=edify'], ("no setting 'flow'",)),
    ('train.py', ['--mask=none'], ("no setting 'mask'",)),
    ('train.py', ['--variant=mask=none'], ("no setting 'variant'",)),
    ('train.py', ['--n_classes=4'], ("no setting 'n_classes'",)),
    ('train.py', ['--dataset=plain'], ('cfg', 'unconditional')),
    ('train.py', ['--label_drop=0'], ('null label', 'label_drop', '--cfg=1')),
    ('train.py', ['--label_drop=1.5'], ('label_drop', 'at most 1')),
    ('train.py', ['--loss_weights=0,0'], ('loss_weights', 'not all 0')),
    ('train.py', ['--T={0.5: 1}'], ('T', 'dict')),
    ('train.py', ['--device=meta'], ('device',)),
    ('sample.py', ['--vae=somewhere'], ('pixels', 'no VAE')),
    ('sample.py', ['--ckpt', 'undropped.pt'], ('null label', '--cfg=1')),
    ('train.py', ['--beta2=1'], ('beta2', 'below 1')),
    ('train.py', ['--ema_decay=1.0'], ('ema_decay', 'below 1')),
    ('train.py', ['--batch_size=7', '--gradient_accumulation_steps=2'], ('batch_size',)),
    ('train.py', ['--batch_size=1'], ('batch_size', 'scale')),
    ('train.py', ['--batch_size=0'], ('batch_size', 'at least 1')),
    ('train.py', ['--epochs=1'], ("no setting 'epochs'",)),
    ('train.py', ['--loss_weights=1,1,1'], ('loss_weights',)),
    ('train.py', ['--device=cuda:9'], ('device',)),
    ('sample.py', ['--device=gpu'], ('device', 'gpu')),
    ('sample.py', ['--trajectory=True'], ("no setting 'trajectory'",)),
    ('train.py', ['--dtype=float8'], ('dtype',)),
    ('train.py', ['--method=heun'], ('method',)),
    ('train.py', ['--out_dir=out-whole', '--width=64', '--max_iters=12'],
     ('is of other settings', 'width', '32', '64')),
    ('train.py', ['--out_dir=out-whole', '--T=0.25', '--max_iters=12'], ('is of other settings', 'T')),
    ('sample.py', ['--ckpt', 'no.pt'], ('no.pt', 'train')),
    ('sample.py', ['--ckpt', 'data/digits/meta.json'], ('meta.json', 'no checkpoint')),
    ('sample.py', ['--ckpt', 'other.pt'], ('other.pt', 'no checkpoint', 'model_args')),
    ('sample.py', ['--ckpt', 'cut.pt'], ('cut.pt', 'damaged')),
    ('sample.py', ['--cls=10'], ('cls', 'below 10')),
    ('sample.py', ['--cls=-2'], ('cls',)),
    ('sample.py', ['--cls=cat'], ('cls', 'name', 'below 10')),
    ('sample.py', ['--num_samples=0'], ('num_samples', 'at least 1')),
    ('sample.py', ['--tol=0', '--method=dopri5'], ('tol', 'more than 0')),
    ('sample.py', ['--method=magic'], ('method', 'dopri5')),
    ('sample.py', ['--method=bosh3'], ('method', 'bosh3', 'dopri5', 'euler', 'midpoint', 'heun2', 'rk4')),
    ('sample.py', ['--out=x.jpg'], ('.png', '.npz')),
))
def test_bad_input_gets_one_sentence_and_destroys_nothing(script, args, words, trained, run, workplace, plain):
    checkpoint = load(trained)
    checkpoint['config']['label_drop'] = 0.0
    torch.save(checkpoint, workplace / 'undropped.pt')
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


def test_guidance_and_classes_are_refused_on_an_unconditional_model(run, tmp_path, plain):
    run('train.py', *TINY, '--max_iters=1', f'--out_dir={tmp_path}', f'--dataset={plain}', '--cfg=1')
    for args, words in ((['--cfg=2'], ('cfg', 'unconditional')), (['--cls=1'], ('cls', 'below 0'))):
        _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), *args)
        assert all(word in message for word in words) and '\n' not in message


def test_a_checkpoint_of_another_dataset_is_refused(trained, run, workplace, tmp_path):
    make_digits(str(tmp_path / 'other'), train=100, heldout=20)
    _, message = run('train.py', *TINY, '--out_dir=out-whole', f'--dataset={tmp_path}/other', '--max_iters=12')
    assert 'is of other settings or data' in message and 'heldout' in message


def test_a_dataset_made_from_another_source_or_with_a_vae_from_elsewhere_is_the_same(trained, run, workplace, tmp_path):
    """Its pictures, and the VAE, may have moved since; its classes are its own."""
    shutil.copytree(workplace / 'data' / 'digits', tmp_path / 'moved')
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    args = [*TINY, f'--out_dir={tmp_path}', f'--dataset={tmp_path}/moved', '--max_iters=7']
    meta = json.loads((tmp_path / 'moved' / 'meta.json').read_text())
    (tmp_path / 'moved' / 'meta.json').write_text(json.dumps(meta | dict(classes=meta['classes'][::-1])))
    assert 'is of other settings or data: classes' in run('train.py', *args)[1]
    (tmp_path / 'moved' / 'meta.json').write_text(json.dumps(meta | dict(source='elsewhere')))
    torch.save(load(trained) | dict(data=meta | dict(vae='where/it/was')), tmp_path / 'ckpt.pt')
    assert run('train.py', *args)[1] == '' and load(tmp_path)['iter_num'] == 7


def test_a_diverged_run_stops_with_a_sentence_and_keeps_its_checkpoint(run, tmp_path):
    run('train.py', *TINY, '--max_iters=3', f'--out_dir={tmp_path}')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    _, message = run('train.py', *TINY, '--max_iters=50', f'--out_dir={tmp_path}', '--learning_rate=1e18',
                     '--grad_clip=0.0', '--log_interval=7', '--eval_interval=21')
    assert 'not finite' in message and 'is the data bad?' in message and 'learning_rate' in message
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('world, joined', [('1', 'True'), (None, 'False')])
def test_one_process_of_torchrun_joins_a_group(world, joined):
    env = dict(os.environ, RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    if world:
        env['WORLD_SIZE'] = world
    code = "import torch.distributed as d; from configurator import launch; launch('cpu'); print(d.is_initialized())"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    assert done.stdout.split() == [joined]
