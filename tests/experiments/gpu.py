"""What only a GPU can show, in nine minutes on one H100 or H200.

    python tests/experiments/gpu.py                             # all parts, most valuable first
    python tests/experiments/gpu.py --parts=speed-L,profile     # some
    python tests/experiments/gpu.py --parts=evidence            # goes on where it stopped
    python tests/experiments/gpu.py --tables=True               # writes results into the documents
    python tests/experiments/gpu.py --device=cpu --small=True   # the rehearsal on a CPU: all, small

Every part runs in a process of its own, with its own limit of time, and writes each row to
RESULTS/PART.json at once: so a part that fails or is cut loses nothing else. The part 'evidence'
needs data/fashion, or the four .gz files of Fashion-MNIST in downloads/. Checkpoints stay in
out_dir. The rehearsal keeps all in out-rehearsal/, apart from what was measured.
"""
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.profiler import profile

from project import ROOT
import model
from bench import (Trainer, hardware, interleaved, matmul_ceiling, measured_peak, packed_flops,
                   peak_memory, synchronize, trajectory_average)
from compare import THREE, TWO, write_json
from configurator import autocast_for, check, configure, launch
from model import LapFlow, LapFlowConfig, multiscale_loss, packed_stages
from sample import generate, load_checkpoint, load_model, noise_of
from variants import in_place

DITS = {'B': dict(width=768, depth=12, heads=12), 'L': dict(width=1024, depth=24, heads=16),
        'XL': dict(width=1152, depth=28, heads=16)}
TINY = dict(width=32, depth=2, heads=2)         # for the rehearsal
HERE = ROOT / 'tests/experiments'


def record(table, **row):
    """Prints a row of a table of the documents, and appends it to the part's file."""
    result['rows'].append(dict(table=table, row=row))
    write_json(file, result)
    print(f'{part}:', json.dumps(row), flush=True)


def check_that(claim, value, bound):
    record('checks', claim=claim, found=f'{value:.2g}', bound=f'{bound:g}', holds='yes' if value <= bound else 'NO')


def difference(a, b):
    """The largest difference of two tensors or arrays, as a share of the largest value of the second."""
    a, b = (torch.as_tensor(x).double().cpu() for x in (a, b))
    return ((a - b).abs().max() / b.abs().max()).item()


def run(*command):
    """Runs a script of the project, silently: its last line, and the seconds that it took."""
    start = time.time()
    done = subprocess.run([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    check(done.returncode == 0, f'{" ".join(command)} failed:\n{done.stdout[-3000:]}')
    return done.stdout.strip().rpartition('\n')[2], time.time() - start


def flags(**settings):
    return [f'--{key}={value}' for key, value in settings.items()]


# ----------------------------------------------------------------------------------------------------------------------
# Is it right?


def losses(where, compiled=False, checkpoint_blocks=False, dtype='float32', **fields):
    """The losses of five steps of a small network, whose weights and draws come from the CPU."""
    config = model.LapFlowConfig(16, 4, 2, width=64, depth=2, heads=4, n_classes=10, **fields)
    generator = torch.Generator().manual_seed(0)
    net = model.LapFlow(config)
    for p in net.parameters():          # a trained network has no layers of zeros
        p.data = 0.05 * torch.randn(p.shape, generator=generator)
    net.to(where).checkpoint_blocks = checkpoint_blocks
    if compiled:
        for block in net.blocks:
            block.compile(dynamic=False, backend=backend)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    found, B = [], 12
    stage, y = packed_stages(B, config.K), (torch.arange(B) % 11).to(where)
    for _ in range(5):
        x1, x0 = torch.randn(2, B, 4, 16, 16, generator=generator).to(where)
        t = model.stage_times(stage, torch.rand(B, generator=generator), config).to(where)
        x_t, u_t = model.states_and_velocities(x1, x0, t, stage, config)
        with autocast_for(where, dtype)[0]:
            v_t = net(x_t, t, y)
        loss, _ = multiscale_loss(v_t, u_t, (1.0,) * config.K, B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def numbers():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for T, variant in (((), ''), (TWO, ''), (THREE, ''), (TWO, 'mask=none'), (TWO, 'mask=self'),
                       (TWO, 'schedule=gvp,shared=qkv+ffn'), (TWO, 'image_tokens=True')):
        with in_place(variant) as named:
            found = difference(losses(device, T=T, **named), losses('cpu', T=T, **named))
        check_that(f'{variant or "LapFlow"}, T={T}: five losses as on the CPU, float32', found, 1e-5)
    eager = losses(device)
    check_that('compiled: the losses of eager, float32', difference(losses(device, compiled=True), eager), 1e-5)
    found = difference(losses(device, checkpoint_blocks=True), eager)
    check_that('checkpoint_blocks: the same losses, float32', found, 1e-6)
    found = difference(losses(device, compiled=True, dtype='bfloat16'), eager)
    check_that('compiled, bfloat16: the losses of eager, float32', found, 2e-2)


def scripts():
    from test_fid import Oracle
    steps = 6 if small else 60
    tiny = ['config/digits.py', *flags(width=64, depth=2, heads=2, max_iters=steps, eval_interval=steps // 2,
                                       log_interval=2, sample_images=10, eval_images=60, dtype='float32',
                                       device=device)]

    def trained(name, *launcher):
        run(*launcher, f'{ROOT}/train.py', *tiny, f'--out_dir={out_dir}/{name}')
        weights = load_checkpoint(f'{out_dir}/{name}/ckpt.pt')['model']
        return torch.cat([weights[key].flatten() for key in weights])

    for name in ('whole', 'again', 'killed', 'torchrun'):
        shutil.rmtree(f'{out_dir}/{name}', ignore_errors=True)
    whole = trained('whole')
    check_that('train.py twice: the same weights', difference(trained('again'), whole), 1e-3)
    checkpoint = Path(f'{out_dir}/killed/ckpt.pt')
    job = subprocess.Popen([sys.executable, f'{ROOT}/train.py', *tiny, f'--out_dir={out_dir}/killed'],
                           stdout=subprocess.DEVNULL)
    while not checkpoint.exists() and job.poll() is None:
        time.sleep(0.01)
    job.kill()
    job.wait()
    check_that('train.py killed and started again: the same weights', difference(trained('killed'), whole), 1e-3)
    found = difference(trained('torchrun', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1'), whole)
    check_that('one process of torchrun (NCCL on a GPU): the same weights', found, 1e-3)

    n, samples, fids = 20 if small else 2000, {}, {}
    for where, count in {device: n, 'cpu': 20}.items():
        npz = f'{out_dir}/{where}.npz'
        _, seconds = run(f'{ROOT}/sample.py', *flags(ckpt=f'{out_dir}/whole/ckpt.pt', num_samples=count, out=npz,
                                                     device=where))
        samples[where] = np.load(npz)['arr_0'][:20].astype(int)
        if where == device:
            record('figures', what=f'sample.py, {count} digits, whole process', figure=f'{seconds:.1f} s')
    found = np.abs(samples[device] - samples['cpu'])
    check_that('20 samples are those of the CPU: mean difference in grey levels (TF32)', found.mean(), 0.5)

    images = np.load(f'{out_dir}/{device}.npz')['arr_0']
    inception = Oracle(16 if small else 1)
    inception(images[:1].repeat(3, axis=3))     # makes its layers, with random weights
    torch.save(inception.weights(), f'{out_dir}/inception.pth')
    for where, count in {(device, 20), ('cpu', 20), (device, n)}:
        np.savez(f'{out_dir}/a.npz', 255 - images[:count])
        np.savez(f'{out_dir}/b.npz', images[:count])
        answer, seconds = run(f'{ROOT}/fid.py', *flags(samples=f'{out_dir}/a.npz', ref=f'{out_dir}/b.npz',
                                                       inception=f'{out_dir}/inception.pth', device=where))
        fids[where, count] = json.loads(answer)['fid']
        if (where, count) == (device, n):
            record('figures', what=f'fid.py, random weights, {n} images against {n}, whole process',
                   figure=f'{seconds:.1f} s')
    found = difference([fids[device, 20]], [fids['cpu', 20]])
    check_that('fid.py, random weights, 20 images: the distance of the CPU', found, 1e-2)


def quickstart():
    from data import Dataset
    from judge import judged, load_judge, load_samples
    shutil.rmtree(f'{out_dir}/digits', ignore_errors=True)
    changes = dict(max_iters=6, eval_images=60, sample_images=10, **TINY) if small else {}
    settings = flags(device=device, out_dir=f'{out_dir}/digits', **changes)
    _, seconds = run(f'{ROOT}/train.py', 'config/digits.py', *settings)
    record('figures', what='train.py config/digits.py, whole process', figure=f'{seconds:.1f} s')
    npz = f'{out_dir}/digits.npz'
    run(f'{ROOT}/sample.py', *flags(ckpt=f'{out_dir}/digits/ckpt.pt', cfg=1, num_samples=50 if small else 2000,
                                    out=npz, device=device))
    data = Dataset('digits')
    row = judged(load_judge(data, 'digits'), data, *load_samples(npz))
    record('figures', what='its unguided samples, by judge.py',
           figure=', '.join(f'{key} {value:.4f}' for key, value in row.items()))


# ----------------------------------------------------------------------------------------------------------------------
# Is it fast?


def speed(name, size=32, T=(0.5,), B=256, micro=32, padded=True, run_of=None):
    """Whole steps of LapFlow, the single scale, and LapFlow under a dense mask, compiled; and peak memory."""
    shape, repeats, calls = DITS[name], 3, 3
    if small:
        shape, size, B, micro, repeats, calls = TINY, 8, 12, 6, 1, 1
    base = dict(size=size, channels=4, patch=2, **shape)
    how = dict(compiled=backend, parts=B // micro)
    ours, single = LapFlowConfig(**base, T=T), LapFlowConfig(**base, T=())
    both = (False, True)    # checkpoint_blocks
    estimate = map if small else ProcessPoolExecutor(2, get_context('spawn')).map   # meanwhile
    estimates = estimate(peak_memory, [ours] * 2, [micro] * 2, both)
    steps = {'LapFlow': Trainer(ours, B, device, **how), 'single scale': Trainer(single, B, device, **how)}
    if padded:
        steps['LapFlow, padded, dense mask'] = Trainer(ours, B, device, 'padded', weights_of=steps['LapFlow'], **how)
    ceiling = matmul_ceiling(device, steps['LapFlow'].dtype, side)
    seconds = interleaved(steps, repeats, calls, device)
    for variant, values in seconds.items():
        rate = B / statistics.median(values)
        flops = 3 * packed_flops(steps[variant].config, micro) / micro
        ratio = statistics.median(a / b for a, b in zip(values, seconds['LapFlow']))
        record('speed', network=f'DiT-{name}/2, {size} grid, T = {T}', variant=variant, **{
            'images/s': f'{rate:.0f}', 'of the matmul ceiling': f'{rate * flops / ceiling:.0%}',
            'LapFlow is faster': f'{ratio:.2f}'})
        if run_of and variant == 'LapFlow':
            record('runs', config=run_of, **{'images/s of one GPU': f'{rate:.0f}', 'micro-batch': micro})
    del steps
    for blocks, estimated in zip(both, estimates):      # eager, as is estimated
        measured = measured_peak(lambda: Trainer(ours, 2 * micro, device, checkpoint_blocks=blocks, parts=2), device)
        with torch.device('meta'):
            ema = sum(4 * p.numel() for p in LapFlow(ours).parameters()) / 2 ** 30
        record('memory', network=f'DiT-{name}/2, {size} grid, T = {T}', **{
            'images': micro, 'checkpoint_blocks': blocks, 'peak, measured, GiB': f'{measured:.3g}',
            'estimated': f'{estimated + ema:.3g}'})


def sampling():
    config = LapFlowConfig(size=8 if small else 32, channels=4, patch=2, **(TINY if small else DITS['L']))
    torch.manual_seed(0)
    with torch.device(device):
        model = LapFlow(config).eval()
    for final in model.final:           # its zeros would make every velocity zero
        torch.nn.init.normal_(final.linear.weight, std=0.02)
    B = 4 if small else 64
    noise = noise_of(0, range(B), (4, config.size, config.size)).to(device)
    flops = trajectory_average(config)[0]

    def timed(what, noise, dtype, tf32=True, **solver):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with autocast_for(device, dtype)[0]:
            for _ in range(2):          # the first compiles
                synchronize(device)
                start = time.perf_counter()
                _, nfe = generate(model, noise, **solver)
                synchronize(device)
                seconds = time.perf_counter() - start
        share = nfe * flops * len(noise) / seconds / matmul_ceiling(device, dtype, side)
        record('sampling', what=what, images=len(noise), NFE=nfe, seconds=f'{seconds:.2f}', **{
            'images/s': f'{len(noise) / seconds:.1f}', 'of the matmul ceiling': f'{share:.0%}'})

    tol = 0.1 if small else 1e-5
    for tf32 in (False, True):
        for n in (1, B):
            timed(f'dopri5 at {tol}, {"TF32" if tf32 else "float32"}', noise[:n], 'float32', tf32, tol=tol)
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False, backend=backend)
        for dtype in ('float32', 'bfloat16'):
            what = f'midpoint, {"TF32" if dtype == "float32" else dtype}, {"compiled" if compiled else "eager"}'
            timed(what, noise, dtype, method='midpoint', steps=2 if small else 10)

    ckpt = f'{out_dir}/digits/ckpt.pt'  # of the part 'quickstart': a network that has learned something
    if os.path.exists(ckpt):
        model = load_model(load_checkpoint(ckpt), device)
        y, shape = torch.arange(10, device=device), (1, model.config.size, model.config.size)
        for tf32 in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            _, nfe = generate(model, noise_of(0, range(10), shape).to(device), y)
            record('figures', what=f'evaluations of dopri5 at 1e-5, ten digits, {"TF32" if tf32 else "float32"}',
                   figure=nfe)


def profiled():
    """The operations that take most of one L/2 step."""
    config = LapFlowConfig(size=32, channels=4, patch=2, **(TINY if small else DITS['L']))
    step = Trainer(config, 6 if small else 32, device, compiled=backend)
    for _ in range(3):
        step()
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    wall = time.perf_counter() - start
    with profile() as p:
        step()
        synchronize(device)
    key = 'self_device_time_total' if 'cuda' in device else 'self_cpu_time_total'
    events = sorted(p.key_averages(), key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events)
    record('profile', operation='a whole step, not profiled', calls=1, ms=f'{1000 * wall:.2f}', share='')
    record('profile', operation='all operations together', calls=sum(event.count for event in events),
           ms=f'{total / 1000:.2f}', share='100%')
    for event in events[:10]:
        name = re.sub(r'[|<>]', ' ', event.key)[:90]
        record('profile', operation=f'`{name}`', calls=event.count, ms=f'{getattr(event, key) / 1000:.2f}',
               share=f'{getattr(event, key) / total:.1%}')


# ----------------------------------------------------------------------------------------------------------------------
# Is it good?


def evidence():
    """Fashion-MNIST at equal training FLOPs, larger than a CPU could: compare.py, point after point."""
    dataset = 'digits' if small else 'fashion'
    if not small and not os.path.exists('data/fashion'):
        run(f'{HERE}/fashion.py', '--source=downloads')
    settings = flags(dataset=dataset, out_dir=f'{out_dir}/evidence', patch=4 if small else 2,
                     num_samples=50 if small else 2000, **(TINY if small else dict(width=384, depth=12, heads=6)),
                     extra=f'--device={device}' + ('' if small else ' --compile=True'))
    systems = ('lapflow', 'single scale', 'edify', 'pyramidal', 'image tokens')
    if small:
        systems = ('edify',)
    for point in (3,) if small else (500, 1000, 2000, 4000, 8000):
        for system in systems:
            run(f'{HERE}/compare.py', *settings, f'--only={system}', f'--points={point}')
            saved = json.loads(Path(f'{out_dir}/evidence/{system.replace(" ", "-")}-0.json').read_text())
            row = next(row for row in saved['rows'] if row['point'] == point)
            record('evidence', system=system, **{'point': point, 'iterations': row['iterations'],
                   'accuracy': f'{row["accuracy"]:.3f}', 'Fréchet distance': f'{row["frechet"]:.1f}',
                   'precision': f'{row["precision"]:.3f}', 'recall': f'{row["recall"]:.3f}'})


PARTS = {       # name: what runs, and at most how many seconds
    'numbers': (numbers, 60), 'scripts': (scripts, 90), 'quickstart': (quickstart, 120),
    'speed-L': (lambda: speed('L', run_of='celebahq256'), 90), 'sampling': (sampling, 75),
    'speed-B': (lambda: speed('B', run_of='imagenet256_b2'), 60),
    'speed-XL': (lambda: speed('XL', run_of='imagenet256_xl2'), 90), 'profile': (profiled, 40),
    'speed-128': (lambda: speed('L', 128, (0.67, 0.33), 24, 3, padded=False, run_of='celebahq1024'), 90),
    'evidence': (evidence, 540)}
TABLES = {      # table: the parts that fill it
    'checks': 'numbers scripts', 'figures': 'scripts quickstart sampling', 'speed': 'speed-L speed-B speed-XL speed-128',
    'runs': 'speed-L speed-B speed-XL speed-128', 'memory': 'speed-L speed-B speed-XL speed-128',
    'sampling': 'sampling', 'profile': 'profile', 'evidence': 'evidence'}
DOCUMENTS = ('tests/experiments/README.md', 'config/README.md')


def run_part():
    """Runs one part in this process; how it ended goes into its file."""
    write_json(file, result)
    try:
        PARTS[part][0]()
        result['ended'] = 'whole'
    except BaseException as error:
        traceback.print_exc()
        result['ended'] = f'failed: {type(error).__name__}: {error}'[:500]
    result['seconds'] = round(time.time() - started)
    write_json(file, result)
    print(f'{part}: {result["ended"]}, {result["seconds"]} s', flush=True)


def run_all(names):
    """Runs parts, each in its own process, until the minutes are over."""
    for name in names:
        left = 60 * minutes - (time.time() - started)
        if left < 10 and not small:
            print(f'{name}: no time is left')
            continue
        limit = None if small else min(left, PARTS[name][1])    # a rehearsal may take its time
        command = [sys.executable, __file__, *flags(part=name, device=device, small=small, results=results,
                                                    out_dir=out_dir)]
        job = subprocess.Popen(command, start_new_session=True)     # to be stopped with all that it starts
        try:
            job.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()      # its memory is free then
            print(f'{name}: cut after {limit:.0f} s', flush=True)


def table(name, folder):
    """A table of the documents, in Markdown, from the parts' files in a folder."""
    files = [Path(folder) / f'{part}.json' for part in TABLES[name].split()]
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = [row['row'] for part in parts for row in part['rows'] if row['table'] == name]
    if not rows:
        return 'Not run.\n'
    lines = [' | '.join(rows[0]), ' | '.join('---' for _ in rows[0])]
    lines += [' | '.join(map(str, row.values())) for row in rows]
    made_on = sorted({f'{part["device"]}, torch {part["torch"]}{", a rehearsal" * part["small"]}' for part in parts})
    return f'{"; ".join(made_on)}:\n\n' + ''.join(f'| {line} |\n' for line in lines)


def with_tables(text, folder):
    """A document with the tables between its marks, <!-- gpu.py: NAME --> and <!-- end -->, made anew."""
    return re.sub(r'(<!-- gpu\.py: (\w+) -->\n\n).*?(\n<!-- end -->)',
                  lambda match: match[1] + table(match[2], folder) + match[3], text, flags=re.S)


if __name__ == '__main__':
    parts = ''              # names of parts, with commas; '' is all
    device = 'auto'
    small = False           # the rehearsal
    minutes = 9.0
    results = ''            # a folder; '' is results/gpu, or out-rehearsal
    out_dir = ''            # of checkpoints; '' is out-gpu, or out-rehearsal
    tables = False          # writes the results into the documents
    part = ''               # this process runs one part: gpu.py's own
    configure(globals())
    started = time.time()
    results = results or ('out-rehearsal' if small else f'{HERE}/results/gpu')
    out_dir = out_dir or ('out-rehearsal' if small else 'out-gpu')
    names = [name for name in parts.split(',') if name] or list(PARTS)
    for name in names:
        check(name in PARTS, f'there is no part {name!r}: parts takes any of {", ".join(PARTS)}')
    if tables:
        for document in DOCUMENTS:
            text = (ROOT / document).read_text()
            (ROOT / document).write_text(with_tables(text, results))
    elif part:
        device, _, _ = launch(device)
        backend = 'eager' if small else 'inductor'
        side = 256 if small else 8192      # of the matrices whose product is the ceiling
        os.makedirs(out_dir, exist_ok=True)
        file = f'{results}/{part}.json'
        result = dict(device=hardware(device), torch=torch.__version__, small=small, ended='cut', rows=[])
        run_part()
    else:
        os.makedirs(results, exist_ok=True)
        run_all(names)
