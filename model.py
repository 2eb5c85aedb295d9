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


def alpha(t, start):
    """Eq. (4a), Eq. (13): the coefficient of the data of a scale from `start` on, and its slope."""
    slope = 1 / (1 - start)
    return (t - start) * slope, slope


def sigma(t):
    """Eq. (4a): the coefficient of the noise, the same for all scales, and its slope."""
    return 1 - t, -1


def state_and_velocity(x1, x0, t, start):
    """Eq. (3) and Eq. (5): the noisy state x_t of one scale, and its velocity u_t = d x_t / dt.

    x1 is data and x0 noise, both (B, C, H, W); t is (B,), from `start` to 1.
    """
    t = t.view(-1, 1, 1, 1)                     # (B, 1, 1, 1)
    alpha_t, d_alpha = alpha(t, start)
    sigma_t, d_sigma = sigma(t)
    x_t = alpha_t * x1 + sigma_t * x0
    u_t = d_alpha * x1 + d_sigma * x0
    return x_t, u_t


def packed_stages(B, K):
    """Alg. 1, line 6, but not by chance: B images in K stages of equal size, 0 0 1 1 2 2."""
    return torch.arange(B) * K // B


def stage_times(stage, uniform, config):
    """Alg. 1, line 6: t ~ U[T_{s+1}, 1] from stages s and draws from U[0, 1], all (B,)."""
    t = uniform
    for s, start in enumerate(config.times[1:]):
        # Not indexed by stage: a tensor of all starts would be copied to the GPU in each step
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
        # Images of stages 0 to k have scale k, and they come first
        n = int((stage <= k).sum())
        start = config.times[k + 1]
        if n > 0:
            x_t[k], u_t[k] = state_and_velocity(data[k][:n], noise[k][:n], t[:n], start)
    return x_t, u_t


def multiscale_loss(v, u, weights, B):
    """Eq. (7), averaged over all B images of a batch, and each image's errors, {k: (B_k,)}.

    An error is a mean over pixels and channels. v are velocities, u targets, and weights[k] is w_k.
    """
    errors = {k: (v[k] - u[k]).square().flatten(1).mean(1) for k in u}
    loss = sum((weights[k] * errors[k]).sum() for k in u) / B
    return loss, errors


def join(state, k, x0, config):
    """Alg. 2, lines 3 to 5: scale k joins the coarser ones, as Eq. (3) at its start: sigma x0."""
    sigma_start, _ = sigma(torch.tensor(config.times[k + 1]))
    return {k: sigma_start * x0[k], **state}


# -------------------------------------------------------------------------------------------------
# The network: a DiT whose blocks are mixtures of transformers, one expert per scale


@dataclass
class LapFlowConfig:
    """What rebuilds a model. Values that do not fit together raise ValueError."""
    size: int = 32          # H = W of the finest grid: pixels, or latents of a VAE
    channels: int = 4
    patch: int = 2
    width: int = 1024       # DiT-L; DiT-B has 768, 12, 12, and DiT-XL 1152, 28, 16
    depth: int = 24
    heads: int = 16
    T: tuple = (0.5,)       # () is flow matching; Eq. (10) recommends thirds for K = 3
    n_classes: int = 0      # 0 is unconditional

    @property
    def K(self):
        return len(self.T) + 1

    @property
    def times(self):
        """(T_0, ..., T_K): times[k] is T_k, scale k starts at times[k + 1]."""
        return (1.0, *self.T, 0.0)

    def __post_init__(self):
        cell = self.patch * 2 ** (self.K - 1)
        if list(self.times) != sorted(set(self.times), reverse=True):
            raise ValueError(f'T must decrease inside (0, 1), but it is {self.T}')
        if self.size % cell != 0:
            raise ValueError(f'size {self.size} must divide by 2^(K-1) x patch = {cell}')
        if self.width % math.lcm(4, self.heads) != 0:
            raise ValueError(f'width {self.width} must divide by 4 and by heads = {self.heads}')


def sinusoid(x, dim):
    """Sines and cosines of x, (N,), at dim/2 frequencies from 1 to almost 1/10000: (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
    angles = x[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def position_table(n, k, D):
    """Sine-cosine positions of the n x n tokens of scale k, (n*n, D).

    The unit is a token of the finest scale: a coarse token stands at the centre of the finer ones
    that it covers. A row is sin x, cos x, sin y, cos y, each D/4. For k = 0 this is DiT's table.
    """
    centres = (torch.arange(n) + 0.5) * 2 ** k - 0.5
    axis = sinusoid(centres, D // 2)
    return torch.cat([axis.repeat(n, 1), axis.repeat_interleave(n, 0)], dim=-1)


def modulate(x, shift, scale):
    """adaLN: layer norm without affine, then scale and shift. x (B, N, D), the others (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def block_causal_attention(queries, keys, values):
    """Eq. (9): scale k attends to itself and to the coarser scales.

    All three are {k: (B_k, heads, N_k, d)}. The mask M_c is never built: what it would hide is not
    computed.
    """
    out = {}
    for k, q in queries.items():
        B_k = len(q)        # packed: the first B_k images are those with scale k
        visible = [j for j in keys if j >= k]
        keys_k = torch.cat([keys[j][:B_k] for j in visible], dim=2)
        values_k = torch.cat([values[j][:B_k] for j in visible], dim=2)
        out[k] = F.scaled_dot_product_attention(q, keys_k, values_k)
    return out


def feed_forward(D):
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU('tanh'), nn.Linear(4 * D, D))


def experts(K, layer, *sizes):
    """A layer for each of the K scales."""
    return nn.ModuleList([layer(*sizes) for _ in range(K)])


class MoTBlock(nn.Module):
    """The MoT block (Sec. 4.4, Figure 2): all but the attention is each scale's own."""

    def __init__(self, config):
        super().__init__()
        D, K = config.width, config.K
        self.heads = config.heads
        self.mod = experts(K, nn.Linear, D, 6 * D)
        self.qkv = experts(K, nn.Linear, D, 3 * D)
        self.proj = experts(K, nn.Linear, D, D)
        self.ffn = experts(K, feed_forward, D)

    def forward(self, z, c):
        """z is {k: tokens (B_k, N_k, D)}, c the condition (B, D). Returns a dict like z.

        The first tokens of the coarsest scale are those of t and y.
        """
        queries, keys, values, modulation, out = {}, {}, {}, {}, {}
        for k in z:     # PreAttnMod and Eq. (8)
            mod = self.mod[k](c[:len(z[k])])    # of the images with scale k: (B_k, 6D)
            modulation[k] = mod.unsqueeze(1).chunk(6, dim=-1)           # six of (B_k, 1, D)
            shift_msa, scale_msa, _, _, _, _ = modulation[k]
            h = self.qkv[k](modulate(z[k], shift_msa, scale_msa))       # (B_k, N_k, 3D)
            h = h.unflatten(-1, (3, self.heads, -1))                    # (B_k, N_k, 3, heads, d)
            h = h.permute(2, 0, 3, 1, 4)                                # (3, B_k, heads, N_k, d)
            queries[k], keys[k], values[k] = h.unbind(0)
        attended = block_causal_attention(queries, keys, values)
        for k in z:     # PostAttnMod
            _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[k]
            h = attended[k].transpose(1, 2).flatten(2)                  # (B_k, N_k, D)
            x = z[k] + gate_msa * self.proj[k](h)
            out[k] = x + gate_mlp * self.ffn[k](modulate(x, shift_mlp, scale_mlp))
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
                nn.init.zeros_(mod.weight)
        for final in self.final:
            nn.init.zeros_(final.mod.weight)
            nn.init.zeros_(final.linear.weight)

    def condition(self, t, y):
        """From t and y, (B,): their tokens, (B, n, D), and the vector for adaLN, (B, D)."""
        tokens = [self.t_embed(sinusoid(1000 * t, 256))]
        if self.y_embed is not None:
            if y is None:
                y = torch.full_like(t, self.config.n_classes, dtype=torch.long)
            tokens.append(self.y_embed(y))
        return torch.stack(tokens, dim=1), F.silu(sum(tokens))

    def forward(self, x_t, t, y=None):
        """Eq. (6): the velocities of the active scales, a dict like x_t.

        x_t is {k: (B_k, C, H/2^k, W/2^k)}, finest first: a scale and all coarser ones. t and y are
        (B,), the times and labels of all images. The null label is n_classes, or y=None for all. No
        coarse velocity depends on a finer state.
        """
        tokens, c = self.condition(t, y)
        z = {k: self.patch_embed[k](x) for k, x in x_t.items()}         # (B_k, N_k, D)
        # The tokens of t and y stand with the coarsest scale, because all scales see it
        coarsest = max(z)
        z[coarsest] = torch.cat([tokens, z[coarsest]], dim=1)
        for block in self.blocks:
            if self.checkpoint_blocks:
                z = checkpoint(block, z, c, use_reentrant=False)
            else:
                z = block(z, c)
        z[coarsest] = z[coarsest][:, tokens.shape[1]:]
        return {k: self.final[k](z[k], c[:len(x)]).to(x.dtype) for k, x in x_t.items()}
