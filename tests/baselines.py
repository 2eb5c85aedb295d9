"""
The baselines of the paper's Table 1, Pyramidal Flow and EdifyImage, as what a fork of this code looks like: a state and
a target, the times of a stage, a hand-over, and a network that works on one scale at a time, in place of LapFlow's.

    python tests/baselines.py edify train.py config/digits.py --out_dir=out-edify
    python tests/baselines.py pyramidal train.py config/digits.py --out_dir=out-pyramidal --shared=qkv,proj,ffn,mod
    python tests/baselines.py edify sample.py --ckpt out-edify/ckpt.pt
    torchrun --nproc_per_node=8 tests/baselines.py edify train.py config/celebahq256.py --out_dir=out-edify

The first word is the flow, the rest a script with its arguments. The checkpoints say which flow they are of, so that
LapFlow's own scripts refuse them. An image has one scale: scale k holds the B_k - B_{k-1} images of stage k.
"""
import os
import runpy
import sys
from dataclasses import dataclass, make_dataclass

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model  # noqa: E402
from configurator import check  # noqa: E402
from model import laplacian_pyramid, reconstruct, sigma, state_and_velocity, up  # noqa: E402

LapFlow, LapFlowConfig, lapflow_times = model.LapFlow, model.LapFlowConfig, model.stage_times


@dataclass
class FlowConfig(LapFlowConfig):
    """LapFlow's with one field more: 'pyramidal' (Alg. 3, 4) or 'edify' (Alg. 5, 6)."""
    flow: str = ''          # LapFlow's checkpoints name none: refused

    def __post_init__(self):
        super().__post_init__()
        if self.flow not in FLOWS:
            raise ValueError(f'flow must be one of {", ".join(FLOWS)}, but it is {self.flow!r}')
        if self.flow == 'pyramidal' and self.path != 'linear':
            raise ValueError(f'pyramidal is a straight line: its path must be linear, but it is {self.path!r}')


class OneScale(LapFlow):
    """The network for images of one scale each: groups of images, each with its slice of t and y."""

    def forward(self, x_t, t, y=None):
        """x_t: {k: (n_k, C, H/2^k, W/2^k)}; t, y: (sum of n_k,), in the order of x_t. Returns a dict like x_t."""
        v, first = {}, 0
        for k, x in x_t.items():
            group = slice(first, first + len(x))
            v |= super().forward({k: x}, t[group], None if y is None else y[group])
            first += len(x)
        return v


def pyramidal_flow(x1, x0, t, k, times):
    """
    Pyramidal Flow (Appendix F, Alg. 3, lines 9 to 13): state and velocity of stage k, a straight line from a start
    point at s_k = T_{k+1} to an end point at e_k = T_k. x1 data and x0 noise are full images, (B, C, H, W), t is (B,);
    both results are (B, C, H/2^k, W/2^k).
    """
    e, s = times[k], times[k + 1]
    data, noise = F.avg_pool2d(x1, 2 ** k), F.avg_pool2d(x0, 2 ** k)
    x_s = (s * up(model.down(data)) if s else 0) + (1 - s) * noise
    x_e = e * data + (1 - e) * noise
    u = (x_e - x_s) / (e - s)
    return x_s + (t - s).view(-1, 1, 1, 1) * u, u


def edify_flow(x1, x0, t, k, config):
    """
    EdifyImage (Appendix E, Alg. 5, Eq. (14), Eq. (15)): state and velocity of scale k are those of LapFlow's scales
    >= k put together by Eq. (2): the mean mu^(k) is the sum over j >= k of alpha^(j) Up^(j-k)(x_1^(j)). Same shapes.
    """
    data, noise = laplacian_pyramid(x1, config.K), laplacian_pyramid(x0, config.K)
    states, velocities = [], []
    for j in range(k, config.K):
        state, velocity = state_and_velocity(data[j], noise[j], t, config.times[j + 1], config.path)
        states.append(state)
        velocities.append(velocity)
    return reconstruct(states), reconstruct(velocities)


def states_and_velocities(x1, x0, t, stage, config):
    """As LapFlow's, but scale k has the images of stage k alone."""
    x_t, u_t = {}, {}
    for k in range(config.K):
        images = stage == k
        if images.any():
            if config.flow == 'pyramidal':
                x_t[k], u_t[k] = pyramidal_flow(x1[images], x0[images], t[images], k, config.times)
            else:
                x_t[k], u_t[k] = edify_flow(x1[images], x0[images], t[images], k, config)
    return x_t, u_t


def stage_times(stage, uniform, config):
    """As LapFlow's, but Pyramidal Flow trains a stage just as far as it is sampled, Alg. 3, line 7: U[T_{s+1}, T_s]."""
    if config.flow == 'edify':
        return lapflow_times(stage, uniform, config)
    t = uniform
    for s in range(config.K):
        start, end = config.times[s + 1], config.times[s]
        t = torch.where(stage == s, start + (end - start) * uniform, t)
    return t


def hand_over(state, k, x0, config):
    """
    Alg. 4, lines 7 and 8 with the covariance of Appendix F.2, and Alg. 6, lines 4 and 6, alike in law: the ODE goes on
    with scale k alone, from the renoised image Up(x) + sigma_{T_{k+1}} x_0^(k).
    """
    sigma_start, _ = sigma(torch.tensor(config.times[k + 1]), config.path)
    x = sigma_start * x0[k]
    if state:
        x = x + up(state[k + 1])
    return {k: x}


FLOWS = ('pyramidal', 'edify')

if __name__ == '__main__':
    flow, script = (sys.argv + ['', ''])[1:3]
    check(flow in FLOWS and script, f'say which flow, {" or ".join(FLOWS)}, and what script, such as edify train.py')
    # What a fork would write into model.py itself
    model.LapFlow = OneScale
    model.LapFlowConfig = make_dataclass('Named', [('flow', str, flow)], bases=(FlowConfig,)) \
        if script == 'train.py' else FlowConfig
    model.states_and_velocities = states_and_velocities
    model.stage_times = stage_times
    model.hand_over = hand_over
    sys.argv = sys.argv[2:]
    runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
