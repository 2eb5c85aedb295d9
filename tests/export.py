"""
Makes a small file of a checkpoint: its weights alone, EMA if there is one, in half precision. sample.py draws from it.

    python tests/export.py --ckpt out-fashion/ckpt.pt --out=assets/fashion.pt
"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import check, configure, explain  # noqa: E402
from sample import load_checkpoint  # noqa: E402

if __name__ == '__main__':
    ckpt = 'out/ckpt.pt'
    out = ''
    configure(globals())
    check(out.endswith('.pt'), f'give a file to write, --out=NAME.pt, not {out!r}')
    checkpoint = load_checkpoint(ckpt)
    weights = checkpoint['ema'] or checkpoint['model']
    checkpoint.update(model={name: w.half() for name, w in weights.items()}, ema=None)
    del checkpoint['optimizer']
    with explain(f'cannot write {out}', RuntimeError):
        torch.save(checkpoint, out)
    print(f'{out}: {os.path.getsize(out) / 1e6:.2f} MB')
