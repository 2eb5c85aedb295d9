import os
import runpy
import signal
import subprocess
import sys

os.environ['OMP_NUM_THREADS'] = '1'      # tensors this small gain nothing from threads; for subprocesses, too

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


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


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """
    run('train.py', '--key=value', ...) -> what the script printed and the sentence it ended with ('' for a normal
    end).
    """
    monkeypatch.chdir(workplace)

    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *args])
        message, handler = '', signal.getsignal(signal.SIGTERM)
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        except SystemExit as end:
            message = str(end.code or '')
        signal.signal(signal.SIGTERM, handler)
        return capsys.readouterr().out, message
    return run


TINY = ('config/digits.py', '--width=32', '--depth=2', '--heads=2', '--batch_size=12', '--max_iters=6',
        '--eval_interval=3', '--log_interval=1', '--eval_images=24', '--sample_images=20', '--steps=4',
        '--dtype=float32', '--device=cpu', '--warmup_iters=0', '--learning_rate=1e-2')


@pytest.fixture(scope='session')
def trained(workplace):
    """The folder of one uninterrupted tiny run."""
    subprocess.run([sys.executable, os.path.join(ROOT, 'train.py'), *TINY, '--out_dir=out-whole'], cwd=workplace,
                   check=True)
    return workplace / 'out-whole'


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
    if 'soak' not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker('soak')]
