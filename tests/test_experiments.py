"""The tools in experiments/: each in its smallest form, and what becomes of their results."""
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gpu
from bench import attention_cost, packed_flops
from conftest import ROOT, TINY, run_in
from data import Dataset
from model import LapFlowConfig

TOOLS = f'{ROOT}/tests/experiments'


def tool(folder, name, *args):
    """What a tool prints, in a process of its own that ends well."""
    command = [sys.executable, f'{TOOLS}/{name}', *args]
    return subprocess.check_output(command, cwd=folder, text=True)


def contents(folder):
    """What the .json files in a folder hold, by their names."""
    return {file.stem: json.loads(file.read_text()) for file in folder.glob('*.json')}


# -------------------------------------------------------------------------------------------------
# gpu.py


def test_the_rehearsal_runs_whole_and_fills_every_table_with_a_rehearsal(workplace):
    """It takes longest. conftest.py puts it first, so that other tests run beside it.

    The documents hold what was measured on a GPU (results/gpu, nothing yet), not the rehearsal.
    """
    tool(workplace, 'gpu.py', '--device=cpu', '--small=True')
    folder = workplace / 'out-rehearsal'
    parts = contents(folder)
    ends = {name: part['ended'] for name, part in parts.items()}
    assert ends == dict.fromkeys(gpu.PARTS, 'whole')
    rows = parts['numbers']['rows'] + parts['scripts']['rows']
    assert [row['row']['holds'] for row in rows if row['table'] == 'checks'] == ['yes'] * 15
    for document in gpu.DOCUMENTS:
        text = Path(ROOT, document).read_text()
        filled = gpu.with_tables(text, folder)
        assert filled.count(', a rehearsal:') == text.count('<!-- gpu.py: ') > 0
        assert gpu.with_tables(filled, f'{TOOLS}/results/gpu') == text


def test_a_part_that_fails_or_is_cut_loses_nothing_else(workplace, tmp_path, monkeypatch):
    """numbers is cut after its first row. evidence lacks the pictures that it asks for."""
    wait = subprocess.Popen.wait
    file = tmp_path / 'numbers.json'

    def wait_for_a_row(job, limit=None):
        if '--part=numbers' not in job.args or limit is None:
            return wait(job)
        while job.poll() is None and not (file.exists() and '"row"' in file.read_text()):
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(job.args, limit)

    monkeypatch.setattr(subprocess.Popen, 'wait', wait_for_a_row)
    args = '--device=cpu', '--parts=numbers,evidence', f'--results={tmp_path}'
    assert run_in(workplace, 'tests/experiments/gpu.py', *args) == ''
    parts = contents(tmp_path)
    assert parts['numbers']['ended'] == 'cut' and parts['numbers']['rows']
    assert 'four files of Fashion-MNIST' in parts['evidence']['ended']


# -------------------------------------------------------------------------------------------------
# bench.py


def test_attention_costs_appendix_C():
    """Eq. (11) and Eq. (12): pairs of tokens, counted on paper, as shares of a single scale's.

    Without a mask, which is the paper's analysis, and with it.
    """
    assert attention_cost((0.75,)) == (28 / 64, 24 / 64)
    assert attention_cost((2 / 3, 1 / 3)) == pytest.approx((467 / 768, 379 / 768))


def test_the_estimate_of_memory_is_near_what_a_step_takes():
    """In a process of its own, for this one has memory to reuse. The rest is libraries' own."""
    code = 'from bench import *; print(*measured_beside_estimated(384, 6, 6, 2, 16, (0.5,), 16))'
    printed = subprocess.check_output([sys.executable, '-c', code], cwd=TOOLS)
    measured, estimated = map(float, printed.split())
    assert 0.8 < estimated / measured < 1.02


# -------------------------------------------------------------------------------------------------
# The others

SMALL = '--width=32 --depth=1 --heads=2 --size=8 --batch_size=4 --repeats=1 --device=cpu'
CKPT = '--ckpt=out-whole/ckpt.pt'
FIGURES = 'pyramid,timeline,attention,packed,trajectory,digits,curve,details,distance,solvers'


@pytest.mark.parametrize('command, words', (
    (f'bench.py {CKPT} --batch_size=2', ['| euler, 4 steps | 4.0 |']),
    (f'bench.py {SMALL}', ['| training step |', '| sampling, 20 Euler steps |']),
    (f'bench.py {SMALL} --what=loop', ['| reading 4 latents |', '| saving a checkpoint |']),
    ('judge.py --samples=real.npz', ['frechet 0.0000, precision 1.0000, recall 1.0000']),
    (f'solvers.py {CKPT} --runs=euler:2,midpoint:4 --num_samples=20 --hold_coarsest=True',
     ['| euler, 2 | 2 |', '| midpoint, 4 | 8 |']),
    (f'figures.py {CKPT} --out=figures --only={FIGURES}', FIGURES.split(','))))
def test_each_tool_prints_what_it_is_for(command, words, workplace, trained):
    """The samples that are judged are training images themselves, all of them threes."""
    data = Dataset(f'{workplace}/data/digits')
    np.savez(workplace / 'real.npz', data.array[3:300:10], data.labels[3:300:10])
    printed = tool(workplace, *command.split())
    assert [word for word in words if word not in printed] == []


def test_a_run_judged_on_its_way_is_the_run_straight_to_its_end(workplace, run):
    """Edify's, at the FLOPs of 4 iterations of LapFlow, to half of one. A step is 3 forwards.

    A run does not go back: points that it has passed, and other settings, are refused.
    """
    network = dict(width=32, depth=1, heads=2, patch=4)
    args = [f'--{key}={value}' for key, value in network.items()]
    args += ['--only=edify', '--num_samples=10', '--extra=--device=cpu --eval_images=8']

    def compare(out_dir, points):
        _, message = run('tests/experiments/compare.py', *args, f'--out_dir={out_dir}', points)
        return contents(workplace / out_dir)['edify-0']['rows'], message

    [straight], _ = compare('out-straight', '--points=4')
    flops = packed_flops(LapFlowConfig(32, 1, n_classes=10, **network), 64)
    assert straight['flops'] / (3 * flops) == pytest.approx(4, abs=0.5)
    rows, message = compare('out-curve', '--points=2,4,3')
    assert [row['point'] for row in rows] == [2, 4] and rows[1] == straight
    assert 'is at iteration 5, not 4' in message        # which are those of points 4 and 3
    _, message = run('tests/experiments/compare.py', '--dataset=none', '--out_dir=out-curve')
    assert 'width is 32 there and 128 here' in message


def test_an_exported_checkpoint_is_small_and_draws_the_same(workplace, run):
    """That of a variant, which export.py finds in the checkpoint."""
    variant = 'tests/variants.py', 'image_tokens=True'
    run(*variant, 'train.py', *TINY, '--out_dir=out-image')
    tool(workplace, 'export.py', '--ckpt=out-image/ckpt.pt', '--out=half.pt')
    images = []
    for file in ('half.pt', 'out-image/ckpt.pt'):
        run(*variant, 'sample.py', f'--ckpt={file}', '--num_samples=20', '--out=x.npz')
        images.append(np.load(workplace / 'x.npz')['arr_0'].astype(int))
    assert abs(images[0] - images[1]).max() <= 2 and images[0].std() > 1
    half, whole = ((workplace / file).stat().st_size for file in ('half.pt', 'out-image/ckpt.pt'))
    assert half < whole / 6         # of 16 bytes a weight 2 are left


def test_an_export_does_not_replace_its_own_checkpoint(trained, run):
    before = (trained / 'ckpt.pt').read_bytes()
    args = f'--ckpt={trained}/ckpt.pt', f'--out={trained}/../out-whole/ckpt.pt'
    assert 'is the checkpoint itself' in run('tests/experiments/export.py', *args)[1]
    assert (trained / 'ckpt.pt').read_bytes() == before


def test_fashion_mnist_is_made_of_its_four_files(tmp_path):
    images = np.zeros((70_000, 28, 28), np.uint8)
    images[:, 3, 20] = np.arange(70_000) % 251
    labels = images[:, 3, 20] % 10

    def write(name, array):
        """As its page describes them: a magic number, lengths, bytes."""
        head = np.array([2048 + array.ndim, *array.shape], '>i4')
        content = gzip.compress(head.tobytes() + array.tobytes(), 1)
        (tmp_path / f'{name}-ubyte.gz').write_bytes(content)

    write('train-images-idx3', images[:60_000])
    write('train-labels-idx1', labels[:60_000])
    write('t10k-images-idx3', images[60_000:])
    write('t10k-labels-idx1', labels[60_000:])
    assert run_in(tmp_path, 'tests/experiments/fashion.py') == ''
    data = Dataset(f'{tmp_path}/data/fashion')
    assert data.eval_index.tolist() == list(range(60_000, 70_000))
    assert (data.labels == labels).all()
    assert (data.array == np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]).all()
