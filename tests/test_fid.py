"""What fid.py promises, each promise against an oracle of its own: no network, random weights, a dozen images."""
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

import fid
from conftest import finish, run_in, start_two
from data import center_crop


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """On busy cores threads wait for each other, up to a thousand times longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The oracle: torchvision's inception.py with pytorch-fid's FIDInceptionA, C, E_1 and E_2 --------------------------

class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return self.bn(self.conv(x)).clamp(min=0)


def average(x):
    """Of 3 x 3 neighbours, those beyond the border not counted."""
    kernel, (B, C, H, W) = torch.ones(1, 1, 3, 3), x.shape
    sums = F.conv2d(x.reshape(B * C, 1, H, W), kernel, padding=1).reshape(x.shape)
    return sums / F.conv2d(torch.ones(1, 1, H, W), kernel, padding=1)


class InceptionA(nn.Module):
    def __init__(self, c_in, pool_features, d):
        super().__init__()
        self.branch1x1 = Conv(c_in, 64 // d, 1)
        self.branch5x5_1 = Conv(c_in, 48 // d, 1)
        self.branch5x5_2 = Conv(48 // d, 64 // d, 5, padding=2)
        self.branch3x3dbl_1 = Conv(c_in, 64 // d, 1)
        self.branch3x3dbl_2 = Conv(64 // d, 96 // d, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96 // d, 96 // d, 3, padding=1)
        self.branch_pool = Conv(c_in, pool_features, 1)

    def forward(self, x):
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(average(x))], 1)


class InceptionB(nn.Module):
    def __init__(self, c_in, d):
        super().__init__()
        self.branch3x3 = Conv(c_in, 384 // d, 3, stride=2)
        self.branch3x3dbl_1 = Conv(c_in, 64 // d, 1)
        self.branch3x3dbl_2 = Conv(64 // d, 96 // d, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96 // d, 96 // d, 3, stride=2)

    def forward(self, x):
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class InceptionC(nn.Module):
    def __init__(self, c_in, c7, d):
        super().__init__()
        self.branch1x1 = Conv(c_in, 192 // d, 1)
        self.branch7x7_1 = Conv(c_in, c7, 1)
        self.branch7x7_2 = Conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7_3 = Conv(c7, 192 // d, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = Conv(c_in, c7, 1)
        self.branch7x7dbl_2 = Conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = Conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = Conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = Conv(c7, 192 // d, (1, 7), padding=(0, 3))
        self.branch_pool = Conv(c_in, 192 // d, 1)

    def forward(self, x):
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(average(x))], 1)


class InceptionD(nn.Module):
    def __init__(self, c_in, d):
        super().__init__()
        self.branch3x3_1 = Conv(c_in, 192 // d, 1)
        self.branch3x3_2 = Conv(192 // d, 320 // d, 3, stride=2)
        self.branch7x7x3_1 = Conv(c_in, 192 // d, 1)
        self.branch7x7x3_2 = Conv(192 // d, 192 // d, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192 // d, 192 // d, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192 // d, 192 // d, 3, stride=2)

    def forward(self, x):
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(branch7x7x3),
                          F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class InceptionE(nn.Module):
    def __init__(self, c_in, pool, d, d_out):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(c_in, 320 // d_out, 1)
        self.branch3x3_1 = Conv(c_in, 384 // d, 1)
        self.branch3x3_2a = Conv(384 // d, 384 // d_out, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384 // d, 384 // d_out, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(c_in, 448 // d, 1)
        self.branch3x3dbl_2 = Conv(448 // d, 384 // d, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384 // d, 384 // d_out, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384 // d, 384 // d_out, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(c_in, 192 // d_out, 1)

    def forward(self, x):
        branch3x3, branch3x3dbl = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3),
                          self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl),
                          self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The published network, or one that is narrower, but for its 2048 features, and faster: d divides the widths."""

    def __init__(self, d=1):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32 // d, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32 // d, 32 // d, 3)
        self.Conv2d_2b_3x3 = Conv(32 // d, 64 // d, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64 // d, 80 // d, 1)
        self.Conv2d_4a_3x3 = Conv(80 // d, 192 // d, 3)
        self.Mixed_5b = InceptionA(192 // d, 32 // d, d)
        self.Mixed_5c = InceptionA(256 // d, 64 // d, d)
        self.Mixed_5d = InceptionA(288 // d, 64 // d, d)
        self.Mixed_6a = InceptionB(288 // d, d)
        self.Mixed_6b = InceptionC(768 // d, 128 // d, d)
        self.Mixed_6c = InceptionC(768 // d, 160 // d, d)
        self.Mixed_6d = InceptionC(768 // d, 160 // d, d)
        self.Mixed_6e = InceptionC(768 // d, 192 // d, d)
        self.Mixed_7a = InceptionD(768 // d, d)
        self.Mixed_7b = InceptionE(1280 // d, average, d, d)
        self.Mixed_7c = InceptionE(2048 // d, lambda x: F.max_pool2d(x, kernel_size=3, stride=1, padding=1), d, 1)
        self.fc = nn.Linear(2048, 1008)         # unused, but part of the weights

    @torch.no_grad()
    def forward(self, images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        x = 2 * F.interpolate(x, size=(299, 299), mode='bilinear', align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def random_inception(d):
    """The oracle with random weights under which activations keep their size and no batch norm does nothing."""
    torch.manual_seed(0)
    net = Inception(d).eval()
    for name, w in net.state_dict().items():
        if name.endswith('conv.weight'):
            w.normal_(0, (2 / w[0].numel()) ** 0.5)
        elif name.endswith(('bn.weight', 'running_var')):
            w.uniform_(0.5, 1.5)
        elif name.endswith(('bn.bias', 'running_mean')):
            w.normal_(0, 0.2)
    net.Conv2d_1a_3x3.bn.running_var.mul_(0.02)     # smooth pictures: there eps = 1e-3 shows
    return net


def pictures(n, size, seed=0):
    """n uint8 pictures of broad and fine structure, size x size x 3."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (0.6 * coarse + 0.4 * rng.uniform(0, 255, coarse.shape)).round().astype(np.uint8)


@pytest.mark.parametrize('d, size', [(1, 32), (16, 400), (16, 299)])
def test_inception_is_the_published_network(d, size):
    net, images = random_inception(d), pictures(2, size)
    expected, features = net(images), fid.inception_features(net.state_dict(), torch.from_numpy(images))
    assert features.shape == (2, 2048) and features.dtype == torch.float32 and expected.std() > 0.01
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_inception_has_torchvisions_parameters():
    shapes = {name: tuple(w.shape) for name, w in Inception().state_dict().items()}
    assert len(shapes) == 566 and sum(name.endswith('conv.weight') for name in shapes) == 94
    known = {'Conv2d_1a_3x3.conv.weight': (32, 3, 3, 3), 'Conv2d_4a_3x3.bn.num_batches_tracked': (),
             'Mixed_5b.branch5x5_2.conv.weight': (64, 48, 5, 5), 'Mixed_5d.branch_pool.conv.weight': (64, 288, 1, 1),
             'Mixed_6a.branch3x3.conv.weight': (384, 288, 3, 3), 'Mixed_6c.branch7x7_2.conv.weight': (160, 160, 1, 7),
             'Mixed_6e.branch7x7dbl_4.conv.weight': (192, 192, 7, 1), 'Mixed_7a.branch7x7x3_4.bn.bias': (192,),
             'Mixed_7a.branch3x3_2.conv.weight': (320, 192, 3, 3),
             'Mixed_7b.branch3x3_2a.conv.weight': (384, 384, 1, 3),
             'Mixed_7c.branch3x3dbl_2.conv.weight': (384, 448, 3, 3), 'Mixed_7c.branch3x3dbl_3b.bn.running_var': (384,),
             'Mixed_7c.branch1x1.conv.weight': (320, 2048, 1, 1), 'fc.weight': (1008, 2048), 'fc.bias': (1008,)}
    assert {name: shapes.get(name) for name in known} == known


def test_weights_are_of_a_file_or_the_published_ones(place, monkeypatch):
    weights = fid.load_inception(str(place / 'weights.pth'), 'cpu')
    assert len(weights) == 566 and weights.keys() == random_inception(16).state_dict().keys()
    asked = []
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', lambda *a, **k: asked.append((a, k)) or weights)
    assert fid.load_inception('', 'cpu') is weights
    [((url,), options)] = asked
    assert url == fid.URL and options['check_hash'] and options['weights_only'] and '-6726825d.pth' in url


# --- Statistics -------------------------------------------------------------------------------------------------------

def numbered(i):
    """Image i, of 1 x 2 grey pixels: its number."""
    return np.array([[[i // 256], [i % 256]]], np.uint8)


@pytest.fixture
def features_are(monkeypatch):
    """features_are(x): the features of the image `numbered(i)` are x[i], whatever the weights."""
    def features_are(x):
        def look_up(weights, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (1, 2, 3)
            assert (images == images[..., :1]).all()
            i, j = images[:, 0, :, 0].long().T
            return torch.from_numpy(x)[256 * i + j]
        monkeypatch.setattr(fid, 'inception_features', look_up)
    return features_are


@pytest.mark.parametrize('batch_size', [64, 400, 1])
def test_statistics_of_features_are_numpys(batch_size, features_are):
    deviation = np.geomspace(1e-2, 1, 2048)
    x = np.random.default_rng(0).normal(0.5, deviation, (300, 2048)).astype(np.float32)
    features_are(x)
    order = np.random.default_rng(1).permutation(300)
    features = fid.extract({}, dict(read=numbered, items=order, size=(1, 2)), batch_size, 'cpu', 0, 1)
    assert features.dtype == torch.float32 and (features.numpy() == x[order]).all()
    mu, sigma = fid.mean_and_covariance(features)
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(mu, x64.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x64, rowvar=False), rtol=1e-9, atol=1e-14)
    assert mu.dtype == sigma.dtype == np.float64 and (features.numpy() == x[order]).all()      # as they were


@pytest.mark.parametrize('world', [2, 3, 9])
@pytest.mark.parametrize('batch_size', [1, 2, 7])
def test_the_shares_of_processes_join_in_the_order_of_images(world, batch_size, features_are, monkeypatch):
    """Image i has the features i + 1. Each is read by one process."""
    features_are(np.repeat(np.arange(1, 8, dtype=np.float32)[:, None], 2048, 1))
    sent, reads = [], []
    images = dict(read=lambda i: reads.append(i) or numbered(i), items=range(7), size=(1, 2))
    monkeypatch.setattr(fid, 'all_sum', lambda part: sent.append(part.clone()) or part)
    for rank in range(world):
        fid.extract({}, images, batch_size, 'cpu', rank, world)
    assert len(sent) == world and sorted(reads) == list(range(7))
    monkeypatch.setattr(fid, 'all_sum', lambda part: part.copy_(sum(sent)))
    for rank in (0, world - 1):
        features = fid.extract({}, images, batch_size, 'cpu', rank, world)
        assert features.shape == (7, 2048) and (features == torch.arange(1, 8)[:, None]).all()
    mu, sigma = fid.mean_and_covariance(features)
    np.testing.assert_allclose(mu, 4, rtol=1e-12)
    np.testing.assert_allclose(sigma, 28 / 6, rtol=1e-12)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    D = 24
    mu1, mu2, v1, v2 = rng.normal(size=D), rng.normal(size=D), rng.uniform(1e-6, 9, D), rng.uniform(1e-6, 9, D)
    closed = ((mu1 - mu2) ** 2).sum() + ((v1 ** 0.5 - v2 ** 0.5) ** 2).sum()
    Q = np.linalg.qr(rng.normal(size=(D, D)))[0]
    rank = v1 * (np.arange(D) < 9)
    closed_rank = ((mu1 - mu2) ** 2).sum() + ((rank ** 0.5 - v2 ** 0.5) ** 2).sum()
    for R in (np.eye(D), Q):    # diagonal, commuting
        assert fid.frechet_distance(mu1, R * v1 @ R.T, mu2, R * v2 @ R.T) == pytest.approx(closed, rel=1e-8)
        assert fid.frechet_distance(mu1, R * rank @ R.T, mu2, R * v2 @ R.T) == pytest.approx(closed_rank, rel=1e-8)
        assert fid.frechet_distance(mu1, R * v2 @ R.T, mu2, R * rank @ R.T) == pytest.approx(closed_rank, rel=1e-6)
    a, b = (np.cov(rng.normal(size=(200, D)) @ rng.normal(size=(D, D)), rowvar=False) for _ in range(2))
    general = ((mu1 - mu2) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert fid.frechet_distance(mu1, a, mu2, b) == pytest.approx(general, rel=1e-8)
    assert fid.frechet_distance(mu2, b, mu1, a) == pytest.approx(general, rel=1e-8)


@pytest.mark.parametrize('n, D', [(1000, 64), (12, 300), (2, 300)])
def test_frechet_distance_of_a_set_to_itself_is_zero(n, D):
    x = np.random.default_rng(n).gamma(0.5, size=(n, D))
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    shuffled = np.cov(x[::-1], rowvar=False)
    assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) < 1e-6
    assert 0 <= fid.frechet_distance(mu, sigma, mu, shuffled) < 1e-6
    assert fid.frechet_distance(mu, 0 * sigma, mu, sigma) == pytest.approx(np.trace(sigma))     # all images alike


def test_frechet_distance_of_few_samples_is_exact():
    rng = np.random.default_rng(0)
    x, y = rng.gamma(0.5, 3, size=(12, 300)), rng.gamma(0.5, size=(4000, 300))
    (mu1, S1), (mu2, S2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    # tr sqrt(S1 S2) is the nuclear norm of A^T L, where A A^T = S1 and L L^T = S2: no eigenvalue, no root.
    roots = np.linalg.svd((x - mu1) @ np.linalg.cholesky(S2), compute_uv=False).sum() / 11 ** 0.5
    expected = ((mu1 - mu2) ** 2).sum() + S1.trace() + S2.trace() - 2 * roots
    assert fid.frechet_distance(mu1, S1, mu2, S2) == pytest.approx(expected, rel=1e-10)


def brute_force(samples, reference, k):
    """Kynkaanniemi et al. 2019 as loops over pairs."""
    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b))

    def share(points, centres):
        radii = [sorted(squared(c, o) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)]
        return sum(any(squared(p, c) <= r for c, r in zip(centres, radii)) for p in points) / len(points)
    samples, reference = samples.tolist(), reference.tolist()
    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize('kind', ['normal', 'ties', 'duplicates', 'overlap', 'zeros'])
@pytest.mark.parametrize('k', [1, 3])
def test_precision_and_recall_are_those_of_all_pairs(kind, k):
    rng = np.random.default_rng(1)
    samples, reference = rng.normal(size=(40, 5)), rng.normal(0.3, 1.5, size=(31, 5))
    if kind == 'ties':
        samples, reference = rng.integers(0, 3, (40, 5)), rng.integers(0, 4, (31, 5))
    if kind == 'duplicates':
        samples, reference = samples[rng.integers(0, 9, 40)], np.concatenate([reference[:20], samples[:11]])
    if kind == 'overlap':       # every radius is met exactly by some pair
        reference = samples[:31]
    if kind == 'zeros':
        samples, reference = samples * 0, reference * 0
    samples, reference = samples.astype(np.float32), reference.astype(np.float32)
    expected = brute_force(samples.astype(np.float64), reference.astype(np.float64), k)
    found = fid.precision_recall(torch.from_numpy(samples), torch.from_numpy(reference), k)
    assert found == pytest.approx(expected, abs=1e-12)


def test_equal_distances_are_equal_at_inceptions_width():
    torch.manual_seed(0)
    x = torch.rand(30, 2048).repeat(4, 1)[torch.randperm(120)]    # balls of radius 0, which any rounding empties
    assert fid.precision_recall(x[:90], x) == fid.precision_recall(x[:90] + 0, x.flip(0)) == (1, 1)
    x = torch.randint(0, 3, (40, 2048)).float()
    y = torch.cat([x[:20], x[20:31] + torch.eye(2048)[:11]])
    assert fid.precision_recall(x, y) == pytest.approx(brute_force(x, y, 3))


def test_distances_are_exact_far_from_zero():
    torch.manual_seed(0)
    x, y = 100 + 0.1 * torch.randn(40, 2048), 100 + 0.1 * torch.randn(31, 2048)     # |x|^2 is 500,000 times |x - y|^2
    precision, recall = brute_force(x.double(), y.double(), 3)
    assert 0 < precision < 1 and 0 < recall < 1
    assert fid.precision_recall(x, y) == pytest.approx((precision, recall))


# --- The command line -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def net():
    return random_inception(16)


@pytest.fixture(scope='module')
def place(tmp_path_factory, net):
    """A folder with weights and the same pictures in every form: a/, a.npz, dataset-a/, likewise b."""
    folder = tmp_path_factory.mktemp('fid')
    torch.save(net.state_dict(), folder / 'weights.pth')
    a, b = pictures(5, 32, 1), pictures(7, 32, 2)
    b[:5] = 0.8 * a + 0.2 * b[:5]      # near each other, so that precision and recall are not just 0 or 1
    for name, images in (('a', a), ('b', b)):
        for i, image in enumerate(images):
            os.makedirs(folder / name / f'class{i % 2}', exist_ok=True)
            Image.fromarray(image).save(folder / name / f'class{i % 2}' / f'{i}.png')
        images = np.concatenate([images[::2], images[1::2]])        # in the order of the files
        np.savez(folder / f'{name}.npz', arr_0=images, arr_1=np.zeros(len(images)))
        np.savez_compressed(folder / f'{name}-small.npz', arr_0=images)
        with_others = np.concatenate([images[:2], images[:1] * 0, images[2:], images[:2] // 2])
        prepare(folder / f'dataset-{name}', with_others, heldout=2, unreadable=2)
    return folder


def prepare(folder, images, heldout, unreadable=None):
    """A dataset of images (N, H, W, C) or latents (N, 1, 2C, H, W)."""
    os.makedirs(folder)
    N, size, channels, vae = len(images), images.shape[2], images.shape[3], ''
    if images.ndim == 5:
        size, channels, vae = images.shape[3], images.shape[2] // 2, 'some VAE'
    np.save(folder / ('latents.npy' if vae else 'images.npy'), images)
    np.save(folder / 'labels.npy', np.where(np.arange(N) == unreadable, -1, 0))
    meta = dict(source='test', size=size, channels=channels, image_size=32, count=N, heldout=heldout, flips=1,
                classes=[], vae=vae, scaling_factor=1.0)
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.fixture
def cli(place, capsys):
    """cli('--samples=..', ...) -> (numbers of the last line, all output, the sentence it ended with), in `place`."""
    def cli(*args, weights='weights.pth'):
        message = run_in(place, 'fid.py', f'--inception={weights}', '--device=cpu', '--batch_size=4', *args)
        out = capsys.readouterr().out
        return json.loads(out.splitlines()[-1]) if not message else None, out, message
    return cli


@pytest.fixture(scope='module')
def expected(place, net):
    """What every form of a against b must give, by the oracles."""
    a, b = (net(np.load(place / f'{name}.npz')['arr_0']).double().numpy() for name in 'ab')
    # The roots of the eigenvalues of S1 S2 are the singular values of A B^T, where A^T A = S1 and B^T B = S2
    A, B = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum()
    distance -= 2 * np.linalg.norm(A @ B.T, 'nuc')
    pr, pr4 = brute_force(a, b, 3), brute_force(a[:4], b[:4], 3)
    assert distance > 1e-3 and 0 < pr[1] < 1 and pr4 != pr and pr4 != (0, 0)
    return dict(fid=distance, pr=pr, pr4=pr4, mu=b.mean(0), sigma=B.T @ B)


def close(numbers, expected):
    return (numbers['fid'] == pytest.approx(expected['fid'], rel=1e-4)
            and (numbers['precision'], numbers['recall']) == pytest.approx(expected['pr'])
            and (numbers['n_samples'], numbers['n_ref'], numbers['pr_samples'], numbers['pr_ref']) == (5, 7, 5, 7))


@pytest.mark.parametrize('form', ['a', 'a.npz', 'a-small.npz', 'dataset-a'])
def test_every_form_of_a_set_has_the_same_pixels(form, place):
    images = fid.open_images(str(place / form), 0)
    read, items = images['read'], images['items']
    pixels = np.load(place / 'a.npz')['arr_0']
    assert len(items) == 5 and images['size'] == (32, 32)
    for i in (0, 1, 2, 3, 4, 3, 0):     # also backwards, as a second pass
        assert read(items[i]).dtype == np.uint8 and np.array_equal(read(items[i]), pixels[i])


def test_a_dataset_and_a_folder_give_the_numbers_of_their_pixels(cli, expected, place):
    numbers, out, message = cli('--samples=dataset-a', '--ref=b')
    assert message == '' and close(numbers, expected)
    stated = dict(samples='dataset-a', ref='b', size=[32, 32], inception='weights.pth')
    assert {key: numbers[key] for key in stated} == stated and 'up to 2,048' in out
    assert set(numbers) == {'samples', 'ref', 'n_ref', 'size', 'inception', 'fid', 'n_samples', 'precision', 'recall',
                            'pr_samples', 'pr_ref'}


def test_statistics_are_kept_and_compared(cli, expected, place):
    numbers, out, message = cli('--ref=b', '--save_stats=b-stats.npz')
    assert message == '' and numbers['n_ref'] == 7 and 'fid' not in numbers
    with np.load(place / 'b-stats.npz') as f:
        np.testing.assert_allclose(f['mu'], expected['mu'], rtol=1e-4, atol=1e-7 * expected['mu'].max())
        np.testing.assert_allclose(f['sigma'], expected['sigma'], rtol=1e-2, atol=1e-5 * expected['sigma'].max())
        assert f['count'] == 7 and f['mu'].dtype == f['sigma'].dtype == np.float64
    numbers, out, message = cli('--samples=a', '--ref=b-stats.npz')
    assert numbers['fid'] == pytest.approx(expected['fid'], rel=1e-4) and numbers['n_ref'] == 7
    assert 'precision' not in numbers and 'pr_samples' not in numbers


def test_adms_statistics_are_statistics(cli, expected, place):
    """Their sample images are not used. Their count is not stated, nor made up where they are kept as one's own."""
    images = np.load(place / 'b.npz')['arr_0']
    np.savez(place / 'adm.npz', mu=expected['mu'], sigma=expected['sigma'], mu_s=0, arr_0=images)
    numbers, out, message = cli('--samples=a', '--ref=adm.npz', '--pr_samples=4')
    assert numbers['fid'] == pytest.approx(expected['fid'], rel=1e-4) and numbers['n_ref'] == 0
    assert not {'precision', 'recall', 'pr_samples', 'pr_ref'} & set(numbers)
    assert cli('--ref=adm.npz', '--save_stats=adm-again.npz')[2] == ''
    again, _, message = cli('--samples=a', '--ref=adm-again.npz')
    assert message == '' and again['fid'] == pytest.approx(numbers['fid'], rel=1e-9) and again['n_ref'] == 0


def test_the_distance_is_printed_before_statistics_are_written(place, cli, expected):
    """So it is not lost where the disk is full; here a folder has the file's name."""
    os.makedirs(place / 'taken.npz')
    _, out, message = cli('--samples=a', '--ref=b', '--save_stats=taken.npz')
    assert 'cannot write taken.npz (IsADirectoryError: ' in message and '\n' not in message
    assert close(json.loads(out.splitlines()[-1]), expected)


def test_an_output_folder_that_is_not_there_is_said_before_the_work(cli, place):
    """And before any file is opened: there is no other."""
    message = cli('--samples=none', '--ref=none.npz', '--save_stats=nowhere/x.npz', weights='none.pth')[2]
    assert "no folder for 'nowhere/x.npz'" in message and '\n' not in message
    message = cli('--samples=none', '--ref=none.npz', '--save_stats=weights.pth/x.npz', weights='none.pth')[2]
    assert "no folder for 'weights.pth/x.npz'" in message
    os.makedirs(place / 'somewhere')
    assert cli('--ref=b', '--save_stats=somewhere/x.npz')[2] == '' and (place / 'somewhere' / 'x.npz').exists()


def test_statistics_go_to_an_npz(cli):
    message = cli('--samples=none', '--ref=none.npz', '--save_stats=x.txt', weights='none.pth')[2]
    assert 'save_stats must be NAME.npz' in message and '\n' not in message


@pytest.mark.filterwarnings('ignore:invalid value')     # of inf - inf
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_statistics_that_are_not_finite_are_refused_and_not_written(value, cli, place, net):
    """They may come from weights, or from a file."""
    weights = {name: w.clone() for name, w in net.state_dict().items()}
    weights['Mixed_7c.branch1x1.bn.bias'][3] = abs(value)       # a negative one would become 0
    torch.save(weights, place / 'broken.pth')
    for args in (('--ref=b', '--save_stats=broken.npz'), ('--samples=a', '--ref=b', '--save_stats=broken.npz')):
        message = cli(*args, weights='broken.pth')[2]
        assert 'not finite' in message and '\n' not in message and not (place / 'broken.npz').exists()
    mu, sigma = np.zeros(2048), np.eye(2048)
    mu[7] = sigma[5, 9] = value
    for arrays in (dict(mu=mu, sigma=np.eye(2048)), dict(mu=np.zeros(2048), sigma=sigma), dict(mu=mu, sigma=-sigma)):
        np.savez(place / 'unbounded.npz', **arrays)
        for args in (('--samples=a',), ('--save_stats=broken.npz',)):
            message = cli('--ref=unbounded.npz', *args)[2]
            assert "'unbounded.npz'" in message and 'finite' in message and '\n' not in message
            assert not (place / 'broken.npz').exists()


def test_two_processes_equal_one(place, expected):
    printed = finish(*start_two(place, 'fid.py', '--samples=a', '--ref=b.npz', '--inception=weights.pth',
                                '--device=cpu', '--batch_size=2', '--pr_samples=4'))
    [line] = [line for line in printed.splitlines() if line.startswith('{')]       # one of them speaks
    assert printed.count('5 pictures') == 1
    numbers = json.loads(line)
    assert numbers['fid'] == pytest.approx(expected['fid'], rel=1e-4)
    assert (numbers['precision'], numbers['recall']) == pytest.approx(expected['pr4'])      # of the first 4, in order
    assert (numbers['n_samples'], numbers['n_ref'], numbers['pr_samples'], numbers['pr_ref']) == (5, 7, 4, 4)


def test_folders_are_cropped_to_size_and_greys_are_rgb(place, monkeypatch):
    os.makedirs(place / 'mixed')
    for i, grey in enumerate(pictures(4, 64, 5)[..., 0]):
        Image.fromarray(grey[:64 - 8 * i]).save(place / 'mixed' / f'{i}.png')
    cropped = np.stack([center_crop(Image.open(place / 'mixed' / f'{i}.png').convert('RGB'), 32) for i in range(4)])
    np.savez(place / 'cropped.npz', arr_0=cropped[..., :1])
    seen = []
    monkeypatch.setattr(fid, 'inception_features', lambda weights, images: seen.append(images) or torch.zeros(4, 2048))
    for path, size in (('mixed', 32), ('cropped.npz', 0)):
        fid.extract({}, fid.open_images(str(place / path), size), 4, 'cpu', 0, 1)
        assert np.array_equal(seen.pop(), cropped)
    images = fid.open_images(str(place / 'mixed'), 0)
    shapes = [images['read'](item).shape for item in images['items']]
    assert shapes == [(64, 64, 3), (56, 64, 3), (48, 64, 3), (40, 64, 3)]


def test_only_folders_are_resized(cli, place, net):
    images = [np.load(place / f'{name}.npz')['arr_0'] for name in 'ab']
    small = [np.stack([center_crop(Image.fromarray(image), 16) for image in x]) for x in images]
    np.savez(place / 'a16.npz', small[0])
    numbers, out, message = cli('--samples=a16.npz', '--ref=b', '--size=16', '--pr_samples=0')
    assert numbers['size'] == [16, 16] and 'pr_ref' not in numbers
    a, b = (net(x).double().numpy() for x in small)
    A, B = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))      # as in `expected`
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum()
    assert numbers['fid'] == pytest.approx(distance - 2 * np.linalg.norm(A @ B.T, 'nuc'), rel=1e-4)
    for form in ('a.npz', 'dataset-a'):
        with pytest.raises(SystemExit, match=f'{form}.* is of [(]32, 32[)]: --size crops folders'):
            fid.open_images(str(place / form), 16)


def test_bad_input_is_one_sentence(cli, place, monkeypatch):
    os.makedirs(place / 'empty')
    os.makedirs(place / 'damaged')
    for i in range(3):
        Image.fromarray(pictures(1, 32)[0]).save(place / 'damaged' / f'{i}.png')
    (place / 'damaged' / '1.png').write_bytes((place / 'damaged' / '0.png').read_bytes()[:900])
    os.makedirs(place / 'sizes')
    for i in range(3):
        Image.fromarray(pictures(1, 32)[0][i:]).save(place / 'sizes' / f'{i}.png')
    prepare(place / 'latents', np.zeros((4, 1, 8, 8, 8), np.float16), 0)
    os.makedirs(place / 'alone')
    Image.fromarray(pictures(1, 32)[0]).save(place / 'alone' / 'a.png')
    np.savez(place / 'alone.npz', arr_0=pictures(1, 32))
    prepare(place / 'dataset-alone', pictures(4, 32), 3)
    np.savez(place / 'four.npz', arr_0=np.zeros((5, 8, 8, 4), np.uint8))
    np.savez(place / 'flat.npz', arr_0=np.zeros((5, 8, 8), np.uint8))
    np.savez(place / 'float.npz', arr_0=np.zeros((5, 8, 8, 3)))
    np.savez(place / 'pickled.npz', arr_0=np.array([dict(), dict()], dtype=object))
    sigma = np.zeros((2048, 2048), np.uint8)
    np.savez(place / 'pickled-stats.npz', mu=np.array([dict()], dtype=object), sigma=sigma)
    np.savez(place / 'keyless.npz', images=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(place / 'sigmaless.npz', mu=np.zeros(2048))
    np.savez(place / 'tiny-stats.npz', mu=np.zeros(64), sigma=np.eye(64))
    (place / 'cut.npz').write_bytes((place / 'a.npz').read_bytes()[:9000])
    (place / 'a.zip').write_bytes((place / 'a.npz').read_bytes())
    (place / 'cut.pth').write_bytes((place / 'weights.pth').read_bytes()[:10 ** 6])
    torch.save({'fc.weight': torch.zeros(1)}, place / 'other.pth')
    monkeypatch.setenv('TORCH_HOME', str(place / 'nowhere'))
    monkeypatch.setattr(torch.hub, 'urlopen', lambda *a, **k: (_ for _ in ()).throw(OSError('no network')))
    for args, words in (
            (('--samples=a',), 'give --ref=B'),
            (('--ref=b',), '--samples=A'),
            (('--samples=nothing', '--ref=b'), "nothing' is not a folder"),
            (('--samples=a', '--ref=nothing.npz'), "'nothing.npz' has no images"),
            (('--samples=a', '--ref=empty'), "no pictures in 'empty'"),
            (('--samples=a', '--ref=latents'), "'latents' is of latents"),
            (('--samples=alone', '--ref=b'), "'alone' must have 2 images or more"),
            (('--samples=alone.npz', '--ref=b'), "'alone.npz' must have 2 images or more"),
            (('--samples=a', '--ref=dataset-alone'), "'dataset-alone' must have 2 images or more"),
            (('--samples=float.npz', '--ref=b'), "'float.npz' has no uint8 images in grey or RGB, but float64"),
            (('--samples=pickled.npz', '--ref=b'), "'pickled.npz' has no images"),
            (('--samples=a', '--ref=pickled-stats.npz'), 'allow_pickle=False'),
            (('--samples=keyless.npz', '--ref=b'), 'arr_0'),
            (('--samples=a', '--ref=keyless.npz'), 'arr_0'),
            (('--samples=a', '--ref=sigmaless.npz'), "'sigmaless.npz' has no images"),
            (('--samples=a', '--ref=tiny-stats.npz'), '2048'),
            (('--samples=cut.npz', '--ref=b'), "'cut.npz' has no images"),
            (('--samples=a.zip', '--ref=b'), "a.zip' is not a folder"),
            (('--samples=a', '--ref=sizes'), 'images differ in size'),
            (('--samples=a', '--ref=four.npz'), 'grey or RGB'),
            (('--samples=a', '--ref=flat.npz'), 'grey or RGB'),
            (('--samples=a', '--ref=damaged'), f"an image cannot be read (OSError: '{place}/damaged/1.png': ")):
        message = cli(*args)[2]
        assert words in message and '\n' not in message and message.startswith('fid.py: '), (args, message)
    for weights, words in (('cut.pth', 'RuntimeError'), ('none.pth', 'No such'), ('', 'no network')):
        message = cli('--samples=a', '--ref=b', weights=weights)[2]
        assert message.startswith(f'fid.py: cannot load the Inception weights {weights!r}: save {fid.URL} and')
        assert words in message and '\n' not in message, (weights, message)
    message = cli('--samples=a', '--ref=b', weights='other.pth')[2]
    assert message.startswith(f'fid.py: the weights are not those at {fid.URL} (') and 'Conv2d_1a_3x3' in message
    assert '\n' not in message
