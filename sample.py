"""
Draws images from a checkpoint: Alg. 2, one ODE in K segments.

    python sample.py --ckpt out-digits/ckpt.pt                                  # a picture beside the checkpoint
    python sample.py --ckpt CKPT --num_samples=50000 --out=samples.npz          # ADM's: arr_0 uint8 NHWC, arr_1 labels
    python sample.py --ckpt CKPT --num_samples=100 --out=samples/               # one PNG each
    python sample.py --ckpt CKPT --trajectory=True                              # the pyramid through t, as in Figure 1

Noise and label of sample i depend on (seed, i) alone, so fixed-step solvers draw the same images whatever the batch.
"""
import os
import time
import zipfile
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torchdiffeq import odeint
from tqdm import tqdm

from configurator import claim, configure, hold, in_words
from data import decode, launch, load_vae, new_array
from model import LapFlow, LapFlowConfig, laplacian_pyramid, path, reconstruct, up

ADAPTIVE = ('dopri5', 'dopri8', 'bosh3', 'fehlberg2', 'adaptive_heun')
FIXED = ('euler', 'midpoint', 'heun2', 'heun3', 'rk4', 'explicit_adams', 'implicit_adams')


@torch.no_grad()
def generate(model, noise, y=None, method='dopri5', steps=50, tol=1e-5, cfg=1.0, frames=None):
    """
    Alg. 2, LapFlow sampling: images from full-resolution noise. With the other flows Alg. 4 and Alg. 6, alike in law.

    noise (B, C, H, W), float32, y (B,) labels or None. method is one of ADAPTIVE, with absolute and relative tolerance
    tol, or of FIXED, with `steps` steps over [0, 1] shared among the segments in proportion to their length. cfg weighs
    classifier-free guidance, v_null + cfg (v_y - v_null) on every channel, in one forward of twice the batch; 1 is the
    conditional model. frames, a list, receives (t, state) at six times of every segment, a state being a list of K.
    Returns (x, nfe): images (B, C, H, W) and the number of model calls, a guided pair counted once. Raises
    FloatingPointError, with a sentence, if a model that has diverged makes the ODE insoluble.
    """
    config, K, B = model.config, model.config.K, len(noise)
    x0, state, nfe = laplacian_pyramid(noise, K), (), 0

    def ode(t, x):
        nonlocal nfe
        nfe += 1
        t = t.clamp(start, end).expand(B)     # adaptive solvers probe beyond the segment
        x_t = [None] * k + list(x) + [None] * (K - k - len(x))
        if cfg == 1 or y is None:
            return tuple(v_k.to(x[0].dtype) for v_k in model(x_t, t, y) if v_k is not None)
        twice = [None if x_k is None else torch.cat([x_k, x_k]) for x_k in x_t]
        v = model(twice, torch.cat([t, t]), torch.cat([y, torch.full_like(y, config.n_classes)]))
        v_y, v_null = zip(*(v_k.to(x[0].dtype).chunk(2) for v_k in v if v_k is not None))
        return tuple(null + cfg * (cond - null) for cond, null in zip(v_y, v_null))

    for k in reversed(range(K)):
        start, end = config.times[k + 1], config.times[k]
        # Scale k joins the state as sigma_{T_{k+1}} x_0^(k), Eq. (3) at its start: no renoising. The baselines go on
        # with scale k alone, from the renoised image Up(x) + sigma_{T_{k+1}} x_0^(k): Alg. 4, lines 7 and 8 with the
        # covariance of Appendix F.2, and Alg. 6, lines 4 and 6.
        joining = path(torch.tensor(start), start, config.path)[2].item() * x0[k]
        if config.flow == 'lapflow':
            state = (joining, *state)
        else:
            state = (joining + up(state[0]) if state else joining,)
        t = torch.linspace(start, end, 2 if frames is None else 6, device=noise.device)
        if method in ADAPTIVE:
            options = dict(step_t=t[-1:])     # land on the segment's end
        else:
            n = max(1, round(steps * end) - round(steps * start))
            options = dict(grid_constructor=lambda f, x, t: torch.linspace(start, end, n + 1, device=t.device))
            if 'adams' in method:
                options['max_order'] = 4    # torchdiffeq's default of 12 is unstable
        try:
            states = odeint(ode, state, t, rtol=tol, atol=tol, method=method, options=options)
        except AssertionError:      # torchdiffeq's, where steps shrink to nothing or a state is not finite
            states = ()
        if not states or not all(x[-1].isfinite().all() for x in states):
            raise FloatingPointError(f'{method} cannot solve the ODE from t = {start:g} to {end:g}: the model has '
                                     'diverged or is hardly trained; another method, or tol, may still draw something')
        state = tuple(x[-1] for x in states)
        if frames is not None:
            idle = [None] * (K - k - len(states))
            frames += [(t_i.item(), [None] * k + [x[i] for x in states] + idle) for i, t_i in enumerate(t)]
    return reconstruct(state), nfe


def noise_of(seed, index, shape):
    """Standard normal noise of the samples in index, (len(index), *shape) float32: each a function of (seed, i)."""
    noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in index]
    return torch.from_numpy(np.stack(noise))


def to_uint8(x):
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8 array, rounded once."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_picture(array):
    """An H x W x C uint8 array with C = 1 or 3 -> PIL image."""
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def save_grid(file, images, columns=10):
    """Writes N H W C uint8 images as one picture, row by row, black where they run out."""
    N, H, W, C = images.shape
    rows = -(-N // columns)
    canvas = np.zeros((rows * columns, H, W, C), np.uint8)
    canvas[:N] = images
    canvas = canvas.reshape(rows, columns, H, W, C).transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    to_picture(canvas).save(file)


def load_checkpoint(file, device):
    """The dict that train.py saved in a file; ends the script with one sentence if it is not one."""
    if not os.path.isfile(file):
        raise SystemExit(f'there is no checkpoint {file!r}: give --ckpt=OUT_DIR/ckpt.pt, or train one with train.py')
    try:
        with zipfile.ZipFile(file) as members:
            if members.testzip():
                raise ValueError('a checksum is wrong')     # torch writes them, but does not compare
        checkpoint = torch.load(file, map_location=device, weights_only=True)
        missing = {'model', 'ema', 'optimizer', 'iter_num', 'model_args', 'config', 'data'} - set(checkpoint)
    except Exception as error:
        raise SystemExit(f'{file!r} is not a checkpoint of train.py or is damaged ({in_words(error)})')
    if missing:
        raise SystemExit(f'{file!r} is not a checkpoint of train.py: it lacks {", ".join(sorted(missing))}')
    return checkpoint


def load_model(checkpoint, device):
    """The model of a checkpoint, with its EMA weights if it has any, in evaluation mode."""
    model = LapFlow(LapFlowConfig(**checkpoint['model_args'])).to(device).eval()
    model.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    return model


def save_trajectory(file, frames, vae, meta, cell=96):
    """
    The first image's way from noise to data, in the manner of the paper's Figure 1: a column for each of the frames of
    `generate`; in rows the state of every scale, coarsest first, mid-grey for 0 (of latents three channels), and below
    them their reconstruction, decoded.
    """
    columns = []
    for t, state in frames:
        title = Image.new('RGB', (cell, 16))
        ImageDraw.Draw(title).text((cell // 2, 8), f't = {t:.2f}', anchor='mm')
        column = [title]
        whole = decode(vae, reconstruct([x for x in state if x is not None]), meta)
        for x in [*reversed(state), whole]:
            picture = Image.new('L', (1, 1)) if x is None else to_picture(to_uint8(x)[0, ..., :3])
            column.append(picture.convert('RGB').resize((cell, cell), Image.Resampling.NEAREST))
        columns.append(np.concatenate([np.pad(np.asarray(part), ((2, 2), (2, 2), (0, 0))) for part in column]))
    Image.fromarray(np.concatenate(columns, axis=1)).save(file)


if __name__ == '__main__':
    ckpt = 'out/ckpt.pt'
    out = ''                # a picture (.png), .npz, or a folder (ending in /) for PNGs; '': beside the checkpoint
    num_samples = 100
    batch_size = 100        # of each process
    cls = -1                # the class of all samples; -1 goes through the classes in turn
    seed = 0
    trajectory = False      # draw sample 0 through t instead, to trajectory.png
    method = 'dopri5'       # these four: the checkpoint's own defaults, unless given
    steps = 50
    tol = 1e-5
    cfg = 1.0
    device = 'auto'
    dtype = 'float32'       # TF32 on GPUs; bfloat16 is for fixed-step methods
    compile = False         # torch.compile, block by block: for many samples
    configure(globals())
    checkpoint = load_checkpoint(ckpt, 'cpu')
    globals().update({key: checkpoint['config'][key] for key in ('method', 'steps', 'tol', 'cfg')})
    configure(globals())    # once more, over the checkpoint's defaults
    device, rank, world = launch(device, 'gloo')
    model, meta = load_model(checkpoint, device), checkpoint['data']
    config = model.config
    methods = ADAPTIVE + FIXED
    for wrong, sentence in (
            (method not in methods, f'method must be one of {", ".join(methods)}, but it is {method!r}'),
            (steps < config.K, f'steps must be at least {config.K}, one for each segment, but it is {steps}'),
            (tol <= 0, f'tol must be positive, but it is {tol}'),
            (min(num_samples, batch_size) < 1, 'num_samples and batch_size must be at least 1'),
            (seed < 0, f'seed must be 0 or more, but it is {seed}'),
            (cls != -1 and not config.n_classes, 'cls needs a class-conditional model, and this one is unconditional'),
            (not -1 <= cls < max(config.n_classes, 1),
             f'cls must be -1 (all in turn) or a class below {config.n_classes}, but it is {cls}'),
            (cfg != 1 and not config.n_classes, 'cfg needs a class-conditional model, and this one is unconditional'),
            (dtype not in ('float32', 'bfloat16'), f'dtype must be float32 or bfloat16, but it is {dtype!r}'),
            (out and not out.endswith(('.png',) if trajectory else ('.png', '.npz', '/')),
             f'out must end in .png{"" if trajectory else ", .npz or /"}, but it is {out!r}'),
            (dtype == 'bfloat16' and method in ADAPTIVE, f'bfloat16 is too coarse for the steps of {method}: '
             f'take a fixed-step method, one of {", ".join(FIXED)}')):
        if wrong:
            raise SystemExit(f'sample.py: {sentence}')
    if compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    autocast = torch.autocast(device.split(':')[0], torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
    vae = load_vae(meta, device) if meta['vae'] else None
    out = out or os.path.join(os.path.dirname(ckpt), 'trajectory.png' if trajectory else 'samples.png')
    num_samples = 1 if trajectory else num_samples
    labels = [i % config.n_classes if cls < 0 else cls for i in range(num_samples)] if config.n_classes else None

    # Every process draws every world-th sample, into PNGs of its own or its rows of one array on the disk
    folder, mine, array_file = out.endswith('/'), range(rank, num_samples, world), f'{out}.partial.npy'
    lock_file = os.path.join(out, '.lock') if folder else f'{out}.lock'
    if rank == 0:
        hold(lock_file)
        if folder:
            claim(out, dict(ckpt=ckpt, iter_num=checkpoint['iter_num'], seed=seed, cls=cls, method=method, steps=steps,
                            tol=tol, cfg=cfg, dtype=dtype))
            if any(name.endswith('.png') and name >= f'{num_samples:06}.png' for name in os.listdir(out)):
                raise SystemExit(f'sample.py: {out} holds more than {num_samples} samples: choose another --out')
        else:
            shape = (meta['image_size'], meta['image_size'], 3) if vae else (config.size, config.size, config.channels)
            new_array(array_file, np.uint8, (num_samples, *shape), copies=2)
    if world > 1:
        dist.barrier()
    if folder:
        mine = [i for i in mine if not os.path.exists(os.path.join(out, f'{i:06}.png'))]
    else:
        images = np.load(array_file, mmap_mode='r+')
    nfes, frames, started = [], [] if trajectory else None, time.time()
    for first in tqdm(range(0, len(mine), batch_size), disable=rank > 0 or len(mine) <= batch_size, unit=' batches'):
        index = mine[first:first + batch_size]
        noise = noise_of(seed, index, (config.channels, config.size, config.size)).to(device)
        y = torch.tensor([labels[i] for i in index], device=device) if labels else None
        try:
            with autocast:
                x, nfe = generate(model, noise, y, method, steps, tol, cfg, frames)
        except FloatingPointError as error:
            if not folder and rank == 0:
                os.remove(array_file)
                os.remove(lock_file)
            raise SystemExit(f'sample.py: {error}')
        nfes.append(nfe)
        for i, image in zip(index, to_uint8(decode(vae, x, meta))):
            if folder:
                file = os.path.join(out, f'{i:06}.png')
                to_picture(image).save(f'{file}.tmp', format='png')
                os.replace(f'{file}.tmp', file)
            else:
                images[i] = image
    if world > 1:
        dist.barrier()
    if rank == 0:
        if trajectory:
            save_trajectory(out, frames, vae, meta)
        elif out.endswith('.npz'):
            np.savez(f'{out}.tmp.npz', arr_0=images, **(dict(arr_1=np.array(labels)) if labels else {}))
            os.replace(f'{out}.tmp.npz', out)
        elif not folder:
            save_grid(out, images)
        if not folder:
            os.remove(array_file)
            os.remove(lock_file)
        nfe = f'{np.mean(nfes):.1f}' if nfes else '0 (all were there)'
        print(f'{num_samples} samples, {method}, NFE {nfe}, {time.time() - started:.1f} s: {out}')
    if world > 1:
        dist.destroy_process_group()
