"""LapFlow, Laplacian Multi-scale Flow Matching (ICLR 2026): the paper's mathematics and network.

An image is split into a Laplacian pyramid. Each scale has its own path from noise to data; coarse
scales start early, fine ones late. One transformer learns the velocities of all scales together.

Conventions, the same in every file:
- Time: t = 0 is noise, t = 1 is data.
- Scales: k = 0 is the finest, K-1 the coarsest. A pyramid is a list of K tensors, finest first.
  States and velocities are dicts {k: tensor} of the active scales, finest first.
- T = (T_1, ..., T_{K-1}) decreases, T_0 = 1, T_K = 0. Scale k starts at T_{k+1} and ends, as data,
  at 1.
- Noise is one full-resolution white-noise image, split by the same pyramid. So a scale's noise is
  not of unit variance: its standard deviations are 0.87, 0.43 and 0.25 at K = 3.
- Training gives every image a stage. Stage s trains the scales k >= s at a time t ~ U[T_{s+1}, 1].
  A batch is packed: its images are ordered by stage, so those that have scale k are its first B_k,
  B_0 <= ... <= B_{K-1} = B. In sampling all B_k are equal.
- Shapes: B batch, C channels, H W grid, N tokens, D width.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -------------------------------------------------------------------------------------------------
# The Laplacian pyramid


def down(x):
    """Down: 2x2 average pooling, (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def up(x):
    """Up: nearest-neighbour upsampling, (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode='nearest')


def laplacian_pyramid(x, K):
    """Eq. (1) for any K: splits (B, C, H, W) into K scales; scale k is (B, C, H/2^k, W/2^k)."""
    pyramid = []
    for _ in range(K - 1):
        coarse = down(x)
        pyramid.append(x - up(coarse))
        x = coarse
    pyramid.append(x)
    return pyramid


def reconstruct(pyramid):
    """Eq. (2), the inverse of `laplacian_pyramid`: K scales, finest first -> (B, C, H, W)."""
    x = pyramid[-1]
    for residual in reversed(pyramid[:-1]):
        x = residual + up(x)
    return x


# -------------------------------------------------------------------------------------------------
# Paths, velocities and the loss of Alg. 1, and how a scale joins in Alg. 2

HALF_PI = math.pi / 2
POWERS = {'linear': 1, 'quadratic': 2, 'cubic': 3}      # noise decays as (1 - t)^power


def alpha(t, start, kind='linear'):
    """Eq. (4a), Eq. (4b), Eq. (13): the coefficient of the data of a scale that starts at `start`.

    Returns it and its derivative in t. All kinds but 'gvp' have the linear one.
    """
    rate = 1 / (1 - start)
    ramp = (t - start) * rate
    if kind == 'gvp':
        return torch.sin(HALF_PI * ramp), HALF_PI * rate * torch.cos(HALF_PI * ramp)
    return ramp, rate


def sigma(t, kind='linear'):
    """Eq. (4a), Eq. (4b), Appendix D: the coefficient of the noise, and its derivative in t."""
    if kind == 'gvp':
        return torch.cos(HALF_PI * t), -HALF_PI * torch.sin(HALF_PI * t)
    p = POWERS[kind]
    return (1 - t) ** p, -p * (1 - t) ** (p - 1)


def state_and_velocity(x1, x0, t, start, kind='linear'):
    """Eq. (3) and Eq. (5): the noisy state x_t of one scale, and its velocity u_t = d x_t / dt.

    x1 is data and x0 noise, both (B, C, H, W); t is (B,), from `start` to 1.
    """
    t = t.view(-1, 1, 1, 1)                     # (B, 1, 1, 1)
    alpha_t, d_alpha = alpha(t, start, kind)
    sigma_t, d_sigma = sigma(t, kind)
    x_t = alpha_t * x1 + sigma_t * x0
    u_t = d_alpha * x1 + d_sigma * x0
    return x_t, u_t


def packed_stages(B, K, device='cpu'):
    """Replaces the random stages of Alg. 1, line 6: all equally often, in order. 0 0 1 1 2 2."""
    return torch.arange(B, device=device) * K // B


def stage_times(stage, uniform, config):
    """Alg. 1, line 6: t ~ U[T_{s+1}, 1] from stages s and draws from U[0, 1], all (B,)."""
    t = uniform
    for s, start in enumerate(config.times[1:]):
        t = torch.where(stage == s, start + (1 - start) * uniform, t)
    return t


def states_and_velocities(x1, x0, t, stage, config):
    """Alg. 1, lines 5, 7 and 8: the noisy states and target velocities of a batch.

    x1 is data and x0 noise, both (B, C, H, W); t is (B,); stage is (B,), in order. Returns two
    dicts {k: (B_k, C, H/2^k, W/2^k)} of the scales that have images.
    """
    data = laplacian_pyramid(x1, config.K)
    noise = laplacian_pyramid(x0, config.K)
    x_t, u_t = {}, {}
    for k in range(config.K):
        n = int((stage <= k).sum())             # the stages up to k train scale k
        start = config.times[k + 1]
        if n > 0:
            x_t[k], u_t[k] = state_and_velocity(
                data[k][:n], noise[k][:n], t[:n], start, config.path)
    return x_t, u_t


def multiscale_loss(v, u, weights, B):
    """Eq. (7): summed over the scales, and averaged over all B images of a batch.

    v are velocities and u targets. weights[k] is w_k, a number, or (B_k,) for weights per image.
    Returns the loss, and each image's mean squared error, {k: (B_k,)}.
    """
    total = 0.0
    errors = {}
    for k in u:
        errors[k] = (v[k] - u[k]).square().flatten(1).mean(1)
        total = total + (weights[k] * errors[k]).sum()
    return total / B, errors


def hand_over(state, k, x0, config):
    """Alg. 2, lines 3 to 5: scale k joins the coarser ones. At its start Eq. (3) is sigma x0.

    state is {k: tensor} of the coarser scales, {} at first. x0 is the pyramid of the noise.
    """
    sigma_start, _ = sigma(torch.tensor(config.times[k + 1]), config.path)
    return {k: sigma_start * x0[k], **state}


# -------------------------------------------------------------------------------------------------
# The network: a DiT whose blocks are mixtures of transformers, one expert per scale


@dataclass
class LapFlowConfig:
    """All that rebuilds a model. Settings that do not fit together raise ValueError."""
    size: int = 32          # H = W of the finest grid: pixels, or latents of a VAE
    channels: int = 4
    patch: int = 2
    width: int = 1024       # this is DiT-L; DiT-B has 768, 12, 12, and DiT-XL 1152, 28, 16
    depth: int = 24
    heads: int = 16
    T: tuple = (0.5,)       # () is flow matching; Eq. (10) recommends thirds for K = 3
    n_classes: int = 0      # 0 is unconditional
    mask: str = 'causal'    # which scales a scale sees: see ATTENTION
    shared: str = ''        # what all scales share, with commas: see MoTBlock
    path: str = 'linear'    # 'linear', 'gvp', 'quadratic' or 'cubic'
    image_tokens: bool = False      # not the paper's: see LapFlow.forward

    @property
    def K(self):
        return len(self.T) + 1

    @property
    def times(self):
        """(T_0, ..., T_K): times[k] is T_k, scale k starts at times[k + 1]."""
        return (1.0, *self.T, 0.0)

    def __post_init__(self):
        cell = 2 ** (self.K - 1) * self.patch
        parts = {'qkv', 'proj', 'ffn', 'mod', ''}
        decreasing = list(self.times) == sorted(set(self.times), reverse=True)
        for key, holds, rule in (
                ('T', decreasing, 'must decrease inside (0, 1)'),
                ('size', self.size % cell == 0, f'must divide by 2^(K-1) x patch = {cell}'),
                ('width', self.width % math.lcm(4, self.heads) == 0, 'must divide by 4 and heads'),
                ('mask', self.mask in ATTENTION, f'must be one of {list(ATTENTION)}'),
                ('path', self.path in ('gvp', *POWERS), f'must be gvp or one of {list(POWERS)}'),
                ('shared', set(self.shared.split(',')) <= parts, 'takes qkv,proj,ffn,mod')):
            if not holds:
                raise ValueError(f'{key} {rule}, but it is {getattr(self, key)!r}')


def sinusoid(x, dim):
    """Sines and cosines of x, (N,), at dim/2 frequencies from 1 to almost 1/10000: (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
    angles = x[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def position_table(n, k, D):
    """Sine-cosine positions of the n x n tokens of scale k, (n*n, D).

    The unit is a token of the finest scale: a coarse token stands at the centre of the finer ones
    that it covers. For k = 0 this is DiT's table.
    """
    centres = (torch.arange(n) + 0.5) * 2 ** k - 0.5
    axis = sinusoid(centres, D // 2)
    return torch.cat([axis.repeat(n, 1), axis.repeat_interleave(n, 0)], dim=-1)


def modulate(x, shift, scale):
    """adaLN: layer norm without affine, then scale and shift. x (B, N, D), the others (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


# q, k, v: queries, keys and values, {scale: (B_i, heads, N_i, d)}. Here i and j are scales.


def block_causal_attention(q, k, v):
    """Eq. (9): scale i attends to itself and to the coarser scales.

    The mask M_c is never built: what it would hide is not computed.
    """
    out = {}
    for i in q:
        B = len(q[i])       # packed: the first B images are those with scale i
        keys = torch.cat([k[j][:B] for j in q if j >= i], dim=2)
        values = torch.cat([v[j][:B] for j in q if j >= i], dim=2)
        out[i] = F.scaled_dot_product_attention(q[i], keys, values)
    return out


def self_attention(q, k, v):
    """Mask 'self': a scale attends to itself alone."""
    return {i: F.scaled_dot_product_attention(q[i], k[i], v[i]) for i in q}


def full_attention(q, k, v):
    """Mask 'none': a scale attends to all scales that its image has: those from its stage s on."""
    parts = {i: [] for i in q}
    first = 0
    for s in q:
        last = len(q[s])
        images = slice(first, last)     # those of stage s
        if last > first:
            scales = [i for i in q if i >= s]
            keys = torch.cat([k[i][images] for i in scales], dim=2)
            values = torch.cat([v[i][images] for i in scales], dim=2)
            for i in scales:
                part = F.scaled_dot_product_attention(q[i][images], keys, values)
                parts[i].append(part)
        first = last
    return {i: torch.cat(parts[i]) for i in q}


ATTENTION = dict(causal=block_causal_attention, self=self_attention, none=full_attention)


def feed_forward(D):
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU('tanh'), nn.Linear(4 * D, D))


def experts(K, shared, layer, *sizes):
    """A layer for each of the K scales; if shared, K times the same one."""
    if shared:
        return nn.ModuleList([layer(*sizes)] * K)       # one layer, K names
    return nn.ModuleList([layer(*sizes) for _ in range(K)])


class MoTBlock(nn.Module):
    """The MoT block (Sec. 4.4, Figure 2): all but the attention is each scale's own.

    config.shared names what is not: any of qkv, proj, ffn and mod.
    """

    def __init__(self, config):
        super().__init__()
        D, K = config.width, config.K
        shared = config.shared.split(',')
        self.heads = config.heads
        self.attention = ATTENTION[config.mask]
        self.mod = experts(K, 'mod' in shared, nn.Linear, D, 6 * D)
        self.qkv = experts(K, 'qkv' in shared, nn.Linear, D, 3 * D)
        self.proj = experts(K, 'proj' in shared, nn.Linear, D, D)
        self.ffn = experts(K, 'ffn' in shared, feed_forward, D)

    def forward(self, z, c):
        """z is {i: tokens (B_i, N_i, D)}, c the condition (B, D). Returns a dict like z.

        The first tokens of the coarsest scale are those of t and y.
        """
        q, k, v, modulation, out = {}, {}, {}, {}, {}
        for i in z:     # PreAttnMod and Eq. (8)
            mod = self.mod[i](c[:len(z[i])])                            # (B_i, 6D)
            modulation[i] = mod.unsqueeze(1).chunk(6, dim=-1)           # six of (B_i, 1, D)
            shift_msa, scale_msa, _, _, _, _ = modulation[i]
            h = self.qkv[i](modulate(z[i], shift_msa, scale_msa))       # (B_i, N_i, 3D)
            h = h.unflatten(-1, (3, self.heads, -1))                    # (B_i, N_i, 3, heads, d)
            h = h.permute(2, 0, 3, 1, 4)
            q[i], k[i], v[i] = h                                        # (B_i, heads, N_i, d)
        attended = self.attention(q, k, v)
        for i in z:     # PostAttnMod
            _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[i]
            h = attended[i].transpose(1, 2).flatten(2)                  # (B_i, N_i, D)
            x = z[i] + gate_msa * self.proj[i](h)
            out[i] = x + gate_mlp * self.ffn[i](modulate(x, shift_mlp, scale_mlp))
        return out


class PatchEmbed(nn.Module):
    """The tokens of scale k with their positions: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config, k):
        super().__init__()
        self.patch = config.patch
        self.linear = nn.Linear(config.channels * config.patch ** 2, config.width)
        n = config.size // (config.patch * 2 ** k)
        positions = position_table(n, k, config.width)
        self.register_buffer('positions', positions, persistent=False)

    def forward(self, x):
        patches = F.pixel_unshuffle(x, self.patch).flatten(2)           # (B, C*p*p, N)
        return self.linear(patches.transpose(1, 2).contiguous()) + self.positions


class FinalLayer(nn.Module):
    """adaLN and the linear decoder of one scale: (B, N, D) -> (B, C, H, W)."""

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        self.mod = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.channels * config.patch ** 2)

    def forward(self, z, c):
        shift, scale = self.mod(c).unsqueeze(1).chunk(2, dim=-1)
        patches = self.linear(modulate(z, shift, scale)).transpose(1, 2)    # (B, C*p*p, N)
        n = math.isqrt(patches.shape[2])
        return F.pixel_shuffle(patches.unflatten(2, (n, n)), self.patch)


def zero_init(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class LapFlow(nn.Module):
    """The model V_theta (Sec. 4.4, Figure 2), initialised as DiT: a block starts as identity."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False      # True: less memory, more compute
        D, K = config.width, config.K
        self.t_embed = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embed = None
        if config.n_classes:
            self.y_embed = nn.Embedding(config.n_classes + 1, D)    # the last: the null label
        self.patch_embed = nn.ModuleList([PatchEmbed(config, k) for k in range(K)])
        self.blocks = nn.ModuleList([MoTBlock(config) for _ in range(config.depth)])
        self.final = nn.ModuleList([FinalLayer(config) for _ in range(K)])
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embed[0].weight, std=0.02)
        nn.init.normal_(self.t_embed[2].weight, std=0.02)
        if self.y_embed is not None:
            nn.init.normal_(self.y_embed.weight, std=0.02)
        for block in self.blocks:
            for mod in block.mod:
                zero_init(mod)
        for final in self.final:
            zero_init(final.mod)
            zero_init(final.linear)

    def condition(self, t, y):
        """From t and y, (B,): their tokens, (B, n, D), and the vector for adaLN, (B, D)."""
        tokens = [self.t_embed(sinusoid(1000 * t, 256))]
        if self.y_embed is not None:
            if y is None:
                y = torch.full_like(t, self.config.n_classes, dtype=torch.long)
            tokens.append(self.y_embed(y))
        return torch.stack(tokens, dim=1), F.silu(sum(tokens))

    def forward(self, x_t, t, y=None):
        """Eq. (6): the velocities of the active scales.

        x_t is {k: (B_k, C, H/2^k, W/2^k)}, finest first: a scale with all coarser ones (baselines
        give one alone). t (B,) are times, and y (B,) labels, of the coarsest scale's images. The
        null label is n_classes, or y=None. Returns a dict like x_t. Under the causal mask no coarse
        velocity depends on a finer state.
        """
        tokens, c = self.condition(t, y)
        z = {}
        for k, x in x_t.items():
            if self.config.image_tokens:    # the noisy image of this resolution: Eq. (2)
                x = reconstruct([x_t[j][:len(x)] for j in x_t if j >= k])
            z[k] = self.patch_embed[k](x)                               # (B_k, N_k, D)
        # The tokens of t and y stand with the coarsest scale: all see it, but under mask 'self'
        coarsest = max(z)
        z[coarsest] = torch.cat([tokens, z[coarsest]], dim=1)
        for block in self.blocks:
            if self.checkpoint_blocks:
                z = checkpoint(block, z, c, use_reentrant=False)
            else:
                z = block(z, c)
        z[coarsest] = z[coarsest][:, tokens.shape[1]:]
        v = {}
        for k, x in x_t.items():
            v[k] = self.final[k](z[k], c[:len(x)]).to(x.dtype)
        return v
