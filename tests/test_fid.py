"""What fid.py measures: against a network of torch's layers, closed forms and loops over pairs."""
import json
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fid
from conftest import finish, run_in, start_two
from test_data import LATENTS, write_dataset

# -------------------------------------------------------------------------------------------------
# Inception, with torchvision's names and widths and the pools of pytorch-fid. A line is a branch, a
# layer is its name, width and kernel; /1 is without padding, /2 has stride 2, too


STEM = '''
    1a_3x3 32 3x3/2, 2a_3x3 32 3x3/1, 2b_3x3 64 3x3, max/2, 3b_1x1 80 1x1, 4a_3x3 192 3x3/1, max/2
'''
A = '''
    1x1 64 1x1
    5x5_1 48 1x1, 5x5_2 64 5x5
    3x3dbl_1 64 1x1, 3x3dbl_2 96 3x3, 3x3dbl_3 96 3x3
    average, _pool {} 1x1
'''
B = '''
    3x3 384 3x3/2
    3x3dbl_1 64 1x1, 3x3dbl_2 96 3x3, 3x3dbl_3 96 3x3/2
    max/2
'''
C = '''
    1x1 192 1x1
    7x7_1 {0} 1x1, 7x7_2 {0} 1x7, 7x7_3 192 7x1
    7x7dbl_1 {0} 1x1, 7x7dbl_2 {0} 7x1, 7x7dbl_3 {0} 1x7, 7x7dbl_4 {0} 7x1, 7x7dbl_5 192 1x7
    average, _pool 192 1x1
'''
D = '''
    3x3_1 192 1x1, 3x3_2 320 3x3/2
    7x7x3_1 192 1x1, 7x7x3_2 192 1x7, 7x7x3_3 192 7x1, 7x7x3_4 192 3x3/2
    max/2
'''
E = '''
    1x1 320 1x1
    3x3_1 384 1x1, 3x3_2a 384 1x3
    3x3_1 384 1x1, 3x3_2b 384 3x1
    3x3dbl_1 448 1x1, 3x3dbl_2 384 3x3, 3x3dbl_3a 384 1x3
    3x3dbl_1 448 1x1, 3x3dbl_2 384 3x3, 3x3dbl_3b 384 3x1
    {}, _pool 192 1x1
'''
BLOCKS = {
    '5b': A.format(32), '5c': A.format(64), '5d': A.format(64), '6a': B, '6b': C.format(128),
    '6c': C.format(160), '6d': C.format(160), '6e': C.format(192), '7a': D,
    '7b': E.format('average'), '7c': E.format('max')}


def average(x):
    """Of 3 x 3 neighbours, without those beyond the border."""
    return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)


POOLS = {'average': average, 'max': nn.MaxPool2d(3, 1, 1), 'max/2': nn.MaxPool2d(3, 2)}


class Oracle:
    """Makes each layer, with random weights, when it is first used.

    Widths are divided by d, except in the last block: so there are always 2048 features.
    """

    def __init__(self, d):
        torch.manual_seed(0)
        self.d = d
        self.layers = {}

    def layer(self, name, channels, width, kernel):
        if name not in self.layers:
            kernel, slash, stride = kernel.partition('/')
            kernel = [int(side) for side in kernel.split('x')]
            width = int(width)
            if '7c' not in name:
                width //= self.d
            options = dict(padding='same', bias=False)
            if slash:
                options = dict(stride=int(stride), bias=False)
            conv = nn.Conv2d(channels, width, kernel, **options)
            nn.init.kaiming_normal_(conv.weight)
            bn = nn.BatchNorm2d(width, eps=0.001).eval()
            for tensor in (bn.weight, bn.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (bn.bias, bn.running_mean):
                nn.init.normal_(tensor, 0, 0.2)
            self.layers[name] = nn.Sequential(OrderedDict(conv=conv, bn=bn, relu=nn.ReLU()))
        return self.layers[name]

    def branch(self, x, prefix, line):
        for text in line.split(', '):
            name, *shape = text.split()
            layer = POOLS.get(name) or self.layer(prefix + name, x.shape[1], *shape)
            x = layer(x)
        return x

    @torch.no_grad()
    def __call__(self, images):
        """The features (B, 2048) of images (B, H, W, 3)."""
        x = self.branch(resized(images) / 255 * 2 - 1, 'Conv2d_', STEM)
        for name, block in BLOCKS.items():
            lines = block.strip().splitlines()
            x = torch.cat([self.branch(x, f'Mixed_{name}.branch', line) for line in lines], 1)
        return x.mean((2, 3))

    def weights(self):
        weights = {}
        for name, layer in self.layers.items():
            weights |= layer.state_dict(prefix=f'{name}.')
        return weights


def resized(images):
    """(B, H, W, 3) -> (B, 3, 299, 299), linear between the centres of pixels, at i + 1/2."""
    def matrix(size):
        places = (np.arange(299) + 0.5) * size / 299 - 0.5
        return np.stack([np.interp(places, np.arange(size), unit) for unit in np.eye(size)])

    B, H, W, C = images.shape
    x = np.einsum('bhwc,hi,wj->bcij', images, matrix(H), matrix(W), optimize=True)
    return torch.from_numpy(x).float()


def pictures(n, size=32, seed=0):
    """n uint8 pictures, size x size x 3, of broad and fine structure."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (0.6 * coarse + 0.4 * rng.uniform(0, 255, coarse.shape)).astype(np.uint8)


@pytest.mark.parametrize('d, size', ((1, 32), (16, 400)))
def test_features_are_those_of_the_published_network(d, size):
    oracle = Oracle(d)
    images = pictures(2, size)[:, :, 8:]        # taller than wide
    expected = oracle(images)
    features = fid.inception_features(oracle.weights(), torch.from_numpy(images))
    difference = (expected[0] - expected[1]).norm()
    assert (features - expected).norm() < 1e-3 * difference
    if d == 1:      # Inception v3 has 23,834,568 parameters, those of its 1000 classes among them
        count = sum(p.numel() for layer in oracle.layers.values() for p in layer.parameters())
        assert count == 23_834_568 - 1000 * 2049


def test_the_weights_are_the_published_ones_unless_a_file_is_given(monkeypatch):
    asked = []

    def download(url, **options):
        assert options['check_hash'] and options['weights_only']
        asked.append(url)

    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', download)
    fid.load_inception('', 'cpu')
    assert asked == [fid.URL]
    assert fid.URL.endswith('/fid_weights/pt_inception-2015-12-05-6726825d.pth')


# -------------------------------------------------------------------------------------------------
# Statistics


def test_mean_and_covariance_are_numpys():
    x = torch.randn(300, 64) * torch.logspace(-2, 0, 64) + 0.5
    mean, covariance = fid.mean_and_covariance(x)
    x = x.double().numpy()
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize('rank', (24, 9))
def test_frechet_distance_of_gaussians_is_the_closed_form(rank):
    """Where covariances commute, the roots of their eigenvalues are subtracted."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2, 24))
    roots = rng.uniform(0.3, 3, (2, 24))
    roots[0, rank:] = 0
    Q = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    S1, S2 = [Q * root ** 2 @ Q.T for root in roots]
    expected = ((means[0] - means[1]) ** 2).sum() + ((roots[0] - roots[1]) ** 2).sum()
    assert fid.frechet_distance(means[0], S1, means[1], S2) == pytest.approx(expected, rel=1e-8)
    assert fid.frechet_distance(means[1], S2, means[0], S1) == pytest.approx(expected, rel=1e-6)
    assert 0 <= fid.frechet_distance(means[0], S1, means[0], S1) < 1e-6


def distance(x, y):
    """Of features: tr sqrt(S1 S2) is the sum of the singular values of A B^T.

    S1 is A^T A and S2 is B^T B: there is no eigenvalue, and no root of a matrix.
    """
    A = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    B = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    root = np.linalg.svd(A @ B.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum() - 2 * root


def test_frechet_distance_of_few_samples_is_exact():
    rng = np.random.default_rng(0)
    x, y = rng.gamma(0.5, 3, (12, 300)), rng.gamma(0.5, 1, (40, 300))
    found = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert found == pytest.approx(distance(x, y), rel=1e-10)


def share_in_balls(points, centres, k):
    """The share of points in the ball of some centre, which reaches to its k-th neighbour."""
    inside = set()
    for i, centre in enumerate(centres):
        others = np.delete(centres, i, axis=0)
        radius = sorted(((others - centre) ** 2).sum(1))[k - 1]
        for j, point in enumerate(points):
            if ((point - centre) ** 2).sum() <= radius:
                inside.add(j)
    return len(inside) / len(points)


def cloud(kind, n):
    """n points: with ties of distances, or as wide as Inception's features and far from 0."""
    rng = np.random.default_rng(n)
    points = rng.normal(size=(n, 5))
    if kind == 'ties':
        points = rng.integers(0, 3, (n, 5))
    if kind == 'far':
        points = 100 + 0.1 * rng.normal(size=(n, 2048))
    return points.astype(np.float32)


@pytest.mark.parametrize('k', (1, 3))
@pytest.mark.parametrize('kind', ('normal', 'ties', 'far'))
def test_precision_and_recall_are_those_of_all_pairs(kind, k):
    samples, reference = cloud(kind, 40), cloud(kind, 31)
    found = fid.precision_recall(torch.tensor(samples), torch.tensor(reference), k)
    samples, reference = samples.astype(float), reference.astype(float)
    expected = share_in_balls(samples, reference, k), share_in_balls(reference, samples, k)
    assert found == expected
    assert 0 < min(expected) and max(expected) < 1


def test_a_set_covers_its_copy_in_another_order():
    """Balls of radius 0, at Inception's width: any rounding would empty them."""
    x = torch.rand(30, 2048).repeat(4, 1)
    assert fid.precision_recall(x, x.flip(0)) == (1, 1)


# -------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope='module')
def sets():
    """Grey pictures and some in colour, near them, so that precision and recall are not 0 or 1."""
    a, b = pictures(5, seed=1)[..., :1], pictures(7, seed=2)
    b[:5] = 0.8 * a + 0.2 * b[:5]
    return a, b


@pytest.fixture(scope='module')
def features(sets):
    oracle = Oracle(16)
    a, b = sets
    return oracle(a.repeat(3, axis=3)).double().numpy(), oracle(b).double().numpy()


@pytest.fixture(scope='module')
def place(tmp_path_factory, sets):
    """A folder with weights, and with the sets in every form; and with what cannot be used.

    The pixels of `large` are those of b, twice as large.
    """
    folder = tmp_path_factory.mktemp('fid')
    a, b = sets
    large = b.repeat(2, axis=1).repeat(2, axis=2)
    mixed = [*b[:6], large[6]]
    for name, images in dict(a=a, b=b, large=large, mixed=mixed, alone=a[:1], cut=a).items():
        os.mkdir(folder / name)
        for i, image in enumerate(images):
            Image.fromarray(image.squeeze()).save(folder / name / f'{i}.png')
    os.truncate(folder / 'cut/4.png', 900)
    for name, array in dict(a=a, b=b, large=large, wide=large[:, :32], flat=a[..., 0],
                            two=a.repeat(2, axis=3), real=a / 255).items():
        np.savez_compressed(folder / f'{name}.npz', array)
    os.symlink('b.npz', folder / 'link.npz')
    unused = a[:1] // 2
    array = np.concatenate([a[:2], unused, a[2:], unused, unused])
    write_dataset(folder / 'dataset', array, [0, 0, -1, 0, 0, 0, 0, 0], size=32)
    write_dataset(folder / 'latents', **LATENTS, image_size=32, scaling_factor=1)
    np.savez(folder / 'tiny.npz', mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / 'nan.npz', mu=np.full(2048, np.nan), sigma=np.eye(2048))
    oracle = Oracle(16)
    oracle(b)
    weights = oracle.weights()
    torch.save(weights, folder / 'weights.pth')
    torch.save(dict(list(weights.items())[:9]), folder / 'few.pth')
    weights['Mixed_7c.branch1x1.bn.bias'] += torch.inf
    torch.save(weights, folder / 'inf.pth')
    return folder


@pytest.fixture(scope='module')
def expected(features):
    a, b = features
    numbers = dict(n_samples=5, n_ref=7, size=[32, 32], pr_samples=5, pr_ref=7)
    numbers['fid'] = pytest.approx(distance(a, b), rel=1e-4)
    numbers['precision'] = share_in_balls(a, b, 3)
    numbers['recall'] = share_in_balls(b, a, 3)
    return numbers


@pytest.fixture
def compare(place, capsys):
    """compare('--samples=A --ref=B') -> the numbers that fid.py prints, and its last sentence."""
    def compare(args):
        message = run_in(place, 'fid.py', '--inception=weights.pth', '--device=cpu',
                         '--batch_size=4', *args.split())
        numbers = capsys.readouterr().out.partition('{"')[2]
        return json.loads('{"' + numbers) if numbers else None, message
    return compare


@pytest.mark.parametrize('samples, ref', (('a', 'b.npz'), ('dataset', 'b')))
def test_every_form_of_a_set_gives_the_same_numbers(samples, ref, compare, expected):
    numbers, _ = compare(f'--samples={samples} --ref={ref}')
    assert numbers == expected | dict(samples=samples, ref=ref, inception='weights.pth')


def test_two_processes_equal_one(place, expected, features):
    printed = finish(*start_two(place, 'fid.py', '--samples=a', '--ref=b', '--pr_samples=4',
                                '--inception=weights.pth', '--device=cpu', '--batch_size=2'))
    assert printed.count('FID is too high') == 1        # of so few images
    numbers = json.loads(printed[printed.index('{"'):])
    assert numbers['fid'] == expected['fid']
    a, b = features[0][:4], features[1][:4]
    assert numbers['pr_samples'] == numbers['pr_ref'] == 4
    assert numbers['precision'] == share_in_balls(a, b, 3)
    assert numbers['recall'] == share_in_balls(b, a, 3)


def test_statistics_are_kept_and_used_as_adms_are(place, compare, expected):
    numbers, _ = compare('--ref=b --save_stats=kept.npz')
    stated = dict(n_ref=7, size=[32, 32], inception='weights.pth')
    assert numbers == dict(samples='', ref='b', **stated)
    numbers, _ = compare('--samples=a --ref=kept.npz')
    assert numbers == dict(samples='a', ref='kept.npz', n_samples=5, fid=expected['fid'], **stated)
    assert 'samples are of (64, 64)' in compare('--samples=large --ref=kept.npz')[1]
    kept = np.load(place / 'kept.npz')
    np.savez(place / 'adm.npz', mu=kept['mu'], sigma=kept['sigma'], arr_0=0)
    numbers, _ = compare('--samples=a --ref=adm.npz')       # they state no count and no size
    assert numbers['fid'] == expected['fid']
    assert numbers['n_ref'] == 0


def test_numbers_are_printed_before_statistics_are_written(place, compare):
    os.mkdir(place / 'taken.npz')
    numbers, message = compare('--ref=b --save_stats=taken.npz')
    assert numbers['n_ref'] == 7 and 'cannot write taken.npz' in message


def test_folders_are_cropped_and_the_size_is_stated(place, compare, sets):
    images = fid.open_images(f'{place}/large', 32)
    cropped = [images['read'](item) for item in images['items']]
    assert np.array_equal(cropped, sets[1])
    numbers, _ = compare('--samples=large.npz --ref=large')
    assert numbers['size'] == [64, 64]
    assert numbers['fid'] < 1e-6


@pytest.mark.parametrize('args, words', (
    ('--samples=a', 'give --ref=B'), ('--ref=b', '--samples=A or --save_stats=C'),
    ('--samples=nowhere --ref=b', "nowhere' is not a folder"),
    ('--samples=a --ref=nowhere.npz', "'nowhere.npz' has no images"),
    ('--samples=a --ref=latents', "'latents' is of latents"),
    ('--samples=alone --ref=b', "'alone' must have 2 images or more"),
    ('--samples=flat.npz --ref=b', 'no uint8 images in grey or RGB, but uint8 (5, 32, 32)'),
    ('--samples=two.npz --ref=b', 'no uint8 images in grey or RGB, but uint8 (5, 32, 32, 2)'),
    ('--samples=real.npz --ref=b', 'no uint8 images in grey or RGB, but float64'),
    ('--samples=a --ref=tiny.npz', "'tiny.npz' must be of 2048 features"),
    ('--samples=a --ref=nan.npz', "'nan.npz' must be of 2048 features, and finite"),
    ('--samples=a --ref=cut', "cut/4.png'"),
    ('--samples=a --ref=large', 'samples are of (32, 32), but ref of (64, 64): give --size=N'),
    ('--samples=wide.npz --ref=large', 'samples are of (32, 64)'),
    ('--samples=a.npz --ref=large --size=64', "'a.npz' is of (32, 32): --size crops folders"),
    ('--samples=a --ref=mixed', 'images differ in size'),
    ('--samples=a --ref=b --inception=few.pth', 'the weights are not those at https'),
    ('--samples=a --ref=b --inception=a.npz', "cannot load the Inception weights 'a.npz'"),
    ('--ref=b --save_stats=x.npz --inception=inf.pth', 'features are not finite'),
    ('--ref=b --save_stats=nowhere/x.npz', "no folder for 'nowhere/x.npz'"),
    ('--ref=b --save_stats=x.txt', 'save_stats must be NAME.npz'),
    ('--ref=./b.npz --save_stats=b.npz', 'b.npz is an input'),
    ('--samples=link.npz --ref=a --save_stats=b.npz', 'b.npz is an input')))
def test_mistakes_end_in_a_sentence_and_destroy_nothing(args, words, place, compare):
    before = (place / 'b.npz').read_bytes()
    numbers, message = compare(args)
    assert not numbers and message.startswith('fid.py: ')
    assert words in message and '\n' not in message
    assert (place / 'b.npz').read_bytes() == before and not (place / 'x.npz').exists()
