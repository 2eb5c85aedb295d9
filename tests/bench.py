"""
Speed and cost, measured.

    python tests/bench.py --ckpt out-digits/ckpt.pt     # a checkpoint's row of the paper's Table 1
    python tests/bench.py                               # this engine against what it replaces, step for step

A multiply-add counts as 2 FLOPs. NFE counts a guided pair of evaluations once. Ratios are of interleaved repeats.
"""
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import model as lapflow  # noqa: E402
from configurator import configure  # noqa: E402
from data import decode, launch, load_vae  # noqa: E402
from model import LapFlow, LapFlowConfig, multiscale_loss, packed_counts, stage_times, states_and_targets  # noqa: E402
from sample import ADAPTIVE, generate, load_checkpoint, noise_of  # noqa: E402


def flops_per_segment(config):
    """FLOPs of one evaluation for one image in every segment, coarsest first, by torch's counter on the meta device."""
    counts = []
    with torch.device('meta'):
        model = LapFlow(config)
        for s in reversed(range(config.K)):
            active = range(s, config.K) if config.flow == 'lapflow' else [s]
            x = [torch.empty(1, config.channels, config.size >> k, config.size >> k) if k in active else None
                 for k in range(config.K)]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(x, torch.empty(1))
            counts.append(counter.get_total_flops())
    return counts


def trajectory_average(config):
    """FLOPs of one evaluation for one image, averaged over t in [0, 1]."""
    times = config.times
    return sum(n * (times[k] - times[k + 1]) for n, k in zip(flops_per_segment(config), reversed(range(config.K))))


def synchronize(device):
    if 'cuda' in device:
        torch.cuda.synchronize()


def hardware(device):
    threads = f'{torch.get_num_threads()} CPU threads ({platform.machine()})'
    return torch.cuda.get_device_name() if 'cuda' in device else threads


@torch.no_grad()
def seconds_per_image(model, batch, y, method, steps, tol, cfg, decoder, device, repeats=3):
    """
    Median seconds per image of sampling a batch, without and with decoding, and the NFE of each repeat
    (seeds 0, 1, ...).
    """
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


def table_1(ckpt, batch_size, method, steps, tol, cfg, device, seeds):
    """Prints the Table-1 row of a checkpoint."""
    checkpoint = load_checkpoint(ckpt, device)
    config, meta = LapFlowConfig(**checkpoint['model_args']), checkpoint['data']
    model = LapFlow(config).to(device).eval()
    model.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    parameters, vae_parameters, decoder = sum(p.numel() for p in model.parameters()), 0, lambda x: x
    if meta['vae']:
        vae = load_vae(meta, device)
        vae_parameters, decoder = sum(p.numel() for p in vae.parameters()), lambda x: decode(vae, x, meta)
    y = torch.arange(batch_size, device=device) % config.n_classes if config.n_classes else None
    one, one_decoded, nfes = seconds_per_image(model, 1, y, method, steps, tol, cfg, decoder, device, seeds)
    many, many_decoded, _ = seconds_per_image(model, batch_size, y, method, steps, tol, cfg, decoder, device, 1)
    segments, average = flops_per_segment(config), trajectory_average(config)
    single = trajectory_average(LapFlowConfig(**checkpoint['model_args'] | dict(T=())))
    solver = f'{method} at {tol:g}' if method in ADAPTIVE else f'{method}, {steps} steps'
    row = {'parameters (with VAE)': f'{parameters / 1e6:.1f} M ({(parameters + vae_parameters) / 1e6:.1f} M)',
           'solver': solver, 'NFE, batch 1': f'{np.mean(nfes):.1f}',
           's/image, batch 1 (with decoding)': f'{one:.3f} ({one_decoded:.3f})',
           f's/image, batch {batch_size} (with decoding)': f'{many:.4f} ({many_decoded:.4f})',
           'GFLOPs per evaluation': f'{average / 1e9:.3f}', 'by segment': ', '.join(f'{n / 1e9:.3f}' for n in segments),
           'of T=()': f'{average / single:.3f}', 'device': f'{hardware(device)}, float32', 'T': config.T}
    print(f'NFE is the mean over {seeds} seeds at batch 1, a guided pair counted once (cfg {cfg:g}); '
          'a multiply-add is 2 FLOPs.')
    print('| ' + ' | '.join(row) + ' |\n|' + ' --- |' * len(row) + '\n| '
          + ' | '.join(str(cell) for cell in row.values()) + ' |')


def dense_attention(qkv, mask):
    """
    What the engine replaces: one attention over all tokens, all scales for all images, under a dense block-causal
    mask.
    """
    scale = torch.cat([torch.full((qkv[k].shape[3],), k, device=qkv[k].device) for k in qkv])
    q, k, v = torch.cat(list(qkv.values()), dim=3)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=scale[None] >= scale[:, None]).transpose(1, 2).flatten(2)
    return dict(zip(qkv, out.split([x.shape[3] for x in qkv.values()], dim=1)))


class Trainer:
    """A whole training step (forward, backward, AdamW, EMA) of one variant on random data, a call a step."""

    def __init__(self, config, batch, device, autocast, packing='packed', compiled=False):
        self.config, self.B, self.device, self.autocast, self.packing = config, batch, device, autocast, packing
        torch.manual_seed(0)
        self.model = LapFlow(config).to(device)
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.x1, self.x0 = torch.randn(2, batch, config.channels, config.size, config.size, device=device)
        self.y = torch.zeros(batch, dtype=torch.long, device=device) if config.n_classes else None
        self.steps = 0
        if compiled:
            for block in self.model.blocks:
                block.compile(dynamic=False)

    def __call__(self):
        K, B = self.config.K, self.B
        counts = {'packed': packed_counts(B, K), 'padded': [B] * K,
                  'one stage a step': [B if k >= self.steps % K else 0 for k in range(K)]}[self.packing]
        stage = (torch.arange(B, device=self.device) * K // B if self.packing == 'packed'
                 else torch.zeros(B, dtype=torch.long))
        if self.packing == 'one stage a step':
            stage = stage + self.steps % K
        t = stage_times(stage.to(self.device), torch.rand(B, device=self.device), self.config)
        x_t, u = states_and_targets(self.x1, self.x0, t, counts, self.config)
        active = [x if n else None for x, n in zip(x_t, counts)]
        with self.autocast():
            v = self.model(active, t, self.y)
        loss, _ = multiscale_loss([x for x in v if x is not None], [x for x, n in zip(u, counts) if n], (1.0,) * K, B)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1e-3)
        self.steps += 1


def engine(width, depth, heads, patch, size, T, batch_size, repeats, device, compiled):
    """Prints images/s of whole training steps for this engine and what it replaces, and their ratios."""
    base = dict(size=size, channels=4, patch=patch, width=width, depth=depth, heads=heads)
    bf16 = 'cuda' in device or torch.cpu._is_amx_tile_supported()
    autocast = lambda: torch.autocast(device.split(':')[0], torch.bfloat16) if bf16 else nullcontext()
    if device == 'cpu':
        torch.backends.cuda.enable_flash_sdp(False)     # as train.py
    ours, dense = LapFlowConfig(**base, T=T), lapflow.global_attention
    single = LapFlowConfig(**base, T=())
    variants = {
        'packed, no mask (ours)': (Trainer(ours, batch_size, device, autocast, compiled=compiled), dense),
        'one stage a step': (Trainer(ours, batch_size, device, autocast, 'one stage a step', compiled), dense),
        'padded, dense mask': (Trainer(ours, batch_size, device, autocast, 'padded', compiled), dense_attention),
        'single scale, T=()': (Trainer(single, batch_size, device, autocast, compiled=compiled), dense),
    }
    seconds, cycle = {name: [] for name in variants}, ours.K     # a whole cycle of stages is one repeat
    for repeat in range(repeats + 1):
        for name, (step, attention) in variants.items():
            lapflow.global_attention = attention
            synchronize(device)
            start = time.perf_counter()
            for _ in range(cycle):
                step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / cycle)
    lapflow.global_attention = dense
    print(f'width {width}, depth {depth}, patch {patch}, grid {size}, T {T}, batch {batch_size}, '
          f'{"bfloat16" if bf16 else "float32"}, {hardware(device)}, {"compiled" if compiled else "eager"}, '
          f'medians of {repeats} interleaved repeats')
    print('| training step | images/s | ours is faster by (median of ratios, min to max) |\n| --- | --- | --- |')
    for name in variants:
        ratios = sorted(a / b for a, b in zip(seconds[name][1:], seconds['packed, no mask (ours)'][1:]))
        print(f'| {name} | {batch_size / statistics.median(seconds[name][1:]):.1f} | {statistics.median(ratios):.2f} '
              f'({ratios[0]:.2f} to {ratios[-1]:.2f}) |')


if __name__ == '__main__':
    ckpt = ''               # a checkpoint: its Table-1 row; '': the engine's table
    batch_size = 32
    device = 'auto'
    seeds = 5               # of the NFE and the time at batch 1
    method = 'dopri5'       # these four: the checkpoint's own, unless given
    steps = 50
    tol = 1e-5
    cfg = 1.0
    width = 384             # of the engine's table
    depth = 6
    heads = 6
    patch = 2
    size = 32
    T = (0.5,)
    repeats = 5
    compiled = False
    configure(globals())
    device, _, _ = launch(device)
    if ckpt:
        saved = load_checkpoint(ckpt, 'cpu')['config']
        method, steps, tol, cfg = (saved[key] for key in ('method', 'steps', 'tol', 'cfg'))
        configure(globals())
        table_1(ckpt, batch_size, method, steps, tol, cfg, device, seeds)
    else:
        engine(width, depth, heads, patch, size, T, batch_size, repeats, device, compiled)
