"""
Prepared datasets: folders that training maps into memory.

    python data.py --source=celeba_hq/ --out=data/celebahq256 --size=256 --vae=zelaki/eq-vae
    torchrun --nproc_per_node=8 data.py ...         # shares the work

    images.npy    N x H x W x C uint8: pixels, or
    latents.npy   N x flips x 2C x h x w float16: a VAE's posterior mean and std, unscaled, of images and mirror images
    labels.npy    N int64: the class of each image
    meta.json     from what and how it was made. `size` is the grid that the model sees, of pixels or latents, and
                  `image_size` that of the images; the last `heldout` are not trained on; `flips` 2: training mirrors;
                  `checksums`: of the other files

Run the same command again and it goes on where it stopped. The built-in dataset is `digits`: grey 32 x 32 digits in
Pillow's own font, made on first use, in seconds, without a download.
"""
import io
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from configurator import changes, claim, configure, hold, in_words

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')
PIXELS_PER_CALL = 32 * 256 * 256    # of the VAE, to bound its memory
TO_DO, DONE, CORRUPT = 0, 1, 2      # what state.npy says of an image
LARGEST_FILE = 2 ** 28              # of an image: beyond these bytes a .zip is taken for a bomb


def launch(device, backend='auto'):
    """
    Joins torchrun's process group, if there is one, and settles on a device: 'auto' is cuda, mps or cpu, 'cuda' this
    process's own GPU. Float32 matrix products may use TF32. Returns (device, rank, world size).
    """
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                               (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if device == 'cuda':
        device = f'cuda:{local_rank}'
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise SystemExit(f'device must be auto, cuda, mps or cpu, and one that is there: {device!r} is not '
                         f'({str(error).splitlines()[0]})')
    if 'cuda' in device:
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        # A name of its own for every attempt of torchrun --max_restarts, which else would find the lost one's addresses
        store, _, _ = next(dist.rendezvous('env://'))
        attempt = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        backend = ('nccl' if 'cuda' in device else 'gloo') if backend == 'auto' else backend
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=world)
    return device, rank, world


def checksum(file):
    """The crc32 of a file's first GiB: that takes a second or two, so it can be compared before every run."""
    crc = 0
    with open(file, 'rb') as f:
        while f.tell() < 2 ** 30 and (part := f.read(2 ** 24)):
            crc = zlib.crc32(part, crc)
    return crc


def new_array(file, kind, shape, copies=1):
    """A new .npy of zeros, mapped into memory; ends the script if there is no room for so many copies of it."""
    needed = copies * math.prod(shape) * np.dtype(kind).itemsize
    free = shutil.disk_usage(os.path.dirname(file) or '.').free
    if needed > free:
        raise SystemExit(f'{file} needs {needed / 1e9:.1f} GB of disk, and only {free / 1e9:.1f} GB are free')
    return np.lib.format.open_memmap(file, 'w+', kind, shape)


def write_meta(folder, array, meta):
    """Completes a prepared dataset: its meta.json, with the checksums of its array and labels.npy."""
    meta['checksums'] = {file: checksum(os.path.join(folder, file)) for file in (array, 'labels.npy')}
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta, f, indent=1)


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
    turned = canvas.transform(canvas.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(turned.reduce(2))


def make_digits(folder, train=20_000, heldout=2_000):
    """Writes the digits dataset, the same bytes every time; the folder appears only once it is complete."""
    count, names = train + heldout, [str(d) for d in range(10)]
    labels = np.arange(count) % 10
    images = np.stack([draw_digit(label, np.random.default_rng(i)) for i, label in enumerate(labels)])[..., None]
    meta = dict(source='digits', size=32, image_size=32, channels=1, count=count, heldout=heldout, classes=names,
                flips=1, vae='', corrupt=[])
    os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
    temporary = tempfile.mkdtemp(dir=os.path.dirname(os.path.abspath(folder)))
    np.save(os.path.join(temporary, 'images.npy'), images)
    np.save(os.path.join(temporary, 'labels.npy'), labels)
    write_meta(temporary, 'images.npy', meta)
    os.chmod(temporary, 0o755)
    try:
        os.rename(temporary, folder)
    except OSError:     # another process was first
        shutil.rmtree(temporary)


class ImageFiles:
    """
    The images in a folder tree or .zip, sorted by name. First-level folders are classes, unless images lie beside them;
    a lone folder around everything is not a class, but its subfolders are.
    """

    def __init__(self, source):
        self.source, self.zip, self.lock = source, None, Lock()
        if os.path.isdir(source):
            found = [os.path.relpath(os.path.join(folder, file), source).replace(os.sep, '/')
                     for folder, _, files in os.walk(source, followlinks=True) for file in files]
        elif zipfile.is_zipfile(source):
            self.zip = zipfile.ZipFile(source)
            found = self.zip.namelist()
        else:
            raise SystemExit(f'{source!r} is neither a folder nor a .zip of images')
        self.names = sorted(name for name in found if name.lower().endswith(ENDINGS)
                            and not any(part == '__MACOSX' or part.startswith('.') and part != '.'
                                        for part in name.split('/')))
        if not self.names:
            raise SystemExit(f'there are no images in {source!r} (looked for {" ".join(ENDINGS)})')
        names = [os.path.normpath('/' + name.lstrip('/'))[1:] for name in self.names]
        around = len(os.path.commonpath([os.path.dirname(name) for name in names]))
        inner = [name[around:].lstrip('/') for name in names]
        classes, labels = np.unique([name.split('/')[0] if '/' in name else '' for name in inner], return_inverse=True)
        self.classes = [] if '' in classes else classes.tolist()
        self.labels = labels if self.classes else np.zeros(len(inner), np.int64)

    def __len__(self):
        return len(self.names)

    def read(self, i):
        """Image i, upright, in 8-bit RGB, what is transparent over white. Errors are Pillow's."""
        if self.zip:
            with self.lock, self.zip.open(self.names[i]) as f:      # read, never extracted
                data = f.read(LARGEST_FILE + 1)
        else:
            with open(os.path.join(self.source, self.names[i]), 'rb') as f:
                data = f.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ValueError(f'larger than {LARGEST_FILE >> 20} MB')
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode == 'F' or image.mode.startswith('I'):     # Pillow would clip these instead of scaling them
            grey = np.rint(np.asarray(image) / 257)
            if image.mode == 'F' or grey.min() < 0 or grey.max() > 255:
                raise ValueError('grey of more than 16 bits has no fixed white')
            image = Image.fromarray(grey.astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')


def center_crop(image, size):
    """ADM's crop, (size, size, 3) uint8: halved with BOX while twice too large, then BICUBIC, then the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


def load_vae(meta, device):
    """The VAE that a dataset's meta names; ends the script if it makes other latents than the dataset's."""
    from diffusers import AutoencoderKL
    options = dict(low_cpu_mem_usage=False)     # or it complains that accelerate is not installed
    if os.path.isdir(os.path.join(meta['vae'], 'vae')):
        options['subfolder'] = 'vae'
    try:
        vae = AutoencoderKL.from_pretrained(meta['vae'], **options).requires_grad_(False).eval().to(device)
    except (OSError, ValueError) as error:
        raise SystemExit(f'data.py: vae must be a folder or the Hugging Face id of an AutoencoderKL, and with '
                         f'{meta["vae"]!r} there is an error: {in_words(error)}')
    found = dict(scaling_factor=vae.config.scaling_factor, channels=vae.config.latent_channels)
    for key in found:
        if meta.get(key, found[key]) != found[key]:
            raise SystemExit(f'data.py: the VAE {meta["vae"]!r} has {key} {found[key]}, but the latents were made with '
                             f'one that has {meta[key]}: use that one')
    return vae


def encode(vae, images, flips, dtype):
    """(B, H, W, 3) uint8 images -> what latents.npy holds of them, (B, flips, 2C, h, w) float16."""
    x = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = []
    for part in x.split(max(1, PIXELS_PER_CALL // x[0, 0].numel())):
        with torch.autocast(vae.device.type, dtype, enabled=dtype != torch.float32):
            views = [vae.encode(view).latent_dist for view in (part, part.flip(-1))[:flips]]
        latents.append(torch.stack([torch.cat([view.mean, view.std], dim=1) for view in views], dim=1))
    return torch.cat(latents).half().cpu().numpy()


def decode(vae, latents, meta):
    """Latents (B, C, h, w) as the model sees them -> images (B, 3, H, W), about -1 to 1; vae None: they are images."""
    if vae is None:
        return latents
    # A few at a time, however large. Not vae.enable_tiling(): it takes norms over tiles, which changes the picture.
    parts = (latents / meta['scaling_factor']).split(max(1, PIXELS_PER_CALL // meta['image_size'] ** 2))
    return torch.cat([vae.decode(part).sample for part in parts])


class Dataset:
    """
    A prepared dataset, opened by its folder, or by its name in data/. `meta` is its meta.json; its array is `images` or
    `latents`, the other None. The first `n_train` are to train on, the others held out (none held out: both are all).
    A dataset that is not what its meta.json says ends the script.
    """

    def __init__(self, name):
        prepared = lambda folder: os.path.isfile(os.path.join(folder, 'meta.json'))
        folder = name if prepared(name) else os.path.join('data', name)
        if name == 'digits' and not prepared(folder):
            print('drawing the digits dataset ...')
            make_digits(folder)
        if not prepared(folder):
            raise SystemExit(f'there is no prepared dataset in {name} or {folder}: make one with '
                             f'python data.py --source=IMAGES --out={folder}')
        try:
            with open(os.path.join(folder, 'meta.json')) as f:
                self.meta = meta = json.load(f)
            N, size, C = meta['count'], meta['size'], meta['channels']
            array_file, shape = ('latents.npy', (N, meta['flips'], 2 * C, size, size)) if meta['vae'] else \
                ('images.npy', (N, size, size, C))
            array = np.load(os.path.join(folder, array_file), mmap_mode='r')
            self.labels = np.load(os.path.join(folder, 'labels.npy'))
            for file, value in meta.get('checksums', {}).items():
                if checksum(os.path.join(folder, file)) != value:
                    raise ValueError(f'{file} is not what was written')
            if array.shape != shape or len(self.labels) != N:
                raise ValueError(f'it has {array.shape} and {len(self.labels)} labels, and meta.json says {shape}')
            if self.labels.min() < 0 or self.labels.max() >= max(1, len(meta['classes'])):
                raise ValueError('labels.npy has labels beyond the classes of meta.json')
            self.n_train = N - meta['heldout']
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f'the dataset {folder} is damaged ({in_words(error)}): delete it and make it again')
        self.images, self.latents = (None, array) if meta['vae'] else (array, None)
        self.heldout = np.arange(self.n_train if meta['heldout'] else 0, N)

    def batch(self, index, device='cpu', flip=None, eps=None):
        """
        What the model sees, (B, C, H, W) float32, of the images of an index array, and their labels, (B,) int64: pixels
        in [-1, 1] or scaled latents. flip, a (B,) bool array, says which to mirror if the dataset was made for it; eps,
        (B, C, H, W) on the device, is the noise that draws latents from the VAE's posterior (None: its mean).
        """
        def on_device(array):
            """On a GPU from pinned memory, which nobody waits for: reading overlaps the steps that are under way."""
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if 'cuda' in str(device) else tensor.to(device)
        flip = np.zeros(len(index), bool) if flip is None or self.meta['flips'] == 1 else flip
        y = on_device(self.labels[index])
        if self.latents is None:
            images = self.images[index]
            images[flip] = images[flip, :, ::-1]
            return on_device(images).permute(0, 3, 1, 2).float() / 127.5 - 1, y
        mean, std = on_device(self.latents[index, flip.astype(int)]).float().chunk(2, dim=1)
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
    flip = True             # training mirrors half of the images
    heldout = 0             # this many images, drawn at random, are not trained on
    strict = False          # stop at images that cannot be read, instead of leaving out up to one in a hundred
    batch_size = 32         # images between two records of progress
    workers = 8             # threads that read images, in each process
    device = 'auto'
    dtype = 'auto'          # of the VAE: float16 on GPUs, else float32; bfloat16 is eight times coarser than float16
    configure(globals())
    out = out.rstrip('/')
    for wrong, sentence in (
            (not source or not out, 'say what to make of what: python data.py --source=DIR_OR_ZIP --out=data/NAME'),
            (min(size, batch_size, workers) < 1, 'size, batch_size and workers must be at least 1'),
            (dtype not in ('auto', 'float32', 'float16', 'bfloat16'),
             f'dtype must be auto, float32, float16 or bfloat16, not {dtype!r}'),
            (os.path.exists(out) and not os.path.isfile(os.path.join(out, 'meta.json')),
             f'{out} exists and is no prepared dataset: choose another --out')):
        if wrong:
            raise SystemExit(f'data.py: {sentence}')
    device, rank, world = launch(device, 'gloo')
    if os.path.exists(out):
        meta = Dataset(out).meta
        wanted = dict(source=source, image_size=size, vae=vae, flips=2 if flip else 1, heldout=heldout)
        if changes(meta, wanted):
            raise SystemExit(f'data.py: {out} was made with other settings ({"; ".join(changes(meta, wanted))}): '
                             'choose another --out, or delete it')
        if rank == 0:
            print(f'{out} is complete: {meta["count"]} images')
        raise SystemExit

    files = ImageFiles(source)
    N, flips = len(files), 2 if flip else 1
    if not 0 <= heldout < N:
        raise SystemExit(f'data.py: heldout must be 0 or more and less than the {N} images, but it is {heldout}')
    if heldout:     # the last ones are held out: with classes, by name they would be of one class
        order = np.random.default_rng(0).permutation(N)
        files.names, files.labels = [files.names[i] for i in order], files.labels[order]
    name, grid, channels, shape, kind = 'images.npy', size, 3, (N, size, size, 3), np.uint8
    if vae:
        encoder = load_vae(dict(vae=vae), device)
        dtype = dtype if dtype != 'auto' else 'float16' if 'cuda' in device else 'float32'
        factor = 2 ** (len(encoder.config.block_out_channels) - 1)
        if size % factor:
            raise SystemExit(f'data.py: with this VAE, size must be a multiple of {factor}, but it is {size}')
        name, grid, channels, kind = 'latents.npy', size // factor, encoder.config.latent_channels, np.float16
        shape = (N, flips, 2 * channels, grid, grid)

    # The work is done in a folder beside, where state.npy says of each image whether it is done
    partial, final = out + '.partial', os.path.join(out + '.partial', 'final')
    array_file, state_file = os.path.join(partial, 'array.npy'), os.path.join(partial, 'state.npy')
    settings = dict(source=source, images=f'{N}, names {zlib.crc32(repr(files.names).encode()):08x}', size=size,
                    vae=vae, flip=flip, heldout=heldout, batch_size=batch_size, dtype=dtype)
    if rank == 0:
        hold(os.path.join(partial, '.lock'))
        if os.path.exists(os.path.join(final, name)) and not os.path.exists(array_file):
            os.replace(os.path.join(final, name), array_file)       # it ended between its last two steps
    if rank == 0 and os.path.exists(os.path.join(partial, 'settings.json')) and os.path.exists(array_file):
        claim(partial, settings)
        state = np.load(state_file, mmap_mode='r+')
        state[state == CORRUPT] = TO_DO     # they may have been mended
        print(f'continuing {partial}: {(state == DONE).sum()} of {N} images are done')
    elif rank == 0:
        new_array(array_file, kind, shape)
        new_array(state_file, np.uint8, (N,))
        claim(partial, settings)        # last: with it, the arrays are there
    if world > 1:
        dist.barrier()

    def load(i):
        """The pixels of image i, and '', or the reason why they are black."""
        try:
            return center_crop(files.read(i), size), ''
        except Exception as error:      # damage makes Pillow raise nearly anything; it may name an _io.BytesIO
            return np.zeros((size, size, 3), np.uint8), str(error).partition(' <')[0] or type(error).__name__

    # Chunks are the same in every run, and so is what the VAE makes of them
    array, state = np.load(array_file, mmap_mode='r+'), np.load(state_file, mmap_mode='r+')
    chunks = [range(N)[first:first + batch_size] for first in range(rank * batch_size, N, world * batch_size)]
    chunks = [chunk for chunk in chunks if not state[chunk].all()]
    total = sum(map(len, chunks))
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, unit=' images', disable=rank > 0) as progress:
        decoding = (pool.map(load, chunk) for chunk in chunks)
        following = next(decoding, None)
        for chunk in chunks:
            images, following = following, next(decoding, None)     # threads go on to the next chunk
            images, reasons = zip(*images)
            rows, span = np.stack(images), slice(chunk.start, chunk.stop)
            for i, reason in zip(chunk, reasons):
                if reason:
                    tqdm.write(f'left out: {files.names[i]} ({reason})')
            if vae:
                rows = encode(encoder, rows, flips, getattr(torch, dtype))
                if not np.isfinite(rows).all():
                    raise SystemExit(f'data.py: the latents are not finite in {dtype}: try --dtype=float32')
            array[span] = rows
            array.flush()       # before the record
            state[span] = [CORRUPT if reason else DONE for reason in reasons]
            state.flush()
            corrupt, allowed = (state == CORRUPT).sum(), 0 if strict else N // 100
            if corrupt > allowed:
                raise SystemExit(f'data.py: {corrupt} of {N} images cannot be read, and at most {allowed} may be left '
                                 f'out: mend them and run this again, or remove them and delete {partial}')
            progress.update(len(chunk))
    if world > 1:
        dist.barrier()

    if rank == 0:
        os.makedirs(final, exist_ok=True)
        kept, corrupt = np.flatnonzero(state == DONE), np.flatnonzero(state == CORRUPT)
        meta = dict(source=source, size=grid, image_size=size, channels=channels, count=len(kept), heldout=heldout,
                    classes=files.classes, flips=flips, vae=vae, corrupt=[files.names[i] for i in corrupt])
        if vae:
            some = array[kept[::-(-len(kept) // 1000)]].astype(np.float32)
            mean, std = np.split(some, 2, axis=2)
            scale = encoder.config.scaling_factor
            total_std = round(scale * float(np.sqrt(mean.var() + (std ** 2).mean())), 4)
            meta |= dict(scaling_factor=scale, latent_std=total_std)
            print(f'scaling factor {scale}, standard deviation of the scaled latents {total_std}')
        np.save(os.path.join(final, 'labels.npy'), files.labels[kept])
        if len(corrupt):
            compact = new_array(os.path.join(final, name), kind, (len(kept), *shape[1:]))
            for row, i in enumerate(kept):
                compact[row] = array[i]
            compact.flush()
        else:
            os.replace(array_file, os.path.join(final, name))
        write_meta(final, name, meta)
        os.rename(final, out)
        shutil.rmtree(partial)
        print(f'{out}: {len(kept)} images of {len(files.classes)} classes, {channels} x {grid} x {grid}, '
              f'{len(corrupt)} left out')
    if world > 1:
        dist.destroy_process_group()
