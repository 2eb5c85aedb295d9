"""Judges samples of a dataset: a small CNN reads them, trained once, kept as data/judge-NAME.pt.

    python sample.py --ckpt out-digits/ckpt.pt --cfg=1 --num_samples=2000 --out=X.npz
    python tests/experiments/judge.py --samples=X.npz

Prints its own held-out accuracy and, of each file, the share of the samples that it reads as their labels; the Frechet
distance, precision and recall (k = 3) between its 128 features of the samples and of as many training images, the first
of each class. The same of 2,000 held-out images is what perfect samples would have.
"""
import os
import subprocess
import sys

import numpy as np
import torch
import torch.nn as nn

import project
from configurator import configure, exit_on_error
from data import Dataset
from fid import frechet_distance, mean_and_covariance, precision_recall
from model import LapFlowConfig


class Judge(nn.Module):
    def __init__(self, channels, size, n_classes):
        super().__init__()
        layers = []
        for width in (32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (size // 8) ** 2, 128), nn.ReLU())
        self.out = nn.Linear(128, n_classes)

    def forward(self, x):
        return self.out(self.features(x))


def train_judge(data, epochs):
    torch.manual_seed(0)
    judge = Judge(data.meta['channels'], data.meta['size'], len(data.meta['classes']))
    generator = torch.Generator().manual_seed(0)
    steps = epochs * data.n_train // 100
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        x, y = data.batch(torch.randint(data.n_train, (100,), generator=generator).numpy())
        nn.functional.cross_entropy(judge(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


def load_judge(data, dataset):
    """The judge of a dataset of images, trained if it was not yet."""
    name = os.path.basename(os.path.normpath(dataset))
    cache = f'data/judge-{name}.pt'
    if not os.path.exists(cache):
        torch.save(train_judge(data, 3 if name == 'digits' else 6).state_dict(), cache)
    judge = Judge(data.meta['channels'], data.meta['size'], len(data.meta['classes']))
    judge.load_state_dict(torch.load(cache, weights_only=True))
    return judge.eval()


@torch.no_grad()
def read(judge, x):
    """Predicted classes and features of images (B, C, H, W) in [-1, 1]."""
    features = torch.cat([judge.features(part) for part in x.split(500)])
    return judge.out(features).argmax(1), features


def judged(judge, data, x, y):
    """What is printed of images (B, C, H, W) in [-1, 1] and their labels."""
    labels = data.labels[data.rows[:data.n_train]]      # perhaps in order of the classes
    first = [np.flatnonzero(labels == c)[:n] for c, n in enumerate(y.bincount())]
    predicted, features = read(judge, x)
    _, reference = read(judge, data.batch(np.concatenate(first))[0])
    precision, recall = precision_recall(features, reference)
    distance = frechet_distance(*mean_and_covariance(features), *mean_and_covariance(reference))
    return dict(accuracy=(predicted == y).double().mean().item(), frechet=distance,
                precision=precision, recall=recall)


def load_samples(file):
    """Images in [-1, 1] and labels of an .npz of sample.py's."""
    arrays = np.load(file)
    images = torch.from_numpy(arrays['arr_0']).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.from_numpy(arrays['arr_1'])


def restart_under_variant(ckpt):
    """Runs a tool again, in place of this process, under the variant that a checkpoint records."""
    with exit_on_error(f'{ckpt!r} is not a checkpoint'):
        args = torch.load(ckpt, map_location='cpu', weights_only=True, mmap=True)['model_args']
    if 'variant' in args and 'variant' not in LapFlowConfig.__dataclass_fields__:
        tool = f'tests/experiments/{os.path.basename(sys.argv[0])}'
        command = [f'{project.ROOT}/tests/variants.py', args['variant'], tool, *sys.argv[1:]]
        raise SystemExit(subprocess.call([sys.executable, *command]))


if __name__ == '__main__':
    samples = ''            # .npz files of sample.py's, with commas
    dataset = 'digits'
    configure(globals())
    data = Dataset(dataset)
    judge = load_judge(data, dataset)
    files = {file: load_samples(file) for file in samples.split(',') if file}
    if data.meta['heldout'] > 0:
        files = {'held out': data.batch(data.eval_index[:2000])} | files
    for name, (x, y) in files.items():
        numbers = [f'{key} {value:.4f}' for key, value in judged(judge, data, x, y).items()]
        print(f'{name}: {len(x)} images, {", ".join(numbers)}')
