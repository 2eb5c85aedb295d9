"""How a script starts: its settings, its device, its processes.

Settings are a script's plain variables above its call of `configure`. Config files override them,
from left to right, and options override config files, wherever they stand:

    python train.py config/digits.py --batch_size=32 --T=0.67,0.33

A config file is Python and is run: use only files that you trust.
"""
import ast
import difflib
import math
import os
import runpy
import sys
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist


def check(condition, sentence):
    """If the condition fails, ends the script with one sentence: for a user's mistake."""
    if not condition:
        raise SystemExit(f'{os.path.basename(sys.argv[0])}: {sentence}')


@contextmanager
def exit_on_error(sentence, kind=Exception):
    """Ends the script with the sentence and the reason, if what the user gave cannot be used.

    Around one call of a library any error counts. Around other code name the user's kind.
    """
    try:
        yield
    except kind as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        check(False, f'{sentence} ({reason[:200]})')


def read_config(arg):
    """What a config file assigns, {key: value}, without modules and _names."""
    file = arg
    if not os.path.exists(file):        # or beside this file
        file = f'{os.path.dirname(os.path.abspath(__file__))}/{arg}'
    check(file.endswith('.py') and os.path.isfile(file),
          f'{arg!r} is neither a config file (NAME.py) nor a setting (--key=value)')
    with exit_on_error(f'{arg} cannot be run'):
        assigned = runpy.run_path(file)
    return {key: value for key, value in assigned.items()
            if key[0] != '_' and not isinstance(value, ModuleType)}


def convert(value, default):
    """A setting's value in the type of its default; text is parsed. Raises if it does not fit.

    Numbers must be finite, and not negative unless the default is.
    """
    if type(default) is str and type(value) is str:
        return os.path.expanduser(value)
    if type(value) is str:
        value = ast.literal_eval(value)
    if type(default) is tuple:
        numbers = value if isinstance(value, (tuple, list)) else [value]
        return tuple(convert(number, 0.0) for number in numbers)
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise TypeError(f'{value!r} is of type {type(value).__name__}')
    if not math.isfinite(value) or value < 0 <= default:
        raise ValueError(f'{value} is out of range')
    return value


def configure(namespace):
    """Overrides the settings in `namespace`, a script's globals(), and returns them as a dict."""
    if hasattr(sys.stdout, 'reconfigure'):      # lines show at once, odd letters as \u..
        sys.stdout.reconfigure(line_buffering=True, errors='backslashreplace')
    settings = {key: value for key, value in namespace.items()
                if (key == 'T' or key.islower()) and key[0] != '_'
                and isinstance(value, (int, float, str, tuple))}
    argv = [arg for arg in sys.argv[1:] if arg != '--help']
    files, options = [], []
    while argv:
        arg = argv.pop(0)
        if arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')
            check(equals or argv, f'{arg} needs a value: {arg}=VALUE')
            options.append((arg, key, value if equals else argv.pop(0)))
        else:
            files += [(arg, *setting) for setting in read_config(arg).items()]
    for source, key, value in files + options:
        check(key in settings, f'{source}: there is no setting {key!r}; near it: '
              f'{difflib.get_close_matches(key, settings, n=1)}')
        with exit_on_error(f'{source}: {key} must be like {settings[key]!r}, not {value!r}'):
            settings[key] = convert(value, settings[key])
    if '--help' in sys.argv:
        print(namespace['__doc__'])
        for key, value in settings.items():
            print(f'--{key}={value!r}')
        raise SystemExit
    namespace.update(settings)
    return settings


def launch(device):
    """Joins torchrun's processes, if there are any. Returns (device, rank, number of processes).

    'auto' is a GPU if there is one, and 'cuda' this process's GPU. Matrix products may use TF32.
    """
    if device == 'auto':
        device = str(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
    if device == 'cuda':
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    with exit_on_error(f'device must be auto, cuda, mps or cpu, and be there, not {device!r}'):
        torch.empty(1, device=device).item()
    backend = 'nccl' if device.startswith('cuda') else 'gloo'
    if backend == 'nccl':
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    rank, world = 0, 1
    if 'WORLD_SIZE' in os.environ:      # torchrun's, even if it is 1
        dist.init_process_group(backend, timeout=timedelta(hours=1))    # for slow evaluations
        rank, world = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # process 0 speaks for all
    return device, rank, world


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def check_alike(value, sentence):
    """Ends all processes with one sentence, unless they have the same value."""
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        check(values.count(value) == len(values), f'processes differ: {sentence}')


def all_sum(tensor):
    """The sum of a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def autocast_for(device, dtype):
    """torch.autocast and the name of its dtype. 'auto' is bfloat16 where the hardware has it."""
    kind = torch.device(device).type
    fast = (kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
            or kind == 'cpu' and torch.cpu._is_avx512_bf16_supported())
    if dtype == 'auto':
        dtype = 'bfloat16' if fast else 'float32'
    check(dtype in ('float32', 'bfloat16'), f'dtype must be auto, float32 or bfloat16: {dtype}')
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == 'bfloat16'), dtype
