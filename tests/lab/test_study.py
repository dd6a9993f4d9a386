"""Strict reading: every mistake is an error that names file, cell, value and nearest match."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yokolab.lab.parameters import Param, StudyError, read_params
from yokolab.lab.study import get_study

MISTAKES = [
    (2, "n=10", "m=10", r"cell|profiles.*smoke.*m=10.*did you mean 'n'|there are"),
    (2, "n=10", "n='ten'", r"\[profiles\] smoke.*n='ten'.*not of type int"),
    (2, "n=10", "n=True", r"n=True.*not of type int"),
    (1, "n: int = 2000", "n: int = 2.5", r"cell 1 \[parameters\].*n=2.5.*not of type int"),
    (1, "n: int = 2000  # points", "n: int = 2000", r"'n' has no `# meaning`"),
    (1, "n: int = 2000", "n = 2000", r"write `name: type = literal"),
    (1, "n: int", "profile: int", r"'profile' is reserved"),
    (1, "seed: int = 0  # random seed", "unused: int = 0  # nobody reads it", r"no later cell reads 'unused'"),
    (3, "target='in [3, 3.3]'", "goal=3", r"cell 3 \[claims\].*C1.*has no target"),
    (3, "kind='number'", "kind='hunch'", r"C1.*kind 'hunch'.*identity, number"),
    (3, "'in [3, 3.3]'", "'around 3'", r"C1.*target 'around 3'"),
    (3, "profiles='full'", "profiles='fool'", r"C2.*profile 'fool'"),
    (3, "C2=", "**", r"keywords only|\[claims\]"),
    (9, "lab.summary()", "%time lab.summary()", r"cell 9.*not plain Python"),
]


@pytest.mark.parametrize("i,old,new,message", MISTAKES)
def test_mistakes_are_named(make_project, edit, i, old, new, message):
    root = make_project(edit(i, old, new))
    with pytest.raises(StudyError, match=message) as e: get_study("darts", root)
    assert "10_darts_study.ipynb" in str(e.value)


def test_duplicate_claim(make_project, edit):
    cells = edit(3, "claims = dict(\n    C1=dict(", "claims = {'C1': dict(text='a', source='b', kind='number', target='> 0'),\n"
                    " 'C1': dict(")
    cells[3] = (cells[3][0], cells[3][1].split("),\n    C2")[0] + ")}")
    with pytest.raises(StudyError, match="'C1' is there twice"): get_study("darts", make_project(cells))


def test_nearest_names(project):
    s = get_study("darts", project)
    with pytest.raises(StudyError, match="did you mean 'seed'"): s.resolve(sed=1)
    with pytest.raises(StudyError, match="did you mean 'smoke'"): s.resolve("smok")
    with pytest.raises(StudyError, match="did you mean 'darts'"): get_study("dart", project)


@pytest.mark.parametrize("text", ["not json", "{}", '{"cells": 3}', '{"cells": [{"cell_type": "code"}]}'])
def test_unreadable_notebook(project, text):
    path = next(project.glob("nbs/*/*_study.ipynb"))
    path.write_text(text)
    with pytest.raises(StudyError, match="not a readable notebook.*restore it"): get_study("darts", project)


literals = st.one_of(st.integers(-10**6, 10**6), st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
                     st.text("abc xyz=,'\"", max_size=8), st.tuples(st.integers(), st.integers()))


@settings(max_examples=60, deadline=None)
@given(literals)
def test_any_literal_survives_the_cell(value):
    kind = "tuple[int, ...]" if isinstance(value, tuple) else type(value).__name__
    p = read_params(f"x: {kind} = {value!r}  # anything, even a = b")["x"]
    assert p.default == value and type(p.default) is type(value) and p.help == "anything, even a = b"


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans()))
def test_the_command_line_reads_what_repr_writes(value):
    p = Param("x", type(value).__name__, value)
    assert p.parse(repr(value)) == value
