"""What README says of the code is so: the map from the paper to functions and tests, and every file it names."""
import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY
from model import up
from test_model import small

with open(os.path.join(ROOT, 'README.md')) as f:
    README = f.read()


def source_of(file, name):
    """The source of a top-level function or class, with its comments."""
    with open(os.path.join(ROOT, file)) as f:
        text = f.read()
    nodes = [node for node in ast.parse(text).body if getattr(node, 'name', None) == name]
    assert nodes, f'README names {file}:{name}, which does not exist'
    return ast.get_source_segment(text, nodes[0])


def rows():
    table = README.split('## From the paper to the code')[1].split('\n## ')[0]
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
    named = re.findall(r'`(test_\w+)`', tests)
    assert named and set(named) <= TESTS


def test_every_equation_tag_in_the_code_is_in_the_map():
    tagged = set()
    for file in ('model.py', 'train.py', 'sample.py'):
        with open(os.path.join(ROOT, file)) as f:
            tagged |= set(re.findall(r'Eq\. \(\w+\)|Alg\. \d', f.read()))
    assert tagged <= set(re.findall(r'Eq\. \(\w+\)|Alg\. \d', README))


def test_the_files_that_readme_names_exist():
    for name in re.findall(r'\]\(([\w./-]+)\)', README) + re.findall(r'(?:config|tests|assets)/[\w-]+\.\w+', README):
        assert os.path.exists(os.path.join(ROOT, name)), name
    headings = {re.sub(r'[^a-z0-9 -]', '', line.lower()).strip().replace(' ', '-')
                for line in re.findall(r'^#+ (.*)', README, re.M)}
    assert set(re.findall(r'\]\(#([\w-]+)\)', README)) <= headings


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def run_block(code, trained, monkeypatch):
    """Runs a block of Python in a folder that has what README speaks of; its variables."""
    if not os.path.exists(trained.parent / 'out-digits'):
        shutil.copytree(trained, trained.parent / 'out-digits')
    monkeypatch.chdir(trained.parent)
    variables = {'__name__': 'readme'}
    exec(compile(code, 'README.md', 'exec'), variables)
    return variables


def test_fixing_the_coarse_noise_fixes_the_coarse_image(trained, monkeypatch):
    variables, frames = run_block(blocks('python')[0], trained, monkeypatch), []
    x, _ = variables['generate'](variables['model'], variables['noise'], variables['y'], 'euler', 40, frames=frames)
    assert torch.equal(x, variables['x'])
    fine, coarse = (state.unflatten(0, (4, 10)) for state in frames[-1][1])
    assert (coarse - coarse[:, :1]).abs().max() < 1e-5 and (coarse[1:, 0] - coarse[:-1, 0]).abs().max() > 0.1
    assert fine.std(1).mean() > 0.01


def test_an_upscaled_image_is_the_given_one_when_pooled(trained, monkeypatch):
    variables = run_block(blocks('python')[1], trained, monkeypatch)
    pooled = torch.nn.functional.avg_pool2d(variables['image'], 2)
    # All but the model's own mean of the residual, zero in the data and near it in any model
    residual = variables['x'] - torch.nn.functional.interpolate(pooled, scale_factor=2)
    drift = torch.nn.functional.avg_pool2d(residual, 2)
    assert drift.abs().mean() < 0.2 * residual.abs().mean()


def copy_changed(number, folder):
    """The scripts in a folder, with one of README's diffs applied."""
    for file in ('model.py', 'train.py', 'sample.py', 'data.py', 'configurator.py'):
        shutil.copy(os.path.join(ROOT, file), folder)
    shutil.copytree(os.path.join(ROOT, 'config'), folder / 'config')
    for line in blocks('diff')[number].splitlines():
        mark, line = line[0], line[1:]
        if line.startswith('-- '):
            file = folder / line[3:]
        elif mark in ' -':
            assert file.read_text().count(line + '\n') == 1, line
            above, kept = line + '\n', line + '\n' if mark == ' ' else ''
        else:
            file.write_text(file.read_text().replace(above, kept + line + '\n'))
            above = kept = line + '\n'


def test_fine_tokens_are_shown_the_image(tmp_path):
    """The changed model does with the states what the model does with the images that they add up to."""
    copy_changed(0, tmp_path)
    changed = runpy.run_path(str(tmp_path / 'model.py'))
    plain = small()
    other = changed['LapFlow'](changed['LapFlowConfig'](**vars(plain.config))).double()
    other.load_state_dict(plain.state_dict())
    fine, middle, coarse = (torch.randn(B, 3, n, n, dtype=torch.float64) for B, n in ((2, 16), (4, 8), (5, 4)))
    t, y = torch.rand(5, dtype=torch.float64), torch.randint(6, (5,))
    image = middle + up(coarse[:4])
    expected = plain([fine + up(image[:2]), image, coarse], t, y)
    torch.testing.assert_close(other([fine, middle, coarse], t, y), expected)
    for k in (1, 2):        # without the finest, and one scale alone
        x_t = [None] * k + [middle, coarse[:4]][k - 1:]
        expected = plain([None, image, coarse[:4]] if k == 1 else x_t, t[:4], y[:4])
        torch.testing.assert_close(other(x_t, t[:4], y[:4])[k:], expected[k:])


@pytest.mark.parametrize('number, settings', ((0, []), (1, ['--path=quartic']), (2, ['--dataset=vectors'])))
def test_the_changes_that_readme_suggests_train_and_sample(number, settings, trained, tmp_path):
    copy_changed(number, tmp_path)
    shutil.copytree(trained.parent / 'data', tmp_path / 'data')
    vectors = shutil.copytree(tmp_path / 'data' / 'digits', tmp_path / 'data' / 'vectors')
    np.save(vectors / 'labels.npy', np.eye(10, dtype=np.float32)[np.load(vectors / 'labels.npy')])
    meta = json.loads((vectors / 'meta.json').read_text())
    (vectors / 'meta.json').write_text(json.dumps(meta | dict(checksums={})))
    for command in (['train.py', *TINY, *settings], ['sample.py', '--ckpt', 'out-digits/ckpt.pt', '--num_samples=12']):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
