"""
FID, and precision and recall, of one set of images against another.

    python fid.py --samples=samples.npz --ref=data/celebahq256      # a prepared dataset of pixels: its training images
    python fid.py --samples=samples/ --ref=images.zip --size=256    # folders and zips: cropped, resized as by data.py
    python fid.py --ref=images.zip --size=256 --save_stats=F.npz    # statistics once ...
    python fid.py --samples=samples.npz --ref=F.npz                 # ... for many comparisons; ADM's files work too
    torchrun --nproc_per_node=8 fid.py --samples=A --ref=B

Network, weights and resizing are pytorch-fid's. Precision and recall are on Inception's pool features, as ADM's
(StyleGAN's are on VGG's: other numbers). The last line of output is JSON and states every number and count.
"""
import hashlib
import json
import math
import os
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from configurator import configure, in_words
from data import Dataset, ImageFiles, center_crop, launch

URL = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth'
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'


def fail(sentence):
    raise SystemExit(f'fid.py: {sentence}')


@contextmanager
def reading(path, what):
    """Whatever goes wrong inside ends the script with one sentence."""
    try:
        yield
    except Exception as error:
        fail(f'{path!r} cannot be read as {what}: it is damaged or something else ({in_words(error)})')


def conv(c_in, c_out, kernel, stride=1, padding=0):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
                                     bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU()))


class Mixed(nn.Module):
    """
    An Inception block, (B, c_in, H, W) -> (B, C, H', W'): branches of convolutions, each a text like '64:1x1 96:3x3'
    ('384:1x3+3x1' are two side by side), and a pool with a convolution to c_pool channels, if c_pool > 0, concatenated.
    Where the pool halves the grid, so do the last convolutions of the branches.
    """

    def __init__(self, c_in, pool, c_pool=0, **branches):
        super().__init__()
        self.branches = []      # of layers, of the names of the convolutions side by side: torchvision's names
        for branch, text in branches.items():
            c, layers, names = c_in, text.split(), []
            for i, layer in enumerate(layers):
                name = branch if len(layers) == 1 else f'{branch}_{i + 1}'
                stride = pool.stride if i == len(layers) - 1 else 1
                channels, *kernels = layer.replace('+', ':').split(':')
                names.append([name] if len(kernels) == 1 else [name + 'a', name + 'b'])
                for name, kernel in zip(names[-1], kernels):
                    h, w = int(kernel[0]), int(kernel[2])
                    padding = (h // 2, w // 2) if stride == 1 else 0
                    self.add_module(name, conv(c, int(channels), (h, w), stride, padding))
                c = int(channels)
            self.branches.append(names)
        self.pool = pool
        self.branch_pool = conv(c_in, c_pool, 1) if c_pool else nn.Identity()

    def forward(self, x):
        outputs = []
        for layers in self.branches:
            h = x
            for names in layers:
                h = torch.cat([getattr(self, name)(h) for name in names], 1)
            outputs.append(h)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Sequential):
    """
    The FID Inception: torchvision's InceptionV3, parameter names included, with what the original TensorFlow graph has
    otherwise: averages leave out padding, the last block's pool is a max, 1008 classes. Use it in eval mode.
    """

    def __init__(self):
        average, halve = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2)
        double = '64:1x1 96:3x3 96:3x3'

        def block_a(c_in, c_pool):
            return Mixed(c_in, average, c_pool, branch1x1='64:1x1', branch5x5='48:1x1 64:5x5', branch3x3dbl=double)

        def block_c(c):
            return Mixed(768, average, 192, branch1x1='192:1x1', branch7x7=f'{c}:1x1 {c}:1x7 192:7x1',
                         branch7x7dbl=f'{c}:1x1 {c}:7x1 {c}:1x7 {c}:7x1 192:1x7')

        def block_e(c_in, pool):
            return Mixed(c_in, pool, 192, branch1x1='320:1x1', branch3x3='384:1x1 384:1x3+3x1',
                         branch3x3dbl='448:1x1 384:3x3 384:1x3+3x1')
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, 3, stride=2),
            Conv2d_2a_3x3=conv(32, 32, 3),
            Conv2d_2b_3x3=conv(32, 64, 3, padding=1),
            maxpool1=halve,
            Conv2d_3b_1x1=conv(64, 80, 1),
            Conv2d_4a_3x3=conv(80, 192, 3),
            maxpool2=halve,
            Mixed_5b=block_a(192, 32), Mixed_5c=block_a(256, 64), Mixed_5d=block_a(288, 64),
            Mixed_6a=Mixed(288, halve, branch3x3='384:3x3', branch3x3dbl=double),
            Mixed_6b=block_c(128), Mixed_6c=block_c(160), Mixed_6d=block_c(160), Mixed_6e=block_c(192),
            Mixed_7a=Mixed(768, halve, branch3x3='192:1x1 320:3x3', branch7x7x3='192:1x1 192:1x7 192:7x1 192:3x3'),
            Mixed_7b=block_e(1280, average), Mixed_7c=block_e(2048, nn.MaxPool2d(3, 1, 1)),
            fc=nn.Linear(2048, 1008)))      # unused, but part of the weights

    @torch.no_grad()
    def forward(self, images):
        """(B, H, W, 3) uint8 -> (B, 2048) float32 pool features."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = F.interpolate(x, (299, 299), mode='bilinear', align_corners=False, antialias=False)
        for layer in list(self)[:-1]:
            x = layer(x)
        return x.mean((2, 3))


def load_inception(path, device):
    """The network, and 'published' or the sha256 of other weights; path '' is torch.hub's cache, filled when empty."""
    file = path or os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(URL))
    if not path and not os.path.isfile(file) and os.environ.get('LOCAL_RANK', '0') == '0':
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            torch.hub.download_url_to_file(URL, file, hash_prefix=SHA256, progress=False)
        except Exception as error:
            fail(f'cannot download the Inception weights ({error}): put {URL} at {file}, or give --inception=PATH')
    if dist.is_initialized():
        dist.barrier()
    with reading(file, f'the Inception weights of {URL}'):
        with open(file, 'rb') as f:
            sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
        if not path and sha256 != SHA256:
            raise ValueError('its sha256 differs; delete it, and it is downloaded anew')
        net = Inception()
        net.load_state_dict(torch.load(file, map_location='cpu', weights_only=True))
    return net.to(device).eval(), 'published' if sha256 == SHA256 else sha256


class Statistics:
    """Mean (D,) and scatter (D, D) of features, float64; batches are centred before they are summed."""

    def __init__(self, D=2048, device='cpu'):
        self.n = 0
        self.mean = torch.zeros(D, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(D, D, dtype=torch.float64, device=device)

    def update(self, features):
        """Adds features (N, D)."""
        for x in features.split(4096):
            x = x.to(self.mean)
            mean = x.mean(0)
            x = x - mean
            self.merge(len(x), mean, x.T @ x)

    def merge(self, n, mean, scatter):
        """Adds the mean and scatter of n > 0 other features (Chan et al. 1979)."""
        delta, total = mean - self.mean, self.n + n
        self.mean += delta * (n / total)
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.n * n / total)
        self.n = total

    def covariance(self):
        """(D, D), unbiased like numpy's cov; needs two features."""
        return self.scatter / (self.n - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of means (D,) and covariances (D, D), in float64. The last trace is the
    sum of the roots of the eigenvalues of the symmetric sqrt(S1) S2 sqrt(S1): real and finite at any rank, and most
    exact with the smaller set first.
    """
    mu1, S1, mu2, S2 = (torch.as_tensor(x, dtype=torch.float64, device='cpu') for x in (mu1, sigma1, mu2, sigma2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)    # eigh gains little from threads, and on busy cores they stall each other
    values, V = torch.linalg.eigh(S1)
    kept = values > values.max() * len(values) * torch.finfo(torch.float64).eps     # else rounding, which roots enlarge
    root = V[:, kept] * values[kept].sqrt()     # root root^T = S1
    eigenvalues = torch.linalg.eigvalsh(root.T @ S2 @ root).clamp(min=0)
    torch.set_num_threads(threads)
    distance = (mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(distance.item(), 0.0)


def precision_recall(samples, reference, k=3, block=512):
    """
    Kynkaanniemi et al. 2019, of features (N, D) and (M, D), more than k each. Precision: the share of samples within
    the ball of some reference; recall: of references within that of some sample. The ball of a feature reaches to the
    k-th nearest of the others in its set, bounds included.
    """
    # On a grid of 2^bits steps squared distances are integers up to 2^53, which float64 adds without rounding, in any
    # order: ties stay ties, and neither block nor device changes the result. bits is 20 at D = 2048.
    bits = (51 - math.ceil(math.log2(samples.shape[1]))) // 2
    exponent = math.frexp(max(samples.abs().max().item(), reference.abs().max().item()))[1]
    samples, reference = ((x.double() * 2.0 ** (bits - exponent)).round() for x in (samples, reference))

    def squared_distances(a, b):
        a2, b2 = (torch.einsum('nd,nd->n', x, x) for x in (a, b))
        return torch.addmm(a2[:, None] + b2, a, b.T, alpha=-2)

    def squared_radii(x):
        radii = []
        for i in range(0, len(x), block):
            d2 = squared_distances(x[i:i + block], x)
            d2.diagonal(i).fill_(torch.inf)     # itself
            radii.append(d2.kthvalue(k, dim=1).values)
        return torch.cat(radii)

    def share_inside(x, centres):
        r2 = squared_radii(centres)
        inside = [(squared_distances(rows, centres) <= r2).any(1) for rows in x.split(block)]
        return torch.cat(inside).sum().item() / len(x)

    return share_inside(samples, reference), share_inside(reference, samples)


def open_images(path, size=0):
    """
    The images of a prepared dataset, an .npz (arr_0), a folder tree or a .zip; if size > 0, center_crop of these two.
    Has .path, .count, .size (the height, 'HxW' if not square) and .batch(indices) -> (B, H, W, 3) uint8 tensor.
    """
    in_order = map
    with reading(path, 'a prepared dataset, an .npz with arr_0 (N x H x W x C uint8), a folder or a .zip of images'):
        if os.path.isfile(os.path.join(path, 'meta.json')):
            data = Dataset(path)
            if data.images is None:
                fail(f'{path!r} is a dataset of latents: give the images that it was made from')
            load, count = data.images.__getitem__, data.n_train
        elif path.endswith('.npz'):
            member = zipfile.ZipFile(path).open('arr_0.npy')    # read image by image: 50,000 are 10 GB
            np.lib.format.read_magic(member)
            (count, *shape), fortran, dtype = np.lib.format.read_array_header_1_0(member)
            start = member.tell()
            if dtype != np.uint8 or fortran or len(shape) != 3:
                raise ValueError(f'arr_0 is {dtype} of shape {(count, *shape)}')

            def load(i):
                member.seek(start + i * math.prod(shape))
                return np.frombuffer(member.read(math.prod(shape)), np.uint8).reshape(shape)
        else:
            files = ImageFiles(path)
            count, in_order = len(files), ThreadPoolExecutor().map

            def load(i):
                with reading(os.path.join(path, files.names[i]), 'an image'):
                    return center_crop(files.read(i), size) if size else np.asarray(files.read(i))
        if count < 2:
            fail(f'{path!r} holds {"one image" if count else "no images"}: a covariance needs at least 2')
        first = H, W, C = load(0).shape
    if C not in (1, 3):
        fail(f'the images in {path!r} have {C} channels: they must be grey or RGB')
    if size and (H, W) != (size, size):
        fail(f'{path!r} holds images of {H} x {W}: only folders and zips are resized to --size={size}')

    def batch(indices):
        with reading(path, 'images'):
            images = list(in_order(load, indices))
        if any(image.shape != first for image in images):
            fail(f'the images in {path!r} differ in size: give --size to crop and resize them')
        return torch.from_numpy(np.stack(images)).expand(-1, -1, -1, 3)
    return SimpleNamespace(path=path, count=count, size=H if H == W else f'{H}x{W}', batch=batch)


def load_statistics(path):
    """The dict of an .npz of statistics: mu, sigma and, where stated, count, size, inception. None for other files."""
    if not path.endswith('.npz'):
        return None
    with reading(path, 'an .npz of images (arr_0) or statistics (mu, sigma)'), np.load(path, allow_pickle=False) as f:
        if not {'mu', 'sigma'} <= set(f.files):
            return None
        if any(f.zip.getinfo(f'{key}.npy').file_size > 2 ** 26 for key in ('mu', 'sigma')):
            raise ValueError('mu and sigma are too large for 2048 features')
        mu, sigma = f['mu'], f['sigma']
        if mu.shape != (2048,) or sigma.shape != (2048, 2048) or not np.isfinite(mu.sum() + sigma.sum()):
            raise ValueError('mu and sigma must be finite and of 2048 features')
        stated = {key: f[key].item() for key in ('count', 'size', 'inception') if key in f.files}
        return dict(mu=mu, sigma=sigma, **stated)


def extract(net, images, count, keep, batch_size, device, rank=0, world=1):
    """The first count images' Statistics, features (keep, 2048) of the first keep; ranks read images rank::world."""
    share, kept = range(rank, count, world), []
    part = Statistics(device='cpu' if device == 'mps' else device)     # mps has no float64
    for i in tqdm(range(0, len(share), batch_size), desc=images.path, unit='batch', disable=rank > 0):
        features = net(images.batch(share[i:i + batch_size]).to(device))
        part.update(features)
        kept.append(features[:max(0, len(range(rank, keep, world)) - i)])
    parts = [(part.n, part.mean.cpu(), part.scatter.cpu(), [f.cpu() for f in kept])]
    if world > 1:
        mine, parts = parts[0], [None] * world
        dist.all_gather_object(parts, mine)
    total, features = Statistics(), torch.empty(keep, 2048)
    for r, (n, mean, scatter, kept) in enumerate(parts[:count]):
        total.merge(n, mean, scatter)
        features[r::world] = torch.cat(kept)
    if not total.scatter.isfinite().all():
        fail(f'the features of {images.path!r} are not finite: the Inception weights are damaged')
    return total, features


if __name__ == '__main__':
    samples = ''            # a folder, .zip, .npz of images or prepared dataset
    ref = ''                # the same, or an .npz of statistics
    save_stats = ''         # an .npz for the statistics of ref
    size = 0                # crop and resize folders and zips to this, as data.py does; 0 takes images as they are
    inception = ''          # a file of weights; '' downloads the published ones once
    batch_size = 64         # per process
    pr_samples = 10000      # precision and recall use the first so many of each; 0 is off
    device = 'auto'
    configure(globals())
    for wrong, sentence in (
            (not ref or not (samples or save_stats), 'give --ref=B, and --samples=A or --save_stats=FILE.npz'),
            (save_stats and not save_stats.endswith('.npz'), f'save_stats must end in .npz, but it is {save_stats!r}'),
            (size < 0 or pr_samples < 0 or batch_size < 1, 'size and pr_samples are 0 or more, batch_size 1 or more'),
            (samples and not os.path.exists(samples), f'there is no {samples!r}'),
            (not os.path.exists(ref), f'there is no {ref!r}')):
        if wrong:
            fail(sentence)
    device, rank, world = launch(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False     # full float32 features

    # What is wrong with files shows before the network is loaded. ADM's references are statistics and some images.
    stats = load_statistics(ref)
    if stats and save_stats:
        fail(f'{ref!r} has statistics already: --save_stats needs images')
    A = open_images(samples, size) if samples else None
    B = open_images(ref, 0 if stats else size) if not stats or 'arr_0' in np.load(ref).files else None
    net, weights = load_inception(inception, device)
    if stats and stats.get('inception', weights) != weights:
        fail(f'{ref!r} was made with other Inception weights ({stats["inception"]})')

    n_pr = [min(images.count, pr_samples) if A and B else 0 for images in (A, B)]
    if B and (n_pr[1] or not stats):
        total, b = extract(net, B, n_pr[1] if stats else B.count, n_pr[1], batch_size, device, rank, world)
        stats = stats or dict(mu=total.mean.numpy(), sigma=total.covariance().numpy(), count=B.count, size=B.size)
    if A:
        total, a = extract(net, A, A.count, n_pr[0], batch_size, device, rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        raise SystemExit

    result = dict(samples=samples, ref=ref, n_ref=stats.get('count'), ref_size=stats.get('size'), inception=weights)
    if weights != 'published':
        print('note: these are not the published Inception weights: compare with numbers of the same weights only')
    if save_stats:
        np.savez(save_stats, **stats, source=ref, inception=weights)
    if A:
        fid = frechet_distance(total.mean, total.covariance(), stats['mu'], stats['sigma'])
        result |= dict(fid=fid, n_samples=A.count, size=A.size)
        print(f'FID {fid:.4f}: {A.count} samples against {result["n_ref"] or "an unstated number of"} images')
        if min(A.count, result['n_ref'] or A.count) < 2048:
            print('warning: below 2,048 images the covariances are singular and FID is far too high')
        if A.size != (result['ref_size'] or A.size):
            print(f'warning: samples have size {A.size}, references {result["ref_size"]}')
        if min(n_pr) > 3:
            exact = 'cpu' if device == 'mps' else device
            precision, recall = precision_recall(a.to(exact), b.to(exact))
            result |= dict(precision=precision, recall=recall, k=3, pr_samples=n_pr[0], pr_ref=n_pr[1])
            print(f'precision {precision:.4f}, recall {recall:.4f} by Inception features, k = 3, '
                  f'of {n_pr[0]} samples and {n_pr[1]} references')
        elif pr_samples:
            print(f'no precision and recall: {"4 images of each are needed" if B else f"{ref!r} has no images"}')
    print(json.dumps(result))
