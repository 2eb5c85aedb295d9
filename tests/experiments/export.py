"""Makes a small file of a checkpoint: its weights alone, EMA if there is one, in half precision.

    python tests/experiments/export.py --ckpt out-fashion/ckpt.pt --out=assets/fashion.pt

sample.py draws from it.
"""
import os

import torch

import project
from configurator import check, configure, exit_on_error
from judge import restart_under_variant
from sample import load_checkpoint

if __name__ == '__main__':
    ckpt = 'out/ckpt.pt'
    out = ''
    configure(globals())
    check(out.endswith('.pt'), f'give a file to write, --out=NAME.pt, not {out!r}')
    check(os.path.realpath(out) != os.path.realpath(ckpt),
          f'{out} is the checkpoint itself: give another --out')
    restart_under_variant(ckpt)
    checkpoint = load_checkpoint(ckpt)
    weights = checkpoint['ema'] or checkpoint['model']
    checkpoint.update(model={name: w.half() for name, w in weights.items()}, ema=None)
    del checkpoint['optimizer']
    with exit_on_error(f'cannot write {out}'):
        torch.save(checkpoint, out)
    print(f'{out}: {os.path.getsize(out) / 1e6:.2f} MB')
