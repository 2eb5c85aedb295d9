"""Makes data/fashion from the four files of Fashion-MNIST.

They are {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz, which
https://github.com/zalandoresearch/fashion-mnist links: 70,000 grey pictures of clothes, 28 x 28, MIT licence.

    python tests/experiments/fashion.py --source=DOWNLOADS

The pictures get a border of 2 black pixels: 32 x 32. The 10,000 of the test set, t10k, are held out.
"""
import gzip
import json
import os
from pathlib import Path

import numpy as np

import project
from configurator import check, configure, exit_on_error

CLASSES = ['t-shirt', 'trousers', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'boot']


def read_idx(file):
    """The array of bytes in an idx file: two zeros, the type 8, the number of axes, their lengths (int32), and it."""
    content = gzip.decompress(Path(file).read_bytes())
    if content[:3] != b'\0\0\x08':
        raise ValueError(f'{file} holds no bytes')
    start = 4 + 4 * content[3]
    return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], '>i4'))


if __name__ == '__main__':
    source = '.'            # the folder with the four files
    out = 'data/fashion'
    configure(globals())
    out = out.rstrip('/')
    check(not os.path.exists(out), f'{out} exists: delete it, or give another --out')
    four_files = f'{source} must hold the four files of Fashion-MNIST, whole: -ubyte.gz'
    with exit_on_error(four_files):
        images = np.concatenate([read_idx(f'{source}/{part}-images-idx3-ubyte.gz') for part in ('train', 't10k')])
        labels = np.concatenate([read_idx(f'{source}/{part}-labels-idx1-ubyte.gz') for part in ('train', 't10k')])
    check(images.shape == (70_000, 28, 28) and labels.shape == (70_000,), four_files)
    meta = dict(source='Fashion-MNIST', size=32, image_size=32, channels=1, count=len(images), heldout=10_000,
                classes=CLASSES, flips=1, vae='')
    temporary = f'{out}.{os.getpid()}'      # the folder appears complete
    with exit_on_error(f'cannot write {out}'):
        os.makedirs(temporary)
        np.save(f'{temporary}/images.npy', np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None])
        np.save(f'{temporary}/labels.npy', labels.astype(np.int64))
        Path(f'{temporary}/meta.json').write_text(json.dumps(meta))
        os.rename(temporary, out)
    print(f'{out}: {len(images)} pictures of {len(CLASSES)} classes, the last 10,000 held out')
