"""
Prepared datasets: folders that training maps into memory.

    images.npy   N x H x W x C uint8: pixels
    labels.npy   N int64: the class of each image
    meta.json    source, size, channels, class names and counts; the last `heldout` images are not trained on

The built-in one is `digits`: grey 32 x 32 digits in Pillow's own font, made on first use, in seconds, without a download.
"""
import json
import os
import shutil
import tempfile
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def launch(device, backend='auto'):
    """
    Joins torchrun's process group, if there is one, and settles on a device: 'auto' is cuda, mps or cpu, 'cuda' this process's
    own GPU. Float32 matrix products may use TF32. Returns (device, rank, world size).
    """
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                               (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if device == 'cuda':
        device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        torch.distributed.init_process_group(('nccl' if 'cuda' in device else 'gloo') if backend == 'auto' else backend)
    return device, rank, world


def draw_digit(label, rng):
    """One 32 x 32 uint8 digit, white on black; its size, stroke, rotation, shear and shift are drawn from rng."""
    size, stroke = rng.uniform(50, 64), rng.integers(1, 4)
    angle, shear = rng.uniform(-0.15, 0.15, size=2)
    shift = rng.uniform(-4, 4, size=2)
    canvas = Image.new('L', (64, 64))
    ImageDraw.Draw(canvas).text((32, 32), str(label), fill=255, font=ImageFont.load_default(size), anchor='mm',
                                stroke_width=stroke)
    matrix = np.array([[np.cos(angle), np.sin(angle) + shear], [-np.sin(angle), np.cos(angle)]])
    offset = 32 - matrix @ (32 + shift)     # turns about the centre; Pillow maps output pixels to input pixels
    affine = np.column_stack([matrix, offset]).flatten()
    return np.asarray(canvas.transform(canvas.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(2))


def make_digits(folder, train=20_000, heldout=2_000):
    """Writes the digits dataset, the same bytes every time; the folder appears only once it is complete."""
    count, names = train + heldout, [str(d) for d in range(10)]
    labels = np.arange(count) % 10
    images = np.stack([draw_digit(label, np.random.default_rng(i)) for i, label in enumerate(labels)])[..., None]
    meta = dict(source='digits', size=32, channels=1, count=count, heldout=heldout, classes=names, vae='')
    os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
    temporary = tempfile.mkdtemp(dir=os.path.dirname(os.path.abspath(folder)))
    np.save(os.path.join(temporary, 'images.npy'), images)
    np.save(os.path.join(temporary, 'labels.npy'), labels)
    with open(os.path.join(temporary, 'meta.json'), 'w') as f:
        json.dump(meta, f, indent=1)
    os.chmod(temporary, 0o755)
    try:
        os.rename(temporary, folder)
    except OSError:     # another process was first
        shutil.rmtree(temporary)


class Dataset:
    """
    A prepared dataset, opened by its folder, or by its name in data/. `meta` is its meta.json; of its images the first
    `n_train` are for training and the others held out (none held out: both are all images).
    """

    def __init__(self, name):
        folder = name if os.path.isdir(name) else os.path.join('data', name)
        if name == 'digits' and not os.path.isdir(folder):
            print('drawing the digits dataset ...')
            make_digits(folder)
        if not os.path.isfile(os.path.join(folder, 'meta.json')):
            raise SystemExit(f'no prepared dataset in {folder}: make one with python data.py --source=IMAGES --out={folder}')
        with open(os.path.join(folder, 'meta.json')) as f:
            self.meta = json.load(f)
        self.images = np.load(os.path.join(folder, 'images.npy'), mmap_mode='r')
        self.labels = np.load(os.path.join(folder, 'labels.npy'))
        self.n_train = self.meta['count'] - self.meta['heldout']
        self.heldout = np.arange(self.n_train if self.meta['heldout'] else 0, self.meta['count'])

    def batch(self, index, device='cpu'):
        """The images of an index array: (B, C, H, W) float32 in [-1, 1], and their labels, (B,) int64."""
        x = torch.from_numpy(self.images[index]).to(device).permute(0, 3, 1, 2)
        return x.float() / 127.5 - 1, torch.from_numpy(self.labels[index]).to(device)


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def training_order(first, count, n, seed):
    """The images at positions first .. first + count - 1 of a run over n images: a new permutation every epoch."""
    return np.array([permutation(n, seed, i // n)[i % n] for i in range(first, first + count)])
