"""Draws images from a checkpoint: Alg. 2, one ODE in K segments.

    python sample.py --ckpt out-digits/ckpt.pt                          # samples.png beside it
    python sample.py --ckpt CKPT --num_samples=50000 --out=samples.npz  # ADM's: arr_0, arr_1
    python sample.py --ckpt CKPT --num_samples=100 --out=samples/       # one PNG each
    torchrun --nproc_per_node=8 sample.py --ckpt CKPT ...

Noise and label of sample i depend on (seed, i) alone. With a fixed-step method in float32 its
pixels are the same within one grey level, whatever the batch and the number of processes.
"""
import os
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchdiffeq import odeint
from tqdm import tqdm

from configurator import autocast_for, barrier, check, configure, exit_on_error, launch
from data import decode, load_vae, new_array
from model import LapFlow, LapFlowConfig, join, laplacian_pyramid, reconstruct

METHODS = ('dopri5', 'euler', 'midpoint', 'heun2', 'rk4')   # dopri5 alone is adaptive


@torch.no_grad()
def generate(model, noise, y=None, method='dopri5', steps=50, tol=1e-5, cfg=1.0):
    """Alg. 2: images (B, C, H, W) from noise (B, C, H, W) float32, and the number of evaluations.

    y is (B,) labels or None. method is one of METHODS. tol is dopri5's absolute and relative
    tolerance; the others make `steps` steps. cfg = 1 is the conditional model, 0 the unconditional.
    """
    config = model.config
    x0 = laplacian_pyramid(noise, config.K)
    velocity = GuidedVelocity(model, y, cfg)
    state = {}
    for k in reversed(range(config.K)):         # coarsest first
        state = join(state, k, x0, config)
        start, end = config.times[k + 1], config.times[k]
        state = odeint_scales(velocity, state, start, end, method, steps, tol)
    return reconstruct(list(state.values())), velocity.nfe


def odeint_scales(velocity, state, start, end, method, steps, tol):
    """ODEINT of Alg. 2: carries the state, a dict {k: tensor}, from time `start` to `end`.

    A fixed-step method makes `steps` steps over [0, 1]; this segment gets its share, at least one.
    """
    device = state[max(state)].device
    if method == 'dopri5':      # chooses its own steps, which stay within the segment
        times = torch.tensor([start, end], device=device)
        options = dict(step_t=times[1:])
    else:
        n = max(1, round(steps * end) - round(steps * start))
        times = torch.linspace(start, end, n + 1, device=device)
        options = {}

    def ode(t, x):
        v = velocity(dict(zip(state, x)), t.clamp(start, end))  # dopri5's first trial may pass end
        if not all(v_k.isfinite().all() for v_k in v.values()):
            raise FloatingPointError(f'the velocity at t = {t:.3f} is not finite')
        return tuple(v.values())

    x = odeint(ode, tuple(state.values()), times, rtol=tol, atol=tol, method=method,
               options=options)
    return {k: x_k[-1] for k, x_k in zip(state, x)}


@dataclass
class GuidedVelocity:
    """The model's velocity with classifier-free guidance, v_null + cfg (v_y - v_null).

    Unlike DiT's it acts on every channel. nfe counts the evaluations, a guided pair as one.
    """
    model: LapFlow
    y: torch.Tensor | None
    cfg: float
    nfe: int = 0

    def __call__(self, x, t):
        """x is {k: (B, C, H/2^k, W/2^k)}, t a tensor of one number. Returns a dict like x."""
        self.nfe += 1
        t = t.expand(len(x[max(x)]))                # (B,)
        v = self.model(x, t, self.y)
        if self.cfg == 1 or self.y is None:
            return v
        v_null = self.model(x, t)
        return {k: v_null[k] + self.cfg * (v[k] - v_null[k]) for k in x}


def noise_of(seed, index, shape):
    """Standard normal noise of the samples in index, (len(index), *shape), each from (seed, i)."""
    noise = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in index]
    return torch.from_numpy(np.stack(noise))


def labels_of(index, classes):
    """The labels of the samples in index: they go through the given classes in turn."""
    return np.take(classes, index, mode='wrap')


def to_uint8(x):
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8 array, rounded and clipped."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).byte()
    return x.permute(0, 2, 3, 1).cpu().numpy()


def draw(model, vae, meta, seed, index, classes, autocast, **solver):
    """The pictures of the samples in index, (B, H, W, C) uint8, and the number of evaluations.

    meta is the dataset's. classes are the numbers of those to draw. solver are more arguments of
    `generate`. dopri5 runs in float32: rounding can make it reject its steps.
    """
    config = model.config
    device = next(model.parameters()).device
    noise = noise_of(seed, index, (config.channels, config.size, config.size)).to(device)
    y = None
    if config.n_classes:
        y = torch.tensor(labels_of(index, classes), device=device)
    if solver['method'] == 'dopri5':
        autocast = nullcontext()
    with autocast:
        x, nfe = generate(model, noise, y, **solver)
    return to_uint8(decode(vae, x, meta)), nfe


def save_grid(file, images, columns=10):
    """Writes (N, H, W, C) uint8 images as one picture, row by row."""
    N, H, W, C = images.shape
    missing = np.zeros((-N % columns, H, W, C), np.uint8)       # in the last row
    grid = np.concatenate([images, missing]).reshape(-1, columns, H, W, C)
    pixels = grid.swapaxes(1, 2).reshape(-1, columns * W, C)
    Image.fromarray(pixels.squeeze()).save(file)


def load_checkpoint(file):
    """The dict that train.py saved, on the CPU. Tensors are read when they are used."""
    with exit_on_error(f'{file!r} is no checkpoint of this train.py, or is damaged'):
        checkpoint = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        args, known = checkpoint['model_args'], LapFlowConfig.__dataclass_fields__
    check(args.keys() <= known.keys(), f'{file!r} is of another model than this LapFlow: {args}')
    return checkpoint


def load_model(checkpoint, device):
    """The model of a checkpoint, with its EMA weights if it has any, in evaluation mode."""
    model = LapFlow(LapFlowConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    return model.to(device).eval()


def check_solver(config, method, tol, cfg, label_drop):
    """Ends the script with one sentence if `generate` cannot take these."""
    check(method in METHODS, f'method must be one of {METHODS}, but it is {method!r}')
    check(tol > 0, f'tol must be more than 0, but it is {tol}')
    check(cfg == 1 or config.n_classes, 'the model is unconditional, so cfg must be 1')
    check(cfg == 1 or label_drop > 0, 'cfg needs a null label: train with label_drop, or --cfg=1')


if __name__ == '__main__':
    ckpt = 'out/ckpt.pt'
    out = ''                # NAME.png, NAME.npz or a folder NAME/; '': beside ckpt
    num_samples = 100
    batch_size = 25         # of each process: more keep a large GPU busy
    cls = ''                # the name or number of one class; '' is all in turn
    seed = 0
    vae = ''                # where the VAE is now, if it has moved
    method = 'dopri5'       # these four: the checkpoint's own, unless given
    steps = 50
    tol = 1e-5
    cfg = 1.0
    device = 'auto'
    dtype = 'float32'       # TF32 on GPUs; bfloat16 is for fixed-step methods
    configure(globals())    # for ckpt
    checkpoint = load_checkpoint(ckpt)
    meta, trained = checkpoint['data'], checkpoint['config']
    method, steps, tol, cfg = trained['method'], trained['steps'], trained['tol'], trained['cfg']
    configure(globals())    # again, so that the command line wins over the checkpoint
    check(min(num_samples, batch_size, steps) > 0,
          'num_samples, batch_size and steps must be at least 1')
    device, rank, world = launch(device)
    autocast, dtype = autocast_for(device, dtype)
    model = load_model(checkpoint, device)
    check(not vae or meta['vae'], 'the model draws pixels: it has no VAE')
    meta['vae'] = vae or meta['vae']
    vae = load_vae(meta, device)
    check_solver(model.config, method, tol, cfg, trained['label_drop'])
    names = meta['classes']
    classes = range(len(names))         # the numbers of those to draw
    if cls:
        check(cls in names or cls.isdecimal() and int(cls) in classes,
              f'cls must be the name of a class, one of {names}, or a number below {len(names)}')
        classes = [names.index(cls) if cls in names else int(cls)]
    out = out or os.path.join(os.path.dirname(ckpt), 'samples.png')
    check(out.endswith(('.png', '.npz', '/')), 'out must be NAME.png, NAME.npz or NAME/')
    check(out.endswith('/') or not os.path.isdir(out), f'{out} is a folder')

    # All processes write to one array, which becomes what is wanted
    file = f'{out.rstrip("/")}.parts.npy'
    side = meta.get('image_size', meta['size'])
    channels = 3 if vae else meta['channels']
    if rank == 0:
        with exit_on_error(f'cannot write {out}'):
            os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
            check(out[-1] != '/' or not os.listdir(out), f'{out} is not empty')
            new_array(file, np.uint8, (num_samples, side, side, channels))
    barrier()
    images = np.load(file, mmap_mode='r+')
    nfes = []
    for first in tqdm(range(rank * batch_size, num_samples, world * batch_size), disable=rank > 0):
        index = range(first, min(first + batch_size, num_samples))
        with exit_on_error('the samples cannot be drawn: has the model diverged?',
                           FloatingPointError):
            images[index], nfe = draw(model, vae, meta, seed, index, classes, autocast,
                                      method=method, steps=steps, tol=tol, cfg=cfg)
        nfes.append(nfe)
    barrier()
    with exit_on_error(f'cannot write {out}'):
        if out.endswith('/'):
            for i in range(rank, num_samples, world):
                Image.fromarray(images[i].squeeze()).save(f'{out}{i:06}.png')
        elif rank == 0 and out.endswith('.png'):
            save_grid(out, images)
        elif rank == 0 and classes:
            np.savez(out, images, labels_of(range(num_samples), classes))
        elif rank == 0:
            np.savez(out, images)
    barrier()
    if rank == 0:
        os.remove(file)
        effort = f'tol {tol}' if method == 'dopri5' else f'{steps} steps'
        print(f'{num_samples} samples, {method}, {effort}, NFE {np.mean(nfes):.1f}: {out}')
