"""Trains the systems of the paper's Table 1, or ablations, on one dataset, and judges each.

    python tests/experiments/compare.py --dataset=fashion       # the systems, one seed
    python tests/experiments/compare.py --dataset=fashion --seeds=3 --points=500,1000
    python tests/experiments/compare.py --only=ablations --points=1000
    python tests/experiments/compare.py --dataset=fashion --only=changes --points=1000

The learning rate is constant and the EMA is judged: so a short run is the beginning of a long one.
`points` are LapFlow's iterations; the others train as many as cost the same forward FLOPs of a
packed batch. At every point the run stops, draws class-conditional samples without guidance, is
judged by judge.py, and goes on. The same command, with other points if you like, goes on:
checkpoints stay in out_dir, results in one JSON file per run, for results/.
"""
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import project
import model
from bench import packed_flops
from configurator import check, configure, exit_on_error
from data import Dataset
from judge import judged, load_judge, load_samples
from variants import in_place

TWO, THREE, ALL = (0.5,), (0.67, 0.33), 'shared=qkv+proj+ffn+mod'
# T, and the variant of tests/variants.py if it is one
SYSTEMS = {
    'lapflow': (TWO, ''), 'image tokens': (TWO, 'image_tokens=True'), 'three scales': (THREE, ''),
    'single scale': ((), ''), 'pyramidal': (TWO, f'flow=pyramidal,{ALL}'),
    'edify': (TWO, 'flow=edify')}
ABLATIONS = {
    'lapflow': (TWO, ''), '2g 1 scale': ((), ''), '2g 3 scales': (THREE, ''),
    '2g 4 scales': ((0.75, 0.5, 0.25), ''), '2c mask self': (TWO, 'mask=self'),
    '2c mask none': (TWO, 'mask=none'), '2d T=0.1': ((0.1,), ''), '2d T=0.2': ((0.2,), ''),
    '2d T=0.9': ((0.9,), ''), '2f GVP': (TWO, 'schedule=gvp'), 'D cubic': (TWO, 'schedule=cubic'),
    'D quadratic': (TWO, 'schedule=quadratic'), '2f 1 scale with GVP': ((), 'schedule=gvp'),
    '5 T=0.9 0.33': ((0.9, 0.33), ''), '5 T=0.67 0.1': ((0.67, 0.1), ''),
    'ffn and mod shared': (TWO, 'shared=ffn+mod'), 'all shared': (TWO, ALL)}
CHANGES = {
    'image tokens': (TWO, 'image_tokens=True'), 'image 3 scales': (THREE, 'image_tokens=True'),
    'image T=0.3': ((0.3,), 'image_tokens=True'), 'image T=0.7': ((0.7,), 'image_tokens=True'),
    'image mask none': (TWO, 'image_tokens=True,mask=none'),
    'image all shared': (TWO, f'image_tokens=True,{ALL}'),
    'image qkv separate': (TWO, 'image_tokens=True,shared=ffn+mod+proj'),
    'qkv separate': (TWO, 'shared=ffn+mod+proj'), 'edify 3 scales': (THREE, 'flow=edify')}
VARIANTS = SYSTEMS | ABLATIONS | CHANGES
TRAINING = ('--batch_size=64 --learning_rate=2e-3 --min_lr=2e-3 --warmup_iters=50 --beta2=0.99 --ema_decay=0.999 '
            '--eval_interval=100_000 --log_interval=100 --sample_images=10 --compile=False').split()


def flops_of(T, variant):
    """Forward FLOPs of a batch of the dataset's images."""
    n_classes = len(data.meta['classes'])
    with in_place(variant) as named:
        config = model.LapFlowConfig(data.meta['size'], data.meta['channels'], T=T,
                                     n_classes=n_classes, **network, **named)
        return packed_flops(config, 64)


def write_json(file, content):
    """Replaces the file in one step: a kill leaves the old one."""
    Path(f'{file}.tmp').write_text(json.dumps(content, indent=1))
    os.replace(f'{file}.tmp', file)


def run(script, log, variant, *settings):
    """Runs train.py or sample.py, of LapFlow or a variant; what it prints goes to a log."""
    command = [project.ROOT / script]
    if variant:
        command = [project.ROOT / 'tests/variants.py', variant, script]
    with open(log, 'a') as f:
        subprocess.run([sys.executable, '-u', *command, *settings], check=True, stdout=f, stderr=f,
                       env=os.environ | {'OMP_NUM_THREADS': str(threads)})


def judge_at(point, name, seed, before):
    """Trains a run on to a point and judges it, or finds that this was done: its row."""
    if before:
        before.result()     # the point before this one
    torch.set_num_threads(threads)      # of this thread's operations
    folder, file = f'{out_dir}/{name.replace(" ", "-")}-{seed}', f'{out_dir}/{name.replace(" ", "-")}-{seed}.json'
    T, variant = VARIANTS[name]
    result = dict(dataset=dataset, patch=patch, system=name, seed=seed, extra=extra, samples=num_samples, rows=[])
    if os.path.exists(file):
        result = json.loads(Path(file).read_text())
    for row in result['rows']:
        if row['point'] == point:
            return row
    iterations = round(point * flops['lapflow'] / flops[name])
    os.makedirs(folder, exist_ok=True)
    log, settings = f'{folder}/log.txt', [f'--{key}={value}' for key, value in network.items()]
    run('train.py', log, variant, *settings, f'--T={T}', *TRAINING, *extra.split(),
        f'--dataset={dataset}', f'--seed={seed}', f'--max_iters={iterations}', f'--out_dir={folder}')
    reached = torch.load(f'{folder}/ckpt.pt', weights_only=True)['iter_num']
    check(reached == iterations, f'{folder}/ckpt.pt is at iteration {reached}, not {iterations}: if it was stopped, '
          'run the same command again; if it is past that point, give another --out_dir')
    run('sample.py', log, variant, '--ckpt', f'{folder}/ckpt.pt', '--cfg=1', '--method=midpoint',
        '--steps=10', f'--num_samples={num_samples}', '--dtype=auto', f'--out={folder}/samples.npz')
    row = dict(point=point, iterations=iterations, flops=3 * flops[name] * iterations,
               **judged(judge, data, *load_samples(f'{folder}/samples.npz')))
    result['rows'].append(row)
    write_json(file, result)
    print(name, seed, json.dumps(row), flush=True)
    return row


if __name__ == '__main__':
    dataset = 'digits'
    only = 'systems'        # 'ablations', 'changes' to image tokens, or names of any of them, with commas
    seeds = 1               # 0, 1, ...
    points = (500.0, 1000.0, 2000.0, 4000.0, 8000.0)
    patch = 4
    width = 128
    depth = 4
    heads = 4
    num_samples = 2000      # to be judged
    extra = ''              # more settings of train.py for all, with spaces between them; none that changes the FLOPs
    workers = 1             # runs at a time, each on its share of the cores
    out_dir = 'out-compare'
    configure(globals())
    check(min(seeds, *points, patch, width, depth, heads, num_samples, workers) >= 1,
          'seeds, points, sizes, num_samples and workers must be at least 1')
    names = {'systems': SYSTEMS, 'ablations': ABLATIONS, 'changes': CHANGES}.get(only, only.split(','))
    for name in names:
        check(name in VARIANTS,
              f'only is systems, ablations, changes or of {list(VARIANTS)}, not {name!r}')
    network = dict(patch=patch, width=width, depth=depth, heads=heads)
    settings = dict(dataset=dataset, num_samples=num_samples, extra=extra, **network)
    file = f'{out_dir}/settings.json'
    with exit_on_error(f'cannot use {file}'):
        os.makedirs(out_dir, exist_ok=True)
        if not os.path.exists(file):
            write_json(file, settings)
        there = json.loads(Path(file).read_text())
        differences = [f'{key} is {there[key]!r} there and {here!r} here'
                       for key, here in settings.items() if there[key] != here]
    check(not differences, f'{out_dir} was begun with other settings ({"; ".join(differences)}): '
          'give another --out_dir')
    data = Dataset(dataset)
    judge = load_judge(data, dataset)
    flops = {name: flops_of(*VARIANTS[name]) for name in ('lapflow', *names)}
    threads = max(1, torch.get_num_threads() // workers)
    futures = {}
    with ThreadPoolExecutor(workers) as pool:
        for point in points:
            for seed in range(seeds):
                for name in names:
                    futures[name, seed] = pool.submit(judge_at, int(point), name, seed, futures.get((name, seed)))
                    futures[name, seed, point] = futures[name, seed]
    print('| variant | seeds | point | iterations | accuracy | Frechet | precision | recall |\n' + '| --- ' * 8 + '|')
    measures = (statistics.mean, statistics.stdev)[:seeds]
    for name in names:
        for point in points:
            rows = [futures[name, seed, point].result() for seed in range(seeds)]
            cells = [' ± '.join(f'{f([row[key] for row in rows]):.4g}' for f in measures)
                     for key in ('accuracy', 'frechet', 'precision', 'recall')]
            print(f'| {name} | {seeds} | {point:g} | {rows[0]["iterations"]} | ' + ' | '.join(cells) + ' |')
