"""Quality against the number of evaluations, of a checkpoint of a dataset of images.

    python tests/experiments/solvers.py --ckpt out-digits/ckpt.pt
    python tests/experiments/solvers.py --runs=euler:40 --cfg=2 --interval=0.3,0.8
    python tests/experiments/solvers.py --runs=euler:40 --project=True

For each of `runs`, METHOD:STEPS or dopri5:TOLERANCE, it draws the same class-conditional samples,
float32, and prints NFE, seconds, accuracy, Frechet distance, precision and recall (judge.py). Three
experiments change the model on its way: guidance only at times inside `interval`; velocities of
residuals projected onto the space of residuals, v - Up(Down(v)); and the coarsest scale held on its
path to a held-out image of the class, to see how well the others are drawn.
"""
import time

import numpy as np
import torch

import project
from configurator import check, configure
from data import Dataset
from judge import judged, load_judge, restart_under_variant
from model import down, laplacian_pyramid, up
from sample import METHODS, generate, load_checkpoint, load_model, noise_of, to_uint8


class Changed(torch.nn.Module):
    """A model with guidance inside an interval of time, projected residual velocities, a given coarsest velocity."""

    def __init__(self, model, cfg, interval, project):
        super().__init__()
        self.model, self.config, self.cfg, self.interval, self.project = model, model.config, cfg, interval, project
        self.coarsest = None

    def forward(self, x_t, t, y):
        v = self.model(x_t, t, y)
        if self.cfg != 1 and self.interval[0] <= t[0] <= self.interval[1]:
            null = self.model(x_t, t)
            v = {k: null[k] + self.cfg * (v[k] - null[k]) for k in v}
        coarsest = self.config.K - 1
        if self.project:
            v = {k: v[k] if k == coarsest else v[k] - up(down(v[k])) for k in v}
        if self.coarsest is not None:
            v[coarsest] = self.coarsest
        return v


if __name__ == '__main__':
    ckpt = 'out-digits/ckpt.pt'
    dataset = 'digits'
    runs = ('euler:5,euler:10,euler:20,euler:40,euler:80,midpoint:5,midpoint:10,midpoint:20,heun2:5,heun2:10,heun2:20,'
            'rk4:3,rk4:5,rk4:10,dopri5:1e-1,dopri5:1e-2,dopri5:1e-3,dopri5:1e-5')
    num_samples = 2000
    batch_size = 100
    seed = 0
    cfg = 1.0
    interval = (0.0, 1.0)
    project = False
    hold_coarsest = False
    configure(globals())
    check(min(num_samples, batch_size) > 0, 'num_samples and batch_size must be at least 1')
    check(len(interval) == 2, f'interval is two times, not {interval}')
    for run in runs.split(','):
        method, _, number = run.partition(':')
        check(method in METHODS and number[-1:].isdigit(), f'runs are METHOD:STEPS or dopri5:TOLERANCE with commas '
              f'between them, METHOD one of {", ".join(METHODS)}, but there is {run!r}')
    restart_under_variant(ckpt)
    model = load_model(load_checkpoint(ckpt), 'cpu')
    data, config = Dataset(dataset), model.config
    judge, labels = load_judge(data, dataset), torch.arange(num_samples) % config.n_classes
    heldout = [data.eval_index[data.labels[data.rows[data.eval_index]] == c] for c in range(config.n_classes)]
    changed = Changed(model, cfg, interval, project)
    print('| solver | NFE | s per 100 images | accuracy | Frechet | precision | recall |\n' + '| --- ' * 7 + '|')
    for run in runs.split(','):
        method, number = run.split(':')
        settings = dict(tol=float(number)) if method == 'dopri5' else dict(steps=int(number))
        images, nfes, started = [], [], time.time()
        for first in range(0, num_samples, batch_size):
            index = np.arange(first, min(first + batch_size, num_samples))
            noise = noise_of(seed, index, (config.channels, config.size, config.size))
            if hold_coarsest:
                truth = [heldout[i % config.n_classes][i // config.n_classes] for i in index]
                image = laplacian_pyramid(data.batch(truth)[0], config.K)[-1]
                changed.coarsest = image - laplacian_pyramid(noise, config.K)[-1]
            x, nfe = generate(changed, noise, labels[index], method, **settings)
            images.append(torch.from_numpy(to_uint8(x)))
            nfes.append(nfe)
        seconds = (time.time() - started) / num_samples * 100
        row = judged(judge, data, torch.cat(images).permute(0, 3, 1, 2).float() / 127.5 - 1, labels)
        print(f'| {method}, {number} | {np.mean(nfes):.0f} | {seconds:.2f} | {row["accuracy"]:.4f} | '
              f'{row["frechet"]:.2f} | {row["precision"]:.3f} | {row["recall"]:.3f} |', flush=True)
