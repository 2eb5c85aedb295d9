"""What goes wrong around a run: it is ended from outside, disks are full, files are not what they
should be, the model diverges. What was whole stays whole, and a sentence says what is wrong.

    python -m pytest -m soak        # a few minutes of kills at random moments
"""
import itertools
import json
import os
import pickle
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import (ROOT, TINY, TORCHRUN, assert_same_run, contents, finish, in_iteration, load,
                      rows_of, run_in, start_two, started)
import data
import sample
from data import make_digits


# -------------------------------------------------------------------------------------------------
# Ended from outside


def main(name, rank, target, *args):
    """train.py, but in iteration 5 one process sends a signal, to itself or to its parent."""
    process = os.getpid() if target == 'itself' else os.getppid()
    assert process != 1     # the system's, whose children are orphans

    def send():
        if os.environ.get('RANK', '0') == rank:
            os.kill(process, signal.Signals[name])

    data.training_order = in_iteration(5, send)
    sys.argv = ['train.py', *args]
    runpy.run_path(f'{ROOT}/train.py', run_name='__main__')


@pytest.fixture(scope='module', autouse=True)
def jobs(workplace, tmp_path_factory):
    """Runs in processes of their own, {name: what started it}, which go on beside the tests.

    Their out_dir is jobs['folder'] / name.
    """
    folder = tmp_path_factory.mktemp('jobs')

    def command(name, *fault):
        return workplace, 'tests/test_faults.py', *fault, *TINY, f'--out_dir={folder}/{name}'

    killed = started(*command('killed', 'SIGKILL', '0', 'itself'))
    torchrun = started(*command('torchrun', 'SIGTERM', '1', 'parent'), '--max_iters=10000',
                       '--eval_interval=10000', launcher=TORCHRUN)
    pairs = dict(stopped=start_two(*command('stopped', 'SIGTERM', '1', 'itself')))
    for rank in '01':
        pairs[f'lost{rank}'] = start_two(*command(f'lost{rank}', 'SIGKILL', rank, 'itself'))
    with killed as killed, torchrun as torchrun:
        yield dict(pairs, folder=folder, killed=killed, torchrun=torchrun)
        if not torchrun.stdout.closed:      # or its processes would be orphans
            torchrun.communicate()
    for processes, _ in pairs.values():
        for process in processes:
            process.kill()


def unhandled(number, frame):
    raise AssertionError('the script does not handle the signal')


@pytest.fixture
def guarded():
    """A signal that a script does not handle fails the test, or else it would end all of them."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, unhandled) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('name', ('SIGINT', 'SIGTERM', 'SIGHUP'))
def test_what_ends_a_run_makes_it_save_at_the_next_log_step_and_it_goes_on(
        name, trained, run, tmp_path, during, guarded):
    """Ctrl-C, a termination, a closed terminal. The weights and the log are as if never ended."""
    end = partial(signal.raise_signal, signal.Signals[name])
    during(4, end)
    args = [*TINY, f'--out_dir={tmp_path}', '--log_interval=5']
    printed, message = run('train.py', *args)
    assert message == '' and printed.count('holds iteration') == 2
    assert load(tmp_path)['iter_num'] == 5
    printed, message = run('train.py', *args)
    assert message == '' and 'ckpt.pt at 5 of 6' in printed
    assert_same_run(tmp_path, trained)
    whole = rows_of(trained)
    assert rows_of(tmp_path) == [whole[0], whole[3], whole[5], whole[6]]


def test_a_second_ctrl_c_ends_at_once(run, tmp_path, during, guarded):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    during(5, twice)
    with pytest.raises(KeyboardInterrupt):
        run('train.py', *TINY, f'--out_dir={tmp_path}')
    assert load(tmp_path)['iter_num'] == 3 and len(rows_of(tmp_path)) == 1 + 4


def test_under_nohup_a_closed_terminal_is_nothing(trained, run, tmp_path, during, guarded):
    """nohup is a signal that is ignored from the start."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hang_up = partial(signal.raise_signal, signal.SIGHUP)
    during(4, hang_up)
    assert run('train.py', *TINY, f'--out_dir={tmp_path}')[1] == ''
    assert_same_run(tmp_path, trained)
    assert rows_of(tmp_path) == rows_of(trained)


# -------------------------------------------------------------------------------------------------
# Full disks, and folders that cannot be written


@contextmanager
def files_of_at_most(size):
    """As a full disk: no file grows beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_checkpoint_whole(trained, run, tmp_path):
    """The log fits on it, and the next checkpoint does not."""
    args = [*TINY, f'--out_dir={tmp_path}']
    assert run('train.py', *args, '--max_iters=3')[1] == ''
    before = (tmp_path / 'ckpt.pt').read_bytes()
    with files_of_at_most(len(before) // 2):
        _, message = run('train.py', *args)
    assert f'cannot write {tmp_path}/ckpt.pt; an older one is whole (' in message
    assert '\n' not in message and (tmp_path / 'ckpt.pt').read_bytes() == before
    assert run('train.py', *args)[1] == '' and load(tmp_path)['iter_num'] == 6


def test_a_full_disk_is_said_before_samples_are_drawn(trained, run, tmp_path, monkeypatch):
    """If their array of 12,288 bytes and its head do not fit. Or else when they are packed."""
    args = '--ckpt=out-whole/ckpt.pt', f'--out={tmp_path}/x.npz', '--num_samples=12'
    with files_of_at_most(12_300), monkeypatch.context() as patch:
        patch.setattr(sample, 'odeint', None)
        early = run('sample.py', *args)[1]
    with files_of_at_most(12_500):      # without room for labels
        late = run('sample.py', *args)[1]
    for message in (early, late):
        assert f'cannot write {tmp_path}/x.npz (OSError' in message and '\n' not in message
    assert run('sample.py', *args)[1] == '' and os.listdir(tmp_path) == ['x.npz']


def test_a_folder_that_cannot_be_written_is_named_before_any_work(trained, run):
    (trained.parent / 'file').write_text('')
    printed, message = run('train.py', *TINY, '--out_dir=file/out')
    assert 'cannot write to file/out (' in message and 'iter 1' not in printed
    _, message = run('sample.py', '--ckpt=out-whole/ckpt.pt', '--out=file/x/')
    assert 'cannot write file/x/ (' in message and '\n' not in message


# -------------------------------------------------------------------------------------------------
# Files that are not what they should be


def test_what_is_no_whole_checkpoint_is_refused_and_left_alone(trained, run, tmp_path):
    file = tmp_path / 'ckpt.pt'
    whole = (trained / 'ckpt.pt').read_bytes()
    torch.save(dict(model={}), file)
    for content in (file.read_bytes(), whole[:100_000], whole[:-1], b'{}', b''):
        file.write_bytes(content)
        for option in (f'--out_dir={tmp_path}', f'--init_from={file}'):
            _, message = run('train.py', *TINY, '--out_dir=out-new', option)
            assert f"{file}' is no checkpoint of this train.py, or is damaged (" in message
            assert '\n' not in message and file.read_bytes() == content
        assert os.listdir(tmp_path) == ['ckpt.pt']


class Payload:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, 'w')


def test_pickles_with_a_payload_are_never_run(trained, tmp_path):
    mark = tmp_path / 'mark'
    payload = Payload(mark)
    pickle.loads(pickle.dumps(payload)).close()
    mark.unlink()       # it works

    evil = np.array([payload] * 30, dtype=object)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / 'good.npz', images)
    np.savez(tmp_path / 'images.npz', evil)
    np.savez(tmp_path / 'statistics.npz', mu=evil, sigma=np.zeros((2048, 2048)))
    torch.save(dict(model=payload), tmp_path / 'zip.pt')
    torch.save(dict(model=payload), tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    (tmp_path / 'raw.pt').write_bytes(pickle.dumps(payload, 2))
    for name in ('images', 'labels'):
        make_digits(tmp_path / name, train=20, heldout=10)
        np.save(tmp_path / name / f'{name}.npy', evil)
    (tmp_path / 'vae').mkdir()
    (tmp_path / 'vae/config.json').write_text(json.dumps(dict(_class_name='AutoencoderKL')))
    torch.save(dict(weight=payload), tmp_path / 'vae/diffusion_pytorch_model.bin')
    Image.fromarray(images[0]).save(tmp_path / 'picture.png')

    def refused(words, script, *args):
        message = run_in(tmp_path, script, *args)
        assert words in message and '\n' not in message and not mark.exists()

    train = ('train.py', *TINY, f'--dataset={trained.parent}/data/digits')
    for file in ('zip.pt', 'old.pt', 'raw.pt'):
        refused('no checkpoint', 'sample.py', f'--ckpt={file}')
        refused('no checkpoint', *train, f'--init_from={file}')
        refused('Inception weights', 'fid.py', '--samples=good.npz', '--ref=good.npz',
                f'--inception={file}')
    for file in ('images.npz', 'statistics.npz'):
        refused('has no images', 'fid.py', '--samples=good.npz', f'--ref={file}')
    for folder in ('images', 'labels'):
        refused('is not a dataset', *train, f'--dataset={folder}')
    refused('no folder or', 'data.py', '--source=.', '--out=x', '--vae=vae', '--size=8')


# -------------------------------------------------------------------------------------------------
# Models that diverge, pictures that cannot be drawn, any settings


@pytest.mark.parametrize('value', (float('nan'), 1e30))
@pytest.mark.parametrize('method', ('dopri5', 'euler'))
def test_a_diverged_model_draws_nothing_and_says_so(value, method, trained, run, tmp_path):
    checkpoint = load(trained)
    for name, weights in checkpoint['ema'].items():
        if 'final' in name:
            weights.fill_(value)
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    _, message = run('sample.py', f'--ckpt={tmp_path}/ckpt.pt', '--num_samples=2',
                     f'--method={method}', f'--out={tmp_path}/x.npz')
    assert 'the samples cannot be drawn: has the model diverged? (Floating' in message
    assert '\n' not in message and not (tmp_path / 'x.npz').exists()


def test_a_picture_that_cannot_be_drawn_does_not_stop_training(trained, tmp_path, monkeypatch,
                                                               capsys):
    saved = []

    def broken(*args, **solver):
        saved.append(load(tmp_path)['iter_num'])
        raise ArithmeticError('out of luck')

    monkeypatch.setattr(sample, 'draw', broken)
    assert run_in(trained.parent, 'train.py', *TINY, f'--out_dir={tmp_path}') == ''
    assert saved == [3, 6]      # before the picture
    assert capsys.readouterr().err.count('ArithmeticError: out of luck') == 2
    assert_same_run(tmp_path, trained)
    assert rows_of(tmp_path) == rows_of(trained)


VARIANTS = (('mask=none', 'mask=self', 'image_tokens=True', 'flow=edify', 'flow=pyramidal'),
            ('shared=mod', 'shared=ffn+proj+qkv'),
            ('schedule=gvp', 'schedule=quadratic', 'schedule=cubic'))


def test_any_settings_train_and_sample_or_are_refused_with_a_sentence(plain, run, tmp_path):
    went_well = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        variant = ','.join(rng.choice(group) for group in VARIANTS if rng.integers(2))
        starts = np.sort(rng.uniform(0.05, 0.95, rng.integers(4)))[::-1].round(2)
        settings = dict(T=tuple(starts.tolist()), patch=rng.choice([2, 2, 4]),
                        width=rng.choice([8, 24, 24]), heads=rng.choice([1, 2, 3]),
                        dataset=rng.choice(['digits', 'digits', plain]), cfg=rng.choice([1, 2]),
                        batch_size=rng.integers(3, 9) * 2, ema_decay=rng.choice([0, 0.9]),
                        gradient_accumulation_steps=rng.choice([1, 2]),
                        dtype=rng.choice(['float32', 'bfloat16']),
                        checkpoint_blocks=rng.choice([True, False]))
        args = [f'--{key}={value}' for key, value in settings.items()]
        out = tmp_path / str(seed)
        script = ['tests/variants.py', variant] if variant else []
        _, message = run(*script, 'train.py', *TINY, *args, f'--out_dir={out}', '--max_iters=2')
        if message:
            assert '\n' not in message and not out.exists(), args
            continue
        _, message = run(*script, 'sample.py', f'--ckpt={out}/ckpt.pt', '--num_samples=3')
        assert message == '' and np.isfinite(float(rows_of(out)[2][1])), args
        went_well.append(variant)
    assert 4 < len(went_well) < 12


# -------------------------------------------------------------------------------------------------
# The jobs that were started at first


def test_a_killed_run_goes_on_as_if_nothing_had_been(jobs, trained, run):
    """Only the iteration after its checkpoint stands twice in the log."""
    jobs['killed'].communicate()
    out, whole = jobs['folder'] / 'killed', rows_of(trained)
    assert jobs['killed'].returncode == -signal.SIGKILL
    assert load(out)['iter_num'] == 3 and rows_of(out) == whole[:5]
    assert run('train.py', *TINY, f'--out_dir={out}')[1] == ''
    assert_same_run(out, trained)
    assert rows_of(out) == [*whole[:5], *whole[4:]]


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_iteration(jobs):
    printed = finish(*jobs['stopped'])
    assert printed.count('holds iteration 5') == 1      # process 0 alone speaks
    assert load(jobs['folder'] / 'stopped')['iter_num'] == 5
    assert rows_of(jobs['folder'] / 'stopped')[-1][0] == '5'


def test_torchrun_that_is_terminated_saves_its_last_iteration(jobs):
    printed, _ = jobs['torchrun'].communicate()
    iteration = re.search(r'holds iteration (\d+)', printed)[1]
    assert 5 <= int(iteration) < 10_000
    assert load(jobs['folder'] / 'torchrun')['iter_num'] == int(iteration)
    assert rows_of(jobs['folder'] / 'torchrun')[-1][0] == iteration


@pytest.mark.parametrize('lost', (0, 1))
def test_a_lost_process_ends_the_other_and_the_run_goes_on(lost, jobs, run):
    processes, output = jobs[f'lost{lost}']
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes.pop(lost) == -signal.SIGKILL and codes[0] > 0
    assert 'onnection' in Path(output).read_text()
    printed, message = run('train.py', *TINY, f"--out_dir={jobs['folder']}/lost{lost}")
    assert message == '' and 'ckpt.pt at 3 of 6' in printed


@pytest.mark.parametrize('script, args, words', (
    ('train.py', (*TINY, '--out_dir=out-whole'), 'they need the same settings'),
    ('data.py', ('--source=out-whole', '--out=made'), 'they must see the same pictures')))
def test_processes_that_begin_unalike_end_with_a_sentence(script, args, words, trained, tmp_path):
    """One sees a checkpoint and a picture, the other one two pictures."""
    (tmp_path / 'data').symlink_to(trained.parent / 'data')
    (tmp_path / 'out-whole').mkdir()
    for name in 'ab':
        Image.new('L', (8, 8)).save(tmp_path / f'out-whole/{name}.png')
    processes, output = start_two(trained.parent, script, *args, other=tmp_path)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [1, 1]
    assert Path(output).read_text().count(f'processes differ: {words}') == 2
    assert sorted(os.listdir(tmp_path)) == ['data', 'out-whole']


# -------------------------------------------------------------------------------------------------
# Soak


def kills_until_done(command, folder, seconds):
    """Starts a command until it ends by itself. Returns how often it was killed (-9) before."""
    rng = np.random.default_rng()
    for kills in itertools.count():
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                                  timeout=seconds * rng.uniform(0.4, 1.1))
        except subprocess.TimeoutExpired:
            continue
        assert done.returncode == 0 or kills and 'exists: delete it' in done.stderr, done.stderr
        return kills


@pytest.mark.soak
@pytest.mark.parametrize('script', ('train.py', 'data.py', 'sample.py'))
def test_kills_at_random_moments_change_nothing(script, trained, vae_folder, tmp_path):
    """Eight or more of each script."""
    draw = f'--ckpt={trained}/ckpt.pt', '--num_samples=400', '--batch_size=4'
    assert run_in(tmp_path, 'sample.py', *draw, '--out=pictures/') == ''
    args = {'train.py': [*TINY, '--max_iters=240', '--eval_interval=10', '--out_dir=out',
                         f'--dataset={trained.parent}/data/digits'],
            'data.py': [f'--source={tmp_path}/pictures', f'--vae={vae_folder}', '--size=32',
                        '--batch_size=2', '--out=out'],
            'sample.py': [*draw, '--out=out/x.npz']}
    command = [sys.executable, f'{ROOT}/{script}', '--device=cpu', *args[script]]
    (tmp_path / 'whole').mkdir()
    clock = time.time()
    subprocess.run(command, cwd=tmp_path / 'whole', check=True)
    seconds = time.time() - clock
    whole, kills = tmp_path / 'whole/out', 0
    while kills < 8:
        out = Path(tempfile.mkdtemp(dir=tmp_path), 'out')
        kills += kills_until_done(command, out.parent, seconds)
        assert os.listdir(out.parent) == ['out']
        if script == 'train.py':
            assert_same_run(out, whole)
            rows, expected = rows_of(out), rows_of(whole)
            assert all(row in expected for row in rows)
            # A kill in an evaluation, after its checkpoint, loses the row
            assert all(row in rows or int(row[0]) % 10 == 0 for row in expected)
        else:
            assert contents(out) == contents(whole)


if __name__ == '__main__':
    main(*sys.argv[1:])
