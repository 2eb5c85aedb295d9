"""Settings, what is refused in one sentence before anything happens, and how a script settles on folder and device."""
import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from configurator import barrier, changes, check, claim, configure, explain, launch, precision, write_json

DEFAULTS = dict(T=(0.5,), rate=2e-4, iters=100, flag=False, name='a', path='linear', _private=1, CONSTANT=2)


@pytest.fixture(autouse=True)
def _script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/somewhere/script.py'])


def settings(*argv, **options):
    namespace = dict(DEFAULTS)
    configured = configure(namespace, list(argv), **options)
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
    assert result[key] == value and type(result[key]) is type(value) and {*map(type, result['T'])} <= {float}
    defaults = {k: v for k, v in DEFAULTS.items() if k in result and k != key}
    assert {k: v for k, v in result.items() if k != key} == defaults


@pytest.mark.parametrize('argv, words', (
    (['--itres=7'], ("'itres'", "'iters'")), (['--itres', '7'], ("'itres'", "'iters'")),
    (['--CONSTANT=3'], ("'CONSTANT'",)), (['--_private=3'], ("'_private'",)),
    (['--iters=1.5'], ('iters', 'int', '1.5')), (['--iters=many'], ('iters', 'int', 'many')),
    (['--iters=True'], ('iters', 'int')), (['--rate=fast'], ('rate', 'float', 'fast')),
    (['--flag=1'], ('flag', 'bool', 'like False')), (['--T=half'], ('T', 'tuple', 'like (0.5,)')),
    (["--T=('a',)"], ('T', 'tuple')), (['--T='], ('T', 'tuple')), (['--iters'], ('--iters', 'needs a value')),
    (['--iters', '--flag=True'], ('iters', 'int', "'--flag=True'")), (['nothing.py'], ('nothing.py', 'config file')),
    (['iters=3'], ('iters=3', '--key=value'))))
def test_mistakes_end_with_one_sentence(argv, words):
    with pytest.raises(SystemExit) as end:
        settings(*argv)
    sentence = str(end.value)
    assert all(word in sentence for word in words) and '\n' not in sentence, sentence
    assert sentence.startswith('script.py: ') and sentence.count('script.py') == 1


def test_config_files_come_first_to_last_and_are_checked(tmp_path, monkeypatch):
    (tmp_path / 'a.py').write_text('import math\n_half = 1 / 2\nT = _half\nrate = 3\niters = 5\n')
    (tmp_path / 'typo.py').write_text('itres = 5\n')
    (tmp_path / 'type.py').write_text('iters = 0.5\n')
    (tmp_path / 'broken.py').write_text('iters = 5\nrate = = 3\n')
    monkeypatch.chdir(tmp_path)
    result = settings('--iters=6', 'a.py', '--rate=4')
    assert (result['T'], result['rate'], result['iters']) == ((0.5,), 4.0, 5)
    for file, words in (('typo.py', ("'itres'", "'iters'", 'typo.py')), ('type.py', ('iters', 'int', 'type.py')),
                        ('broken.py', ('broken.py', 'SyntaxError'))):
        with pytest.raises(SystemExit) as end:
            settings(file)
        assert all(word in str(end.value) for word in words) and '\n' not in str(end.value)


def test_inherited_defaults_rank_below_config_files_and_the_command_line(tmp_path):
    (tmp_path / 'a.py').write_text('rate = 3\n')
    asked = []

    def inherit(settings):
        asked.append((settings['name'], settings['rate'], settings['iters'], settings['flag']))
        return dict(rate=9.0, iters=9, flag=True)
    result = settings(str(tmp_path / 'a.py'), '--iters=100', '--name=b', inherit=inherit)
    assert result == dict(T=(0.5,), rate=3.0, iters=100, flag=True, name='b', path='linear')    # 100 is also a default
    assert asked == [('b', 3.0, 100, False)]


@pytest.mark.parametrize('place', (0, 1, 2))
def test_help_shows_what_would_be_used(place, tmp_path, capsys):
    (tmp_path / 'a.py').write_text('rate = 3\nflag = True\n')
    argv = [str(tmp_path / 'a.py'), '--iters=7']
    argv.insert(place, '--help')
    with pytest.raises(SystemExit) as end:
        settings(*argv, inherit=lambda settings: dict(name=settings['name'] * 2, rate=9.0, iters=9))
    expected = ['--T=(0.5,)', '--rate=3.0', '--iters=7', '--flag=True', "--name='aa'", "--path='linear'"]
    assert not end.value.code and capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize('script', ('train.py', 'sample.py', 'data.py', 'fid.py'))
def test_help_lists_every_setting_of_a_script(script, run, tmp_path):
    inherited = dict(method='heun2', steps=9, tol=0.25, cfg=2.0) if script == 'sample.py' else {}
    torch.save(dict(config=inherited, model_args={}), tmp_path / 'ckpt.pt')
    given = dict(device='x') | (dict(ckpt=str(tmp_path / 'ckpt.pt'), steps=7) if inherited else {})
    printed, message = run(script, *[f'--{key}={value}' for key, value in given.items()], '--help')
    expected = script_defaults(script) | inherited | given
    assert message == '' and printed.splitlines() == [f'--{key}={value!r}' for key, value in expected.items()]


def test_the_repositorys_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure(script_defaults('train.py'), ['config/digits.py'])['out_dir'] == 'out-digits'


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
    assert configure(script_defaults('train.py'), [f'{ROOT}/config/{config}'])['out_dir']


def test_explain_turns_the_errors_it_names_into_a_sentence():
    check(True, 'nothing')
    with pytest.raises(SystemExit) as end, explain('it failed'):
        raise KeyError('line\n   break ' + 'x' * 1000)
    assert str(end.value).startswith("script.py: it failed (KeyError: 'line\\n break xxx") and len(str(end.value)) < 300
    with pytest.raises(SystemExit) as end, explain('it failed', OSError):
        raise FileNotFoundError('a\n\n  b')
    assert str(end.value) == 'script.py: it failed (FileNotFoundError: a b)'
    with pytest.raises(KeyError), explain('it failed', OSError):
        raise KeyError
    with pytest.raises(SystemExit, match='^script.py: within$'), explain('it failed'):
        check(False, 'within')


# --- Folders ----------------------------------------------------------------------------------------------------------

def test_changes_name_what_differs_of_the_second():
    there, here = dict(a=1, b=2, c=3), dict(a=1, b='2', d=None, e=5)
    assert changes(there, here) == "b is 2 there and '2' here; e is None there and 5 here" and changes(here, here) == ''


def test_a_folder_is_claimed_for_one_work(tmp_path):
    folder, work = str(tmp_path / 'deep' / 'x'), dict(size=8, T=[0.5], name='é')
    for _ in range(2):
        claim(folder, 'work.json', work)
    assert os.listdir(folder) == ['work.json'] and json.loads(Path(folder, 'work.json').read_text()) == work
    Path(folder, 'result').write_text('')
    claim(folder, 'work.json', work)
    with pytest.raises(SystemExit, match='x was begun with other settings .size is 8 there and 9 here.: choose'):
        claim(folder, 'work.json', work | dict(size=9))
    assert json.loads(Path(folder, 'work.json').read_text()) == work


def test_a_folder_of_something_else_is_not_claimed(tmp_path):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / '1.jpg').write_text('')
    (tmp_path / 'file').write_text('')
    for folder in ('photos', 'file', 'file/x'):
        with pytest.raises(SystemExit, match=f'{folder} cannot be written or holds something else'):
            claim(str(tmp_path / folder), 'work.json', dict(size=8))
    assert os.listdir(tmp_path / 'photos') == ['1.jpg']


def test_a_kill_while_a_file_is_written_leaves_the_old_one_or_none(tmp_path, monkeypatch):
    write_json(str(tmp_path / 'old.json'), [1])
    with monkeypatch.context() as killed:
        killed.setattr(os, 'replace', lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        for attempt in (lambda: write_json(str(tmp_path / 'old.json'), [2]),
                        lambda: claim(str(tmp_path / 'x'), 'work.json', dict(size=8))):
            with pytest.raises(KeyboardInterrupt):
                attempt()
    assert json.loads((tmp_path / 'old.json').read_text()) == [1] and os.listdir(tmp_path / 'x') == ['work.json.tmp']
    claim(str(tmp_path / 'x'), 'work.json', dict(size=9))       # nothing was begun
    assert os.listdir(tmp_path / 'x') == ['work.json'] and '9' in (tmp_path / 'x' / 'work.json').read_text()


# --- Devices ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('amx, avx512, dtype, expected', (
    (True, False, 'auto', 'bfloat16'), (False, True, 'auto', 'bfloat16'), (False, False, 'auto', 'float32'),
    (True, True, 'float32', 'float32'), (False, False, 'bfloat16', 'bfloat16')))
def test_auto_is_bfloat16_where_a_cpu_multiplies_it(amx, avx512, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
    autocast, name = precision('cpu', dtype)
    with autocast:
        assert name == expected and (torch.eye(2) @ torch.eye(2)).dtype == getattr(torch, expected)


@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
@pytest.mark.parametrize('native', (True, False))
def test_auto_is_bfloat16_where_a_gpu_multiplies_it(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: not native)
    assert precision('cuda:0', 'auto')[1] == ('bfloat16' if native else 'float32')


def test_another_dtype_or_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda name: None)
    with pytest.raises(SystemExit, match="dtype must be auto, float32 or bfloat16, but it is 'float16'"):
        precision('cpu', 'float16')
    for device in ('gpu', 'cpu:x', ''):
        with pytest.raises(SystemExit, match=f'^script.py: device must be .*{device!r}'):
            launch(device)
    assert launch('cpu') == ('cpu', 0, 1)
    barrier()       # of one process: nothing to wait for
