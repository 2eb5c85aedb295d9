"""How a script starts: its settings and their mistakes, its output, its device, its processes."""
import ast
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import ROOT, TINY, run_in
from configurator import autocast_for, check, configure, exit_on_error, launch
from model import LapFlow, LapFlowConfig

DEFAULTS = dict(T=(0.5,), rate=2e-4, shift=-1.0, iters=100, first=0, flag=False, name='a')
OTHERS = dict(_private=1, CONSTANT=2, table=[1], function=print)


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/somewhere/script.py'])


def settings(*argv):
    """What configure makes of DEFAULTS and a command line."""
    namespace = DEFAULTS | OTHERS
    sys.argv[1:] = argv
    configured = configure(namespace)
    assert namespace == configured | OTHERS
    return configured


def refusal(*argv):
    """The sentence that a command line ends with."""
    with pytest.raises(SystemExit) as end:
        settings(*argv)
    sentence = str(end.value)
    assert sentence.startswith('script.py: ') and '\n' not in sentence
    return sentence


# -------------------------------------------------------------------------------------------------
# Options and config files


@pytest.mark.parametrize('args, key, value', (
    ('--T=0.67,0.33', 'T', (0.67, 0.33)), ('--T [1,0]', 'T', (1.0, 0.0)), ('--T=()', 'T', ()),
    ('--T=0.3', 'T', (0.3,)), ('--rate 1', 'rate', 1.0), ('--shift=-2', 'shift', -2.0),
    ('--iters=1 --iters=0', 'iters', 0), ('--flag True', 'flag', True), ('--name=7', 'name', '7'),
    ('--name x=y', 'name', 'x=y'), ('--name=', 'name', ''), ('--name=~', 'name', str(Path.home()))))
def test_an_option_arrives_in_the_type_of_its_setting(args, key, value):
    assert repr(settings(*args.split())) == repr(DEFAULTS | {key: value})


@pytest.mark.parametrize('args, words', (
    ('--itres=7', "there is no setting 'itres'; near it: ['iters']"),
    ('--iters=True', 'iters must be like 100'), ('--T=half', 'T must be like (0.5,)'),
    ('--iters', '--iters needs a value'),
    ('--iters --flag=True', "iters must be like 100, not '--flag=True'"),
    ('iters=3', 'is neither a config file (NAME.py) nor a setting (--key=value)'),
    ('README.md', 'is neither a config file'), ('nowhere.py', 'is neither a config file')))
def test_a_mistake_ends_with_one_sentence(args, words):
    assert words in refusal(*args.split())


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


def test_files_count_from_left_to_right_and_options_above_them_wherever_they_stand(tmp_path):
    a = write(tmp_path, 'a.py', 'rate, iters, flag = 3, 5, True')
    b = write(tmp_path, 'b.py', 'iters = 6')
    expected = DEFAULTS | dict(rate=4.0, iters=6, flag=False)
    assert settings('--flag=False', '--rate', '4', a, b) == expected
    assert settings(a, '--rate=4', b, '--flag=False') == expected


def test_a_config_file_may_import_and_compute(tmp_path):
    text = "import os.path\n_two = 2\nrate = _two * 2\nname = '~'"
    expected = DEFAULTS | dict(rate=4.0, name=str(Path.home()))
    assert settings(write(tmp_path, 'a.py', text)) == expected


@pytest.mark.parametrize('text, words', (
    ('iters = 3.0', 'iters must be like 100'), ('name = 3', "name must be like 'a'"),
    ('import numpy\niters = numpy.int64(3)', 'iters must be like 100'),
    ('itres = 5', "'itres'"), ('def double(x): pass', "'double'"), ('iters = = 5', 'SyntaxError')))
def test_a_config_file_assigns_settings_and_nothing_else(text, words, tmp_path):
    a = write(tmp_path, 'a.py', text)
    sentence = refusal(a)
    assert a in sentence and words in sentence


@pytest.mark.parametrize('key, value', (
    ('rate', '-1'), ('rate', '1e999'), ('rate', 'float("nan")'), ('shift', '-1e999'),
    ('first', '-1'), ('T', '(0.5,-0.1)')))
def test_numbers_that_cannot_be_are_refused(key, value, tmp_path):
    a = write(tmp_path, 'a.py', f'{key} = {value}')
    for arg in (a, f'--{key}={value}'):
        assert f'{arg}: {key} must be like' in refusal(arg, '--help')   # which would end it, too
    assert 'out of range' in refusal(a)


# -------------------------------------------------------------------------------------------------
# The settings of the scripts


@pytest.mark.parametrize('script', ('train.py', 'sample.py', 'data.py', 'fid.py'))
def test_help_says_what_a_script_does_and_lists_its_settings_of_which_none_is_dead(script, run):
    """With the values that the command line gives them. They are what is assigned above the call
    of configure, and each is read below it. Only train.py's are not under `if __name__ == ...`.
    """
    tree = ast.parse(Path(ROOT, script).read_text())
    doc, block = ast.get_docstring(tree, clean=False), tree.body
    if script != 'train.py':
        block = block[-1].body
    end = min(i for i, node in enumerate(block) if 'configure(globals' in ast.unparse(node))
    assigned = [node for node in block[:end] if isinstance(node, ast.Assign)]
    expected = {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}
    printed, message = run(script, '--help', '--device', 'x')
    expected['device'] = 'x'
    lines = [f'--{key}={value!r}' for key, value in expected.items()]
    assert message == '' and len(lines) > 6
    assert printed == '\n'.join([doc, *lines, ''])
    read = {node.id for node in ast.walk(ast.Module(block[end + 1:])) if isinstance(node, ast.Name)}
    if script == 'train.py':
        read |= set(LapFlowConfig.__dataclass_fields__)
    assert set(expected) <= read


SIZES = ('eval_interval log_interval eval_images sample_images max_iters batch_size steps patch '
         'width depth heads gradient_accumulation_steps').split()


@pytest.mark.parametrize('command, words', (
    *[(f'train.py --{key}=0', 'must be at least 1') for key in SIZES],
    ('train.py --beta1=1', 'below 1'), ('train.py --beta2=1', 'below 1'),
    ('train.py --ema_decay=1', 'below 1'), ('train.py --label_drop=1.1', 'at most 1'),
    ('train.py --label_drop=0', 'train with label_drop, or --cfg=1'),
    ('train.py --dataset=plain', 'the model is unconditional, so cfg must be 1'),
    ('train.py --loss_weights=0,0', 'not all 0'), ('train.py --loss_weights=1', '2 numbers'),
    ('train.py --batch_size=9 --gradient_accumulation_steps=2', 'must split into 2 parts'),
    ('train.py --gradient_accumulation_steps=12', 'of at least 2 images'),
    ('train.py --T=0.3,0.6', 'these settings make no model (ValueError: T must decrease'),
    ('train.py --method=heun', "one of ('dopri5',"), ('train.py --tol=0', 'more than 0'),
    ('train.py --dtype=float16', 'dtype must be auto, float32 or bfloat16: float16'),
    ('train.py --device=gpu', 'cuda, mps or cpu'), ('train.py --device=meta', 'be there'),
    ('fid.py --batch_size=0', 'at least 1'), ('data.py --size=0', 'at least 1')))
def test_settings_that_mean_nothing_end_with_a_sentence(command, words, run, plain, tmp_path):
    script, *args = command.split()
    common = [*TINY, f'--out_dir={tmp_path}/out'] if script == 'train.py' else []
    _, message = run(script, *common, *args)
    assert message.startswith(f'{script}: ') and words in message and '\n' not in message
    assert not (tmp_path / 'out').exists()


# -------------------------------------------------------------------------------------------------
# Errors and output


def test_a_users_error_becomes_one_short_sentence():
    with pytest.raises(SystemExit) as end, exit_on_error('it failed'):
        raise ValueError('two\n lines' + ' long' * 1000)
    sentence = str(end.value)
    assert sentence.startswith('script.py: it failed (ValueError: two lines long long')
    assert len(sentence) < 250


def test_other_errors_stay_as_they_are():
    with pytest.raises(SystemExit, match='^script.py: within$'), exit_on_error('it failed'):
        check(False, 'within')
    with pytest.raises(KeyboardInterrupt), exit_on_error('it failed'):
        raise KeyboardInterrupt
    with pytest.raises(KeyError), exit_on_error('it failed', ValueError):
        raise KeyError


@pytest.mark.parametrize('command', (('train.py', *TINY, '--out_dir=out-broken'),
                                     ('sample.py', '--ckpt=out-whole/ckpt.pt')))
def test_a_programmers_error_keeps_its_traceback(command, trained, monkeypatch):
    """One in the network, where no gradient is asked for: in an evaluation, in a sample."""
    forward = LapFlow.forward

    def broken(*args):
        assert torch.is_grad_enabled(), 'a fork checks its shapes'
        return forward(*args)

    monkeypatch.setattr(LapFlow, 'forward', broken)
    with pytest.raises(AssertionError, match='a fork checks its shapes'):
        run_in(trained.parent, *command)


def test_output_comes_line_by_line_and_in_any_letters(monkeypatch):
    """Into a pipe, which Python fills with 8 kB first, of a terminal that knows ASCII alone."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(pipe, 'ascii'))
    settings()
    print('Z\u00fcrich \u732b')
    assert pipe.getvalue() == b'Z\\xfcrich \\u732b\n'


# -------------------------------------------------------------------------------------------------
# Devices and processes


@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
@pytest.mark.parametrize('gpu, cpu', ((True, False), (False, True)))
def test_auto_is_bfloat16_where_the_hardware_multiplies_it(gpu, cpu, monkeypatch):
    def supported_on_gpu(including_emulation=True):
        return including_emulation or gpu

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported_on_gpu)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: cpu)
    for device, native in (('cuda', gpu), ('cpu', cpu)):
        assert autocast_for(device, 'auto')[1] == ('bfloat16' if native else 'float32')


def test_a_process_takes_the_accelerator_and_of_many_gpus_its_own(monkeypatch):
    """Pretended here, where neither is there."""
    def accelerator(check_available=False):
        return 'gpu' if check_available else None

    monkeypatch.setattr(torch.accelerator, 'current_accelerator', accelerator)
    monkeypatch.setenv('LOCAL_RANK', '99')
    for device, chosen in (('auto', 'gpu'), ('cuda', 'cuda:99')):
        with pytest.raises(SystemExit, match=f"and be there, not '{chosen}'"):
            launch(device)


def test_torchruns_processes_join_a_group_even_if_one_is_alone(monkeypatch):
    monkeypatch.setenv('RANK', '1')     # without a world it means nothing
    assert launch('cpu') == ('cpu', 0, 1) and not dist.is_initialized()
    world = dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    for key, value in world.items():
        monkeypatch.setenv(key, value)
    assert launch('cpu') == ('cpu', 0, 1) and dist.is_initialized()
    dist.destroy_process_group()
