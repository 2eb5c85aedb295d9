"""Prepared datasets: folders that training maps into memory.

    python data.py --source=celeba_hq/ --out=data/celebahq256 --size=256 --vae=zelaki/eq-vae
    torchrun --nproc_per_node=8 data.py ...         # shares the work

    images.npy    N x H x W x C uint8: pixels, or
    latents.npy   N x flips x 2C x h x w float16: a VAE's posterior mean and std, unscaled, of images and mirror images
    labels.npy    N int64: the class of each image, -1 where it cannot be read, -2 where it is still to do
    meta.json     from what and how it is made. `size` is the grid that the model sees, of pixels or latents, and
                  `image_size` that of the images; the last `heldout` are not trained on; `flips` 2: training mirrors

Run the same command again and it goes on where it stopped. The built-in dataset is `digits`: grey 32 x 32 digits in
Pillow's own font, made on first use, in seconds, without a download."""
import glob
import io
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from configurator import barrier, check, claim, configure, explain, launch, write_json

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')
PIXELS_PER_CALL = 32 * 256 * 256    # of the VAE's decoder, to bound its memory
UNREADABLE, TO_DO = -1, -2          # in place of a class in labels.npy


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
    turned = canvas.transform(canvas.size, Image.AFFINE, affine, Image.BILINEAR)
    return np.asarray(turned.reduce(2))


def make_digits(folder, train=20_000, heldout=2_000):
    """Writes the digits dataset, the same bytes every time; the folder appears only once it is complete."""
    labels, temporary = np.arange(train + heldout) % 10, f'{folder}.{os.getpid()}'
    os.makedirs(temporary)
    images = [draw_digit(label, np.random.default_rng(i)) for i, label in enumerate(labels)]
    np.save(f'{temporary}/images.npy', np.stack(images)[..., None])
    np.save(f'{temporary}/labels.npy', labels)
    write_json(f'{temporary}/meta.json', dict(source='digits', size=32, channels=1, count=len(labels), heldout=heldout,
                                              classes=list('0123456789'), flips=1, vae=''))
    try:
        os.rename(temporary, folder)
    except OSError:     # another process was first
        shutil.rmtree(temporary)


class ImageFiles:
    """The images in a folder tree or .zip, sorted by name. First-level folders are classes, unless images lie beside
    them; a lone folder around everything is not a class, but its subfolders are."""

    def __init__(self, source):
        self.source, self.zip = source, None        # of a .zip members are read, never extracted
        found = glob.glob('**', root_dir=source, recursive=True)
        if not os.path.isdir(source):
            with explain(f'{source!r} is neither a folder nor a .zip of images'):
                self.zip = zipfile.ZipFile(source)
            found = self.zip.namelist()
        self.names = sorted(name for name in found if name.lower().endswith(ENDINGS)
                            and not any(part.startswith(('.', '__MACOSX')) for part in PurePosixPath(name).parts))
        check(self.names, f'there are no images in {source!r} (looked for {" ".join(ENDINGS)})')
        parts = [PurePosixPath(name).parts for name in self.names]
        while min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
            parts = [part[1:] for part in parts]
        classes, labels = np.unique([part[0] for part in parts], return_inverse=True)
        self.classes, self.labels = (classes.tolist(), labels) if min(map(len, parts)) > 1 else ([], 0 * labels)

    def read(self, i):
        """Image i, upright, in 8-bit RGB, what is transparent over white. Raises ValueError with the image's name."""
        try:
            content = self.zip.read(self.names[i]) if self.zip else Path(self.source, self.names[i]).read_bytes()
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            if image.mode == 'F' or image.mode.startswith('I'):
                raise ValueError('grey of 16 bits or more, which Pillow would clip: convert it to 8 bits')
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
        except Exception as error:      # damage makes Pillow raise nearly anything
            raise ValueError(f'{self.names[i]}: {str(error).partition(" <")[0] or type(error).__name__}') from error


def center_crop(image, size):
    """ADM's crop, (size, size, 3) uint8: halved with BOX while twice too large, then BICUBIC, then the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def load_vae(meta, device):
    """The VAE that a dataset's meta names, or None; ends the script if it makes other latents than the dataset's."""
    if not meta['vae']:
        return None
    from diffusers import AutoencoderKL
    with explain(f'vae must be a folder or the Hugging Face id of an AutoencoderKL, but it is {meta["vae"]!r}'):
        # (without the option it complains that accelerate is not installed)
        vae = AutoencoderKL.from_pretrained(meta['vae'], low_cpu_mem_usage=False)
    scale = vae.config.scaling_factor
    check(meta.get('scaling_factor', scale) == scale, f'{meta["vae"]} has scaling_factor {scale}, but the latents '
          f'were made with {meta.get("scaling_factor")}: use that VAE')
    return vae.requires_grad_(False).eval().to(device)


def encode(vae, images, flips):
    """(B, H, W, 3) uint8 images -> their rows of latents.npy, (B, flips, 2C, h, w) float16; vae None: they are rows."""
    if vae is None:
        return images
    x = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    views = [vae.encode(view).latent_dist for view in (x, x.flip(-1))[:flips]]
    return torch.stack([torch.cat([view.mean, view.std], dim=1) for view in views], dim=1).half().cpu().numpy()


def decode(vae, latents, meta):
    """Latents (B, C, h, w) as the model sees them -> images (B, 3, H, W), about -1 to 1; vae None: they are images."""
    if vae is None:
        return latents
    # A few at a time, however large. Not vae.enable_tiling(): it takes norms over tiles, which changes the picture.
    parts = (latents / meta['scaling_factor']).split(max(1, PIXELS_PER_CALL // meta['image_size'] ** 2))
    return torch.cat([vae.decode(part).sample for part in parts])


class Dataset:
    """A prepared dataset, opened by its folder, or by its name in data/: its `meta` (meta.json), `labels` and `array`
    (of images or latents). `rows` are those with an image that could be read, and an index means one of these. The
    first `n_train` are to train on, the others held out (none held out: both are all)."""

    def __init__(self, name):
        folder = name if os.path.exists(f'{name}/meta.json') else f'data/{name}'
        if folder == 'data/digits' and not os.path.exists(folder):
            print('drawing the digits dataset ...')
            make_digits(folder)
        check(os.path.exists(folder), f'there is no {folder}: python data.py --source=IMAGES --out={folder} makes it')
        with explain(f'{folder} is not a dataset of data.py, or is damaged'):
            self.meta = meta = json.loads(Path(f'{folder}/meta.json').read_text())
            self.array = np.load(f'{folder}/latents.npy' if meta['vae'] else f'{folder}/images.npy', mmap_mode='r')
            self.labels = np.load(f'{folder}/labels.npy')
            check(len(self.array) == len(self.labels) == meta['count']
                  and self.labels.max() < max(1, len(meta['classes'])), f'{folder} is not what its meta.json says')
            self.rows = np.flatnonzero(self.labels >= 0)
            self.n_train = len(self.rows) - meta['heldout']
            check(self.n_train > 0, f'{folder} has no images to train on yet')
        if (self.labels == TO_DO).any():
            print(f'{folder} is not complete: run the command that began it once more')
        self.heldout = np.arange(len(self.rows))[-meta['heldout']:]

    def batch(self, index, device='cpu', flip=False, eps=None):
        """What the model sees, (B, C, H, W) float32, of the images of an index array, and their labels, (B,) int64:
        pixels in [-1, 1] or scaled latents. flip, (B,) bool, says which to mirror if the dataset was made for it; eps,
        (B, C, H, W) on the device, is the noise that draws latents from the VAE's posterior (None: its mean)."""
        def on_device(array):
            """On a GPU from pinned memory, which nobody waits for: reading overlaps the steps that are under way."""
            tensor = torch.from_numpy(array)
            return (tensor.pin_memory() if 'cuda' in str(device) else tensor).to(device, non_blocking=True)
        rows = self.rows[index]
        flip = np.broadcast_to(flip, len(rows)) & (self.meta['flips'] == 2)
        y = on_device(self.labels[rows])
        if not self.meta['vae']:
            images = self.array[rows]
            images[flip] = images[flip, :, ::-1]
            return on_device(images).permute(0, 3, 1, 2).float() / 127.5 - 1, y
        mean, std = on_device(self.array[rows, flip.astype(int)]).float().chunk(2, dim=1)
        return (mean if eps is None else mean + std * eps) * self.meta['scaling_factor'], y


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def training_order(first, count, n, seed):
    """The images at positions first .. first + count - 1 of a run over n images: a new permutation every epoch."""
    return np.array([permutation(n, seed, i // n)[i % n] for i in range(first, first + count)])


if __name__ == '__main__':
    source = ''             # a folder or .zip of images; its first-level folders are classes
    out = ''                # the folder to make
    size = 256              # of the images, cropped and resized as ADM does
    vae = ''                # the AutoencoderKL that makes latents: a folder or a Hugging Face id; '' keeps pixels
    grey = False            # keep one channel of pixels instead of three
    flip = True             # training mirrors half of the images
    heldout = 0             # this many images, drawn at random, are not trained on
    batch_size = 32         # images between two records of progress, and in a call of the VAE: fewer if large
    device = 'auto'
    configure(globals())
    check(source and out, 'say what to make of what: python data.py --source=DIR_OR_ZIP --out=data/NAME')
    check(not (grey and vae), 'a VAE takes colour: leave out --grey=True')
    device, rank, world = launch(device)
    files, lock, flips = ImageFiles(source), Lock(), 1 + flip
    N, C = len(files.names), 1 if grey else 3
    check(0 <= heldout < N, f'heldout must be 0 or more and less than the {N} images, but it is {heldout}')
    # The last ones are held out: with classes, by name they would be of one class
    order = np.random.default_rng(0).permutation(N) if heldout else np.arange(N)
    meta = dict(source=source.rstrip('/'), size=size, image_size=size, channels=C, count=N, heldout=heldout,
                classes=files.classes, flips=flips, vae=vae)
    encoder = load_vae(meta, device)
    if vae:
        factor = 2 ** (len(encoder.config.block_out_channels) - 1)
        check(size % factor == 0, f'with this VAE, size must be a multiple of {factor}, but it is {size}')
        meta |= dict(size=size // factor, channels=encoder.config.latent_channels,
                     scaling_factor=encoder.config.scaling_factor)

    # The arrays stand at full size before any work, so that a full disk shows at once; labels.npy comes last
    array_file, labels_file = f'{out}/latents.npy' if vae else f'{out}/images.npy', f'{out}/labels.npy'
    if rank == 0:
        claim(out, 'meta.json', meta)
        if not os.path.exists(labels_file):
            black = encode(encoder, np.zeros((1, size, size, C), np.uint8), flips)
            with explain(f'cannot write {N} images to {out}'):
                np.save(array_file, np.zeros((N, *black.shape[1:]), black.dtype))
                np.save(f'{out}/new.npy', np.full(N, TO_DO))
                os.replace(f'{out}/new.npy', labels_file)
        labels = np.load(labels_file, mmap_mode='r+')
        labels[labels == UNREADABLE] = TO_DO    # they may have been mended
    barrier()
    array, labels = np.load(array_file, mmap_mode='r+'), np.load(labels_file, mmap_mode='r+')

    def image(i):
        """Image i as it is kept, or black if it cannot be read."""
        try:
            return center_crop(files.read(i).convert('L' if grey else 'RGB'), size).reshape(size, size, C)
        except ValueError as error:
            tqdm.write(f'left out: {error}')
            files.labels[i] = UNREADABLE
            return np.zeros((size, size, C), np.uint8)

    def prepare(chunk):
        """Reads, writes and records the images of a chunk."""
        images = np.stack([image(i) for i in order[chunk]])
        with lock:
            array[chunk] = encode(encoder, images, flips)
        array.flush()       # before the record
        labels[chunk] = files.labels[order[chunk]]

    # Chunks are the same in every run of this batch_size, and so is what the VAE makes of them
    chunks = np.split(np.arange(N), range(batch_size, N, batch_size))[rank::world]
    chunks = [chunk for chunk in chunks if (labels[chunk] < 0).any()]
    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(prepare, chunks), total=len(chunks), disable=rank):
            wrong = (labels == UNREADABLE).sum()
            check(wrong <= N // 100, f'{wrong} of {N} images cannot be read, more than 1%: mend them, run this again')
    barrier()
    if rank == 0:
        data = Dataset(out)
        print(f'{out}: {len(data.rows)} images of {len(files.classes)} classes, {N - len(data.rows)} left out')
        if vae:
            meta['latent_std'] = data.batch(np.arange(0, len(data.rows), 1 + N // 1000))[0].std().item()
            write_json(f'{out}/meta.json', meta)
            print(f'scaling factor {meta["scaling_factor"]}, std of the scaled latents {meta["latent_std"]:.4f}')
