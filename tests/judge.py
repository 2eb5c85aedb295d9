"""
Judges digits: a small CNN, trained on data/digits, reads generated samples.

    python sample.py --ckpt out-digits/ckpt.pt --cfg=1 --method=euler --steps=40 --num_samples=2000 --out=X.npz
    python tests/judge.py X.npz

Prints its own held-out accuracy, the share of the samples that it reads as their labels, and the Frechet distance
between its 128 features of the samples and of as many training images (beside it, that of the held-out images: what is
perfect).
"""
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from data import Dataset  # noqa: E402
from fid import frechet_distance  # noqa: E402


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in (32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU())
        self.out = nn.Linear(128, 10)

    def forward(self, x):
        return self.out(self.features(x))


def train_judge(data, epochs=3):
    torch.manual_seed(0)
    judge, generator = Judge(), torch.Generator().manual_seed(0)
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


def frechet(a, b):
    """Frechet distance of Gaussians fitted to two feature sets, (n, d) each."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


@torch.no_grad()
def read(judge, x):
    """Predicted classes and features of images (B, 1, 32, 32) in [-1, 1]."""
    features = torch.cat([judge.features(part) for part in x.split(500)])
    return judge.out(features).argmax(1).numpy(), features.numpy()


def load_judge(data, cache='data/judge.pt'):
    judge = Judge()
    if os.path.exists(cache):
        judge.load_state_dict(torch.load(cache, weights_only=True))
        return judge.eval()
    judge = train_judge(data)
    torch.save(judge.state_dict(), cache)
    return judge


if __name__ == '__main__':
    data = Dataset('digits')
    judge = load_judge(data)
    x, y = data.batch(data.heldout)
    predicted, held_features = read(judge, x)
    accuracy = (predicted == y.numpy()).mean()
    reference = read(judge, data.batch(np.arange(len(x)))[0])[1]
    print(f'judge: held-out accuracy {accuracy:.4f}, '
          f'Frechet distance held-out to training images {frechet(held_features, reference):.2f}')
    for file in sys.argv[1:]:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays['arr_0'], arrays['arr_1']
        predicted, features = read(judge, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
        print(f'{file}: {len(images)} samples, accuracy {(predicted == labels).mean():.4f}, '
              f'Frechet distance {frechet(features, reference):.2f}, by class',
              ' '.join(f'{(predicted[labels == c] == c).mean():.3f}' for c in range(10)))
