"""
What goes wrong around a run: killed and terminated jobs, full disks, damaged files, hostile files, a diverged model.

    python -m pytest -m soak        # the slow one: more than twenty kills at random moments
"""
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image

import data as data_module
import sample
from conftest import ROOT, TINY
from data import Dataset, ImageFiles, make_digits
from model import LapFlow, LapFlowConfig
from test_train import load, losses, same

ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def wait_for(condition, job):
    """Waits until the condition holds of a job that runs on."""
    while not condition():
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Ended from outside


@pytest.mark.parametrize('launcher', ([sys.executable], TORCHRUN), ids=('one process', 'torchrun'))
def test_a_terminated_run_saves_its_last_iteration_and_resumes(launcher, workplace, tmp_path):
    """SIGTERM to the job: all processes end, the checkpoint is of the last line of the log, and nothing is lost."""
    command = [*launcher, os.path.join(ROOT, 'train.py'), *TINY, '--eval_interval=100000', f'--out_dir={tmp_path}',
               '--decay_lr=False', '--log_interval=5']
    with subprocess.Popen([*command, '--max_iters=100000'], cwd=workplace, env=ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        wait_for(lambda: (tmp_path / 'log.csv').exists() and len(losses(tmp_path)) > 2, job)
        job.send_signal(signal.SIGTERM)
        printed = job.communicate(timeout=60)[0]
    said = re.search(r'holds iteration (\d+)', printed)
    assert said, printed
    iteration = int(said[1])
    assert load(tmp_path)['iter_num'] == int(losses(tmp_path)[-1]['iter']) == iteration
    more = [f'--max_iters={iteration + 5}', f'--eval_interval={iteration + 5}']
    subprocess.run([*command, *more], cwd=workplace, env=ENVIRONMENT, check=True, capture_output=True)
    whole = tmp_path / 'whole'
    subprocess.run([*command, *more, f'--out_dir={whole}'], cwd=workplace, env=ENVIRONMENT, check=True,
                   capture_output=True)
    assert same(load(tmp_path)['model'], load(whole)['model']) and losses(tmp_path) == losses(whole)


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
            with subprocess.Popen(command, cwd=workplace, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True) as job:
                try:
                    _, errors = job.communicate(timeout=limit())
                    assert job.returncode == 0, errors
                    return time.time() - started, kills
                except subprocess.TimeoutExpired:
                    job.kill()

    def equal(name, a, b):
        if name == 'train':
            keys = ('model', 'ema', 'optimizer', 'iter_num')
            return all(same(load(a)[key], load(b)[key]) for key in keys) and losses(a) == losses(b)
        read = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}
        return read(a) == read(b)

    for name, command, out in (('train', train, '--out_dir={}'), ('data', prepare, '--out={}'),
                               ('sample', draw, '--out={}/')):
        whole, kills = tmp_path / f'{name}-whole', 0
        seconds, _ = run([*command, out.format(whole)])
        for trial in count():
            killed = tmp_path / f'{name}-{trial}'
            kills += run([*command, out.format(killed)], lambda: seconds * rng.uniform(0.4, 1.1))[1]
            assert equal(name, whole, killed)
            if kills >= 8:
                break
        print(f'{name}: {kills} kills in {trial + 1} runs of {seconds:.1f} s')


def test_two_runs_in_one_folder_are_refused(workplace, tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, f'--out_dir={tmp_path}', '--max_iters=100000']
    with subprocess.Popen(command, cwd=workplace, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as job:
        try:
            wait_for(lambda: (tmp_path / 'log.csv').exists(), job)
            second = subprocess.run(command, cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True)
            assert second.returncode == 1 and 'another process is writing here' in second.stderr
            assert len(second.stderr.splitlines()) == 1 and job.poll() is None
        finally:
            job.kill()


def test_places_that_cannot_be_written_are_named_before_any_work(trained, workplace, run):
    (workplace / 'file').write_text('')
    for script, args in (('train.py', [*TINY, '--out_dir=file/out']),
                         ('sample.py', ['--ckpt=out-whole/ckpt.pt', '--out=file/x.png']),
                         ('sample.py', ['--ckpt=out-whole/ckpt.pt', '--out=file/x/'])):
        printed, message = run(script, *args)
        assert 'cannot write here' in message and 'file' in message and 'iter 1' not in printed


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(workplace, tmp_path):
    """A limit on the size of files, as a full disk: the log fits below it, the checkpoint does not."""
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, f'--out_dir={tmp_path}']
    subprocess.run([*command, '--max_iters=3'], cwd=workplace, env=ENVIRONMENT, check=True, capture_output=True)
    before = (tmp_path / 'ckpt.pt').read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    full = subprocess.run(command, cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1 and 'cannot write to' in full.stderr and 'is whole' in full.stderr
    assert 'Traceback' not in full.stderr and (tmp_path / 'ckpt.pt').read_bytes() == before
    assert not (tmp_path / 'ckpt.pt.tmp').exists()
    subprocess.run(command, cwd=workplace, env=ENVIRONMENT, check=True, capture_output=True)
    assert load(tmp_path)['iter_num'] == 6


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(trained, tmp_path, run):
    whole = bytearray((trained / 'ckpt.pt').read_bytes())
    for place in np.random.default_rng(0).integers(len(whole), size=12):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        (tmp_path / 'ckpt.pt').write_bytes(damaged)
        _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), '--num_samples=1', f'--out={tmp_path}/x.png')
        if message == '':       # padding between the records, which nothing reads
            assert same(torch.load(tmp_path / 'ckpt.pt', weights_only=True), load(trained))
        else:
            assert 'damaged' in message and '\n' not in message


@pytest.mark.parametrize('file', ('images.npy', 'labels.npy', 'meta.json'))
@pytest.mark.parametrize('damage', ('cut', 'flip', 'missing'))
def test_a_damaged_dataset_is_refused_before_training(file, damage, tmp_path, run):
    folder = tmp_path / 'digits'
    make_digits(str(folder), train=60, heldout=20)
    content = bytearray((folder / file).read_bytes())
    if damage == 'cut':
        content = content[:-5]
    elif file == 'meta.json':
        content = content.replace(b'"count": 80', b'"count": 81')
    else:
        content[-3] ^= 1
    if damage == 'missing':
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    _, message = run('train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path}/out')
    assert ('damaged' in message or 'no prepared dataset' in message) and '\n' not in message
    assert not (tmp_path / 'out').exists()


def test_a_diverged_model_ends_sampling_with_a_sentence_and_no_file(trained, tmp_path, run):
    checkpoint = load(trained)
    for value in (float('nan'), 1e30):
        for name in checkpoint['ema']:
            if 'final' in name:
                checkpoint['ema'][name] = torch.full_like(checkpoint['ema'][name], value)
        torch.save(checkpoint, tmp_path / 'ckpt.pt')
        for method in ('dopri5', 'euler'):
            _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), '--num_samples=2', f'--method={method}',
                             f'--out={tmp_path}/x.png')
            assert f'{method} cannot solve the ODE from t = 0' in message and '\n' not in message
            assert os.listdir(tmp_path) == ['ckpt.pt']


def test_a_picture_that_cannot_be_drawn_does_not_stop_training(tmp_path, run, monkeypatch):
    monkeypatch.setattr(sample, 'odeint', lambda *args, **options: (_ for _ in ()).throw(AssertionError('underflow')))
    printed, message = run('train.py', *TINY, f'--out_dir={tmp_path}')
    assert message == '' and 'no samples.png this time' in printed and load(tmp_path)['iter_num'] == 6


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
        assert 'not a checkpoint' in message
        (tmp_path / 'out').mkdir(exist_ok=True)
        (tmp_path / 'out' / 'ckpt.pt').write_bytes((tmp_path / file).read_bytes())
        _, message = run('train.py', *TINY, f'--out_dir={tmp_path}/out')
        assert 'not a checkpoint' in message
        _, message = run('fid.py', f'--samples={tmp_path}/images.npz', f'--ref={tmp_path}/images.npz',
                         f'--inception={tmp_path / file}')
        assert 'cannot be read as the Inception weights' in message
    for file in ('images.npy', 'labels.npy'):
        folder = tmp_path / f'of-{file}'
        make_digits(str(folder), train=20, heldout=10)
        np.save(folder / file, np.array([payload] * 30, dtype=object))
        _, message = run('train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path}/new')
        assert 'damaged' in message
    for array in ('arr_0', 'mu'):
        np.savez(tmp_path / 'evil.npz', **{array: np.array([payload], dtype=object), 'sigma': np.zeros(1)})
        _, message = run('fid.py', f'--samples={tmp_path}/images.npz', f'--ref={tmp_path}/evil.npz')
        assert 'cannot be read' in message
    vae = tmp_path / 'vae'
    vae.mkdir()
    (vae / 'config.json').write_text(json.dumps(dict(_class_name='AutoencoderKL')))
    torch.save(dict(weight=payload), vae / 'diffusion_pytorch_model.bin')
    _, message = run('data.py', f'--source={tmp_path}', f'--out={tmp_path}/x', f'--vae={vae}', '--size=8')
    assert 'vae must be' in message and not mark.exists()


def test_a_zip_whose_members_point_outside_writes_nothing_there(tmp_path, run):
    png = io.BytesIO()
    Image.new('RGB', (16, 16), 'red').save(png, 'png')
    inside = tmp_path / 'inside'
    inside.mkdir()
    with zipfile.ZipFile(inside / 'evil.zip', 'w') as archive:
        for name in ('../outside.png', str(tmp_path / 'absolute.png'), 'a/../../up.png', './here.png'):
            archive.writestr(name, png.getvalue())
    _, message = run('data.py', f'--source={inside / "evil.zip"}', f'--out={inside / "x"}', '--size=16')
    assert message == '' and len(Dataset(str(inside / 'x')).images) == 2     # '..' is a hidden folder's name
    assert sorted(os.listdir(tmp_path)) == ['inside'] and sorted(os.listdir(inside)) == ['evil.zip', 'x']


def test_decompression_bombs_are_left_unread(tmp_path, monkeypatch, run):
    """A .zip that unpacks to more than an image may have, a picture of too many pixels, too large statistics."""
    monkeypatch.setattr(data_module, 'LARGEST_FILE', 10_000)
    with zipfile.ZipFile(tmp_path / 'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x.png', bytes(50_000_000))
    with pytest.raises(ValueError, match='larger than'):
        ImageFiles(str(tmp_path / 'bomb.zip')).read(0)
    (tmp_path / 'many').mkdir()
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'many' / 'x.png')
    monkeypatch.setattr(data_module, 'LARGEST_FILE', 2 ** 28)
    with pytest.raises(Image.DecompressionBombError):
        ImageFiles(str(tmp_path / 'many')).read(0)
    np.savez_compressed(tmp_path / 'large.npz', mu=np.zeros(2048), sigma=np.zeros((3000, 3000)))
    _, message = run('fid.py', f'--ref={tmp_path}/large.npz', f'--samples={tmp_path}/large.npz')
    assert 'too large' in message


# ----------------------------------------------------------------------------------------------------------------------
# Any settings


def random_settings(rng):
    """Settings of a model, most of them possible."""
    choose = lambda *options: options[rng.integers(len(options))]
    K = rng.integers(1, 5)
    T = tuple(np.sort(rng.uniform(0.05, 0.95, K - 1))[::-1].round(2).tolist())
    flow = choose('lapflow', 'lapflow', 'lapflow', 'pyramidal', 'edify')
    return dict(size=int(choose(8, 16, 16, 24, 12)), channels=int(choose(1, 3, 4)), patch=int(choose(1, 2, 2, 4)),
                width=int(choose(8, 16, 24)), depth=int(choose(1, 2)), heads=int(choose(1, 2, 4, 3)), T=T, flow=flow,
                n_classes=int(choose(0, 3)), mask=choose('causal', 'causal', 'none', 'self'),
                shared=choose('', '', 'mod', 'qkv,proj', 'ffn,mod', 'qkv,proj,ffn,mod'),
                path=choose('linear', 'linear', 'gvp', 'quadratic', 'cubic'))


def test_most_random_settings_are_possible():
    """Otherwise the next test would show little."""
    possible = 0
    for seed in range(60):
        try:
            possible += bool(LapFlowConfig(**random_settings(np.random.default_rng(seed))))
        except ValueError:
            continue
    assert possible > 30


@pytest.mark.parametrize('seed', range(60))
def test_any_settings_either_train_and_sample_or_are_refused_with_a_sentence(seed):
    """A ragged batch of random stages, either precision: finite loss, a gradient for every weight, finite samples."""
    from model import multiscale_loss, stage_times, states_and_targets
    rng = np.random.default_rng(seed)
    settings = random_settings(rng)
    try:
        config = LapFlowConfig(**settings)
    except ValueError as error:
        assert '\n' not in str(error) and any(name in str(error) for name in settings)
        return
    model = LapFlow(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    B, K = config.K + int(rng.integers(0, 4)), config.K
    stage = np.sort(np.concatenate([np.arange(K), rng.integers(0, K, B - K)]))      # every stage at least once
    counts = [int((stage <= k).sum()) for k in range(K)]
    x1, x0 = torch.randn(2, B, config.channels, config.size, config.size)
    t = stage_times(torch.from_numpy(stage), torch.rand(B), config)
    x_t, u = states_and_targets(x1, x0, t, counts, config)
    y = torch.randint(config.n_classes + 1, (B,)) if config.n_classes else None
    bf16 = bool(rng.integers(2))
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        v = model(x_t, t, y)
    assert [x.shape for x in v] == [x.shape for x in u]
    loss, _ = multiscale_loss(v, u, (1.0,) * K, B)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert all(g.any() for g in gradients)
    method = ('euler', 'heun2', 'dopri5')[rng.integers(3)]
    y = torch.zeros(2, dtype=torch.long) if config.n_classes else None
    x, nfe = sample.generate(model, x0[:2], y, method, K + 1, 1e-2, 2.0 if config.n_classes else 1.0)
    assert x.shape == x0[:2].shape and x.isfinite().all() and nfe >= K


@pytest.mark.parametrize('seed', range(100, 112))
def test_any_command_line_either_trains_and_samples_or_ends_with_a_sentence(seed, run, tmp_path):
    rng = np.random.default_rng(seed)
    settings = random_settings(rng) | dict(size=32, channels=1, n_classes=int(rng.choice([-1, -1, 0, 12])))
    settings |= dict(batch_size=int(rng.integers(1, 16)), cfg=float(rng.choice([1, 2])), max_iters=2, eval_interval=2,
                     gradient_accumulation_steps=int(rng.integers(1, 3)), ema_decay=float(rng.choice([0, 0.9])),
                     dtype=str(rng.choice(['float32', 'bfloat16'])), checkpoint_blocks=bool(rng.integers(2)))
    args = [f'--{key}={value}' for key, value in settings.items()]
    printed, message = run('train.py', *TINY, *args, f'--out_dir={tmp_path}/out')
    if message:
        assert '\n' not in message and not (tmp_path / 'out').exists()
        return
    _, message = run('sample.py', '--ckpt', f'{tmp_path}/out/ckpt.pt', '--num_samples=3', '--steps=4')
    assert message == '' and load(tmp_path / 'out')['iter_num'] == 2
