"""Settings, what is refused in one sentence before anything happens, and how a script settles on its device."""
import ast
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import ROOT, run_in
from configurator import autocast_for, barrier, check, configure, exit_on_error, launch

DEFAULTS = dict(T=(0.5,), rate=2e-4, iters=100, flag=False, name='a', path='linear', _private=1, CONSTANT=2)


@pytest.fixture(autouse=True)
def _script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/somewhere/script.py'])


def settings(*argv):
    namespace = dict(DEFAULTS)
    sys.argv[1:] = argv
    configured = configure(namespace)
    assert all(namespace[key] == value for key, value in configured.items())
    assert '_private' not in configured and 'CONSTANT' not in configured
    return configured


@pytest.mark.parametrize('argv, key, value', (
    (['--T=0.67,0.33'], 'T', (0.67, 0.33)), (['--T=(0.67,0.33)'], 'T', (0.67, 0.33)),
    (['--T', '0.67,0.33'], 'T', (0.67, 0.33)), (['--T=0.5'], 'T', (0.5,)), (['--T=()'], 'T', ()),
    (['--T=1,0.5'], 'T', (1.0, 0.5)), (['--T=[0.67, 0.33]'], 'T', (0.67, 0.33)),
    (['--rate=1'], 'rate', 1.0), (['--rate', '1e-3'], 'rate', 1e-3), (['--rate', '0'], 'rate', 0.0),
    (['--iters=7'], 'iters', 7), (['--iters=0'], 'iters', 0), (['--flag=True'], 'flag', True),
    (['--flag', 'False'], 'flag', False),
    (['--name=7'], 'name', '7'), (['--name='], 'name', ''), (['--name', 'x=y'], 'name', 'x=y'),
    (['--iters=1', '--iters=2'], 'iters', 2)))
def test_values_arrive_with_the_settings_type(argv, key, value):
    result = settings(*argv)
    assert result[key] == value and type(result[key]) is type(value) and {*map(type, result['T'])} <= {float}
    defaults = {k: v for k, v in DEFAULTS.items() if k in result and k != key}
    assert {k: v for k, v in result.items() if k != key} == defaults


@pytest.mark.parametrize('argv, words', (
    (['--itres=7'], ("'itres'", "'iters'")), (['--itres', '7'], ("'itres'", "'iters'")),
    (['--CONSTANT=3'], ("'CONSTANT'",)), (['--_private=3'], ("'_private'",)),
    (['--iters=1.5'], ('iters', 'like 100', '1.5')), (['--iters=many'], ('iters', 'like 100', 'many')),
    (['--iters=True'], ('iters', 'like 100')), (['--rate=fast'], ('rate', 'like 0.0002', 'fast')),
    (['--flag=1'], ('flag', 'like False')), (['--T=half'], ('T', 'like (0.5,)')),
    (["--T=('a',)"], ('T', 'like (0.5,)')), (['--T='], ('T', 'like (0.5,)')), (['--T=None'], ('T', '(0.5,)', 'None')),
    (['--iters'], ('--iters', 'needs a value')), (['--iters', '--flag=True'], ('iters', '100', "'--flag=True'")),
    (['nothing.py'], ('nothing.py', 'config file')), (['iters=3'], ('iters=3', '--key=value'))))
def test_mistakes_end_with_one_sentence(argv, words):
    with pytest.raises(SystemExit) as end:
        settings(*argv)
    sentence = str(end.value)
    assert all(word in sentence for word in words) and '\n' not in sentence, sentence
    assert sentence.startswith('script.py: ') and sentence.count('script.py') == 1


def test_config_files_come_first_to_last_before_options_and_are_checked(tmp_path, monkeypatch):
    (tmp_path / 'a.py').write_text('import math\n_half = 1 / 2\nT = _half\nrate = 3\niters = 5\n')
    (tmp_path / 'b.py').write_text('iters = 8\nname = "b"\n')
    (tmp_path / 'typo.py').write_text('itres = 5\n')
    (tmp_path / 'type.py').write_text('iters = 0.5\n')
    (tmp_path / 'broken.py').write_text('iters = 5\nrate = = 3\n')
    monkeypatch.chdir(tmp_path)
    result = settings('--iters=6', 'a.py', '--rate=4')
    assert (result['T'], result['rate'], result['iters']) == ((0.5,), 4.0, 6)
    for files, iters in (('a.py', 'b.py'), 8), (('b.py', 'a.py'), 5):
        result = settings(*files, '--rate=4')
        assert (result['T'], result['rate'], result['iters'], result['name']) == ((0.5,), 4.0, iters, 'b')
    for file, words in (('typo.py', ("'itres'", "'iters'", 'typo.py')), ('type.py', ('iters', 'like 100', 'type.py')),
                        ('broken.py', ('broken.py', 'SyntaxError'))):
        with pytest.raises(SystemExit) as end:
            settings(file)
        assert all(word in str(end.value) for word in words) and '\n' not in str(end.value)


@pytest.mark.parametrize('text, words', (
    ('T = None', ('T', '(0.5,)', 'None')), ('T = (0.5, None)', ('T', '(0.5,)')), ('T = {0.5: 1}, 1', ('T', '(0.5,)')),
    ('import numpy as np\niters = np.int64(3)', ('iters', '100', '3')), ('iters = 3.0', ('iters', '100', '3.0')),
    ('name = 3', ('name', "like 'a'", '3')), ('flag = 1', ('flag', 'like False')),
    ('from math import pi', ("'pi'",)), ('def double(x):\n    return 2 * x', ("'double'",)),
    ('HALF = 0.5', ("'HALF'",)), ('rates = [1]', ("'rates'", "'rate'"))))
def test_a_config_file_assigns_settings_and_nothing_else(text, words, tmp_path):
    (tmp_path / 'a.py').write_text(text + '\n')
    with pytest.raises(SystemExit) as end:
        settings(str(tmp_path / 'a.py'))
    assert all(word in str(end.value) for word in ('a.py', *words)) and '\n' not in str(end.value), end.value


def test_a_config_file_is_a_file_of_python(tmp_path):
    (tmp_path / 'a.json').write_text('{"iters": 3}')
    (tmp_path / 'folder.py').mkdir()
    for name in ('a.json', 'folder.py', ''):
        with pytest.raises(SystemExit, match='is neither a config file .NAME.py. nor a setting'):
            settings(str(tmp_path / name))
    (tmp_path / 'a.py').write_text('import math\nimport os.path\n_two = 2\nrate = math.sqrt(_two * _two)\n')
    assert settings(str(tmp_path / 'a.py'))['rate'] == 2.0


RANGES = (('learning_rate', '-1'), ('learning_rate', '1e999'), ('learning_rate', '-1e999'),
          ('learning_rate', 'float("nan")'), ('learning_rate', 'float("inf")'), ('seed', '-1'), ('batch_size', '-64'),
          ('T', '(-0.5,)'), ('T', '(0.5, -0.1)'), ('T', '(0.5, float("nan"))'), ('loss_weights', '(1e999, 1)'))


@pytest.mark.parametrize('key, value', RANGES)
def test_numbers_out_of_range_are_refused(key, value, run, tmp_path):
    """In a config file and on the command line, where a number is a literal."""
    (tmp_path / 'a.py').write_text(f'{key} = {value}\n')
    for arg in (str(tmp_path / 'a.py'), f'--{key}={value}'):
        printed, message = run('train.py', arg, '--help')       # which would end it, too
        assert message.startswith(f'train.py: {arg}: {key} must be ') and printed == '', message
        assert ('out of range' in message or 'malformed' in message) and '\n' not in message, message


@pytest.mark.parametrize('script, key', [
    *[('train.py', key) for key in ('eval_interval', 'log_interval', 'eval_images', 'sample_images', 'max_iters',
                                    'batch_size', 'steps', 'gradient_accumulation_steps', 'patch', 'width', 'depth',
                                    'heads')],
    *[('sample.py', key) for key in ('num_samples', 'batch_size', 'steps')],
    ('data.py', 'size'), ('data.py', 'batch_size'), ('fid.py', 'batch_size')])
def test_what_must_be_at_least_1_is_said(script, key, run, tmp_path):
    torch.save(dict(config=dict(method='heun2', steps=9, tol=0.25, cfg=2.0), model_args={}, data={}),
               tmp_path / 'ckpt.pt')
    ckpt = [f'--ckpt={tmp_path}/ckpt.pt'] if script == 'sample.py' else []
    message = run(script, *ckpt, f'--{key}=0')[1]
    assert message.startswith(f'{script}: ') and 'must be at least 1' in message and '\n' not in message, message


def test_the_bounds_themselves_are_in_range():
    assert settings('--rate=0', '--iters=0', '--T=0,0') == settings() | dict(rate=0.0, iters=0, T=(0.0, 0.0))
    result = settings('--iters=1', '--T=1', '--flag=False')
    assert (result['iters'], result['T'], result['flag']) == (1, (1.0,), False)
    assert settings(f'--iters={2 ** 63 - 1}')['iters'] == 2 ** 63 - 1


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    (tmp_path / 'a.py').write_text("path = '~/data/x'\n")
    result = settings(str(tmp_path / 'a.py'), '--name=~/out')
    assert (result['name'], result['path']) == ('/home/someone/out', '/home/someone/data/x')
    assert settings('--name', '~')['name'] == '/home/someone' and settings('--name=a~b')['name'] == 'a~b'


@pytest.mark.parametrize('place', (0, 1, 2))
def test_help_shows_what_would_be_used(place, tmp_path, capsys):
    (tmp_path / 'a.py').write_text('rate = 3\nflag = True\n')
    argv = [str(tmp_path / 'a.py'), '--iters=7']
    argv.insert(place, '--help')
    with pytest.raises(SystemExit) as end:
        settings(*argv)
    expected = ['--T=(0.5,)', '--rate=3.0', '--iters=7', '--flag=True', "--name='a'", "--path='linear'"]
    assert not end.value.code and capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize('script', ('train.py', 'sample.py', 'data.py', 'fid.py'))
def test_help_lists_every_setting_of_a_script(script, run):
    given = dict(device='x') | (dict(ckpt='none.pt', steps=7) if script == 'sample.py' else {})
    printed, message = run(script, *[f'--{key}={value}' for key, value in given.items()], '--help')
    expected = script_defaults(script) | given
    assert message == '' and printed.splitlines() == [f'--{key}={value!r}' for key, value in expected.items()]


def test_the_repositorys_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sys.argv[1:] = ['config/digits.py']
    assert configure(script_defaults('train.py'))['out_dir'] == 'out-digits'


def script_block(script):
    """The statements of a script: of its main block, if it has one; and the index of the one that calls configure."""
    block = ast.parse(Path(ROOT, script).read_text()).body
    if isinstance(block[-1], ast.If) and ast.unparse(block[-1].test) == "__name__ == '__main__'":
        block = block[-1].body
    return block, next(i for i, node in enumerate(block) if 'configure(globals()' in ast.unparse(node))


def script_defaults(script):
    """The settings of a script: every plain assignment of a literal above its call of configure."""
    block, end = script_block(script)
    return {node.targets[0].id: ast.literal_eval(node.value) for node in block[:end] if isinstance(node, ast.Assign)}


@pytest.mark.parametrize('script', ('train.py', 'sample.py', 'data.py', 'fid.py'))
def test_no_setting_is_dead(script):
    """Every setting of a script is read by its code, or is a field that LapFlowConfig takes."""
    from model import LapFlowConfig
    block, end = script_block(script)
    nodes = [node for statement in block[end + 1:] for node in ast.walk(statement) if isinstance(node, ast.Name)]
    read = {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
    fields = set(LapFlowConfig.__dataclass_fields__) if script == 'train.py' else set()
    assert len(script_defaults(script)) > 7 and set(script_defaults(script)) - read - fields == set()


@pytest.mark.parametrize('config', sorted(file for file in os.listdir(f'{ROOT}/config') if file.endswith('.py')))
def test_every_config_file_is_valid(config):
    sys.argv[1:] = [f'{ROOT}/config/{config}']
    assert configure(script_defaults('train.py'))['out_dir']


def test_exit_on_error_turns_errors_into_a_sentence():
    check(True, 'nothing')
    with pytest.raises(SystemExit) as end, exit_on_error('it failed'):
        raise KeyError('line\n   break ' + 'x' * 1000)
    assert str(end.value).startswith("script.py: it failed (KeyError: 'line\\n break xxx") and len(str(end.value)) < 300
    for error, reason in (
            (FileNotFoundError('a\n\n  b'), 'FileNotFoundError: a b'),
            (FileNotFoundError(2, 'a\n\n  b'), 'FileNotFoundError: [Errno 2] a b'),
            (PermissionError(), 'PermissionError:'), (EOFError(), 'EOFError:'), (ValueError(), 'ValueError:'),
            (UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'x'),
             "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: x"),
            (json.JSONDecodeError('x', '', 0), 'JSONDecodeError: x: line 1 column 1 (char 0)'),
            (KeyError('x'), "KeyError: 'x'"), (pickle.UnpicklingError(), 'UnpicklingError:'),
            (zipfile.BadZipFile(), 'BadZipFile:'), (TypeError(), 'TypeError:'),
            (RuntimeError('a\nb'), 'RuntimeError: a b'), (AssertionError(), 'AssertionError:')):
        with pytest.raises(SystemExit) as end, exit_on_error('it failed'):
            raise error
        assert str(end.value) == f'script.py: it failed ({reason})' and '\n' not in str(end.value)
    with pytest.raises(KeyboardInterrupt), exit_on_error('it failed'):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match='^script.py: within$'), exit_on_error('it failed'):
        check(False, 'within')


def test_exit_on_error_takes_the_kind_that_is_the_users():
    with pytest.raises(SystemExit, match='^script.py: it failed [(]ValueError: x[)]$'):
        with exit_on_error('it failed', ValueError):
            raise ValueError('x')
    for error in (KeyError, TypeError, RuntimeError, AssertionError, NameError):
        with pytest.raises(error), exit_on_error('it failed', ValueError):
            raise error


# --- What was begun ---------------------------------------------------------------------------------------------------

def test_a_folder_of_comparisons_is_of_one_setting(workplace, tmp_path, monkeypatch):
    """compare.py: settings.json says which, is whole or not there, and stays as it is."""
    compare = lambda *args: run_in(workplace, 'tests/compare.py', f'--out_dir={tmp_path}/deep/x', *args)
    with monkeypatch.context() as killed:
        killed.setattr(os, 'replace', lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare('--patch=2', '--extra=--T=0.3')
    assert os.listdir(tmp_path / 'deep' / 'x') == ['settings.json.tmp']
    # Nothing was begun. The dataset, which is not there, ends these before they train.
    work = dict(dataset='none', patch=4, num_samples=2000, extra='--cfg=1 é', width=128, depth=4, heads=4)
    for _ in range(2):
        assert 'data/none is not a' in compare('--dataset=none', '--extra=--cfg=1 é')
        assert json.loads((tmp_path / 'deep' / 'x' / 'settings.json').read_text()) == work
    message = compare('--dataset=none', '--extra=--cfg=1 é', '--patch=2')
    assert 'x was begun with other settings (patch is 4 there and 2 here): give another --out_dir' in message
    assert json.loads((tmp_path / 'deep' / 'x' / 'settings.json').read_text()) == work
    (tmp_path / 'deep' / 'x' / 'settings.json').write_text('{')
    assert 'cannot use' in compare('--dataset=none') and '\n' not in compare('--dataset=none')


# --- Devices ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('avx512, dtype, expected', (
    (True, 'auto', 'bfloat16'), (False, 'auto', 'float32'), (True, 'float32', 'float32'),
    (False, 'bfloat16', 'bfloat16')))
def test_auto_is_bfloat16_where_a_cpu_multiplies_it(avx512, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
    autocast, name = autocast_for('cpu', dtype)
    with autocast:
        assert name == expected and (torch.eye(2) @ torch.eye(2)).dtype == getattr(torch, expected)


@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
@pytest.mark.parametrize('native', (True, False))
def test_auto_is_bfloat16_where_a_gpu_multiplies_it(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: not native)
    assert autocast_for('cuda:0', 'auto')[1] == ('bfloat16' if native else 'float32')


def test_another_dtype_or_device_is_refused():
    with pytest.raises(SystemExit, match="dtype must be auto, float32 or bfloat16: float16$"):
        autocast_for('cpu', 'float16')
    for device in ('gpu', 'cpu:x', ''):
        with pytest.raises(SystemExit, match=f'^script.py: device must be .*{device!r}'):
            launch(device)
    assert launch('cpu') == ('cpu', 0, 1)
    barrier()       # of one process: nothing to wait for


def test_a_missing_checkpoint_is_said_and_help_needs_none(run):
    printed, message = run('sample.py', '--ckpt=none.pt')
    assert printed == ''
    assert message.startswith("sample.py: 'none.pt' is no checkpoint of this train.py, or is damaged")
    assert 'No such file' in message and '\n' not in message
    printed, message = run('sample.py', '--help')
    assert message == '' and "--ckpt='out/ckpt.pt'" in printed.splitlines()
