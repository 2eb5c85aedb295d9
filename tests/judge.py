"""
Judges generated samples of a dataset: a small CNN, trained on its images and kept as data/judge-NAME.pt, reads them.

    python sample.py --ckpt out-digits/ckpt.pt --cfg=1 --num_samples=2000 --out=X.npz
    python tests/judge.py --samples=X.npz

Prints its own held-out accuracy and, of each file, the share of the samples that it reads as their labels; the Frechet
distance, precision and recall (k = 3) between its 128 features of the samples and of as many training images. The same
of 2,000 held-out images is what perfect samples would have.
"""
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from configurator import configure  # noqa: E402
from data import Dataset  # noqa: E402
from fid import frechet_distance, mean_and_covariance, precision_recall  # noqa: E402

EPOCHS = {'digits': 3}      # of other datasets 6


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
    judge, generator = Judge(data.meta['channels'], data.meta['size'], len(data.meta['classes'])), torch.Generator()
    generator.manual_seed(0)
    steps = epochs * data.n_train // 100
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        x, y = data.batch(torch.randint(data.n_train, (100,), generator=generator).numpy())
        F.cross_entropy(judge(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


def load_judge(data, dataset):
    """The judge of a dataset of images, trained if it was not yet."""
    name = os.path.basename(os.path.normpath(dataset))
    cache = f'data/judge-{name}.pt'
    if not os.path.exists(cache):
        judge = train_judge(data, EPOCHS.get(name, 6))
        torch.save(judge.state_dict(), cache)
    judge = Judge(data.meta['channels'], data.meta['size'], len(data.meta['classes']))
    judge.load_state_dict(torch.load(cache, weights_only=True))
    return judge.eval()


@torch.no_grad()
def read(judge, x):
    """Predicted classes and features of images (B, C, H, W) in [-1, 1]."""
    features = torch.cat([judge.features(part) for part in x.split(500)])
    return judge.out(features).argmax(1), features


def compared(a, b):
    """Frechet distance of Gaussians fitted to two feature sets, (n, d) each, and precision and recall of the first."""
    precision, recall = precision_recall(a, b)
    distance = frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))
    return dict(frechet=distance, precision=precision, recall=recall)


def judged(judge, data, x, y):
    """What is printed of images (B, C, H, W) in [-1, 1] and their labels."""
    predicted, features = read(judge, x)
    reference = read(judge, data.batch(np.arange(len(x)))[0])[1]
    return dict(accuracy=(predicted == y).double().mean().item(), **compared(features, reference))


def load_samples(file):
    """Images in [-1, 1] and labels of an .npz of sample.py's."""
    with np.load(file) as arrays:
        images, labels = torch.from_numpy(arrays['arr_0']), torch.from_numpy(arrays['arr_1'])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def print_judged(name, judge, data, x, y):
    numbers = [f'{key} {value:.4f}' for key, value in judged(judge, data, x, y).items()]
    print(f'{name}: {len(x)} images, {", ".join(numbers)}')


if __name__ == '__main__':
    samples = ''            # .npz files of sample.py's, with commas
    dataset = 'digits'
    configure(globals())
    data = Dataset(dataset)
    judge = load_judge(data, dataset)
    if data.meta['heldout'] > 0:
        print_judged('held out', judge, data, *data.batch(data.eval_index[:2000]))
    for file in filter(None, samples.split(',')):
        print_judged(file, judge, data, *load_samples(file))
