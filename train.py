"""Trains LapFlow (Alg. 1), in one process or many. Run the same command again to resume.

    python train.py config/digits.py
    torchrun --nproc_per_node=8 train.py config/celebahq256.py

Writes ckpt.pt, log.csv and samples.png to out_dir. All random numbers of an iteration depend on
(seed, iteration) alone. They are drawn for the whole batch, of which each of n parts (processes,
micro-batches) takes every n-th image: so n changes only rounding. CPUs and GPUs draw differently.
"""
import copy
import gc
import math
import os
import shutil
import signal
import time
import traceback
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import (all_sum, autocast_for, check, check_alike, configure, exit_on_error,
                          launch)
from data import Dataset, load_vae, training_order
from model import (LapFlow, LapFlowConfig, multiscale_loss, packed_stages, stage_times,
                   states_and_velocities)
from sample import check_solver, draw, load_checkpoint, save_grid

# -------------------------------------------------------------------------------------------------
# Settings, which config files and --key=value override
out_dir = 'out'
init_from = ''              # a checkpoint: a new run begins with its weights
eval_interval = 1000        # iterations between evaluations, each after a checkpoint
log_interval = 10
snapshot_interval = 0       # iterations between kept checkpoints, ckpt-N.pt; 0 is off
eval_images = 512           # in the errors of an evaluation
sample_images = 100         # in samples.png, ten to a row
# data
dataset = 'digits'          # a folder made by data.py, or its name in data/
batch_size = 128            # per iteration, over all processes and micro-batches
gradient_accumulation_steps = 1
# model: fields of LapFlowConfig, by their names
patch = 2
width = 768
depth = 12
heads = 12
T = (0.5,)
checkpoint_blocks = False   # activation checkpointing: less memory, more compute
# optimisation by AdamW
loss_weights = ()           # w_k of Eq. (7), finest scale first; () is 1 for each
label_drop = 0.1            # share of labels replaced by the null label, for guidance
max_iters = 10_000
learning_rate = 2e-4
warmup_iters = 0
min_lr = 1e-6               # where the cosine ends, at max_iters
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0             # 0 is off
ema_decay = 0.0             # 0 is off
# sampling, also the defaults of sample.py for the checkpoint
method = 'dopri5'
steps = 50
tol = 1e-5
cfg = 1.0
# system
seed = 0
device = 'auto'             # cuda, mps or cpu
dtype = 'auto'              # of autocast: bfloat16 if the hardware has it, or float32
compile = True              # torch.compile, block by block
config = configure(globals())
check(min(eval_interval, log_interval, eval_images, sample_images, max_iters, batch_size, steps,
          gradient_accumulation_steps, patch, width, depth, heads) > 0,
      'intervals, numbers of images, batch_size, steps and sizes must be at least 1')
check(max(beta1, beta2, ema_decay) < 1 and label_drop <= 1,
      'beta1, beta2 and ema_decay must be below 1, label_drop at most 1')
check(not compile or shutil.which(os.environ.get('CXX', 'c++')),
      'torch.compile needs a C++ compiler: install one, or give --compile=False')

# -------------------------------------------------------------------------------------------------
# Data, model, optimizer
device, rank, world = launch(device)
autocast, dtype = autocast_for(device, dtype)   # weights, optimizer and EMA are float32
# Despite its name it acts on CPUs, too, where flash attention is slow to train in bfloat16
torch.backends.cuda.enable_flash_sdp(device != 'cpu' or dtype != 'bfloat16')
data = Dataset(dataset)
size, channels = data.meta['size'], data.meta['channels']
n_classes = len(data.meta['classes'])
model_args = {key: config[key] for key in LapFlowConfig.__dataclass_fields__ if key in config}
with exit_on_error('these settings make no model', ValueError):
    model_config = LapFlowConfig(size, channels, n_classes=n_classes, **model_args)
K = model_config.K
loss_weights = loss_weights or (1.0,) * K
check(len(loss_weights) == K and sum(loss_weights) > 0,
      f'loss_weights must be {K} numbers, not all 0: {loss_weights}')
n_parts = world * gradient_accumulation_steps       # of a batch
check(batch_size % n_parts == 0 and batch_size >= K * n_parts,
      f'batch_size {batch_size} must split into {n_parts} parts of at least {K} images (scales)')
check_solver(model_config, method, tol, cfg, label_drop)

torch.manual_seed(seed)
model = LapFlow(model_config).to(device)
model.checkpoint_blocks = checkpoint_blocks
ckpt_path = f'{out_dir}/ckpt.pt'
if init_from and not os.path.exists(ckpt_path):
    saved = load_checkpoint(init_from)
    weights, own = saved['ema'] or saved['model'], model.state_dict()
    fits = {key: w for key, w in weights.items() if key in own and w.shape == own[key].shape}
    new = model.load_state_dict(fits, strict=False).missing_keys
    print(f'{len(fits)} weights are from {init_from}; these are new: {new or "none"}')
parameters = list(model.parameters())
optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(beta1, beta2),
                              weight_decay=weight_decay, fused=True)
ema = copy.deepcopy(model).requires_grad_(False) if ema_decay > 0 else None
iteration = 0
if os.path.exists(ckpt_path):
    saved = load_checkpoint(ckpt_path)
    there = asdict(LapFlowConfig(**saved['model_args'])) | saved['data']
    here = asdict(model_config) | data.meta
    differences = [f'{key} is {there[key]!r} there and {here[key]!r} here' for key in here
                   if key not in ('source', 'vae') and there.get(key, here[key]) != here[key]]
    check(not differences, f'{ckpt_path} is of other settings or data: {"; ".join(differences)}')
    check('optimizer' in saved, f'{ckpt_path} has only weights, to draw from')
    model.load_state_dict(saved['model'])
    optimizer.load_state_dict(saved['optimizer'])
    optimizer.param_groups[0].update(betas=(beta1, beta2), weight_decay=weight_decay)
    if ema is not None:
        ema.load_state_dict(saved['ema'] or saved['model'])
    iteration = saved['iter_num']
    print(f'resuming {ckpt_path} at {iteration} of {max_iters} iterations')
    del saved       # or its tensors stay in memory
check_alike((iteration, config, data.meta, data.n_train),
            'they need the same settings, and a dataset and an out_dir that all see')

if compile:
    for block in model.blocks:
        block.compile(dynamic=False)
net = model
if dist.is_initialized():
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)
if rank == 0:
    vae = load_vae(data.meta, device)
    with exit_on_error(f'cannot write to {out_dir}'):
        os.makedirs(out_dir, exist_ok=True)
        log_file = open(f'{out_dir}/log.csv', 'a' if iteration else 'w', buffering=1)
    if log_file.tell() == 0:
        columns = [f'{data.eval_name}_{k}' for k in range(K)]
        print('iter,loss,lr,grad_norm,images_per_s', *columns, sep=',', file=log_file)
print(f'{sum(p.numel() for p in parameters):,} parameters, {K} scales, the finest of {size}, '
      f'{data.n_train} images, {world} process(es) on {device}, {dtype}')


def learning_rate_at(iteration):
    """Linear warm-up, then a cosine from learning_rate to min_lr at max_iters."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    progress = (iteration - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def random_draws(n, *key):
    """Alg. 1, lines 5 and 6: all that is random about n images, a function of (seed, *key).

    The key is (0, iteration) in training, and (1,) in evaluation.
    """
    number = int(np.random.SeedSequence((seed, *key)).generate_state(1)[0])
    generator = torch.Generator(device).manual_seed(number)
    noise = torch.randn(n, channels, size, size, generator=generator, device=device)
    uniform, drop = torch.rand(2, n, generator=generator, device=device)
    eps = torch.randn(noise.shape, generator=generator, device=device)  # for the VAE
    flip = np.random.default_rng((seed, *key)).random(n) < 0.5      # on the CPU
    return dict(noise=noise, uniform=uniform, drop=drop < label_drop, eps=eps, flip=flip)


def loss_of(net, index, draws, part):
    """Alg. 1, lines 5 to 10: the loss and the errors of one part (a slice) of a packed batch."""
    draws = {name: draws[name][part] for name in draws}
    x1, y = data.batch(index[part], device, draws['flip'], draws['eps'])
    if n_classes > 0:
        y = torch.where(draws['drop'], n_classes, y)
    stage = packed_stages(len(index), K)[part]      # on the CPU, so that no GPU is waited for
    t = stage_times(stage.to(device, non_blocking=True), draws['uniform'], model_config)
    x_t, u_t = states_and_velocities(x1, draws['noise'], t, stage, model_config)
    with autocast:
        v_t = net(x_t, t, y)
    return multiscale_loss(v_t, u_t, loss_weights, len(x1))


@torch.no_grad()
@torch.compiler.set_stance('force_eager')       # other batch sizes: no recompiling
def evaluate():
    """The error of each scale, always of the same images, noise and times. EMA if there is one.

    The processes share the images. Process 0 draws samples.png; if it cannot, training goes on.
    """
    index = data.eval_index[:eval_images]
    draws = random_draws(len(index), 1)
    parts = math.ceil(len(index) * n_parts / batch_size)    # no larger than in training
    sums = torch.zeros(2, K, device=device)     # of errors, of images
    for i in range(rank, parts, world):
        _, errors = loss_of(ema or model, index, draws, slice(i, None, parts))
        for k in errors:
            sums[0, k] += errors[k].sum()
            sums[1, k] += len(errors[k])
    if rank == 0:
        try:
            images, _ = draw(ema or model, vae, data.meta, seed, range(sample_images),
                             range(n_classes), autocast,
                             method=method, steps=steps, tol=tol, cfg=cfg)
            save_grid(f'{out_dir}/samples.png', images)
        except Exception:
            traceback.print_exc()
    all_sum(sums)
    errors = (sums[0] / sums[1]).tolist()
    print(f'{data.eval_name} errors, finest scale first: {errors}')
    return errors


def save(file):
    """Replaces the file in one step: whoever looks finds the old one or the new one, whole."""
    checkpoint = dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                      ema=ema and ema.state_dict(), iter_num=iteration, config=config,
                      model_args=asdict(model_config), data=data.meta)
    with exit_on_error(f'cannot write {file}; an older one is whole'):
        torch.save(checkpoint, f'{file}.tmp')
        os.replace(f'{file}.tmp', file)
    print(f'{file} holds iteration {iteration}')


stopping = False


def stop_soon(number, frame):
    """Ctrl-C, SIGTERM, a closed terminal: save and end at the next log step.

    A second Ctrl-C ends at once.
    """
    global stopping
    stopping = True
    signal.signal(signal.SIGINT, signal.default_int_handler)


signal.signal(signal.SIGINT, stop_soon)
signal.signal(signal.SIGTERM, stop_soon)
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:     # nohup
    signal.signal(signal.SIGHUP, stop_soon)

# -------------------------------------------------------------------------------------------------
# Training
logged, clock, stop = iteration, time.time(), False
skipped = torch.zeros((), device=device)    # since the last log step
in_a_row = torch.zeros((), device=device)   # skipped since the last update
while iteration < max_iters and not stop:
    lr = optimizer.param_groups[0]['lr'] = learning_rate_at(iteration)
    index = training_order(iteration * batch_size, batch_size, data.n_train, seed)
    draws = random_draws(batch_size, 0, iteration)
    total = 0.0
    for micro in range(gradient_accumulation_steps):
        net.require_backward_grad_sync = micro == gradient_accumulation_steps - 1   # DDP's
        part = slice(rank + world * micro, None, n_parts)
        loss, _ = loss_of(net, index, draws, part)
        loss = loss / gradient_accumulation_steps
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    # Fused AdamW skips its step where found_inf is 1, on the device: nobody waits for the GPU
    optimizer.found_inf = found_inf = 1 - norm.isfinite().float()
    optimizer.step()
    optimizer.zero_grad()
    skipped = skipped + found_inf
    in_a_row = (in_a_row + 1) * found_inf
    iteration += 1
    if ema is not None:
        decay = min(ema_decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - decay)

    # The step is done. At some iterations it is reported and saved
    if snapshot_interval and iteration % snapshot_interval == 0 and rank == 0:
        save(f'{out_dir}/ckpt-{iteration}.pt')
    evaluating = iteration % eval_interval == 0 or iteration == max_iters
    if not evaluating and iteration % log_interval != 0:
        continue
    # A signal to one process is shared, so that all stop at the same iteration
    report = torch.stack([total, torch.full_like(total, stopping)])
    loss, stop = (all_sum(report) / world).tolist()
    rate = (iteration - logged) * batch_size / (time.time() - clock)
    if skipped > 0:
        print(f'skipped {skipped:.0f} updates, because their gradients are not finite')
    check(in_a_row < 20, f'{in_a_row:.0f} gradients in a row are not finite: is the data bad? '
          'Or try a lower learning_rate, more warmup_iters or dtype=float32')
    if rank == 0 and (evaluating or stop):      # save before what may fail
        # Diverged weights must not replace good ones, but one bad gradient at the end may be chance
        last_chance = (stop or iteration == max_iters) and in_a_row == 1
        if math.isfinite(loss) or last_chance:
            save(ckpt_path)
        else:
            print(f'the loss is not finite: {ckpt_path} is not written')
    errors = evaluate() if evaluating else [''] * K
    print(f'iter {iteration}/{max_iters}: loss {loss:.4f}, {rate:.1f} images/s, '
          f'{(max_iters - iteration) * batch_size / rate / 60:.0f} minutes left')
    if rank == 0:
        with exit_on_error(f'cannot write to {out_dir}'):
            print(iteration, loss, lr, norm.item(), rate, *errors, sep=',', file=log_file)
    logged, clock = iteration, time.time()
    skipped.zero_()

if dist.is_initialized():
    del net         # first, or gloo's threads may outlive the process group
    gc.collect()
    dist.destroy_process_group()
