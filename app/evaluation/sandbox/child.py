"""The process in which the program under test runs: it loads it, and calls its function when asked.

Started as `python -I -S child.py LIMITS`, with requests on stdin and replies on stdout, in frames of
wire_format. The judge trusts nothing that comes from here. Imports the standard library alone.
"""

import json
import os
import resource
import sys
import types
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from seccomp import die_with_parent, give_up_privileges
from wire_format import NotPlainDataError, decode, encode, read_frame, write_frame

del sys.path[0]


def main() -> None:
    """Give up privileges, report "ready", load the program, and answer calls until stdin is closed."""
    die_with_parent()
    requests, replies = os.dup(0), os.dup(1)
    for name, limit in json.loads(sys.argv[1]).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    null = os.open(os.devnull, os.O_RDWR)
    give_up_privileges()
    write_frame(replies, "ready")
    # Until here the judge reads errors on stderr; what the program itself prints is dropped.
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.environ.clear()
    sys.argv[:] = [""]
    source, entry_point = read_frame(requests)
    try:
        function = load(source, entry_point)
    except BaseException as error:  # SystemExit too
        write_frame(replies, failure(error))
        return
    write_frame(replies, {"loaded": True})
    while True:
        try:
            request = read_frame(requests)
        except EOFError:
            return
        write_frame(replies, answer(function, request))


def load(source: str, entry_point: str) -> Any:
    """Run the program as a module, not as "__main__" with its demonstration; return its function."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses look their module up
    exec(compile(source, "<candidate>", "exec"), module.__dict__)
    if entry_point not in module.__dict__:
        raise NameError(f"name {entry_point!r} is not defined")
    return module.__dict__[entry_point]


def answer(function: Any, request: list[Any]) -> dict[str, Any]:
    """Call the function; return its value, and the arguments where the call has changed them.

    A request has the arguments, encoded, and the names of the last of them.
    """
    try:
        before, names = request
        arguments = decode(before)
        unnamed = len(arguments) - len(names)
        named = dict(zip(names, arguments[unnamed:], strict=True))
        reply = {"value": encode(function(*arguments[:unnamed], **named))}
        after = encode(arguments)
        return reply if after == before else {**reply, "arguments": after}
    except BaseException as error:
        return failure(error)


def failure(error: BaseException) -> dict[str, Any]:
    """Return the reply for an exception: the names of its classes, and its text."""
    if isinstance(error, NotPlainDataError):
        return {"not_plain": str(error)[:200]}
    return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": str(error)[:200]}


if __name__ == "__main__":
    main()
