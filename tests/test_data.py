"""
data.py against independent oracles: images made here in known colours, ADM's code restated, the VAE called directly,
and runs compared byte by byte.
"""
import atexit
import csv
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import socket
import sys
import time
import zipfile
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from conftest import ROOT, TINY
from data import Dataset, ImageFiles, center_crop, decode, encode, load_vae, make_digits, training_order

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
        runpy.run_path(os.path.join(ROOT, 'data.py'), run_name='__main__')
    return folder / 'out', args, pictures


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
    ('rgb.JPEG', saved(blocks(RED, BLUE), 'RGB', quality=100, subsampling=0), blocks(RED, BLUE), 3),
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
    image = ImageFiles(str(tmp_path)).read(0)
    assert image.mode == 'RGB'
    assert np.abs(np.asarray(image).astype(int) - np.array(expected)).max() <= tolerance


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
    files = ImageFiles(str(tmp_path))
    for i, upright in enumerate(UPRIGHT):
        assert np.abs(np.asarray(files.read(i)).astype(int) - upright(stored)).max() <= 3, f'orientation {i + 1}'


def test_grey_beyond_8_bits_is_refused_not_clipped(tmp_path):
    files = {'16.png': np.uint16, '16.tif': np.uint16, '32.tiff': np.int32, 'float.tif': np.float32}
    for name, dtype in files.items():
        Image.fromarray(np.array([[0, 100, 255, 256, 65_535]]).astype(dtype)).save(tmp_path / name)
    for i, name in enumerate(files):
        with pytest.raises(ValueError, match=f'^{name}: grey of 16 bits'):
            ImageFiles(str(tmp_path)).read(i)


def test_what_cannot_be_read_is_named(tmp_path):
    touch(tmp_path, 'a/0.png', 'a/1.png', 'a/2.jpg', 'b/3.png', 'b/4.png')
    whole = (tmp_path / 'a' / '0.png').read_bytes()
    (tmp_path / 'a' / '1.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'a' / '2.jpg').write_text('<html>not found</html>')
    (tmp_path / 'b' / '3.png').write_bytes(b'')
    shutil.make_archive(str(tmp_path / 'all'), 'zip', tmp_path)
    folder, archive = ImageFiles(str(tmp_path)), ImageFiles(str(tmp_path / 'all.zip'))
    (tmp_path / 'b' / '4.png').unlink()
    for files, damaged in ((folder, range(1, 5)), (archive, range(1, 4))):
        assert files.read(0).size == (4, 4)
        for i in damaged:
            with pytest.raises(ValueError, match=f'^{files.names[i]}: [^<]+$'):
                files.read(i)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(folder / name, format='PNG')


def test_first_level_folders_are_the_classes(tmp_path):
    touch(tmp_path, 'dog/2.PNG', 'dog/deep/er/1.JPg', 'cat/x.webp')
    touch(tmp_path, 'cat/.hidden.png', '__MACOSX/cat/x.png', '.git/y.png')
    (tmp_path / 'cat' / 'notes.txt').write_text('no image')
    files = ImageFiles(str(tmp_path))
    assert files.names == ['cat/x.webp', 'dog/2.PNG', 'dog/deep/er/1.JPg']
    assert files.classes == ['cat', 'dog']
    assert files.labels.tolist() == [0, 1, 1] and files.labels.dtype == np.int64


@pytest.mark.parametrize('names, classes, labels', [
    (['1.png', '2.png'], [], [0, 0]),
    (['1.png', 'cat/2.png', 'dog/3.png'], [], [0, 0, 0]),
    (['all/1.png', 'all/2.png'], [], [0, 0]),
    (['all/cat/1.png', 'all/dog/2.png'], ['cat', 'dog'], [0, 1]),
    (['car/1.png', 'cat/2.png'], ['car', 'cat'], [0, 1]),
])
def test_lone_folders_and_images_beside_folders_make_no_classes(tmp_path, names, classes, labels):
    touch(tmp_path, *names)
    files = ImageFiles(str(tmp_path))
    assert (files.classes, files.labels.tolist(), files.labels.dtype) == (classes, labels, np.int64)


def test_a_zip_read_by_threads_equals_the_folder(tmp_path):
    make_pictures(tmp_path / 'source', 40)
    touch(tmp_path / 'source', '__MACOSX/a/._00.png')
    with zipfile.ZipFile(tmp_path / 'source.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((tmp_path / 'source').rglob('*'), reverse=True):
            archive.write(file, file.relative_to(tmp_path / 'source'))
    folder, archive = ImageFiles(str(tmp_path / 'source')), ImageFiles(str(tmp_path / 'source.zip'))
    assert folder.names == archive.names and folder.classes == archive.classes == ['a', 'b']
    assert (folder.labels == archive.labels).all()
    with ThreadPoolExecutor(8) as pool:
        for i, image in enumerate(pool.map(archive.read, list(range(40)) * 5)):
            assert image.tobytes() == folder.read(i % 40).tobytes()


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


# --- Preparing --------------------------------------------------------------------------------------------------------

def test_pixels_and_labels_of_a_folder_and_of_a_zip(tmp_path, run):
    pictures = make_pictures(tmp_path / 'source', 10)
    shutil.make_archive(str(tmp_path / 'source'), 'zip', tmp_path / 'source')
    for source, out in (('source', 'x'), ('source.zip', 'y')):
        _, message = run('data.py', f'--source={tmp_path / source}', f'--out={tmp_path / out}/', '--size=16',
                         '--batch_size=4', '--device=cpu')
        assert message == ''
    x, y = contents(tmp_path / 'x'), contents(tmp_path / 'y')
    assert set(x) == {'images.npy', 'labels.npy', 'meta.json'} and x['images.npy'] == y['images.npy']
    assert x['labels.npy'] == y['labels.npy']
    prepared = Dataset(str(tmp_path / 'x'))
    assert (prepared.array == np.stack([np.asarray(picture) for picture in pictures])).all()
    assert prepared.labels.tolist() == [0] * 5 + [1] * 5
    assert prepared.meta == dict(source=str(tmp_path / 'source'), size=16, image_size=16, channels=3, count=10,
                                 heldout=0, classes=['a', 'b'], flips=2, vae='')
    assert prepared.n_train == 10 and prepared.heldout.tolist() == prepared.rows.tolist() == list(range(10))
    assert prepared.array.dtype == np.uint8 and prepared.labels.dtype == np.int64


def test_held_out_images_are_of_all_classes_and_keep_their_labels(tmp_path, run):
    pictures = make_pictures(tmp_path / 'source', 40)
    run('data.py', f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=16', '--heldout=12',
        '--device=cpu')
    prepared = Dataset(str(tmp_path / 'x'))
    assert prepared.n_train == 28 and prepared.heldout.tolist() == list(range(28, 40))
    by_name = [np.asarray(picture).tobytes() for picture in pictures]
    order = [by_name.index(image.tobytes()) for image in prepared.array]
    assert sorted(order) == list(range(40)) and prepared.labels.tolist() == [i // 20 for i in order]
    assert 2 <= prepared.labels[28:].sum() <= 10        # false alarm: 2 in 10,000, and the permutation is fixed


def test_a_complete_dataset_is_left_alone(latents, tmp_path, run, monkeypatch):
    pixels = make_pictures(tmp_path / 'source', 3), [f'--source={tmp_path / "source"}', '--size=16', '--device=cpu']
    run('data.py', *pixels[1], f'--out={tmp_path / "x"}')
    monkeypatch.setattr(Image, 'open', lambda *args: (_ for _ in ()).throw(AssertionError('an image is read again')))
    for out, args, n in ((tmp_path / 'x', pixels[1], 3), (latents[0], latents[1], 12)):
        before = contents(out)
        printed, message = run('data.py', *args, f'--out={out}')
        assert message == '' and f'{n} images of 2 classes, 0 left out' in printed and contents(out) == before
        for other, words in (('--size=8', 'size is 16 there and 8 here'), ('--heldout=1', 'heldout is 0 there and 1'),
                             ('--flip=False', 'flips is 2 there and 1 here'), ('--grey=True', 'channels is 3 there')):
            if n == 3 or 'grey' not in other:
                message = run('data.py', *args, f'--out={out}', other)[1]
                assert 'begun with other settings' in message and words in message and contents(out) == before


def test_one_channel_is_pillows_grey_and_greys_stay_as_they_are(tmp_path, run):
    pictures = make_pictures(tmp_path / 'source', 10)
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / 'source' / 'b' / '10.png')
    Image.fromarray(values).convert('RGB').save(tmp_path / 'source' / 'b' / '11.png')
    args = f'--source={tmp_path / "source"}', '--grey=True', '--device=cpu'
    run('data.py', *args, f'--out={tmp_path / "x"}', '--size=16')
    run('data.py', *args, f'--out={tmp_path / "y"}', '--size=16', '--heldout=4')
    run('data.py', *args, f'--out={tmp_path / "z"}', '--size=8')
    x, y, z = (Dataset(str(tmp_path / name)) for name in 'xyz')
    assert x.array.shape == (12, 16, 16, 1) and z.array.shape == (12, 8, 8, 1) and x.meta['channels'] == 1
    assert (x.array[10:, ..., 0] == values).all()
    for i, picture in enumerate(pictures):
        assert (x.array[i, ..., 0] == np.asarray(picture.convert('L'))).all()
        red, green, blue = np.moveaxis(center_crop(picture, 8).astype(float), -1, 0)
        assert np.abs(z.array[i, ..., 0] - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 1.5
    assert x.labels.tolist() == [0] * 5 + [1] * 7 and y.n_train == 8 and y.heldout.tolist() == [8, 9, 10, 11]
    by_name = [image.tobytes() for image in x.array[:11]]
    order = [by_name.index(image.tobytes()) for image in y.array]
    assert y.labels.tolist() == x.labels[order].tolist() and sorted(order) == [*range(11), 10]
    batch, labels = x.batch(np.array([3, 9]), flip=np.array([True, False]))
    assert batch.shape == (2, 1, 16, 16) and labels.tolist() == [0, 1]
    mirrored = np.asarray(ImageOps.mirror(pictures[3]).convert('L'))
    np.testing.assert_allclose(batch[0, 0], mirrored / 127.5 - 1, atol=1e-6)


@pytest.fixture
def damaged(tmp_path):
    """202 pictures, the grey of each its number, two of them damaged: allowed, just so."""
    for i in range(202):
        (tmp_path / 'source' / 'ab'[i > 100]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (i, i, i)).save(tmp_path / 'source' / 'ab'[i > 100] / f'{i:03}.png')
    whole = (tmp_path / 'source' / 'a' / '017.png').read_bytes()
    (tmp_path / 'source' / 'a' / '017.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'source' / 'b' / '150.png').write_text('<html>not found</html>')
    return [f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=8', '--device=cpu'], whole


def test_damaged_images_are_named_and_left_out_until_mended(tmp_path, run, damaged):
    args, whole = damaged
    for attempt in range(2):
        out, message = run('data.py', *args)
        assert message == '' and 'left out: a/017.png: ' in out and 'left out: b/150.png: ' in out
        assert '200 images of 2 classes, 2 left out' in out and 'not complete' not in out
    prepared = Dataset(str(tmp_path / 'x'))
    kept = [i for i in range(202) if i not in (17, 150)]
    assert prepared.labels.tolist() == [-1 if i in (17, 150) else int(i > 100) for i in range(202)]
    assert prepared.meta['count'] == 202 and prepared.rows.tolist() == kept and prepared.n_train == 200
    assert prepared.array.shape == (202, 8, 8, 3) and prepared.array[kept, 0, 0, 0].tolist() == kept
    x, y = prepared.batch(prepared.heldout)
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().tolist() == kept and y.tolist() == [int(i > 100) for i in kept]
    (tmp_path / 'source' / 'a' / '017.png').write_bytes(whole)
    out, message = run('data.py', *args)
    prepared = Dataset(str(tmp_path / 'x'))
    assert message == '' and '1 left out' in out and prepared.rows.tolist() == [i for i in range(202) if i != 150]
    assert (prepared.array[17] == 17).all() and prepared.labels[17] == 0


def test_more_than_one_percent_damaged_stops_until_mended(tmp_path, run, damaged, monkeypatch):
    args, whole = damaged
    mended = tmp_path / 'source' / 'b' / '201.png'
    content = mended.read_bytes()
    mended.write_bytes(whole[:len(whole) // 2])
    out, message = run('data.py', *args)
    assert message.startswith('data.py: 3 of 202 images cannot be read, more than 1%') and 'left out: b/201.png' in out
    mended.write_bytes(content)
    # With one thread the mended image comes last: what it was no longer counts meanwhile
    monkeypatch.setattr(futures, 'ThreadPoolExecutor', partial(ThreadPoolExecutor, 1))
    assert run('data.py', *args)[1] == ''
    prepared = Dataset(str(tmp_path / 'x'))
    assert np.flatnonzero(prepared.labels < 0).tolist() == [17, 150] and (prepared.array[201] == 201).all()


def test_a_full_disk_shows_before_any_image_is_read(tmp_path, run, monkeypatch):
    """A limit on the size of files, as a full disk: meta.json fits below it, the images do not."""
    pictures = make_pictures(tmp_path / 'source', 12)
    args = f'--source={tmp_path / "source"}', f'--out={tmp_path / "x"}', '--size=16', '--device=cpu'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as full:
            full.setattr(Image, 'open', lambda *args: (_ for _ in ()).throw(AssertionError('an image is read')))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            out, message = run('data.py', *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f'data.py: cannot write 12 images to {tmp_path / "x"} (OSError: ')
    assert out == '' and '\n' not in message and not (tmp_path / 'x' / 'labels.npy').exists()
    with pytest.raises(SystemExit, match='x is not a dataset of data.py, or is damaged'):
        Dataset(str(tmp_path / 'x'))
    assert run('data.py', *args)[1] == ''       # there is room again
    assert (Dataset(str(tmp_path / 'x')).array == np.stack([np.asarray(picture) for picture in pictures])).all()


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


def test_the_meta_of_latents_records_vae_scaling_and_spread(latents, vae_folder):
    meta = Dataset(str(latents[0])).meta
    assert (meta['size'], meta['image_size'], meta['channels'], meta['flips'], meta['vae']) == (8, 16, 4, 2, vae_folder)
    assert meta['scaling_factor'] == 0.7
    means = np.load(latents[0] / 'latents.npy')[:, 0, :4].astype(np.float64)
    assert meta['latent_std'] == pytest.approx(0.7 * means.std(ddof=1), rel=1e-5)


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


def wait_until_done(out, count, process):
    """What labels.npy says once so many images are no longer to do."""
    labels, started = np.full(12, -2), time.time()
    while (labels > -2).sum() < count and time.time() < started + 60 and process.is_alive():
        time.sleep(0.02)
        if (out / 'labels.npy').exists():
            labels = np.load(out / 'labels.npy')
    return labels.tolist()


def test_a_killed_run_continues_to_the_same_bytes(latents, tmp_path, run, capsys):
    folder, args, pictures = latents
    reference, array = contents(folder), np.load(folder / 'latents.npy')
    source, out = folder.parent / 'source', tmp_path / 'x'
    pipe = source / 'b' / '07.png'      # the tenth by name, in the last chunk: reading it waits for ever
    first = source / 'a' / '00.png'
    pipe.unlink()
    os.mkfifo(pipe)
    args = [*args, f'--out={out}']
    killed = started(args, tmp_path / 'printed')
    try:
        labels = wait_until_done(out, 8, killed)
        assert killed.is_alive()
        killed.kill()
        killed.join()
        assert labels == [0] * 6 + [1] * 2 + [-2] * 4
        assert (np.load(out / 'latents.npy') == array * (np.arange(12) < 8)[:, None, None, None, None]).all()
        prepared = Dataset(str(out))
        assert 'x is not complete: run the command that began it once more' in capsys.readouterr().out
        assert prepared.n_train == 8 and prepared.meta['count'] == 12 and 'latent_std' not in prepared.meta
        x, y = prepared.batch(prepared.heldout)
        np.testing.assert_allclose(x, 0.7 * array[:8, 0, :4].astype(np.float32), rtol=1e-6)
        assert y.tolist() == [0] * 6 + [1] * 2
        Image.new('RGB', (16, 16)).save(first)      # done before: it must not be read again
        pipe.unlink()
        pictures[9].save(pipe)
        before = contents(out)
        for other, words in (('--size=32', 'size is 8 there and 16 here'), ('--vae=', 'vae is')):
            message = run('data.py', *args, other)[1]
            assert 'begun with other settings' in message and words in message and contents(out) == before
        printed, message = run('data.py', *args)
        assert message == '' and '12 images of 2 classes, 0 left out' in printed and contents(out) == reference
        Dataset(str(out))
        assert capsys.readouterr().out == ''
    finally:
        killed.kill()
        pictures[0].save(first)
        pipe.unlink(missing_ok=True)
        pictures[9].save(pipe)


def test_images_are_written_before_they_count_as_done(latents, tmp_path, run, monkeypatch):
    folder, args, _ = latents
    flush = np.memmap.flush

    def dies(array):
        flush(array)
        raise KeyboardInterrupt
    with monkeypatch.context() as killed:
        killed.setattr(np.memmap, 'flush', dies)
        with pytest.raises(KeyboardInterrupt):
            run('data.py', *args, f'--out={tmp_path / "x"}')
    assert (np.load(tmp_path / 'x' / 'labels.npy') == -2).all()
    written = np.load(tmp_path / 'x' / 'latents.npy').any(axis=(1, 2, 3, 4))
    assert written.reshape(3, 4).all(1).any()       # of some chunk all images are there
    assert run('data.py', *args, f'--out={tmp_path / "x"}')[1] == '' and contents(tmp_path / 'x') == contents(folder)


def test_two_processes_make_the_bytes_of_one(latents, tmp_path):
    folder, args, _ = latents
    pipe = folder.parent / 'source' / 'a' / '10.png'        # the sixth by name, in the second process's only chunk
    content = pipe.read_bytes()
    pipe.unlink()
    os.mkfifo(pipe)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    out, printed = tmp_path / 'x', [tmp_path / '0', tmp_path / '1']
    processes = [started([*args, f'--out={out}'], printed[rank], WORLD_SIZE='2', RANK=str(rank), LOCAL_RANK=str(rank),
                         MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)) for rank in range(2)]
    try:
        assert wait_until_done(out, 8, processes[0]) == [0] * 4 + [-2] * 4 + [1] * 4
        time.sleep(0.5)
        assert processes[0].is_alive()      # it waits for the second
        pipe.write_bytes(content)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        assert ['12 images of 2 classes' in file.read_text() for file in printed] == [True, False]
        assert '| 2/2 [' in printed[0].read_text()      # chunks of its own
        assert contents(out) == contents(folder)
    finally:
        for process in processes:
            process.kill()
        pipe.unlink()
        pipe.write_bytes(content)


@pytest.mark.parametrize('args, sentence', [
    ([], 'say what to make of what'),
    (['--source=nowhere', '--out=x'], "'nowhere' is neither"),
    (['--source=empty', '--out=x'], "no images in 'empty'"),
    (['--source=one', '--out=one'], 'one cannot be written or holds something else'),
    (['--source=one', '--out=x', '--heldout=1'], 'less than the 1 images'),
    (['--source=one', '--out=x', '--heldout=-1'], '0 or more'),
    (['--source=one', '--out=x', '--grey=True', '--vae=VAE'], 'a VAE takes colour'),
    (['--source=one', '--out=x', '--size=15', '--vae=VAE'], 'multiple of 2'),
    (['--source=one', '--out=x', '--vae=one'], 'vae must be a folder or the Hugging Face id'),
])
def test_mistakes_end_in_a_sentence(run, workplace, vae_folder, args, sentence):
    (workplace / 'empty').mkdir(exist_ok=True)
    touch(workplace, 'one/1.png')
    _, message = run('data.py', *[arg.replace('VAE', vae_folder) for arg in args], '--device=cpu')
    assert sentence in message and message.startswith('data.py: ') and '\n' not in message
    assert not (workplace / 'x').exists() and os.listdir(workplace / 'one') == ['1.png']


# --- What training and sampling see -----------------------------------------------------------------------------------

def test_digits_are_the_same_bytes_every_time_and_labels_cycle(tmp_path):
    make_digits(str(tmp_path / 'x'), train=30, heldout=5)
    make_digits(str(tmp_path / 'y'), train=30, heldout=5)
    assert contents(tmp_path / 'x') == contents(tmp_path / 'y')
    digits = Dataset(str(tmp_path / 'x'))
    assert digits.labels.tolist() == [i % 10 for i in range(35)] and digits.heldout.tolist() == [30, 31, 32, 33, 34]
    assert len({image.tobytes() for image in digits.array}) == 35
    x, y = digits.batch(np.array([4, 2]), flip=np.array([True, True]))
    assert x.shape == (2, 1, 32, 32) and y.tolist() == [4, 2]
    np.testing.assert_allclose(x[0, 0], digits.array[4, :, :, 0] / 127.5 - 1, atol=1e-6)      # never mirrored


@pytest.mark.parametrize('vae', ('', 'a VAE'))
def test_only_readable_images_are_counted_and_served(vae, tmp_path, capsys):
    labels, rng = [-1, 1, 0, -2, -1, 1, 2, 0], np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 4, 4, 3), np.uint8)
    latents = rng.normal(size=(8, 2, 2 * 3, 4, 4)).astype(np.float16)
    meta = dict(size=4, count=8, heldout=2, classes=['a', 'b', 'c'], flips=2, vae=vae, scaling_factor=0.5)
    write(tmp_path / 'x', meta, np.array(labels), **(dict(latents=latents) if vae else dict(images=images)))
    prepared = Dataset(str(tmp_path / 'x'))
    assert 'x is not complete' in capsys.readouterr().out
    assert prepared.rows.tolist() == [1, 2, 5, 6, 7] and prepared.n_train == 3 and prepared.heldout.tolist() == [3, 4]
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
    (dict(count=5), 'x is not what its meta.json says'),
    (dict(classes=['a', 'b']), 'x is not what its meta.json says'),
    (dict(heldout=3), 'x has no images to train on yet'),
    (dict(vae='a VAE'), 'x is not a dataset of data.py, or is damaged'),
])
def test_a_folder_that_is_no_whole_dataset_ends_in_a_sentence(change, sentence, tmp_path):
    meta = dict(size=4, count=4, heldout=2, classes=['a', 'b', 'c'], flips=1, vae='') | change
    write(tmp_path / 'x', meta, np.array([2, -1, 0, 1]), images=np.zeros((4, 4, 4, 3), np.uint8))
    if not sentence:
        assert Dataset(str(tmp_path / 'x')).n_train == 1
        return
    with pytest.raises(SystemExit, match=sentence):
        Dataset(str(tmp_path / 'x'))
    with pytest.raises(SystemExit, match='there is no data/.*nowhere: python data.py --source=IMAGES'):
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
    with pytest.raises(SystemExit, match='has scaling_factor 0.7, but .* 0.18215'):
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
