"""
The paper's configs end to end at reduced width and grid: images, a VAE's latents, training, samples decoded to PNG.
"""
import gzip
import json
import os
import re
import runpy
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, finish, run_in, start_two
from data import Dataset
from test_train import same

SMALL = ('--width=32', '--depth=2', '--heads=2', '--batch_size=12', '--max_iters=3', '--eval_interval=3',
         '--log_interval=1', '--sample_images=2', '--eval_images=8', '--method=midpoint', '--steps=6', '--device=cpu',
         '--compile=False')
LATENT = ('train.py', 'config/celebahq256.py', *SMALL, '--dataset=x', '--dtype=float32')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder tree of 24 smooth pictures of 260 x 300 in two classes."""
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(24):
        os.makedirs(folder / 'ab'[i % 2], exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        small.resize((260, 300), Image.Resampling.BICUBIC).save(folder / 'ab'[i % 2] / f'{i}.jpg')
    return folder


@pytest.fixture(scope='module')
def latents(pictures, vae_folder, tmp_path_factory):
    """A folder with two datasets of latents of 32 x 32 pictures, x without classes and xy with two."""
    folder = tmp_path_factory.mktemp('latents')
    (folder / 'plain').mkdir()
    for file in sorted(pictures.rglob('*.jpg')):
        (folder / 'plain' / file.name).symlink_to(file)
    for source, out in (('plain', 'x'), (pictures, 'xy')):
        args = f'--source={source}', f'--out=data/{out}', '--size=32', f'--vae={vae_folder}', '--device=cpu'
        assert run_in(folder, 'data.py', *args) == ''
    return folder


@pytest.mark.parametrize('config', ('celebahq256', 'celebahq512', 'celebahq1024', 'imagenet256_b2', 'imagenet256_xl2'))
def test_every_config_prepares_trains_and_samples(config, latents, run, tmp_path):
    T, of_classes = runpy.run_path(f'{ROOT}/config/{config}.py')['T'], config.startswith('imagenet')
    printed, message = run('train.py', f'config/{config}.py', *SMALL, f'--dataset={latents}/data/x{"y" * of_classes}',
                           f'--out_dir={tmp_path}')
    assert message == '' and f'{len(T) + 1} scales, the finest of 16,' in printed
    assert Image.open(tmp_path / 'samples.png').size == (10 * 32, 32)
    _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), f'--out={tmp_path}/png/', '--num_samples=2')
    assert message == ''
    sizes = {Image.open(tmp_path / 'png' / f'00000{i}.png').size for i in range(2)}
    assert sizes == {(32, 32)} and Image.open(tmp_path / 'png' / '000000.png').mode == 'RGB'
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert (checkpoint['ema'] is not None) == of_classes
    assert checkpoint['model_args']['n_classes'] == 2 * of_classes
    assert (checkpoint['model_args']['size'], checkpoint['model_args']['channels']) == (16, 4)


def test_fashion_mnist_from_its_four_files_to_a_picture(tmp_path, monkeypatch):
    """The format of idx files is written here by struct: a magic number, lengths, bytes."""
    monkeypatch.chdir(tmp_path)
    images, labels, first = np.zeros((70_000, 28, 28), np.uint8), np.arange(70_000) % 10, 0
    images[:, 0, 27], images[:, 27, 0] = labels + 1, np.arange(70_000) % 251
    for part, count in (('train', 60_000), ('t10k', 10_000)):
        rows, first = slice(first, first + count), first + count
        with gzip.open(f'{part}-images-idx3-ubyte.gz', 'wb', 1) as f:
            f.write(struct.pack('>4i', 2051, count, 28, 28) + images[rows].tobytes())
        with gzip.open(f'{part}-labels-idx1-ubyte.gz', 'wb', 1) as f:
            f.write(struct.pack('>2i', 2049, count) + labels[rows].astype(np.uint8).tobytes())
    whole = (tmp_path / 't10k-images-idx3-ubyte.gz').read_bytes()
    for content in (whole[:1000], gzip.compress(b'no idx file'), None):
        (tmp_path / 't10k-images-idx3-ubyte.gz').write_bytes(content or whole)
        message = run_in(tmp_path, 'tests/fashion.py')
        assert message == '' if content is None else 'four files' in message and '\n' not in message
    data = Dataset('fashion')
    assert data.n_train == 60_000 and data.eval_index.tolist() == list(range(60_000, 70_000))
    assert data.labels.tolist() == labels.tolist()
    assert data.array.shape == (70_000, 32, 32, 1) and data.array.sum(dtype=int) == images.sum(dtype=int)
    assert (data.array[:, 2:30, 2:30, 0] == images).all()
    small = '--width=32', '--depth=1', '--heads=2', '--max_iters=1', '--sample_images=10', '--eval_images=8'
    assert run_in(tmp_path, 'train.py', 'config/fashion.py', *small) == ''
    assert run_in(tmp_path, 'sample.py', '--ckpt', 'out-fashion/ckpt.pt', '--num_samples=20') == ''
    assert Image.open('out-fashion/samples.png').size == (320, 64)


def test_a_run_judged_on_its_way_is_the_run_straight_to_its_end(workplace, run):
    """compare.py, with as many FLOPs for both systems."""
    args = ('tests/compare.py', '--extra=--device=cpu --eval_images=8 --warmup_iters=0', '--num_samples=10',
            '--workers=2')
    rows_of = lambda folder, name: json.loads((workplace / folder / f'{name}-0.json').read_text())['rows']
    printed, message = run(*args, '--points=4', '--only=lapflow,edify', '--out_dir=out-straight')
    assert message == '' and '| edify | 1 | 4 |' in printed
    [ours], [others] = (rows_of('out-straight', name) for name in ('lapflow', 'edify'))
    assert ours['iterations'] == 4 and abs(ours['flops'] / others['flops'] - 1) <= 0.5 / others['iterations']
    # Point 3 comes last here: a checkpoint past a point is not judged as the point
    message = run(*args, '--points=2,4,3', '--only=edify', '--out_dir=out-curve')[1]
    assert 'is at iteration 5, not 4' in message and '--out_dir' in message and '\n' not in message
    assert [row['point'] for row in rows_of('out-curve', 'edify')] == [2, 4]
    assert rows_of('out-curve', 'edify')[1] == others


@pytest.fixture(scope='module')
def latent_run(latents):
    """The same folder with a checkpoint trained on them, out/ckpt.pt."""
    assert run_in(latents, *LATENT) == ''
    return latents


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


def test_a_folder_of_samples_has_the_pictures_of_an_array_and_is_not_drawn_into_again(latent_run, run):
    args = ['--ckpt', str(latent_run / 'out' / 'ckpt.pt'), '--device=cpu', '--num_samples=5']
    out, before = latent_run / 'more', set(os.listdir(latent_run))
    printed, message = run('sample.py', *args, f'--out={out}/')
    assert message == '' and '5 samples, midpoint, 6 steps, NFE' in printed
    assert run('sample.py', *args, f'--out={latent_run}/more.npz', '--batch_size=5')[1] == ''
    images = np.load(latent_run / 'more.npz')['arr_0']
    assert sorted(os.listdir(out)) == [f'00000{i}.png' for i in range(5)]
    assert all((np.asarray(Image.open(out / f'00000{i}.png')) == images[i]).all() for i in range(5))
    assert set(os.listdir(latent_run)) - before == {'more', 'more.npz'}
    read = lambda: {file.name: file.read_bytes() for file in out.iterdir()}
    whole = read()
    for other in ('--num_samples=5', '--num_samples=6', '--seed=1'):
        _, message = run('sample.py', *args, f'--out={out}/', other)
        assert f'{out}/' in message and '\n' not in message and read() == whole


@pytest.fixture
def moved(latents, vae_folder, pictures, tmp_path):
    """A folder with copies of the pictures without classes and of the VAE, and how to make latents of them."""
    shutil.copytree(latents / 'plain', tmp_path / 'pictures')
    shutil.copytree(vae_folder, tmp_path / 'vae')

    def prepare(source, vae, out, *args):
        args = f'--source={source}', f'--vae={vae}', f'--out=data/{out}', '--size=32', '--device=cpu', *args
        assert run_in(tmp_path, 'data.py', *args) == ''
        return f'--dataset={out}'
    return tmp_path, prepare


def test_a_run_goes_on_with_the_same_pictures_from_a_renamed_folder_and_a_moved_vae(moved, capsys):
    """Bit for bit as if nothing had been renamed; sampling finds the VAE where it is now, or where it is told."""
    folder, prepare = moved
    command = [*LATENT, '--min_lr=2e-4', prepare('pictures', 'vae', 'x')]
    assert run_in(folder, *command, '--out_dir=out') == '' == run_in(folder, *command, '--out_dir=gone')
    assert run_in(folder, *command, '--out_dir=whole', '--max_iters=5') == ''
    os.rename(folder / 'pictures', folder / 'images')
    os.rename(folder / 'vae', folder / 'autoencoder')
    shutil.rmtree(folder / 'data')
    command[-1] = prepare('images', 'autoencoder', 'y')
    capsys.readouterr()
    assert run_in(folder, *command, '--out_dir=out', '--max_iters=5') == ''
    assert re.search(r'resuming out/ckpt.pt at (iteration )?3\b', capsys.readouterr().out)
    checkpoint, whole, gone = (torch.load(folder / out / 'ckpt.pt', weights_only=True)
                               for out in ('out', 'whole', 'gone'))
    assert checkpoint['iter_num'] == 5 and same(checkpoint['model'], whole['model'])
    assert same(checkpoint['optimizer'], whole['optimizer'])
    assert (checkpoint['data']['source'], checkpoint['data']['vae']) == ('images', 'autoencoder')
    assert (gone['data']['source'], gone['data']['vae']) == ('pictures', 'vae')
    draw = ['sample.py', '--num_samples=2', '--device=cpu', '--ckpt']
    assert run_in(folder, *draw, 'out/ckpt.pt') == '' == run_in(folder, *draw, 'gone/ckpt.pt', '--vae=autoencoder')
    assert "'vae'" in run_in(folder, *draw, 'gone/ckpt.pt')


@pytest.mark.parametrize('change, words', [
    ('--heldout=2', 'heldout is 0 there and 2 here'), ('--flip=False', 'flips is 2 there and 1 here'),
    ('--source=fewer', 'count is 24 there and 23 here'), ('--source=two', "classes is [] there and ['a', 'b'] here"),
    ('--size=16', 'size is 16 there and 8 here'), ('--vae=', 'channels is 4 there and 3 here')])
def test_a_run_does_not_go_on_with_other_data(change, words, moved, pictures, capsys):
    folder, prepare = moved
    shutil.copytree(folder / 'pictures', folder / 'fewer')
    (folder / 'fewer' / '0.jpg').unlink()
    shutil.copytree(pictures, folder / 'two')
    command = [*LATENT, '--out_dir=out']
    assert run_in(folder, *command, prepare('pictures', 'vae', 'x')) == ''
    before = (folder / 'out' / 'ckpt.pt').read_bytes()
    message = run_in(folder, *command, prepare('pictures', 'vae', 'y', change), '--max_iters=5')
    assert 'out/ckpt.pt is of other settings or data' in message and words in message and '\n' not in message
    assert (folder / 'out' / 'ckpt.pt').read_bytes() == before


def test_a_vae_that_does_not_fit_the_checkpoint_is_refused(latent_run, vae_folder, run, tmp_path):
    checkpoint = torch.load(latent_run / 'out' / 'ckpt.pt', weights_only=True)
    checkpoint['data']['scaling_factor'] = 0.18215
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    _, message = run('sample.py', '--ckpt', str(tmp_path / 'ckpt.pt'), '--num_samples=1')
    assert 'scaling_factor' in message and '0.18215' in message and '\n' not in message


def test_a_run_begun_by_one_process_goes_on_with_two(latent_run):
    """Losses and weights of ten more iterations agree to rounding with those of one process all the way."""
    command = lambda out, iterations: [*LATENT, '--eval_interval=20', f'--max_iters={iterations}', f'--out_dir={out}',
                                       '--min_lr=2e-4']
    assert run_in(latent_run, *command('one', 14)) == '' == run_in(latent_run, *command('mixed', 4))
    printed = finish(*start_two(latent_run, *command('mixed', 14)))
    assert re.search(r'resuming mixed/ckpt.pt at (iteration )?4\b', printed)
    logs = [np.genfromtxt(latent_run / out / 'log.csv', delimiter=',', names=True) for out in ('one', 'mixed')]
    assert len(logs[0]) == len(logs[1]) == 14
    for key in ('loss', 'grad_norm'):
        np.testing.assert_allclose(logs[0][key], logs[1][key], atol=1e-5)
    one, mixed = (torch.load(latent_run / out / 'ckpt.pt', weights_only=True) for out in ('one', 'mixed'))
    for name in one['model']:
        torch.testing.assert_close(one['model'][name], mixed['model'][name], atol=1e-4, rtol=0)


@pytest.mark.parametrize('settings, words', [
    (['--ckpt', 'out-whole/ckpt.pt', '--seeds=1', '--batch_size=2'], 'GFLOPs per evaluation'),
    (['--what=engine'], 'sampling, 20 Euler steps'), (['--what=loop'], 'saving a checkpoint')])
def test_bench_measures(settings, words, trained, run):
    small = ['--width=32', '--depth=1', '--heads=2', '--size=8', '--batch_size=4', '--repeats=1']
    printed, message = run('tests/bench.py', '--device=cpu', *(small if '--what' in settings[0] else []), *settings)
    assert message == '' and words in printed


def test_figures_and_solvers_read_a_checkpoint(trained, run):
    names = 'packed,trajectory,digits,solvers'
    printed, message = run('tests/figures.py', '--ckpt', 'out-whole/ckpt.pt', f'--only={names}', '--out=figures')
    assert message == '' and all(f'{name}.png' in os.listdir('figures') for name in names.split(','))
    printed, message = run('tests/solvers.py', '--ckpt', 'out-whole/ckpt.pt', '--runs=euler:2,dopri5:1e-1',
                           '--num_samples=20', '--hold_coarsest=True')
    assert message == '' and [line.split('|')[1] for line in printed.splitlines()[2:]] == [' euler, 2 ', ' dopri5, 1e-1 ']


def test_an_exported_checkpoint_draws_the_same_pictures_and_is_not_trained_on(trained, run):
    printed, message = run('tests/export.py', '--ckpt', 'out-whole/ckpt.pt', '--out=exported/ckpt.pt')
    assert message.startswith('export.py: cannot write exported/ckpt.pt')
    os.makedirs('exported')
    assert run('tests/export.py', '--ckpt', 'out-whole/ckpt.pt', '--out=exported/ckpt.pt')[1] == ''
    sizes = [os.path.getsize(f'{folder}/ckpt.pt') for folder in ('exported', 'out-whole')]
    assert sizes[0] < 0.25 * sizes[1]       # of 16 bytes a weight, EMA, moments, 2 are left
    images = []
    for folder in ('exported', 'out-whole'):
        assert run('sample.py', '--ckpt', f'{folder}/ckpt.pt', '--num_samples=20', f'--out={folder}.npz')[1] == ''
        images.append(np.load(f'{folder}.npz')['arr_0'].astype(int))
    assert abs(images[0] - images[1]).max() <= 2 and images[0].std() > 1
    assert run('train.py', *TINY, '--out_dir=exported')[1].startswith('train.py: exported/ckpt.pt has only weights')
