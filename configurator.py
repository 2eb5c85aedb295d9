"""
Settings are plain variables at the top of a script; this overrides them from config files and the command line, checked:

    python train.py config/digits.py --batch_size=32 --T=0.67,0.33 --out_dir out-test

A config file is Python that assigns settings, and runs as such: use only files that you trust. Later ones win.
"""
import ast
import difflib
import os
import sys


def configure(namespace, argv=None):
    """
    Overrides the settings in `namespace` (a script's globals(): every name but the likes of __file__ and CONSTANT that holds a plain value)
    from argv, sys.argv[1:] by default, and returns all settings as a dict. Errors end the script with one sentence.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = {key: value for key, value in namespace.items()
                if isinstance(value, (bool, int, float, str, tuple)) and not key.startswith('_')
                and not (key.isupper() and len(key) > 1)}
    given = {}

    def check(key, value, source):
        """The value as the type of the setting's default, or the end of the script."""
        if key not in settings:
            nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)[0]
            raise SystemExit(f'{source}: there is no setting {key!r}; the nearest is {nearest!r} (--help lists them all)')
        kind = type(settings[key])
        if kind is tuple and type(value) in (int, float):
            value = (value,)
        if kind is tuple and type(value) in (tuple, list) and all(type(v) in (int, float) for v in value):
            return tuple(float(v) for v in value)
        if kind is float and type(value) is int:
            return float(value)
        if kind is tuple or type(value) is not kind:
            expected = 'a tuple of numbers' if kind is tuple else f'{kind.__name__}, like {settings[key]!r}'
            raise SystemExit(f'{source}: {key} must be {expected}, but it is {value!r}')
        return value

    while argv:
        arg = argv.pop(0)
        if arg in ('--help', '-h'):
            raise SystemExit('\n'.join(f'--{key}={value!r}' for key, value in settings.items()))
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals:
                check(key, settings.get(key), 'command line')
                if not argv or argv[0].startswith('--'):
                    raise SystemExit(f'command line: --{key} needs a value: --{key}={settings[key]!r}')
                text = argv.pop(0)
            try:
                value = text if type(settings.get(key)) is str else ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            given[key] = check(key, value, 'command line')
            continue
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), arg)
        config_file = arg if os.path.isfile(arg) else beside
        if not arg.endswith('.py') or not os.path.isfile(config_file):
            raise SystemExit(f'{arg!r} is neither a config file (NAME.py) nor a setting (--key=value)')
        values = {}
        with open(config_file) as f:
            exec(compile(f.read(), config_file, 'exec'), values)
        given |= {key: check(key, value, arg) for key, value in values.items()
                  if not key.startswith('_') and not isinstance(value, type(ast))}
    namespace.update(given)
    return settings | given
