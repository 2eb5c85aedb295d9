"""
What goes wrong around a run: killed and terminated jobs, full disks, damaged files, hostile files, a diverged model.

    python -m pytest -m soak        # the slow one: more than twenty kills at random moments
"""
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image

import model as lapflow
import sample
from conftest import ROOT, TINY, TORCHRUN, config_in_place, finish, run_in, start_two, started, variant_in_place
from data import make_digits, read_picture
from model import LapFlow, LapFlowConfig, multiscale_loss
from test_data import INCOMPLETE
from test_train import load, losses, same


def wait_for(condition, job):
    """Waits until the condition holds of a job that runs on."""
    while not condition():
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Ended from outside


@pytest.mark.parametrize('how', ('one process', 'torchrun'))
def test_a_terminated_run_saves_its_last_iteration_and_resumes(how, workplace, run, tmp_path):
    """SIGTERM to the job: all processes end, the checkpoint is of the last line of the log, and nothing is lost."""
    command = ['train.py', *TINY, f'--out_dir={tmp_path}', '--min_lr=1e-2', '--log_interval=5']
    with started(workplace, *command, '--eval_interval=100000', '--max_iters=100000',
                 launcher=TORCHRUN if how == 'torchrun' else [sys.executable]) as job:
        wait_for(lambda: (tmp_path / 'log.csv').exists() and len(losses(tmp_path)) > 2, job)
        job.send_signal(signal.SIGTERM)
        printed = job.communicate(timeout=60)[0]
    said = re.search(r'holds iteration (\d+)', printed)
    assert said, printed
    iteration = int(said[1])
    assert load(tmp_path)['iter_num'] == int(losses(tmp_path)[-1]['iter']) == iteration

    def go_on(*args):
        if how == 'torchrun':
            finish(*start_two(workplace, *command, *args))
        else:
            assert run(*command, *args)[1] == ''
    more, whole = [f'--max_iters={iteration + 5}', f'--eval_interval={iteration + 5}'], tmp_path / 'whole'
    go_on(*more)
    go_on(*more, f'--out_dir={whole}')
    assert same(load(tmp_path)['model'], load(whole)['model']) and losses(tmp_path) == losses(whole)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_iteration(workplace, tmp_path):
    jobs, output = start_two(workplace, 'train.py', *TINY, f'--out_dir={tmp_path}', '--max_iters=100000',
                             '--eval_interval=100000')
    while not (tmp_path / 'log.csv').exists() or not losses(tmp_path):
        assert all(job.is_alive() for job in jobs)
        time.sleep(0.02)
    os.kill(jobs[1].pid, signal.SIGTERM)
    said = re.search(r'holds iteration (\d+)', finish(jobs, output))
    assert load(tmp_path)['iter_num'] == int(losses(tmp_path)[-1]['iter']) == int(said[1])


@pytest.mark.parametrize('how', ('two processes', 'torchrun'))
@pytest.mark.parametrize('lost', (0, 1))
def test_a_lost_process_ends_the_other_and_the_job_goes_on_from_its_checkpoint(how, lost, workplace, tmp_path):
    """kill -9 one of two processes: neither stays, the job fails, and its checkpoint is whole."""
    command = ['train.py', *TINY, f'--out_dir={tmp_path}', '--eval_interval=10', '--sample_images=1']
    saved = lambda: (tmp_path / 'ckpt.pt').exists()
    if how == 'torchrun':
        with started(workplace, *command, '--max_iters=1000000', launcher=[*TORCHRUN, '--monitor-interval=0.1'],
                     stderr=subprocess.PIPE) as job:
            assert any('holds iteration' in line for line in job.stdout), job.stderr.read()
            with open(f'/proc/{job.pid}/task/{job.pid}/children') as f:
                workers = [int(pid) for pid in f.read().split()][-2:]
            os.kill(workers[lost], signal.SIGKILL)
            _, errors = job.communicate(timeout=100)       # until nobody can write there any more
        assert job.returncode != 0 and 'SIGKILL' in errors
    else:
        jobs, output = start_two(workplace, *command, '--max_iters=1000000')
        while not saved():
            assert all(job.is_alive() for job in jobs)
            time.sleep(0.02)
        jobs[lost].kill()
        for job in jobs:
            job.join(60)
        exitcodes = [job.exitcode for job in jobs]
        for job in jobs:
            job.kill()
        assert exitcodes[lost] == -signal.SIGKILL and exitcodes[1 - lost] not in (0, None)
    iteration = load(tmp_path)['iter_num']
    printed = finish(*start_two(workplace, *command, f'--max_iters={iteration + 3}'))
    assert re.search(rf'resuming {tmp_path}/ckpt.pt at (iteration )?{iteration}\b', printed)
    assert load(tmp_path)['iter_num'] == iteration + 3
    iterations = [int(row['iter']) for row in losses(tmp_path)]
    assert set(iterations) >= set(range(1, iteration + 4)) - {iteration}        # that may be lost in evaluation


@pytest.mark.soak
def test_twenty_four_kills_at_random_moments_change_nothing(workplace, vae_folder, tmp_path):
    """kill -9 of training, preparing latents and sampling, eight times each; then the bytes of runs left alone."""
    rng, script = np.random.default_rng(0), lambda name: [sys.executable, os.path.join(ROOT, name)]
    (tmp_path / 'source').mkdir()
    for i in range(400):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'source' / f'{i:03}.png')
    train = [*script('train.py'), *TINY, '--max_iters=240', '--eval_interval=10', '--log_interval=1']
    prepare = [*script('data.py'), f'--source={tmp_path / "source"}', '--size=32', f'--vae={vae_folder}',
               '--batch_size=2', '--device=cpu']
    draw = [*script('sample.py'), '--ckpt', str(tmp_path / 'train-whole' / 'ckpt.pt'), '--num_samples=400',
            '--batch_size=4', '--device=cpu']

    def run(command, limit=lambda: None):
        """Kills the command when its time is up and starts it again, until it ends; (seconds of the last, kills)."""
        for kills in count():
            started = time.time()
            with subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  text=True) as job:
                try:
                    _, errors = job.communicate(timeout=limit())
                    done = kills and 'exists: delete it' in errors      # killed after its last step
                    assert job.returncode == 0 or done, errors
                    return time.time() - started, kills
                except subprocess.TimeoutExpired:
                    job.kill()

    def same_log(whole, killed):
        """
        The log is written on: iterations after the last checkpoint stand in it twice, but alike, and a kill during
        evaluation, after its checkpoint, loses that row.
        """
        whole, killed = losses(whole), losses(killed)
        lost = [row for row in whole if row not in killed]
        return all(row in whole for row in killed) and all(int(row['iter']) % 10 == 0 for row in lost)

    def equal(name, a, b):
        if name == 'train':
            keys = ('model', 'ema', 'optimizer', 'iter_num')
            return all(same(load(a)[key], load(b)[key]) for key in keys) and same_log(a, b)
        assert [file.name for file in tmp_path.glob(f'{b.name}*')] == [b.name]      # nothing half-made beside it
        if name == 'sample':
            return a.read_bytes() == b.read_bytes()
        read = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}
        return read(a) == read(b)

    # A folder of samples stays after a kill, and is refused: one file of samples is drawn anew
    for name, command, out in (('train', train, '--out_dir={}'), ('data', prepare, '--out={}'),
                               ('sample', draw, '--out={}.npz')):
        target = lambda trial: tmp_path / (f'{name}-{trial}' + '.npz' * (name == 'sample'))
        whole, kills = target('whole'), 0
        seconds, _ = run([*command, out.format(tmp_path / f'{name}-whole')])
        for trial in count():
            command_of = [*command, out.format(tmp_path / f'{name}-{trial}')]
            kills += run(command_of, lambda: seconds * rng.uniform(0.4, 1.1))[1]
            assert equal(name, whole, target(trial))
            if kills >= 8:
                break
        print(f'{name}: {kills} kills in {trial + 1} runs of {seconds:.1f} s')


def test_places_that_cannot_be_written_are_named_before_any_work(trained, workplace, run):
    (workplace / 'file').write_text('')
    for script, args, words in (('train.py', [*TINY, '--out_dir=file/out'], 'cannot write to file/out'),
                                ('sample.py', ['--ckpt=out-whole/ckpt.pt', '--out=file/x.png'], 'cannot write file/'),
                                ('sample.py', ['--ckpt=out-whole/ckpt.pt', '--out=file/x/'], 'cannot write file/')):
        printed, message = run(script, *args)
        assert words in message and 'file/' in message and '\n' not in message and 'iter 1' not in printed


def test_a_folder_that_holds_something_else_is_not_drawn_into(trained, run, tmp_path):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / '000000.png').write_bytes(b'a photo')
    (tmp_path / 'photos.npy').write_bytes(b'features')
    _, message = run('sample.py', f'--ckpt={trained}/ckpt.pt', f'--out={tmp_path}/photos/', '--num_samples=2')
    assert f'{tmp_path}/photos/ is not empty' in message and '\n' not in message
    assert os.listdir(tmp_path / 'photos') == ['000000.png']
    assert (tmp_path / 'photos' / '000000.png').read_bytes() == b'a photo'
    assert sorted(os.listdir(tmp_path)) == ['photos', 'photos.npy']
    assert (tmp_path / 'photos.npy').read_bytes() == b'features'


@contextmanager
def files_of_at_most(size):
    """As a full disk: no file can be written beyond a size."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('out', ('x.npz', 'x.png', 'x/'))
def test_a_full_disk_shows_before_samples_are_drawn(out, trained, run, tmp_path, monkeypatch):
    with monkeypatch.context() as drawn, files_of_at_most(20_000):
        drawn.setattr(sample, 'odeint', lambda *args, **options: pytest.fail('a sample was drawn'))
        _, message = run('sample.py', f'--ckpt={trained}/ckpt.pt', f'--out={tmp_path}/{out}', '--num_samples=100')
    assert f'cannot write {tmp_path}/{out}' in message and '\n' not in message
    assert run('sample.py', f'--ckpt={trained}/ckpt.pt', f'--out={tmp_path}/{out}', '--num_samples=3')[1] == ''


def test_a_disk_that_is_full_of_samples_says_so(trained, run, tmp_path):
    """The array of 12 samples fits, 13 kB, and the .npz with its labels does not."""
    with files_of_at_most(12 * 32 * 32 + 200):
        _, message = run('sample.py', f'--ckpt={trained}/ckpt.pt', f'--out={tmp_path}/x.npz', '--num_samples=12')
    assert f'cannot write {tmp_path}/x.npz (OSError' in message and '\n' not in message


def test_a_full_disk_leaves_no_half_made_digits(tmp_path, run):
    with files_of_at_most(100_000):
        message = run_in(tmp_path, 'train.py', *TINY)
    assert 'cannot write data/digits (OSError' in message and '\n' not in message
    assert not (tmp_path / 'data' / 'digits').exists() and not (tmp_path / 'out-digits').exists()


def test_a_folder_is_not_drawn_over_and_a_forks_error_is_no_divergence(trained, run, tmp_path, monkeypatch):
    (tmp_path / 'x.png').mkdir()
    _, message = run('sample.py', f'--ckpt={trained}/ckpt.pt', f'--out={tmp_path}/x.png')
    assert 'x.png is a folder' in message and '\n' not in message

    def broken(self, *args):
        assert False, 'a fork checks its shapes'
    monkeypatch.setattr(LapFlow, 'forward', broken)
    with pytest.raises(AssertionError, match='checks its shapes'):
        run('sample.py', f'--ckpt={trained}/ckpt.pt', '--num_samples=1', '--method=dopri5', f'--out={tmp_path}/y.png')


def test_a_rank_without_a_world_is_one_process_that_speaks(run, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    printed, message = run('train.py', *TINY, '--max_iters=1', f'--out_dir={tmp_path}/out')
    assert message == '' and 'holds iteration 1' in printed and load(tmp_path / 'out')['iter_num'] == 1


def test_the_last_update_may_be_skipped_without_losing_the_run(run, tmp_path, monkeypatch):
    """A loss that is not finite in the last iteration alone: the weights are sound, and the checkpoint is written."""
    whole = lapflow.multiscale_loss

    def planted(*args):
        loss, errors = whole(*args)
        return loss * np.inf, errors
    monkeypatch.setattr(lapflow, 'multiscale_loss', planted)
    printed, message = run('train.py', *TINY, '--max_iters=1', '--eval_interval=1', f'--out_dir={tmp_path}')
    assert message == '' and 'skipped 1 updates' in printed and load(tmp_path)['iter_num'] == 1


def test_a_machine_without_a_compiler_is_told_to_leave_it_out(run, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    _, message = run('train.py', *TINY, '--compile=True', f'--out_dir={tmp_path}/out')
    assert 'compiler' in message and '--compile=False' in message and '\n' not in message
    assert not (tmp_path / 'out').exists()
    assert run('train.py', *TINY, '--max_iters=1', f'--out_dir={tmp_path}/out')[1] == ''


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(run, tmp_path):
    """A limit on the size of files, as a full disk: the log fits below it, the checkpoint does not."""
    args = [*TINY, f'--out_dir={tmp_path}']
    assert run('train.py', *args, '--max_iters=3')[1] == ''
    before = (tmp_path / 'ckpt.pt').read_bytes()
    with files_of_at_most(len(before) // 2):
        _, message = run('train.py', *args)
    assert f'cannot write {tmp_path}/ckpt.pt; an older one is whole' in message and '\n' not in message
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert run('train.py', *args)[1] == '' and load(tmp_path)['iter_num'] == 6


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files


@pytest.mark.parametrize('file', ('images.npy', 'labels.npy', 'meta.json'))
@pytest.mark.parametrize('damage', ('cut', 'other', 'missing'))
def test_a_damaged_dataset_is_refused_before_training(file, damage, tmp_path, run):
    folder = tmp_path / 'digits'
    make_digits(str(folder), train=60, heldout=20)
    content = (folder / file).read_bytes()
    if damage == 'cut':
        (folder / file).write_bytes(content[:-5])
    elif damage == 'missing':
        (folder / file).unlink()
    elif file == 'meta.json':
        (folder / file).write_bytes(content.replace(b'"size": 32', b'"size": 16'))
    else:       # another dataset's, of other length
        np.save(folder / file, np.load(folder / file)[:-1])
    _, message = run('train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path}/out')
    assert ('is not what its meta.json says' if damage == 'other' else INCOMPLETE) in message
    assert str(folder) in message and '\n' not in message and not (tmp_path / 'out').exists()


def test_a_diverged_model_ends_sampling_with_a_sentence_and_no_file(trained, tmp_path, run):
    checkpoint = load(trained)
    for value in (float('nan'), 1e30):
        for name in checkpoint['ema']:
            if 'final' in name:
                checkpoint['ema'][name] = torch.full_like(checkpoint['ema'][name], value)
        torch.save(checkpoint, tmp_path / 'ckpt.pt')
        for method in ('dopri5', 'euler'):
            for out in (f'{tmp_path}/{value}-{method}.png', f'{tmp_path}/{value}-{method}.npz'):
                _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), '--num_samples=2',
                                 f'--method={method}', f'--out={out}')
                assert 'the samples cannot be drawn: has the model diverged?' in message and '\n' not in message
                assert not os.path.exists(out)


def test_a_picture_that_cannot_be_drawn_does_not_stop_training(workplace, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, 'odeint', lambda *args, **options: (_ for _ in ()).throw(AssertionError('out of luck')))
    message = run_in(workplace, 'train.py', *TINY, f'--out_dir={tmp_path}')
    assert message == '' and not (tmp_path / 'samples.png').exists()
    assert capsys.readouterr().err.count('AssertionError: out of luck') == 2       # a traceback for each evaluation
    assert all(same(load(tmp_path)[key], load(trained)[key]) for key in ('model', 'ema', 'optimizer', 'iter_num'))
    assert losses(tmp_path) == losses(trained)      # with the held-out errors, which came before


# ----------------------------------------------------------------------------------------------------------------------
# Hostile files


class Payload:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, 'w')


def test_pickles_given_as_checkpoint_weights_or_dataset_are_never_run(tmp_path, run, trained):
    mark, payload = tmp_path / 'mark', Payload(str(tmp_path / 'mark'))
    pickle.loads(pickle.dumps(payload)).close()
    assert mark.exists()        # the payload works
    mark.unlink()
    Image.new('RGB', (8, 8)).save(tmp_path / 'picture.png')
    np.savez(tmp_path / 'images.npz', arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    torch.save(dict(model=payload), tmp_path / 'zip.pt')
    torch.save(dict(model=payload), tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    (tmp_path / 'raw.pt').write_bytes(pickle.dumps(payload))
    for file in ('zip.pt', 'old.pt', 'raw.pt'):
        _, message = run('sample.py', '--ckpt', str(tmp_path / file))
        assert 'no checkpoint' in message
        (tmp_path / 'out').mkdir(exist_ok=True)
        (tmp_path / 'out' / 'ckpt.pt').write_bytes((tmp_path / file).read_bytes())
        _, message = run('train.py', *TINY, f'--out_dir={tmp_path}/out')
        assert 'no checkpoint' in message
        _, message = run('fid.py', f'--samples={tmp_path}/images.npz', f'--ref={tmp_path}/images.npz',
                         f'--inception={tmp_path / file}')
        assert 'cannot load the Inception weights' in message
    for file in ('images.npy', 'labels.npy'):
        folder = tmp_path / f'of-{file}'
        make_digits(str(folder), train=20, heldout=10)
        np.save(folder / file, np.array([payload] * 30, dtype=object))
        _, message = run('train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path}/new')
        assert f'{folder} {INCOMPLETE}' in message
    for array in ('arr_0', 'mu'):
        arrays = {array: np.array([payload], dtype=object), 'sigma': np.zeros((2048, 2048), np.float32)}
        np.savez_compressed(tmp_path / 'evil.npz', **arrays)
        _, message = run('fid.py', f'--samples={tmp_path}/images.npz', f'--ref={tmp_path}/evil.npz')
        assert "evil.npz' has no images (arr_0)" in message or "evil.npz' has no statistics" in message
    vae = tmp_path / 'vae'
    vae.mkdir()
    (vae / 'config.json').write_text(json.dumps(dict(_class_name='AutoencoderKL')))
    torch.save(dict(weight=payload), vae / 'diffusion_pytorch_model.bin')
    _, message = run('data.py', f'--source={tmp_path}', f'--out={tmp_path}/x', f'--vae={vae}', '--size=8')
    assert 'is no folder or Hugging Face id of an AutoencoderKL' in message and not mark.exists()


def test_a_picture_of_too_many_pixels_is_left_unread(tmp_path):
    Image.new('1', (14_000, 14_000)).save(tmp_path / 'bomb.png')
    with pytest.raises(OSError, match='bomb.png.: .*decompression bomb'):
        read_picture(str(tmp_path / 'bomb.png'), 16)


# ----------------------------------------------------------------------------------------------------------------------
# Any settings


def random_settings(rng):
    """A variant, '' for none, and settings of a model of it, most of them possible."""
    choose = lambda *options: options[rng.integers(len(options))]
    K = rng.integers(1, 5)
    T = tuple(np.sort(rng.uniform(0.05, 0.95, K - 1))[::-1].round(2).tolist())
    flow = choose('', '', '', 'flow=pyramidal', 'flow=edify')
    settings = dict(size=int(choose(8, 16, 16, 24, 12)), channels=int(choose(1, 3, 4)),
                    patch=int(choose(1, 2, 2, 4)), width=int(choose(8, 16, 24)), depth=int(choose(1, 2)),
                    heads=int(choose(1, 2, 4, 3)), T=T, n_classes=int(choose(0, 3)))
    options = [flow, choose('', '', 'mask=none', 'mask=self') * (flow == ''),
               choose('', '', 'shared=mod', 'shared=qkv+proj', 'shared=ffn+mod', 'shared=qkv+proj+ffn+mod'),
               choose('', '', 'schedule=gvp', 'schedule=quadratic', 'schedule=cubic') * (flow != 'flow=pyramidal'),
               choose('', 'image_tokens=True') * (flow == '')]
    if not rng.integers(4):
        options = []
    return ','.join(sorted(option for option in options if option)), settings


@contextmanager
def random_config(rng):
    """The config that random settings make, its variant in place; ValueError if they cannot be."""
    variant, settings = random_settings(rng)
    with variant_in_place(variant):
        yield config_in_place(**settings)


def test_most_random_settings_are_possible():
    """Otherwise the next test would show little."""
    possible = []
    for seed in range(30, 60):
        try:
            with random_config(np.random.default_rng(seed)) as config:
                possible.append(getattr(config, 'variant', ''))
        except ValueError:
            continue
    assert len(possible) > 15 and '' in possible
    for word in ('flow=pyramidal', 'flow=edify', 'mask=none', 'mask=self', 'shared', 'schedule', 'image_tokens'):
        assert any(word in variant for variant in possible), word


@pytest.mark.parametrize('seed', range(30, 60))
def test_any_settings_either_train_and_sample_or_are_refused_with_a_sentence(seed):
    """A ragged batch of random stages, either precision: finite loss, a gradient for every weight, finite samples."""
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        try:
            config = stack.enter_context(random_config(rng))
        except ValueError as error:
            assert '\n' not in str(error) and any(name in str(error) for name in LapFlowConfig.__dataclass_fields__)
            return
        trains_and_samples(config, rng)


def trains_and_samples(config, rng):
    model = lapflow.LapFlow(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    B, K = config.K + int(rng.integers(0, 4)), config.K
    stage = np.sort(np.concatenate([np.arange(K), rng.integers(0, K, B - K)]))      # every stage at least once
    x1, x0 = torch.randn(2, B, config.channels, config.size, config.size)
    stage = torch.from_numpy(stage)
    t = lapflow.stage_times(stage, torch.rand(B), config)
    x_t, u = lapflow.states_and_velocities(x1, x0, t, stage, config)
    y = torch.randint(config.n_classes + 1, (B,)) if config.n_classes else None
    with torch.autocast('cpu', torch.bfloat16, enabled=bool(rng.integers(2))):
        v = model(x_t, t, y)
    assert {k: x.shape for k, x in v.items()} == {k: x.shape for k, x in u.items()}
    assert list(v) == list(u) == list(range(K)) and all(x.dtype == torch.float32 for x in v.values())
    loss, _ = multiscale_loss(v, u, (1.0,) * K, B)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert all(g.any() for g in gradients)
    method = ('euler', 'heun2', 'dopri5')[rng.integers(3)]
    y = torch.zeros(len(x0[:2]), dtype=torch.long) if config.n_classes else None
    x, nfe = sample.generate(model, x0[:2], y, method, K + 1, 1e-2, 2.0 if config.n_classes else 1.0)
    assert x.shape == x0[:2].shape and x.isfinite().all() and nfe >= K


@pytest.mark.parametrize('seed', range(120, 136))
def test_any_command_line_either_trains_and_samples_or_ends_with_a_sentence(seed, plain, run, tmp_path):
    rng = np.random.default_rng(seed)
    variant, settings = random_settings(rng)
    script = lambda name: ['tests/variants.py', variant, name] if variant else [name]
    settings |= dict(dataset=str(rng.choice(['digits', 'digits', plain])), batch_size=int(rng.integers(1, 16)),
                     cfg=float(rng.choice([1, 2])), max_iters=2, eval_interval=2, patch=2 * settings['patch'],
                     gradient_accumulation_steps=int(rng.integers(1, 3)), ema_decay=float(rng.choice([0, 0.9])),
                     dtype=str(rng.choice(['float32', 'bfloat16'])), checkpoint_blocks=bool(rng.integers(2)))
    del settings['size'], settings['channels'], settings['n_classes']       # the dataset's
    args = [f'--{key}={value}' for key, value in settings.items()]
    printed, message = run(*script('train.py'), *TINY, *args, f'--out_dir={tmp_path}/out')
    if message:
        assert '\n' not in message and not (tmp_path / 'out').exists()
        return
    _, message = run(*script('sample.py'), '--ckpt', f'{tmp_path}/out/ckpt.pt', '--num_samples=3', '--steps=4')
    assert message == '' and load(tmp_path / 'out')['iter_num'] == 2
