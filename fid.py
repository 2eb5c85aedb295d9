"""FID, precision and recall of one set of images against another.

    python fid.py --samples=samples.npz --ref=data/digits       # a dataset's training images
    python fid.py --samples=samples/ --ref=pictures/ --size=256     # resized as by data.py
    python fid.py --ref=pictures/ --size=256 --save_stats=F.npz     # statistics once ...
    python fid.py --samples=samples.npz --ref=F.npz     # ... for many comparisons; ADM's work, too
    torchrun --nproc_per_node=8 fid.py ...              # shares the work

Network, weights and resizing are pytorch-fid's. Precision and recall are on Inception's features,
as ADM's (StyleGAN's are on VGG's: other numbers). The last line of output is JSON. The features of
all images are kept: 8 kB of memory an image, and 16 more at the end.
"""
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os.path import realpath

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from tqdm import tqdm

from configurator import all_sum, check, configure, exit_on_error, launch
from data import Dataset, list_pictures, read_picture

WEIGHTS = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}'

# The FID Inception, in torchvision's names less their prefixes. A block joins branches. A branch is
# convolutions and pools, one after another: '5x5_1 5x5_2' is the convolution branch5x5_1, then
# branch5x5_2. `!` is without padding, `!!` has stride 2, too.
STEM = '1a_3x3!! 2a_3x3! 2b_3x3 max!! 3b_1x1 4a_3x3! max!!'
A = ['1x1', '5x5_1 5x5_2', '3x3dbl_1 3x3dbl_2 3x3dbl_3', 'average _pool']
B = ['3x3!!', '3x3dbl_1 3x3dbl_2 3x3dbl_3!!', 'max!!']
C = ['1x1', '7x7_1 7x7_2 7x7_3', '7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5',
     'average _pool']
D = ['3x3_1 3x3_2!!', '7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4!!', 'max!!']
E = ['1x1', '3x3_1 3x3_2a', '3x3_1 3x3_2b', '3x3dbl_1 3x3dbl_2 3x3dbl_3a',
     '3x3dbl_1 3x3dbl_2 3x3dbl_3b', 'average _pool']
LAST = E[:-1] + ['max _pool']
BLOCKS = {'5b': A, '5c': A, '5d': A, '6a': B, '6b': C, '6c': C, '6d': C, '6e': C,
          '7a': D, '7b': E, '7c': LAST}
NORM = ('running_mean', 'running_var', 'weight', 'bias')


def run_branch(weights, x, prefix, names):
    """Applies the convolutions and pools of a branch, one after another."""
    for name in names.split():
        if name == 'average':       # of real neighbours only, as in TensorFlow
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        elif name == 'max':
            x = F.max_pool2d(x, 3, 1, 1)
        elif name == 'max!!':
            x = F.max_pool2d(x, 3, 2)
        else:
            stride = 2 if '!!' in name else 1
            padding = 'valid' if '!' in name else 'same'
            name = prefix + name.strip('!')
            x = F.conv2d(x, weights[f'{name}.conv.weight'], None, stride, padding)
            norm = [weights[f'{name}.bn.{part}'] for part in NORM]
            x = F.relu(F.batch_norm(x, *norm, eps=1e-3))
    return x


@torch.no_grad()
def inception_features(weights, images):
    """(B, H, W, 3) uint8 images -> (B, 2048) float32 pool features. weights is a state dict."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    x = F.interpolate(x, (299, 299), mode='bilinear')       # no antialias
    x = run_branch(weights, x, 'Conv2d_', STEM)
    for block, branches in BLOCKS.items():
        prefix = f'Mixed_{block}.branch'
        x = torch.cat([run_branch(weights, x, prefix, names) for names in branches], dim=1)
    return x.mean((2, 3))


def load_inception(file, device):
    """The weights in a file, or the published ones, which torch.hub keeps, if file is ''."""
    with exit_on_error(f'cannot load the Inception weights {file!r}: save {URL} '
                       'and give --inception=FILE'):
        if not file:
            return torch.hub.load_state_dict_from_url(URL, map_location=device, check_hash=True,
                                                      weights_only=True)
        return torch.load(file, map_location=device, weights_only=True)


def mean_and_covariance(features):
    """Of features (N, D) float32: (D,) and (D, D) float64 arrays."""
    features = features.cpu().double().numpy()
    mean = features.mean(0)
    features -= mean
    return mean, features.T @ features / (len(features) - 1)


def frechet_distance(mu1, S1, mu2, S2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of means (D,) and covariances (D, D), float64.

    The trace of the root is the sum of the roots of the eigenvalues of R^T S2 R, where R R^T = S1.
    That is symmetric, so they are real, whatever the rank.
    """
    values, V = eigh(S1)
    kept = values >= values.max() * len(values) * np.finfo(float).eps   # else rounding
    R = V[:, kept] * np.sqrt(values[kept])
    eigenvalues = eigh(R.T @ S2 @ R, eigvals_only=True).clip(min=0)
    traces = S1.trace() + S2.trace() - 2 * np.sqrt(eigenvalues).sum()
    return max(((mu1 - mu2) ** 2).sum() + traces, 0.0)


def precision_recall(samples, reference, k=3):
    """Kynkaanniemi et al. 2019, of features (N, D) and (M, D), more than k each.

    The ball of a feature reaches to the k-th nearest other of its set. Precision is the share of
    samples in the ball of some reference, recall that of references in the ball of some sample.
    """
    # Without matrix products, whose rounding makes equal distances unequal
    distances = partial(torch.cdist, compute_mode='donot_use_mm_for_euclid_dist')
    sample_radii = distances(samples, samples).kthvalue(k + 1).values   # itself is the first
    reference_radii = distances(reference, reference).kthvalue(k + 1).values
    between = distances(samples, reference)
    precise = (between <= reference_radii).any(1).sum().item()
    recalled = (between <= sample_radii[:, None]).any(0).sum().item()
    return precise / len(samples), recalled / len(reference)


def open_images(path, size):
    """read, items and size of a dataset of pixels, an .npz (arr_0) or a folder, as a dict.

    read(item) is an image, (H, W, 1 or 3) uint8, and size (H, W). A folder's images are cropped to
    --size, if it is given.
    """
    if os.path.isfile(f'{path}/meta.json'):
        data = Dataset(path)
        check(not data.meta['vae'], f'{path!r} is of latents: give their pictures')
        read, items = data.array.__getitem__, data.rows[:data.n_train]
    elif path.endswith('.npz'):
        with exit_on_error(f'{path!r} has no images (arr_0)'):
            images = np.load(path)['arr_0']
        check(images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3),
              f'{path!r} has no uint8 images in grey or RGB, but {images.dtype} {images.shape}')
        read, items = images.__getitem__, range(len(images))
    else:
        read, items = partial(read_picture, size=size), list_pictures(path)[0]
    check(len(items) > 1, f'{path!r} must have 2 images or more')
    with exit_on_error(f'{path!r} has an image that cannot be read', OSError):
        found = read(items[0]).shape[:2]
    check(found == (size, size) or not size, f'{path!r} is of {found}: --size crops folders')
    return dict(read=read, items=items, size=found)


def load_statistics(path):
    """mu, sigma, count and size of an .npz of statistics, a dict; None if the path is of images.

    count is 0 and size, (H, W), is () where it is not stated, as in ADM's.
    """
    with exit_on_error(f'{path!r} has no images (arr_0) or statistics (mu, sigma)'):
        if not path.endswith('.npz') or 'mu' not in np.load(path):
            return None
        arrays = np.load(path)
        mu, sigma, count = arrays['mu'], arrays['sigma'], int(arrays.get('count', 0))
        size = tuple(arrays.get('size', np.array([])).tolist())
    check(mu.shape + sigma.shape == (2048,) * 3 and np.isfinite(mu.sum() + sigma.sum()),
          f'mu and sigma in {path!r} must be of 2048 features, and finite')
    return dict(mu=mu, sigma=sigma, count=count, size=size)


def extract(weights, images, batch_size, device, rank, world):
    """The features (N, 2048) float32 of what open_images returns. Each process extracts a share."""
    items = images['items']
    features = torch.zeros(len(items), 2048, device=device)
    with ThreadPoolExecutor() as pool:
        for i in tqdm(range(rank * batch_size, len(items), world * batch_size), disable=rank > 0):
            with exit_on_error('an image cannot be read', OSError):
                batch = list(pool.map(images['read'], items[i:i + batch_size]))
            sizes = {image.shape[:2] for image in batch}
            check(sizes == {images['size']}, f'images differ in size, as {sizes}: give --size=N')
            x = torch.from_numpy(np.stack(batch)).expand(-1, -1, -1, 3)   # grey or RGB
            with exit_on_error(f'the weights are not those at {URL}', KeyError):
                features[i:i + batch_size] = inception_features(weights, x.to(device))
    all_sum(features)
    check(features.isfinite().all(), 'features are not finite: are the weights right?')
    return features


if __name__ == '__main__':
    samples = ''            # a folder, an .npz of images, or a dataset of pixels
    ref = ''                # the same, or an .npz of statistics
    save_stats = ''         # an .npz for the statistics of ref
    size = 0                # crop a folder's pictures to this, as data.py; 0 does not
    inception = ''          # a file of weights; '' downloads the published ones once
    batch_size = 64         # of each process
    pr_samples = 10_000     # precision and recall are of the first so many of each
    device = 'auto'
    configure(globals())
    check(batch_size > 0, 'batch_size must be at least 1')
    check(ref and (samples or save_stats), 'give --ref=B and --samples=A or --save_stats=C')
    check(os.path.isdir(os.path.dirname(save_stats) or '.'), f'no folder for {save_stats!r}')
    check(save_stats.endswith('.npz') or not save_stats, 'save_stats must be NAME.npz')
    check(not save_stats or realpath(save_stats) not in map(realpath, (samples, ref)),
          f'{save_stats} is an input: give another --save_stats')
    device, rank, world = launch(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    # All files are opened before the work
    statistics = load_statistics(ref)
    reference = statistics or open_images(ref, size)        # both have a size
    if samples:
        images = open_images(samples, size)
        check(reference['size'] in ((), images['size']), f'samples are of {images["size"]}, '
              f'but ref of {reference["size"]}: give --size=N to crop folders')
    weights = load_inception(inception, device)

    b = None
    if statistics is None:
        b = extract(weights, reference, batch_size, device, rank, world)
        mu, sigma = mean_and_covariance(b)
        statistics = dict(mu=mu, sigma=sigma, count=len(b), size=reference['size'])
    if samples:
        a = extract(weights, images, batch_size, device, rank, world)
    if rank > 0:
        raise SystemExit
    n_ref = statistics['count']
    result = dict(samples=samples, ref=ref, n_ref=n_ref, size=reference['size'],
                  inception=inception or URL)
    if samples:
        mu, sigma = mean_and_covariance(a)
        distance = frechet_distance(mu, sigma, statistics['mu'], statistics['sigma'])
        result |= dict(n_samples=len(a), size=images['size'], fid=distance)
        if len(a) <= 2048 or 0 < n_ref <= 2048:
            print('warning: up to 2,048 images covariances are singular: FID is too high')
    if samples and b is not None and min(len(a), len(b), pr_samples) > 3:
        a, b = a[:pr_samples], b[:pr_samples]
        precision, recall = precision_recall(a, b)
        result |= dict(precision=precision, recall=recall, pr_samples=len(a), pr_ref=len(b))
    print(json.dumps(result))
    if save_stats:
        with exit_on_error(f'cannot write {save_stats}'):
            np.savez(save_stats, **statistics)
