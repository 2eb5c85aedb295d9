"""
Trains the systems and the ablations of the paper's tables on digits, at equal training FLOPs, and prints one table.

    python tests/compare.py                                             # the four systems, three seeds
    python tests/compare.py --only=ablations --seeds=1 --iters=1000
    python tests/compare.py --only=lapflow,lfm --seeds=1 --patch=2 --out_dir=out-patch2

Run it again to go on where it stopped: what is trained and judged stays in out_dir. The budget is that of LapFlow with
config/digits.py and `iters` iterations; the others train as many iterations as cost the same (forward FLOPs of a packed
batch, by torch's counter). Samples are class-conditional, without guidance, 40 Euler steps, in bfloat16 where the
hardware has it; accuracy and Frechet distance are by tests/judge.py. The last columns are measured when all is trained,
with nothing beside them: images/s of whole eager training steps, and NFE and seconds of dopri5 at 1e-5 for one image.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]
from baselines import FLOWS  # noqa: E402
from bench import Trainer, config_of, flow_of, packed_flops, seconds_per_image, trajectory_average  # noqa: E402
from configurator import check, claim, configure  # noqa: E402
from data import Dataset  # noqa: E402
from judge import frechet, load_judge, read  # noqa: E402

# Settings of train.py, after the name of a baseline if it is one
SYSTEMS = {'lapflow': [], 'lfm': ['--T=()'], 'pyramidal': ['pyramidal', '--shared=qkv,proj,ffn,mod'],
           'edify': ['edify']}
ABLATIONS = {
    'lapflow': [], '2g 1 scale': ['--T=()'], '2g 3 scales': ['--T=0.67,0.33'], '2c mask none': ['--mask=none'],
    '2b 2c mask self': ['--mask=self'], '2f GVP': ['--path=gvp'], 'all shared': ['--shared=qkv,proj,ffn,mod'],
    '2d T=0.2': ['--T=0.2'], '2d T=0.9': ['--T=0.9'], '2e final rate 2e-3': ['--decay_lr=False'],
    'D quadratic': ['--path=quadratic'], 'D cubic': ['--path=cubic'], '2g 4 scales': ['--T=0.75,0.5,0.25'],
    '2d T=0.1': ['--T=0.1'], '2f 1 scale with GVP': ['--T=()', '--path=gvp'],
    'ffn and mod shared': ['--shared=ffn,mod'], '5 T=0.9 0.33': ['--T=0.9,0.33'], '5 T=0.67 0.1': ['--T=0.67,0.1']}


def split(args):
    """The baseline's name of a variant, or '', and its settings."""
    return (args[0], args[1:]) if args[:1] and args[0] in FLOWS else ('', args)


def quality(folder, args, seed, iters, num_samples, threads, data, judge):
    """Accuracy and Frechet distance of a variant that is trained and sampled in a folder, or was."""
    result_file = os.path.join(folder, 'result.json')
    if os.path.exists(result_file):
        with open(result_file) as f:
            return json.load(f)
    os.makedirs(folder, exist_ok=True)
    flow, args = split(args)
    train = ['train.py', 'config/digits.py', *args, f'--max_iters={iters}', f'--seed={seed}', f'--out_dir={folder}',
             '--eval_interval=500', '--log_interval=100', '--sample_images=20']
    draw = ['sample.py', '--ckpt', f'{folder}/ckpt.pt', '--cfg=1', '--method=euler', '--steps=40',
            f'--num_samples={num_samples}', f'--seed={seed}', '--dtype=auto', f'--out={folder}/samples.npz']
    for script, *settings in (train, draw):
        with open(os.path.join(folder, script + '.log'), 'a') as log:
            command = ['tests/baselines.py', flow, script] if flow else [script]
            command[0] = os.path.join(ROOT, command[0])
            subprocess.run([sys.executable, '-u', *command, *settings], check=True, stdout=log, stderr=log,
                           env=os.environ | {'OMP_NUM_THREADS': str(threads)})
    with np.load(f'{folder}/samples.npz') as arrays:
        images, labels = torch.from_numpy(arrays['arr_0']), arrays['arr_1']
    predicted, features = read(judge, images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    reference = read(judge, data.batch(np.arange(len(labels)))[0])[1]
    result = dict(accuracy=float((predicted == labels).mean()), frechet=frechet(features, reference))
    with open(result_file, 'w') as f:
        json.dump(result, f)
    return result


def speed(folder, batch_size):
    """NFE, GFLOPs, images/s and seconds per image of a trained variant."""
    checkpoint = torch.load(os.path.join(folder, 'ckpt.pt'), map_location='cpu', weights_only=True)
    config = config_of(checkpoint['model_args'])
    model = flow_of(config)[0](config).eval()
    model.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    seconds, _, nfes = seconds_per_image(model, 1, torch.tensor([3]), 'dopri5', 50, 1e-5, 1.0, lambda x: x, 'cpu')
    step = Trainer(config, batch_size, 'cpu')
    times = []
    for _ in range(20):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return dict(nfe=float(np.mean(nfes)), gflops=trajectory_average(config)[0] / 1e9, seconds=seconds,
                images_per_s=batch_size / statistics.median(times))


if __name__ == '__main__':
    only = 'systems'        # or 'ablations', or names of either, with commas
    seeds = 3
    iters = 2000            # of LapFlow
    num_samples = 2000      # to be judged
    batch_size = 64
    patch = 4
    extra = ''              # more settings of train.py for all, with spaces between them
    workers = 1             # variants trained at a time, each on its share of the cores
    out_dir = 'out-compare'
    configure(globals())
    known = {'systems': SYSTEMS, 'ablations': ABLATIONS}
    for name in only.split(','):
        check(name in SYSTEMS | ABLATIONS | known,
              f'there is no variant {name!r}: take of {", ".join(known | SYSTEMS | ABLATIONS)}')
    variants = known.get(only) or {name: (SYSTEMS | ABLATIONS)[name] for name in only.split(',')}
    claim(out_dir, 'settings.json', dict(batch_size=batch_size, patch=patch, extra=extra, num_samples=num_samples))
    data = Dataset('digits')
    judge = load_judge(data)
    fields = dict(size=32, channels=1, patch=patch, width=128, depth=4, heads=4, n_classes=10)
    budget = iters * packed_flops(config_of(fields), batch_size)
    own = {}
    for name, args in variants.items():
        flow, args = split(args)
        changed = configure(dict(T=(0.5,), mask='causal', shared='', path='linear', decay_lr=True), args)
        changed |= dict(flow=flow) if flow else {}
        changed.pop('decay_lr')
        own[name] = round(budget / packed_flops(config_of(fields | changed), batch_size))
    folder = lambda name, seed: os.path.join(out_dir, f'{name.replace(" ", "-").replace(",", "")}-{own[name]}-{seed}')
    with ThreadPoolExecutor(workers) as pool:
        threads = max(1, torch.get_num_threads() // workers)
        common = [f'--patch={patch}', f'--batch_size={batch_size}', *extra.split()]
        results = {(name, seed): pool.submit(quality, folder(name, seed), [*args, *common], seed, own[name],
                                             num_samples, threads, data, judge)
                   for seed in range(seeds) for name, args in variants.items()}
    print('| variant | seeds | iterations | accuracy | Frechet | NFE | GFLOPs | images/s | s/image |')
    print('| --- ' * 9 + '|')
    for name in variants:
        measured = speed(folder(name, 0), batch_size)
        of_seeds = {key: [results[name, seed].result()[key] for seed in range(seeds)]
                    for key in ('accuracy', 'frechet')}
        cell = lambda key, form: ' ± '.join(form.format(f(of_seeds[key])) for f in (
            (statistics.mean, statistics.stdev) if seeds > 1 else (statistics.mean,)))
        print(f'| {name} | {seeds} | {own[name]} | {cell("accuracy", "{:.4f}")} | {cell("frechet", "{:.1f}")} | '
              f'{measured["nfe"]:.0f} | {measured["gflops"]:.3f} | {measured["images_per_s"]:.0f} | '
              f'{measured["seconds"]:.2f} |', flush=True)
