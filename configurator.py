"""How a script starts: its settings, its device, its processes.

Settings are the plain variables at the top of a script. Config files and the command line override
them, and the last one wins:

    python train.py config/digits.py --batch_size=32 --T=0.67,0.33

A config file is Python and is run: use only files that you trust. All that it assigns must be
settings. Names that begin with an underscore, and imported modules, are its own.
"""
import ast
import difflib
import os
import pickle
import runpy
import sys
import zipfile
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist

FILE_ERRORS = (OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)


def check(condition, sentence):
    """Ends the script with one sentence, for a user's mistake, unless the condition holds."""
    if not condition:
        raise SystemExit(f'{os.path.basename(sys.argv[0])}: {sentence}')


@contextmanager
def explain(sentence, *more_errors):
    """Ends the script with one sentence, and the reason, if a user's file cannot be used."""
    try:
        yield
    except FILE_ERRORS + more_errors as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        check(False, f'{sentence} ({reason[:200]})')


def read_config(arg):
    """The settings that a config file assigns. The file may lie beside this one."""
    file = arg
    if not os.path.exists(file):
        file = os.path.join(os.path.dirname(os.path.abspath(__file__)), arg)
    check(file.endswith('.py') and os.path.isfile(file),
          f'{arg!r} is neither a config file (NAME.py) nor a setting (--key=value)')
    with explain(f'{arg} is not Python', SyntaxError):
        assigned = runpy.run_path(file)
    settings = {}
    for key, value in assigned.items():
        if not key.startswith('_') and not isinstance(value, ModuleType):
            settings[key] = value
    check(settings, f'{arg} assigns no settings')
    return settings


def convert(key, value, defaults, lowest, source):
    """A setting's value, which may be given as text, in the type of its default."""
    nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
    check(key in defaults, f'{source}: there is no setting {key!r}; the nearest is {nearest!r} '
          '(--help lists them all)')
    default = defaults[key]
    kind = type(default)
    expected = f'{source}: {key} must be of type {kind.__name__}, like {default!r}, not {value!r}'
    with explain(expected, SyntaxError, TypeError):
        if kind is str:
            value = os.path.expanduser(value)
        elif isinstance(value, str):
            value = ast.literal_eval(value)
        if kind is tuple:
            value = tuple(map(float, np.atleast_1d(value)))
    if kind is float and type(value) is int:
        value = float(value)
    check(type(value) is kind, expected)
    if kind is not str:
        for number in np.atleast_1d(value).tolist():
            check(lowest <= number < 2 ** 63, f'{source}: {key} must be at least {lowest}, and '
                  f'finite, but it is {value}')
    return value


def configure(namespace, at_least_1='', inherit=None):
    """Overrides the settings in `namespace`, a script's globals(), and returns them as a dict.

    Numbers must be at least 0, those named in at_least_1 at least 1. `inherit` is a function of the
    settings; it returns defaults that come from elsewhere.
    """
    defaults, given, argv = {}, {}, sys.argv[1:]
    for key, value in namespace.items():
        is_name = key == 'T' or key.islower() and not key.startswith('_')
        if is_name and isinstance(value, (int, float, str, tuple)):
            defaults[key] = value
    while argv:
        arg = argv.pop(0)
        if arg == '--help':
            continue
        if arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')
            check(equals or argv, f'{arg} needs a value: {arg}=VALUE')
            assigned = {key: value if equals else argv.pop(0)}
        else:
            assigned = read_config(arg)
        for key, value in assigned.items():
            lowest = int(key in at_least_1.split())
            given[key] = convert(key, value, defaults, lowest, arg)
    settings = defaults | given
    if inherit:
        settings |= inherit(settings) | given
    if '--help' in sys.argv:
        for key, value in settings.items():
            print(f'--{key}={value!r}')
        raise SystemExit
    namespace.update(settings)
    return settings


def changes(there, here, but=()):
    """What differs between two dicts of settings, in words, for the keys of the second."""
    differences = []
    for key in here:
        if key not in but and there.get(key) != here[key]:
            differences.append(f'{key} is {there.get(key)!r} there and {here[key]!r} here')
    return '; '.join(differences)


def launch(device):
    """Joins torchrun's processes, if there are any. Returns (device, rank, number of processes).

    The device 'auto' is a GPU if there is one, 'cuda' this process's own. Float32 matrix products
    may use TF32.
    """
    rank, local_rank = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if device == 'auto':
        device = str(torch.accelerator.current_accelerator() or 'cpu')
    if device == 'cuda':
        device = f'cuda:{local_rank}'
    with explain(f'device must be auto, cuda, mps or cpu, and one that is there, not {device!r}',
                 RuntimeError, AssertionError):
        torch.empty(0, device=device)
    torch.backends.cuda.matmul.allow_tf32 = True
    if 'cuda' in device:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group('nccl' if 'cuda' in device else 'gloo')
    return device, rank, world


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def precision(device, dtype):
    """(torch.autocast, name) of 'float32', 'bfloat16' or 'auto', which is what is faster here."""
    kind = torch.device(device).type
    check(dtype in ('auto', 'float32', 'bfloat16'),
          f'dtype must be auto, float32 or bfloat16, but it is {dtype!r}')
    if dtype == 'auto':
        fast = {'cuda': torch.cuda.is_bf16_supported(including_emulation=False),
                'cpu': torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()}
        dtype = 'bfloat16' if fast.get(kind) else 'float32'
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == 'bfloat16'), dtype
