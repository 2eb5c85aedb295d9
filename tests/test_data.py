"""
data.py against independent oracles: images made here in known colours, ADM's code restated, the VAE called directly,
and runs compared byte by byte.
"""
import atexit
import contextlib
import csv
import errno
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import socket
import sys
import time
import traceback
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from conftest import ROOT, TINY, run_in
from data import (Dataset, center_crop, decode, encode, list_pictures, load_vae, make_digits, read_picture,
                  training_order)

INCOMPLETE = 'is not a dataset, or not a complete one'     # what Dataset says
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def blocks(*colours, size=16):
    """Squares of the colours, side by side: an array with the colours' channels."""
    return np.concatenate([np.full((size, size, len(colour)), colour, np.uint8) for colour in colours], axis=1)


def make_pictures(folder, n, size=16):
    """n pictures of noise, called a/00.png, b/01.png, a/02.png and so on; returns them in the order of their names."""
    rng, pictures = np.random.default_rng(0), {}
    for i in range(n):
        name = f'{"ab"[i % 2]}/{i:02}.png'
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pictures[name] = coarse.resize((size, size), Image.Resampling.BICUBIC)
        pictures[name].save(folder / name)
    return [pictures[name] for name in sorted(pictures)]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope='session')
def latents(tmp_path_factory, vae_folder):
    """(folder of the latents of 12 pictures of 16 x 16, the arguments that made them, the pictures)."""
    folder = tmp_path_factory.mktemp('latents')
    pictures = make_pictures(folder / 'source', 12)
    args = [f'--source={folder / "source"}', '--size=16', f'--vae={vae_folder}', '--batch_size=4', '--device=cpu']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['data.py', *args, f'--out={folder / "out"}'])
        with open(folder / 'printed', 'w') as printed, contextlib.redirect_stdout(printed):
            runpy.run_path(os.path.join(ROOT, 'data.py'), run_name='__main__')
    return folder / 'out', args, pictures


def listed(folder):
    """What list_pictures says of a folder: names below it, labels, classes."""
    files, labels, classes = list_pictures(str(folder))
    assert labels.dtype == np.int64
    return [os.path.relpath(file, folder) for file in files], labels.tolist(), classes


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(folder / name, format='PNG')


# --- Reading ----------------------------------------------------------------------------------------------------------

def palette(folder, name):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert('P')
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    image.save(folder / name, transparency=1)


def saved(array, mode, **options):
    return lambda folder, name: Image.fromarray(array.squeeze()).convert(mode).save(folder / name, **options)


def cmyk(folder, name):
    image = Image.frombytes('CMYK', (32, 16), blocks((0, 255, 255, 0), (255, 255, 0, 0)).tobytes())     # C M Y K
    image.save(folder / name, **(dict(quality=100) if name.endswith('jpg') else {}))


@pytest.mark.parametrize('name, make, expected, tolerance', [
    ('rgb.png', saved(blocks(RED, BLUE), 'RGB'), blocks(RED, BLUE), 0),
    ('rgb.BMP', saved(blocks(RED, BLUE), 'RGB'), blocks(RED, BLUE), 0),
    ('rgb.webp', saved(blocks(RED, BLUE), 'RGB', lossless=True), blocks(RED, BLUE), 0),
    ('rgb.ppm', saved(blocks(RED, BLUE), 'RGB'), blocks(RED, BLUE), 0),
    ('rgb.JPEG', saved(blocks(RED, BLUE), 'RGB', quality=100, subsampling=0), blocks(RED, BLUE), 3),
    ('rgb.jfif', saved(blocks(RED, BLUE), 'RGB', quality=100, subsampling=0), blocks(RED, BLUE), 3),
    ('grey.png', saved(blocks([90], [200]), 'L'), blocks([90] * 3, [200] * 3), 0),
    ('bit.png', saved(blocks([0], [255]), '1'), blocks([0] * 3, WHITE), 0),
    ('rgba.png', saved(blocks((*RED, 255), (*RED, 0), (200, 30, 60, 51)), 'RGBA'),
     blocks(RED, WHITE, (244, 210, 216)), 1),       # 0.2 x + 0.8 x 255
    ('la.png', saved(blocks((0, 255), (0, 0), (100, 51)), 'LA'), blocks([0] * 3, WHITE, [224] * 3), 1),
    ('palette.png', palette, [[RED, WHITE, (0, 255, 0)]], 0),
    ('cmyk.tif', cmyk, blocks(RED, BLUE), 0),
    ('cmyk.jpg', cmyk, blocks(RED, BLUE), 3),
])
def test_every_kind_of_image_is_read_in_its_colours(tmp_path, name, make, expected, tolerance):
    make(tmp_path, name)
    [file], _, _ = list_pictures(str(tmp_path))
    image = read_picture(file)
    assert image.dtype == np.uint8 and image.shape == np.shape(expected)
    assert np.abs(image.astype(int) - np.array(expected)).max() <= tolerance


UPRIGHT = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.swapaxes(0, 1),
           lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), np.rot90]     # EXIF orientations 1 to 8


@pytest.mark.parametrize('ending', ['jpg', 'png', 'tif'])
def test_exif_orientation_is_applied(tmp_path, ending):
    stored = np.concatenate([blocks(RED, BLUE), blocks(WHITE, (0, 255, 0))])
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = dict(quality=100, subsampling=0) if ending == 'jpg' else {}
        Image.fromarray(stored).save(tmp_path / f'{orientation}.{ending}', exif=exif, **options)
    files, _, _ = list_pictures(str(tmp_path))
    for i, upright in enumerate(UPRIGHT):
        assert np.abs(read_picture(files[i]).astype(int) - upright(stored)).max() <= 3, f'orientation {i + 1}'


def test_grey_beyond_8_bits_is_refused_not_clipped(tmp_path):
    files = {'16.png': np.uint16, '16.tif': np.uint16, '32.tiff': np.int32, 'float.tif': np.float32}
    for name, dtype in files.items():
        Image.fromarray(np.array([[0, 100, 255, 256, 65_535]]).astype(dtype)).save(tmp_path / name)
    for name in files:
        with pytest.raises(OSError, match=f'^{named(tmp_path / name)}: .*grey of 16 bits'):
            read_picture(str(tmp_path / name))


def named(file):
    """How a message names a file, as a regular expression."""
    return re.escape(repr(str(file)))


def test_what_cannot_be_read_is_named(tmp_path):
    touch(tmp_path, 'a/0.png', 'a/1.png', 'a/2.jpg', 'b/3.png', 'b/4.png')
    whole = (tmp_path / 'a' / '0.png').read_bytes()
    (tmp_path / 'a' / '1.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'a' / '2.jpg').write_text('<html>not found</html>')
    (tmp_path / 'b' / '3.png').write_bytes(b'')
    files, _, _ = list_pictures(str(tmp_path))
    (tmp_path / 'b' / '4.png').unlink()
    for size, shape in ((0, (4, 4, 3)), (2, (2, 2, 3))):
        assert read_picture(files[0], size).shape == shape
        for file in files[1:]:
            with pytest.raises(OSError, match=f'^{named(file)}: .'):
                read_picture(file, size)


def test_first_level_folders_are_the_classes(tmp_path):
    touch(tmp_path, 'dog/2.PNG', 'dog/deep/er/1.JPg', 'cat/x.webp')
    touch(tmp_path, 'cat/.hidden.png', '__MACOSX/cat/._x.png', '.git/y.png')
    (tmp_path / 'cat' / 'notes.txt').write_text('no image')
    assert listed(tmp_path) == (['cat/x.webp', 'dog/2.PNG', 'dog/deep/er/1.JPg'], [0, 1, 1], ['cat', 'dog'])


@pytest.mark.parametrize('names, classes, labels', [
    (['1.png', '2.png'], [], [0, 0]),
    (['1.png', 'cat/2.png', 'dog/3.png'], [], [0, 0, 0]),
    (['all/1.png', 'all/2.png'], [], [0, 0]),
    (['all/cat/1.png', 'all/dog/2.png'], ['cat', 'dog'], [0, 1]),
    (['car/1.png', 'cat/2.png'], ['car', 'cat'], [0, 1]),
])
def test_lone_folders_and_images_beside_folders_make_no_classes(tmp_path, names, classes, labels):
    touch(tmp_path, *names)
    assert listed(tmp_path) == (names, labels, classes)


def test_what_is_found_and_what_is_passed_over_are_counted(tmp_path, capsys):
    touch(tmp_path, 'cat/1.png', 'cat/2.jfif', 'dog/3.ppm')
    for name in ('notes.txt', 'cat/table.csv', 'dog/deep/paper.pdf', 'dog/archive.zip', 'dog/no_ending', '.hidden.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('no picture')
    assert listed(tmp_path)[2] == ['cat', 'dog']
    printed = capsys.readouterr().out
    assert re.search(r'\b3 pictures\b', printed) and re.search(r'\b6 other files\b', printed)     # the hidden one, too
    assert '2 classes' in printed and "['cat', 'dog']" in printed and str(tmp_path) in printed


def test_links_that_lead_nowhere_are_passed_over_and_counted(tmp_path, capsys):
    touch(tmp_path, 'cat/1.png', 'dog/2.png')
    (tmp_path / 'cat' / 'gone.png').symlink_to('nowhere.png')
    (tmp_path / 'round').symlink_to('round')
    assert listed(tmp_path)[2] == ['cat', 'dog'] and '2 other files' in capsys.readouterr().out


def test_a_folder_of_the_users_is_never_taken_for_a_half_made_dataset(tmp_path, run):
    make_pictures(tmp_path / 'x.parts', 12)
    _, message = run('data.py', f'--source={tmp_path}/x.parts', f'--out={tmp_path}/x', '--size=8', '--device=cpu')
    assert 'x.parts holds other files' in message and '\n' not in message
    assert len(list((tmp_path / 'x.parts').rglob('*.png'))) == 12


@pytest.mark.parametrize('out', ('/', '{}/source/.', '{}/dangling'))
def test_places_where_no_folder_can_be_made_are_refused_before_the_work(out, tmp_path, run):
    make_pictures(tmp_path / 'source', 3)
    (tmp_path / 'dangling').symlink_to('nowhere')
    _, message = run('data.py', f'--source={tmp_path}/source', f'--out={out.format(tmp_path)}', '--device=cpu')
    assert 'exists' in message and '\n' not in message


def test_a_typo_in_reading_pictures_is_no_damaged_picture(tmp_path, monkeypatch):
    """A programmer's error keeps its traceback."""
    touch(tmp_path, 'a.png')
    monkeypatch.setattr(data, 'center_crop', lambda image, size: int('x'))
    with pytest.raises(ValueError, match='invalid literal'):
        data.read_picture(str(tmp_path / 'a.png'), 4)


def test_pictures_beside_class_folders_are_said_to_make_no_classes(tmp_path, capsys):
    """One picture in the wrong place makes a whole training unconditional: whoever prepares it must see that."""
    touch(tmp_path, 'cat/1.png', 'dog/2.png')
    assert listed(tmp_path)[2] == ['cat', 'dog']
    assert '2 classes' in capsys.readouterr().out
    touch(tmp_path, 'stray.png')
    assert listed(tmp_path)[2] == []
    assert re.search(r'\b(no|0) classes', capsys.readouterr().out)


@pytest.mark.parametrize('link, target', [('cat/up', '../..'), ('dog/round', '..'), ('dog/here', '.')])
def test_a_link_above_the_source_lists_each_picture_once(tmp_path, link, target):
    touch(tmp_path, 'source/cat/1.png', 'source/dog/2.png', 'beside/3.png')
    source = tmp_path / 'source'
    (source / link).symlink_to(target)
    beside = ['cat/up/beside/3.png'] * (link == 'cat/up')
    assert listed(source) == (['cat/1.png', *beside, 'dog/2.png'], [0] * len(beside) + [0, 1], ['cat', 'dog'])
    touch(source, '0.png')      # in the source itself
    assert listed(source) == (['0.png', 'cat/1.png', *beside, 'dog/2.png'], [0] * len(beside) + [0] * 3, [])


class Scan:
    """What os.scandir returns, with its entries in another order."""

    def __init__(self, entries, reverse):
        self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=reverse))

    __enter__ = __iter__ = lambda self: self
    __exit__ = lambda self, *error: None
    __next__ = lambda self: next(self.entries)
    close = lambda self: None


def test_a_link_to_a_class_does_not_take_it_over_wherever_it_sorts(tmp_path, monkeypatch):
    """Whatever the order of the names, and the order in which the file system lists them."""
    scan = os.scandir
    for forwards in (True, False):
        for name in ('ant', 'cow', 'emu'):
            source = tmp_path / f'{name}{forwards}'
            touch(source, 'bee/1.png', 'dog/deep/2.png')
            (source / name).symlink_to(source / 'dog')
            (source / f'{name}-deep').symlink_to(source / 'dog' / 'deep')
            with monkeypatch.context() as patch:
                patch.setattr(os, 'scandir', lambda folder: Scan(scan(folder), not forwards))
                assert listed(source) == (['bee/1.png', 'dog/deep/2.png'], [0, 1], ['bee', 'dog'])


def test_a_link_within_a_class_does_not_take_over_a_class_that_sorts_later(tmp_path):
    """Real folders come first, wherever a link lies."""
    touch(tmp_path, 'ant/1.png', 'bee/2.png', 'bee/deep/3.png')
    (tmp_path / 'ant' / 'link').symlink_to(tmp_path / 'bee')
    (tmp_path / 'ant' / 'more').symlink_to(tmp_path / 'bee' / 'deep')
    assert listed(tmp_path) == (['ant/1.png', 'bee/2.png', 'bee/deep/3.png'], [0, 1, 1], ['ant', 'bee'])


def test_hidden_folders_and_links_are_skipped(tmp_path):
    touch(tmp_path, 'source/cat/1.png', 'source/dog/2.png', 'source/dog/.deep/er/3.png', 'elsewhere/4.png')
    (tmp_path / 'source' / '.link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'source' / 'dog' / '.link.png').symlink_to(tmp_path / 'elsewhere' / '4.png')
    assert listed(tmp_path / 'source') == (['cat/1.png', 'dog/2.png'], [0, 1], ['cat', 'dog'])


@pytest.mark.parametrize('folder', ('', 'dog', 'dog/deep', 'link'))
def test_a_folder_that_cannot_be_read_is_refused(folder, tmp_path, monkeypatch):
    """Its pictures would be missing in silence. (Permissions do not bind root, so this is pretended.)"""
    touch(tmp_path, 'source/cat/1.png', 'source/dog/deep/2.png', 'elsewhere/3.png')
    source, scan = tmp_path / 'source', os.scandir
    (source / 'link').symlink_to(tmp_path / 'elsewhere')
    closed = str(source / folder)

    def refuses(path):
        if os.fspath(path) == closed:
            raise PermissionError(errno.EACCES, 'Permission denied', closed)
        return scan(path)

    monkeypatch.setattr(os, 'scandir', refuses)
    with pytest.raises(SystemExit) as end:
        list_pictures(str(source))
    assert f'{closed!r} is not a folder that can be read (Permission denied)' in str(end.value)
    assert '\n' not in str(end.value)


def test_linked_folders_and_pictures_count_like_others(tmp_path):
    touch(tmp_path, 'source/cat/1.png', 'elsewhere/birds/2.png', 'elsewhere/birds/deep/3.png', 'elsewhere/one.png')
    source = tmp_path / 'source'
    (source / 'bird').symlink_to(tmp_path / 'elsewhere' / 'birds')
    (source / 'cat' / 'link.png').symlink_to(tmp_path / 'elsewhere' / 'one.png')
    expected = ['bird/2.png', 'bird/deep/3.png', 'cat/1.png', 'cat/link.png'], [0, 0, 1, 1], ['bird', 'cat']
    assert listed(source) == expected
    (tmp_path / 'linked').symlink_to(source)        # the source itself
    assert listed(tmp_path / 'linked') == expected


@pytest.mark.parametrize('width, height, size', [
    (300, 200, 64), (200, 301, 100), (64, 64, 64), (33, 50, 64), (257, 128, 64)])
def test_the_crop_is_adms(width, height, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))

    def adm(pil_image, image_size):     # guided_diffusion/image_datasets.py: center_crop_arr
        while min(*pil_image.size) >= 2 * image_size:
            pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
        scale = image_size / min(*pil_image.size)
        pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
        arr = np.array(pil_image)
        crop_y = (arr.shape[0] - image_size) // 2
        crop_x = (arr.shape[1] - image_size) // 2
        return arr[crop_y:crop_y + image_size, crop_x:crop_x + image_size]

    cropped = center_crop(image, size)
    assert cropped.shape == (size, size, 3) and cropped.dtype == np.uint8
    assert (cropped == adm(image, size)).all()


def test_the_crop_is_the_middle():
    stripes = blocks(RED, WHITE, BLUE, size=64)
    for array in (stripes, stripes.swapaxes(0, 1)):
        assert (center_crop(Image.fromarray(array), 64) == 255).all()


def test_reading_crops_to_the_size_asked_for(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / 'x.png')
    file = str(tmp_path / 'x.png')
    assert (read_picture(file, 16) == center_crop(Image.open(file), 16)).all()
    assert (read_picture(file) == np.asarray(Image.open(file))).all()


# --- Preparing --------------------------------------------------------------------------------------------------------

def test_pixels_and_labels_of_a_folder(tmp_path, run):
    pictures = make_pictures(tmp_path / 'source', 10)
    printed, message = run('data.py', f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}/', '--size=16',
                           '--batch_size=4', '--device=cpu')
    assert message == '' and f'{tmp_path / "x"}: 10 images, 0 left out' in printed
    assert set(contents(tmp_path / 'x')) == {'images.npy', 'labels.npy', 'meta.json'}
    assert sorted(os.listdir(tmp_path)) == ['source', 'x']
    prepared = Dataset(str(tmp_path / 'x'))
    assert (prepared.array == np.stack([np.asarray(picture) for picture in pictures])).all()
    assert prepared.labels.tolist() == [0] * 5 + [1] * 5
    assert prepared.meta == dict(source=str(tmp_path / 'source'), size=16, image_size=16, channels=3, count=10,
                                 heldout=0, classes=['a', 'b'], flips=2, vae='')
    assert prepared.n_train == 10 and prepared.rows.tolist() == list(range(10))
    assert sorted(prepared.eval_index.tolist()) == list(range(10)) != prepared.eval_index.tolist()
    assert prepared.array.dtype == np.uint8 and prepared.labels.dtype == np.int64


def test_held_out_images_are_of_all_classes_and_keep_their_labels(tmp_path, run):
    pictures = make_pictures(tmp_path / 'source', 40)
    run('data.py', f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=16', '--heldout=12',
        '--device=cpu')
    prepared = Dataset(str(tmp_path / 'x'))
    assert prepared.n_train == 28 and prepared.eval_index.tolist() == list(range(28, 40))
    by_name = [np.asarray(picture).tobytes() for picture in pictures]
    order = [by_name.index(image.tobytes()) for image in prepared.array]
    assert sorted(order) == list(range(40)) and prepared.labels.tolist() == [i // 20 for i in order]
    assert 2 <= prepared.labels[28:].sum() <= 10        # false alarm: 2 in 10,000, and the permutation is fixed


def test_a_complete_dataset_is_left_alone(latents, tmp_path, run, monkeypatch):
    pixels = make_pictures(tmp_path / 'source', 3), [f'--source={tmp_path / "source"}', '--size=16', '--device=cpu']
    run('data.py', *pixels[1], f'--out={tmp_path / "x"}')
    monkeypatch.setattr(Image, 'open', lambda *args: (_ for _ in ()).throw(AssertionError('an image is read again')))
    for out, args in ((tmp_path / 'x', pixels[1]), (latents[0], latents[1])):
        before = contents(out)
        for other in ('--device=cpu', '--size=8', '--heldout=1', '--flip=False', '--source=nowhere'):
            for slash in ('', '/'):
                message = run('data.py', *args, f'--out={out}{slash}', other)[1]
                assert message == f'data.py: {out} exists: delete it, or give another --out'
                assert contents(out) == before and not os.path.exists(f'{out}.parts')


def prepare(capsys, *args):
    """What data.py prints, on either stream, and the sentence it ends with."""
    message = run_in(ROOT, 'data.py', *args, '--device=cpu')
    return ''.join(capsys.readouterr()), message


@pytest.fixture
def damaged(tmp_path):
    """202 pictures, the grey of each its number, two of them damaged: allowed, just so."""
    for i in range(202):
        (tmp_path / 'source' / 'ab'[i > 100]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (i, i, i)).save(tmp_path / 'source' / 'ab'[i > 100] / f'{i:03}.png')
    whole = (tmp_path / 'source' / 'a' / '017.png').read_bytes()
    (tmp_path / 'source' / 'a' / '017.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'source' / 'b' / '150.png').write_text('<html>not found</html>')
    return [f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=8'], whole


def test_damaged_images_are_named_and_left_out(tmp_path, capsys, damaged):
    args, whole = damaged
    out, message = prepare(capsys, *args)
    left_out = [line for line in out.splitlines() if line.startswith('left out: ')]
    assert message == '' and f'{tmp_path / "x"}: 200 images, 2 left out' in out and len(left_out) == 2
    for name in ('a/017.png', 'b/150.png'):
        assert sum(repr(str(tmp_path / 'source' / name)) in line for line in left_out) == 1
    prepared = Dataset(str(tmp_path / 'x'))
    kept = [i for i in range(202) if i not in (17, 150)]
    assert prepared.labels.tolist() == [-1 if i in (17, 150) else int(i > 100) for i in range(202)]
    assert prepared.meta['count'] == 202 and prepared.rows.tolist() == kept and prepared.n_train == 200
    assert prepared.array.shape == (202, 8, 8, 3) and prepared.array[kept, 0, 0, 0].tolist() == kept
    assert sorted(prepared.eval_index.tolist()) == list(range(200))
    x, y = prepared.batch(prepared.eval_index)
    seen = [kept[i] for i in prepared.eval_index]
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().tolist() == seen and y.tolist() == [int(i > 100) for i in seen]
    (tmp_path / 'source' / 'a' / '017.png').write_bytes(whole)      # mended: a new dataset has it
    out, message = prepare(capsys, *args, f'--out={tmp_path / "y"}')
    prepared = Dataset(str(tmp_path / 'y'))
    assert message == '' and '1 left out' in out and prepared.rows.tolist() == [i for i in range(202) if i != 150]
    assert (prepared.array[17] == 17).all() and prepared.labels[17] == 0


@pytest.mark.parametrize('threads', (1, 8))
def test_more_than_one_percent_damaged_stops_and_leaves_no_dataset_until_mended(tmp_path, capsys, damaged, monkeypatch,
                                                                                threads):
    args, whole = damaged
    mended = tmp_path / 'source' / 'b' / '201.png'
    content = mended.read_bytes()
    mended.write_bytes(whole[:len(whole) // 2])
    monkeypatch.setattr(futures, 'ThreadPoolExecutor', partial(ThreadPoolExecutor, threads))
    out, message = prepare(capsys, *args)
    assert message == 'data.py: 3 of 202 pictures cannot be read, more than 1%' and '201.png' in out
    assert not (tmp_path / 'x').exists()
    mended.write_bytes(content)
    assert prepare(capsys, *args)[1] == ''
    prepared = Dataset(str(tmp_path / 'x'))
    assert np.flatnonzero(prepared.labels < 0).tolist() == [17, 150] and (prepared.array[201] == 201).all()


def test_a_long_strip_is_left_out_by_name(tmp_path, capsys):
    """Cropped as ADM does, a strip would be blown up to size x (size times its ratio): it could fill the memory."""
    make_pictures(tmp_path / 'source', 99)
    Image.new('RGB', (10, 490), RED).save(tmp_path / 'source' / 'a' / 'long.png')       # not too long
    Image.new('RGB', (600, 10)).save(tmp_path / 'source' / 'b' / 'strip.png')
    out, message = prepare(capsys, f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=16')
    assert message == '' and '100 images, 1 left out' in out
    left_out, = (line for line in out.splitlines() if line.startswith('left out: '))
    assert repr(str(tmp_path / 'source' / 'b' / 'strip.png')) in left_out and 'long' in left_out
    prepared = Dataset(str(tmp_path / 'x'))
    assert (prepared.array[50] == RED).all() and np.flatnonzero(prepared.labels < 0).tolist() == [100]
    for i, file in enumerate(('wide.png', 'tall.png')):
        Image.new('L', (600, 10)[::1 - 2 * i]).save(tmp_path / file)
        with pytest.raises(OSError, match=f'^{named(tmp_path / file)}: .*long'):
            read_picture(str(tmp_path / file), 16)


def test_a_damaged_file_is_named_whatever_bytes_its_name_is_of(tmp_path, capsys):
    """The names of its file and of its class are no UTF-8, which a terminal cannot be sent as they are."""
    make_pictures(tmp_path / 'source', 99)
    strange = os.fsencode(tmp_path / 'source') + b'/cl\xffass'
    os.mkdir(strange)
    for name in (b'/\xe9t\xe9.png', b'/\xfe.png'):
        Image.new('RGB', (16, 16), RED).save(os.fsdecode(strange + name))
    with open(strange + b'/\xe9t\xe9.png', 'wb') as f:
        f.write(b'no picture')
    out, message = prepare(capsys, f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=16')
    assert message == '' and '100 images, 1 left out' in out and 'left out: ' in out
    assert repr(os.fsdecode(strange + b'/\xe9t\xe9.png')) in out
    prepared = Dataset(str(tmp_path / 'x'))
    assert [os.fsencode(name) for name in prepared.meta['classes']] == [b'a', b'b', b'cl\xffass']
    assert sorted(prepared.labels[-2:].tolist()) == [-1, 2] and (prepared.array[prepared.rows[-1]] == RED).all()


def test_a_full_disk_shows_before_any_image_is_read(tmp_path, run, monkeypatch):
    """A limit on the size of files, as a full disk: labels.npy fits below it, the images do not."""
    pictures = make_pictures(tmp_path / 'source', 12)
    args = f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=16', '--device=cpu'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    for disk in ('a limit', 'sparse files'):        # which a full disk takes, until they are written
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Image, 'open', lambda *args: (_ for _ in ()).throw(AssertionError('an image is read')))
                if disk == 'a limit':
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
                else:
                    patch.setattr(os, 'posix_fallocate', full)
                _, message = run('data.py', *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert message.startswith(f'data.py: cannot write 12 images to {tmp_path / "x"} (OSError: ')
        assert '\n' not in message and not (tmp_path / 'x').exists()
        with pytest.raises(SystemExit, match=f'x {INCOMPLETE}'):
            Dataset(str(tmp_path / 'x'))
    assert run('data.py', *args)[1] == ''       # there is room again
    assert (Dataset(str(tmp_path / 'x')).array == np.stack([np.asarray(picture) for picture in pictures])).all()


def private_memory():
    """The bytes of memory that belong to this process alone: what it maps from files does not count."""
    with open('/proc/self/status') as f:
        return 1024 * int(re.search(r'RssAnon:\s+(\d+)', f.read())[1])


class StandIn:
    """In place of a VAE: the latents of an image are its mean, everywhere. It notes how much memory is in use."""
    device, config = 'cpu', SimpleNamespace(scaling_factor=1.0, block_out_channels=(8,))

    def __init__(self, *shape):
        self.shape, self.memory = shape, []

    def requires_grad_(self, on):
        return self

    eval = lambda self: self
    parameters = lambda self: [torch.zeros(3)]
    to = lambda self, device: self

    def encode(self, view):
        self.memory.append(private_memory())
        mean = view.mean((1, 2, 3), keepdim=True).expand(len(view), *self.shape)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean))


def prepare_with(vae, source, count, run, monkeypatch, *args):
    """Runs data.py on `count` hard links to one red picture, with a stand-in for the VAE."""
    from diffusers import AutoencoderKL
    monkeypatch.setattr(AutoencoderKL, 'from_pretrained', lambda *args, **options: (vae, dict(missing_keys=[])))
    source.mkdir()
    Image.new('RGB', (8, 8), RED).save(source / 'first.png')
    for i in range(1, count):
        os.link(source / 'first.png', source / f'{i:05}.png')
    return run('data.py', f'--source={source}', '--size=8', '--vae=stand-in', '--flip=False', '--device=cpu', *args)


def test_rows_go_to_the_disk_and_not_into_memory(tmp_path, run, monkeypatch):
    """384 MB of rows, and the process never has 100 MB more than when it encoded the first of them."""
    vae = StandIn(8, 256, 256)      # 2 MB a row
    _, message = prepare_with(vae, tmp_path / 'source', 192, run, monkeypatch, f'--out={tmp_path / "x"}',
                              '--batch_size=16')
    rows = np.load(tmp_path / 'x' / 'latents.npy', mmap_mode='r')
    assert message == '' and rows.shape == (192, 1, 16, 256, 256) and rows.nbytes > 384e6
    np.testing.assert_allclose(rows[::50, 0, :, 0, 0].astype(float), (255 / 3) / 127.5 - 1, atol=1e-3)
    assert len(vae.memory) == 1 + 12 and max(vae.memory[1:]) - vae.memory[1] < 100e6


def test_a_dataset_far_larger_than_memory_can_be_begun(tmp_path, run, monkeypatch):
    """A sparse array of 1 TB, without its space being reserved; the run is ended when it opens the first picture."""
    before, memory = private_memory(), []

    def ends(*args):
        memory.append(private_memory())
        raise KeyboardInterrupt

    monkeypatch.delattr(os, 'posix_fallocate')
    monkeypatch.setattr(Image, 'open', ends)
    with pytest.raises(KeyboardInterrupt):
        prepare_with(StandIn(16, 1024, 1024), tmp_path / 'source', 16_000, run, monkeypatch,        # 64 MB a row
                     f'--out={tmp_path / "x"}')
    file = tmp_path / 'x.parts' / 'latents.npy'
    try:
        assert file.stat().st_size > 1e12 and file.stat().st_blocks * 512 < 1e9
        assert len(memory) > 0 and max(memory) - before < 1e9
    finally:
        shutil.rmtree(tmp_path / 'x.parts')


def test_the_space_of_all_rows_is_reserved_before_any_image_is_read(tmp_path, run, monkeypatch):
    make_pictures(tmp_path / 'source', 12, size=64)
    reserved = []

    def ends(*args):
        reserved.append((tmp_path / 'x.parts' / 'images.npy').stat().st_blocks * 512)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image, 'open', ends)
        run('data.py', f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=64', '--device=cpu')
    assert min(reserved) >= 12 * 64 * 64 * 3


def test_latents_are_the_posterior_of_the_image_and_of_its_mirror_image(latents, vae_folder):
    from diffusers import AutoencoderKL
    folder, _, pictures = latents
    array, vae = np.load(folder / 'latents.npy'), AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    assert array.shape == (12, 2, 8, 8, 8) and array.dtype == np.float16
    for row, picture in zip(array, pictures):
        for latent, view in zip(row, (picture, ImageOps.mirror(picture))):
            x = torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1)[None] / 255 * 2 - 1
            with torch.no_grad():
                posterior = vae.encode(x).latent_dist
            expected = torch.cat([posterior.mean, posterior.var.sqrt()], dim=1)[0].numpy()
            np.testing.assert_allclose(latent, expected, rtol=2e-3, atol=1e-4)


def test_the_meta_of_latents_records_vae_and_scaling(latents, vae_folder):
    meta = Dataset(str(latents[0])).meta
    assert (meta['size'], meta['image_size'], meta['channels'], meta['flips'], meta['vae']) == (8, 16, 4, 2, vae_folder)
    assert meta['scaling_factor'] == 0.7 and 'latent_std' not in meta


def forked(args, printed, script, environment):
    sys.argv, sys.stdout, sys.stderr = [script, *args], *[open(printed, 'w', buffering=1)] * 2
    os.environ.update(environment)
    atexit._clear()
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    finally:
        atexit._run_exitfuncs()


def started(args, printed, script='data.py', **environment):
    """A script in a process of its own, forked: so it need not import for seconds what is imported here."""
    process = multiprocessing.get_context('fork').Process(target=forked, args=(args, printed, script, environment))
    process.start()
    return process


def wait_until_written(file, count, process):
    """Which of the 12 rows hold something once `count` do."""
    written, started = np.zeros(12, bool), time.time()
    while written.sum() < count and time.time() < started + 60 and process.is_alive():
        time.sleep(0.02)
        with contextlib.suppress(OSError, ValueError):      # not there yet, or not whole
            written = np.load(file, mmap_mode='r').any(axis=(1, 2, 3, 4))
    return written.tolist()


@contextlib.contextmanager
def waiting(picture):
    """Makes a picture a pipe, so that reading it waits for ever; yields what ends that."""
    content = picture.read_bytes()

    def mend():
        picture.unlink()
        picture.write_bytes(content)

    picture.unlink()
    os.mkfifo(picture)
    try:
        yield content, mend
    finally:
        mend()


def test_a_killed_run_leaves_no_dataset_and_the_same_command_starts_anew(latents, tmp_path, run):
    """Nothing that was half made, by these settings or others, gets into what the next run makes."""
    folder, args, pictures = latents
    reference, array = contents(folder), np.load(folder / 'latents.npy')
    source, out, parts = folder.parent / 'source', tmp_path / 'x', tmp_path / 'x.parts'
    first = source / 'a' / '00.png'
    args = [*args, f'--out={out}']

    def kill():
        with waiting(source / 'b' / '07.png'):      # the tenth by name, in the last call of the VAE
            killed = started(args, tmp_path / 'printed')
            try:
                assert wait_until_written(parts / 'latents.npy', 8, killed) == [True] * 8 + [False] * 4
                assert killed.is_alive()
            finally:
                killed.kill()
                killed.join()
        assert not out.exists() and not (parts / 'meta.json').exists()
        assert (np.load(parts / 'latents.npy') == array * (np.arange(12) < 8)[:, None, None, None, None]).all()
        for half_made in (out, parts):
            with pytest.raises(SystemExit, match=INCOMPLETE):
                Dataset(str(half_made))

    kill()
    printed, message = run('data.py', *args)
    assert message == '' and '12 images, 0 left out' in printed
    assert contents(out) == reference and not parts.exists()
    shutil.rmtree(out)
    kill()
    try:
        Image.new('RGB', (16, 16), RED).save(first)     # read by the run that was killed: it must be read again
        assert run('data.py', *args, '--vae=')[1] == ''
    finally:
        pictures[0].save(first)
    assert set(contents(out)) == {'images.npy', 'labels.npy', 'meta.json'} and not parts.exists()
    prepared = Dataset(str(out))
    assert (prepared.array == np.stack([np.full((16, 16, 3), RED), *map(np.asarray, pictures[1:])])).all()


@pytest.mark.parametrize('step', ('flush', 'rename'))
def test_a_dataset_appears_when_all_is_on_the_disk_and_meta_json_comes_last(latents, tmp_path, run, monkeypatch, step):
    """A run that dies while it flushes its rows, or before its last step, leaves nothing that looks like a dataset."""
    folder, args, _ = latents
    flush, flushed = np.memmap.flush, set()

    def flushes(array):
        flush(array)
        flushed.add(os.path.basename(array.filename))
        if step == 'flush':
            raise KeyboardInterrupt

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np.memmap, 'flush', flushes)
        patch.setattr(os, 'rename', dies)
        run('data.py', *args, f'--out={tmp_path / "x"}')
    assert step == 'flush' or flushed == {'latents.npy', 'labels.npy'}
    assert os.listdir(tmp_path) == ['x.parts'] and (tmp_path / 'x.parts' / 'meta.json').exists() == (step == 'rename')
    assert np.load(tmp_path / 'x.parts' / 'latents.npy').any(axis=(1, 2, 3, 4)).all()
    with pytest.raises(SystemExit, match=INCOMPLETE):
        Dataset(str(tmp_path / 'x'))
    assert run('data.py', *args, f'--out={tmp_path / "x"}')[1] == '' and contents(tmp_path / 'x') == contents(folder)


def test_two_processes_make_the_bytes_of_one(latents, tmp_path):
    folder, args, _ = latents
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    out, printed = tmp_path / 'x', [tmp_path / '0', tmp_path / '1']
    with waiting(folder.parent / 'source' / 'a' / '10.png') as (content, mend):     # the sixth: the second process's
        processes = [started([*args, f'--out={out}'], printed[rank], WORLD_SIZE='2', RANK=str(rank),
                             LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
                     for rank in range(2)]
        try:
            written = wait_until_written(tmp_path / 'x.parts' / 'latents.npy', 8, processes[0])
            assert written == [True] * 4 + [False] * 4 + [True] * 4
            time.sleep(0.5)
            assert processes[0].is_alive() and not out.exists()     # it waits for the second
            (folder.parent / 'source' / 'a' / '10.png').write_bytes(content)        # into the pipe
            for process in processes:
                process.join(60)
            assert [process.exitcode for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
    assert [f'{out}: 12 images, 0 left out' in file.read_text() for file in printed] == [True, False]
    assert '| 2/2 [' in printed[0].read_text()      # calls of its own
    assert contents(out) == contents(folder) and not (tmp_path / 'x.parts').exists()


@pytest.mark.parametrize('args, sentence', [
    ([], 'give pictures and a dataset'),
    (['--source=one'], 'give pictures and a dataset'),
    (['--source=nowhere', '--out=x'], "nowhere' is not a folder that can be read"),
    (['--source=one/1.png', '--out=x'], "one/1.png' is not a folder that can be read"),
    (['--source=empty', '--out=x'], "no pictures in 'empty', but 1 other files"),
    (['--source=one', '--out=one'], 'one exists'),
    (['--source=one', '--out=one/1.png/x'], 'cannot write 1 images to one/1.png/x'),
    (['--source=one', '--out=x', '--heldout=1'], 'less than the 1 pictures'),
    (['--source=one', '--out=x', '--heldout=-1'], 'out of range'),
    (['--source=one', '--out=x', '--size=0'], 'at least 1'),
    (['--source=one', '--out=x', '--size=15', '--vae=VAE'], 'multiple of 2'),
    (['--source=one', '--out=x', '--vae=one'], "'one' is no folder or Hugging Face id of an AutoencoderKL"),
])
def test_mistakes_end_in_a_sentence(run, workplace, vae_folder, args, sentence):
    shutil.rmtree(workplace / 'x', ignore_errors=True)
    (workplace / 'empty').mkdir(exist_ok=True)
    (workplace / 'empty' / 'notes.txt').write_text('no picture')
    touch(workplace, 'one/1.png')
    _, message = run('data.py', *[arg.replace('VAE', vae_folder) for arg in args], '--device=cpu')
    assert sentence in message and message.startswith('data.py: ') and '\n' not in message
    assert not (workplace / 'x').exists() and not (workplace / 'x.parts').exists()
    assert os.listdir(workplace / 'one') == ['1.png']


# --- What training and sampling see -----------------------------------------------------------------------------------

def test_digits_are_the_same_bytes_every_time_and_labels_cycle(tmp_path):
    make_digits(str(tmp_path / 'x'), train=30, heldout=5)
    make_digits(str(tmp_path / 'y'), train=30, heldout=5)
    assert contents(tmp_path / 'x') == contents(tmp_path / 'y')
    digits = Dataset(str(tmp_path / 'x'))
    assert digits.labels.tolist() == [i % 10 for i in range(35)] and digits.eval_index.tolist() == [*range(30, 35)]
    assert len({image.tobytes() for image in digits.array}) == 35
    x, y = digits.batch(np.array([4, 2]), flip=np.array([True, True]))
    assert x.shape == (2, 1, 32, 32) and y.tolist() == [4, 2]
    np.testing.assert_allclose(x[0, 0], digits.array[4, :, :, 0] / 127.5 - 1, atol=1e-6)      # never mirrored


@pytest.mark.parametrize('vae', ('', 'a VAE'))
def test_only_readable_images_are_counted_and_served(vae, tmp_path):
    labels, rng = [-1, 1, 0, -1, -1, 1, 2, 0], np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 4, 4, 3), np.uint8)
    latents = rng.normal(size=(8, 2, 2 * 3, 4, 4)).astype(np.float16)
    meta = dict(size=4, channels=3, count=8, heldout=2, classes=['a', 'b', 'c'], flips=2, vae=vae, image_size=8,
                scaling_factor=0.5)
    write(tmp_path / 'x', meta, np.array(labels), **(dict(latents=latents) if vae else dict(images=images)))
    prepared = Dataset(str(tmp_path / 'x'))
    assert prepared.rows.tolist() == [1, 2, 5, 6, 7]
    assert prepared.n_train == 3 and prepared.eval_index.tolist() == [3, 4]
    x, y = prepared.batch(np.array([0, 4, 2, 1]), flip=np.array([False, True, False, True]))
    views = [(1, 1), (7, -1), (5, 1), (2, -1)]
    expected = [0.5 * latents[i, (1 - side) // 2, :3] if vae else images[i, :, ::side].transpose(2, 0, 1) / 127.5 - 1
                for i, side in views]
    np.testing.assert_allclose(x, np.stack(expected), atol=1e-6)
    assert y.tolist() == [labels[i] for i, _ in views]


def write(folder, meta, labels, **arrays):
    folder.mkdir()
    for name, array in (arrays | dict(labels=labels)).items():
        np.save(folder / f'{name}.npy', array)
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.mark.parametrize('change, sentence', [
    (dict(), ''),
    (dict(size=5), 'x is not what its meta.json says'),
    (dict(channels=1), 'x is not what its meta.json says'),
    (dict(classes=['a', 'b']), 'x is not what its meta.json says'),
    (dict(classes=[]), 'x is not what its meta.json says'),
    (dict(heldout=3), 'x is not what its meta.json says'),
    (dict(vae='a VAE'), f'x {INCOMPLETE}'),
    (dict(labels=[2, -1, 0]), 'x is not what its meta.json says'),
    (dict(labels=[-1] * 4), 'x is not what its meta.json says'),
])
def test_a_folder_that_is_no_whole_dataset_ends_in_a_sentence(change, sentence, tmp_path):
    meta = dict(size=4, count=4, heldout=2, classes=['a', 'b', 'c'], flips=1, vae='', channels=3) | change
    labels = np.array(meta.pop('labels', [2, -1, 0, 1]))
    write(tmp_path / 'x', meta, labels, images=np.zeros((4, 4, 4, 3), np.uint8))
    if not sentence:
        assert Dataset(str(tmp_path / 'x')).n_train == 1
        return
    with pytest.raises(SystemExit, match=sentence):
        Dataset(str(tmp_path / 'x'))
    for key in ('size', 'heldout', 'classes', 'vae'):
        (tmp_path / 'x' / 'meta.json').write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
        with pytest.raises(SystemExit, match=f"x {INCOMPLETE}: data.py makes them, .*KeyError: '{key}'"):
            Dataset(str(tmp_path / 'x'))
    with pytest.raises(SystemExit, match=f'data/.*nowhere {INCOMPLETE}: data.py makes them, '):
        Dataset(str(tmp_path / 'nowhere'))


def test_a_batch_of_pixels_mirrors_what_it_is_told_to(tmp_path, run):
    pictures = make_pictures(tmp_path / 'source', 4)
    for flip in (True, False):
        out = str(tmp_path / f'x{flip}')
        run('data.py', f'--source={tmp_path / "source"}', f'--out={out}', '--size=16', f'--flip={flip}', '--device=cpu')
        prepared = Dataset(out)
        x, y = prepared.batch(np.array([3, 0, 3]), flip=np.array([False, True, True]))
        mirror = ImageOps.mirror if flip else Image.Image.copy
        expected = pictures[3], mirror(pictures[0]), mirror(pictures[3])
        for image, picture in zip(x, expected):
            np.testing.assert_allclose(image.permute(1, 2, 0), np.asarray(picture) / 127.5 - 1, atol=1e-6)
        assert y.tolist() == [1, 0, 1] and prepared.meta['flips'] == 1 + flip
        assert (np.load(f'{out}/images.npy')[0] == np.asarray(pictures[0])).all()       # the file is untouched


def test_a_batch_of_latents_draws_from_the_posterior_of_its_flip(latents):
    prepared, array = Dataset(str(latents[0])), np.load(latents[0] / 'latents.npy').astype(np.float32)
    read = []

    class Spy:
        def __getitem__(self, key):
            read.append(np.load(latents[0] / 'latents.npy', mmap_mode='r')[key])
            return read[-1]

    prepared.array = Spy()
    index, flip, eps = np.array([5, 0, 5]), np.array([True, False, False]), torch.randn(3, 4, 8, 8)
    x, y = prepared.batch(index, flip=flip, eps=eps)
    means, _ = prepared.batch(index)
    assert sum(rows.nbytes for rows in read) == 2 * 3 * 8 * 8 * 8 * 2      # no row more than was asked for, in float16
    for j in range(3):
        mean, std = array[index[j], int(flip[j]), :4], array[index[j], int(flip[j]), 4:]
        np.testing.assert_allclose(x[j], 0.7 * (mean + std * eps[j].numpy()), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(means[j], 0.7 * array[index[j], 0, :4], rtol=1e-5, atol=1e-6)
    assert y.tolist() == [0, 0, 0]


def test_decoding_undoes_the_scaling_a_few_images_at_a_time(latents, vae_folder, monkeypatch):
    meta = Dataset(str(latents[0])).meta
    vae, x = load_vae(meta, 'cpu'), torch.randn(5, 4, 8, 8)
    expected, sizes = vae.decode(x / 0.7).sample, []
    monkeypatch.setattr(data, 'PIXELS_PER_CALL', 2 * 16 * 16)
    vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    torch.testing.assert_close(decode(vae, x, meta), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [2, 2, 1] and not vae.training
    assert load_vae(dict(vae=''), 'cpu') is None and decode(None, x, meta) is x and encode(None, x, 2) is x


def test_another_vae_than_that_of_the_latents_is_refused(latents):
    meta = Dataset(str(latents[0])).meta | dict(scaling_factor=0.18215)
    with pytest.raises(SystemExit, match='is not the VAE that made .*: its scaling_factor is 0.7, not 0.18215'):
        load_vae(meta, 'cpu')


def test_every_epoch_of_the_training_order_is_a_permutation_whatever_the_batch():
    order = training_order(0, 70, 7, seed=3)
    epochs = order.reshape(10, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    for size in (1, 5, 9, 14):
        batches = [training_order(i, min(size, 70 - i), 7, seed=3) for i in range(0, 70, size)]
        assert np.concatenate(batches).tolist() == order.tolist()
    assert training_order(0, 70, 7, seed=4).tolist() != order.tolist()


def test_the_order_of_imagenet_is_drawn_once_an_epoch(monkeypatch):
    """1.28 million images in batches of 256, over the end of the first epoch: two permutations, each drawn once."""
    n, drawn, make = 1_281_167, [], np.random.default_rng

    def counting(key):
        drawn.append(key)
        assert len(drawn) <= 2
        return make(key)

    data.permutation.cache_clear()
    monkeypatch.setattr(np.random, 'default_rng', counting)
    batches = [training_order(i, 256, n, seed=7) for i in range(0, n + 100 * 256, 256)]
    assert drawn == [(7, 0), (7, 1)]
    order = np.concatenate(batches)
    assert (np.sort(order[:n]) == np.arange(n)).all() and len(set(order[n:])) == len(order) - n
    data.permutation.cache_clear()      # 10 MB each


@pytest.mark.parametrize('heldout', (0, 4))
def test_evaluation_takes_held_out_images_or_without_any_those_of_training(heldout, tmp_path, run, monkeypatch):
    make_pictures(tmp_path / 'source', 16, size=32)
    run('data.py', f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=32', f'--heldout={heldout}',
        '--device=cpu')
    seen, batch = {True: [], False: []}, Dataset.batch

    def spy(self, index, *args):
        evaluating = any(frame.name == 'evaluate' for frame in traceback.extract_stack())
        seen[evaluating].extend(index.tolist())
        return batch(self, index, *args)

    monkeypatch.setattr(Dataset, 'batch', spy)
    args = '--batch_size=8', f'--dataset={tmp_path / "x"}', f'--out_dir={tmp_path / "out"}'
    assert run('train.py', *TINY, *args)[1] == ''
    expected = list(range(12, 16)) if heldout else list(range(16))
    assert sorted(seen[True]) == sorted(2 * expected)       # at iterations 3 and 6
    assert set(seen[False]) == set(range(16 - heldout))
    last = (tmp_path / 'out' / 'log.csv').read_text().splitlines()[-1].split(',')
    assert all(math.isfinite(float(error)) for error in last[-2:])


def test_training_on_latents_shares_flips_and_posterior_noise_over_micro_batches(latents, tmp_path, run, monkeypatch):
    seen, batch, losses = [], Dataset.batch, []

    def spy(self, index, device, flip, eps):
        seen.append((index, flip, eps))
        return batch(self, index, device, flip, eps)

    monkeypatch.setattr(Dataset, 'batch', spy)
    for parts in (1, 2):
        run('train.py', *TINY, '--patch=2', '--max_iters=3', '--learning_rate=0.0', '--min_lr=0.0',
            f'--dataset={latents[0]}', f'--out_dir={tmp_path / str(parts)}', f'--gradient_accumulation_steps={parts}')
        with open(tmp_path / str(parts) / 'log.csv') as f:
            losses.append([float(row['loss']) for row in csv.DictReader(f)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    (_, flip0, eps0), (_, flip1, eps1) = seen[:2]
    assert len(flip0) == 12 and 0 < sum(flip0) < 12 and (flip0 != flip1).any()
    assert eps0.shape == (12, 4, 8, 8) and abs(eps0.std() - 1) < 0.1 and (eps0 != eps1).any()
    assert Image.open(tmp_path / '1' / 'samples.png').size == (160, 32)     # 20 samples, decoded to 16 x 16
    meta = torch.load(tmp_path / '1' / 'ckpt.pt', weights_only=True)['data']
    assert meta == json.loads((latents[0] / 'meta.json').read_text())
