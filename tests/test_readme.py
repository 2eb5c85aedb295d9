"""What the documents say of the code is so: the map from the paper, links and files, commands, examples and changes."""
import ast
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import sample
from conftest import ROOT, TINY
from model import LapFlow, multiscale_loss, reconstruct
from test_configurator import script_defaults

DOCUMENTS = ('README.md', 'config/README.md', 'tests/README.md')
TEXT = {}
for name in DOCUMENTS:
    with open(os.path.join(ROOT, name)) as f:
        TEXT[name] = f.read()
README, CONFIG, MAP = (TEXT[name] for name in DOCUMENTS)


# ----------------------------------------------------------------------------------------------------------------------
# The map


def source_of(file, name):
    """The source of a top-level function or class, with its comments."""
    with open(os.path.join(ROOT, file)) as f:
        text = f.read()
    nodes = [node for node in ast.parse(text).body if getattr(node, 'name', None) == name]
    assert nodes, f'the map names {file}:{name}, which does not exist'
    return ast.get_source_segment(text, nodes[0])


def rows():
    table = MAP.split('## From the paper to the code')[1].split('\n## ')[0]
    lines = [line for line in table.splitlines() if line.startswith('|')]
    found = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines][2:]
    assert len(found) >= 10
    return found


TESTS = {name for file in os.listdir(os.path.join(ROOT, 'tests')) if file.startswith('test_')
         for name in re.findall(r'^def (test_\w+)', open(os.path.join(ROOT, 'tests', file)).read(), re.M)}


@pytest.mark.parametrize('paper, code, tests', rows())
def test_the_map_leads_to_functions_that_name_their_equations(paper, code, tests):
    sources = [source_of(*place.split(':')) for place in re.findall(r'`([\w./]+:\w+)`', code)]
    tags = re.findall(r'Eq\. \(\w+\)|Alg\. \d|Appendix [A-Z]|Sec\. [\d.]*\d', paper)
    assert sources and tags
    for tag in tags:
        assert any(tag in source for source in sources), f'no function of {code} carries {tag!r}'
    assert re.findall(r'`(test_\w+)`', tests)


def test_every_equation_tag_in_the_code_is_in_the_map():
    tagged = set()
    for file in ('model.py', 'train.py', 'sample.py', 'tests/variants.py'):
        with open(os.path.join(ROOT, file)) as f:
            tagged |= set(re.findall(r'Eq\. \(\w+\)|Alg\. \d', f.read()))
    assert tagged <= set(re.findall(r'Eq\. \(\w+\)|Alg\. \d', MAP))


# ----------------------------------------------------------------------------------------------------------------------
# Links, names, commands


def anchors(document):
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r'^#+ (.*)', TEXT[document], re.M)
    return {re.sub(r'[^\w -]', '', heading.lower()).strip().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('document', DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(document):
    folder = os.path.dirname(document)
    links = [link for link in re.findall(r'\]\(([^)]+)\)', TEXT[document]) if not link.startswith('https://')]
    assert links
    for link in links:
        path, _, anchor = link.partition('#')
        target = os.path.normpath(os.path.join(folder, path)) if path else document
        assert os.path.exists(os.path.join(ROOT, target)), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize('document', DOCUMENTS)
def test_files_tests_and_functions_that_a_document_names_exist(document):
    for name in re.findall(r'(?:config|tests|assets)/[\w-]+\.\w+', TEXT[document]):
        assert os.path.exists(os.path.join(ROOT, name)), name
    assert set(re.findall(r'`(test_\w+)`', TEXT[document])) <= TESTS


def commands():
    """(document, script, its arguments) of every command in the documents."""
    found = []
    for document in DOCUMENTS:
        text = TEXT[document]
        code = '\n'.join(re.findall(r'```sh\n(.*?)```', text, re.S) + re.findall(r'`([^`\n]+)`', text))
        code = code.replace('\\\n', ' ').replace('$C', 'python tests/compare.py')
        for line in re.split(r'\n|&&', code):
            words = re.sub(r'\s#.*', '', line).split()
            scripts = [i for i, word in enumerate(words) if word.endswith('.py') and 'config/' not in word]
            if scripts and scripts[-1] + 1 < len(words):
                found.append((document, words[scripts[-1]], tuple(words[scripts[-1] + 1:])))
    assert len(found) > 20
    return sorted(set(found))


@pytest.mark.parametrize('document, script, args', commands())
def test_commands_use_settings_and_configs_that_exist(document, script, args):
    flags = {re.match(r'"?--(\w+)', word)[1] for word in args if word.strip('"').startswith('--')}
    assert not flags or flags <= set(script_defaults(script))
    assert all(os.path.isfile(os.path.join(ROOT, word)) for word in args if word.startswith('config/'))


def test_the_test_command_of_the_documents_is_what_ci_runs():
    with open(os.path.join(ROOT, '.ci', 'run')) as f:
        pattern = re.search(r"grep -B1 -m1 -E '(.*)' README.md", f.read())[1]
    lines = README.splitlines()
    second = next(i for i, line in enumerate(lines) if re.search(pattern, line))
    assert lines[second - 1].startswith('python3 -m venv .venv && ') and lines[second - 1].endswith('\\')


# ----------------------------------------------------------------------------------------------------------------------
# Examples and changes


def blocks(text, language):
    return re.findall(rf'```{language}\n(.*?)```', text, re.S)


def run_block(code, trained, monkeypatch):
    """Runs a block of Python in a folder that has what the documents speak of; its variables."""
    if not os.path.exists(trained.parent / 'out-digits'):
        shutil.copytree(trained, trained.parent / 'out-digits')
    monkeypatch.chdir(trained.parent)
    variables = {'__name__': 'readme'}
    exec(compile(code, 'README.md', 'exec'), variables)
    return variables


def example(word):
    """The block of Python in the documents that holds a word."""
    found = [block for text in (README, CONFIG) for block in blocks(text, 'python') if word in block]
    assert len(found) == 1, word
    return found[0]


@pytest.fixture
def ends(monkeypatch):
    """The states at the end of every segment of the ODE."""
    solve, states = sample.odeint_scales, []

    def recording(*args):
        states.append(solve(*args))
        return states[-1]
    monkeypatch.setattr(sample, 'odeint_scales', recording)
    return states


def test_the_lines_for_a_python_shell_train_and_draw(trained, monkeypatch):
    code = example('shell.png')
    assert len(code.splitlines()) <= 25 and 'range(600)' in code
    found = run_block(code.replace('range(600)', 'range(25)'), trained, monkeypatch)
    before, _ = multiscale_loss(LapFlow(found['config'])(found['x_t'], found['t'], found['y']), found['u_t'], (1, 1), 64)
    assert found['loss'] < 0.6 * before
    assert found['x'].shape == (20, 1, 32, 32) and found['nfe'] == 20 and os.path.exists('shell.png')


def test_inpainting_keeps_what_is_known_and_draws_the_rest(trained, monkeypatch):
    shutil.copytree(os.path.join(ROOT, 'assets'), trained.parent / 'assets', dirs_exist_ok=True)
    found = run_block(example('Inpainter'), trained, monkeypatch)
    image, pictures = found['image'], torch.stack(found['pictures'][1:])
    assert (pictures[..., :16] - image[..., :16]).abs().max() < 1e-5
    rest = pictures[..., 16:].clamp(-1, 1)
    assert (rest[0] - rest[1]).abs().mean() > 0.05 and (rest - image[..., 16:]).abs().mean() > 0.05
    known = (torch.rand(1, 1, 32, 32) < 0.8).float()        # in blocks of which parts are known, too
    x, _ = sample.generate(found['Inpainter'](found['model'], image, known, found['noise']), found['noise'], found['y'],
                           'euler', 4)
    block = torch.nn.functional.max_pool2d(1 - known, 2) == 0
    whole = block.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(image.shape)
    assert (x - image)[whole].abs().max() < 1e-5 and (x - image)[~whole].abs().mean() > 0.05


def test_fixing_the_coarse_noise_fixes_the_coarse_image(trained, ends, monkeypatch):
    found = run_block(example('details.png'), trained, monkeypatch)
    assert torch.equal(reconstruct(list(ends[-1].values())), found['x'])
    fine, coarse = (state.unflatten(0, (4, 10)) for state in ends[-1].values())
    assert (coarse - coarse[:, :1]).abs().max() < 1e-5 and (coarse[1:, 0] - coarse[:-1, 0]).abs().max() > 0.1
    assert fine.std(1).mean() > 0.01


def test_an_upscaled_image_is_the_given_one_when_pooled(trained, ends, monkeypatch):
    found = run_block(example('Upscaler'), trained, monkeypatch)
    pooled = torch.nn.functional.avg_pool2d(found['image'], 2)
    # All but the model's own mean of the residual, zero in the data and near it in any model
    residual = found['x'] - torch.nn.functional.interpolate(pooled, scale_factor=2)
    drift = torch.nn.functional.avg_pool2d(residual, 2)
    assert drift.abs().mean() < 0.2 * residual.abs().mean()
    upscaler = found['Upscaler'](found['model'], pooled, found['noise'])
    guided, _ = sample.generate(upscaler, found['noise'], found['y'], 'euler', 40, cfg=3)
    assert (ends[-1][1] - pooled).abs().max() < 1e-5 and not torch.equal(guided, found['x'])


def copy_changed(change, folder):
    """The scripts in a folder, with one of the documents' diffs applied."""
    for file in ('model.py', 'train.py', 'sample.py', 'data.py', 'configurator.py'):
        shutil.copy(os.path.join(ROOT, file), folder)
    shutil.copytree(os.path.join(ROOT, 'config'), folder / 'config')
    for line in change.splitlines():
        mark, line = line[0], line[1:]
        if line.startswith('-- '):
            file = folder / line[3:]
        elif mark in ' -':
            assert file.read_text().count(line + '\n') == 1, line
            above, kept = line + '\n', line + '\n' if mark == ' ' else ''
        else:
            file.write_text(file.read_text().replace(above, kept + line + '\n'))
            above = kept = line + '\n'


CHANGES = {'attributes': (blocks(CONFIG, 'diff')[0], ['--dataset=vectors'])}


@pytest.mark.parametrize('name', CHANGES)
def test_the_changes_that_the_documents_suggest_train_and_sample(name, trained, tmp_path):
    change, settings = CHANGES[name]
    copy_changed(change, tmp_path)
    shutil.copytree(trained.parent / 'data', tmp_path / 'data')
    vectors = shutil.copytree(tmp_path / 'data' / 'digits', tmp_path / 'data' / 'vectors')
    np.save(vectors / 'labels.npy', np.eye(10, dtype=np.float32)[np.load(vectors / 'labels.npy')])
    for command in (['train.py', *TINY, *settings], ['sample.py', '--ckpt', 'out-digits/ckpt.pt', '--num_samples=12']):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
