"""
Trains the systems of the paper's Table 1, or ablations, on one dataset, and judges each on its way: curves at equal
training FLOPs.

    python tests/compare.py --dataset=fashion                                   # the systems, one seed
    python tests/compare.py --dataset=fashion --seeds=3 --points=500,1000       # three seeds, the beginning only
    python tests/compare.py --dataset=fashion --patch=2 --out_dir=out-patch2
    python tests/compare.py --only=ablations --points=1000
    python tests/compare.py --dataset=fashion --only=changes --points=1000      # to image tokens and to EdifyImage

The learning rate is constant and the EMA is judged: so a short run is the beginning of a long one, and no budget has to
be chosen beforehand. `points` are LapFlow's iterations; the others train as many as cost the same (forward FLOPs of a
packed batch, by torch's counter). At every point the run stops, draws class-conditional samples without guidance, is
judged by tests/judge.py, and goes on. Run the command again, with other points if you like, to go on where it stopped:
checkpoints stay in out_dir, results in one JSON file per run. tests/figures.py reads copies of them in tests/results.
"""
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from baselines import FlowConfig  # noqa: E402
from bench import packed_flops  # noqa: E402
from configurator import changes, check, configure, explain  # noqa: E402
from data import Dataset  # noqa: E402
from judge import judged, load_judge, load_samples  # noqa: E402
from model import LapFlowConfig  # noqa: E402

# Fields of LapFlowConfig, and the baseline's name if it is one
SYSTEMS = {'lapflow': {}, 'image tokens': dict(image_tokens=True), 'three scales': dict(T=(0.67, 0.33)),
           'single scale': dict(T=()), 'pyramidal': dict(flow='pyramidal', shared='qkv,proj,ffn,mod'),
           'edify': dict(flow='edify')}
ABLATIONS = {
    'lapflow': {},
    '2g 1 scale': dict(T=()), '2g 3 scales': dict(T=(0.67, 0.33)), '2g 4 scales': dict(T=(0.75, 0.5, 0.25)),
    '2c mask self': dict(mask='self'), '2c mask none': dict(mask='none'), '2d T=0.1': dict(T=(0.1,)),
    '2d T=0.2': dict(T=(0.2,)), '2d T=0.9': dict(T=(0.9,)), '2f GVP': dict(path='gvp'), 'D cubic': dict(path='cubic'),
    'D quadratic': dict(path='quadratic'), '2f 1 scale with GVP': dict(T=(), path='gvp'),
    '5 T=0.9 0.33': dict(T=(0.9, 0.33)), '5 T=0.67 0.1': dict(T=(0.67, 0.1)),
    'ffn and mod shared': dict(shared='ffn,mod'), 'all shared': dict(shared='qkv,proj,ffn,mod')}
CHANGES = {
    'image tokens': dict(image_tokens=True), 'image 3 scales': dict(image_tokens=True, T=(0.67, 0.33)),
    'image T=0.3': dict(image_tokens=True, T=(0.3,)), 'image T=0.7': dict(image_tokens=True, T=(0.7,)),
    'image mask none': dict(image_tokens=True, mask='none'),
    'image all shared': dict(image_tokens=True, shared='qkv,proj,ffn,mod'),
    'image qkv separate': dict(image_tokens=True, shared='ffn,mod,proj'), 'qkv separate': dict(shared='ffn,mod,proj'),
    'edify 3 scales': dict(flow='edify', T=(0.67, 0.33))}
VARIANTS = SYSTEMS | ABLATIONS | CHANGES
TRAINING = ('--batch_size=64 --learning_rate=2e-3 --min_lr=2e-3 --warmup_iters=50 --beta2=0.99 --ema_decay=0.999 '
            '--eval_interval=100_000 --log_interval=100 --sample_images=10 --compile=False').split()


def flops_of(**variant):
    """Forward FLOPs of a batch of the dataset's images, for the network with a variant's settings."""
    settings = network | dict(size=data.meta['size'], channels=data.meta['channels'], patch=patch,
                              n_classes=len(data.meta['classes'])) | variant
    config = FlowConfig(**settings) if 'flow' in variant else LapFlowConfig(**settings)
    return packed_flops(config, 64)


def write_json(file, content):
    """Replaces the file in one step: a kill leaves the old one."""
    Path(f'{file}.tmp').write_text(json.dumps(content, indent=1))
    os.replace(f'{file}.tmp', file)


def run(script, log, flow, *settings):
    """Runs train.py or sample.py, of LapFlow or a baseline; what it prints goes to a log."""
    command = [ROOT / 'tests/baselines.py', flow, script] if flow else [ROOT / script]
    with open(log, 'a') as f:
        subprocess.run([sys.executable, '-u', *command, *settings], check=True, stdout=f, stderr=f,
                       env=os.environ | {'OMP_NUM_THREADS': str(threads)})


def judge_at(point, name, seed, before):
    """Trains a run on to a point and judges it, or finds that this was done: its row."""
    if before:
        before.result()     # the point before this one
    torch.set_num_threads(threads)      # of this thread's operations
    folder, file = f'{out_dir}/{name.replace(" ", "-")}-{seed}', f'{out_dir}/{name.replace(" ", "-")}-{seed}.json'
    args, flops = VARIANTS[name], flops_of(**VARIANTS[name])
    result = dict(dataset=dataset, patch=patch, system=name, seed=seed, extra=extra, samples=num_samples, rows=[])
    if os.path.exists(file):
        result = json.loads(Path(file).read_text())
    for row in result['rows']:
        if row['point'] == point:
            return row
    iterations = round(point * flops_of() / flops)
    os.makedirs(folder, exist_ok=True)
    log, flow = f'{folder}/log.txt', args.get('flow')
    settings = [f'--{key}={value}' for key, value in (network | dict(patch=patch) | args).items() if key != 'flow']
    run('train.py', log, flow, *settings, *TRAINING, *extra.split(), f'--dataset={dataset}', f'--seed={seed}',
        f'--out_dir={folder}', f'--max_iters={iterations}')
    reached = torch.load(f'{folder}/ckpt.pt', weights_only=True)['iter_num']
    check(reached == iterations, f'{folder}/ckpt.pt is at iteration {reached}, not {iterations}: if it was stopped, '
          'run the same command again; if it is past that point, give another --out_dir')
    run('sample.py', log, flow, '--ckpt', f'{folder}/ckpt.pt', '--cfg=1', '--method=midpoint', '--steps=10',
        f'--num_samples={num_samples}', '--dtype=auto', f'--out={folder}/samples.npz')
    row = dict(point=point, iterations=iterations, flops=3 * flops * iterations,
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
    extra = ''              # more settings of train.py for all, with spaces between them; not the batch size
    workers = 1             # runs at a time, each on its share of the cores
    out_dir = 'out-compare'
    configure(globals(), at_least_1='seeds points patch width depth heads num_samples workers')
    names = {'systems': SYSTEMS, 'ablations': ABLATIONS, 'changes': CHANGES}.get(only, only.split(','))
    for name in names:
        check(name in VARIANTS, f'there is no variant {name!r}: only takes systems, ablations, changes or any of '
              f'{", ".join(VARIANTS)}')
    network = dict(width=width, depth=depth, heads=heads)
    settings = dict(dataset=dataset, patch=patch, num_samples=num_samples, extra=extra, **network)
    file = f'{out_dir}/settings.json'
    with explain(f'cannot use {file}'):
        os.makedirs(out_dir, exist_ok=True)
        if not os.path.exists(file):
            write_json(file, settings)
        differences = changes(json.loads(Path(file).read_text()), settings)
    check(not differences, f'{out_dir} was begun with other settings ({differences}): give another --out_dir')
    data = Dataset(dataset)
    judge = load_judge(data, dataset)
    threads = max(1, torch.get_num_threads() // workers)
    futures = {}
    with ThreadPoolExecutor(workers) as pool:
        for point in points:
            for seed in range(seeds):
                for name in names:
                    futures[name, seed] = pool.submit(judge_at, int(point), name, seed, futures.get((name, seed)))
                    futures[name, seed, point] = futures[name, seed]
    print('| variant | seeds | point | iterations | accuracy | Frechet | precision | recall |\n' + '| --- ' * 8 + '|')
    for name in names:
        for point in points:
            rows = [futures[name, seed, point].result() for seed in range(seeds)]
            cells = [' ± '.join(form.format(f([row[key] for row in rows])) for f in (
                (statistics.mean, statistics.stdev) if seeds > 1 else (statistics.mean,)))
                for key, form in (('accuracy', '{:.3f}'), ('frechet', '{:.1f}'), ('precision', '{:.3f}'),
                                  ('recall', '{:.3f}'))]
            print(f'| {name} | {seeds} | {point:g} | {rows[0]["iterations"]} | ' + ' | '.join(cells) + ' |')
