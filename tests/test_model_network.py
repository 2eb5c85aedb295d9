"""The network of Sec. 4.4, against Figure 2 written out for one image, and its cost."""
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

import model
from bench import trajectory_average
from model import LapFlow, LapFlowConfig, MoTBlock, block_causal_attention, position_table

pytestmark = pytest.mark.usefixtures('float64')

SMALL = dict(size=16, channels=3, n_classes=4, patch=2, width=16, depth=2, heads=2, T=(0.6, 0.25))


def random_weights(module):
    """The module with random weights: those that begin as zeros would silence others."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def random_batch(counts):
    """States, times and labels of a packed batch that has counts[k] images of scale k."""
    x_t = {}
    for k, n in counts.items():
        side = 16 // 2 ** k
        x_t[k] = torch.randn(n, 3, side, side)
    B = max(counts.values())
    return x_t, torch.rand(B), torch.arange(B)


def alone(batch, i):
    """What a packed batch has of image i."""
    return {k: x[[i]] for k, x in batch.items() if i < len(x)}


def loss_of(v):
    return sum(v_k.square().sum() for v_k in v.values())


# -------------------------------------------------------------------------------------------------
# The model schematic (left of Figure 2)


@pytest.mark.parametrize('k', (0, 1, 2))
def test_a_coarse_token_stands_at_the_centre_of_those_it_covers(k):
    """Sines and cosines of its column, then of its row, counted in tokens of the finest scale."""
    table = position_table(4, k, 16)
    frequencies = [1, 0.1, 0.01, 0.001]         # 10000^(-i/4)
    for token, position in enumerate(table):
        row, column = divmod(token, 4)
        expected = []
        for place in (column, row):
            covered = range(place * 2 ** k, (place + 1) * 2 ** k)
            centre = sum(covered) / len(covered)
            expected += [math.sin(centre * f) for f in frequencies]
            expected += [math.cos(centre * f) for f in frequencies]
        assert_close(position, torch.tensor(expected))


def normed(x):
    """Layer norm without affine."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6)


def patches_of(x, p):
    """Patchify: (1, C, n*p, n*p) -> (1, n*n, C*p*p), row by row."""
    tokens = []
    for i in range(0, x.shape[2], p):
        for j in range(0, x.shape[3], p):
            tokens.append(x[:, :, i:i + p, j:j + p].flatten(1))
    return torch.stack(tokens, dim=1)


def schematic(network, x_t, t, y):
    """The left of Figure 2 for one image. Returns the decoder's tokens, not yet put together."""
    config = network.config
    angles = [1000 * t * 10000 ** (-i / 128) for i in range(128)]
    waves = [a.sin() for a in angles] + [a.cos() for a in angles]
    context = [network.t_embed(torch.cat(waves)[None])]
    if config.n_classes > 0:
        context.append(network.y_embed.weight[y])
    c = F.silu(sum(context))
    z = {}
    for k, x in x_t.items():
        patches = patches_of(x, config.patch)
        n = x.shape[2] // config.patch
        positions = position_table(n, k, config.width)
        z[k] = network.patch_embed[k].linear(patches) + positions
    coarsest = max(x_t)
    context = torch.stack(context, dim=1)
    z[coarsest] = torch.cat([context, z[coarsest]], dim=1)
    for block in network.blocks:
        z = block(z, c)
    z[coarsest] = z[coarsest][:, context.shape[1]:]
    for k in z:
        final = network.final[k]
        beta, gamma = final.mod(c).chunk(2, dim=1)
        z[k] = final.linear(normed(z[k]) * (1 + gamma) + beta)
    return z


@pytest.mark.parametrize('n_classes, scales', ((4, (0, 1, 2)), (0, (1, 2)), (4, (0,))))
def test_the_network_is_the_schematic_of_figure_2(n_classes, scales):
    """Eq. (6): velocities of just the scales that are given, in their order."""
    config = LapFlowConfig(**SMALL | dict(n_classes=n_classes))
    network = random_weights(LapFlow(config))
    x_t, t, _ = random_batch({k: 1 for k in scales})
    y = torch.tensor([3])
    v = network(x_t, t, y)
    expected = schematic(network, x_t, t, y)
    assert list(v) == list(scales)
    for k in scales:
        assert_close(patches_of(v[k], 2), expected[k])


def test_no_label_is_the_null_label():
    network = random_weights(LapFlow(LapFlowConfig(**SMALL)))
    x_t, t, y = random_batch({1: 2, 2: 4})
    v = network(x_t, t)
    null = network(x_t, t, torch.full([4], 4))
    assert_close(v, null, rtol=0, atol=0)


def test_velocities_have_the_precision_of_the_states():
    """Whatever autocast rounds, the loss and the solver compute in float32."""
    torch.set_default_dtype(torch.float32)
    network = random_weights(LapFlow(LapFlowConfig(**SMALL)))
    x = torch.randn(2, 3, 16, 16)
    t = torch.rand(2)
    exact = network({0: x}, t)[0]
    with torch.autocast('cpu', torch.bfloat16):
        rounded = network({0: x}, t)[0]
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)


# -------------------------------------------------------------------------------------------------
# The MoT block (middle and right of Figure 2)


def dense_attention(queries, keys, values, sees=torch.le):
    """Eq. (9) with its mask M_c, for tokens of all scales, {k: (B, heads, N_k, d)}.

    sees(k, j) says whether scale k sees scale j: in the paper, if k <= j.
    """
    Q = torch.cat(list(queries.values()), dim=2)
    K = torch.cat(list(keys.values()), dim=2)
    V = torch.cat(list(values.values()), dim=2)
    scale = []
    for k, q in queries.items():
        scale += [k] * q.shape[2]
    scale = torch.tensor(scale)
    visible = sees(scale[:, None], scale[None, :])
    M_c = torch.zeros(visible.shape)
    M_c[~visible] = -torch.inf
    d = Q.shape[3]
    scores = Q @ K.mT / math.sqrt(d)
    attended = torch.softmax(scores + M_c, dim=3) @ V
    return {k: attended[:, :, scale == k] for k in queries}


def test_split_attention_equals_softmax_over_a_dense_mask():
    """Eq. (9)."""
    tokens = {0: 16, 1: 4, 2: 3}
    queries, keys, values = {}, {}, {}
    for k, N_k in tokens.items():
        queries[k], keys[k], values[k] = torch.randn(3, 5, 2, N_k, 8)
    expected = dense_attention(queries, keys, values)
    assert_close(block_causal_attention(queries, keys, values), expected)


def figure_2(block, z, c, sees):
    """PreAttnMod, Eq. (8), Eq. (9) and PostAttnMod, for {k: (B, N_k, D)} and c (B, D)."""
    queries, keys, values, out = {}, {}, {}, {}
    mods = {k: block.mod[k](c)[:, None].chunk(6, dim=2) for k in z}
    for k in z:
        beta_1, gamma_1 = mods[k][:2]
        h = normed(z[k]) * (1 + gamma_1) + beta_1
        heads = []
        for part in block.qkv[k](h).chunk(3, dim=2):
            slices = part.chunk(block.heads, dim=2)
            heads.append(torch.stack(slices, dim=1))
        queries[k], keys[k], values[k] = heads
    attended = dense_attention(queries, keys, values, sees)
    for k in z:
        alpha_1, beta_2, gamma_2, alpha_2 = mods[k][2:]
        heads = torch.cat(attended[k].unbind(1), dim=2)
        x = z[k] + alpha_1 * block.proj[k](heads)
        h = normed(x) * (1 + gamma_2) + beta_2
        expand, _, contract = block.ffn[k]
        ffn = contract(F.gelu(expand(h), approximate='tanh'))
        out[k] = x + alpha_2 * ffn
    return out


def check_block(block, sees):
    """Holds a block against Figure 2, under any mask."""
    z = {k: torch.randn(2, N_k, 16) for k, N_k in {0: 16, 1: 4, 2: 3}.items()}
    c = torch.randn(2, 16)
    assert_close(block(z, c), figure_2(block, z, c, sees))


def test_a_block_is_figure_2():
    """Eq. (8), the modulations, the heads and the layers, each scale's own."""
    block = random_weights(MoTBlock(LapFlowConfig(**SMALL)))
    check_block(block, torch.le)


def test_coarse_velocities_ignore_finer_states_bit_for_bit():
    """So a coarse scale goes on alike where a finer one joins."""
    network = random_weights(LapFlow(LapFlowConfig(**SMALL)))
    x_t, t, y = random_batch({0: 4, 1: 4, 2: 4})
    v = network(x_t, t, y)
    other = network(x_t | {0: torch.randn(4, 3, 16, 16)}, t, y)
    first = network({2: x_t[2]}, t, y)
    assert torch.equal(v[1], other[1])
    assert torch.equal(v[2], first[2])


# -------------------------------------------------------------------------------------------------
# Training


def check_packed(network, counts):
    """Holds a packed batch against its images one by one: velocities, gradients of parameters."""
    x_t, t, y = random_batch(counts)
    parameters = list(network.parameters())
    v = network(x_t, t, y)
    packed = torch.autograd.grad(loss_of(v), parameters)
    for i in range(len(t)):
        v_i = network(alone(x_t, i), t[[i]], y[[i]])
        assert_close(alone(v, i), v_i)
        loss_of(v_i).backward()
    one_by_one = [parameter.grad for parameter in parameters]
    assert_close(list(packed), one_by_one)


def test_a_packed_batch_equals_its_images_one_by_one():
    """And it reaches every parameter, and every label with the null label, which is the last."""
    network = random_weights(LapFlow(LapFlowConfig(**SMALL | dict(n_classes=3))))
    check_packed(network, {0: 1, 1: 2, 2: 4})
    for name, parameter in network.named_parameters():
        assert parameter.grad.any(), name
    reached = network.y_embed.weight.grad.any(dim=1)
    assert reached.tolist() == [True] * 4


def gradients_and_kept(network, batch):
    """Of a training step: the gradients, and how many numbers wait for the backward pass."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, torch.clone):
        v = network(*batch)
    gradients = torch.autograd.grad(loss_of(v), list(network.parameters()))
    return gradients, sum(kept)


def test_checkpointed_blocks_keep_less_and_change_no_gradient():
    network = random_weights(LapFlow(LapFlowConfig(**SMALL)))
    batch = random_batch({0: 1, 1: 2, 2: 4})
    expected, all_kept = gradients_and_kept(network, batch)
    network.checkpoint_blocks = True
    gradients, kept = gradients_and_kept(network, batch)
    assert_close(gradients, expected, rtol=0, atol=0)
    assert kept < all_kept / 2


def test_a_new_network_is_zero_and_its_blocks_are_the_identity():
    """adaLN-Zero."""
    network = LapFlow(LapFlowConfig(**SMALL))
    batch = random_batch({0: 1, 1: 2, 2: 4})
    for v_k in network(*batch).values():
        assert not v_k.any()
    z = {0: torch.randn(2, 9, 16)}
    for block in network.blocks:
        assert torch.equal(block(z, torch.randn(2, 16))[0], z[0])


def test_weights_begin_as_DiTs():
    """Kolmogorov-Smirnov tests of 30 tensors; the odds of a false alarm are 3 in 100,000."""
    config = LapFlowConfig(**SMALL | dict(width=64, n_classes=99))
    network = LapFlow(config)
    for name, tensor in network.state_dict().items():
        weight = tensor.flatten()
        last = name.startswith('final')
        if last or name.endswith('bias') or '.mod.' in name:
            assert not weight.any(), name
        elif name.startswith(('t_embed', 'y_embed')):
            assert kstest(weight, 'norm', (0, 0.02)).pvalue > 1e-6, name
        else:
            bound = math.sqrt(6 / sum(tensor.shape))         # Xavier's
            law = -bound, 2 * bound
            assert kstest(weight, 'uniform', law).pvalue > 1e-6, name


@pytest.mark.parametrize('changes, word', (
    *[(dict(T=T), 'decrease') for T in ((0.3, 0.6), (0.5, 0.5), (1.0,), (0.0,), (math.nan,))],
    (dict(size=36), 'size 36'), (dict(width=18, heads=3), 'width 18'),
    (dict(heads=3), 'heads = 3')))
def test_impossible_settings_are_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        LapFlowConfig(**SMALL | changes)


# -------------------------------------------------------------------------------------------------
# What it costs (Appendix C)


def parameters_of_L2(T, shared=()):
    """By hand: D is 1024, the depth 24. Of a block's layers each scale has its own, or all one."""
    D, K, block = 1024, len(T) + 1, 0
    for name, inputs, outputs in (
            ('mod', D, 6 * D), ('qkv', D, 3 * D), ('proj', D, D),
            ('ffn', D, 4 * D), ('ffn', 4 * D, D)):
        copies = 1 if name in shared else K
        block += copies * (inputs + 1) * outputs
    patch_embed = (16 + 1) * D
    final = (D + 1) * 2 * D + (D + 1) * 16
    t_embed = (256 + 1) * D + (D + 1) * D
    return 24 * block + K * (patch_embed + final) + t_embed


def count_parameters(config):
    with torch.device('meta'):
        network = model.LapFlow(config)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize('T, millions', (((), 457), ((0.5,), 912), ((0.67, 0.33), 1368)))
def test_parameters_of_L2(T, millions):
    """Table 1 prints fewer: config/README.md, Which parameters belong to a scale?"""
    count = count_parameters(LapFlowConfig(T=T))
    assert count == parameters_of_L2(T)
    assert round(count / 1e6) == millions


@pytest.mark.parametrize('size, T, attention, whole', (
    (32, (0.5,), 0.6875, 0.750),
    (128, (2 / 3, 1 / 3), 0.493, 0.535)))
def test_the_causal_mask_saves_what_the_design_promises(size, T, attention, whole):
    """README's 25% and 46% fewer FLOPs than a single scale's, in two blocks of DiT-L/2.

    torch counts them in a forward pass of each segment (trajectory_average: whole, attention). On
    paper attention has 1/2 x 1/16 + 1/2 x (1/16 + 5/4), and 379/768 as in
    test_attention_costs_appendix_C; all else, in proportion to tokens, 3/4 and 9/16, so that the
    whole lies between. The token of t makes a difference of up to 0.0015.
    """
    ours = trajectory_average(LapFlowConfig(size=size, T=T, depth=2))
    single = trajectory_average(LapFlowConfig(size=size, T=(), depth=2))
    ratios = ours / single
    assert ratios.tolist() == pytest.approx([whole, attention], abs=0.002)
