"""LapFlow, Laplacian Multi-scale Flow Matching (ICLR 2026): the paper's mathematics and its network, in one file.

An image is split into a Laplacian pyramid. Each scale has its own path from noise to data, the coarse ones start early
and the fine ones late, and one transformer learns the velocities of all scales together.

Conventions, the same in every file:
- Time: t = 0 is noise, t = 1 is data.
- Scales: k = 0 is the finest, K-1 the coarsest. Lists of scales are finest first, None where a scale is not active.
- T = (T_1, ..., T_{K-1}), decreasing, with T_0 = 1 and T_K = 0. Scale k starts at T_{k+1} and ends, as data, at 1.
- Noise is one full-resolution white-noise image, split by the same pyramid. In the `reconstruct` of all scales' states
  it is there whole, times sigma_t.
- Training gives every image a stage. Stage s trains the scales k >= s at t ~ U[T_{s+1}, 1]. A batch is packed: its
  images are ordered by stage and scale k holds the first B_k of them, those with stage <= k, so that
  B_0 <= ... <= B_{K-1} = B. In sampling all B_k are equal.
- Shapes: B batch, C channels, H W grid, N tokens, D width."""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- The Laplacian pyramid -------------------------------------------------------------------------------------------


def down(x):
    """Down: 2x2 average pooling, (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def up(x):
    """Up: nearest-neighbour upsampling, (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode='nearest')


def laplacian_pyramid(x, K):
    """Eq. (1) for any K: (B, C, H, W) -> K tensors, scale k of shape (B, C, H/2^k, W/2^k), finest first."""
    pyramid = []
    for _ in range(K - 1):
        coarse = down(x)
        pyramid.append(x - up(coarse))
        x = coarse
    return pyramid + [x]


def reconstruct(pyramid):
    """Eq. (2), the inverse of `laplacian_pyramid`: K tensors, finest first -> (B, C, H, W)."""
    x = pyramid[-1]
    for residual in reversed(pyramid[:-1]):
        x = residual + up(x)
    return x


# ---- Paths, velocities and the loss ----------------------------------------------------------------------------------


POWERS = {'linear': 1, 'quadratic': 2, 'cubic': 3}      # of 1 - t, by which the noise decays


def path(t, start, kind='linear'):
    """Eq. (4a), Eq. (4b), Eq. (13) and Appendix D: alpha, sigma and their derivatives in t for a scale that starts at
    `start`, T_{k+1}.

    t is a tensor of any shape with values in [start, 1]; kind is 'linear', 'gvp', 'quadratic' or 'cubic' (the last two
    decay the noise as (1 - t)^2 and (1 - t)^3). Returns (alpha, d_alpha, sigma, d_sigma), each of t's shape."""
    rate = 1 / (1 - start)
    ramp = (t - start) * rate
    if kind == 'gvp':
        half_pi = math.pi / 2
        alpha, d_alpha = torch.sin(half_pi * ramp), half_pi * rate * torch.cos(half_pi * ramp)
        return alpha, d_alpha, torch.cos(half_pi * t), -half_pi * torch.sin(half_pi * t)
    p = POWERS[kind]
    return ramp, torch.full_like(t, rate), (1 - t) ** p, -p * (1 - t) ** (p - 1)


def noisy_state(x1, x0, t, start, kind='linear'):
    """Eq. (3): x_t of one scale from its data x1 and noise x0, both (B, C, H, W), at times t of shape (B,)."""
    alpha, _, sigma, _ = path(t.view(-1, 1, 1, 1), start, kind)
    return alpha * x1 + sigma * x0


def velocity(x1, x0, t, start, kind='linear'):
    """Eq. (5): the velocity u_t of one scale, the time derivative of `noisy_state`. Shapes as there."""
    _, d_alpha, _, d_sigma = path(t.view(-1, 1, 1, 1), start, kind)
    return d_alpha * x1 + d_sigma * x0


def packed_stages(B, K, device='cpu'):
    """The stages of a batch of B images, (B,): as many images in every stage, in order."""
    return torch.arange(B, device=device) * K // B


def stage_times(stage, uniform, config):
    """Alg. 1, line 6: t ~ U[T_{s+1}, 1] from stages s, (B,) integers, and draws of U[0, 1], (B,)."""
    t = uniform
    for s in range(config.K):       # with plain numbers: a tensor of the times would have to be copied to the device
        start = config.times[s + 1]
        t = torch.where(stage == s, start + (1 - start) * uniform, t)
    return t


def states_and_targets(x1, x0, t, counts, config):
    """Alg. 1, lines 5, 7 and 8: every scale's noisy state and target velocity for a packed batch.

    x1 data and x0 noise are (B, C, H, W) with their images ordered by stage, t (B,), counts = (B_0, ..., B_{K-1}).
    Returns two lists of K tensors, scale k of shape (B_k, C, H/2^k, W/2^k)."""
    pyramids = zip(laplacian_pyramid(x1, config.K), laplacian_pyramid(x0, config.K), counts, config.times[1:])
    scales = [(data[:B_k], noise[:B_k], t[:B_k], start, config.path) for data, noise, B_k, start in pyramids]
    return [noisy_state(*scale) for scale in scales], [velocity(*scale) for scale in scales]


def multiscale_loss(v, u, weights, B):
    """Eq. (7) for a packed batch of B images: the sum over scales of w_k times the images' mean squared errors, over B.
    So scale k counts B_k / B, as in Alg. 1. v, u: lists of K tensors. Returns the loss and the errors, K of (B_k,)."""
    errors = [(v_k.to(u_k.dtype) - u_k).square().flatten(1).mean(1) for v_k, u_k in zip(v, u)]
    return sum((w_k * errors_k).sum() for w_k, errors_k in zip(weights, errors)) / B, errors


def hand_over(state, joining):
    """Alg. 2, lines 4 and 5: the ODE's state as the next finer scale joins it. `joining` is sigma_{T_{k+1}} x_0^(k),
    Eq. (3) at its start: the band of the noise that the coarser scales, `state`, lack is a state of its own."""
    return (joining, *state)


# ---- The network: a DiT whose blocks are mixtures of transformers, one expert per scale ------------------------------


@dataclass
class LapFlowConfig:
    """All that is needed to rebuild and sample a model. Settings that cannot be raise ValueError with one sentence."""
    size: int = 32          # H = W of the finest grid: pixels, or latents of a VAE
    channels: int = 4
    patch: int = 2
    width: int = 1024       # DiT B, L, XL: width 768, 1024, 1152; depth 12, 24, 28; heads 12, 16, 16
    depth: int = 24
    heads: int = 16
    T: tuple = (0.5,)       # K = len(T) + 1 scales; () is single-scale flow matching; Eq. (10) recommends thirds
    n_classes: int = 0      # 0 is unconditional
    mask: str = 'causal'    # which scales a scale sees: 'causal' (itself and coarser), 'none' (all), 'self' (itself)
    shared: str = ''        # which parts of a block all scales share: any of 'qkv', 'proj', 'ffn', 'mod', with commas
    path: str = 'linear'    # 'linear', 'gvp', 'quadratic' or 'cubic'
    image_tokens: bool = False  # not the paper's: a token shows the image as far as it is known, not its residual alone

    @property
    def K(self):
        return len(self.T) + 1

    @property
    def times(self):
        """(T_0, ..., T_K): times[k] is T_k, scale k starts at times[k + 1]."""
        return (1.0, *self.T, 0.0)

    def __post_init__(self):
        def need(condition, sentence):
            if not condition:
                raise ValueError(sentence)
        cell, shared = 2 ** (self.K - 1) * self.patch, set(self.shared.split(','))
        need(all(a > b for a, b in zip(self.times, self.times[1:])), f'T must decrease inside (0, 1), not {self.T}')
        need(self.size % cell == 0, f'a grid of {self.size} does not divide by 2^(K-1) x patch = {cell}; K is {self.K}')
        need(self.width % math.lcm(4, self.heads) == 0, f'width must divide by 4 and by heads, not {self.width}')
        for name, known in (('mask', ('causal', 'none', 'self')), ('path', ('gvp', *POWERS))):
            need(getattr(self, name) in known, f'{name} must be one of {known}, but it is {getattr(self, name)!r}')
        need(shared <= {'', 'qkv', 'proj', 'ffn', 'mod'}, f'shared takes any of qkv,proj,ffn,mod, not {self.shared!r}')


def sinusoid(x, dim):
    """Sines and cosines of x, (N,), at dim/2 frequencies from 1 to almost 1/10000 (Vaswani et al., 2017): (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
    angles = x[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def position_table(n, k, D):
    """Sine-cosine positions of the n x n tokens of scale k, (n*n, D), measured in tokens of the finest scale, so that a
    coarse token stands at the centre of the finer ones that it covers. For k = 0 this is DiT's table."""
    centres = (torch.arange(n) + 0.5) * 2 ** k - 0.5
    axis = sinusoid(centres, D // 2)
    return torch.cat([axis.repeat(n, 1), axis.repeat_interleave(n, 0)], dim=-1)


def patchify(x, p):
    """(B, C, H, W) -> (B, N, C*p*p) with N = (H/p)*(W/p) tokens, row by row."""
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2).contiguous()


def unpatchify(x, p):
    """The inverse of `patchify` for a square grid: (B, N, C*p*p) -> (B, C, H, W)."""
    n = math.isqrt(x.shape[1])
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (n, n)), p)


def modulate(x, shift, scale):
    """adaLN: layer norm without affine, then scale and shift. x is (B, N, D), shift and scale (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def global_attention(qkv, mask):
    """Eq. (9): attention over the tokens of all active scales. qkv maps scale k to a (3, B_k, heads, N_k, d) tensor;
    the result maps k to (B_k, N_k, D).

    The block-causal mask M_c is never built: the queries of scale k attend to the joined keys of the scales >= k, and
    what the mask would hide is not computed. With mask 'none' an image's queries see all scales that it has, which its
    stage s says: those of scale k attend stage by stage."""
    out = {}
    for k in qkv:
        parts, first = [], 0
        for s in [j for j in qkv if j <= k] if mask == 'none' else [k]:
            last = qkv[s].shape[1]
            if last > first:        # the images first .. last - 1 see the scales >= s
                seen = [k] if mask == 'self' else [j for j in qkv if j >= s]
                keys, values = torch.cat([qkv[j][1:, first:last] for j in seen], dim=3)
                attention = F.scaled_dot_product_attention(qkv[k][0, first:last], keys, values)
                parts.append(attention.transpose(1, 2).flatten(2))
            first = last
        out[k] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out


class MoTBlock(nn.Module):
    """The multi-scale MoT block (Sec. 4.4, Figure 2): all but the attention is each scale's own, unless `shared`."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads, self.mask = config.heads, config.mask

        def experts(part, make):
            """One module per scale, or K times the same one if `shared` names this part."""
            return nn.ModuleList([make()] * config.K if part in config.shared.split(',') else
                                 [make() for _ in range(config.K)])
        self.mod = experts('mod', lambda: nn.Linear(D, 6 * D))
        self.qkv = experts('qkv', lambda: nn.Linear(D, 3 * D))
        self.proj = experts('proj', lambda: nn.Linear(D, D))
        self.ffn = experts('ffn', lambda: nn.Sequential(nn.Linear(D, 4 * D), nn.GELU('tanh'), nn.Linear(4 * D, D)))

    def forward(self, z, c):
        """z maps each active scale k, finest first, to its tokens (B_k, N_k, D); c is the condition, (B, D)."""
        qkv, post, out = {}, {}, {}
        for k in z:  # PreAttnMod and Eq. (8)
            shift, scale, *post[k] = self.mod[k](c[:len(z[k])]).unsqueeze(1).chunk(6, dim=-1)   # each (B_k, 1, D)
            h = self.qkv[k](modulate(z[k], shift, scale))                                       # (B_k, N_k, 3D)
            qkv[k] = h.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)         # (3, B_k, heads, N_k, d)
        attention = global_attention(qkv, self.mask)
        for k in z:  # PostAttnMod
            gate, shift, scale, ffn_gate = post[k]
            x = z[k] + gate * self.proj[k](attention[k])
            out[k] = x + ffn_gate * self.ffn[k](modulate(x, shift, scale))
        return out


class FinalLayer(nn.Module):
    """adaLN-Zero and the linear decoder of one scale: (B, N, D) -> (B, N, C*p*p)."""

    def __init__(self, config):
        super().__init__()
        self.mod = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.channels * config.patch ** 2)

    def forward(self, x, c):
        shift, scale = self.mod(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class LapFlow(nn.Module):
    """The model V_theta (Sec. 4.4, Figure 2), initialised as DiT: residual branches and outputs start at zero."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # recompute activations in the backward pass: less memory, a third more compute
        D, K, p = config.width, config.K, config.patch
        self.t_embed = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embed = nn.Embedding(config.n_classes + 1, D) if config.n_classes else None   # the last: the null label
        self.patch_embed = nn.ModuleList(nn.Linear(config.channels * p * p, D) for _ in range(K))
        tables = [position_table(config.size // (p * 2 ** k), k, D) for k in range(K)]
        self.register_buffer('positions', torch.cat(tables), persistent=False)     # (N_0 + ... + N_{K-1}, D)
        self.tokens = [len(table) for table in tables]
        self.blocks = nn.ModuleList(MoTBlock(config) for _ in range(config.depth))
        self.final = nn.ModuleList(FinalLayer(config) for _ in range(K))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in filter(None, (self.t_embed[0], self.t_embed[2], self.y_embed)):
            nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if '.mod.' in name or name.startswith('final'):
                nn.init.zeros_(parameter)

    def embed(self, t, y):
        """The condition: of t (B,) and labels y (B,) or None the tokens, (B, n, D), and the vector of adaLN, (B, D)."""
        tokens = [self.t_embed(sinusoid(1000 * t, 256))]
        if self.y_embed is not None:
            y = torch.full_like(t, self.config.n_classes, dtype=torch.long) if y is None else y
            tokens.append(self.y_embed(y))
        return torch.stack(tokens, dim=1), F.silu(sum(tokens))

    def forward(self, x_t, t, y=None):
        """Eq. (6): the velocities of the active scales.

        x_t: list of K, scale k (B_k, C, H/2^k, W/2^k) or None; active may be any suffix of the scales, or one alone. t:
        (B,) times, the batch of the coarsest active scale. y: (B,) labels; n_classes, or y=None, is the null label.
        Returns a list like x_t. Under the causal mask finer inputs never change coarser outputs."""
        p, positions = self.config.patch, self.positions.split(self.tokens)
        x = {k: x_k for k, x_k in enumerate(x_t) if x_k is not None}
        if self.config.image_tokens:    # Eq. (2), over the states of this scale and the coarser ones
            x = {k: reconstruct([x[j][:len(x[k])] for j in x if j >= k]) for k in x}
        z = {k: self.patch_embed[k](patchify(x[k], p)) + positions[k] for k in x}   # (B_k, N_k, D)
        condition, c = self.embed(t, y)                                             # (B, n, D), (B, D)
        # In-context conditioning: the tokens of t and y stand with the coarsest scale, which every scale may see.
        coarsest, n = max(z), condition.shape[1]
        z[coarsest] = torch.cat([condition, z[coarsest]], dim=1)
        for block in self.blocks:
            z = checkpoint(block, z, c, use_reentrant=False) if self.checkpoint_blocks else block(z, c)
        z[coarsest] = z[coarsest][:, n:]
        return [unpatchify(self.final[k](z[k], c[:len(x[k])]), p) if k in x else None for k in range(len(x_t))]
