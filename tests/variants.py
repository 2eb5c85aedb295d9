"""Variants of LapFlow: the paper's ablations, its baselines, and how to write another.

    python tests/variants.py mask=none train.py config/digits.py --out_dir=out-none
    python tests/variants.py mask=none sample.py --ckpt out-none/ckpt.pt
    python tests/variants.py schedule=gvp,shared=ffn+mod train.py config/digits.py --out_dir=out-gvp
    torchrun --nproc_per_node=8 tests/variants.py flow=edify train.py config/celebahq256.py ...

    mask            none, self: Table 2c
    schedule        gvp, quadratic, cubic: Table 2f and Appendix D
    shared          qkv, proj, ffn or mod, or some, as ffn+mod: layers that all scales share
    image_tokens    True: a scale sees the image so far. Not the paper's
    flow            pyramidal (with shared=qkv+proj+ffn+mod) and edify: the baselines of Table 1

The first word is the variant, the rest a script with its arguments. `apply` puts functions and
classes in place of those in module model. Nothing else has to change, because train.py and
sample.py take pyramid, paths, stages, loss, network and `join` from model. A checkpoint records its
variant. LapFlow's own scripts refuse it, and so does this one under another variant.

To write another mask or sigma: a function and its entry in ATTENTION or SIGMA. Another key, such as
up=bilinear, also needs an entry in VALUES and a line in `apply`. (With another Up the scales of the
noise are no longer independent, so that `join` only approximates the states of training.)

- In your functions write model.up, because an imported `up` would stay LapFlow's.
- But if your function calls the one that it replaces, import that one by name, or yours calls
  itself: from model import up as nearest_up.
- If two keys replace the same name, let check_variant refuse the pair, as for flow.
- In a packed batch only the first B_k images have scale k, so that a coarse scale has more images
  than a finer one: full_attention shows what that means for a mask.
"""
import math
import os
import runpy
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model  # noqa: E402
from configurator import check  # noqa: E402
from model import LapFlow, LapFlowConfig, MoTBlock  # noqa: E402

# -------------------------------------------------------------------------------------------------
# A config with one field more


def options(variant):
    """'mask=none,schedule=gvp' -> {'mask': 'none', 'schedule': 'gvp'}."""
    pairs = [option.split('=') for option in variant.split(',')]
    return dict(pairs)


@dataclass
class VariantConfig(LapFlowConfig):
    """LapFlow's, and which variant it is of. LapFlow's own checkpoints have no such field."""
    variant: str = ''
    applied = ''        # not a field: what `apply` has put in place

    def __post_init__(self):
        super().__post_init__()
        check(self.variant == self.applied,
              f'the checkpoint is of variant {self.variant!r}, not {self.applied!r}')


# -------------------------------------------------------------------------------------------------
# mask: other attention (Table 2c)


def self_attention(queries, keys, values):
    """A scale attends to itself alone; the tokens of t and y stand with the coarsest."""
    return {k: F.scaled_dot_product_attention(q, keys[k], values[k]) for k, q in queries.items()}


def full_attention(queries, keys, values):
    """A scale attends to all scales that its image has: those from its stage s on."""
    parts = {k: [] for k in queries}
    first = 0
    for s in queries:
        last = len(queries[s])
        images = slice(first, last)     # those of stage s
        if last > first:
            scales = [k for k in queries if k >= s]
            keys_s = torch.cat([keys[k][images] for k in scales], dim=2)
            values_s = torch.cat([values[k][images] for k in scales], dim=2)
            for k in scales:
                part = F.scaled_dot_product_attention(queries[k][images], keys_s, values_s)
                parts[k].append(part)
        first = last
    return {k: torch.cat(parts[k]) for k in queries}


ATTENTION = dict(self=self_attention, none=full_attention)

# -------------------------------------------------------------------------------------------------
# schedule: other alpha and sigma (Table 2f, Appendix D)

HALF_PI = math.pi / 2


def gvp_alpha(t, start):
    """Eq. (4b): the data comes along a quarter of a circle."""
    rate = 1 / (1 - start)
    ramp = (t - start) * rate
    return torch.sin(HALF_PI * ramp), HALF_PI * rate * torch.cos(HALF_PI * ramp)


def gvp_sigma(t):
    """Eq. (4b): the noise goes along a quarter of a circle."""
    return torch.cos(HALF_PI * t), -HALF_PI * torch.sin(HALF_PI * t)


def quadratic_sigma(t):
    """Appendix D: the noise decays as (1 - t)^2."""
    return (1 - t) ** 2, -2 * (1 - t)


def cubic_sigma(t):
    """Appendix D: the noise decays as (1 - t)^3."""
    return (1 - t) ** 3, -3 * (1 - t) ** 2


SIGMA = dict(gvp=gvp_sigma, quadratic=quadratic_sigma, cubic=cubic_sigma)

# -------------------------------------------------------------------------------------------------
# shared: a block whose scales share layers


class SharingBlock(MoTBlock):
    """MoTBlock with one layer for all scales where config.variant says so."""

    def __init__(self, config):
        super().__init__(config)
        for name in options(config.variant)['shared'].split('+'):
            layer = getattr(self, name)[0]
            setattr(self, name, nn.ModuleList([layer] * config.K))      # the same one, K times


# -------------------------------------------------------------------------------------------------
# image_tokens: other inputs


class ImageTokens(LapFlow):
    """A scale sees the image as far as it is known: its state and the coarser ones, by Eq. (2)."""

    def forward(self, x_t, t, y=None):
        images = {}
        for k, x in x_t.items():
            images[k] = model.reconstruct([x_t[j][:len(x)] for j in x_t if j >= k])
        return super().forward(images, t, y)


# -------------------------------------------------------------------------------------------------
# flow: the baselines of Table 1. An image has one scale: scale k holds the images of stage k


class OneScale(LapFlow):
    """The network for groups of images, one scale a group, each with its slice of t and y."""

    def forward(self, x_t, t, y=None):
        """x_t is {k: (n_k, C, H/2^k, W/2^k)}; t and y are (sum of n_k,), in the order of x_t."""
        v, first = {}, 0
        for k, x in x_t.items():
            group = slice(first, first + len(x))
            v |= super().forward({k: x}, t[group], None if y is None else y[group])
            first += len(x)
        return v


def pyramidal_flow(x1, x0, t, k, config):
    """Pyramidal Flow, Alg. 3, lines 9 to 13: state and velocity of images in stage k.

    That is a straight line from a start point at s_k = T_{k+1} to an end point at e_k = T_k. x1 is
    data and x0 noise, (B, C, H, W); t is (B,). Both results are (B, C, H/2^k, W/2^k).
    """
    e, s = config.times[k], config.times[k + 1]
    data, noise = F.avg_pool2d(x1, 2 ** k), F.avg_pool2d(x0, 2 ** k)
    x_s = (s * model.up(model.down(data)) if s else 0) + (1 - s) * noise
    x_e = e * data + (1 - e) * noise
    u = (x_e - x_s) / (e - s)
    return x_s + (t - s).view(-1, 1, 1, 1) * u, u


def edify_flow(x1, x0, t, k, config):
    """EdifyImage, Alg. 5, Eq. (14), Eq. (15): LapFlow's scales >= k, put together by Eq. (2)."""
    data, noise = model.laplacian_pyramid(x1, config.K), model.laplacian_pyramid(x0, config.K)
    states, velocities = [], []
    for j in range(k, config.K):
        start = config.times[j + 1]
        state, velocity = model.state_and_velocity(data[j], noise[j], t, start)
        states.append(state)
        velocities.append(velocity)
    return model.reconstruct(states), model.reconstruct(velocities)


FLOWS = dict(pyramidal=pyramidal_flow, edify=edify_flow)


def states_and_velocities(x1, x0, t, stage, config):
    """As LapFlow's, but scale k has the images of stage k alone."""
    flow = FLOWS[options(config.variant)['flow']]
    x_t, u_t = {}, {}
    for k in range(config.K):
        images = stage == k
        if images.any():
            x_t[k], u_t[k] = flow(x1[images], x0[images], t[images], k, config)
    return x_t, u_t


def pyramidal_times(stage, uniform, config):
    """Alg. 3, line 7: t ~ U[T_{s+1}, T_s], a stage as far as it is sampled."""
    t = uniform
    for s in range(config.K):
        start, end = config.times[s + 1], config.times[s]
        t = torch.where(stage == s, start + (end - start) * uniform, t)
    return t


def join(state, k, x0, config):
    """Alg. 4, lines 7 and 8, and Alg. 6, lines 4 and 6, alike in law.

    The ODE goes on with scale k alone, from the renoised image Up(x) + sigma_{T_{k+1}} x_0^(k).
    """
    sigma_start, _ = model.sigma(torch.tensor(config.times[k + 1]))
    x = sigma_start * x0[k]
    if state:
        x = x + model.up(state[k + 1])
    return {k: x}


# -------------------------------------------------------------------------------------------------
# The variant in place of LapFlow

VALUES = dict(mask=ATTENTION, schedule=SIGMA, shared=('qkv', 'proj', 'ffn', 'mod'),
              image_tokens=('True',), flow=FLOWS)


def check_variant(variant):
    """Ends the script with one sentence if there is no such variant."""
    for option in variant.split(','):
        key, _, values = option.partition('=')
        check(key in VALUES, f'{option!r} is no variant: give KEY=VALUE, one of {list(VALUES)}')
        for value in values.split('+') if key == 'shared' else [values]:
            check(value in VALUES[key], f'{key} is one of {list(VALUES[key])}, not {value!r}')
    chosen = options(variant)
    check(len(chosen) == len(variant.split(',')), f'{variant!r} says something twice')
    check('flow' not in chosen or not {'image_tokens', 'mask'} & set(chosen),
          'a flow has image tokens anyway, and one scale at a time, without a mask')
    check(chosen.get('flow') != 'pyramidal' or 'schedule' not in chosen,
          'pyramidal is a straight line, without a schedule')


def apply(variant):
    """Puts a variant in place in module model, as a fork would write it into model.py."""
    check_variant(variant)
    chosen = options(variant)
    VariantConfig.applied = variant
    model.LapFlowConfig = VariantConfig
    if 'mask' in chosen:
        model.block_causal_attention = ATTENTION[chosen['mask']]
    if 'schedule' in chosen:
        model.sigma = SIGMA[chosen['schedule']]
    if chosen.get('schedule') == 'gvp':
        model.alpha = gvp_alpha
    if 'shared' in chosen:
        model.MoTBlock = SharingBlock
    if 'image_tokens' in chosen:
        model.LapFlow = ImageTokens
    if 'flow' in chosen:
        model.LapFlow = OneScale
        model.states_and_velocities = states_and_velocities
        model.join = join
    if chosen.get('flow') == 'pyramidal':
        model.stage_times = pyramidal_times


@contextmanager
def in_place(variant):
    """A variant, '' for none, in place in module model, then what was there. Yields its field."""
    before, applied = dict(vars(model)), VariantConfig.applied
    try:
        if variant:
            apply(variant)
        yield dict(variant=variant) if variant else {}
    finally:
        vars(model).update(before)
        VariantConfig.applied = applied


if __name__ == '__main__':
    check(len(sys.argv) > 2, 'give a variant and a script, such as mask=none train.py')
    variant = ','.join(sorted(sys.argv[1].split(',')))
    apply(variant)
    sys.argv = sys.argv[2:]
    script = os.path.join(ROOT, sys.argv[0])
    sys.path.insert(0, os.path.dirname(script))     # where Python looks first when it runs it
    # The script finds `variant` among its variables: so it is a setting, as its model's fields are
    runpy.run_path(script, dict(variant=variant), run_name='__main__')
