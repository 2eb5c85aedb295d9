"""Makes datasets of pictures, and reads them for training.

    python data.py --source=celeba_hq/ --out=data/celebahq256 --size=256 --vae=zelaki/eq-vae
    torchrun --nproc_per_node=8 data.py ...     # shares the work

A dataset is a folder of three files. Any program may write one, meta.json last:

    images.npy    (N, size, size, channels) uint8: pixels; or, if meta.json names a VAE,
    latents.npy   (N, flips, 2 * channels, size, size) float16: mean and standard deviation of the
                  VAE's posterior, unscaled, of each image and, if flips is 2, of its mirror image
    labels.npy    (N,) integers: the class of each image, -1 if it cannot be read
    meta.json     {"size": 32, "channels": 4, "image_size": 256, "classes": ["cat", "dog"],
                   "heldout": 1000, "flips": 2, "vae": "zelaki/eq-vae", "scaling_factor": 0.18215}

"classes" may be []. Without a VAE "vae" is "", and image_size and scaling_factor may be absent.
data.py adds vae_digest, by which other VAEs are refused. The last `heldout` images are not trained
on. If flips is 2, training mirrors half of the images.
"""
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from os.path import (abspath, commonpath, dirname, exists, getsize, islink, join, realpath,
                     splitext)
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from configurator import barrier, check, check_alike, configure, exit_on_error, launch

PIXELS_PER_CALL = 32 * 256 * 256    # of the VAE's decoder, to bound its memory


def draw_digit(label, rng):
    """A (32, 32) uint8 digit, white on black; size, place, stroke and a small turn are random."""
    canvas = Image.new('L', (64, 64))
    font = ImageFont.load_default(rng.uniform(50, 64))
    place = tuple(rng.uniform(28, 36, size=2))
    stroke = int(rng.integers(1, 4))
    ImageDraw.Draw(canvas).text(place, str(label), 255, font, anchor='mm', stroke_width=stroke)
    turned = canvas.rotate(rng.uniform(-10, 10), Image.BILINEAR)
    return np.asarray(turned.reduce(2))


def make_digits(folder, train=20_000, heldout=2_000):
    """Makes the dataset `digits`, the same bytes every time. The folder appears complete."""
    N = train + heldout
    labels = np.arange(N) % 10
    images = [draw_digit(labels[i], np.random.default_rng(i)) for i in range(N)]
    meta = dict(source='digits', size=32, channels=1, image_size=32, count=N,
                classes=list('0123456789'), heldout=heldout, flips=1, vae='')
    parts = f'{folder}.{os.getpid()}'
    with exit_on_error(f'cannot write {folder}'):
        os.makedirs(parts)
        np.save(f'{parts}/images.npy', np.stack(images)[..., None])
        np.save(f'{parts}/labels.npy', labels)
        Path(f'{parts}/meta.json').write_text(json.dumps(meta))
    try:
        os.rename(parts, folder)
    except OSError:     # another process was first
        shutil.rmtree(parts)


def list_pictures(source):
    """(files, labels, classes) of the pictures below a folder, in the order of their names.

    The classes are the folders at the first level at which the paths differ; if pictures lie there,
    too, there are none. Links are followed, but no folder counts twice: the real one wins.
    """
    def refuse(error):
        check(False, f'{error.filename!r} is not a folder that can be read ({error.strerror})')

    formats = Image.registered_extensions()
    files, others, seen, tops = [], 0, set(), [abspath(source)]
    for top in tops:        # grows by links, so that real folders come first
        for folder, folders, names in os.walk(top, onerror=refuse):
            if realpath(folder) in seen:
                folders.clear()
                continue
            seen.add(realpath(folder))
            folders[:] = sorted(name for name in folders if name[0] != '.')
            tops += [join(folder, name) for name in folders if islink(join(folder, name))]
            for name in names:
                file = join(folder, name)
                ending = splitext(name)[1].lower()
                if formats.get(ending) in Image.OPEN and name[0] != '.' and exists(file):
                    files.append(file)
                else:
                    others += 1
    check(files, f'there are no pictures in {source!r}, but {others} other files')
    files.sort()
    root = commonpath(map(dirname, files))
    folders = [dirname(file[len(root) + 1:]).split(os.sep)[0] for file in files]
    classes, labels = np.unique(folders, return_inverse=True)
    classes = classes.tolist()
    if '' in classes:
        classes, labels = [], np.zeros(len(files), int)
        print('no classes, because pictures lie in one folder or beside folders')
    print(f'{len(files)} pictures, {others} other files passed over, {len(classes)} classes in '
          f'{source!r}: {classes[:9]}')
    return files, labels, classes


def center_crop(image, size):
    """ADM's crop, (size, size, 3) uint8: halved while twice too large, then resized, then cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.resize((width, height), Image.BICUBIC))
    return pixels[top:top + size, left:left + size]


def read_picture(file, size=0):
    """A picture, (H, W, 3) uint8: upright, white where transparent, cropped if size > 0.

    OSError is raised for what cannot be used.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(file))
    except Exception as error:      # a damaged file makes Pillow raise nearly anything
        raise OSError(f'{file!r}: {error!r}') from error
    if image.mode[0] in 'IF':       # I, I;16, F
        raise OSError(f'{file!r}: grey of 16 bits or more, which Pillow would clip')
    if max(image.size) > 50 * min(image.size):
        raise OSError(f'{file!r}: so long that its crop would fill the memory')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    image = image.convert('RGB')
    return center_crop(image, size) if size else np.asarray(image)


def digest(vae):
    """Twelve characters that tell a VAE's weights from others, wherever its files lie."""
    weights = torch.nn.utils.parameters_to_vector(vae.parameters())
    return hashlib.sha256(weights.detach().cpu().numpy()).hexdigest()[:12]


def load_vae(meta, device):
    """The VAE that a dataset's meta names, or None. Its weights must be those of vae_digest."""
    name = meta['vae']
    if not name:
        return None
    from diffusers import AutoencoderKL
    with exit_on_error(f'{name!r} is no folder or Hugging Face id of an AutoencoderKL'):
        # (without low_cpu_mem_usage it complains that accelerate is not installed)
        vae, info = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False,
                                                  output_loading_info=True)
    check(not info['missing_keys'], f'{name!r} lacks weights of an AutoencoderKL: '
          f'{sorted(info["missing_keys"])[:2]} ...')
    for key, value in (('vae_digest', digest(vae)), ('scaling_factor', vae.config.scaling_factor)):
        check(meta.get(key, value) == value, f'{name!r} is not the VAE that made the latents: '
              f'its {key} is {value}, not {meta.get(key)}')
    return vae.requires_grad_(False).eval().to(device)


def new_array(file, dtype, shape):
    """Makes an .npy file of zeros, at full size: a full disk shows now, not midway."""
    open_memmap(file, 'w+', dtype, shape)
    if hasattr(os, 'posix_fallocate'):
        with open(file, 'r+') as f:
            os.posix_fallocate(f.fileno(), 0, getsize(file))


def encode(vae, images, flips):
    """(B, H, W, 3) uint8 images -> their rows of latents.npy, (B, flips, 2C, h, w) float16.

    If vae is None, the images are the rows.
    """
    if vae is None:
        return images
    x = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    views = []
    for _ in range(flips):
        posterior = vae.encode(x).latent_dist
        views.append(torch.cat([posterior.mean, posterior.std], dim=1))
        x = x.flip(-1)
    return torch.stack(views, dim=1).half().cpu().numpy()


def decode(vae, latents, meta):
    """What the model draws, (B, C, h, w) -> images (B, 3, H, W), about -1 to 1.

    If vae is None, the model draws images.
    """
    if vae is None:
        return latents
    # A few at a time. Not vae.enable_tiling(): its norms over tiles change the picture.
    count = max(1, PIXELS_PER_CALL // meta['image_size'] ** 2)
    parts = (latents / meta['scaling_factor']).split(count)
    return torch.cat([vae.decode(part).sample for part in parts])


def to_device(array, device):
    """A tensor. A GPU fetches it from pinned memory while the CPU goes on."""
    tensor = torch.from_numpy(array)
    if 'cuda' in str(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Dataset:
    """A dataset, by its folder or its name in data/: Dataset('digits').

    meta, labels and array are its files. rows[i] is where image i lies in them: pictures that could
    not be read are skipped. The first n_train images are to train on. eval_index are the numbers of
    those to evaluate on, held out or else of training: eval_name says which.
    """

    def __init__(self, name):
        folder = name if exists(f'{name}/meta.json') else f'data/{name}'
        if folder == 'data/digits' and not exists(folder):
            print('drawing the digits dataset ...')
            make_digits(folder)
        with exit_on_error(f'{folder} is not a dataset, or not a complete one: data.py makes them, '
                           'as the head of your config file says'):
            meta = json.loads(Path(f'{folder}/meta.json').read_text())
            size, channels, heldout = meta['size'], meta['channels'], meta['heldout']
            classes, flips, vae = meta['classes'], meta['flips'], meta['vae']
            file, row, kind = 'images.npy', (size, size, channels), np.uint8
            if vae:
                file, row, kind = 'latents.npy', (flips, 2 * channels, size, size), np.floating
            array = np.load(f'{folder}/{file}', mmap_mode='r')
            labels = np.load(f'{folder}/labels.npy')
            N, rows = len(array), np.flatnonzero(labels >= 0)
            for holds, rule in (
                    (np.issubdtype(array.dtype, kind), f'{file} holds {array.dtype}'),
                    (array.shape == (N, *row), f'{file} is {array.shape}, not N times {row}'),
                    (labels.dtype.kind in 'iu' and labels.shape == (N,),
                     f'labels.npy is {labels.shape} of {labels.dtype}, not {N} integers'),
                    (type(classes) is list, f'classes are no list, but {classes!r}'),
                    (labels.max(initial=0) < max(1, len(classes)), 'labels exceed the classes'),
                    (0 <= heldout < len(rows), f'heldout is {heldout} of {len(rows)}'),
                    (flips in (1, 2), f'flips is {flips}, not 1 or 2'),
                    (vae or channels in (1, 3), f'channels is {channels}, not 1 or 3'),
                    (not vae or {'image_size', 'scaling_factor'} <= set(meta),
                     'there is a VAE, but no image_size or no scaling_factor')):
                check(holds, f'{folder} is not what its meta.json says: {rule}')
        self.meta, self.array, self.labels, self.rows = meta, array, labels.astype(int), rows
        self.n_train = len(rows) - heldout
        self.eval_name, self.eval_index = 'heldout', np.arange(self.n_train, len(rows))
        if heldout == 0:        # in another order than the files', whose first are of one class
            self.eval_name, self.eval_index = 'training', permutation(self.n_train, 0, 0)

    def batch(self, index, device='cpu', flip=False, eps=None):
        """What the model sees of images, (B, C, H, W) float32, and their labels, (B,) int64.

        That is pixels in [-1, 1] or scaled latents. flip, (B,) bool, says which images to mirror if
        flips is 2. eps, (B, C, H, W) on the device, is noise that draws from the VAE's posterior;
        None takes the mean.
        """
        rows = self.rows[index]
        flip = np.broadcast_to(flip, len(rows)) & (self.meta['flips'] == 2)
        labels = to_device(self.labels[rows], device)
        if self.meta['vae']:
            latents = to_device(self.array[rows, flip.astype(int)], device)
            x, std = latents.float().chunk(2, dim=1)
            if eps is not None:
                x = x + std * eps
            return x * self.meta['scaling_factor'], labels
        images = self.array[rows]
        images[flip] = images[flip, :, ::-1]
        return to_device(images, device).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


@lru_cache(maxsize=2)       # one of 1.28 million takes 30 ms
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def training_order(first, count, n, seed):
    """The images at places first .. first + count - 1 of a run, which takes each once an epoch."""
    places = range(first, first + count)
    return np.array([permutation(n, seed, i // n)[i % n] for i in places])


if __name__ == '__main__':
    source = ''             # a folder of pictures; the folders in it are classes
    out = ''                # the folder to make
    size = 256              # pictures are cropped and resized to size x size, as in ADM
    vae = ''                # for latents: an AutoencoderKL's folder or Hugging Face id
    flip = True             # training mirrors half of the images
    heldout = 0             # this many images, drawn at random, are not trained on
    batch_size = 32         # images in a call of the VAE: fewer if they are large
    device = 'auto'
    configure(globals())
    check(min(size, batch_size) > 0, 'size and batch_size must be at least 1')
    check(source and out, 'give pictures and a dataset: --source=FOLDER --out=NAME')
    out = os.path.normpath(out)
    check(not os.path.lexists(out), f'{out} exists: delete it, or give another --out')
    device, rank, world = launch(device)
    files, labels, classes = list_pictures(source)
    N, flips = len(files), 1 + flip
    check_alike(N, 'they must see the same pictures')
    check(heldout < N, f'heldout must be less than the {N} pictures, not {heldout}')
    # By name, the held-out images would be of one class
    order = np.random.default_rng(0).permutation(N) if heldout else np.arange(N)
    encoder = load_vae(dict(vae=vae), device)
    if vae:
        factor = 2 ** (len(encoder.config.block_out_channels) - 1)
        check(size % factor == 0, f'for this VAE size must be a multiple of {factor}, not {size}')
    black = np.zeros((size, size, 3), np.uint8)
    row = encode(encoder, black[None], flips)[0]        # for its shape and dtype
    meta = dict(source=source, size=size, channels=3, image_size=size, count=N,
                classes=classes, heldout=heldout, flips=flips, vae=vae)
    parts = f'{out}.parts'      # becomes `out` when it is complete
    file = f'{parts}/images.npy'
    if vae:
        file = f'{parts}/latents.npy'
        meta |= dict(size=row.shape[2], channels=row.shape[1] // 2,
                     scaling_factor=encoder.config.scaling_factor, vae_digest=digest(encoder))
    if rank == 0:
        with exit_on_error(f'cannot write {N} images to {out}'):    # before the work
            if exists(parts):       # of a run that was interrupted
                ours = {'images.npy', 'latents.npy', 'labels.npy', 'meta.json'}
                check(set(os.listdir(parts)) <= ours, f'{parts} holds other files: move it')
                shutil.rmtree(parts)
            os.makedirs(parts)
            np.save(f'{parts}/labels.npy', labels[order])
            new_array(file, row.dtype, (N, *row.shape))
    barrier()
    array = np.load(file, mmap_mode='r+')
    labels = np.load(f'{parts}/labels.npy', mmap_mode='r+')

    def leave_out(i, reason):
        """The label of picture i becomes -1. More than 1% of such end the script."""
        tqdm.write(f'left out: {reason}', file=sys.stderr)
        labels[i] = -1
        wrong = (labels < 0).sum()
        check(wrong <= N // 100, f'{wrong} of {N} pictures cannot be read, more than 1%')

    def read(i):
        """Picture i, or a black one if it cannot be read."""
        try:
            return read_picture(files[order[i]], size)
        except OSError as error:
            leave_out(i, error)
            return black

    with ThreadPoolExecutor() as pool:
        for first in tqdm(range(rank * batch_size, N, world * batch_size), disable=rank > 0):
            rows = range(first, min(first + batch_size, N))
            images = np.stack(list(pool.map(read, rows)))
            array[rows] = encode(encoder, images, flips)
            for i in rows:
                if not np.isfinite(array[i]).all():
                    leave_out(i, f'{files[order[i]]!r}: its latents are not finite')
    array.flush()
    labels.flush()
    barrier()
    if rank == 0:
        Path(f'{parts}/meta.json').write_text(json.dumps(meta, indent=1))
        os.rename(parts, out)
        data = Dataset(out)
        print(f'{out}: {len(data.rows)} images, {N - len(data.rows)} left out')
