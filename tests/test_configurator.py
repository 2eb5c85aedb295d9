"""Config files and --key=value: what is taken, and what is refused in one sentence before anything happens."""
import ast
import os

import pytest

from conftest import ROOT
from configurator import configure

DEFAULTS = dict(T=(0.5,), rate=2e-4, iters=100, flag=False, name='a', path='linear', _private=1, CONSTANT=2)


def settings(*argv):
    namespace = dict(DEFAULTS)
    configured = configure(namespace, list(argv))
    assert all(namespace[key] == value for key, value in configured.items())
    assert '_private' not in configured and 'CONSTANT' not in configured
    return configured


@pytest.mark.parametrize('argv, key, value', (
    (['--T=0.67,0.33'], 'T', (0.67, 0.33)), (['--T=(0.67,0.33)'], 'T', (0.67, 0.33)),
    (['--T', '0.67,0.33'], 'T', (0.67, 0.33)), (['--T=0.5'], 'T', (0.5,)), (['--T=()'], 'T', ()),
    (['--T=1,0.5'], 'T', (1.0, 0.5)), (['--T=[0.67, 0.33]'], 'T', (0.67, 0.33)),
    (['--rate=1'], 'rate', 1.0), (['--rate', '1e-3'], 'rate', 1e-3), (['--rate', '-1'], 'rate', -1.0),
    (['--iters=7'], 'iters', 7), (['--flag=True'], 'flag', True), (['--flag', 'False'], 'flag', False),
    (['--name=7'], 'name', '7'), (['--name='], 'name', ''), (['--name', 'x=y'], 'name', 'x=y'),
    (['--iters=1', '--iters=2'], 'iters', 2)))
def test_values_arrive_with_the_settings_type(argv, key, value):
    result = settings(*argv)
    assert result[key] == value and type(result[key]) is type(value)
    defaults = {k: v for k, v in DEFAULTS.items() if k in result and k != key}
    assert {k: v for k, v in result.items() if k != key} == defaults


@pytest.mark.parametrize('argv, words', (
    (['--itres=7'], ("'itres'", "'iters'")), (['--itres', '7'], ("'itres'", "'iters'")),
    (['--CONSTANT=3'], ("'CONSTANT'",)),
    (['--iters=1.5'], ('iters', 'int', '1.5')), (['--iters=many'], ('iters', 'int', 'many')),
    (['--iters=True'], ('iters', 'int')), (['--rate=fast'], ('rate', 'float', 'fast')),
    (['--flag=1'], ('flag', 'True or False')), (['--T=half'], ('T', 'tuple of numbers')),
    (["--T=('a',)"], ('T', 'tuple of numbers')), (['--T=True'], ('T', 'tuple of numbers')),
    (['--iters'], ('--iters', 'needs a value')),
    (['--iters', '--flag=True'], ('--iters', 'needs a value')), (['nothing.py'], ('nothing.py', 'config file')),
    (['iters=3'], ('iters=3', '--key=value')), (['--help'], ('--iters=100', "--path='linear'"))))
def test_mistakes_end_with_one_sentence(argv, words):
    with pytest.raises(SystemExit) as end:
        settings(*argv)
    assert all(word in str(end.value) for word in words), end.value


def test_config_files_come_first_to_last_and_are_checked(tmp_path, monkeypatch):
    (tmp_path / 'a.py').write_text('import math\n_half = 1 / 2\nT = _half\nrate = 3\niters = 5\n')
    (tmp_path / 'typo.py').write_text('itres = 5\n')
    (tmp_path / 'type.py').write_text('iters = 0.5\n')
    monkeypatch.chdir(tmp_path)
    result = settings('--iters=6', 'a.py', '--rate=4')
    assert (result['T'], result['rate'], result['iters']) == ((0.5,), 4.0, 5)
    for file, words in (('typo.py', ("'itres'", "'iters'", 'typo.py')), ('type.py', ('iters', 'int', 'type.py'))):
        with pytest.raises(SystemExit) as end:
            settings(file)
        assert all(word in str(end.value) for word in words)


def test_the_repositorys_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure(train_defaults(), ['config/digits.py'])['out_dir'] == 'out-digits'


def train_defaults(script='train.py'):
    """The settings block of a script: every plain assignment of a literal above its call of configure."""
    with open(os.path.join(ROOT, script)) as f:
        tree = ast.parse(f.read())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id not in found:
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass
    return {key: value for key, value in found.items() if not key.isupper() or key == 'T'}


@pytest.mark.parametrize('script', ('train.py', 'sample.py'))
def test_no_setting_is_dead(script):
    """Every setting of a script is read by its code, or is a field that LapFlowConfig takes."""
    from model import LapFlowConfig
    with open(os.path.join(ROOT, script)) as f:
        tree = ast.parse(f.read())
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert set(train_defaults(script)) - read - set(LapFlowConfig.__dataclass_fields__) == set()


@pytest.mark.parametrize('config', sorted(os.listdir(os.path.join(ROOT, 'config'))))
def test_every_config_file_is_valid(config):
    if config.endswith('.py'):
        assert configure(train_defaults(), [os.path.join(ROOT, 'config', config)])['out_dir']
