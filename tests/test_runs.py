"""
The paper's configs end to end at reduced width and grid: images, a VAE's latents, training, samples decoded to PNG.
"""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from configurator import configure
from test_configurator import train_defaults

SMALL = ('--width=32', '--depth=2', '--heads=2', '--batch_size=12', '--epochs=0', '--max_iters=3', '--eval_interval=3',
         '--log_interval=1', '--sample_images=2', '--eval_images=8', '--method=midpoint', '--steps=6', '--device=cpu')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder tree of 24 smooth pictures of 260 x 300 in two classes."""
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(24):
        os.makedirs(folder / 'ab'[i % 2], exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        small.resize((260, 300), Image.Resampling.BICUBIC).save(folder / 'ab'[i % 2] / f'{i}.jpg')
    return folder


CONFIGS = ('celebahq256', 'celebahq512', 'celebahq1024', 'imagenet256_b2', 'imagenet256_xl2')


@pytest.mark.parametrize('config', CONFIGS)
def test_every_config_prepares_trains_and_samples(config, pictures, vae_folder, run, tmp_path):
    settings = configure(train_defaults(), [f'config/{config}.py'])
    grid = min(settings['size'], 32)
    size = 2 * grid     # this VAE halves the grid, the real ones divide it by 8
    out = tmp_path / 'data'
    _, message = run('data.py', f'--source={pictures}', f'--out={out}', f'--size={size}', f'--vae={vae_folder}',
                     '--device=cpu')
    assert message == ''
    printed, message = run('train.py', f'config/{config}.py', *SMALL, f'--size={grid}', f'--dataset={out}',
                           f'--out_dir={tmp_path}')
    assert message == '' and f'{len(settings["T"]) + 1} scales of {grid}' in printed
    assert Image.open(tmp_path / 'samples.png').size == (10 * size, size)
    _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), f'--out={tmp_path}/png/', '--num_samples=2')
    assert message == ''
    sizes = {Image.open(tmp_path / 'png' / f'00000{i}.png').size for i in range(2)}
    assert sizes == {(size, size)} and Image.open(tmp_path / 'png' / '000000.png').mode == 'RGB'
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert (checkpoint['ema'] is not None) == config.startswith('imagenet')
    assert checkpoint['model_args']['n_classes'] == (1000 if config.startswith('imagenet') else 0)


@pytest.fixture(scope='module')
def latent_run(pictures, vae_folder, tmp_path_factory):
    """A checkpoint trained on latents of 32 x 32 pictures."""
    folder = tmp_path_factory.mktemp('latents')
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    for script, *args in (('data.py', f'--source={pictures}', '--out=data/x', '--size=32', f'--vae={vae_folder}'),
                          ('train.py', 'config/celebahq256.py', *SMALL, '--size=16', '--dataset=x', '--dtype=float32')):
        subprocess.run([sys.executable, os.path.join(ROOT, script), *args], cwd=folder, check=True, env=environment,
                       capture_output=True)
    return folder


def test_samples_are_decoded_by_the_checkpoints_own_vae(latent_run, vae_folder, run):
    """Decoded again by hand from the model's latents: vae.decode(latents / scaling factor)."""
    from diffusers import AutoencoderKL
    from model import LapFlow, LapFlowConfig
    from sample import generate, noise_of
    ckpt = str(latent_run / 'out' / 'ckpt.pt')
    assert run('sample.py', '--ckpt', ckpt, '--num_samples=3', f'--out={latent_run}/x.npz')[1] == ''
    checkpoint = torch.load(ckpt, weights_only=True)
    model = LapFlow(LapFlowConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['model'])
    latents, _ = generate(model, noise_of(0, range(3), (4, 16, 16)), method='midpoint', steps=6)
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        images = (vae.decode(latents / 0.7).sample * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    drawn = np.load(latent_run / 'x.npz')['arr_0']
    assert drawn.shape == (3, 32, 32, 3) and np.abs(drawn - images).max() <= 1


def test_many_processes_draw_exactly_the_samples_of_one(latent_run):
    """Exactly N, whatever the world size, and within one grey level for a fixed-step solver."""
    command = [os.path.join(ROOT, 'sample.py'), '--ckpt', 'out/ckpt.pt', '--num_samples=7', '--seed=2', '--device=cpu']
    two = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    for launcher, args in (([sys.executable], ['--out=one.npz', '--batch_size=7']),
                           (two, ['--out=two.npz', '--batch_size=2']), (two, ['--out=png/'])):
        subprocess.run([*launcher, *command, *args], cwd=latent_run, check=True, env=environment, capture_output=True)
    one, two = (np.load(latent_run / f'{name}.npz')['arr_0'].astype(int) for name in ('one', 'two'))
    assert one.shape == (7, 32, 32, 3) and np.abs(one - two).max() <= 1
    names = sorted(name for name in os.listdir(latent_run / 'png') if name.endswith('.png'))
    assert names == [f'00000{i}.png' for i in range(7)]
    png = np.stack([np.asarray(Image.open(latent_run / 'png' / name)) for name in names])
    assert np.abs(png - one).max() <= 1 and not list(latent_run.glob('*partial*'))


def test_a_folder_of_samples_goes_on_where_it_stopped(latent_run, run):
    ckpt, out = str(latent_run / 'out' / 'ckpt.pt'), latent_run / 'more'
    args = ['--ckpt', ckpt, f'--out={out}/', '--device=cpu']
    run('sample.py', *args, '--num_samples=5')
    whole = {file.name: file.read_bytes() for file in out.glob('*.png')}
    (out / '000001.png').unlink()
    (out / '000004.png').unlink()
    kept = (out / '000000.png').stat().st_mtime_ns
    printed, message = run('sample.py', *args, '--num_samples=6')
    assert message == '' and (out / '000000.png').stat().st_mtime_ns == kept
    again = {file.name: file.read_bytes() for file in out.glob('*.png')}
    assert len(again) == 6 and {name: again[name] for name in whole} == whole
    for other in (['--seed=1'], ['--steps=8']):
        _, message = run('sample.py', *args, *other)
        assert 'other settings' in message and other[0][2:6] in message
    assert {file.name: file.read_bytes() for file in out.glob('*.png')} == again


def test_a_vae_that_does_not_fit_the_checkpoint_is_refused(latent_run, vae_folder, run, tmp_path):
    checkpoint = torch.load(latent_run / 'out' / 'ckpt.pt', weights_only=True)
    checkpoint['data']['scaling_factor'] = 0.18215
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), '--num_samples=1')
    assert 'scaling_factor' in message and '0.18215' in message and '\n' not in message


def test_a_run_begun_by_one_process_goes_on_with_two(latent_run):
    """Losses and weights of ten more iterations agree to rounding with those of one process all the way."""
    command = [os.path.join(ROOT, 'train.py'), 'config/celebahq256.py', *SMALL, '--size=16', '--dataset=x',
               '--dtype=float32']
    two = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    environment = dict(os.environ, OMP_NUM_THREADS='1')

    def train(launcher, out, iterations):
        subprocess.run([*launcher, *command, '--eval_interval=20', f'--max_iters={iterations}', f'--out_dir={out}',
                        '--decay_lr=False'], cwd=latent_run, check=True, env=environment, capture_output=True)
    train([sys.executable], 'one', 14)
    train([sys.executable], 'mixed', 4)
    train(two, 'mixed', 14)
    logs = [np.genfromtxt(latent_run / out / 'log.csv', delimiter=',', names=True) for out in ('one', 'mixed')]
    assert len(logs[0]) == len(logs[1]) == 14
    for key in ('loss', 'grad_norm'):
        np.testing.assert_allclose(logs[0][key], logs[1][key], atol=1e-5)
    one, mixed = (torch.load(latent_run / out / 'ckpt.pt', weights_only=True) for out in ('one', 'mixed'))
    for name in one['model']:
        torch.testing.assert_close(one['model'][name], mixed['model'][name], atol=1e-4, rtol=0)


def test_a_lost_process_restarts_the_job_and_at_last_ends_it(latent_run):
    """kill -9 one of two processes, twice: torchrun --max_restarts=1 first resumes, then ends both, with a message."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max_restarts=1',
               '--monitor-interval=0.1', os.path.join(ROOT, 'train.py'), 'config/celebahq256.py', *SMALL, '--size=16',
               '--dataset=x', '--max_iters=1000000', '--out_dir=lost', '--eval_interval=10', '--sample_images=1']
    ckpt, printed = latent_run / 'lost' / 'ckpt.pt', latent_run / 'printed'
    with open(printed, 'w') as f:
        job = subprocess.Popen(command, cwd=latent_run, env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1'),
                               text=True, stdout=f, stderr=subprocess.PIPE)
    try:
        for sign in ('ckpt.pt and samples.png written', 'resuming'):
            while printed.read_text().partition(sign)[2].count('ckpt.pt and samples.png written') < 1:
                assert job.poll() is None
                time.sleep(0.05)
            with open(f'/proc/{job.pid}/task/{job.pid}/children') as f:
                os.kill(int(f.read().split()[-1]), signal.SIGKILL)
        _, errors = job.communicate(timeout=100)
    finally:
        job.kill()
    assert job.returncode != 0 and 'SIGKILL' in errors and ckpt.exists()
    log = np.genfromtxt(latent_run / 'lost' / 'log.csv', delimiter=',', names=True)
    assert log['iter'].tolist() == list(range(1, len(log) + 1)) and len(log) >= 20
