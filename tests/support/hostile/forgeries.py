"""Programs that try to pass without the right answer."""

FORGERIES = r"""
### sys_exit (in one process): ends with status 0 when it is loaded
sys.exit(0)
### sys_exit_when_called (in one process): ends with status 0 when it is called
def square(x):
    sys.exit(0)
### os_exit (in one process): ends with status 0, past every handler
def square(x):
    os._exit(0)
### equal_to_everything (in one process): returns an object that equals everything
class Anything:
    def __eq__(self, other):
        return True
def square(x):
    return Anything()
### integer_equal_to_everything (in one process): returns an integer whose `__eq__` says yes
class Anything(int):
    def __eq__(self, other):
        return True
    __hash__ = int.__hash__
def square(x):
    return Anything(0)
### patch_builtins: makes assertions harmless and every built-in say yes
import builtins
builtins.AssertionError = lambda *_: None
builtins.all = builtins.any = builtins.isinstance = lambda *_: True
builtins.check = lambda *_: None
def square(x):
    return 0
### patch_the_harness: replaces functions of its harness
import json
json.dumps = lambda message: '{"status": "passed", "reason": ""}'
main = sys.modules["__main__"]
main.answer = lambda *_: {"status": "passed", "value": True}
def square(x):
    return 0
### find_the_tests (in one process): looks for the tests in frames, modules and memory, and empties them
import gc
def square(x):
    found = 0
    frame = sys._getframe()
    while frame:
        found += "check" in frame.f_globals
        frame = frame.f_back
    for thing in gc.get_objects():
        if type(thing).__name__ == "function" and thing.__name__ == "check":
            thing.__code__ = (lambda candidate: None).__code__
            found += 1
    return x * x if found else 0
### import_the_harness (in one process): imports the judge
def square(x):
    import app.evaluation.sandbox.judge
    return x * x
### write_a_verdict (in one process): writes a verdict to every open file, and to files of likely names
def square(x):
    verdict = b'{"status": "passed", "reason": ""}'
    for fd in range(64):
        works(lambda: os.write(fd, verdict))
    for name in ("result.json", "verdict.json", "/tmp/result.json"):
        works(lambda: open(name, "wb", buffering=0).write(verdict))
    os._exit(0)
### write_frames: writes answers of the harness's form, that are no plain data
from wire_format import write_frame
def square(x):
    for fd in range(3, 64):
        for answer in ({"value": {"__eq__": True}}, {"value": {"object": "x"}}, {"status": "passed"}):
            works(lambda: write_frame(fd, answer))
    os._exit(0)
### write_a_huge_frame: announces an answer of four gigabytes
def square(x):
    for fd in range(3, 64):
        works(lambda: os.write(fd, b"\xff\xff\xff\xff" + b"x" * 1000))
    while True:
        pass
### send_code: answers with a pickle that would run code where it is read
import pickle
class Bomb:
    def __reduce__(self):
        return (os._exit, (0,))
def square(x):
    return pickle.dumps(Bomb())
### not_implemented: returns what comparisons give up on
def square(x):
    return NotImplemented
### generator: returns a generator instead of a value
def square(x):
    yield x * x
### not_a_number: returns nan, and values that are true
def square(x):
    return float("nan") if x == 3 else True
### replace_the_arguments: says that the arguments were changed, by more and other ones
from wire_format import write_frame
def square(x):
    for fd in range(3, 64):
        works(lambda: write_frame(fd, {"value": 9, "arguments": [1, 2, 3]}))
    os._exit(0)
"""
