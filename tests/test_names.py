"""Which names code reads from a notebook, and which it gives: the same with every Python."""

import warnings

import pytest

from mlops_course.course.names import bound_names, free_names


@pytest.mark.parametrize(
    ("source", "read", "given"),
    [
        ("a = 1\ndef f(b):\n    c = 1\n    return a + b + c + d\nassert e", "d e", "a f"),
        ("def f():\n    global g\n    g = b = 2\nimport os as o", "", "f g o"),
        ("def f():\n    global g\n    del g", "", "f g"),
        ("m = [x for x in y if x > z]", "y z", "m"),
        ("m = {x: k for x, k in y}, {x for x in y}, max(x for x in y)", "max y", "m"),
        ("[[x + k for x in y] for y in z]", "k z", ""),
        ("x = 1\nm = [x for x in y]", "y", "m x"),
        ("m = [last := x for x in y]", "y", "last m"),
        ("f = lambda x=d: [x + k for _ in y]", "d k y", "f"),
        ("class A:\n    n = 1\n    m = [x for x in n]\n    k: int = p\n    def f(self): return n", "int n p", "A"),
        ("class A(B):\n    def f(self): return super().f() + len(self.x)", "B len super", "A"),
        ("n: int = 3\nn += k", "int k", "n"),
        ("for i, (j, *k) in rows: pass\nwith open(p) as f: pass", "open p rows", "f i j k"),
        ("try:\n    f()\nexcept (A, B) as n:\n    raise n", "A B f", "n"),
        ("r = await f()\nasync def g():\n    return [x async for x in h()]", "f h", "g r"),
        ("print(f'{a!r:>{w}} {[b for b in c]}')", "a c print w", ""),
        ("import os.path, json as j\nfrom m import x as y", "", "j os y"),
        ("a.b = c\na[d] = 1", "a c d", ""),
        ("import m as __import__", "", "__import__"),
        ("try:\n    f()\nexcept A as __build_class__:\n    pass", "A f", "__build_class__"),
        ("", "", ""),
    ],
)
def test_names_are_found_where_python_puts_them(source: str, read: str, given: str) -> None:
    assert sorted(free_names(source)) == read.split()
    assert sorted(bound_names(source)) == given.split()


def test_a_long_cell_takes_no_longer_than_python_needs_to_compile_it() -> None:
    assert free_names(" + ".join(f"a{number}" for number in range(800))) == {f"a{number}" for number in range(800)}


def test_what_the_compiler_would_warn_of_is_left_to_whoever_runs_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert free_names("found = a is 1") == {"a"}


@pytest.mark.parametrize("source", ["%time f()", "a = ", "return 1", "def f(:"])
def test_what_is_not_plain_python_has_no_names(source: str) -> None:
    for names in (free_names, bound_names):
        with pytest.raises(SyntaxError):
            names(source)
