"""What README says of the code is so: the map from the paper to functions and tests, and every file it names."""
import ast
import os
import re

import pytest

from conftest import ROOT

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
