"""tests/gpu.py: its rehearsal on a CPU, its tables, and what becomes of a part that fails or is cut."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from gpu import PARTS, TABLES, with_tables


def read(document):
    with open(os.path.join(ROOT, document)) as f:
        return f.read()


def parts_of(folder):
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}


def test_the_rehearsal_on_a_cpu_runs_whole(rehearsal):
    job, folder = rehearsal
    job.wait(300)
    parts = parts_of(folder)
    assert {name: part['ended'] for name, part in parts.items()} == dict.fromkeys(PARTS, 'whole')
    claims = [row['row'] for part in parts.values() for row in part['rows'] if row['table'] == 'checks']
    assert len(claims) == 15 and all(claim['holds'] == 'yes' for claim in claims), claims
    for table, names in TABLES.items():
        for name in names.split():
            assert any(row['table'] == table for row in parts[name]['rows']), (table, name)


@pytest.mark.parametrize('document', ['tests/README.md', 'config/README.md'])
def test_the_documents_hold_what_was_measured_on_a_gpu_and_nothing_else(document, rehearsal, tmp_path):
    text = read(document)
    assert with_tables(text, os.path.join(ROOT, 'tests/results/gpu')) == text
    job, folder = rehearsal
    job.wait(300)
    filled = with_tables(text, folder)
    for part in parts_of(folder).values():
        for row in part['rows']:
            line = '| ' + ' | '.join(map(str, row['row'].values())) + ' |'
            assert (line in filled) == (f'<!-- gpu.py: {row["table"]} -->' in text)
    assert with_tables(filled, tmp_path) == with_tables(text, tmp_path)      # whatever stood there before


def test_the_estimate_of_memory_is_near_what_a_step_takes():
    """In a process of its own: this one has memory to reuse. What comes on top is libraries and their workspaces."""
    code = 'from bench import measured_beside_estimated as f; print(*f(384, 6, 6, 2, 16, (0.5,), 16))'
    done = subprocess.run([sys.executable, '-c', code], cwd=os.path.join(ROOT, 'tests'), text=True, capture_output=True)
    measured, estimated = map(float, done.stdout.split())
    assert 0.8 < estimated / measured < 1.02


def test_a_part_that_fails_or_is_cut_loses_nothing_else(workplace, tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'tests/gpu.py'), '--device=cpu', f'--results={tmp_path}',
               f'--out_dir={tmp_path}/out']
    missing = subprocess.Popen([*command, '--parts=evidence'], cwd=workplace, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    subprocess.run([*command, '--small=True', '--parts=scripts,numbers', '--minutes=0.3'], cwd=workplace, check=True)
    assert 'four files of Fashion-MNIST' in missing.communicate()[0] and missing.returncode == 0
    evidence, scripts = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('evidence', 'scripts'))
    assert evidence['ended'].startswith('failed: SystemExit') and evidence['rows'] == []
    assert scripts['ended'] == 'cut' and 0 < len(scripts['rows']) < 8
