"""Draws images from a checkpoint: Alg. 2, one ODE in K segments.

    python sample.py --ckpt out-digits/ckpt.pt                                  # a picture beside the checkpoint
    python sample.py --ckpt CKPT --num_samples=50000 --out=samples.npz          # ADM's: arr_0 uint8 NHWC, arr_1 labels
    python sample.py --ckpt CKPT --num_samples=100 --out=samples/               # one PNG each
    python sample.py --ckpt CKPT --trajectory=True                              # the pyramid through t, as in Figure 1

Noise and label of sample i depend on (seed, i) alone: with a fixed-step solver in float32 its pixels are the same
within one grey level, whatever the batch and the number of processes. The same command goes on where it stopped."""
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchdiffeq import odeint
from tqdm import tqdm

from configurator import barrier, check, claim, configure, explain, launch, precision
from data import decode, load_vae
from model import LapFlow, LapFlowConfig, hand_over, laplacian_pyramid, path, reconstruct

ADAPTIVE = ('dopri5', 'dopri8', 'bosh3', 'fehlberg2', 'adaptive_heun')
FIXED = ('euler', 'midpoint', 'heun2', 'heun3', 'rk4', 'explicit_adams', 'implicit_adams')


@torch.no_grad()
def generate(model, noise, y=None, method='dopri5', steps=50, tol=1e-5, cfg=1.0, frames=None):
    """Alg. 2, LapFlow sampling: images from full-resolution noise.

    noise (B, C, H, W), float32, y (B,) labels or None. method is one of ADAPTIVE, with absolute and relative tolerance
    tol, or of FIXED, with `steps` steps over [0, 1], shared among the segments in proportion to their length (at least
    one each: so 4 may become 5). cfg weighs classifier-free guidance, v_null + cfg (v_y - v_null) on every channel, in
    one forward of twice the batch; 1 is the conditional model. frames, a list, receives (t, state) at six times of
    every segment, a state being a list of K. Returns (x, nfe): images (B, C, H, W) and the number of model calls, a
    guided pair counted once. The ODE of a model that has diverged raises FloatingPointError, with a sentence."""
    config = model.config
    x0, state, nfe = laplacian_pyramid(noise, config.K), (), 0
    guided = cfg != 1 and y is not None
    labels = torch.cat([y, torch.full_like(y, config.n_classes)]) if guided else y

    def ode(t, x):
        nonlocal nfe
        nfe += 1
        t = t.clamp(start, end).expand(len(noise) * (1 + guided))   # adaptive solvers probe beyond the segment
        x_t = [None] * k + [torch.cat([x_j, x_j]) if guided else x_j for x_j in x]
        v = [v_j.to(noise.dtype) for v_j in model(x_t, t, labels) if v_j is not None]
        if guided:
            v = [v_null + cfg * (v_y - v_null) for v_y, v_null in (v_j.chunk(2) for v_j in v)]
        return tuple(v)

    for k in reversed(range(config.K)):
        start, end = config.times[k + 1], config.times[k]
        state = hand_over(state, path(torch.tensor(start), start, config.path)[2].item() * x0[k])
        t = torch.linspace(start, end, 2 if frames is None else 6, device=noise.device)
        n = max(1, round(steps * end) - round(steps * start))
        grid = torch.linspace(start, end, n + 1, device=noise.device)
        options = dict(step_t=t[-1:]) if method in ADAPTIVE else dict(grid_constructor=lambda *_: grid)
        if 'adams' in method:
            options['max_order'] = 4    # torchdiffeq's default of 12 is unstable
        try:
            states = odeint(ode, state, t, rtol=tol, atol=tol, method=method, options=options)
            assert all(x[-1].isfinite().all() for x in states), 'a state is not finite'
        except AssertionError as error:     # also torchdiffeq's, where steps shrink to nothing
            raise FloatingPointError(f'{method} cannot solve the ODE from t = {start:g} to {end:g} ({error}): the '
                                     'model has diverged or is hardly trained, or needs another method or tol')
        state = tuple(x[-1] for x in states)
        if frames is not None:
            frames += [(t_i.item(), [None] * k + [x[i] for x in states]) for i, t_i in enumerate(t)]
    return reconstruct(state), nfe


def noise_of(seed, index, shape):
    """Standard normal noise of the samples in index, (len(index), *shape) float32: each a function of (seed, i)."""
    return torch.from_numpy(np.stack([
        np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in index]))


def to_uint8(x):
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8 array, rounded once."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def labels_of(index, n_classes, cls=-1):
    """The classes of the samples in index: cls, or for -1 all in turn."""
    return [cls if cls >= 0 else i % n_classes for i in index]


def draw(model, vae, meta, seed, index, autocast, cls=-1, **solver):
    """The pictures of the samples in index, (B, H, W, C) uint8, and NFE. meta is the dataset's, solver more arguments
    of `generate`. Adaptive methods run in float32: rounding can make them reject their steps."""
    config, device = model.config, model.positions.device
    noise = noise_of(seed, index, (config.channels, config.size, config.size)).to(device)
    y = torch.tensor(labels_of(index, config.n_classes, cls), device=device) if config.n_classes else None
    with autocast if solver['method'] in FIXED else nullcontext():
        x, nfe = generate(model, noise, y, **solver)
    return to_uint8(decode(vae, x, meta)), nfe


def save_grid(file, images, columns=10):
    """Writes (N, H, W, C) uint8 images as one picture, row by row."""
    N, H, W, C = images.shape
    canvas = Image.new('RGB' if C == 3 else 'L', (columns * W, -(-N // columns) * H))
    for i, image in enumerate(images):
        canvas.paste(Image.fromarray(image.squeeze()), (i % columns * W, i // columns * H))
    canvas.save(file)


def save_trajectory(file, frames, vae, meta):
    """The first image's way from noise to data, in the manner of the paper's Figure 1: a column for each of the frames
    of `generate`; in rows the state of every scale, coarsest first, mid-grey for 0 (of latents three channels), and
    below them their reconstruction, decoded."""
    canvas = Image.new('RGB', (100 * len(frames), 116 + 100 * len(frames[0][1])))
    for column, (t, state) in enumerate(frames):
        ImageDraw.Draw(canvas).text((100 * column + 50, 8), f't = {t:.2f}', anchor='mm', font_size=17)
        whole = reconstruct([x for x in state if x is not None])
        for row, x in enumerate([decode(vae, whole, meta), *state]):        # from the bottom
            if x is not None:
                cell = Image.fromarray(to_uint8(x)[0, ..., :3].squeeze())
                canvas.paste(cell.resize((96, 96), Image.NEAREST), (100 * column + 2, canvas.height - 98 - 100 * row))
    canvas.save(file)


def load_checkpoint(file):
    """The dict that train.py saved in a file, its tensors on the CPU and read only when they are used."""
    with explain(f'{file!r} is not a checkpoint of train.py, or is damaged'):
        checkpoint = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        LapFlowConfig(**checkpoint['model_args'])
    return checkpoint


def load_model(checkpoint, device):
    """The model of a checkpoint, with its EMA weights if it has any, in evaluation mode."""
    model = LapFlow(LapFlowConfig(**checkpoint['model_args'])).to(device).eval()
    model.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    return model


def sampling_defaults(settings):
    """The settings of `generate` that the checkpoint of these settings carries, for `configure`."""
    config = load_checkpoint(settings['ckpt'])['config']
    return {key: config[key] for key in ('method', 'steps', 'tol', 'cfg')}


def check_solver(config, method, steps, tol, cfg):
    """What `generate` takes, as a dict; ends the script with one sentence if it cannot be."""
    check(method in ADAPTIVE + FIXED, f'method must be one of {", ".join(ADAPTIVE + FIXED)}, but it is {method!r}')
    check(cfg == 1 or config.n_classes, 'cfg needs a class-conditional model, and this one is unconditional: --cfg=1')
    return dict(method=method, steps=steps, tol=tol, cfg=cfg)


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
    dtype = 'float32'       # TF32 on GPUs; bfloat16 or auto are for fixed-step methods
    configure(globals(), inherit=sampling_defaults)
    device, rank, world = launch(device)
    checkpoint = load_checkpoint(ckpt)
    meta, model = checkpoint['data'], load_model(checkpoint, device)
    vae, n_classes = load_vae(meta, device), model.config.n_classes
    solver = check_solver(model.config, method, steps, tol, cfg)
    out = out or str(Path(ckpt).with_name('trajectory.png' if trajectory else 'samples.png'))
    check(cls in range(-1, n_classes), f'cls must be -1 (all classes in turn) or below {n_classes}, but it is {cls}')
    check(out.endswith('.png' if trajectory else ('.png', '.npz', '/')), f'out must end in .png, .npz or /: {out!r}')
    check(dtype != 'bfloat16' or method in FIXED, f'{method} needs float32; bfloat16 is for {", ".join(FIXED)}')
    autocast, dtype = precision(device, dtype)
    if trajectory:
        frames = []
        with explain('there is no such sample', FloatingPointError):
            draw(model, vae, meta, seed, [0], autocast, cls, frames=frames, **solver)
        save_trajectory(out, frames, vae, meta)
        print(f'sample 0 through t: {out}')
        raise SystemExit

    # Every process draws every world-th sample, into PNGs; where a picture or .npz is wanted, rank 0 packs them
    folder, nfes = out if out.endswith('/') else f'{out}.samples', []
    if rank == 0:
        claim(folder, 'settings.json', dict(ckpt=ckpt, log=checkpoint['log'][-1:], num_samples=num_samples,
                                            cls=cls, seed=seed, dtype=dtype, **solver))
    barrier()
    png = lambda i: f'{folder}/{i:06}.png'
    mine = [i for i in range(rank, num_samples, world) if not os.path.exists(png(i))]
    for first in tqdm(range(0, len(mine), batch_size), disable=rank):
        index = mine[first:first + batch_size]
        with explain('these samples cannot be drawn', FloatingPointError):
            images, nfe = draw(model, vae, meta, seed, index, autocast, cls, **solver)
        nfes.append(nfe)
        for i, image in zip(index, images):
            Image.fromarray(image.squeeze()).save(f'{folder}/{rank}.tmp', format='png')
            os.replace(f'{folder}/{rank}.tmp', png(i))
    barrier()
    if rank == 0:
        if folder != out:
            arrays = dict(arr_0=np.stack([np.atleast_3d(Image.open(png(i))) for i in range(num_samples)]))
            if n_classes:
                arrays['arr_1'] = labels_of(range(num_samples), n_classes, cls)
            if out.endswith('.png'):
                save_grid(out, arrays['arr_0'])
            else:
                np.savez(out, **arrays)
            shutil.rmtree(folder)
        print(f'{num_samples} samples, {method}, NFE {sum(nfes) / max(1, len(nfes)):.1f}: {out}')
