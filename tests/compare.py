"""
Trains the systems and the ablations of the paper's tables on digits, at equal training FLOPs, and prints one table.

    python tests/compare.py                                 # all, three seeds of the four systems: over two hours
    python tests/compare.py --only=lapflow,lfm --seeds=1    # some

Run it again to go on where it stopped: each variant's run and result is kept in out_dir. The budget is that of LapFlow
with config/digits.py and `iters` iterations; the others train as many iterations as cost the same (forward FLOPs of a
packed batch, by torch's counter). Samples are class-conditional, without guidance, 40 Euler steps; NFE and seconds are
dopri5's at 1e-5 for one image. Accuracy and Frechet distance are by tests/judge.py.
"""
import csv
import json
import os
import statistics
import subprocess
import sys

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]
from bench import seconds_per_image, trajectory_average  # noqa: E402
from configurator import configure  # noqa: E402
from data import Dataset  # noqa: E402
from judge import frechet, load_judge, read  # noqa: E402
from model import LapFlow, LapFlowConfig, packed_counts, states_and_targets  # noqa: E402
from sample import load_checkpoint  # noqa: E402

SYSTEMS = {'lapflow': [], 'lfm': ['--T=()'], 'pyramidal': ['--flow=pyramidal', '--shared=qkv,proj,ffn,mod'],
           'edify': ['--flow=edify']}
ABLATIONS = {
    '2b separate scales': ['--mask=self'], '2c mask none': ['--mask=none'], '2d T=0.1': ['--T=0.1'],
    '2d T=0.2': ['--T=0.2'], '2d T=0.9': ['--T=0.9'], '2e final rate 2e-3': ['--decay_lr=False'],
    '2f LFM, GVP': ['--T=()', '--path=gvp'], '2f GVP': ['--path=gvp'], 'D quadratic': ['--path=quadratic'],
    'D cubic': ['--path=cubic'], '2g 3 scales': ['--T=0.67,0.33'], '2g 4 scales': ['--T=0.75,0.5,0.25'],
    'ffn,mod shared': ['--shared=ffn,mod'], 'all shared': ['--shared=qkv,proj,ffn,mod']}


def training_flops(config, B):
    """Forward FLOPs of one packed batch."""
    shape = (B, config.channels, config.size, config.size)
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        x_t, _ = states_and_targets(torch.empty(shape), torch.empty(shape), torch.empty(B),
                                    packed_counts(B, config.K), config)
        LapFlow(config)(x_t, torch.empty(B), torch.empty(B, dtype=torch.long))
    return counter.get_total_flops()


def run(script, *args):
    subprocess.run([sys.executable, os.path.join(ROOT, script), *args], check=True)


def result_of(name, args, seed, iters, batch_size, out_dir, data, judge):
    """Trains, samples and judges one variant, or finds its result."""
    folder = os.path.join(out_dir, f'{name.replace(" ", "-").replace(",", "-")}-{seed}')
    result_file, ckpt = os.path.join(folder, 'result.json'), os.path.join(folder, 'ckpt.pt')
    if os.path.exists(result_file):
        with open(result_file) as f:
            return json.load(f)
    run('train.py', 'config/digits.py', *args, f'--max_iters={iters}', f'--seed={seed}', f'--out_dir={folder}',
        f'--batch_size={batch_size}', f'--eval_interval={iters}', '--log_interval=100', '--sample_images=20')
    run('sample.py', '--ckpt', ckpt, '--cfg=1', '--method=euler', '--steps=40', '--num_samples=2000',
        f'--seed={seed}', f'--out={folder}/samples.npz')
    with np.load(f'{folder}/samples.npz') as arrays:
        images, labels = torch.from_numpy(arrays['arr_0']), arrays['arr_1']
    predicted, features = read(judge, images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    reference = read(judge, data.batch(np.arange(len(labels)))[0])[1]
    checkpoint = load_checkpoint(ckpt, 'cpu')
    model = LapFlow(LapFlowConfig(**checkpoint['model_args'])).eval()
    model.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    seconds, _, nfes = seconds_per_image(model, 1, torch.tensor([3]), 'dopri5', 50, 1e-5, 1.0, lambda x: x, 'cpu')
    with open(os.path.join(folder, 'log.csv')) as f:
        speed = statistics.median(float(row['images_per_s']) for row in csv.DictReader(f))
    result = dict(iters=iters, accuracy=float((predicted == labels).mean()), frechet=frechet(features, reference),
                  nfe=float(np.mean(nfes)), gflops=trajectory_average(model.config) / 1e9, images_per_s=speed,
                  seconds=seconds)
    with open(result_file, 'w') as f:
        json.dump(result, f)
    return result


if __name__ == '__main__':
    only = ''               # names of variants, with commas; '' is all
    seeds = 3               # of the four systems; ablations take seed 0
    iters = 2000
    batch_size = 64
    patch = 4
    out_dir = 'out-compare'
    configure(globals())
    data, variants = Dataset('digits'), SYSTEMS | ABLATIONS
    judge = load_judge(data)
    names = only.split(',') if only else list(variants)
    fields = dict(size=32, channels=1, patch=patch, width=128, depth=4, heads=4, n_classes=10)
    budget = iters * training_flops(LapFlowConfig(**fields), batch_size)
    print('| variant | seeds | iterations | accuracy | Frechet | NFE | GFLOPs | images/s | s/image |')
    print('| --- ' * 9 + '|')
    for name in names:
        changed = configure(dict(T=(0.5,), mask='causal', shared='', path='linear', flow='lapflow', decay_lr=True),
                            variants[name])
        model_fields = {key: changed[key] for key in ('T', 'mask', 'shared', 'path', 'flow')}
        own = round(budget / training_flops(LapFlowConfig(**fields, **model_fields), batch_size))
        results = [result_of(name, [*variants[name], f'--patch={patch}'], seed, own, batch_size, out_dir, data, judge)
                   for seed in range(seeds if name in SYSTEMS else 1)]
        cell = lambda key, form: ' ± '.join(form.format(f(r[key] for r in results)) for f in (
            (statistics.mean, statistics.stdev) if len(results) > 1 else (statistics.mean,)))
        print(f'| {name} | {len(results)} | {own} | {cell("accuracy", "{:.4f}")} | {cell("frechet", "{:.1f}")} | '
              f'{cell("nfe", "{:.0f}")} | {cell("gflops", "{:.3f}")} | {cell("images_per_s", "{:.0f}")} | '
              f'{cell("seconds", "{:.2f}")} |', flush=True)
