"""
Trains LapFlow (Alg. 1), in one process or many. Run the same command again and it goes on where it stopped.

    python train.py config/digits.py
    torchrun --nproc_per_node=8 train.py config/celebahq256.py

Writes out_dir/ckpt.pt, log.csv and samples.png. All that is random in an iteration is drawn for the global batch from
(seed, iteration), and each process and micro-batch takes a strided share of it: how many there are changes nothing but
rounding.
"""
import copy
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from configurator import changes, configure, hold
from data import Dataset, decode, launch, load_vae, training_order
from model import LapFlow, LapFlowConfig, multiscale_loss, packed_counts, stage_times, states_and_targets
from sample import ADAPTIVE, FIXED, generate, load_checkpoint, noise_of, save_grid, to_uint8

# ----------------------------------------------------------------------------------------------------------------------
# Settings: config files and --key=value override them
out_dir = 'out'
eval_interval = 1000        # iterations between evaluations, each with a checkpoint and samples.png
log_interval = 10
eval_images = 512           # held-out images in the held-out loss
sample_images = 100         # in samples.png, ten to a row
wandb_log = False
# data
dataset = 'digits'          # a folder made by data.py, or its name in data/
batch_size = 128            # images per iteration, over all processes and micro-batches
gradient_accumulation_steps = 1
# model: the fields of LapFlowConfig; size and channels 0, n_classes -1 are the dataset's
size = 0
channels = 0
patch = 2
width = 768
depth = 12
heads = 12
T = (0.5,)
n_classes = -1
mask = 'causal'
shared = ''
path = 'linear'
flow = 'lapflow'
checkpoint_blocks = False   # activation checkpointing: less memory, more compute
# optimisation: AdamW
loss_weights = ()           # w_k of Eq. (7), finest scale first; () is 1 for each
label_drop = 0.1            # share of labels replaced by the null label, for guidance
max_iters = 10_000
epochs = 0                  # > 0 sets max_iters
learning_rate = 2e-4
warmup_iters = 0
decay_lr = True             # cosine to min_lr at max_iters; False keeps learning_rate
min_lr = 1e-6
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0             # 0 is off
ema_decay = 0.0             # 0 is off
# sampling defaults, carried by the checkpoint: see sample.py
method = 'dopri5'
steps = 50
tol = 1e-5
cfg = 1.0
# system
seed = 0
device = 'auto'             # cuda, mps or cpu
dtype = 'auto'              # of autocast: bfloat16 where the hardware has it, or float32
compile = True              # torch.compile, block by block
backend = 'auto'            # of torch.distributed: nccl on GPUs, gloo elsewhere
config = configure(globals())
# ----------------------------------------------------------------------------------------------------------------------


def learning_rate_at(iteration):
    """Linear warm-up, then a cosine from learning_rate to min_lr at max_iters, or constant."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    progress = (iteration - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


device, rank, world = launch(device, backend)
device_type, master = device.split(':')[0], rank == 0

# Precision: weights, optimizer and EMA are float32, the network runs under autocast
if dtype == 'auto':
    has_bf16 = {'cuda': lambda: torch.cuda.is_bf16_supported(including_emulation=False),
                'cpu': torch.cpu._is_amx_tile_supported}.get(device_type, bool)()
    dtype = 'bfloat16' if has_bf16 else 'float32'
autocast = torch.autocast(device_type, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
slow_flash = device_type == 'cpu' and dtype == 'bfloat16'    # flash attention's backward pass is slow there

# Data and model
data = Dataset(dataset)
size, channels = size or data.meta['size'], channels or data.meta['channels']
classes = len(data.meta['classes'])
n_classes = classes if n_classes < 0 else n_classes
model_args = {field.name: globals()[field.name] for field in fields(LapFlowConfig)}
try:
    model_config = LapFlowConfig(**model_args)
except ValueError as error:
    raise SystemExit(f'train.py: {error}')
K, shares = model_config.K, world * gradient_accumulation_steps
max_iters = epochs * data.n_train // max(batch_size, 1) if epochs else max_iters
loss_weights = loss_weights or (1.0,) * K
for wrong, sentence in (
        (min(eval_interval, log_interval, sample_images, batch_size, shares, max_iters) < 1 or eval_images < K,
         'eval_interval, log_interval, sample_images, batch_size, gradient_accumulation_steps and max_iters (or the '
         f'batches of the epochs) must be at least 1, and eval_images at least {K}'),
        ((size, channels) != (data.meta['size'], data.meta['channels']),
         f'{dataset} has size {data.meta["size"]} and {data.meta["channels"]} channels, not {size} and {channels}'),
        (n_classes and (n_classes < classes or not classes), f'{dataset} has {classes} classes, not {n_classes}'),
        (cfg != 1 and not n_classes, 'cfg is for class-conditional models: add --cfg=1, or classes'),
        (seed < 0, f'seed must be 0 or more, but it is {seed}'),
        (dtype not in ('float32', 'bfloat16'), f'dtype must be auto, float32 or bfloat16, but it is {dtype!r}'),
        (method not in ADAPTIVE + FIXED, f'method must be one of {", ".join(ADAPTIVE + FIXED)}, but it is {method!r}'),
        (steps < K or tol <= 0, f'steps must be at least {K}, and tol positive, but they are {steps} and {tol}'),
        (not all(0 <= value < 1 for value in (ema_decay, beta1, beta2)) or not 0 <= label_drop <= 1,
         f'ema_decay, beta1 and beta2 must be in [0, 1) and label_drop in [0, 1], but they are {ema_decay}, {beta1}, '
         f'{beta2} and {label_drop}'),
        (min(learning_rate, min_lr, warmup_iters, weight_decay, grad_clip) < 0,
         'learning_rate, min_lr, warmup_iters, weight_decay and grad_clip must be 0 or more'),
        (not out_dir, 'out_dir must name a folder'),
        (len(loss_weights) != K, f'loss_weights must be one for each of the {K} scales, but it is {loss_weights}'),
        (batch_size % max(shares, 1) or batch_size < K * shares,
         f'batch_size {batch_size} must split evenly over {world} process(es) x {gradient_accumulation_steps} '
         f'accumulation step(s), with at least one image for each of the {K} scales')):
    if wrong:
        raise SystemExit(f'train.py: {sentence}')
torch.manual_seed(seed)
model = LapFlow(model_config).to(device)
model.checkpoint_blocks = checkpoint_blocks
parameters = list(model.parameters())
optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
ema = copy.deepcopy(model).requires_grad_(False) if ema_decay else None
averages = list(ema.parameters()) if ema_decay else None
vae = load_vae(data.meta, device) if master and data.meta['vae'] else None
iteration = 0

# Resume
ckpt_path, log_path = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'log.csv')
if os.path.exists(ckpt_path):
    checkpoint = load_checkpoint(ckpt_path, device)
    for what, there, here in (('model', checkpoint['model_args'], model_args),
                              ('dataset', checkpoint['data'], data.meta)):
        if changes(there, here):
            raise SystemExit(f'train.py: {ckpt_path} holds another {what} ({"; ".join(changes(there, here))}): '
                             'give another --out_dir')
    model.load_state_dict(checkpoint['model'])
    optimizer.load_state_dict(checkpoint['optimizer'])
    if ema is not None:
        ema.load_state_dict(checkpoint['ema'] or checkpoint['model'])
    iteration = checkpoint['iter_num']
    if iteration >= max_iters:
        if master:
            print(f'{ckpt_path} is finished: {iteration} iterations; to go on, raise max_iters')
        raise SystemExit
    if master:
        print(f'resuming {ckpt_path} at iteration {iteration}', *changes(checkpoint['config'], config), sep='\n  ')
    del checkpoint      # or its tensors stay on the device


def draw(n, *key):
    """
    Alg. 1, lines 5 and 6: noise (n, C, H, W), times, label drops and mirror flips (n,), and the VAE's noise or None,
    for n images packed by stage. All that is random about them, from (seed, *key) alone.
    """
    generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence((seed, *key)).generate_state(1)[0]))
    noise = torch.randn(n, channels, size, size, generator=generator, device=device)
    uniform, drop = torch.rand(2, n, generator=generator, device=device)
    stage = torch.arange(n, device=device) * K // n     # stratified: as many images in every stage
    flip = np.random.default_rng((seed, *key)).random(n) < 0.5     # on the CPU, where the images are read
    eps = torch.randn(noise.shape, generator=generator, device=device) if data.meta['vae'] else None
    return noise, stage_times(stage, uniform, model_config), drop < label_drop, flip, eps


def forward(net, index, draws, share):
    """The loss and the scales' errors on a share, a slice, of the images in index with their draws (Alg. 1)."""
    noise, t, drop, flip, eps = (drawn if drawn is None else drawn[share] for drawn in draws)
    x1, y = data.batch(index[share], device, flip, eps)
    y = torch.where(drop, n_classes, y) if n_classes else None
    counts = [len(range(n)[share]) for n in packed_counts(len(index), K)]
    x_t, u = states_and_targets(x1, noise, t, counts, model_config)
    with autocast, sdpa_kernel(SDPBackend.MATH) if slow_flash else nullcontext():
        v = net(x_t, t, y)
    return *multiscale_loss(v, u, loss_weights, len(t)), [len(u_k) for u_k in u]


@torch.no_grad()
@torch.compiler.set_stance('force_eager')
def evaluate():
    """Saves samples.png and returns the scales' held-out errors, at noise and times that never change. EMA if any."""
    net = ema or model
    index = data.heldout[:eval_images]
    draws, parts = draw(len(index), 1), max(1, len(index) * shares // batch_size)     # about a training step's
    errors, counts = zip(*(forward(net, index, draws, slice(i, None, parts))[1:] for i in range(parts)))
    counts = torch.tensor(counts, device=device)
    y = torch.arange(sample_images, device=device) % n_classes if n_classes else None
    noise = noise_of(seed, range(sample_images), (channels, size, size)).to(device)
    try:
        with autocast if method in FIXED else nullcontext():
            x, _ = generate(net, noise, y, method, steps, tol, cfg)
        save_grid(os.path.join(out_dir, 'samples.png'), to_uint8(decode(vae, x, data.meta)))
    except FloatingPointError as error:
        print(f'no samples.png this time: {error}')
    return ((torch.stack(errors) * counts).sum(0) / counts.sum(0)).tolist()


def save():
    """Writes the checkpoint in one step: whoever looks finds the old one or the new one, whole."""
    checkpoint = dict(model=model.state_dict(), ema=ema and ema.state_dict(), optimizer=optimizer.state_dict(),
                      iter_num=iteration, model_args=model_args, config=config, data=data.meta)
    try:
        torch.save(checkpoint, ckpt_path + '.tmp')
    except RuntimeError as error:       # what torch makes of a full disk
        os.remove(ckpt_path + '.tmp')
        raise OSError(f'is the disk full? {str(error).splitlines()[0]}') from error
    os.replace(ckpt_path + '.tmp', ckpt_path)


if master:
    hold(os.path.join(out_dir, '.lock'))
    names = ['iter', 'loss', 'lr', 'grad_norm', 'images_per_s'] + [f'heldout_{k}' for k in range(K)]
    rows = open(log_path).read().splitlines()[1:] if iteration and os.path.exists(log_path) else []
    rows = [row for row in rows if row.count(',') == len(names) - 1 and int(row.split(',')[0]) <= iteration]
    with open(log_path + '.tmp', 'w') as f:     # what was logged after the last checkpoint will be logged again
        f.writelines(line + '\n' for line in [','.join(names), *rows])
    os.replace(log_path + '.tmp', log_path)
    print(f'{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {K} scales of {size} x {size} and coarser, '
          f'{data.n_train} images, {max_iters} iterations of {batch_size}, {world} process(es) on {device}, {dtype}')
    if wandb_log:
        import wandb
        wandb.init(project='lapflow', name=os.path.basename(out_dir), config=config)
if compile:
    for block in model.blocks:
        block.compile(dynamic=False)
net = model if world == 1 else DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
finite = torch.ones((), dtype=torch.bool, device=device)
terminated = []             # by SIGTERM, as when a job is preempted: save at the next log step, and end
signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
logged, clock = iteration, time.time()

while iteration < max_iters:
    for group in optimizer.param_groups:
        group['lr'] = learning_rate_at(iteration)
    index = training_order(iteration * batch_size, batch_size, data.n_train, seed)
    draws, total = draw(batch_size, 0, iteration), 0.0
    for micro in range(gradient_accumulation_steps):
        last = micro == gradient_accumulation_steps - 1
        with nullcontext() if last or world == 1 else net.no_sync():
            share = slice(rank + world * micro, None, shares)
            loss = forward(net, index, draws, share)[0] / gradient_accumulation_steps
            loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    finite &= torch.isfinite(norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    iteration += 1
    if ema is not None:
        decay = min(ema_decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)

    evaluating = iteration % eval_interval == 0 or iteration == max_iters
    if not evaluating and iteration % log_interval:
        continue
    report = torch.stack([total, torch.full_like(total, len(terminated))])
    if world > 1:
        dist.all_reduce(report)
    loss, stop = (report / world).tolist()      # all processes stop at the same iteration
    if not finite:
        raise SystemExit(f'train.py: the gradient is not finite at or before iteration {iteration}; {ckpt_path} is '
                         'untouched: try a lower learning_rate, more warmup_iters or dtype=float32')
    rate = (iteration - logged) * batch_size / (time.time() - clock)
    row = dict(iter=iteration, loss=loss, lr=optimizer.param_groups[0]['lr'], grad_norm=norm.item(), images_per_s=rate)
    if master:
        left = round((max_iters - iteration) * batch_size / rate)
        print(f'iter {iteration}/{max_iters}: loss {loss:.4f}, {rate:.1f} images/s, '
              f'{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left')
        started = time.time()
        try:
            if evaluating:
                row |= {f'heldout_{k}': error for k, error in enumerate(evaluate())}
            with open(log_path, 'a') as f:      # before the checkpoint: resuming drops rows, but cannot make up for one
                f.write(','.join(f'{row[name]:.10g}' if name in row else '' for name in names) + '\n')
            if evaluating or stop:
                save()
        except OSError as error:
            raise SystemExit(f'train.py: cannot write to {out_dir} ({error}); the last {ckpt_path}, if any, is whole')
        if wandb_log:
            wandb.log(row, step=iteration)
        if evaluating:
            print('held-out', ', '.join(f'{row[f"heldout_{k}"]:.4f} (scale {k})' for k in range(K)),
                  f'| {ckpt_path} and samples.png written in {time.time() - started:.1f} s')
    if stop:
        if master:
            print(f'terminated: {ckpt_path} holds iteration {iteration}; run the same command again to go on')
        break
    logged, clock = iteration, time.time()

if world > 1:
    dist.destroy_process_group()
    if wandb_log and master:
        wandb.finish()
    sys.stdout.flush()
    os._exit(0)     # gloo's threads outlive the line above under DDP, and 1 of 24 ordinary ends was an abort
