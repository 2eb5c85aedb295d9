"""What the tests share: a workplace as a user has one, ways to run the scripts, a stand-in VAE."""
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'     # tensors so small gain nothing from threads
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, f'{ROOT}/tests/experiments']

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import variants  # noqa: E402
from data import make_digits, training_order  # noqa: E402

TINY = ('config/digits.py', '--width=32', '--depth=2', '--heads=2', '--batch_size=12',
        '--max_iters=6', '--eval_interval=3', '--log_interval=1', '--eval_images=24',
        '--sample_images=12', '--method=euler', '--steps=4', '--dtype=float32', '--device=cpu',
        '--warmup_iters=0', '--learning_rate=1e-2')
TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
            '--shutdown_timeout=600')       # or a slow machine has 30 seconds to save


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Makes it the dtype of new tensors and networks, until the end of the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope='session')
def workplace(tmp_path_factory):
    """A folder with a small digits dataset in data/, as a user's checkout after the first run."""
    folder = tmp_path_factory.mktemp('workplace')
    make_digits(f'{folder}/data/digits', train=300, heldout=60)
    return folder


@pytest.fixture(scope='session')
def plain(workplace):
    """The name of a dataset without classes: the same digits."""
    folder = workplace / 'data/plain'
    shutil.copytree(workplace / 'data/digits', folder)
    meta = json.loads((folder / 'meta.json').read_text())
    meta['classes'] = []
    (folder / 'meta.json').write_text(json.dumps(meta))
    np.save(folder / 'labels.npy', np.zeros(360, int))
    return 'plain'


@pytest.fixture(scope='session')
def trained(workplace):
    """The out_dir of one uninterrupted run of TINY."""
    assert run_in(workplace, 'train.py', *TINY, '--out_dir=out-whole') == ''
    return workplace / 'out-whole'


@pytest.fixture(scope='session')
def vae_folder(tmp_path_factory):
    """A VAE with random weights that halves the grid, as save_pretrained leaves it."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('vae')
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                        scaling_factor=0.7, mid_block_add_attention=False,
                        down_block_types=('DownEncoderBlock2D',) * 2,
                        up_block_types=('UpDecoderBlock2D',) * 2)
    vae.save_pretrained(folder)
    return str(folder)


# -------------------------------------------------------------------------------------------------
# Running scripts


def run_in(folder, script, *args, names=None):
    """Runs a script in this process, from a folder. Returns its last sentence, '' for none.

    names, a dict if it is given, receives what the script has defined at its end.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in signals}
    with pytest.MonkeyPatch.context() as patch, variants.in_place(''):
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [script, *args])
        if script == 'tests/variants.py':
            patch.delitem(sys.modules, 'sample')        # it has names of module model
        try:
            found = runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
            if names is not None:
                names.update(found)
        except SystemExit as end:
            return str(end.code or '')
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ''


@pytest.fixture
def run(workplace, capsys):
    """run('train.py', '--key=value', ...) -> what the script printed, and its last sentence."""
    def run(script, *args):
        capsys.readouterr()
        message = run_in(workplace, script, *args)
        return capsys.readouterr().out, message
    return run


@contextmanager
def started(folder, script, *args, launcher=(sys.executable,)):
    """A script in a process of its own, from a folder. It is killed at the end."""
    job = subprocess.Popen([*launcher, os.path.join(ROOT, script), *args], cwd=folder, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield job
    finally:
        job.kill()
        job.wait()


FORKS = multiprocessing.get_context('forkserver')       # of a process that has imported torch
FORKS.set_forkserver_preload(['pytest', 'torchdiffeq'])


def be_rank(rank, port, output, *script):
    """What one of two processes does."""
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=port)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.exit(run_in(*script) or 0)


def start_two(folder, script, *args, other=None):
    """Starts a script in two processes that belong together, as torchrun does, but faster.

    The second one is in the same folder, or in another.
    """
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    output = tempfile.mktemp(dir=folder, prefix='output-')
    jobs = []
    for rank, place in (('0', folder), ('1', other or folder)):
        job = FORKS.Process(target=be_rank, args=(rank, port, output, place, script, *args))
        job.start()
        jobs.append(job)
    return jobs, output


def finish(jobs, output):
    """Waits for what `start_two` started, which must end well. Returns what it printed."""
    for job in jobs:
        job.join()
    printed = Path(output).read_text()
    assert [job.exitcode for job in jobs] == [0, 0], printed
    return printed


# -------------------------------------------------------------------------------------------------
# Variants in place of LapFlow


@pytest.fixture
def use(monkeypatch):
    """use('mask=none') puts a variant in place until the end of the test."""
    with ExitStack() as stack:
        def use(variant):
            stack.enter_context(variants.in_place(variant))
            for name in ('LapFlow', 'LapFlowConfig', 'join'):
                monkeypatch.setattr(sample, name, getattr(model, name))
        yield use


# -------------------------------------------------------------------------------------------------
# Runs that something happens to, their checkpoints and logs


def in_iteration(number, action):
    """A training_order, which train.py asks once an iteration, that acts in one of them."""
    def order(first, count, *rest):
        if first == (number - 1) * count:
            action()
        return training_order(first, count, *rest)

    return order


@pytest.fixture
def during(monkeypatch):
    """during(i, action): action() is called in iteration i, from 1, of the runs that follow."""
    def during(number, action):
        monkeypatch.setattr(data, 'training_order', in_iteration(number, action))
    return during


def load(out_dir):
    """The checkpoint of a run."""
    return torch.load(Path(out_dir) / 'ckpt.pt', weights_only=True)


def rows_of(out_dir):
    """The rows of log.csv as lists of text, its head first, without images_per_s."""
    rows = [line.split(',') for line in (Path(out_dir) / 'log.csv').read_text().splitlines()]
    rate = rows[0].index('images_per_s')
    return [row[:rate] + row[rate + 1:] for row in rows]


def same(a, b):
    """Whether two nested dicts and lists hold the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_run(out_dir, other):
    """Two checkpoints are of one run, bit for bit: they go on alike."""
    one, two = load(out_dir), load(other)
    for key in ('model', 'ema', 'optimizer', 'iter_num', 'data'):
        assert same(one[key], two[key]), key


def contents(folder):
    """The bytes of its files, by name."""
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: minutes of random kills; run with -m soak')


def pytest_collection_modifyitems(config, items):
    if 'PYTEST_XDIST_WORKER' in os.environ:     # the longest comes first, others run beside it
        items.sort(key=lambda item: 'rehearsal' not in item.name)
    if 'soak' not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker('soak')]
