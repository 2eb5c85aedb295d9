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
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model  # noqa: E402
from configurator import check  # noqa: E402
from model import laplacian_pyramid, noisy_state, reconstruct, up, velocity  # noqa: E402

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
        """x_t: list of tensors, scale k (n_k, C, H/2^k, W/2^k) or None; t, y (sum of n_k,). Returns a list like x_t."""
        sizes = [0 if x is None else len(x) for x in x_t]
        parts = zip(x_t, t.split(sizes), [None] * len(x_t) if y is None else y.split(sizes))
        return [None if x is None else super(OneScale, self).forward([None] * k + [x], t_k, y_k)[k]
                for k, (x, t_k, y_k) in enumerate(parts)]


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
    scales = [*zip(laplacian_pyramid(x1, config.K), laplacian_pyramid(x0, config.K), config.times[1:])][k:]
    return [reconstruct([f(data, noise, t, start, config.path) for data, noise, start in scales])
            for f in (noisy_state, velocity)]


def states_and_targets(x1, x0, t, counts, config):
    """As LapFlow's, but scale k has the images of stage k alone, which are rows B_{k-1} to B_k - 1."""
    x_t, u = [], []
    for k, (first, last) in enumerate(zip([0, *counts], counts)):
        images = x1[first:last], x0[first:last], t[first:last], k
        state, target = pyramidal_flow(*images, config.times) if config.flow == 'pyramidal' else \
            edify_flow(*images, config)
        x_t.append(state)
        u.append(target)
    return x_t, u


def stage_times(stage, uniform, config):
    """As LapFlow's, but Pyramidal Flow trains a stage just as far as it is sampled, Alg. 3, line 7: U[T_{s+1}, T_s]."""
    t = lapflow_times(stage, uniform, config)
    for s in range(config.K if config.flow == 'pyramidal' else 0):
        start, end = config.times[s + 1], config.times[s]
        t = torch.where(stage == s, start + (end - start) * uniform, t)
    return t


def hand_over(state, joining):
    """
    Alg. 4, lines 7 and 8 with the covariance of Appendix F.2, and Alg. 6, lines 4 and 6, alike in law: the ODE goes on
    with scale k alone, from the renoised image Up(x) + sigma_{T_{k+1}} x_0^(k).
    """
    return (joining + up(state[0]) if state else joining,)


FLOWS = ('pyramidal', 'edify')
CHANGES = dict(LapFlow=OneScale, LapFlowConfig=FlowConfig, states_and_targets=states_and_targets,
               stage_times=stage_times, hand_over=hand_over)

if __name__ == '__main__':
    flow, script = (sys.argv + ['', ''])[1:3]
    check(flow in FLOWS and script, f'say which flow, {" or ".join(FLOWS)}, and what script, such as edify train.py')
    vars(model).update(CHANGES)
    sys.argv = sys.argv[2:]
    runpy.run_path(os.path.join(ROOT, script), init_globals=dict(flow=flow), run_name='__main__')
