"""FID, and precision and recall, of one set of images against another.

    python fid.py --samples=samples.npz --ref=data/celebahq256      # a prepared dataset of pixels: its training images
    python fid.py --samples=samples/ --ref=images.zip --size=256    # folders and zips: cropped, resized as by data.py
    python fid.py --ref=images.zip --size=256 --save_stats=F.npz    # statistics once ...
    python fid.py --samples=samples.npz --ref=F.npz                 # ... for many comparisons; ADM's files work too
    torchrun --nproc_per_node=8 fid.py --samples=A --ref=B

Network, weights and resizing are pytorch-fid's. Precision and recall are on Inception's pool features, as ADM's
(StyleGAN's are on VGG's: other numbers). The last line of output is JSON and states every number and count."""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.linalg import eigh
from tqdm import tqdm

from configurator import check, configure, explain, launch
from data import Dataset, ImageFiles, center_crop

URL = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth'
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'


@torch.no_grad()
def inception_features(weights, images):
    """The FID Inception: (B, H, W, 3) uint8 images -> (B, 2048) float32 pool features. `weights` is a state dict with
    torchvision's names for InceptionV3; their shapes say how wide the network is. What the original TensorFlow graph
    has otherwise is so here: averages leave out padding, and the last block's pool is a max."""
    def conv(x, name, stride=1, pad=True):
        w = weights[f'{name}.conv.weight']
        x = F.conv2d(x, w, None, stride, [n // 2 for n in w.shape[2:]] if pad and stride == 1 else 0)
        norm = [weights[f'{name}.bn.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias')]
        return F.relu(F.batch_norm(x, *norm, eps=1e-3))

    def chain(x, name, n, stride=1):
        """NAME_1 to NAME_n one after another; the stride is the last one's."""
        for i in range(1, n + 1):
            x = conv(x, f'{name}_{i}', stride if i == n else 1)
        return x

    def cat(*branches):
        return torch.cat(branches, 1)

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    x = F.interpolate(x, (299, 299), mode='bilinear', align_corners=False)      # no antialias
    x = conv(conv(x, 'Conv2d_1a_3x3', 2), 'Conv2d_2a_3x3', pad=False)
    x = F.max_pool2d(conv(x, 'Conv2d_2b_3x3'), 3, 2)
    x = F.max_pool2d(conv(conv(x, 'Conv2d_3b_1x1'), 'Conv2d_4a_3x3', pad=False), 3, 2)
    for block in ('Mixed_5b', 'Mixed_5c', 'Mixed_5d'):
        x = cat(conv(x, f'{block}.branch1x1'), chain(x, f'{block}.branch5x5', 2), chain(x, f'{block}.branch3x3dbl', 3),
                conv(average(x), f'{block}.branch_pool'))
    x = cat(conv(x, 'Mixed_6a.branch3x3', 2), chain(x, 'Mixed_6a.branch3x3dbl', 3, 2), F.max_pool2d(x, 3, 2))
    for block in ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'):
        x = cat(conv(x, f'{block}.branch1x1'), chain(x, f'{block}.branch7x7', 3), chain(x, f'{block}.branch7x7dbl', 5),
                conv(average(x), f'{block}.branch_pool'))
    x = cat(chain(x, 'Mixed_7a.branch3x3', 2, 2), chain(x, 'Mixed_7a.branch7x7x3', 4, 2), F.max_pool2d(x, 3, 2))
    for block in ('Mixed_7b', 'Mixed_7c'):
        pool = average(x) if block == 'Mixed_7b' else F.max_pool2d(x, 3, 1, 1)
        a, b = conv(x, f'{block}.branch3x3_1'), chain(x, f'{block}.branch3x3dbl', 2)
        x = cat(conv(x, f'{block}.branch1x1'), conv(a, f'{block}.branch3x3_2a'), conv(a, f'{block}.branch3x3_2b'),
                conv(b, f'{block}.branch3x3dbl_3a'), conv(b, f'{block}.branch3x3dbl_3b'),
                conv(pool, f'{block}.branch_pool'))
    return x.mean((2, 3))


def load_inception(file, device):
    """The weights, and 'published' or the sha256 of others; '' is torch.hub's cache, filled when empty."""
    with explain(f'cannot load the Inception weights {file!r}: put {URL} in a file and give --inception=FILE'):
        options = dict(map_location=device, weights_only=True)
        weights = torch.load(file, **options) if file else \
            torch.hub.load_state_dict_from_url(URL, check_hash=True, **options)
        cached = f'{torch.hub.get_dir()}/checkpoints/{os.path.basename(URL)}'
        sha256 = hashlib.sha256(Path(file or cached).read_bytes()).hexdigest()
        inception_features(weights, torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device=device))   # are they complete?
    return weights, 'published' if sha256 == SHA256 else sha256


def frechet_distance(mu1, S1, mu2, S2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of means (D,) and covariances (D, D), float64 arrays. The last trace
    is the sum of the roots of the eigenvalues of the symmetric sqrt(S1) S2 sqrt(S1): real and finite at any rank."""
    values, V = eigh(S1)
    kept = values >= values.max() * len(values) * np.finfo(float).eps   # else rounding, which roots enlarge
    root = V[:, kept] * np.sqrt(values[kept])       # root root^T = S1
    eigenvalues = eigh(root.T @ S2 @ root, eigvals_only=True).clip(min=0)
    distance = ((mu1 - mu2) ** 2).sum() + S1.trace() + S2.trace() - 2 * np.sqrt(eigenvalues).sum()
    return max(distance, 0.0)


def precision_recall(samples, reference, k=3):
    """Kynkaanniemi et al. 2019, of features (N, D) and (M, D), more than k each. Precision: the share of samples within
    the ball of some reference; recall: of references within that of some sample. The ball of a feature reaches to the
    k-th nearest of the others in its set, bounds included."""
    def distances(a, b):    # differences are summed: by matrix products, equal distances would not come out equal
        return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')

    def radii(x):           # itself is the nearest
        return distances(x, x).kthvalue(k + 1).values
    between = distances(samples, reference)
    precision, recall = (between <= radii(reference)).any(1), (between <= radii(samples)[:, None]).any(0)
    return precision.double().mean().item(), recall.double().mean().item()


def open_images(path, size=0):
    """(image, count) of a prepared dataset, an .npz (arr_0), a folder tree or a .zip; of the last two, center_crop if
    size > 0. image(i) is an (H, W, C) uint8 array."""
    with explain(f'{path!r} cannot be read as a prepared dataset, an .npz with arr_0, a folder or a .zip of images'):
        if os.path.isfile(f'{path}/meta.json'):
            data = Dataset(path)
            check(not data.meta['vae'], f'{path!r} is a dataset of latents: give the images that it was made from')
            return lambda i: data.array[data.rows[i]], data.n_train
        if path.endswith('.npz'):
            array = np.load(path)['arr_0']
            check(array.dtype == np.uint8, f'{path!r} has images of {array.dtype}: they must be uint8, N x H x W x C')
            return array.__getitem__, len(array)
        files = ImageFiles(path)
        return lambda i: center_crop(files.read(i), size) if size else np.asarray(files.read(i)), len(files.names)


def load_statistics(file):
    """The dict of an .npz of statistics: mu, sigma and, where stated, count, size, inception; None for other files. And
    whether the file has images, as ADM's statistics have."""
    if not file.endswith('.npz'):
        return None, True
    with explain(f'{file!r} cannot be read as an .npz of images (arr_0) or statistics (mu, sigma)'):
        with np.load(file) as f:
            if 'mu' not in f:
                return None, True
            check(f['sigma'].shape == (2048, 2048), f'mu and sigma in {file!r} must be of 2048 features')
            stated = {key: f[key].item() for key in ('count', 'size', 'inception') if key in f}
            return dict(mu=f['mu'], sigma=f['sigma'], **stated), 'arr_0' in f


def extract(weights, image, count, keep, batch_size, device, rank=0, world=1):
    """The statistics of images 0 .. count - 1, a dict of their features' mu (2048,) and sigma (2048, 2048), summed up
    in float64, count and size; and the features (keep, 2048) of the first keep. Ranks read images rank::world."""
    first = torch.zeros(2048, dtype=torch.float64, device=device)
    second, kept, share = first.outer(first), torch.zeros(keep, 2048, device=device), range(rank, count, world)
    with ThreadPoolExecutor() as pool:
        for i in tqdm(range(0, len(share), batch_size), disable=rank):
            index = share[i:i + batch_size]
            with explain('images cannot be read, are neither grey nor RGB, or differ in size: then give --size'):
                images = torch.from_numpy(np.stack(list(pool.map(image, index)))).expand(-1, -1, -1, 3)
            features = inception_features(weights, images.to(device))
            mine = [j for j in index if j < keep]
            kept[mine] = features[:len(mine)]
            features = features.double()
            first += features.sum(0)
            second += features.T @ features
    for part in (first, second, kept):
        if world > 1:
            dist.all_reduce(part)
    mean = first / count
    covariance = (second - count * mean.outer(mean)) / (count - 1)
    return dict(mu=mean.cpu().numpy(), sigma=covariance.cpu().numpy(), count=count, size=len(image(0))), kept


if __name__ == '__main__':
    samples = ''            # a folder, .zip, .npz of images or prepared dataset
    ref = ''                # the same, or an .npz of statistics
    save_stats = ''         # an .npz for the statistics of ref
    size = 0                # crop and resize folders and zips to this, as data.py does; 0 takes images as they are
    inception = ''          # a file of weights; '' downloads the published ones once
    batch_size = 64         # per process
    pr_samples = 10000      # precision and recall use the first so many of each, which should be in random order
    device = 'auto'
    configure(globals())
    check(ref and (samples or save_stats), 'give --ref=B, and --samples=A or --save_stats=FILE.npz')
    device, rank, world = launch(device)
    device = 'cpu' if device == 'mps' else device       # mps has no float64
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False     # full float32 features

    # What is wrong with files shows before the network is loaded. ADM's references are statistics and some images.
    stats, has_images = load_statistics(ref)
    image_a, n_a = open_images(samples, size) if samples else (None, 0)
    image_b, n_b = open_images(ref, size) if has_images else (None, 0)
    weights, made_with = load_inception(inception, device)
    check(not stats or stats.get('inception', made_with) == made_with, f'{ref!r} is of other Inception weights')

    pr_a, pr_b = (min(n, pr_samples) if n_a and n_b else 0 for n in (n_a, n_b))
    share = batch_size, device, rank, world
    if pr_b or not stats:
        of_images, b = extract(weights, image_b, pr_b if stats else n_b, pr_b, *share)
        stats = stats or of_images
    if samples:
        drawn, a = extract(weights, image_a, n_a, pr_a, *share)
    if rank > 0:
        raise SystemExit

    n = stats.get('count')
    result = dict(samples=samples, ref=ref, n_ref=n, ref_size=stats.get('size'), inception=made_with)
    if save_stats:
        np.savez(save_stats, **stats | dict(source=ref, inception=made_with))
    if samples:
        result |= dict(n_samples=n_a, size=drawn['size'],
                       fid=frechet_distance(drawn['mu'], drawn['sigma'], stats['mu'], stats['sigma']))
        if min(n_a, n or n_a) < 2048:
            print('warning: below 2,048 images the covariances are singular and FID is far too high')
    if min(pr_a, pr_b) > 3:
        precision, recall = precision_recall(a, b)
        result |= dict(precision=precision, recall=recall, k=3, pr_samples=pr_a, pr_ref=pr_b)
    print(json.dumps(result))
