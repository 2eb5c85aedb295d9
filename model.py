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
# Alg. 1: paths, velocities and the loss

POWERS = {'linear': 1, 'quadratic': 2, 'cubic': 3}      # the noise decays as (1 - t)^power


def alpha(t, start, kind='linear'):
    """Eq. (4a), Eq. (13): the coefficient of the data of a scale that starts at time `start`.

    Returns the coefficient and its derivative in t, both of the shape of t.
    """
    rate = 1 / (1 - start)
    ramp = (t - start) * rate
    if kind == 'gvp':
        half_pi = math.pi / 2
        return torch.sin(half_pi * ramp), half_pi * rate * torch.cos(half_pi * ramp)
    return ramp, torch.full_like(t, rate)


def sigma(t, kind='linear'):
    """Eq. (4b), Eq. (13), Appendix D: the coefficient of the noise, and its derivative in t."""
    if kind == 'gvp':
        half_pi = math.pi / 2
        return torch.cos(half_pi * t), -half_pi * torch.sin(half_pi * t)
    p = POWERS[kind]
    return (1 - t) ** p, -p * (1 - t) ** (p - 1)


def state_and_velocity(x1, x0, t, start, kind='linear'):
    """Eq. (3) and Eq. (5): the noisy state x_t of one scale, and its velocity u_t = d x_t / dt.

    x1 is data and x0 noise, both (B, C, H, W); t is (B,), from `start` to 1.
    """
    t = t.view(-1, 1, 1, 1)
    alpha_t, d_alpha = alpha(t, start, kind)
    sigma_t, d_sigma = sigma(t, kind)
    x_t = alpha_t * x1 + sigma_t * x0
    u_t = d_alpha * x1 + d_sigma * x0
    return x_t, u_t


def packed_stages(B, K, device='cpu'):
    """The stages of a packed batch, (B,): in order, equally many images in each stage."""
    return torch.arange(B, device=device) * K // B


def stage_times(stage, uniform, config):
    """Alg. 1, line 6: t ~ U[T_{s+1}, 1] from stages s and draws from U[0, 1], all (B,)."""
    in_stage = [start + (1 - start) * uniform for start in config.times[1:]]
    return torch.stack(in_stage).gather(0, stage[None])[0]


def states_and_velocities(x1, x0, t, stage, config):
    """Alg. 1, lines 5, 7 and 8: the noisy states and target velocities of a batch.

    x1 is data and x0 noise, both (B, C, H, W); t is (B,); stage is (B,), in order. Returns two
    dicts {k: (B_k, C, H/2^k, W/2^k)} of the scales that have images.
    """
    data = laplacian_pyramid(x1, config.K)
    noise = laplacian_pyramid(x0, config.K)
    x_t, u_t = {}, {}
    for k in range(config.K):
        B = int((stage <= k).sum())
        if B > 0:
            start = config.times[k + 1]
            x_t[k], u_t[k] = state_and_velocity(
                data[k][:B], noise[k][:B], t[:B], start, config.path)
    return x_t, u_t


def multiscale_loss(v, u, weights, B):
    """Eq. (7) for a batch of B images, with velocities v and targets u.

    weights[k] is w_k: a number, or (B_k,) for weights per image. Scale k counts B_k / B, as in
    Alg. 1. Returns the loss, and each image's mean squared error, {k: (B_k,)}.
    """
    total = 0.0
    errors = {}
    for k in u:
        errors[k] = (v[k] - u[k]).square().flatten(1).mean(1)
        total = total + (weights[k] * errors[k]).sum()
    return total / B, errors


def hand_over(state, k, x0, config):
    """Alg. 2, lines 4 and 5: scale k joins the coarser ones in the ODE's state, a dict.

    It joins as Eq. (3) at its start, where alpha is 0: sigma times its band x0[k] of the noise.
    """
    start = torch.tensor(config.times[k + 1])
    sigma_start, _ = sigma(start, config.path)
    return {k: sigma_start * x0[k], **state}


# -------------------------------------------------------------------------------------------------
# The network: a DiT whose blocks are mixtures of transformers, one expert per scale


@dataclass
class LapFlowConfig:
    """All that rebuilds a model. Settings that make no model raise ValueError with a sentence."""
    size: int = 32          # H = W of the finest grid: pixels, or latents of a VAE
    channels: int = 4
    patch: int = 2
    width: int = 1024       # DiT B, L, XL: width 768, 1024, 1152; depth 12, 24, 28; heads 12, 16, 16
    depth: int = 24
    heads: int = 16
    T: tuple = (0.5,)       # K = len(T) + 1 scales; () is flow matching; Eq. (10) recommends thirds
    n_classes: int = 0      # 0 is unconditional
    mask: str = 'causal'    # which scales a scale sees: see ATTENTION
    shared: str = ''        # parts of a block that all scales share, with commas: see MoTBlock
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
        if list(self.times) != sorted(set(self.times), reverse=True):
            raise ValueError(f'T must decrease inside (0, 1), not {self.T}')
        if self.size % cell:
            raise ValueError(f'a grid of {self.size} does not divide by 2^(K-1) x patch = {cell}')
        if self.width % math.lcm(4, self.heads):
            raise ValueError(f'width must divide by 4 and by heads, not {self.width}')
        if self.mask not in ATTENTION:
            raise ValueError(f'mask must be one of {list(ATTENTION)}, not {self.mask!r}')
        if self.path not in ('gvp', *POWERS):
            raise ValueError(f'path must be gvp or one of {list(POWERS)}, not {self.path!r}')
        if not set(self.shared.split(',')) <= {'', 'qkv', 'proj', 'ffn', 'mod'}:
            raise ValueError(f'shared takes any of qkv,proj,ffn,mod, not {self.shared!r}')


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


# Attention among the tokens of all scales. q, k and v are dicts {scale: (B_k, heads, N_k, d)}.


def block_causal_attention(q, k, v):
    """Eq. (9): a scale attends to itself and to the coarser scales.

    The mask M_c is never built: what it would hide is not computed.
    """
    out = {}
    for scale in q:
        B = len(q[scale])       # its images, which have all the coarser scales, too
        seen = [other for other in q if other >= scale]
        keys = torch.cat([k[other][:B] for other in seen], dim=2)
        values = torch.cat([v[other][:B] for other in seen], dim=2)
        out[scale] = F.scaled_dot_product_attention(q[scale], keys, values)
    return out


def self_attention(q, k, v):
    """Mask 'self': a scale attends to itself alone."""
    out = {}
    for scale in q:
        out[scale] = F.scaled_dot_product_attention(q[scale], k[scale], v[scale])
    return out


def full_attention(q, k, v):
    """Mask 'none': a scale attends to all scales of its image, which are those from its stage on.

    So the images are taken stage by stage.
    """
    parts = {scale: [] for scale in q}
    first = 0
    for stage in q:
        images = slice(first, len(q[stage]))
        first = len(q[stage])
        if images.start == images.stop:
            continue
        seen = [scale for scale in q if scale >= stage]
        keys = torch.cat([k[scale][images] for scale in seen], dim=2)
        values = torch.cat([v[scale][images] for scale in seen], dim=2)
        for scale in seen:
            part = F.scaled_dot_product_attention(q[scale][images], keys, values)
            parts[scale].append(part)
    return {scale: torch.cat(parts[scale]) for scale in q}


ATTENTION = {'causal': block_causal_attention, 'self': self_attention, 'none': full_attention}


def feed_forward(D):
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU('tanh'), nn.Linear(4 * D, D))


def experts(K, shared, layer, *sizes):
    """A layer for each of the K scales; if shared, K times the same one."""
    if shared:
        return nn.ModuleList([layer(*sizes)] * K)
    return nn.ModuleList([layer(*sizes) for _ in range(K)])


class MoTBlock(nn.Module):
    """The MoT block (Sec. 4.4, Figure 2): all but the attention is each scale's own."""

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
        """z is {k: tokens (B_k, N_k, D)}, c the condition (B, D). Returns a dict like z."""
        q, k, v, modulation, out = {}, {}, {}, {}, {}
        for scale in z:     # PreAttnMod and Eq. (8)
            mod = self.mod[scale](c[:len(z[scale])])                            # (B_k, 6D)
            modulation[scale] = mod.unsqueeze(1).chunk(6, dim=-1)               # six (B_k, 1, D)
            shift_msa, scale_msa, _, _, _, _ = modulation[scale]
            h = self.qkv[scale](modulate(z[scale], shift_msa, scale_msa))       # (B_k, N_k, 3D)
            h = h.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q[scale], k[scale], v[scale] = h                    # three (B_k, heads, N_k, D/heads)
        attended = self.attention(q, k, v)
        for scale in z:     # PostAttnMod
            _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[scale]
            h = attended[scale].transpose(1, 2).flatten(2)                      # (B_k, N_k, D)
            x = z[scale] + gate_msa * self.proj[scale](h)
            out[scale] = x + gate_mlp * self.ffn[scale](modulate(x, shift_mlp, scale_mlp))
        return out


class PatchEmbed(nn.Module):
    """The tokens of scale k with their positions: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config, k):
        super().__init__()
        self.patch = config.patch
        self.linear = nn.Linear(config.channels * config.patch ** 2, config.width)
        n = config.size // (config.patch * 2 ** k)
        self.register_buffer('positions', position_table(n, k, config.width), persistent=False)

    def forward(self, x):
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)   # (B, N, C*p*p)
        return self.linear(patches.contiguous()) + self.positions


class FinalLayer(nn.Module):
    """adaLN and the linear decoder of one scale: (B, N, D) -> (B, C, H, W)."""

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        self.mod = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.channels * config.patch ** 2)

    def forward(self, z, c):
        shift, scale = self.mod(c).unsqueeze(1).chunk(2, dim=-1)
        patches = self.linear(modulate(z, shift, scale)).transpose(1, 2)        # (B, C*p*p, N)
        n = math.isqrt(patches.shape[2])
        return F.pixel_shuffle(patches.unflatten(2, (n, n)), self.patch)


def zero_init(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class LapFlow(nn.Module):
    """The model V_theta (Sec. 4.4, Figure 2), initialised as DiT: every block starts as identity."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False      # recompute activations: less memory, more compute
        D, K = config.width, config.K
        self.t_embed = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embed = None
        if config.n_classes:
            self.y_embed = nn.Embedding(config.n_classes + 1, D)        # the last: the null label
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

        x_t is {k: (B_k, C, H/2^k, W/2^k)}, finest first: a scale and all coarser ones, or one scale
        alone. t (B,) are times, and y (B,) labels, of the coarsest scale's images; n_classes, or
        y=None, is the null label. Returns a dict like x_t. Under the causal mask no coarse velocity
        depends on a finer state.
        """
        tokens, c = self.condition(t, y)
        z = {}
        for k, x in x_t.items():
            if self.config.image_tokens:    # show the image as far as it is known: Eq. (2)
                x = reconstruct([x_t[j][:len(x)] for j in x_t if j >= k])
            z[k] = self.patch_embed[k](x)                                       # (B_k, N_k, D)
        # The tokens of t and y stand with the coarsest scale, which every scale may see
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
