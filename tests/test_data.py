"""From pictures to what training sees: against known colours, torch's filters and a VAE's parts."""
import json
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from conftest import contents, finish, run_in, start_two
from data import (Dataset, center_crop, decode, list_pictures, load_vae, make_digits,
                  read_picture, training_order)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


# -------------------------------------------------------------------------------------------------
# Digits


def test_digits_are_the_same_bytes_every_time():
    make_digits('x', train=30, heldout=5)
    make_digits('y', train=30, heldout=5)
    make_digits('x', train=10, heldout=5)       # another process was first
    assert contents('x') == contents('y')
    assert sorted(os.listdir()) == ['x', 'y']
    with pytest.raises(SystemExit, match='cannot write'):
        make_digits('x/meta.json/z', train=10, heldout=5)


def test_digits_are_drawn_when_they_are_first_asked_for(monkeypatch):
    assert make_digits.__defaults__ == (20_000, 2000)
    monkeypatch.setattr(make_digits, '__defaults__', (30, 5))
    made = Dataset('digits')
    assert made.n_train == 30 and made.meta['source'] == 'digits'
    with pytest.raises(SystemExit, match='data/clothes is not a dataset'):
        Dataset('clothes')


def test_digits_show_their_labels_in_white_on_black(workplace):
    """The training image nearest to a held-out one is of the same digit."""
    digits = Dataset(f'{workplace}/data/digits')
    x, y = digits.batch(digits.rows)
    distances = torch.cdist(x[300:].flatten(1), x[:300].flatten(1))
    nearest = distances.argmin(1)
    assert (y[nearest] == y[300:]).float().mean() > 0.9
    assert x.amax((1, 2, 3)).min() > 0.9
    assert x[:, :, 0].max() < -0.9
    assert len(x.unique(dim=0)) == 360


# -------------------------------------------------------------------------------------------------
# Reading pictures


@pytest.mark.parametrize('name, mode, stored, read', (
    ('x.tif', 'CMYK', (0, 255, 255, 0), (255, 0, 0)),
    ('x.png', 'L', 90, (90, 90, 90)),
    ('x.png', 'RGBA', (200, 30, 60, 51), (244, 210, 216)),      # a fifth
))
def test_pictures_are_read_in_their_colours_on_white(name, mode, stored, read):
    Image.new(mode, (8, 8), stored).save(name)
    pixels = read_picture(name)
    assert pixels.shape == (8, 8, 3)
    assert (pixels == read).all()


def test_the_transparent_colour_of_a_palette_is_white():
    Image.new('P', (8, 8)).save('x.png', transparency=0)
    assert (read_picture('x.png') == 255).all()


def test_pictures_are_turned_upright_as_exif_says():
    """Orientations 1 to 8: mirrored or not, then turned by so many quarters."""
    stored = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    turns = ((0, 1), (0, -1), (2, 1), (2, -1), (1, -1), (3, 1), (3, -1), (1, 1))
    exif = Image.Exif()
    for orientation, (quarters, side) in enumerate(turns, 1):
        exif[0x0112] = orientation
        Image.fromarray(stored).save('x.png', exif=exif)
        upright = np.rot90(stored[:, ::side], quarters)
        assert np.array_equal(read_picture('x.png'), upright), orientation


def test_pictures_that_cannot_be_used_are_refused_by_name():
    Image.new('I;16', (8, 8)).save('of 16 bits.png')
    Image.new('F', (8, 8)).save('float.tif')
    Image.new('L', (510, 10)).save('strip.png')
    Image.new('1', (14_000, 14_000)).save('bomb.png')
    Path('cut.png').write_bytes(Path('strip.png').read_bytes()[:-20])
    for name in os.listdir():
        with pytest.raises(OSError, match=repr(name)):
            read_picture(name, 8)


@pytest.mark.parametrize('width, height, size, factor, H, W', (
    (160, 128, 32, 4, 32, 40),
    (33, 50, 64, 1, 97, 64),
    (52, 50, 16, 2, 16, 17)))
def test_the_crop_is_adms(width, height, size, factor, H, W):
    """Halved while it is twice too large, then resized to H x W by torch, then cut."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(64, 192, (height, width), np.uint8)       # so that nothing is clipped
    x = F.avg_pool2d(torch.tensor(pixels)[None, None].float(), factor)
    x = F.interpolate(x, (H, W), mode='bicubic', antialias=True)
    top, left = (H - size) // 2, (W - size) // 2
    expected = x[0, 0, top:top + size, left:left + size]
    cropped = torch.tensor(center_crop(Image.fromarray(pixels), size))
    assert (cropped - expected).abs().max() < 2     # Pillow rounds between its passes


# -------------------------------------------------------------------------------------------------
# Finding pictures


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(name, format='PNG')


def listed(folder):
    """What list_pictures says: names below the folder, labels, classes."""
    files, labels, classes = list_pictures(folder)
    names = [os.path.relpath(file, folder) for file in files]
    return names, labels.tolist(), classes


@pytest.mark.parametrize('names, labels, classes', (
    (['car/x.webp', 'cat/2.PNG', 'cat/deep/er/1.JPg'], [0, 1, 1], ['car', 'cat']),
    (['all/cat/1.png', 'all/dog/2.png'], [0, 1], ['cat', 'dog']),
    (['all/1.png', 'all/2.png'], [0, 0], []),
    (['1.png', 'cat/2.png', 'dog/3.png'], [0, 0, 0], [])))
def test_classes_are_the_folders_where_paths_first_differ(names, labels, classes, capsys):
    touch(*names)
    assert listed('.') == (names, labels, classes)
    assert ('no classes' in capsys.readouterr().out) == (classes == [])


def test_what_is_passed_over_is_counted(capsys):
    """But hidden folders are not looked into."""
    touch('cat/1.png', 'dog/2.jfif', 'cat/.hidden.png', '.git/3.png', 'dog/.deep/4.png')
    for name in ('notes.txt', 'cat/table.csv', 'dog/paper.pdf', 'dog/no_ending'):
        Path(name).write_text('no picture')
    os.symlink('nowhere.png', 'cat/gone.png')
    assert listed('.') == (['cat/1.png', 'dog/2.jfif'], [0, 1], ['cat', 'dog'])
    assert '2 pictures, 6 other files passed over, 2 classes' in capsys.readouterr().out


def test_links_count_like_what_they_lead_to_but_no_folder_counts_twice():
    touch('source/bee/1.png', 'source/dog/deep/2.png', 'elsewhere/3.png')
    for link, target in (
            ('ant', 'dog'),         # the real one wins, though it comes later
            ('bee/deep', '../dog/deep'),
            ('bee/link.png', '../../elsewhere/3.png'),
            ('cow', '../elsewhere'),
            ('cow-again', '../elsewhere'),
            ('dog/round', '..'),
            ('dog/up', '../..')):
        os.symlink(target, f'source/{link}')
    os.symlink('source', 'linked')
    names = ['bee/1.png', 'bee/link.png', 'cow/3.png', 'dog/deep/2.png']
    for folder in ('source', 'linked'):
        assert listed(folder) == (names, [0, 0, 1, 2], ['bee', 'cow', 'dog'])


def test_a_folder_that_cannot_be_read_is_refused(monkeypatch):
    """Permissions do not bind root, so this is pretended."""
    touch('cat/1.png', 'dog/2.png')
    scan = os.scandir

    def closed(folder):
        if folder.endswith('dog'):
            raise PermissionError(13, 'Permission denied', folder)
        return scan(folder)

    monkeypatch.setattr(os, 'scandir', closed)
    with pytest.raises(SystemExit, match="dog' is not a folder that can be read .Permission"):
        list_pictures('.')


# -------------------------------------------------------------------------------------------------
# Making a dataset


MADE = ('--source=source', '--out=made', '--size=24', '--batch_size=4', '--device=cpu')


def prepare(*args):
    """Runs data.py on the folder `source`, into `made`. Returns its last sentence."""
    return run_in('.', 'data.py', *MADE, *args)


def write_pictures(n, source='source'):
    """n pictures of noise, half of them in folder a and half in b. Returns them in that order."""
    pictures = np.random.default_rng(0).integers(0, 256, (n, 24, 24, 3), np.uint8)
    for i in range(n):
        name = f'{source}/{"ab"[2 * i // n]}/{i:03}.png'
        touch(name)
        Image.fromarray(pictures[i]).save(name)
    return pictures


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_dataset_of_pixels_holds_the_pictures_of_a_folder():
    pictures = write_pictures(10)
    assert prepare('--flip=False') == ''
    assert sorted(os.listdir('made')) == ['images.npy', 'labels.npy', 'meta.json']
    made = Dataset('made')
    assert np.array_equal(made.array, pictures)
    assert made.labels.tolist() == [0] * 5 + [1] * 5
    assert made.meta == dict(source='source', size=24, image_size=24, channels=3, count=10,
                             heldout=0, classes=['a', 'b'], flips=1, vae='')


def test_ones_own_pictures_are_trained_on_and_drawn():
    write_pictures(20)
    assert prepare() == ''
    network = '--patch=4', '--width=8', '--depth=1', '--heads=1', '--batch_size=4'
    train = 'train.py', *network, '--dataset=made', '--max_iters=1', '--out_dir=out'
    assert run_in('.', *train, '--compile=False', '--device=cpu', '--sample_images=1') == ''
    assert run_in('.', 'sample.py', '--num_samples=3', '--out=x.npz') == ''
    assert np.load('x.npz')['arr_0'].shape == (3, 24, 24, 3)


def test_held_out_images_are_drawn_at_random_and_keep_their_labels():
    pictures = write_pictures(40).tolist()
    assert prepare('--heldout=12') == ''
    made = Dataset('made')
    order = [pictures.index(image) for image in made.array.tolist()]
    assert sorted(order) == list(range(40))
    assert made.labels.tolist() == [i // 20 for i in order]
    assert 2 <= made.labels[28:].sum() <= 10       # by chance outside 12 times in 10,000


def test_one_percent_of_the_pictures_may_be_unreadable_and_is_named(capsys):
    pictures = write_pictures(200)
    unreadable = ['source/a/017.png', os.fsdecode(b'source/b/150\xff.png')]     # no UTF-8
    os.rename('source/b/150.png', unreadable[1])
    for name in unreadable:
        Path(name).write_text('no picture')
    assert prepare() == ''
    printed, errors = capsys.readouterr()
    assert 'made: 198 images, 2 left out' in printed
    for name in unreadable:
        assert repr(os.path.abspath(name)) in errors
    made = Dataset('made')
    assert np.flatnonzero(made.labels == -1).tolist() == [17, 150]
    assert np.array_equal(made.array[made.rows], pictures[made.rows])
    Path('source/b/199.png').write_text('no picture')
    assert '3 of 200 pictures' in prepare('--out=other')
    assert not os.path.exists('other')


@pytest.mark.parametrize('args, words', (
    ('--source=', '--source=FOLDER --out='),
    ('--source=nowhere', "nowhere' is not a folder that can be read"),
    ('--source=mine.parts', "no pictures in 'mine.parts', but 1 other files"),
    ('--out=source/', 'source exists'), ('--out=dangling', 'dangling exists'),
    ('--out=mine', 'mine.parts holds other files'),
    ('--out=source/a/000.png/x', 'cannot write 3 images to source/a/000.png/x'),
    ('--heldout=3', 'less than the 3 pictures'), ('--batch_size=0', 'at least 1'),
    ('--size=15 --vae=VAE', 'multiple of 2'),
    ('--vae=source', "'source' is no folder or Hugging Face id of an AutoencoderKL")))
def test_mistakes_end_in_a_sentence_and_destroy_nothing(args, words, vae_folder):
    write_pictures(3)
    os.mkdir('mine.parts')
    Path('mine.parts/notes.txt').write_text('no picture')
    os.symlink('nowhere', 'dangling')
    before = sorted(Path().rglob('*'))
    message = prepare(*args.replace('VAE', vae_folder).split())
    assert message.startswith('data.py: ')
    assert words in message and '\n' not in message
    assert sorted(Path().rglob('*')) == before


def test_the_space_of_all_images_is_taken_before_any_is_read(monkeypatch):
    write_pictures(100)
    monkeypatch.setattr(Image, 'open', interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert os.stat('made.parts/images.npy').st_blocks * 512 >= 100 * 24 * 24 * 3

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full)
    assert 'cannot write 100 images to made (OSError: [Errno 28] No space left' in prepare()


def test_no_array_of_all_images_is_in_memory():
    """All images are 15 MB here."""
    touch('source/0.png', *[f'source/{i}.png' for i in range(1, 300)])
    tracemalloc.start()
    try:
        assert prepare('--size=128') == ''
        Dataset('made').batch(np.arange(4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize('made/images.npy') > 14e6
    assert peak < 7e6


@pytest.mark.parametrize('module, function', ((Image, 'open'), (os, 'rename')))
def test_what_was_half_made_gets_into_no_dataset(module, function, monkeypatch, vae_folder):
    """A run is interrupted at its first picture, or when all are done."""
    write_pictures(12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, function, interrupt)
        prepare(f'--vae={vae_folder}')
    assert sorted(os.listdir()) == ['made.parts', 'source']
    Image.new('RGB', (24, 24), 'red').save('source/a/000.png')
    assert prepare() == ''
    assert sorted(os.listdir()) == ['made', 'source']
    assert (Dataset('made').array[0] == (255, 0, 0)).all()


# -------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture(scope='module')
def latents(tmp_path_factory, vae_folder):
    """A folder with source, 12 pictures, and made, their latents."""
    folder = tmp_path_factory.mktemp('latents')
    write_pictures(12, folder / 'source')
    assert run_in(folder, 'data.py', *MADE, f'--vae={vae_folder}') == ''
    return folder


@pytest.fixture
def meta(latents):
    return Dataset(f'{latents}/made').meta


def test_latents_are_the_posterior_of_a_picture_and_of_its_mirror_image(latents, meta):
    assert (meta['image_size'], meta['scaling_factor']) == (24, 0.7)
    vae = load_vae(meta, 'cpu')
    pictures = write_pictures(12)
    array = np.load(latents / 'made/latents.npy')
    for view, side in enumerate((1, -1)):
        images = torch.tensor(pictures[:, :, ::side].copy())
        x = images.permute(0, 3, 1, 2) / 255 * 2 - 1
        mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
        expected = torch.cat([mean, (log_variance / 2).exp()], dim=1)
        np.testing.assert_allclose(array[:, view], expected, rtol=1e-3, atol=1e-5)  # of float16


def test_two_processes_make_the_bytes_of_one(latents, vae_folder):
    args = *MADE, f'--vae={vae_folder}', '--out=of-two'
    printed = finish(*start_two(latents, 'data.py', *args))
    assert printed.count('of-two: 12 images, 0 left out') == 1
    assert contents(latents / 'of-two') == contents(latents / 'made')


def test_latents_that_are_not_finite_are_left_out_by_name(vae_folder, monkeypatch, capsys):
    from diffusers import AutoencoderKL
    write_pictures(99)
    Image.new('RGB', (24, 24), 'white').save('source/b/white.png')
    encode = AutoencoderKL.encode

    def overflow(vae, x):
        result = encode(vae, x)
        white = x.amin((1, 2, 3)) == 1
        result.latent_dist.mean[white] = 1e30       # beyond float16
        return result

    monkeypatch.setattr(AutoencoderKL, 'encode', overflow)
    assert prepare(f'--vae={vae_folder}') == ''
    assert "b/white.png': its latents are not finite" in capsys.readouterr().err
    assert Dataset('made').rows.tolist() == list(range(99))


def test_a_vae_that_has_moved_is_the_same(meta):
    vae = load_vae(meta, 'cpu')
    vae.save_pretrained('moved', safe_serialization=False)      # in another format, too
    moved = load_vae(meta | dict(vae='moved'), 'cpu')
    assert torch.equal(moved.decoder.conv_out.weight, vae.decoder.conv_out.weight)
    assert not moved.training


@pytest.mark.parametrize('part', ('encoder', 'decoder'))
@pytest.mark.parametrize('change', ('other', 'missing'))
def test_a_vae_of_other_weights_or_too_few_is_refused(part, change, meta):
    vae = load_vae(meta, 'cpu')
    layer = vae.get_submodule(f'{part}.conv_out')
    if change == 'other':
        layer.bias += 0.001
        words = 'is not the VAE that made the latents'
    else:
        layer.bias = None
        words = f'lacks weights of an AutoencoderKL: .*{part}.conv_out.bias'
    vae.save_pretrained('changed')
    with pytest.raises(SystemExit, match=words):
        load_vae(meta | dict(vae='changed'), 'cpu')


def test_a_vae_of_another_scaling_factor_is_refused(meta):
    with pytest.raises(SystemExit, match='its scaling_factor is 0.7, not 0.18215'):
        load_vae(meta | dict(scaling_factor=0.18215), 'cpu')


def test_decoding_undoes_the_scaling_a_few_images_at_a_time(meta, monkeypatch):
    vae = load_vae(meta, 'cpu')
    x = torch.randn(5, 4, 8, 8)
    expected = vae.decoder(vae.post_quant_conv(x / 0.7))
    counts = []
    vae.decoder.register_forward_pre_hook(lambda decoder, args: counts.append(len(args[0])))
    monkeypatch.setattr(data, 'PIXELS_PER_CALL', 2 * 24 * 24)
    torch.testing.assert_close(decode(vae, x, meta), expected, rtol=1e-4, atol=1e-5)
    assert counts == [2, 2, 1]


# -------------------------------------------------------------------------------------------------
# Datasets that another program wrote


PIXELS = np.zeros((8, 4, 4, 1), np.uint8)
LABELS = np.arange(8) % 2
LATENTS = dict(array=np.zeros((8, 1, 8, 4, 4), np.float16), channels=4, vae='somewhere')


def write_dataset(folder, array=PIXELS, labels=LABELS, **changes):
    """Grey images of 4 x 4 in two classes, or what is given instead."""
    meta = dict(size=4, channels=1, classes=['a', 'b'], heldout=2, flips=1, vae='') | changes
    os.mkdir(folder)
    file = 'latents.npy' if meta['vae'] else 'images.npy'
    np.save(f'{folder}/{file}', array)
    np.save(f'{folder}/labels.npy', labels)
    Path(f'{folder}/meta.json').write_text(json.dumps(meta))


@pytest.mark.parametrize('given, words', (
    (dict(array=PIXELS.astype(np.int8)), 'images.npy holds int8'),
    (dict(array=PIXELS[:, :2]), 'images.npy is (8, 2, 4, 1)'),
    (dict(array=PIXELS.repeat(2, 3), channels=2), 'channels is 2'),
    (dict(labels=LABELS * 1.0), 'labels.npy is (8,) of float64'),
    (dict(labels=LABELS[:7]), 'labels.npy is (7,)'),
    (dict(labels=LABELS * 2), 'labels exceed the classes'),
    (dict(classes='ab'), 'classes are no list'),
    (dict(labels=LABELS - 1, heldout=4), 'heldout is 4 of 4'),
    (dict(heldout=-1), 'heldout is -1'), (dict(flips=0), 'flips is 0'),
    (LATENTS | dict(array=PIXELS.reshape(8, 1, 4, 2, 2), size=2, channels=2), 'holds uint8'),
    (LATENTS | dict(flips=2), 'latents.npy is (8, 1, 8, 4, 4)'),
    (LATENTS | dict(channels=8), 'latents.npy is (8, 1, 8, 4, 4)'),
    (LATENTS | dict(scaling_factor=0.5), 'no image_size'),
    (LATENTS | dict(image_size=32), 'no scaling_factor')))
def test_what_is_not_as_the_head_of_data_py_says_is_refused(given, words):
    write_dataset('x', **given)
    with pytest.raises(SystemExit, match=f'x is not.*{re.escape(words)}'):
        Dataset('x')


@pytest.mark.parametrize('file', ('x/images.npy', 'x/labels.npy', 'x/meta.json'))
def test_a_damaged_dataset_is_refused(file):
    write_dataset('x')
    os.truncate(file, os.path.getsize(file) - 5)
    with pytest.raises(SystemExit, match='x is not a dataset'):
        Dataset('x')


@pytest.mark.parametrize('dtype', ('uint8', 'int16', 'uint64'))
def test_labels_are_integers_of_any_width(dtype):
    write_dataset('x', labels=LABELS.astype(dtype))
    _, y = Dataset('x').batch(np.arange(4))
    assert y.tolist() == [0, 1] * 2
    assert y.dtype == torch.int64


# -------------------------------------------------------------------------------------------------
# What training sees


# Rows 1, 2, 5, 6 and 7 can be read, and the last two of them are held out
READABLE = dict(labels=[-1, 1, 0, -1, -1, 1, 0, 0], channels=3)
INDEX = np.array([2, 4, 0])         # rows 5, 7 and 1
FLIP = np.array([False, True, True])


@pytest.mark.parametrize('flips', (1, 2))
def test_a_batch_of_pixels_is_of_readable_images_mirrored_as_told(flips):
    """If flips is 1, the dataset allows no mirror images, whatever is told."""
    array = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    write_dataset('x', array, flips=flips, **READABLE)
    dataset = Dataset('x')
    assert dataset.n_train == 3
    assert dataset.eval_index.tolist() == [3, 4]
    x, y = dataset.batch(INDEX, flip=FLIP)
    expected = array[[5, 7, 1]]
    if flips == 2:
        expected[1:] = expected[1:, :, ::-1]
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), expected / 127.5 - 1, atol=1e-6)
    assert y.tolist() == [1, 0, 1]


def test_a_batch_of_latents_is_drawn_from_the_posterior_of_its_view():
    array = np.random.default_rng(0).normal(size=(8, 2, 6, 4, 4)).astype(np.float16)
    given = LATENTS | READABLE | dict(array=array, flips=2, image_size=32, scaling_factor=0.5)
    write_dataset('x', **given)
    dataset = Dataset('x')
    mean, std = torch.tensor(array[[5, 7, 1], [0, 1, 1]]).float().chunk(2, dim=1)
    eps = torch.randn(3, 3, 4, 4)
    x, _ = dataset.batch(INDEX, flip=FLIP, eps=eps)
    torch.testing.assert_close(x, 0.5 * (mean + std * eps))
    x, _ = dataset.batch(INDEX, flip=FLIP)
    torch.testing.assert_close(x, 0.5 * mean)


def test_without_held_out_images_evaluation_is_not_of_the_first_class():
    """Files are in the order of classes. Four at random are of one class 1 time in 35."""
    write_dataset('x', labels=np.repeat([0, 1], 4), heldout=0)
    dataset = Dataset('x')
    assert dataset.eval_name == 'training'
    assert sorted(dataset.eval_index) == list(range(8))
    assert 0 < dataset.labels[dataset.eval_index[:4]].sum() < 4


def test_every_epoch_takes_each_image_once_in_an_order_of_its_own():
    order = training_order(0, 70, 7, seed=3).tolist()
    epochs = [order[i:i + 7] for i in range(0, 70, 7)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(7))
        assert epochs.count(epoch) == 1     # of 5,040
    assert training_order(0, 70, 7, seed=4).tolist() != order
    assert training_order(12, 9, 7, seed=3).tolist() == order[12:21]
