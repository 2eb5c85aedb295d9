"""How a script starts: its settings, its device, its processes, and how it says what is wrong.

Settings are plain variables at the top of a script. Config files and the command line override them, later ones win:

    python train.py config/digits.py --batch_size=32 --T=0.67,0.33 --out_dir out-test

A config file is Python that assigns settings, and is run as such: use only files that you trust."""
import ast
import difflib
import json
import os
import runpy
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def check(condition, sentence):
    """Ends the script with one sentence unless the condition holds."""
    if not condition:
        raise SystemExit(f'{os.path.basename(sys.argv[0])}: {sentence}')


@contextmanager
def explain(sentence, errors=Exception):
    """Ends the script with one sentence, and the error behind it, if anything inside goes wrong."""
    try:
        yield
    except errors as error:
        check(False, f'{sentence} ({" ".join(f"{type(error).__name__}: {error}".split())[:200]})')


def plain(namespace):
    """The settings in a namespace: its plain values, but for _names and CONSTANTS."""
    return {key: value for key, value in namespace.items() if isinstance(value, (int, float, str, tuple, list))
            and not key.startswith('_') and (len(key) == 1 or not key.isupper())}


def typed(key, value, settings, source):
    """The value of a setting, from a config file or as text, as the type of its default."""
    nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)[0]
    check(key in settings, f'{source}: there is no setting {key!r}; the nearest is {nearest!r} (--help lists them all)')
    kind = type(settings[key])
    expected = f'{source}: {key} must be of type {kind.__name__}, like {settings[key]!r}, but it is {value!r}'
    with explain(expected):
        if isinstance(value, str) and kind is not str:
            value = ast.literal_eval(value)
        if kind is tuple:
            return tuple(map(float, value if isinstance(value, (tuple, list)) else [value]))
    check(type(value) is kind or (type(value), kind) == (int, float), expected)
    return kind(value)


def configure(namespace, argv=None, inherit=None):
    """Overrides the settings in `namespace`, a script's globals(). argv is the command line's by default. `inherit`, a
    function of the settings, returns defaults that rank below both. --help shows what would be used. Returns a dict."""
    argv, settings, given = list(sys.argv[1:] if argv is None else argv), plain(namespace), {}
    wants_help = '--help' in argv
    while argv:
        arg, source = argv.pop(0), 'command line'
        if arg == '--help':
            continue
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            check(equals or argv, f'{source}: {arg} needs a value: {arg}=VALUE')
            values = {key: text if equals else argv.pop(0)}
        else:
            source = arg if os.path.exists(arg) else f'{os.path.dirname(os.path.abspath(__file__))}/{arg}'
            with explain(f'{arg!r} is neither a config file (NAME.py) nor a setting (--key=value)'):
                values = plain(runpy.run_path(source))
        given |= {key: typed(key, value, settings, source) for key, value in values.items()}
    settings |= given
    if inherit:
        settings |= inherit(settings) | given
    if wants_help:
        print('\n'.join(f'--{key}={value!r}' for key, value in settings.items()))
        raise SystemExit
    namespace.update(settings)
    return settings


def changes(there, here):
    """What differs between two dicts of settings, in words, for each key of the second."""
    return '; '.join(f'{key} is {there.get(key)!r} there and {here[key]!r} here' for key in here
                     if there.get(key) != here[key])


def write_json(file, content):
    """Writes a file in one step: whoever looks finds the old one or the new one, whole."""
    Path(f'{file}.tmp').write_text(json.dumps(content, indent=1))
    os.replace(f'{file}.tmp', file)


def claim(folder, name, settings):
    """Makes a folder for work with these settings, which a file in it names; refuses one that holds anything else."""
    file = f'{folder}/{name}'
    with explain(f'{folder} cannot be written or holds something else: choose another --out'):
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder) in ([], [f'{name}.tmp']):
            write_json(file, settings)
        differences = changes(json.loads(Path(file).read_text()), settings)
    check(not differences, f'{folder} was begun with other settings ({differences}): choose another --out or delete it')


def launch(device):
    """Joins torchrun's process group, if there is one, and settles on a device: 'auto' is cuda, mps or cpu, 'cuda' this
    process's own GPU. Float32 matrix products may use TF32. Returns (device, rank, world size)."""
    rank, local_rank, world = (int(os.environ.get(name, 0)) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
    if device == 'auto':
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else 'cpu'
    if device == 'cuda':
        device = f'cuda:{local_rank}'
    with explain(f'device must be auto, cuda, mps or cpu, and one that is there, not {device!r}'):
        torch.empty(0, device=device)
    torch.backends.cuda.matmul.allow_tf32 = True
    if 'cuda' in device:
        torch.cuda.set_device(device)
    if world > 1:
        # A name of its own for every attempt of torchrun --max_restarts, which else would find the lost one's addresses
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), next(dist.rendezvous('env://'))[0])
        dist.init_process_group('nccl' if 'cuda' in device else 'gloo', store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=3))     # others wait while rank 0 evaluates
    return device, rank, max(world, 1)


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def precision(device, dtype):
    """(autocast, name) of a dtype, 'float32', 'bfloat16' or 'auto': bfloat16 where the hardware multiplies it."""
    kind = torch.device(device).type
    check(dtype in ('auto', 'float32', 'bfloat16'), f'dtype must be auto, float32 or bfloat16, but it is {dtype!r}')
    if dtype == 'auto':
        fast = kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False) or \
            kind == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        dtype = 'bfloat16' if fast else 'float32'
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == 'bfloat16'), dtype
