"""
Makes data/fashion from the four files of Fashion-MNIST, {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz, which
https://github.com/zalandoresearch/fashion-mnist links: 70,000 grey pictures of clothes, 28 x 28, MIT licence.

    python tests/fashion.py --source=DOWNLOADS

The pictures get a border of 2 black pixels: 32 x 32. The 10,000 of the test set, t10k, are held out.
"""
import gzip
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import claim, configure, explain  # noqa: E402

CLASSES = ['t-shirt', 'trousers', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'boot']


def read_idx(file):
    """The array of bytes in an idx file: two zeros, the type 8, the number of axes, their lengths (int32), and it."""
    content = gzip.decompress(Path(file).read_bytes())
    assert content[:3] == b'\0\0\x08', 'it holds no bytes'
    start = 4 + 4 * content[3]
    return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], '>i4'))


if __name__ == '__main__':
    source = '.'            # the folder with the four files
    out = 'data/fashion'
    configure(globals())
    with explain(f'{source} must hold the four files of Fashion-MNIST, whole: -ubyte.gz'):
        images, labels = (np.concatenate([read_idx(f'{source}/{part}-{what}-ubyte.gz') for part in ('train', 't10k')])
                          for what in ('images-idx3', 'labels-idx1'))
        assert images.shape == (70_000, 28, 28) and labels.shape == (70_000,)
    claim(out, 'meta.json', dict(source='Fashion-MNIST', size=32, image_size=32, channels=1, count=len(images),
                                 heldout=10_000, classes=CLASSES, flips=1, vae=''))
    np.save(f'{out}/images.npy', np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None])
    np.save(f'{out}/labels.npy', labels.astype(np.int64))
    print(f'{out}: {len(images)} pictures of {len(CLASSES)} classes, the last 10,000 held out')
