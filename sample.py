"""Draws images from a checkpoint: Alg. 2, one ODE in K segments.

    python sample.py --ckpt out-digits/ckpt.pt                              # beside the checkpoint
    python sample.py --ckpt CKPT --num_samples=50000 --out=samples.npz      # ADM's: arr_0, arr_1
    python sample.py --ckpt CKPT --num_samples=100 --out=samples/           # one PNG each
    torchrun --nproc_per_node=8 sample.py --ckpt CKPT ...

Noise and label of sample i depend on (seed, i) alone. With a fixed-step method in float32 its
pixels are the same within one grey level, whatever the batch and the number of processes.
"""
import os
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from torchdiffeq import odeint
from tqdm import tqdm

from configurator import barrier, check, configure, explain, launch, precision
from data import decode, load_vae
from model import LapFlow, LapFlowConfig, hand_over, laplacian_pyramid, reconstruct

METHODS = ('dopri5', 'euler', 'midpoint', 'heun2', 'rk4')       # only dopri5 chooses its own steps


class GuidedVelocity:
    """The model's velocity with classifier-free guidance, v_null + cfg (v_y - v_null).

    Guidance acts on every channel, in one call for twice the batch. nfe counts the evaluations, a
    guided pair as one.
    """

    def __init__(self, model, y, cfg):
        self.model = model
        self.y = y
        self.cfg = cfg
        self.nfe = 0

    def __call__(self, x, t):
        """x is {k: (B, C, H/2^k, W/2^k)}, t a tensor of one number. Returns a dict like x."""
        self.nfe += 1
        B = len(x[max(x)])
        if self.cfg == 1 or self.y is None:
            return self.model(x, t.expand(B), self.y)
        null = torch.full_like(self.y, self.model.config.n_classes)
        twice = {k: torch.cat([x[k], x[k]]) for k in x}
        v = self.model(twice, t.expand(2 * B), torch.cat([self.y, null]))
        guided = {}
        for k in x:
            v_y, v_null = v[k].chunk(2)
            guided[k] = v_null + self.cfg * (v_y - v_null)
        return guided


def odeint_scales(velocity, state, start, end, method, steps, tol):
    """ODEINT of Alg. 2: the state, a dict {k: tensor}, at time `end` from that at `start`.

    A fixed-step method makes a share of the `steps` over [0, 1]. dopri5 chooses its own steps. A
    model that has diverged raises FloatingPointError.
    """
    n = 1
    options = {}
    t_end = torch.tensor([end], device=state[max(state)].device)
    if method == 'dopri5':
        options['step_t'] = t_end       # a step ends here: the model is not asked beyond
    else:
        n = max(1, round(steps * end) - round(steps * start))
    t = torch.linspace(start, end, n + 1, device=t_end.device)

    def ode(time, x):
        time = time.clamp(start, end)   # dopri5's first probe may lie beyond, too
        v = velocity(dict(zip(state, x)), time)
        return tuple(v.values())

    try:
        x = odeint(ode, tuple(state.values()), t, rtol=tol, atol=tol, method=method,
                   options=options)
    except AssertionError as error:     # torchdiffeq's, or a fork's own
        if 'underflow in dt' not in str(error) and 'non-finite' not in str(error):
            raise
        raise FloatingPointError(f'{method} cannot solve the ODE from t = {start:g}: the model has '
                                 'diverged, or needs another method or tol') from error
    return {k: x_k[-1] for k, x_k in zip(state, x)}


@torch.no_grad()
def generate(model, noise, y=None, method='dopri5', steps=50, tol=1e-5, cfg=1.0):
    """Alg. 2: images (B, C, H, W) from noise (B, C, H, W) float32, and the number of evaluations.

    y is (B,) labels or None. method is one of METHODS; dopri5 has the absolute and relative
    tolerance tol, the others make `steps` steps over [0, 1], shared among the segments by their
    length, at least one each. cfg = 1 is the conditional model.
    """
    config = model.config
    x0 = laplacian_pyramid(noise, config.K)
    velocity = GuidedVelocity(model, y, cfg)
    state = {}
    for k in reversed(range(config.K)):
        state = hand_over(state, k, x0, config)
        start, end = config.times[k + 1], config.times[k]
        state = odeint_scales(velocity, state, start, end, method, steps, tol)
    x = reconstruct(list(state.values()))
    if not x.isfinite().all():
        raise FloatingPointError('the images are not finite: the model has diverged')
    return x, velocity.nfe


def noise_of(seed, index, shape):
    """Standard normal noise of the samples in index, (len(index), *shape), each from (seed, i)."""
    noise = []
    for i in index:
        noise.append(np.random.default_rng((seed, i)).standard_normal(shape, np.float32))
    return torch.from_numpy(np.stack(noise))


def labels_of(index, classes):
    """The labels of the samples in index: they go through the given classes in turn."""
    return [classes[i % len(classes)] for i in index]


def to_uint8(x):
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8 array, rounded once."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).byte()
    return x.permute(0, 2, 3, 1).cpu().numpy()


def draw(model, vae, meta, seed, index, classes, autocast, **solver):
    """The pictures of the samples in index, (B, H, W, C) uint8, and the number of evaluations.

    meta is the dataset's. classes are the numbers of those to draw. solver has more arguments of
    `generate`. dopri5 runs in float32: rounding can make it reject its steps.
    """
    config = model.config
    device = next(model.parameters()).device
    noise = noise_of(seed, index, (config.channels, config.size, config.size)).to(device)
    y = None
    if config.n_classes > 0:
        y = torch.tensor(labels_of(index, classes), device=device)
    if solver['method'] == 'dopri5':
        autocast = nullcontext()
    with autocast:
        x, nfe = generate(model, noise, y, **solver)
    return to_uint8(decode(vae, x, meta)), nfe


def save_grid(file, images, columns=10):
    """Writes (N, H, W, C) uint8 images as one picture, row by row."""
    N, H, W, C = images.shape
    rows = (N + columns - 1) // columns
    canvas = np.zeros((rows * columns, H, W, C), np.uint8)
    canvas[:N] = images
    canvas = canvas.reshape(rows, columns, H, W, C).swapaxes(1, 2)
    Image.fromarray(canvas.reshape(rows * H, columns * W, C).squeeze()).save(file)


def load_checkpoint(file):
    """The dict that train.py saved, on the CPU. Tensors are read when they are used."""
    with explain(f'{file!r} is not a checkpoint of this train.py, or is damaged',
                 RuntimeError, KeyError, TypeError):
        checkpoint = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        LapFlowConfig(**checkpoint['model_args'])
    return checkpoint


def load_model(checkpoint, device):
    """The model of a checkpoint, with its EMA weights if it has any, in evaluation mode."""
    model = LapFlow(LapFlowConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    return model.to(device).eval()


def sampling_defaults(settings):
    """The settings of `generate` that the checkpoint carries, for `configure`."""
    config = load_checkpoint(settings['ckpt'])['config']
    return {key: config[key] for key in ('method', 'steps', 'tol', 'cfg')}


def check_solver(config, method, tol, cfg):
    """Ends the script with one sentence if `generate` cannot take these."""
    check(method in METHODS, f'method must be one of {", ".join(METHODS)}, but it is {method!r}')
    check(tol > 0, f'tol must be more than 0, but it is {tol}')
    check(cfg == 1 or config.n_classes, 'the model is unconditional, so cfg must be 1: --cfg=1')


if __name__ == '__main__':
    ckpt = 'out/ckpt.pt'
    out = ''                # NAME.png, NAME.npz or a new folder NAME/; '' is beside the checkpoint
    num_samples = 100
    batch_size = 100        # of each process
    cls = ''                # a class, by name or number, for all samples; '': all classes in turn
    seed = 0
    vae = ''                # where the VAE is, if it is not where it was in training
    method = 'dopri5'       # these four: the checkpoint's own, unless given
    steps = 50
    tol = 1e-5
    cfg = 1.0
    device = 'auto'
    dtype = 'float32'       # TF32 on GPUs; bfloat16 and auto are for fixed-step methods
    configure(globals(), at_least_1='num_samples batch_size steps', inherit=sampling_defaults)

    device, rank, world = launch(device)
    checkpoint = load_checkpoint(ckpt)
    model = load_model(checkpoint, device)
    meta = checkpoint['data']
    meta['vae'] = vae or meta['vae']
    vae = load_vae(meta, device)
    check_solver(model.config, method, tol, cfg)
    check(dtype != 'bfloat16' or method != 'dopri5', 'dopri5 needs float32')
    autocast, dtype = precision(device, dtype)
    classes = range(model.config.n_classes)
    if cls in meta['classes']:
        classes = [meta['classes'].index(cls)]
    elif cls:
        check(cls.isdecimal() and int(cls) in classes, f'cls must be the name of a class or a '
              f'number below {len(classes)}, but it is {cls!r}')
        classes = [int(cls)]
    out = out or os.path.join(os.path.dirname(ckpt), 'samples.png')
    check(out.endswith(('.png', '.npz', '/')), f'out must end in .png, .npz or /, not {out!r}')

    # Every process writes its images to one array; then they become what is wanted
    file = f'{out.rstrip("/")}.npy'
    shape = num_samples, meta['image_size'], meta['image_size'], 3 if vae else meta['channels']
    if rank == 0:
        with explain(f'cannot write {out}, or it exists'):
            os.makedirs(os.path.dirname(out) or '.', exist_ok=not out.endswith('/'))
            np.lib.format.open_memmap(file, 'w+', np.uint8, shape)
    barrier()
    images = np.load(file, mmap_mode='r+')
    for first in tqdm(range(rank * batch_size, num_samples, world * batch_size), disable=rank > 0):
        index = range(first, min(first + batch_size, num_samples))
        with explain('these samples cannot be drawn', FloatingPointError):
            images[index], nfe = draw(model, vae, meta, seed, index, classes, autocast,
                                      method=method, steps=steps, tol=tol, cfg=cfg)
    barrier()
    with explain(f'cannot write {out}'):
        if out.endswith('/'):
            for i in range(rank, num_samples, world):
                Image.fromarray(images[i].squeeze()).save(f'{out}{i:06}.png')
        elif rank == 0 and out.endswith('.png'):
            save_grid(out, images)
        elif rank == 0:
            arrays = dict(arr_0=images)
            if classes:
                arrays['arr_1'] = labels_of(range(num_samples), classes)
            np.savez(out, **arrays)
    if rank == 0:
        os.remove(file)
        print(f'{num_samples} samples, {method}, NFE {nfe}: {out}')
