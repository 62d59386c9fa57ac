"""No test, benchmark or example waits for a process, thread or queue without a limit."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUNDED = {"check_call", "check_output", "communicate", "wait"}


def waits_without_limit(code: str) -> list[str]:
    """The calls that could wait for ever: no `timeout`, or `join()` and `get()` without any."""
    found = []
    for call in ast.walk(ast.parse(code)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        name, owner = call.func.attr, ast.unparse(call.func.value)
        bounded = name in BOUNDED or (owner, name) == ("subprocess", "run")
        empty = name in ("join", "get") and not call.args
        if (bounded or empty) and not any(word.arg == "timeout" for word in call.keywords):
            found.append(f"line {call.lineno}: {ast.unparse(call.func)}")
    return found


def test_every_wait_has_a_limit() -> None:
    files = [
        path
        for part in ("tests", "benchmarks", "examples")
        for path in sorted((ROOT / part).rglob("*.py"))
    ]
    assert len(files) > 50
    found = {str(path.relative_to(ROOT)): waits_without_limit(path.read_text()) for path in files}
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_waits_are_found() -> None:
    code = "subprocess.run(['a'])\nprocess.join()\nqueue.get()\nchild.wait()\n','.join(words)"
    assert len(waits_without_limit(code)) == 4
    assert waits_without_limit("subprocess.run(['a'], timeout=1)\nprocess.join(timeout=1)") == []
