"""What fid.py promises, each promise against an oracle of its own: no network, random weights, a dozen images."""
import json
import os
import socket
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm

import fid
from conftest import ROOT


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """On busy cores threads wait for each other, up to a thousand times longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_weights(seed=0):
    """A state dict for fid.Inception under which activations keep their size and no batch norm does nothing."""
    torch.manual_seed(seed)
    weights = fid.Inception().state_dict()
    for name, w in weights.items():
        if name.endswith('conv.weight'):
            w.normal_(0, (2 / w[0].numel()) ** 0.5)
        elif name.endswith(('bn.weight', 'running_var')):
            w.uniform_(0.5, 1.5)
        elif name.endswith(('bn.bias', 'running_mean')):
            w.normal_(0, 0.2)
    weights['Conv2d_1a_3x3.bn.running_var'].mul_(0.02)     # smooth pictures: there eps = 1e-3 shows
    return weights


def reference_features(weights, images):
    """The published network: torchvision's inception.py with pytorch-fid's FIDInceptionA, C, E_1 and E_2."""
    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, weights[f'{name}.conv.weight'], None, stride, padding)
        scale = weights[f'{name}.bn.weight'] / torch.sqrt(weights[f'{name}.bn.running_var'] + 0.001)
        shift = weights[f'{name}.bn.bias'] - weights[f'{name}.bn.running_mean'] * scale
        return (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    def average(x):
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3)
        B, C, H, W = x.shape
        sums = F.conv2d(x.reshape(B * C, 1, H, W), kernel, padding=1).reshape(x.shape)
        return sums / F.conv2d(ones, kernel, padding=1)

    def block_a(x, n):
        b1 = conv(x, n + '.branch1x1')
        b5 = conv(conv(x, n + '.branch5x5_1'), n + '.branch5x5_2', padding=2)
        b3 = conv(x, n + '.branch3x3dbl_1')
        b3 = conv(b3, n + '.branch3x3dbl_2', padding=1)
        b3 = conv(b3, n + '.branch3x3dbl_3', padding=1)
        return torch.cat([b1, b5, b3, conv(average(x), n + '.branch_pool')], 1)

    def block_c(x, n):
        b1 = conv(x, n + '.branch1x1')
        b7 = conv(x, n + '.branch7x7_1')
        b7 = conv(b7, n + '.branch7x7_2', padding=(0, 3))
        b7 = conv(b7, n + '.branch7x7_3', padding=(3, 0))
        bd = conv(x, n + '.branch7x7dbl_1')
        bd = conv(bd, n + '.branch7x7dbl_2', padding=(3, 0))
        bd = conv(bd, n + '.branch7x7dbl_3', padding=(0, 3))
        bd = conv(bd, n + '.branch7x7dbl_4', padding=(3, 0))
        bd = conv(bd, n + '.branch7x7dbl_5', padding=(0, 3))
        return torch.cat([b1, b7, bd, conv(average(x), n + '.branch_pool')], 1)

    def block_e(x, n, pooled):
        b1 = conv(x, n + '.branch1x1')
        b3 = conv(x, n + '.branch3x3_1')
        b3 = [conv(b3, n + '.branch3x3_2a', padding=(0, 1)), conv(b3, n + '.branch3x3_2b', padding=(1, 0))]
        bd = conv(conv(x, n + '.branch3x3dbl_1'), n + '.branch3x3dbl_2', padding=1)
        bd = [conv(bd, n + '.branch3x3dbl_3a', padding=(0, 1)), conv(bd, n + '.branch3x3dbl_3b', padding=(1, 0))]
        return torch.cat([b1, *b3, *bd, conv(pooled, n + '.branch_pool')], 1)

    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = 2 * F.interpolate(x, size=(299, 299), mode='bilinear', align_corners=False) - 1
    x = conv(x, 'Conv2d_1a_3x3', stride=2)
    x = conv(x, 'Conv2d_2a_3x3')
    x = F.max_pool2d(conv(x, 'Conv2d_2b_3x3', padding=1), kernel_size=3, stride=2)
    x = F.max_pool2d(conv(conv(x, 'Conv2d_3b_1x1'), 'Conv2d_4a_3x3'), kernel_size=3, stride=2)
    for n in ('Mixed_5b', 'Mixed_5c', 'Mixed_5d'):
        x = block_a(x, n)
    n = 'Mixed_6a'
    b3 = conv(x, n + '.branch3x3', stride=2)
    bd = conv(conv(x, n + '.branch3x3dbl_1'), n + '.branch3x3dbl_2', padding=1)
    x = torch.cat([b3, conv(bd, n + '.branch3x3dbl_3', stride=2), F.max_pool2d(x, kernel_size=3, stride=2)], 1)
    for n in ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'):
        x = block_c(x, n)
    n = 'Mixed_7a'
    b3 = conv(conv(x, n + '.branch3x3_1'), n + '.branch3x3_2', stride=2)
    b7 = conv(conv(x, n + '.branch7x7x3_1'), n + '.branch7x7x3_2', padding=(0, 3))
    b7 = conv(conv(b7, n + '.branch7x7x3_3', padding=(3, 0)), n + '.branch7x7x3_4', stride=2)
    x = torch.cat([b3, b7, F.max_pool2d(x, kernel_size=3, stride=2)], 1)
    x = block_e(x, 'Mixed_7b', average(x))
    x = block_e(x, 'Mixed_7c', F.max_pool2d(x, kernel_size=3, stride=1, padding=1))
    return x.mean(dim=(2, 3))


def pictures(n, size, seed=0):
    """n uint8 pictures of broad and fine structure, size x size x 3."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (0.6 * coarse + 0.4 * rng.uniform(0, 255, coarse.shape)).round().astype(np.uint8)


@pytest.mark.parametrize('size', [32, 400])
def test_inception_is_the_published_network(size):
    weights = random_weights()
    net = fid.Inception().eval()
    net.load_state_dict(weights)
    images = pictures(2, size)
    expected = reference_features(weights, images)
    features = net(torch.from_numpy(images))
    assert features.shape == (2, 2048) and expected.std() > 0.01
    assert (features - expected).norm() < 1e-5 * expected.norm()
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_inception_has_torchvisions_parameters():
    shapes = {name: tuple(w.shape) for name, w in fid.Inception().state_dict().items()}
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


def test_streaming_statistics_are_numpys():
    # A mean so far from zero that sums of squares would cancel.
    x = np.random.default_rng(0).normal(1000, [1, 0.1, 5, 1e-3], (9001, 4)).astype(np.float32)
    whole, parts, left, right = (fid.Statistics(4) for _ in range(4))
    whole.update(torch.from_numpy(x))
    for batch in torch.from_numpy(x).split(7):
        parts.update(batch)
    left.update(torch.from_numpy(x[:100]))
    right.update(torch.from_numpy(x[100:]))
    left.merge(right.n, right.mean, right.scatter)
    for s in (whole, parts, left):
        assert s.n == 9001
        np.testing.assert_allclose(s.mean, x.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(s.covariance(), np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


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
    for block in (1, 7, 31, 512):
        found = fid.precision_recall(torch.from_numpy(samples), torch.from_numpy(reference), k, block)
        assert found == pytest.approx(expected, abs=1e-12), block


def test_precision_and_recall_do_not_depend_on_blocks():
    torch.manual_seed(0)
    x = torch.rand(150, 2048) * 3       # Inception's width; a set against a part of itself: ties at every radius
    y = x[:100] + 0.1 * (torch.arange(100) % 2)[:, None]
    assert len({fid.precision_recall(y, x, block=block) for block in (3, 64, 149, 512)}) == 1
    # Ties hold although features are rounded, as by another batch.
    x, y = torch.randint(0, 3, (40, 5)).double(), torch.randint(0, 4, (31, 5)).double()
    for block in (1, 7, 512):
        nearly = (z + 1e-8 * torch.randn(z.shape, dtype=z.dtype) for z in (x, y))
        assert fid.precision_recall(*nearly, block=block) == pytest.approx(brute_force(x, y, 3))
    x = torch.rand(30, 2048).repeat(4, 1)[torch.randperm(120)]    # balls of radius 0, which any rounding empties
    assert all(fid.precision_recall(x[:90], x, block=block) == (1, 1) for block in (1, 50, 512))


# --- the command line ---

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with weights and the same pictures in every form: a/, a.zip, a.npz, dataset/, likewise b."""
    folder = tmp_path_factory.mktemp('fid')
    torch.save(random_weights(), folder / 'weights.pth')
    a, b = pictures(5, 32, 1), pictures(7, 32, 2)
    b[:5] = 0.8 * a + 0.2 * b[:5]      # near each other, so that precision and recall are not just 0 or 1
    for name, images in (('a', a), ('b', b)):
        for i, image in enumerate(images):
            os.makedirs(folder / name / f'class{i % 2}', exist_ok=True)
            Image.fromarray(image).save(folder / name / f'class{i % 2}' / f'{i}.png')
        images = np.concatenate([images[::2], images[1::2]])        # in the order of the files
        with zipfile.ZipFile(folder / f'{name}.zip', 'w') as archive:
            for i in range(len(images)):
                archive.write(folder / name / f'class{i % 2}' / f'{i}.png', f'class{i % 2}/{i}.png')
        np.savez(folder / f'{name}.npz', arr_0=images, arr_1=np.zeros(len(images)))
        np.savez_compressed(folder / f'{name}-small.npz', arr_0=images)
        prepare(folder / f'dataset-{name}', np.concatenate([images, images[:2] // 2]), heldout=2)
    return folder


def prepare(folder, images, heldout):
    os.makedirs(folder)
    np.save(folder / 'images.npy', images)
    N, H, W, C = images.shape
    np.save(folder / 'labels.npy', np.zeros(N, np.int64))
    meta = dict(source='test', size=H, channels=C, count=N, heldout=heldout, flips=1, classes=[], vae='')
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.fixture
def cli(run, place, monkeypatch):
    """cli('--samples=..', ...) -> (numbers of the last line, all output, the sentence it ended with), in `place`."""
    def cli(*args, weights='weights.pth'):
        monkeypatch.chdir(place)
        out, message = run('fid.py', f'--inception={weights}', '--device=cpu', '--batch_size=4', *args)
        return json.loads(out.splitlines()[-1]) if not message else None, out, message
    return cli


@pytest.fixture(scope='module')
def expected(place):
    """What every form of a against b must give, by the tested parts and numpy."""
    net = fid.Inception().eval()
    net.load_state_dict(torch.load(place / 'weights.pth'))
    a, b = (net(torch.from_numpy(np.load(place / f'{name}.npz')['arr_0'])) for name in 'ab')
    mu_a, mu_b = (x.double().numpy().mean(0) for x in (a, b))
    cov_a, cov_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    distance = fid.frechet_distance(mu_a, cov_a, mu_b, cov_b)
    pr, pr4 = fid.precision_recall(a, b), fid.precision_recall(a[:4], b[:4])
    assert distance > 1e-3 and 0 < pr[1] < 1 and pr4 != pr and pr4 != (0, 0)
    return dict(fid=distance, pr=pr, pr4=pr4, mu=mu_b, sigma=cov_b)


def close(numbers, expected):
    return (numbers['fid'] == pytest.approx(expected['fid'], rel=1e-4)
            and (numbers['precision'], numbers['recall']) == pytest.approx(expected['pr'])
            and (numbers['n_samples'], numbers['n_ref'], numbers['pr_samples'], numbers['k']) == (5, 7, 5, 3))


@pytest.mark.parametrize('form', ['a', 'a.zip', 'a.npz', 'a-small.npz', 'dataset-a'])
def test_every_form_of_a_set_has_the_same_pixels(form, place):
    images = fid.open_images(str(place / form))
    pixels = torch.from_numpy(np.load(place / 'a.npz')['arr_0'])
    assert (images.count, images.size) == (5, 32)
    for indices in (range(5), range(1, 5, 2), range(2), range(4, 5)):       # also backwards, as a second pass
        assert torch.equal(images.batch(indices), pixels[list(indices)])


def test_a_dataset_and_a_zip_give_the_numbers_of_their_pixels(cli, expected):
    numbers, out, message = cli('--samples=dataset-a', '--ref=b.zip')
    assert message == '' and close(numbers, expected)
    assert (numbers['samples'], numbers['ref'], numbers['size'], numbers['pr_ref']) == ('dataset-a', 'b.zip', 32, 7)
    assert 'below 2,048' in out and 'not the published' in out and len(numbers['inception']) == 64


def test_statistics_are_kept_and_compared(cli, expected, place):
    numbers, out, message = cli('--ref=b', '--save_stats=b-stats.npz')
    assert message == '' and numbers['n_ref'] == 7 and 'fid' not in numbers
    with np.load(place / 'b-stats.npz') as f:
        np.testing.assert_allclose(f['mu'], expected['mu'], rtol=1e-4)
        np.testing.assert_allclose(f['sigma'], expected['sigma'], rtol=1e-2, atol=1e-5 * expected['sigma'].max())
        assert (f['count'], f['size'], f['source']) == (7, 32, 'b')
    numbers, out, message = cli('--samples=a', '--ref=b-stats.npz')
    assert numbers['fid'] == pytest.approx(expected['fid'], rel=1e-4) and numbers['n_ref'] == 7
    assert 'precision' not in numbers and 'no precision and recall' in out


def test_adms_statistics_bring_images_for_precision_and_recall(cli, expected, place):
    images = np.load(place / 'b.npz')['arr_0']
    np.savez(place / 'adm.npz', mu=expected['mu'], sigma=expected['sigma'], mu_s=0, arr_0=images)
    numbers, out, message = cli('--samples=a', '--ref=adm.npz', '--pr_samples=4')
    assert numbers['fid'] == pytest.approx(expected['fid'], rel=1e-4) and numbers['n_ref'] is None
    assert (numbers['precision'], numbers['recall']) == pytest.approx(expected['pr4']) and numbers['pr_samples'] == 4


@pytest.mark.parametrize('world, keep', [(2, 4), (3, 7), (3, 1), (9, 5)])
def test_the_shares_of_processes_join_in_the_order_of_images(world, keep, monkeypatch):
    images = SimpleNamespace(path='', count=7, batch=lambda indices: torch.tensor(list(indices)))

    def net(x):
        return x[:, None].expand(-1, 2048).float()
    shares = []

    def send(parts, mine):
        shares.append(mine)
        raise InterruptedError

    def receive(parts, mine):
        parts[:] = shares
    monkeypatch.setattr(fid.dist, 'all_gather_object', send)
    for rank in range(world):
        with pytest.raises(InterruptedError):
            fid.extract(net, images, 7, keep, 2, 'cpu', rank, world)
    monkeypatch.setattr(fid.dist, 'all_gather_object', receive)
    total, features = fid.extract(net, images, 7, keep, 2, 'cpu', 0, world)
    assert features[:, 0].tolist() == list(range(keep)) and total.n == 7
    assert torch.allclose(total.mean, torch.tensor(3.0).double())
    assert torch.allclose(total.covariance(), torch.tensor(28 / 6).double())


def test_two_processes_equal_one(place, expected):
    with socket.socket() as s:
        s.bind(('', 0))
        port = s.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}',
               os.path.join(ROOT, 'fid.py'), '--samples=a', '--ref=b.npz', '--inception=weights.pth', '--device=cpu',
               '--batch_size=2', '--pr_samples=4']
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers['fid'] == pytest.approx(expected['fid'], rel=1e-6)
    assert (numbers['precision'], numbers['recall']) == pytest.approx(expected['pr4'])      # of the first 4, in order
    assert (numbers['n_samples'], numbers['n_ref'], numbers['pr_samples'], numbers['pr_ref']) == (5, 7, 4, 4)


def test_sizes_and_grey_images(cli, place):
    os.makedirs(place / 'mixed')
    grey = pictures(4, 64, 5)[..., 0]
    for i, image in enumerate(grey):
        Image.fromarray(image[:64 - 8 * i]).save(place / 'mixed' / f'{i}.png')
    from data import ImageFiles, center_crop
    files = ImageFiles(str(place / 'mixed'))
    np.savez(place / 'cropped.npz', arr_0=np.stack([center_crop(files.read(i), 32) for i in range(4)])[..., :1])
    assert 'differ in size' in cli('--samples=mixed', '--ref=b.npz')[2]
    numbers, out, message = cli('--samples=mixed', '--ref=cropped.npz', '--size=32')
    assert numbers['fid'] < 1e-6 and numbers['size'] == 32 and numbers['recall'] == 1


def test_bad_input_is_one_sentence(cli, place, monkeypatch):
    os.makedirs(place / 'empty')
    os.makedirs(place / 'single')
    Image.fromarray(pictures(1, 32)[0]).save(place / 'single' / '0.png')
    prepare(place / 'latents', np.zeros((4, 8, 8, 8), np.uint8), 0)
    os.rename(place / 'latents' / 'images.npy', place / 'latents' / 'latents.npy')
    np.savez(place / 'four.npz', arr_0=np.zeros((5, 8, 8, 4), np.uint8))
    np.savez(place / 'float.npz', arr_0=np.zeros((5, 8, 8, 3)))
    np.savez(place / 'pickled.npz', arr_0=np.array([dict(), dict()], dtype=object))
    np.savez(place / 'pickled-stats.npz', mu=np.array([dict()], dtype=object), sigma=np.zeros(3))
    np.savez(place / 'keyless.npz', images=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(place / 'tiny-stats.npz', mu=np.zeros(64), sigma=np.eye(64))
    (place / 'cut.npz').write_bytes((place / 'a.npz').read_bytes()[:9000])
    (place / 'cut.zip').write_bytes((place / 'a.zip').read_bytes()[:900])
    (place / 'cut.pth').write_bytes((place / 'weights.pth').read_bytes()[:10 ** 6])
    torch.save({'fc.weight': torch.zeros(1)}, place / 'other.pth')
    np.savez(place / 'other-stats.npz', mu=np.zeros(2048), sigma=np.eye(2048), inception='published')
    monkeypatch.setenv('TORCH_HOME', str(place / 'nowhere'))
    monkeypatch.setattr(torch.hub, 'urlopen', lambda *a, **k: (_ for _ in ()).throw(OSError('no network')))
    for args, words in (
            (('--samples=a',), '--ref=B'),
            (('--ref=b',), '--samples=A'),
            (('--samples=nothing', '--ref=b'), "no 'nothing'"),
            (('--samples=a', '--ref=nothing.npz'), "no 'nothing.npz'"),
            (('--samples=a', '--ref=empty'), 'no images'),
            (('--samples=single', '--ref=b'), 'one image'),
            (('--samples=a', '--ref=latents'), 'latents'),
            (('--samples=four.npz', '--ref=b'), '4 channels'),
            (('--samples=float.npz', '--ref=b'), 'float64'),
            (('--samples=pickled.npz', '--ref=b'), 'object'),
            (('--samples=a', '--ref=pickled-stats.npz'), 'allow_pickle=False'),
            (('--samples=keyless.npz', '--ref=b'), 'arr_0'),
            (('--samples=a', '--ref=keyless.npz'), 'arr_0'),
            (('--samples=a', '--ref=tiny-stats.npz'), '2048'),
            (('--samples=cut.npz', '--ref=b'), 'damaged'),
            (('--samples=cut.zip', '--ref=b'), 'cut.zip'),
            (('--samples=a.npz', '--ref=b', '--size=16'), 'only folders'),
            (('--samples=a', '--ref=b', '--size=-1'), 'size'),
            (('--samples=a', '--ref=b', '--batch_size=0'), 'batch_size'),
            (('--ref=b', '--save_stats=x.pt'), '.npz'),
            (('--ref=other-stats.npz', '--save_stats=x.npz'), 'statistics already'),
            (('--samples=a', '--ref=other-stats.npz'), 'other Inception weights')):
        message = cli(*args)[2]
        assert words in message and '\n' not in message, (args, message)
    for weights, words in (('cut.pth', 'damaged'), ('other.pth', 'state_dict'), ('none.pth', 'No such'), ('', fid.URL)):
        message = cli('--samples=a', '--ref=b', weights=weights)[2]
        assert words in message and '\n' not in message and message.startswith('fid.py: '), (weights, message)
