"""What the documents say of the code is so: the map, links, names, commands, examples."""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
from conftest import ROOT, TINY, load
from model import LapFlow, multiscale_loss, reconstruct

DOCUMENTS = ('README.md', 'config/README.md', 'tests/README.md', 'tests/experiments/README.md')
TEXT = {name: Path(ROOT, name).read_text() for name in DOCUMENTS}
EVERYTHING = ''.join(TEXT.values())


def fenced(language, text=EVERYTHING):
    """The blocks of code of a language."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


# -------------------------------------------------------------------------------------------------
# The map from the paper to the code

TAG = r'Eq\. \(\w+\)|Alg\. \d|Appendix [A-Z]|Sec\. [\d.]*\d'
MAP = re.findall(r'^\| (.*) \| (.*\.py:.*) \| (`test_.*) \|$', TEXT['tests/README.md'], re.M)


@pytest.mark.parametrize('paper, code, tests', MAP)
def test_the_map_leads_to_functions_that_name_their_equations(paper, code, tests):
    sources = ''
    for file, name in re.findall(r'`([\w./]+):(\w+)`', code):
        text = Path(ROOT, file).read_text()
        [found] = [node for node in ast.parse(text).body if getattr(node, 'name', '') == name]
        sources += ast.get_source_segment(text, found)
    for tag in re.findall(TAG, paper):
        assert tag in sources


def test_the_map_has_every_equation_and_algorithm_that_the_code_names():
    mapped = re.findall(TAG, str(MAP))
    for file in ('model.py', 'train.py', 'sample.py', 'tests/variants.py'):
        named = re.findall(r'Eq\. \(\w+\)|Alg\. \d', Path(ROOT, file).read_text())
        assert set(named) <= set(mapped)


# -------------------------------------------------------------------------------------------------
# Links, names, commands


def anchors(document):
    """Those that GitHub gives to a document's headings."""
    headings = re.findall(r'^#+ (.*)', document.read_text(), re.M)
    return [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings]


@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_lead_to_pictures_files_and_headings_that_exist(name):
    folder = Path(ROOT, name).parent
    for path, anchor in re.findall(r'\]\((?!https:)([^)#]*)#?([^)]*)\)', TEXT[name]):
        target = folder / (path or 'README.md')
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target)


def test_files_and_tests_that_the_documents_name_exist():
    today = re.sub(r'^```\ngit checkout.*?^```', '', EVERYTHING, flags=re.M | re.S)
    for name in re.findall(r'\b(?:config|tests|assets)/[\w/-]+\.\w+', today):
        assert os.path.exists(f'{ROOT}/{name}'), name
    sources = [file.read_text() for file in Path(ROOT, 'tests').glob('test_*.py')]
    defined = re.findall(r'^def (test_\w+)', ''.join(sources), re.M)
    assert set(re.findall(r'`(test_\w+)`', today)) <= set(defined)


def commands():
    """The script and arguments of every command in a block or in a sentence."""
    sentences = re.sub(r'^```.*?^```', '', EVERYTHING, flags=re.M | re.S)
    inline = [code.replace('\n', ' ') for code in re.findall(r'`([^`]+)`', sentences)]
    lines = '\n'.join(fenced('sh') + inline).replace('\\\n', ' ')
    lines = lines.replace('$C', re.search('^C="(.*)"', lines, re.M)[1])
    for line in re.split(r'\n|&&', lines):
        words = [word for word in shlex.split(line, comments=True) if word != '...']
        while words and not re.fullmatch(r'[a-z/]+\.py', words[0]):
            words = words[1:]
        if words:
            yield words


def test_every_command_has_settings_and_configs_that_exist(run):
    """With --help a script ends when it has read them."""
    found = list(commands())
    assert len(found) > 50
    for command in found:
        assert run(*command, '--help')[1] == '', command


def test_ci_runs_the_commands_of_the_documents():
    """In a virtual environment of its own."""
    ci = Path(ROOT, '.ci/run').read_text()
    for command in ('pip install -r requirements.txt', 'pip install -r tests/requirements.txt',
                    'python -m pytest -q -n 2'):
        assert f'\n{command}\n' in TEXT['README.md'] and f'\n.venv/bin/{command}\n' in ci


# -------------------------------------------------------------------------------------------------
# Examples and changes


def test_the_checkpoint_in_assets_draws_a_class_by_its_name(run, tmp_path):
    ckpt = f'{ROOT}/assets/fashion.pt'
    assert sample.load_checkpoint(ckpt)['iter_num'] == 24_000       # which refuses variants
    args = '--ckpt', ckpt, '--cls=boot', '--num_samples=2'
    assert run('sample.py', *args, f'--out={tmp_path}/x.npz')[1] == ''
    with np.load(tmp_path / 'x.npz') as drawn:
        assert drawn['arr_0'].shape == (2, 32, 32, 1) and drawn['arr_1'].tolist() == [9, 9]


@pytest.fixture
def example(workplace, trained, tmp_path, monkeypatch):
    """example('word') runs the block of Python with that word, among the files that it asks for."""
    for name, target in (('data', workplace / 'data'), ('out-digits', trained),
                         ('assets', f'{ROOT}/assets')):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)

    def example(word, old='', new=''):
        [code] = [block for block in fenced('python') if word in block]
        variables = {'__name__': 'example'}
        exec(code.replace(old, new), variables)
        return variables
    return example


@pytest.fixture
def ends(monkeypatch):
    """The states at the end of each segment that the sampler solves."""
    states, solve = [], sample.odeint_scales

    def recorded(*args):
        states.append(solve(*args))
        return states[-1]

    monkeypatch.setattr(sample, 'odeint_scales', recorded)
    return states


def test_the_lines_for_a_python_shell_train_and_draw(example):
    found = example('shell.png', 'range(600)', 'range(25)')
    model = LapFlow(found['config'])
    v = model(found['x_t'], found['t'], found['y'])
    untrained, _ = multiscale_loss(v, found['u_t'], (1, 1), 64)
    assert found['loss'] < 0.6 * untrained
    assert found['x'].shape == (20, 1, 32, 32) and os.path.exists('shell.png')


# The next three are of config/README.md, More modifications


def test_inpainting_keeps_the_blocks_that_are_known_and_draws_the_rest(example):
    found = example('Inpainter')
    image, noise = found['image'], found['noise']
    known = (torch.rand(1, 1, 32, 32) < 0.8).float()        # some blocks in part
    model = found['Inpainter'](found['model'], image, known, noise)
    x, _ = sample.generate(model, noise, found['y'], 'euler', 4)
    block = F.interpolate(F.avg_pool2d(known, 2), scale_factor=2)
    whole = block.expand(x.shape) == 1
    assert (x - image)[whole].abs().max() < 1e-5
    assert (x - image)[~whole].abs().mean() > 0.05


def test_the_coarse_noise_alone_makes_the_coarse_image(example, ends):
    """The example draws 4 coarse noises with 10 fine ones each."""
    found = example('details.png')
    assert torch.equal(reconstruct(list(ends[-1].values())), found['x'])
    fine, coarse = (scale.unflatten(0, (4, 10)) for scale in ends[-1].values())
    assert coarse.std(1).max() < 1e-5
    assert coarse.std(0).mean() > 0.05 and fine.std(1).mean() > 0.01


def test_the_coarse_scale_of_an_upscaled_picture_is_the_given_one(example, ends):
    found = example('Upscaler')
    small = F.avg_pool2d(found['image'], 2)
    assert (ends[-1][1] - small).abs().max() < 1e-5


def test_the_change_to_vectors_as_conditions_trains_and_samples(workplace, tmp_path):
    """Together with README's new setting, which the checkpoint records."""
    pairs = re.compile(r'((?:^-.*\n)+)((?:^\+.*\n)+)', re.M)
    for file in Path(ROOT).glob('*.py'):
        shutil.copy(file, tmp_path)
    [diff] = fenced('diff')
    _, *files = re.split(r'^--- (.*)\n', diff, flags=re.M)
    for name, hunks in zip(files[::2], files[1::2]):
        text = (tmp_path / name).read_text()
        assert pairs.sub('', hunks) == ''
        for pair in pairs.findall(hunks):
            old, new = (re.sub('^.', '', lines, flags=re.M) for lines in pair)
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
    for file, place, line in (('model.py', 'T: tuple', 'qk_norm: bool = False'),
                              ('train.py', 'patch =', 'qk_norm = False')):
        text = (tmp_path / file).read_text()
        text, found = re.subn(rf'^( *)({place})', rf'\1{line}\n\1\2', text, flags=re.M)
        assert found == 1 and f'`{line}`' in TEXT['README.md']
        (tmp_path / file).write_text(text)
    shutil.copytree(f'{ROOT}/config', tmp_path / 'config')
    digits = shutil.copytree(workplace / 'data/digits', tmp_path / 'data/digits')
    np.save(digits / 'labels.npy', np.eye(10, dtype='f4')[np.load(digits / 'labels.npy')])
    for command in (['train.py', *TINY, '--qk_norm=True'],
                    ['sample.py', '--ckpt=out-digits/ckpt.pt']):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
    assert load(tmp_path / 'out-digits')['model_args']['qk_norm'] is True
