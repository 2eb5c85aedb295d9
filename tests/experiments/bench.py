"""
Speed and cost, measured.

    python tests/experiments/bench.py --ckpt out-digits/ckpt.pt     # its row of the paper's Table 1
    python tests/experiments/bench.py                   # this engine against what it replaces
    python tests/experiments/bench.py --what=loop       # around a step: data, evaluation, saving
    python tests/experiments/bench.py --what=costs      # Appendix C beside the FLOP counter
    python tests/experiments/bench.py --what=memory     # which GPU, how long, for the paper's runs?

(gpu.py measures on a GPU.) A multiply-add counts as 2 FLOPs. NFE counts a guided pair of
evaluations once. Ratios are of interleaved repeats.
"""
import json
import math
import os
import platform
import runpy
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import project
import model
from configurator import autocast_for, check, configure, launch
from data import Dataset, decode, load_vae, training_order
from judge import restart_under_variant
from model import (LapFlow, LapFlowConfig, laplacian_pyramid, multiscale_loss, packed_stages,
                   stage_times, states_and_velocities)
from sample import check_solver, generate, load_checkpoint, load_model, noise_of


def attention_cost(T):
    """
    Appendix C for any T: Eq. (11), the tokens of every scale and segment, and Eq. (12), attention's cost averaged over
    the trajectory, in units of a single scale's N^2 d. Returns two: when every active token attends to every other (the
    paper's analysis), and when a scale attends to itself and the coarser ones only (Eq. (9), what is computed here).
    """
    times, dense, causal = (1.0, *T, 0.0), 0.0, 0.0
    for s in range(len(T) + 1):
        tokens = [4.0 ** -k for k in range(s, len(T) + 1)]
        dense += (times[s] - times[s + 1]) * sum(tokens) ** 2
        causal += (times[s] - times[s + 1]) * sum(n * sum(tokens[i:]) for i, n in enumerate(tokens))
    return dense, causal


def flops_per_segment(config):
    """FLOPs of one evaluation for one image in every segment, coarsest first: all, and attention's.

    They are those of torch's counter on the meta device.
    """
    counts, state = [], {}
    with torch.device('meta'):
        network = LapFlow(config)
        x0 = laplacian_pyramid(torch.empty(1, config.channels, config.size, config.size), config.K)
        for k in reversed(range(config.K)):
            state = model.join(state, k, x0, config)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(state, torch.empty(1))
            attention = sum(n for op, n in counter.get_flop_counts()['Global'].items() if 'addmm' not in str(op))
            counts.append((counter.get_total_flops(), attention))
    return counts


def trajectory_average(config):
    """FLOPs of one evaluation for one image, averaged over t in [0, 1]: the whole network's and attention's."""
    lengths = [config.times[k] - config.times[k + 1] for k in reversed(range(config.K))]
    return np.average(flops_per_segment(config), axis=0, weights=lengths)


def costs():
    """Prints Appendix C's analysis, what the counter measures of DiT-L/2, and Table 1's GFLOPs, all over LFM's."""
    print("| DiT-L/2 | attention, Eq. (12), dense | under Eq. (9)'s mask | counted | whole network, counted | "
          "the paper's Table 1 |\n|" + ' --- |' * 6)
    for size, T, paper in ((32, (0.5,), 16.5 / 22.1), (64, (2 / 3, 1 / 3), 41.7 / 43.5),
                           (128, (2 / 3, 1 / 3), 148.2 / 154.8)):
        ours, single = (trajectory_average(LapFlowConfig(size=size, T=T)) for T in (T, ()))
        row = *attention_cost(T), *reversed(ours / single), paper
        print(f'| {size} grid, T = ({", ".join(f"{T_k:.3g}" for T_k in T)}) | '
              + ' | '.join(f'{ratio:.3f}' for ratio in row) + ' |')


def synchronize(device):
    if 'cuda' in device:
        torch.cuda.synchronize()


def hardware(device):
    threads = f'{torch.get_num_threads()} CPU threads ({platform.machine()})'
    return torch.cuda.get_device_name() if 'cuda' in device else threads


@torch.no_grad()
def seconds_per_image(model, batch, y, method, steps, tol, cfg, decoder, device, repeats=3):
    """Median seconds per image, without and with decoding, and the NFE of each repeat (seed)."""
    c, times, decoded, nfes = model.config, [], [], []
    for seed in range(repeats + 1):     # the first is a warm-up
        noise = noise_of(seed, range(batch), (c.channels, c.size, c.size)).to(device)
        synchronize(device)
        start = time.perf_counter()
        x, nfe = generate(model, noise, y[:batch] if y is not None else None, method, steps, tol, cfg)
        synchronize(device)
        times.append((time.perf_counter() - start) / batch)
        decoder(x)
        synchronize(device)
        decoded.append((time.perf_counter() - start) / batch)
        nfes.append(nfe)
    return statistics.median(times[1:]), statistics.median(decoded[1:]), nfes[1:]


def table_1(checkpoint, batch_size, method, steps, tol, cfg, device, seeds):
    """Prints the Table-1 row of a checkpoint."""
    model, meta = load_model(checkpoint, device), checkpoint['data']
    config = model.config
    check_solver(config, method, tol, cfg, checkpoint['config']['label_drop'])
    parameters, vae_parameters, decoder = sum(p.numel() for p in model.parameters()), 0, lambda x: x
    if meta['vae']:
        vae = load_vae(meta, device)
        vae_parameters, decoder = sum(p.numel() for p in vae.parameters()), lambda x: decode(vae, x, meta)
    y = torch.arange(batch_size, device=device) % config.n_classes if config.n_classes else None
    one, one_decoded, nfes = seconds_per_image(model, 1, y, method, steps, tol, cfg, decoder, device, seeds)
    many, many_decoded, _ = seconds_per_image(model, batch_size, y, method, steps, tol, cfg, decoder, device, 1)
    segments, average = flops_per_segment(config), trajectory_average(config)[0]
    single = trajectory_average(LapFlowConfig(**checkpoint['model_args'] | dict(T=())))[0]
    solver = f'{method} at {tol:g}' if method == 'dopri5' else f'{method}, {steps} steps'
    row = {'parameters (with VAE)': f'{parameters / 1e6:.1f} M ({(parameters + vae_parameters) / 1e6:.1f} M)',
           'solver': solver, 'NFE, batch 1': f'{np.mean(nfes):.1f}',
           's/image, batch 1 (with decoding)': f'{one:.3f} ({one_decoded:.3f})',
           f's/image, batch {batch_size} (with decoding)': f'{many:.4f} ({many_decoded:.4f})',
           'GFLOPs per evaluation': f'{average / 1e9:.3f}',
           'by segment': ', '.join(f'{n / 1e9:.3f}' for n, _ in segments),
           'of T=()': f'{average / single:.3f}', 'device': f'{hardware(device)}, float32', 'T': config.T}
    print(f'NFE is the mean over {seeds} seeds at batch 1, a guided pair counted once (cfg {cfg:g}); '
          'a multiply-add is 2 FLOPs.')
    print('| ' + ' | '.join(row) + ' |\n|' + ' --- |' * len(row) + '\n| '
          + ' | '.join(str(cell) for cell in row.values()) + ' |')


def dense_attention(queries, keys, values):
    """What the engine replaces: one attention under a dense mask. All scales have all images."""
    owner = torch.cat([torch.full((q.shape[2],), k, device=q.device) for k, q in queries.items()])
    mask = owner[None] >= owner[:, None]
    q, k, v = (torch.cat(list(part.values()), dim=2) for part in (queries, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return dict(zip(queries, out.split([q.shape[2] for q in queries.values()], dim=2)))


class Trainer:
    """
    A whole training step (forward, backward, AdamW, EMA) on random data, a call a step. packing is 'packed'; 'padded',
    all scales for all images under a dense mask; or 'one stage a step', for the whole batch. The batch is split into
    `parts` micro-batches, as by train.py. compiled is '' or a backend of torch.compile. weights_of is another trainer,
    to use its weights and optimizer.
    """

    def __init__(self, config, batch, device, packing='packed', compiled='', checkpoint_blocks=False, parts=1,
                 weights_of=None):
        self.config, self.B, self.device, self.packing, self.parts = config, batch, device, packing, parts
        self.autocast, self.dtype = autocast_for(device, 'auto')
        torch.backends.cuda.enable_flash_sdp(device != 'cpu' or self.dtype != 'bfloat16')       # as train.py
        attention = dense_attention if packing == 'padded' else model.block_causal_attention
        self.attention = mock.patch.object(model, 'block_causal_attention', attention)
        self.x1, self.x0 = torch.randn(2, batch, config.channels, config.size, config.size, device=device)
        self.y = torch.zeros(batch, dtype=torch.long, device=device) if config.n_classes else None
        self.steps = 0
        if weights_of:
            self.model, self.ema, self.optimizer = weights_of.model, weights_of.ema, weights_of.optimizer
            return
        torch.manual_seed(0)
        with torch.device(device):
            self.model = LapFlow(config)
        self.model.checkpoint_blocks = checkpoint_blocks
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        for block in self.model.blocks if compiled else ():
            block.compile(dynamic=False, backend=compiled)

    def __call__(self):
        K, B = self.config.K, self.B
        stage = packed_stages(B, K)
        if self.packing == 'padded':
            stage = torch.zeros_like(stage)
        elif self.packing == 'one stage a step':
            stage = torch.full_like(stage, self.steps % K)
        t = stage_times(stage.to(self.device), torch.rand(B, device=self.device), self.config)
        for i in range(self.parts):
            share = slice(i, None, self.parts)
            x_t, u_t = states_and_velocities(self.x1[share], self.x0[share], t[share], stage[share], self.config)
            y = None if self.y is None else self.y[share]
            with self.attention, self.autocast:
                v_t = self.model(x_t, t[share], y)
            loss, _ = multiscale_loss(v_t, u_t, (1.0,) * K, B)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1e-3)
        self.steps += 1


class Sampler:
    """Twenty Euler steps for a batch, shared among the segments, with the model of a Trainer."""

    def __init__(self, trainer):
        self.trainer, c = trainer, trainer.config
        self.noise = noise_of(0, range(trainer.B), (c.channels, c.size, c.size)).to(trainer.device)

    def __call__(self):
        with self.trainer.attention, self.trainer.autocast:
            generate(self.trainer.model, self.noise, self.trainer.y, 'euler', 20)


def interleaved(variants, repeats, calls, device):
    """Seconds per call of each variant, {name: function}: a list of `repeats`, after a warm-up."""
    seconds = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, function in variants.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: values[1:] for name, values in seconds.items()}


def print_ratios(what, seconds, images, flops, ceiling):
    """A table of images/s, its arithmetic as a share of the matmul ceiling, and by how much the first is faster."""
    print(f'| {what} | images/s | of the matmul ceiling | the first is faster by (median of ratios, min to max) |\n'
          + '|' + ' --- |' * 4)
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratios, rate = sorted(a / b for a, b in zip(values, first)), images / statistics.median(values)
        print(f'| {name} | {rate:.1f} | {rate * flops[name] / ceiling:.0%} | {statistics.median(ratios):.2f} '
              f'({ratios[0]:.2f} to {ratios[-1]:.2f}) |')


def matmul_ceiling(device, dtype, n=2048):
    """FLOP/s of the best of ten large matrix products."""
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def engine(width, depth, heads, patch, size, T, batch_size, repeats, device, compiled):
    """Prints images/s of training steps and of sampling for this engine and what it replaces, and their ratios."""
    base = dict(size=size, channels=4, patch=patch, width=width, depth=depth, heads=heads)
    dtype = autocast_for(device, 'auto')[1]
    ours, single = LapFlowConfig(**base, T=T), LapFlowConfig(**base, T=())
    steps = {
        'packed, no mask (ours)': Trainer(ours, batch_size, device, compiled=compiled),
        'one stage a step': Trainer(ours, batch_size, device, 'one stage a step', compiled),
        'padded, dense mask': Trainer(ours, batch_size, device, 'padded', compiled),
        'single scale, T=()': Trainer(single, batch_size, device, compiled=compiled),
    }
    print(f'width {width}, depth {depth}, patch {patch}, grid {size}, T {T}, batch {batch_size}, '
          f'{dtype}, {hardware(device)}, {"compiled" if compiled else "eager"}, '
          f'medians of {repeats} interleaved repeats')
    # The arithmetic is that of a packed batch, for padded ones too: what they do besides is waste
    packed = {name: 3 * packed_flops(step.config, batch_size) / batch_size for name, step in steps.items()}
    ceiling = matmul_ceiling(device, dtype)
    print_ratios('training step', interleaved(steps, repeats, ours.K, device), batch_size, packed, ceiling)
    samplers = {name: Sampler(step) for name, step in steps.items() if name != 'one stage a step'}
    drawn = {name: 20 * trajectory_average(sampler.trainer.config)[0] for name, sampler in samplers.items()}
    print()
    print_ratios('sampling, 20 Euler steps', interleaved(samplers, repeats, 1, device), batch_size, drawn, ceiling)


def packed_flops(config, B):
    """Forward FLOPs of a packed batch of B images, for what is in model, by torch's counter."""
    stage = model.packed_stages(B, config.K)
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        images, t, y = torch.empty(B, config.channels, config.size, config.size), torch.empty(B), stage.to('meta')
        x_t, _ = model.states_and_velocities(images, images, t, stage, config)
        model.LapFlow(config)(x_t, t, y)
    return counter.get_total_flops()


def peak_memory(config, images, checkpoint_blocks=False):
    """
    GiB that a training step (forward, backward, AdamW) of a packed batch needs at its peak, eager,
    in bfloat16 autocast: of tensors that have shapes, but no memory. Gradients are held throughout,
    as by a split batch and by torchrun. A GPU's libraries and fragments come on top.
    """
    from torch.distributed._tools.mem_tracker import MemTracker     # slow to import
    counts = [int((packed_stages(images, config.K) <= k).sum()) for k in range(config.K)]
    with FakeTensorMode():
        network = LapFlow(config)
        network.checkpoint_blocks = checkpoint_blocks
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        x = {k: torch.empty(n, config.channels, config.size >> k, config.size >> k) for k, n in enumerate(counts)}
        t = torch.empty(images)

        def step():
            with torch.autocast('cpu', torch.bfloat16):
                v = network(x, t)
            loss, _ = multiscale_loss(v, x, (1.0,) * config.K, images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        step()      # makes gradients and AdamW's state
        tracker = MemTracker()
        tracker.track_external(network, optimizer, t, *x.values())
        with tracker:
            step()
    return tracker.get_tracker_snapshot('peak')[torch.device('cpu')]['Total'] / 2 ** 30


def resident():
    """Bytes of memory that this process has now, and had at most since the last call."""
    status = dict(line.split(':') for line in open('/proc/self/status'))
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')        # begins the maximum anew
    return [1024 * int(status[key].split()[0]) for key in ('VmRSS', 'VmHWM')]


def measured_peak(make_step, device):
    """GiB that two calls of the function that make_step() returns need at their peak, making it included."""
    gpu = 'cuda' in device
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else resident()[0]
    step = make_step()
    step()
    step()
    peak = torch.cuda.max_memory_allocated() if gpu else resident()[1]
    return (peak - before) / 2 ** 30


CARDS = (16, 24, 40, 80, 141)                   # GiB
H100, SHARE = 989e12, 0.35                      # its dense bfloat16 FLOP/s, and what is supposed to be reached of them
PAPER = {       # config: grid, classes, the paper's days of 8 H200 and GB per GPU (Tables 1 and 3)
    'celebahq256': (32, 0, 1.2, 42.2), 'celebahq512': (64, 0, 3.1, 82.8), 'celebahq1024': (128, 0, 8.3, 120.5),
    'imagenet256_b2': (32, 1000, 8.5, 24.9), 'imagenet256_xl2': (32, 1000, 9.4, 68.3)}


def paper_config(name):
    """A config of the paper's runs: its LapFlowConfig and its settings."""
    size, n_classes, _, _ = PAPER[name]
    settings = runpy.run_path(f'{project.ROOT}/config/{name}.py')
    fields = {key: settings[key] for key in LapFlowConfig.__dataclass_fields__ if key in settings}
    return LapFlowConfig(size=size, n_classes=n_classes, **fields), settings


def smallest_card(peak):
    """The smallest card with room for that peak in GiB, a tenth for fragments, and 1 GiB for CUDA and its libraries."""
    return next((f'{card} GB' for card in CARDS if 1.1 * peak + 1 <= card), 'none')


def measured_beside_estimated(width, depth, heads, patch, size, T, batch_size):
    """The peak of a step of two micro-batches with EMA on this CPU, in GiB, and its estimate."""
    config = LapFlowConfig(size=size, patch=patch, width=width, depth=depth, heads=heads, T=T)

    def make_step():
        step = Trainer(config, 2 * batch_size, 'cpu', parts=2)
        torch.backends.cuda.enable_flash_sdp(True)      # as on a GPU
        return step

    measured = measured_peak(make_step, 'cpu')
    ema = sum(4 * p.numel() for p in LapFlow(config).parameters()) / 2 ** 30
    return measured, peak_memory(config, batch_size) + ema


def memory(width, depth, heads, patch, size, T, batch_size):
    """Prints what each of the paper's runs needs: peak memory by images a GPU, and arithmetic."""
    measured, estimated = measured_beside_estimated(width, depth, heads, patch, size, T, batch_size)
    print(f'width {width}, depth {depth}, {batch_size} images: {measured:.2f} GiB measured, {estimated:.2f} estimated\n')
    cases = [(name, images, blocks) for name in PAPER for blocks in (False, True) for images in (32, 8)]
    with ProcessPoolExecutor() as pool:
        peaks = pool.map(peak_memory, *zip(*[(paper_config(name)[0], images, blocks) for name, images, blocks in cases]))
        peaks = dict(zip(cases, peaks))
    print('| config | parameters | state, GiB | peak, 32 images | 8 images | checkpointed: 32 | 8 | smallest card | EFLOPs | '
          'H100 days | the paper, on 8 H200 |\n|' + ' --- |' * 11)
    for name, (_, _, days, gigabytes) in PAPER.items():
        config, settings = paper_config(name)
        with torch.device('meta'):
            parameters = sum(p.numel() for p in LapFlow(config).parameters())
        ema = 4 * parameters / 2 ** 30 if settings['ema_decay'] else 0
        peak = [peaks[name, images, blocks] + ema for blocks in (False, True) for images in (32, 8)]
        flops = 3 * packed_flops(config, settings['batch_size']) * settings['max_iters']
        print(f'| {name} | {parameters / 1e6:.0f} M | {16 * parameters / 2 ** 30 + ema:.1f} | '
              + ' | '.join(f'{n:.1f}' for n in peak) + f' | {smallest_card(peak[0])}; {smallest_card(peak[3])} | '
              f'{flops / 1e18:.1f} | {flops / H100 / SHARE / 86400:.1f} | {days} days, {gigabytes} GB |', flush=True)


def loop(width, depth, heads, patch, size, T, batch_size, repeats, device, compiled, folder):
    """Prints the seconds of what surrounds a training step: reading latents, evaluating, saving and loading."""
    config = LapFlowConfig(size=size, patch=patch, width=width, depth=depth, heads=heads, T=T)
    N, file = 4096, os.path.join(folder, 'ckpt.pt')
    latents = np.random.default_rng(0).standard_normal((N, 2, 8, size, size), np.float32).astype(np.float16)
    np.save(os.path.join(folder, 'latents.npy'), latents)
    np.save(os.path.join(folder, 'labels.npy'), np.zeros(N, np.int64))
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(dict(vae='random', count=N, heldout=0, flips=2, size=size, channels=4, classes=[],
                       image_size=8 * size, scaling_factor=1.0), f)
    data, step, position = Dataset(folder), Trainer(config, batch_size, device, compiled=compiled), count()
    eps = torch.randn(batch_size, 4, size, size, device=device)

    def read():
        index = training_order(next(position) * batch_size, batch_size, N, 0)
        data.batch(index, device, index % 2 == 0, eps)

    def save():
        torch.save(dict(model=step.model.state_dict(), ema=step.ema, optimizer=step.optimizer.state_dict()), file)

    parts = {'training step': step, f'reading {batch_size} latents': read,
             'evaluation: 20 Euler steps of a batch': Sampler(step), 'saving a checkpoint': save,
             'loading it': lambda: torch.load(file, map_location=device, weights_only=True)}
    seconds = interleaved(parts, repeats, 1, device)
    print(f'width {width}, depth {depth}, patch {patch}, grid {size}, T {T}, batch {batch_size}, {hardware(device)}, '
          f'{os.path.getsize(file) / 1e6:.0f} MB checkpoint, medians of {repeats} interleaved repeats')
    print('| | seconds | of a training step |\n| --- | --- | --- |')
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds['training step'])]
        print(f'| {name} | {statistics.median(values):.4f} | {statistics.median(ratios):.1%} |')


if __name__ == '__main__':
    what = 'engine'         # or loop, costs, memory: see above
    ckpt = ''               # a checkpoint: its Table-1 row instead
    batch_size = 32
    device = 'auto'
    seeds = 5               # of the NFE and the time at batch 1
    method = 'dopri5'       # these four: the checkpoint's own, unless given
    steps = 50
    tol = 1e-5
    cfg = 1.0
    width = 384
    depth = 6
    heads = 6
    patch = 2
    size = 32
    T = (0.5,)
    repeats = 5
    compiled = ''           # a backend of torch.compile, such as inductor
    configure(globals())
    check(what in ('engine', 'loop', 'costs', 'memory'),
          f'what must be engine, loop, costs or memory, but it is {what!r}')
    if ckpt:
        restart_under_variant(ckpt)
        checkpoint = load_checkpoint(ckpt)
        trained = checkpoint['config']
        method, steps, tol = trained['method'], trained['steps'], trained['tol']
        cfg = trained['cfg']
        configure(globals())    # again, so that the command line wins over the checkpoint
    check(min(batch_size, seeds, steps, width, depth, heads, patch, size, repeats) > 0,
          'batch_size, seeds, steps, repeats and sizes must be at least 1')
    device, _, _ = launch(device)
    if ckpt:
        table_1(checkpoint, batch_size, method, steps, tol, cfg, device, seeds)
    elif what == 'costs':
        costs()
    elif what == 'memory':
        memory(width, depth, heads, patch, size, T, batch_size)
    else:
        args = width, depth, heads, patch, size, T, batch_size, repeats, device, compiled
        if what == 'engine':
            engine(*args)
        else:
            with tempfile.TemporaryDirectory() as folder:
                loop(*args, folder)
