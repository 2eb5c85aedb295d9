"""Trains LapFlow (Alg. 1), in one process or many. Run the same command again and it goes on where it stopped.

    python train.py config/digits.py
    torchrun --nproc_per_node=8 train.py config/celebahq256.py

Writes out_dir/ckpt.pt, log.csv and samples.png. All that is random in an iteration is drawn for the global batch from
(seed, iteration), and each process and micro-batch takes a strided share of it: how many there are changes nothing but
rounding. (CPUs and GPUs draw other numbers from the same seed.)"""
import copy
import fcntl
import math
import os
import signal
import sys
import time
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import changes, check, configure, explain, launch, precision
from data import Dataset, load_vae, training_order
from model import LapFlow, LapFlowConfig, multiscale_loss, packed_stages, stage_times, states_and_targets
from sample import check_solver, draw, load_checkpoint, save_grid

# ---- Settings: config files and --key=value override them ------------------------------------------------------------
out_dir = 'out'
eval_interval = 1000        # iterations between evaluations, each with a checkpoint and samples.png
log_interval = 10
eval_images = 512           # held-out images in the held-out loss
sample_images = 100         # in samples.png, ten to a row
# data
dataset = 'digits'          # a folder made by data.py, or its name in data/
batch_size = 128            # images per iteration, over all processes and micro-batches
gradient_accumulation_steps = 1
# model: the fields of LapFlowConfig, but for size and channels, which are the dataset's
patch = 2
width = 768
depth = 12
heads = 12
T = (0.5,)
n_classes = -1              # -1: the dataset's; 0: unconditional
mask = 'causal'
shared = ''
path = 'linear'
image_tokens = False
checkpoint_blocks = False   # activation checkpointing: less memory, more compute
# optimisation: AdamW
loss_weights = ()           # w_k of Eq. (7), finest scale first; () is 1 for each
label_drop = 0.1            # share of labels replaced by the null label, for guidance
max_iters = 10_000
epochs = 0                  # > 0 overrides max_iters
learning_rate = 2e-4
warmup_iters = 0
min_lr = 1e-6               # reached at max_iters by a cosine; min_lr = learning_rate keeps it constant
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
config = configure(globals())


def learning_rate_at(iteration):
    """Linear warm-up, then a cosine from learning_rate to min_lr at max_iters."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    progress = (iteration - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


device, rank, world = launch(device)
autocast, dtype = precision(device, dtype)      # weights, optimizer and EMA are float32
torch.backends.cuda.enable_flash_sdp(device != 'cpu' or dtype != 'bfloat16')    # slow backward pass

# Data and model
data = Dataset(dataset)
size, channels, classes = data.meta['size'], data.meta['channels'], len(data.meta['classes'])
n_classes = classes if n_classes < 0 else n_classes
with explain('these settings make no model'):
    model_config = LapFlowConfig(**{field.name: globals()[field.name] for field in fields(LapFlowConfig)})
K, shares = model_config.K, world * gradient_accumulation_steps
weights = loss_weights or (1.0,) * K
check(not n_classes or 0 < classes <= n_classes, f'{dataset} has {classes} classes, not {n_classes}')
check(len(weights) == K, f'loss_weights must be one for each of the {K} scales, but it is {weights}')
check(batch_size % shares == 0 and batch_size >= K * shares, f'batch_size {batch_size} must split into {shares} parts '
      f'(processes x accumulation steps) of at least {K} images (scales)')
max_iters = epochs * data.n_train // batch_size if epochs else max_iters
solver = check_solver(model_config, method, steps, tol, cfg)
torch.manual_seed(seed)
model = LapFlow(model_config).to(device)
model.checkpoint_blocks = checkpoint_blocks
parameters = list(model.parameters())
optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
ema = copy.deepcopy(model).requires_grad_(False) if ema_decay else None
vae = load_vae(data.meta, device) if rank == 0 else None
iteration, log = 0, []      # log: the rows of log.csv

# Resume
ckpt_path = f'{out_dir}/ckpt.pt'
if os.path.exists(ckpt_path):
    saved = load_checkpoint(ckpt_path)
    there, here = asdict(LapFlowConfig(**saved['model_args'])) | saved['data'], asdict(model_config) | data.meta
    check(there == here, f'{ckpt_path} is of other settings or data ({changes(there, here)}): give another --out_dir')
    model.load_state_dict(saved['model'])
    optimizer.load_state_dict(saved['optimizer'])
    optimizer.param_groups[0].update(betas=(beta1, beta2), weight_decay=weight_decay)
    if ema is not None:
        ema.load_state_dict(saved['ema'] or saved['model'])
    iteration, log = saved['iter_num'], saved['log']
    if rank == 0:
        print(f'resuming {ckpt_path} at iteration {iteration} of {max_iters}; {changes(saved["config"], config)}')
    del saved               # or its tensors stay in memory


def random_inputs(n, *key):
    """Alg. 1, lines 5 and 6: noise (n, C, H, W), times, label drops, mirror flips (n,), and noise for the VAE's
    posterior, of n images packed by stage: all that is random about them, from (seed, *key)."""
    generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence((seed, *key)).generate_state(1)[0]))
    noise = torch.randn(n, channels, size, size, generator=generator, device=device)
    uniform, drop = torch.rand(2, n, generator=generator, device=device)
    t = stage_times(packed_stages(n, K, device), uniform, model_config)
    flip = np.random.default_rng((seed, *key)).random(n) < 0.5     # on the CPU, where the images are read
    eps = torch.randn(noise.shape, generator=generator, device=device)
    return noise, t, drop < label_drop, flip, eps


def forward(net, index, inputs, share):
    """The loss and the images' errors, K tensors, of a share, a slice, of the images in index (Alg. 1, lines 7-10)."""
    noise, t, drop, flip, eps = (x[share] for x in inputs)
    x1, y = data.batch(index[share], device, flip, eps)
    y = torch.where(drop, n_classes, y) if n_classes else None
    stage = packed_stages(len(index), K)[share]
    counts = [int((stage <= k).sum()) for k in range(K)]
    x_t, u = states_and_targets(x1, noise, t, counts, model_config)
    with autocast:
        v = net(x_t, t, y)
    return multiscale_loss(v, u, weights, len(t))


@torch.no_grad()
@torch.compiler.set_stance('force_eager')
def evaluate():
    """Saves samples.png and returns the scales' held-out errors, at noise and times that never change, dropped labels
    and mirror images among them, as in training. EMA if any."""
    net, index = ema or model, data.heldout[:eval_images]
    inputs, parts = random_inputs(len(index), 1), max(1, len(index) * shares // batch_size)   # about a training step's
    errors = [forward(net, index, inputs, slice(i, None, parts))[1] for i in range(parts)]
    try:
        images = draw(net, vae, data.meta, seed, range(sample_images), autocast, **solver)[0]
        save_grid(f'{out_dir}/samples.png', images)
    except FloatingPointError as error:
        print(f'no samples.png this time: {error}')
    return [torch.cat(of_scale).mean().item() for of_scale in zip(*errors)]


if iteration >= max_iters:
    print(f'{ckpt_path} is finished: {iteration} iterations; to go on, raise max_iters, or epochs if given')
    raise SystemExit
if rank == 0:
    names = 'iter,loss,lr,grad_norm,images_per_s' + ''.join(f',heldout_{k}' for k in range(K))
    with explain(f'cannot write to {out_dir}, or another run does'):
        os.makedirs(out_dir, exist_ok=True)
        lock = open(f'{out_dir}/.lock', 'w')
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log_file = open(f'{out_dir}/log.csv', 'w', buffering=1)
        log_file.writelines(row + '\n' for row in [names, *log])
    print(f'{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {K} scales of {size} x {size} and coarser, '
          f'{data.n_train} images, {max_iters} iterations of {batch_size}, {world} process(es) on {device}, {dtype}')
if compile:
    for block in model.blocks:
        block.compile(dynamic=False)
net = model if world == 1 else DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
terminated = []             # by SIGTERM, as when a job is preempted: save at the next log step, and end
signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
logged, clock = iteration, time.time()

while iteration < max_iters:
    optimizer.param_groups[0]['lr'] = lr = learning_rate_at(iteration)
    index = training_order(iteration * batch_size, batch_size, data.n_train, seed)
    inputs, total = random_inputs(batch_size, 0, iteration), 0.0
    for micro in range(gradient_accumulation_steps):
        net.require_backward_grad_sync = micro == gradient_accumulation_steps - 1      # DDP's
        loss = forward(net, index, inputs, slice(rank + world * micro, None, shares))[0] / gradient_accumulation_steps
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    iteration += 1
    if ema is not None:
        decay = min(ema_decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - decay)

    evaluating = iteration % eval_interval == 0 or iteration == max_iters
    if not evaluating and iteration % log_interval:
        continue
    report = torch.stack([total, torch.full_like(total, len(terminated))])
    if world > 1:
        dist.all_reduce(report)
    loss, stop = (report / world).tolist()      # all processes stop at the same iteration
    # (inf or NaN once, it leaves weights that make it so again: one look in log_interval is enough)
    check(norm.isfinite(), f'the gradient is not finite at or before iteration {iteration}; {ckpt_path} is untouched: '
          'try a lower learning_rate, more warmup_iters or dtype=float32')
    rate = (iteration - logged) * batch_size / (time.time() - clock)
    if rank == 0:
        print(f'iter {iteration}/{max_iters}: loss {loss:.4f}, {rate:.1f} images/s, '
              f'{(max_iters - iteration) * batch_size / rate / 60:.0f} minutes left')
        heldout = evaluate() if evaluating else []
        with explain(f'cannot write to {out_dir}; {ckpt_path}, if there, is whole'):
            row = [iteration, loss, lr, norm.item(), rate, *heldout]
            log.append(','.join(f'{number:.10g}' for number in row) + ',' * (K - len(heldout)))
            log_file.write(log[-1] + '\n')
            if evaluating or stop:      # in one step: whoever looks finds the old checkpoint or the new one, whole
                torch.save(dict(model=model.state_dict(), ema=ema and ema.state_dict(), log=log,
                                optimizer=optimizer.state_dict(), iter_num=iteration, config=config,
                                model_args=asdict(model_config), data=data.meta), f'{ckpt_path}.tmp')
                os.replace(f'{ckpt_path}.tmp', ckpt_path)
                print(f'{ckpt_path} holds iteration {iteration}, held-out errors {heldout}')
    if stop:
        break       # the same command goes on
    logged, clock = iteration, time.time()

if world > 1:
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)     # gloo's threads outlive the line above under DDP, and 1 of 24 ordinary ends was an abort
