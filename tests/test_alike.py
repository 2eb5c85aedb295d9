"""Unlike things are not taken for alike: what each test tries would be wrong in silence."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
from conftest import ROOT, TINY, run_in, started
from test_fid import pictures, random_inception

# -------------------------------------------------------------------------------------------------
# FID: both sides are of one size


@pytest.fixture(scope='module')
def sides(tmp_path_factory):
    """The same pictures of 32 x 32 and of 64 x 64, as folders and arrays, and some of mixed sizes."""
    folder = tmp_path_factory.mktemp('sides')
    torch.save(random_inception(16).state_dict(), folder / 'weights.pth')
    small = pictures(6, 32)
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    mixed = [*small[:5], large[5]]
    for name, images in (('small', small), ('large', large), ('mixed', mixed)):
        (folder / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f'{i}.png')
    np.savez(folder / 'small.npz', small)
    np.savez(folder / 'large.npz', large)
    np.savez(folder / 'wide.npz', large[:, :32])
    assert run_in(folder, 'data.py', '--source=small', '--out=dataset', '--size=32') == ''
    return folder


@pytest.fixture
def compare(sides, capsys):
    """compare('--samples=a', ...) -> what fid.py ends with: a sentence, or the numbers that it prints."""
    def compare(*args):
        message = run_in(sides, 'fid.py', '--inception=weights.pth', '--device=cpu', *args)
        printed = capsys.readouterr().out
        return message or json.loads(printed.splitlines()[-1])
    return compare


@pytest.mark.parametrize('samples, ref', (
    ('small', 'large'), ('large.npz', 'small'), ('small.npz', 'large.npz'), ('large', 'dataset'),
    ('wide.npz', 'large.npz'), ('wide.npz', 'small')))
def test_sides_of_two_sizes_are_not_compared(samples, ref, compare):
    message = compare(f'--samples={samples}', f'--ref={ref}')
    assert 'samples are of' in message and '--size=N' in message


@pytest.mark.parametrize('samples, ref, size', (
    ('small.npz', 'large', 64), ('small', 'large.npz', 32), ('dataset', 'large', 64),
    ('wide.npz', 'small', 64)))
def test_a_size_that_cannot_be_followed_is_refused(samples, ref, size, compare):
    message = compare(f'--samples={samples}', f'--ref={ref}', f'--size={size}')
    assert '--size crops folders' in message


def test_one_side_of_mixed_sizes_is_refused(compare):
    assert 'images differ in size' in compare('--samples=mixed', '--ref=small')


@pytest.mark.parametrize('samples, ref, args, size', (
    ('small', 'large', ['--size=32'], 32), ('large', 'large.npz', [], 64),
    ('large', 'small.npz', ['--size=32'], 32), ('small', 'dataset', ['--size=32'], 32)))
def test_the_size_stands_beside_the_distance(samples, ref, args, size, compare):
    numbers = compare(f'--samples={samples}', f'--ref={ref}', *args)
    assert numbers['size'] == [size, size] and numbers['fid'] < 1e-3


def test_statistics_know_their_size_and_those_of_others_need_not(sides, compare):
    assert compare('--ref=large', '--save_stats=large-stats.npz')['size'] == [64, 64]
    assert 'samples are of (32, 32)' in compare('--samples=small', '--ref=large-stats.npz')
    assert 'samples are of' in compare('--samples=large', '--ref=large-stats.npz', '--size=32')
    assert compare('--samples=large', '--ref=large-stats.npz')['fid'] < 1e-3
    arrays = np.load(sides / 'large-stats.npz')
    np.savez(sides / 'adm.npz', mu=arrays['mu'], sigma=arrays['sigma'])
    assert compare('--samples=small', '--ref=adm.npz')['size'] == [32, 32]


@pytest.mark.parametrize('args', (
    ['--ref=small.npz'], ['--samples=small.npz', '--ref=small'], ['--ref=./small.npz'],
    ['--samples=link.npz', '--ref=small']))
def test_statistics_are_not_written_over_an_input(args, sides, compare):
    if not os.path.lexists(sides / 'link.npz'):
        os.symlink('small.npz', sides / 'link.npz')
    before = (sides / 'small.npz').read_bytes()
    assert 'is an input' in compare(*args, '--save_stats=small.npz')
    assert (sides / 'small.npz').read_bytes() == before


# -------------------------------------------------------------------------------------------------
# Datasets that another program wrote


def write_dataset(folder, images=None, labels=None, **changes):
    """Eight grey images of 32 x 32 in two classes, or what is given instead; None leaves a key out."""
    os.makedirs(folder)
    default = np.zeros((8, 32, 32, 1), np.uint8)
    np.save(f'{folder}/images.npy', default if images is None else images)
    np.save(f'{folder}/labels.npy', np.arange(8) % 2 if labels is None else labels)
    meta = dict(size=32, channels=1, classes=['a', 'b'], heldout=2, flips=1, vae='') | changes
    kept = {key: value for key, value in meta.items() if value is not None}
    with open(f'{folder}/meta.json', 'w') as file:
        json.dump(kept, file)


ROWS = np.zeros((8, 32, 32, 1))
LATENTS = dict(vae='somewhere', channels=4, size=4)


@pytest.mark.parametrize('given, words', (
    (dict(images=ROWS.astype(np.float32)), 'images.npy holds float32'),
    (dict(images=ROWS.astype(np.uint16)), 'images.npy holds uint16'),
    (dict(images=ROWS.astype(np.int8)), 'images.npy holds int8'),
    (dict(images=ROWS.astype(bool)), 'images.npy holds bool'),
    (dict(images=ROWS[:, :16].astype(np.uint8)), 'images.npy is (8, 16, 32, 1)'),
    (dict(images=ROWS[..., 0].astype(np.uint8)), 'images.npy is (8, 32, 32)'),
    (dict(images=ROWS.repeat(5, 3).astype(np.uint8), channels=5), 'channels is 5'),
    (dict(images=ROWS.repeat(2, 3).astype(np.uint8), channels=2), 'channels is 2'),
    (dict(labels=np.zeros(8)), 'labels.npy is (8,) of float64'),
    (dict(labels=np.eye(8, dtype=int)), 'labels.npy is (8, 8)'),
    (dict(labels=np.zeros(7, int)), 'labels.npy is (7,)'),
    (dict(labels=np.zeros(8, bool)), 'of bool'),
    (dict(labels=np.full(8, 2)), 'labels exceed the classes'),
    (dict(labels=np.full(8, -1)), 'heldout is 2 of 0'),
    (dict(labels=np.array(list('abababab'))), 'not a dataset'),
    (dict(heldout=-5), 'heldout is -5'),
    (dict(heldout=8), 'heldout is 8 of 8'),
    (dict(heldout='two'), 'not a dataset'),
    (dict(flips=None), "KeyError: 'flips'"),
    (dict(flips=3), 'flips is 3'),
    (dict(flips=0), 'flips is 0'),
    (dict(classes=dict(a=0, b=1)), 'classes are no list'),
    (dict(classes='ab'), 'classes are no list'),
    (dict(classes=None), "KeyError: 'classes'"),
))
def test_a_dataset_is_what_data_py_says(given, words, tmp_path, run):
    write_dataset(tmp_path / 'mine', **given)
    _, message = run('train.py', *TINY, f'--dataset={tmp_path}/mine', f'--out_dir={tmp_path}/out')
    assert f'{tmp_path}/mine' in message and words in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('latents, changes, words', (
    (np.zeros((8, 1, 8, 4, 4), np.float16), dict(image_size=32), 'no scaling_factor'),
    (np.zeros((8, 1, 8, 4, 4), np.float16), dict(scaling_factor=1), 'no image_size'),
    (np.zeros((8, 1, 8, 4, 4), np.int16), dict(image_size=32, scaling_factor=1), 'holds int16'),
    (np.zeros((8, 1, 4, 4, 4), np.float16), dict(image_size=32, scaling_factor=1), 'latents.npy is'),
    (np.zeros((8, 1, 8, 4, 4), np.float16), dict(image_size=32, scaling_factor=1, flips=2),
     'latents.npy is')))
def test_latents_are_what_data_py_says(latents, changes, words, tmp_path, run):
    write_dataset(tmp_path / 'mine', **LATENTS, **changes)
    np.save(tmp_path / 'mine/latents.npy', latents)
    _, message = run('train.py', *TINY, f'--dataset={tmp_path}/mine', f'--out_dir={tmp_path}/out')
    assert words in message


@pytest.mark.parametrize('dtype', ('uint8', 'int16', 'int32', 'uint64'))
def test_integer_labels_of_any_width_are_taken(dtype, tmp_path):
    write_dataset(tmp_path / 'mine', labels=(np.arange(8) % 2).astype(dtype))
    _, y = data.Dataset(str(tmp_path / 'mine')).batch(np.arange(4))
    assert y.tolist() == [0, 1, 0, 1] and y.dtype == torch.int64


@pytest.mark.parametrize('args', (['config/celebahq256.py'], ['--dataset=data/mine']))
def test_a_dataset_that_is_not_there_is_to_be_made(args, run):
    _, message = run('train.py', *args, '--compile=False', '--device=cpu')
    assert 'is not a dataset' in message and 'data.py makes them' in message


# -------------------------------------------------------------------------------------------------
# VAEs: their weights are there, finite, and those that made the latents


def damaged_vae(vae_folder, folder, damage):
    """A copy of a VAE whose weights have been changed by `damage`, a function of the state dict."""
    shutil.copytree(vae_folder, folder)
    file = folder / 'diffusion_pytorch_model.safetensors'
    weights = load_file(file)
    damage(weights)
    save_file(weights, file)
    return str(folder)


def without(*words):
    def damage(weights):
        for key in [key for key in weights if any(word in key for word in words)]:
            del weights[key]
    return damage


def nudge(key):
    def damage(weights):
        weights[key].view(-1)[0] += 1e-3
    return damage


@pytest.mark.parametrize('missing', ('decoder.conv_out.bias', 'encoder.', 'quant_conv', 'norm'))
def test_a_vae_that_lacks_weights_is_refused(missing, vae_folder, tmp_path):
    folder = damaged_vae(vae_folder, tmp_path / 'vae', without(missing))
    with pytest.raises(SystemExit, match='lacks weights of an AutoencoderKL') as end:
        data.load_vae(dict(vae=folder), 'cpu')
    assert missing in str(end.value)


def test_a_vae_of_another_class_is_refused(tmp_path):
    from diffusers import AutoencoderTiny, VQModel
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                    num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        tmp_path / 'tiny')
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / 'vq')
    for name in ('tiny', 'vq'):
        with pytest.raises(SystemExit, match='AutoencoderKL'):
            data.load_vae(dict(vae=str(tmp_path / name)), 'cpu')


@pytest.fixture(scope='module')
def faces(tmp_path_factory, vae_folder):
    """A folder with pictures, latents of them, and a checkpoint that a short run made of those."""
    folder = tmp_path_factory.mktemp('faces')
    (folder / 'pictures').mkdir()
    for i, image in enumerate(pictures(24, 32)):
        Image.fromarray(image).save(folder / 'pictures' / f'{i:02}.png')
    shutil.copytree(vae_folder, folder / 'vae')
    assert run_in(folder, 'data.py', '--source=pictures', '--out=data/faces', '--size=32',
                  '--vae=vae', '--heldout=4') == ''
    assert run_in(folder, *TRAIN_FACES) == ''
    return folder


TRAIN_FACES = ('train.py', *TINY, '--dataset=faces', '--out_dir=out', '--cfg=1', '--patch=2')
OTHER_WEIGHTS = ('encoder.conv_in.weight', 'decoder.conv_out.bias', 'quant_conv.weight')


@pytest.mark.parametrize('key', OTHER_WEIGHTS)
def test_another_vae_with_the_same_scaling_factor_does_not_decode(key, faces, vae_folder, tmp_path):
    folder = damaged_vae(vae_folder, tmp_path / 'vae', nudge(key))
    message = run_in(faces, 'sample.py', '--ckpt=out/ckpt.pt', f'--vae={folder}', '--device=cpu')
    assert 'is not the VAE that made the latents' in message


def test_latents_of_another_vae_do_not_go_on_with_a_run(faces, vae_folder, tmp_path):
    folder = damaged_vae(vae_folder, tmp_path / 'vae', nudge('encoder.conv_in.weight'))
    assert run_in(faces, 'data.py', '--source=pictures', f'--out={tmp_path}/other', '--size=32',
                  f'--vae={folder}', '--heldout=4') == ''
    message = run_in(faces, *TRAIN_FACES, f'--dataset={tmp_path}/other')
    assert 'is of other settings or data' in message and 'vae_digest' in message


def test_a_vae_that_has_only_moved_decodes(faces, tmp_path):
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(faces / 'vae')
    vae.save_pretrained(tmp_path / 'moved', safe_serialization=False)       # in another format
    for folder in ('vae', tmp_path / 'moved'):
        assert run_in(faces, 'sample.py', '--ckpt=out/ckpt.pt', f'--vae={folder}', '--device=cpu',
                      '--num_samples=4', f'--out={tmp_path}/x.npz') == ''


@pytest.mark.parametrize('bad, left', (([7], 1), ([0, 199], 2), ([3, 4, 5], None)))
def test_latents_that_are_not_finite_are_left_out(bad, left, vae_folder, tmp_path, monkeypatch,
                                                  capsys):
    """Up to 1% of them, here 2 of 200; their pictures are named."""
    from diffusers import AutoencoderKL
    (tmp_path / 'pictures').mkdir()
    for i in range(200):
        colour = 255 if i in bad else 90
        Image.new('RGB', (8, 8), (colour, 0, 0)).save(tmp_path / 'pictures' / f'{i:03}.png')
    encode = AutoencoderKL.encode

    def overflow(vae, x):
        result = encode(vae, x)
        result.latent_dist.mean[x[:, 0, 0, 0] == 1] = 1e30      # beyond float16
        return result

    monkeypatch.setattr(AutoencoderKL, 'encode', overflow)
    message = run_in(tmp_path, 'data.py', '--source=pictures', '--out=made', '--size=8',
                     f'--vae={vae_folder}', '--device=cpu')
    if left is None:
        assert '3 of 200 pictures cannot be read' in message
        return
    assert message == ''
    assert np.flatnonzero(np.load(tmp_path / 'made/labels.npy') < 0).tolist() == bad
    errors = capsys.readouterr().err
    assert all(f'{i:03}.png' in errors for i in bad) and 'not finite' in errors
    assert len(data.Dataset(str(tmp_path / 'made')).rows) == 200 - left


# -------------------------------------------------------------------------------------------------
# Runs: processes, settings, logs, ends


def test_processes_that_begin_unalike_end_with_a_sentence(workplace, tmp_path):
    """One sees a checkpoint, the other does not: here because their out_dir are not the same."""
    shutil.copytree(workplace / 'data', tmp_path / 'data')
    assert run_in(tmp_path, 'train.py', *TINY, '--out_dir=out', '--max_iters=3') == ''
    other = tmp_path / 'other'
    other.mkdir()
    os.symlink(tmp_path / 'data', other / 'data')
    environment = os.environ | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    jobs = []
    for rank, folder in enumerate((tmp_path, other)):
        jobs.append(subprocess.Popen(
            [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, '--out_dir=out'], cwd=folder,
            env=environment | dict(RANK=str(rank), LOCAL_RANK=str(rank)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for job in jobs:
        _, errors = job.communicate()
        assert 'processes differ' in errors and job.returncode == 1
    assert not (other / 'out').exists()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize('args', (
    ['--batch_size=24', 'config/digits.py'], ['--batch_size', '24', 'config/digits.py'],
    ['config/digits.py', '--batch_size=24'], ['--batch_size=12', 'config/digits.py', '--batch_size=24']))
def test_an_option_wins_wherever_it_stands(args, run):
    printed, _ = run('train.py', *args, '--help')
    assert '--batch_size=24\n' in printed and '--patch=4\n' in printed


def test_of_two_config_files_the_last_one_wins(run):
    printed, _ = run('train.py', 'config/celebahq256.py', '--depth=1', 'config/digits.py', '--help')
    assert '--width=128\n' in printed and '--depth=1\n' in printed and '--batch_size=64\n' in printed


@pytest.mark.parametrize('args, words', (
    (['--steps=7'], 'euler, 7 steps'), (['--method=midpoint'], 'midpoint, 4 steps'),
    (['--method=dopri5', '--steps=7', '--tol=1e-2'], 'dopri5, tol 0.01')))
def test_the_last_line_says_which_setting_counted(args, words, trained, run, tmp_path):
    printed, _ = run('sample.py', f'--ckpt={trained}/ckpt.pt', '--num_samples=2', '--device=cpu',
                     f'--out={tmp_path}/x.png', *args)
    assert f'2 samples, {words}, NFE' in printed.splitlines()[-1]


def test_output_comes_line_by_line_and_in_any_letters(workplace, tmp_path):
    """Into a pipe, which Python would fill with 8 kB first, of a terminal that knows ASCII alone."""
    folder = tmp_path / 'Z\u00fcrich \u732b'
    write_dataset(folder, classes=['\u732b', 'b'])
    environment = os.environ | dict(PYTHONIOENCODING='ascii', PYTHONUNBUFFERED='')
    job = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, f'--dataset={folder}', '--batch_size=4',
         f'--out_dir={folder}/out', '--max_iters=1000000', '--eval_interval=1000000'],
        cwd=workplace, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [job.stdout.readline() for _ in range(4)]       # or it waits for ever
    job.kill()
    job.wait()
    assert all(line.startswith('iter ') for line in lines[1:])


def test_pictures_of_odd_names_are_listed_in_ascii(tmp_path):
    for name in ('\u732b', 'b'):
        (tmp_path / 'source' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'source' / name / '0.png')
    environment = os.environ | dict(PYTHONIOENCODING='ascii')
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'data.py'), '--source=source', '--out=made',
                           '--size=8'], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "\\u732b" in done.stdout


def wait_for_rows(job, log):
    """Until two rows stand in log.csv of a process that runs on."""
    while not log.exists() or log.read_text().count('\n') < 3:
        assert job.poll() is None


def test_a_closed_terminal_saves_as_a_termination_does(workplace, tmp_path):
    args = [*TINY, f'--out_dir={tmp_path}', '--max_iters=100000', '--eval_interval=100000']
    with started(workplace, 'train.py', *args) as job:
        wait_for_rows(job, tmp_path / 'log.csv')
        job.send_signal(signal.SIGHUP)
        printed = job.communicate()[0]
    assert job.returncode == 0 and 'holds iteration' in printed and (tmp_path / 'ckpt.pt').exists()


def test_under_nohup_a_closed_terminal_is_nothing(workplace, tmp_path):
    args = [*TINY, f'--out_dir={tmp_path}', '--max_iters=60', '--eval_interval=100000']
    launcher = ['nohup', sys.executable]
    with started(workplace, 'train.py', *args, launcher=launcher) as job:
        wait_for_rows(job, tmp_path / 'log.csv')
        job.send_signal(signal.SIGHUP)
        printed = job.communicate()[0]
    assert job.returncode == 0 and 'holds iteration 60' in printed


def test_a_run_from_the_start_begins_its_log_anew(workplace, tmp_path, run):
    args = [*TINY, f'--out_dir={tmp_path}']
    (tmp_path / 'log.csv').write_text('iter,loss,lr,grad_norm,images_per_s,heldout_0\n1,2,3,4,5,\n')
    assert run('train.py', *args)[1] == ''
    rows = (tmp_path / 'log.csv').read_text().splitlines()
    assert rows[0].endswith('heldout_0,heldout_1') and len(rows) == 7
    assert run('train.py', *args, '--max_iters=9')[1] == ''             # but goes on with a log
    assert len((tmp_path / 'log.csv').read_text().splitlines()) == 10


# -------------------------------------------------------------------------------------------------
# --init_from: weights of another run


def test_a_run_begins_with_the_weights_of_another(trained, workplace, tmp_path, run):
    write_dataset(tmp_path / 'mine', heldout=1)
    args = [*TINY, f'--dataset={tmp_path}/mine', f'--out_dir={tmp_path}/out', '--batch_size=4']
    printed, message = run('train.py', *args, f'--init_from={trained}/ckpt.pt', '--max_iters=1',
                           '--learning_rate=0', '--min_lr=0')
    assert message == '' and "new: ['y_embed.weight']" in printed       # two classes instead of ten
    before = torch.load(trained / 'ckpt.pt', weights_only=True)
    after = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    for key, weight in before['ema'].items():
        if key != 'y_embed.weight':
            assert torch.equal(weight, after['model'][key]) and torch.equal(weight, after['ema'][key])
    assert after['iter_num'] == 1


def test_init_from_takes_an_exported_checkpoint_and_counts_once(trained, tmp_path, run):
    assert run('tests/export.py', f'--ckpt={trained}/ckpt.pt', f'--out={tmp_path}/small.pt')[1] == ''
    args = [*TINY, f'--out_dir={tmp_path}/out', f'--init_from={tmp_path}/small.pt']
    printed, message = run('train.py', *args, '--max_iters=2')
    assert message == '' and 'new: none' in printed
    os.remove(tmp_path / 'small.pt')
    printed, message = run('train.py', *args, '--max_iters=3')
    assert message == '' and 'resuming' in printed and 'weights are from' not in printed


def test_weights_of_other_shapes_are_named(trained, tmp_path, run):
    args = [*TINY, f'--out_dir={tmp_path}', f'--init_from={trained}/ckpt.pt', '--T=()', '--max_iters=1']
    printed, message = run('train.py', *args, '--patch=8')
    assert message == '' and "'patch_embed.0.linear.weight'" in printed
    assert 'blocks.0.qkv.0.weight' not in printed       # as wide as before


def test_a_checkpoint_to_begin_from_must_be_one(tmp_path, run):
    _, message = run('train.py', *TINY, f'--out_dir={tmp_path}', '--init_from=nowhere.pt')
    assert 'no checkpoint' in message


def test_an_export_does_not_replace_its_own_checkpoint(trained, run):
    before = (trained / 'ckpt.pt').read_bytes()
    _, message = run('tests/export.py', f'--ckpt={trained}/ckpt.pt', f'--out={trained}/../out-whole/ckpt.pt')
    assert 'is the checkpoint itself' in message and (trained / 'ckpt.pt').read_bytes() == before
