"""How a script starts: its settings, its device, its processes.

Settings are the plain variables at the top of a script. Config files and the command line override
them, and the last one wins:

    python train.py config/digits.py --batch_size=32 --T=0.67,0.33

A config file is Python and is run: use only files that you trust. All that it assigns must be
settings, except for imported modules and names that begin with an underscore.
"""
import ast
import difflib
import os
import pickle
import runpy
import sys
import zipfile
import zlib
from contextlib import contextmanager
from datetime import timedelta
from os.path import abspath, basename, dirname, exists, expanduser, isfile
from types import ModuleType

import torch
import torch.distributed as dist

FILE_ERRORS = (OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile,
               zlib.error)


def check(condition, sentence):
    """Ends the script with one sentence, for a user's mistake, unless the condition holds."""
    if not condition:
        raise SystemExit(f'{basename(sys.argv[0])}: {sentence}')


@contextmanager
def explain(sentence, *more_errors):
    """Ends the script with one sentence, and the reason, if what the user gave cannot be used."""
    try:
        yield
    except FILE_ERRORS + more_errors as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        check(False, f'{sentence} ({reason[:200]})')


def read_config(arg):
    """The settings that a config file assigns. The file may lie beside this one."""
    file = arg
    if not exists(file):
        file = f'{dirname(abspath(__file__))}/{arg}'
    check(file.endswith('.py') and isfile(file),
          f'{arg!r} is neither a config file (NAME.py) nor a setting (--key=value)')
    with explain(f'{arg} cannot be run', SyntaxError, NameError, ArithmeticError):
        assigned = runpy.run_path(file)
    settings = {}
    for key, value in assigned.items():
        if key[0] != '_' and not isinstance(value, ModuleType):
            settings[key] = value
    check(settings, f'{arg} assigns no settings')
    return settings


def convert(value, default, lowest):
    """A setting's value in the type of its default; text is parsed. Raises if it does not fit.

    A number must be at least `lowest`, unless the default is negative.
    """
    kind = type(default)
    if kind is str and type(value) is str:
        return expanduser(value)
    if type(value) is str:
        value = ast.literal_eval(value)
    if kind is tuple:
        if isinstance(value, (int, float)):
            value = [value]
        if not isinstance(value, (tuple, list)):
            raise TypeError(f'its type is {type(value).__name__}')
        return tuple(convert(number, 0.0, lowest) for number in value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f'its type is {type(value).__name__}')
    if default >= 0 and not lowest <= value < 2 ** 63:
        raise ValueError('it is out of range')
    return value


def configure(namespace, at_least_1='', inherit=None):
    """Overrides the settings in `namespace`, a script's globals(), and returns them as a dict.

    Numbers must be at least 0, those named in at_least_1 at least 1; those with a negative default
    may be negative. `inherit` is a function of the settings that returns defaults from elsewhere.
    """
    defaults, given, argv = {}, {}, sys.argv[1:]
    for key, value in namespace.items():
        if key == 'T' or key.islower() and key[0] != '_':
            if isinstance(value, (int, float, str, tuple)):
                defaults[key] = value
    while argv:
        source = argv.pop(0)
        if source == '--help':
            continue
        if source.startswith('--'):
            key, equals, value = source[2:].partition('=')
            if not equals:
                check(argv, f'{source} needs a value: {source}=VALUE')
                value = argv.pop(0)
            assigned = {key: value}
        else:
            assigned = read_config(source)
        for key, value in assigned.items():
            nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
            check(key in defaults, f'{source}: there is no setting {key!r}; the nearest is'
                  f' {nearest!r} (--help lists them all)')
            default, lowest = defaults[key], int(key in at_least_1.split())
            kind = type(default).__name__
            rule = f'of type {kind}, like {default!r}, at least {lowest} and below 2^63'
            if kind == 'bool':
                rule = 'True or False'
            with explain(f'{source}: {key} must be {rule}, not {value!r}',
                         TypeError, SyntaxError, OverflowError):
                given[key] = convert(value, default, lowest)
    settings = defaults | given
    if inherit and (given or '--help' not in sys.argv):
        settings |= inherit(settings) | given
    if '--help' in sys.argv:
        for key, value in settings.items():
            print(f'--{key}={value!r}')
        raise SystemExit
    namespace.update(settings)
    return settings


def changes(there, here, but=()):
    """What differs between two dicts of settings, in words, for the keys that both have."""
    differences = []
    for key in here:
        if key in there and key not in but and there[key] != here[key]:
            differences.append(f'{key} is {there[key]!r} there and {here[key]!r} here')
    return '; '.join(differences)


def launch(device):
    """Joins torchrun's processes, if there are any. Returns (device, rank, number of processes).

    'auto' is a GPU if there is one, 'cuda' is this process's GPU. Float32 matrix products may use
    TF32.
    """
    rank, local_rank = int(os.environ.get('RANK', 0)), os.environ.get('LOCAL_RANK', 0)
    world = int(os.environ.get('WORLD_SIZE', 1))
    if device == 'auto':
        device = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    if device == 'cuda':
        device = f'cuda:{local_rank}'
    with explain(f'device must be auto, cuda, mps or cpu, and be there, not {device!r}',
                 RuntimeError, AssertionError):
        torch.empty(1, device=device).item()
    backend = 'gloo'
    if 'cuda' in device:
        backend = 'nccl'
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    check(0 <= rank < world, f'there is no process {rank} of {world}: start with torchrun')
    if 'WORLD_SIZE' in os.environ:      # even if it is 1
        dist.init_process_group(backend, timeout=timedelta(hours=1))    # for slow evaluations
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')      # process 0 speaks for all
    return device, rank, world


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def precision(device, dtype):
    """torch.autocast and the name of its dtype. 'auto' is bfloat16 where the hardware has it."""
    kind = torch.device(device).type
    check(dtype in ('auto', 'float32', 'bfloat16'),
          f'dtype must be auto, float32 or bfloat16, but it is {dtype!r}')
    if dtype == 'auto':
        dtype = 'float32'
        if kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = 'bfloat16'
        if kind == 'cpu' and (torch.cpu._is_amx_tile_supported()
                              or torch.cpu._is_avx512_bf16_supported()):
            dtype = 'bfloat16'
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == 'bfloat16'), dtype
