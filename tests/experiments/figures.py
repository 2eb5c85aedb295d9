"""Makes every figure of the documents in assets/, from the project's own functions.

    python tests/experiments/figures.py --ckpt out-digits/ckpt.pt
    python tests/experiments/figures.py --only=packed,attention
    python tests/experiments/figures.py --only=trajectory --ckpt assets/fashion.pt --label=7

pyramid.png     a digit, its Laplacian pyramid, and the sum that `reconstruct` makes of it
timeline.png    when every scale starts (`alpha`, `sigma`), and at which times each stage trains (`stage_times`)
attention.png   which token moves which, found by perturbing each, and the calls that `block_causal_attention` makes
packed.png      a packed batch (`packed_stages`) beside a padded one
trajectory.png  a sample of any checkpoint through time, by Euler steps; trajectory.gif, which moves, has all of them
digits.png      100 guided digits, as in samples.png
curve.png       the loss of a checkpoint's log.csv
details.png     config/README's "Ten details for one composition", and where the details differ
distance.png    Frechet distance against training, from results/fashion and fashion-patch2, which compare.py wrote
solvers.png     Frechet distance against evaluations, from results/solvers.json
clothes.png     real pictures above those of --fashion; needs data/fashion
"""
import io
import json
import math
import os
from contextlib import nullcontext
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import project
from configurator import check, configure
from data import Dataset, decode, load_vae
from judge import restart_under_variant
from model import (LapFlowConfig, alpha, block_causal_attention, laplacian_pyramid, packed_stages,
                   reconstruct, sigma, stage_times)
from sample import draw, generate, load_checkpoint, load_model, noise_of, save_grid, to_uint8

matplotlib.use('Agg')
RESULTS = project.ROOT / 'tests/experiments/results'
SOLVER = ('method', 'steps', 'tol', 'cfg')
WIDTH = 8.5                                     # inches, of 150 pixels: README shows about 100 of them to the inch
COLOURS = ('#3572b8', '#3f9a54', '#e0872b')     # of the scales, finest first
GREY, PALE, DARK, RED, VIOLET, TEAL = '#8a8f98', '#eef0f3', '#222222', '#c0392b', '#7b3fa0', '#1899a0'
LABEL = dict(ha='center', va='center', bbox=dict(facecolor='white', edgecolor='none', pad=3))
plt.rcParams.update({'font.size': 11, 'axes.titlesize': 11, 'axes.spines.top': False, 'axes.spines.right': False,
                     'text.color': DARK, 'axes.edgecolor': DARK, 'hatch.linewidth': 0.8, 'legend.frameon': False,
                     'lines.linewidth': 2, 'lines.markersize': 7, 'figure.constrained_layout.use': True,
                     'figure.constrained_layout.w_pad': 0.08, 'figure.constrained_layout.h_pad': 0.08})


def save(figure, name):
    """Writes a figure to assets/, with a palette of 255 colours if it has more."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    Image.open(buffer).convert('RGB').quantize(255, dither=Image.Dither.NONE).save(f'{out}/{name}.png', optimize=True)


def show(axes, image, title='', frame=DARK):
    """An image (1, H, W) in [-1, 1], -1 black and 0 mid-grey, its pixels as squares, in a coloured frame."""
    axes.imshow(image[0], cmap='gray', vmin=-1, vmax=1, interpolation='nearest')
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, color=frame)
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=2.5)


def pyramid():
    x = Dataset('digits').batch(np.array([2]))[0]
    scales = laplacian_pyramid(x, 3)
    whole = reconstruct(scales)
    figure, axes = plt.subplots(1, 5, figsize=(WIDTH, 2.1))
    figure.get_layout_engine().set(wspace=0.06)
    show(axes[0], x[0], 'picture $x$')
    for k in range(3):
        show(axes[3 - k], scales[k][0], rf'$x^{{({k})}}$: ${32 // 2 ** k} \times {32 // 2 ** k}$', COLOURS[k])
    show(axes[4], whole[0], 'their sum')
    error = (whole - x).abs().max()
    notes = ('32 × 32', 'repeated 4 × 4', 'repeated 2 × 2', '0 is mid-grey', f'max. error {error:.0e}')
    for panel, note, sign in zip(axes, notes, ('=', '+', '+', '=', '')):
        panel.set_xlabel(note)
        panel.text(1.11, 0.5, sign, transform=panel.transAxes, ha='center', va='center', fontsize=15)
    save(figure, 'pyramid')


def timeline():
    config = LapFlowConfig(T=(0.67, 0.33))
    K, starts = config.K, config.times[1:]
    figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTH, 5.2), sharex=True, height_ratios=(3, 2))
    for k, start in enumerate(starts):
        t = torch.linspace(start, 1, 50)
        above.plot(t, alpha(t, start)[0], color=COLOURS[k], linewidth=2.5, label=rf'$\alpha$ of scale {k}')
        above.plot(start, sigma(t)[0][0], 'o', color=COLOURS[k], markersize=9)
        above.text(start + 0.01, 1.1, f'scale {k} joins at $T_{k + 1}$ = {start:g}', color=COLOURS[k])
        for axes in (above, below):
            axes.axvline(start, color=COLOURS[k], linestyle=':', linewidth=1.5, zorder=0)
    t = torch.linspace(0, 1, 50)
    above.plot(t, sigma(t)[0], '--', color=DARK, label=r'$\sigma$ of all', zorder=1)
    above.set(ylabel='share of data, noise', ylim=(0, 1.2), yticks=(0, 0.5, 1))
    above.legend(loc='center left', bbox_to_anchor=(0, 0.38))
    first, last = (stage_times(torch.arange(K), uniform, config) for uniform in (torch.zeros(K), torch.ones(K)))
    for s in range(K):
        height = 0.7 / (K - s)
        for k in range(s, K):
            below.barh(s - 0.35 + height * (k - s + 0.5), last[s] - first[s], height, first[s], color=COLOURS[k])
        below.text((first[s] + 1) / 2, s, f'scales: {", ".join(map(str, range(s, K)))}', **LABEL)
    below.set(xlabel='t: 0 is noise, 1 is data', xlim=(0, 1), yticks=range(K), ylim=(K - 0.5, -0.5),
              yticklabels=[f'stage {s}, t ~ U[{first[s]:g}, {last[s]:g}]' for s in range(K)])
    below.set_xticks([*starts, 1], [f'{t:g}' for t in (*starts, 1)])
    save(figure, 'timeline')


def attention():
    tokens = (16, 4, 1)
    K, N = len(tokens), sum(tokens)
    generator = torch.Generator().manual_seed(0)
    qkv = {k: torch.randn(3, 1, 1, n, 8, generator=generator) for k, n in enumerate(tokens)}

    def outputs(qkv):
        """What the attention makes of every token, (N, 8)."""
        q, k, v = ({scale: x[i] for scale, x in qkv.items()} for i in range(3))
        return torch.cat(list(block_causal_attention(q, k, v).values()), dim=2)[0, 0]

    with mock.patch.object(F, 'scaled_dot_product_attention', wraps=F.scaled_dot_product_attention) as calls:
        before = outputs(qkv)
    sizes = [(queries.shape[2], keys.shape[2]) for (queries, keys, _), _ in calls.call_args_list]
    moved, owner = np.zeros((N, N), bool), np.repeat(np.arange(K), tokens)
    for j, k in enumerate(owner):       # another key and value for token j
        changed = {i: x.clone() for i, x in qkv.items()}
        changed[k][1:, 0, 0, j - sum(tokens[:k])] += 1
        moved[:, j] = (outputs(changed) != before).any(1)

    def cells(axes, rows, columns, top):
        """The queries `rows` against the keys `columns`: a square each, coloured if the key moves the query."""
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                colour = COLOURS[owner[column]] if moved[row, column] else PALE
                axes.add_patch(plt.Rectangle((j, top + i), 0.88, 0.88, color=colour, linewidth=0))

    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.75))
    cells(left, range(N), range(N), 0)
    top = 0
    for k, (queries, keys) in enumerate(sizes):
        middle = np.flatnonzero(owner == k).mean() + 0.44
        left.text(middle, -0.8, f'{k}', color=COLOURS[k], ha='center', va='center', weight='bold')
        left.text(-0.8, middle, f'{k}', color=COLOURS[k], ha='center', va='center', weight='bold')
        cells(right, np.flatnonzero(owner == k), range(N - keys, N), top)
        x, y = (0, -0.8) if k == 0 else (keys + 0.6, top + queries / 2)
        right.text(x, y, f'call {k + 1}: queries × keys = {queries} × {keys}', color=COLOURS[k], va='center')
        top += queries + 1
    left.text(N / 2, -2.3, 'changed input token, by scale', ha='center', va='center')
    left.text(-2.3, N / 2, 'output token that it changes', ha='center', va='center', rotation=90)
    left.text(0, 25, 'grey: unchanged, bit for bit')
    right.text(0, 25, f'together {sum(q * n for q, n in sizes)} of {N * N} pairs of tokens')
    for axes in (left, right):
        axes.set(xlim=(-2.8, N), ylim=(25.2, -2.8), aspect='equal')
        axes.axis('off')
    save(figure, 'attention')


def packed():
    B, tokens = 6, (64, 16, 4)
    stage = packed_stages(B, len(tokens))
    counts = [int((stage <= k).sum()) for k in range(len(tokens))]
    used, padded = sum(B_k * n for B_k, n in zip(counts, tokens)), B * sum(tokens)
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.5))
    titles = (f'packed: {used} tokens computed, {1 - used / padded:.0%} fewer', f'padded: {padded} tokens')
    for panel, title in zip(panels, titles):
        top, middles = 0, []
        for k, n in enumerate(tokens):
            panel.bar(range(counts[k]), n, 0.92, top, color=COLOURS[k])
            if panel is panels[1]:
                panel.bar(range(counts[k], B), n, 0.92, top, color=PALE, edgecolor=GREY, hatch='////', linewidth=0)
            middles.append(top + n / 2)
            top += n + 4
        panel.set(xlim=(-0.5, B - 0.5), ylim=(top, 0), xticks=range(B), xticklabels=stage.tolist(), yticks=[],
                  xlabel='stage of each image', title=title)
        panel.tick_params(length=0)
        panel.spines[['left', 'bottom']].set_visible(False)
    panels[0].set_yticks(middles, [f'scale {k}: {n} tokens' for k, n in enumerate(tokens)])
    for label, colour in zip(panels[0].get_yticklabels(), COLOURS):
        label.set_color(colour)
    panels[1].text(4, 32, 'computed,\nnever used', **LABEL)
    save(figure, 'packed')


class Recorded(torch.nn.Module):
    """A model that keeps the first image's state at each time that it is asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.frames = model, model.config, {}

    def forward(self, x_t, t, y=None):
        self.frames[t[0].item()] = {k: x[:1] for k, x in x_t.items()}
        return self.model(x_t, t, y)


def words(width, height, text, background='black'):
    image = Image.new('RGB', (width, height), background)
    ImageDraw.Draw(image).text((width / 2, height / 2), text, anchor='mm', font_size=15)
    return np.asarray(image)


def cells(state, side):
    """
    A state in the manner of the paper's Figure 1, a square picture each: every scale, coarsest first, mid-grey for 0 (of
    latents three channels), and the image that they are together, decoded.
    """
    scales = [state.get(k) for k in reversed(range(model.config.K))]
    image = decode(vae, reconstruct(list(state.values())), meta)
    for x in (*scales, image):
        if x is None:
            yield words(side, side, 'not yet', '#5b6b8c')
        else:
            pixels = Image.fromarray(to_uint8(x)[0, ..., :3].squeeze()).convert('RGB')
            yield np.asarray(pixels.resize((side, side), Image.NEAREST))


def joined(arrays, axis):
    """Pictures side by side (axis 1) or below each other (axis 0), with black lines of 4 pixels between them."""
    line = [(2, 2) if i == axis else (0, 0) for i in range(2)] + [(0, 0)]
    return np.concatenate([np.pad(array, line) for array in arrays], axis)


def trajectory():
    config, recorded = model.config, Recorded(model)
    noise = noise_of(0, range(label + 1), (config.channels, config.size, config.size))[label:]
    y = torch.tensor([label]) if config.n_classes else None
    x, _ = generate(recorded, noise, y, 'euler', 40, cfg=solver['cfg'])
    finished = dict(enumerate(laplacian_pyramid(x, config.K)))
    frames = [*list(recorded.frames.items())[::4], (1.0, finished)]
    names = [f'scale {k}' for k in reversed(range(config.K))] + ['their sum']
    columns = [joined([words(72, 18, ''), *(words(72, 96, name) for name in names)], 0)]
    columns += [joined([words(96, 18, f't = {t:.1f}'), *cells(x, 96)], 0) for t, x in frames]
    Image.fromarray(joined(columns, 1)).save(f'{out}/trajectory.png', optimize=True)
    pages = []
    for t, state in [*recorded.frames.items(), (1.0, finished)]:
        row = joined([joined([words(192, 22, name), cell], 0)
                      for name, cell in zip(names, cells(state, 192))], 1)
        page = joined([words(row.shape[1], 22, f't = {t:.2f}'), row], 0)
        pages.append(Image.fromarray(page).quantize(64))
    pages[0].save(f'{out}/trajectory.gif', save_all=True, append_images=pages[1:], loop=0,
                  duration=[100] * (len(pages) - 1) + [2000])       # milliseconds


def digits():
    classes = range(model.config.n_classes)
    save_grid(f'{out}/digits.png', draw(model, vae, meta, 0, range(100), classes, nullcontext(), **solver)[0])


def curve():
    """The loss of every tenth iteration, from the log beside a checkpoint."""
    file = os.path.join(os.path.dirname(ckpt), 'log.csv')
    rows = np.genfromtxt(file, delimiter=',', names=True)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.6))
    axes.plot(rows['iter'], rows['loss'], color=COLOURS[0], linewidth=1.5)
    axes.set(xlabel='iteration', ylabel='loss', xlim=(0, None), ylim=(0, None))
    axes.grid(axis='y', color=PALE)
    save(figure, 'curve')


def details():
    rows, variants, shown = 4, 10, 5
    noise, y = noise_of(1, range(rows * variants), (1, 32, 32)), torch.arange(rows).repeat_interleave(variants)
    fine, coarse = laplacian_pyramid(noise, 2)
    noise = reconstruct([fine, coarse[::variants].repeat_interleave(variants, 0)])
    x = generate(model, noise, y, 'euler', 40, cfg=2)[0]
    coarse, x = laplacian_pyramid(x, 2)[1], x.clamp(-1, 1)
    deviation = 127.5 * x.unflatten(0, (rows, variants)).std(1)
    most = 10 * math.ceil(deviation.max() / 10)
    figure, axes = plt.subplots(rows, shown + 2, figsize=(WIDTH, 4.7))
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    for row, panels in enumerate(axes):
        first = row * variants
        show(panels[0], coarse[first], '' if row else 'coarse image', COLOURS[2])
        for i in range(shown):
            show(panels[1 + i], x[first + i], '' if row else f'variant {i + 1}')
        heat = panels[-1].imshow(deviation[row, 0], plt.get_cmap('magma', most // 5), vmin=0, vmax=most)
        panels[-1].set(xticks=[], yticks=[], title='' if row else 'deviation')
    label = f'standard deviation over {variants} variants, grey levels'
    figure.colorbar(heat, ax=axes, shrink=0.9, aspect=30, label=label)
    save(figure, 'details')


def finish(axes, xlabel, x_ticks, y_ticks):
    """Labels and ticks of a plot of Frechet distances over a log axis; x_ticks maps places to labels."""
    axes.set(xscale='log', xlabel=xlabel, ylabel='Fréchet distance, lower is better')
    axes.set_xticks([*x_ticks], x_ticks.values())
    axes.set_yticks(y_ticks, y_ticks)
    axes.minorticks_off()
    axes.grid(axis='y', color=PALE)


def distance():
    styles = {'lapflow': ('LapFlow, 2 scales', RED, 'o-'), 'three scales': ('LapFlow, 3 scales', RED, '^--'),
              'image tokens': ('LapFlow, image tokens', VIOLET, 'o-'), 'single scale': ('LFM, single scale', DARK, 's-'),
              'pyramidal': ('Pyramidal Flow', GREY, 'D-'), 'edify': ('EdifyImage', TEAL, 'v-')}
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.6), sharey=True)
    grids = (('fashion', 'patch 4: 8 × 8 and 4 × 4 tokens'), ('fashion-patch2', 'patch 2: 16 × 16 and 8 × 8 tokens'))
    for axes, (folder, title) in zip(panels, grids):
        runs = [json.loads(file.read_text()) for file in sorted((RESULTS / folder).glob('*.json'))]
        for i, (system, (label, colour, style)) in enumerate(styles.items()):
            rows = [row for run in runs if run['system'] == system for row in run['rows']]
            points = sorted({row['point'] for row in rows})
            of_points = [[row for row in rows if row['point'] == point] for point in points]
            x = [of_point[0]['flops'] / 1e12 * 1.006 ** (i - 2.5) for of_point in of_points]    # apart, for the bars
            y = [np.mean([row['frechet'] for row in of_point]) for of_point in of_points]
            bars = [np.std([row['frechet'] for row in of_point], ddof=1) if len(of_point) > 1 else np.nan
                    for of_point in of_points]
            axes.plot(x, y, style, color=colour, label=label)
            axes.errorbar(x, y, bars, color=colour, fmt='none', capsize=4)
        axes.set(yscale='log', xlim=(7, 360), title=title)
        ticks = {row['flops'] / 1e12: f'{row["flops"] / 1e12:.0f}\n{row["point"]:,}'
                 for run in runs if run['system'] == 'lapflow' for row in run['rows']}
        finish(axes, "training, TFLOPs; below, LapFlow's iterations", ticks, (50, 70, 100, 150, 200, 300, 400))
        axes.label_outer()
    panels[0].legend(alignment='left', fontsize=9)
    save(figure, 'distance')


def clothes():
    """Real pictures of Fashion-MNIST, two of each class, above those that a checkpoint draws."""
    data = Dataset('fashion')
    y = data.labels[data.rows[data.eval_index]]
    first = [data.eval_index[y == c][:2] for c in range(10)]
    checkpoint = load_checkpoint(fashion)
    drawn = draw(load_model(checkpoint, 'cpu'), None, checkpoint['data'], 0, range(40), range(10), nullcontext(),
                 **{key: checkpoint['config'][key] for key in SOLVER})[0]
    images = {'real': to_uint8(data.batch(np.stack(first, 1).flatten())[0]), 'drawn': drawn}
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 5.2), height_ratios=(1, 2))
    for panel, (name, pictures) in zip(panels, images.items()):
        rows = len(pictures) // 10
        grid = pictures[..., 0].reshape(rows, 10, 32, 32).transpose(0, 2, 1, 3).reshape(32 * rows, 320)
        panel.imshow(grid, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        panel.set(xticks=[], yticks=[], ylabel=name)
        panel.spines[['left', 'bottom']].set_visible(False)
    save(figure, 'clothes')


def solvers():
    styles = {'euler': (DARK, 'o-'), 'midpoint': (RED, 's-'), 'heun2': (VIOLET, 'D-'), 'rk4': ('#b08a1e', '^-'),
              'dopri5': (GREY, 'P-')}
    rows = json.loads((RESULTS / 'solvers.json').read_text())['rows']
    figure, axes = plt.subplots(figsize=(WIDTH, 4))
    for method, (colour, style) in styles.items():
        of_method = [row for row in rows if row['solver'] == method]
        axes.plot([row['nfe'] for row in of_method], [row['frechet'] for row in of_method], style, color=colour,
                  label=method)
    for row in rows:
        if (row['solver'], row['setting']) in (('midpoint', '5'), ('dopri5', '1e-5')):
            axes.annotate(f'{row["solver"]}, {row["setting"]}', (row['nfe'], row['frechet']), (0, -26),
                          textcoords='offset points', ha='center', color=styles[row['solver']][0])
    distances = [row['frechet'] for row in rows]
    ticks = range(5 * int(min(distances) // 5), int(max(distances)) + 5, 5)
    axes.set(xlim=(4.3, 400), ylim=(min(ticks), max(distances) + 2))
    finish(axes, 'evaluations of the model (NFE)', {x: x for x in (5, 10, 20, 40, 80, 160, 320)}, ticks)
    axes.legend(title='one network, 1,000 samples', alignment='left')
    save(figure, 'solvers')


if __name__ == '__main__':
    ckpt = 'out-digits/ckpt.pt'
    out = 'assets'
    fashion = 'assets/fashion.pt'
    label = 0               # of the sample that trajectory shows
    only = ''               # names of figures, with commas; '' makes all
    configure(globals())
    figures = {make.__name__: make for make in (pyramid, timeline, attention, packed, trajectory, digits, curve,
                                                details, distance, solvers, clothes)}
    names = only.split(',') if only else list(figures)
    check(set(names) <= set(figures), f'only takes any of {",".join(figures)}, but it is {only!r}')
    os.makedirs(out, exist_ok=True)
    if {'trajectory', 'digits', 'details'} & set(names):
        restart_under_variant(ckpt)
        checkpoint = load_checkpoint(ckpt)
        model, meta = load_model(checkpoint, 'cpu'), checkpoint['data']
        solver = {key: checkpoint['config'][key] for key in SOLVER}
        vae = load_vae(meta, 'cpu')
    for name in names:
        figures[name]()
        for file in [f'{name}.png'] + ['trajectory.gif'] * (name == 'trajectory'):
            print(f'{file}: {os.path.getsize(f"{out}/{file}") / 1000:.0f} kB')
