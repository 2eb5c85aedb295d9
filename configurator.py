"""
Settings are plain variables at the top of a script. Config files and the command line override them, later ones win:

    python train.py config/digits.py --batch_size=32 --T=0.67,0.33 --out_dir out-test

A config file is Python that assigns settings, and is run as such: use only files that you trust.
"""
import ast
import difflib
import fcntl
import json
import os
import shutil
import sys


def checked(settings, key, value, source):
    """The value for a setting, as the type of its default; or the end of the script, with a sentence."""
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)[0]
        raise SystemExit(f'{source}: there is no setting {key!r}; the nearest is {nearest!r} (--help lists them all)')
    kind, numbers = type(settings[key]), value if isinstance(value, (tuple, list)) else (value,)
    if kind is tuple and all(type(v) in (int, float) for v in numbers):
        return tuple(float(v) for v in numbers)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple or type(value) is not kind:
        expected = {tuple: 'a tuple of numbers, like 0.67,0.33 or ()', bool: 'True or False'}
        expected = expected.get(kind, f'{kind.__name__}, like {settings[key]!r}')
        raise SystemExit(f'{source}: {key} must be {expected}, but it is {value!r}')
    return value


def in_words(error):
    """An exception in one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


def changes(there, here):
    """What differs between two dicts of settings, in words, for each key of the second."""
    return [f'{key} is {there.get(key)!r} there and {here[key]!r} here' for key in here if there.get(key) != here[key]]


def claim(folder, settings):
    """Writes down in a folder what settings it is made with; ends the script if it was begun with others."""
    file = os.path.join(folder, 'settings.json')
    if os.path.exists(file):
        with open(file) as f:
            differences = changes(json.load(f), settings)
        if differences:
            raise SystemExit(f'{folder} was begun with other settings ({"; ".join(differences)}): '
                             'go on with the same, choose another folder, or delete it')
    else:
        with open(file + '.tmp', 'w') as f:
            json.dump(settings, f, indent=1)
        os.replace(file + '.tmp', file)


def hold(file, held=[]):
    """
    Makes a file, with its folders, and locks it until this process ends (`held` keeps it open). Ends the script with a
    sentence if another process has done so, or if nothing can be written there.
    """
    try:
        os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
        held.append(open(file, 'w'))
        fcntl.lockf(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        if shutil.disk_usage(file).free < 2 ** 20:
            raise OSError(f'the disk of {file} is full')
    except BlockingIOError:
        raise SystemExit(f'another process is writing here ({file} is locked): wait for it, or choose another place')
    except OSError as error:
        raise SystemExit(f'cannot write here: {error}')


def configure(namespace, argv=None):
    """
    Overrides the settings in `namespace`, a script's globals(): its plain values, but for _names and CONSTANTS. argv is
    that of the command line by default. Returns all settings as a dict. Mistakes end the script with one sentence.
    """
    argv, here = list(sys.argv[1:] if argv is None else argv), os.path.dirname(os.path.abspath(__file__))
    settings = {key: value for key, value in namespace.items() if isinstance(value, (bool, int, float, str, tuple))
                and not key.startswith('_') and not (key.isupper() and len(key) > 1)}
    while argv:
        arg, values = argv.pop(0), {}
        if arg in ('--help', '-h'):
            raise SystemExit('\n'.join(f'--{key}={value!r}' for key, value in settings.items()))
        if arg.startswith('--'):
            source = 'command line'
            key, equals, text = arg[2:].partition('=')
            if not equals and (not argv or argv[0].startswith('--')):
                raise SystemExit(f'{source}: {arg} needs a value: {arg}=VALUE')
            text = text if equals else argv.pop(0)
            try:
                values[key] = text if isinstance(settings.get(key), str) else ast.literal_eval(text)
            except (ValueError, SyntaxError):
                values[key] = text
        else:
            source = next((file for file in (arg, os.path.join(here, arg)) if os.path.isfile(file)), '')
            if not source.endswith('.py'):
                raise SystemExit(f'{arg!r} is neither a config file (NAME.py) nor a setting (--key=value)')
            with open(source) as f:
                exec(compile(f.read(), source, 'exec'), values)
            values = {k: v for k, v in values.items() if not k.startswith('_') and not isinstance(v, type(ast))}
        settings |= {key: checked(settings, key, value, source) for key, value in values.items()}
    namespace.update(settings)
    return settings
