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

os.environ['OMP_NUM_THREADS'] = '1'      # tensors this small gain nothing from threads; for subprocesses, too
os.environ['PYTHONUNBUFFERED'] = '1'

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model  # noqa: E402
import sample  # noqa: E402
import variants  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def workplace(tmp_path_factory):
    """A folder with a small digits dataset in it, as a user's checkout after the first run."""
    from data import make_digits
    folder = tmp_path_factory.mktemp('workplace')
    make_digits(str(folder / 'data' / 'digits'), train=300, heldout=60)
    return folder


@pytest.fixture(scope='session')
def plain(workplace):
    """The name of a dataset without classes: the same digits."""
    folder = workplace / 'data' / 'plain'
    shutil.copytree(workplace / 'data' / 'digits', folder)
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps(meta | dict(classes=[])))
    np.save(folder / 'labels.npy', np.zeros_like(np.load(folder / 'labels.npy')))
    return folder.name


# What tests/variants.py puts in place in module model, of which module sample has some names, too
CHANGED = ('LapFlow', 'LapFlowConfig', 'MoTBlock', 'alpha', 'sigma', 'block_causal_attention', 'states_and_velocities',
           'stage_times', 'join')


@contextmanager
def variant_in_place(variant):
    """Puts a variant of tests/variants.py in place, '' for LapFlow's own, and takes it away at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGED:
            patch.setattr(model, name, getattr(model, name))
        patch.setattr(variants.VariantConfig, 'applied', variant)
        if variant:
            variants.apply(variant)
        for name in ('LapFlow', 'LapFlowConfig', 'join'):
            patch.setattr(sample, name, getattr(model, name))
        yield


def config_in_place(**settings):
    """A config of the variant that is in place."""
    if variants.VariantConfig.applied:
        settings['variant'] = variants.VariantConfig.applied
    return model.LapFlowConfig(**settings)


@pytest.fixture
def use():
    """use('mask=none') puts a variant in place until the end of the test."""
    with ExitStack() as stack:
        yield lambda variant: stack.enter_context(variant_in_place(variant))


def run_in(folder, script, *args):
    """Runs a script in this process, as if from a folder; the sentence that it ended with, '' for a normal end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [script, *args])
        if script == 'tests/variants.py':       # it changes module model, and module sample has names of that
            for name in CHANGED:
                patch.setattr(model, name, getattr(model, name))
            patch.delitem(sys.modules, 'sample')
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        except SystemExit as end:
            return str(end.code or '')
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ''


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """
    run('train.py', '--key=value', ...) -> what the script printed and the sentence it ended with ('' for a normal
    end).
    """
    monkeypatch.chdir(workplace)

    def run(script, *args):
        message = run_in(workplace, script, *args)
        return capsys.readouterr().out, message
    return run


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


@contextmanager
def started(folder, script, *args, launcher=(sys.executable,), stderr=subprocess.STDOUT):
    """A script that is started from a folder in a process of its own, which is killed at the end."""
    job = subprocess.Popen([*launcher, os.path.join(ROOT, script), *args], cwd=folder, text=True,
                           stdout=subprocess.PIPE, stderr=stderr)
    try:
        yield job
    finally:
        job.kill()
        job.wait()


FORKS = multiprocessing.get_context('forkserver')       # of a process that has imported torch
FORKS.set_forkserver_preload(['pytest', 'torchdiffeq'])


def be_rank(rank, port, output, *script):
    """What one of two processes does."""
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.exit(run_in(*script) or 0)


def start_two(folder, script, *args):
    """Starts a script in two processes that belong together, as torchrun does, but seconds faster."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    output = tempfile.mktemp(dir=folder, prefix='output-')
    jobs = [FORKS.Process(target=be_rank, args=(rank, port, output, folder, script, *args)) for rank in '01']
    for job in jobs:
        job.start()
    return jobs, output


def finish(jobs, output):
    """Waits for what `start_two` started, which must end well; what it printed."""
    for job in jobs:
        job.join(300)
        job.kill()
    printed = Path(output).read_text()
    assert [job.exitcode for job in jobs] == [0, 0], printed
    return printed


TINY = ('config/digits.py', '--width=32', '--depth=2', '--heads=2', '--batch_size=12', '--max_iters=6',
        '--eval_interval=3', '--log_interval=1', '--eval_images=24', '--sample_images=12', '--method=euler',
        '--steps=4', '--dtype=float32', '--device=cpu', '--warmup_iters=0', '--learning_rate=1e-2')


@pytest.fixture(scope='session')
def trained(workplace):
    """The folder of one uninterrupted tiny run."""
    assert run_in(workplace, 'train.py', *TINY, '--out_dir=out-whole') == ''
    return workplace / 'out-whole'


@pytest.fixture(scope='session', autouse=True)
def compiling(request):
    """
    The two processes of the test of compiled blocks, started before all tests if that is one of them, for they are a
    minute in the C++ compiler.
    """
    if shutil.which('g++') and any(item.name.startswith('test_compiled_blocks') for item in request.session.items):
        folder = request.getfixturevalue('workplace')
        jobs, output = start_two(folder, 'train.py', *TINY, '--compile=True', '--out_dir=out-compiled')
        yield jobs, output
        for job in jobs:
            job.kill()
    else:
        yield


@pytest.fixture(scope='session', autouse=True)
def rehearsal(request):
    """
    The rehearsal of tests/gpu.py on this CPU, started before all tests if one of them asks for it, for it takes a
    minute: its process and its folder of results.
    """
    if any('rehearsal' in item.fixturenames and 'gpu' in item.module.__name__ for item in request.session.items):
        folder = request.getfixturevalue('workplace')
        with open(folder / 'rehearsal.txt', 'w') as output:
            job = subprocess.Popen([sys.executable, os.path.join(ROOT, 'tests/gpu.py'), '--device=cpu', '--small=True',
                                    '--results=results-gpu'], cwd=folder, stdout=output, stderr=output)
        yield job, folder / 'results-gpu'
        job.kill()
    else:
        yield


@pytest.fixture(scope='session')
def vae_folder(tmp_path_factory):
    """A VAE with random weights that halves the grid, as save_pretrained leaves it."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('vae')
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.7,
                  mid_block_add_attention=False,
                  down_block_types=('DownEncoderBlock2D',) * 2,
                  up_block_types=('UpDecoderBlock2D',) * 2).save_pretrained(folder)
    return str(folder)


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: minutes of random kills; run with -m soak')


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: 'gpu' in item.module.__name__)      # last: by then its rehearsal is over
    if 'soak' not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker('soak')]
