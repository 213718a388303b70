"""The command line: a frozen dataclass becomes flags and help, a UserError one line and an exit
code.

A field of the dataclass is a flag of the same name; the comment at its right is its help, and a
comment line of its own starts a group:

    @dataclass(frozen=True)
    class SampleConfig:
        # the text
        num_samples: PositiveInt = 4  # texts to write

A number is finite and not negative; one whose type is PositiveInt or PositiveFloat is above 0 as
well. In a LocalPath, ~ is the home directory.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import math
import os
import re
import sys
import time
import typing
from pathlib import Path
from typing import Annotated

PositiveInt = Annotated[int, "positive"]
PositiveFloat = Annotated[float, "positive"]
LocalPath = Annotated[str, "path"]  # or a name on the Hub, where a command takes both


class UserError(Exception):
    """An error that the user can fix: printed as one message without a traceback.

    code: the exit code (2 bad input, 1 the run failed). alone: other ranks may not have this error,
    so it is printed at once whatever the rank.
    """

    def __init__(self, message: str, code: int = 2, alone: bool = False):
        super().__init__(message)
        self.code = code
        self.alone = alone


def command(main):
    """Decorate a script's `main(argv=None) -> int`: a UserError is printed on stderr and becomes
    the exit code."""

    @functools.wraps(main)
    def run(argv=None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # a terminal that is not UTF-8 shows ? for what it lacks
            sys.stdout.reconfigure(errors="replace")
        try:
            return main(argv) or 0
        except UserError as error:
            if not error.alone and not is_first_on_its_machine():
                # the first rank prints the same error and exits, and the launcher then ends this
                # one; if it does not within 10 s, the error is this rank's alone
                time.sleep(10)
            print(f"error: {error}", file=sys.stderr, flush=True)
            return error.code
        except SystemExit as done:  # --help
            return done.code or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            discard_output()
            print("stopped: nobody reads the output", file=sys.stderr)
            return 1
        except OSError as error:  # a full disk, a directory that may not be written
            print(f"error: {one_line_error(error)}", file=sys.stderr, flush=True)
            return 1

    return run


def is_first_on_its_machine() -> bool:
    """Is this the first of a launcher's processes on its machine, or a process of its own?"""
    return "WORLD_SIZE" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def exit_process(exit_code: int) -> typing.NoReturn:
    """End the process. Under torchrun at once: a thread of gloo that still frees a tensor can abort
    Python's normal shutdown (exit code -6), or hold it up forever."""
    if "RANK" not in os.environ:
        sys.exit(exit_code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(exit_code)


def print_notes(notes: list[str]) -> None:
    """Print what a library function has assumed, on stderr."""
    for note in notes:
        print(note, file=sys.stderr)


def discard_output() -> None:
    """Send standard output to /dev/null from now on: its reader is gone (`| head`, a closed
    terminal)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line_error(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or ["no details"]
    return f"{type(error).__name__}: {lines[0]}"


def count(n: int, noun: str) -> str:
    """1, "document" -> "1 document"; 2000, "document" -> "2,000 documents"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith(("ch", "s")) else "s")


def parse(
    cls,
    argv: list[str] | None,
    doc: str,
    presets: dict[str, dict] | None = None,
    positional: str | None = None,
):
    """An instance of the dataclass `cls` from command line arguments.

    argv: the arguments, None for sys.argv[1:]. doc: the script's docstring, shown by --help.
    presets: defaults by name of preset, for a dataclass with a field `preset`. positional: the
    field that is given without a flag. Raises UserError for arguments that don't fit their field's
    type or bound.
    """
    formatter = functools.partial(
        argparse.RawDescriptionHelpFormatter, width=130, max_help_position=26
    )
    usage = f"%(prog)s {f'[{positional}] ' if positional else ''}[flags]"
    parser = Parser(usage=usage, description=doc, formatter_class=formatter, allow_abbrev=False)
    comments = field_comments(cls)
    group = parser
    for field in dataclasses.fields(cls):
        heading, text = comments[field.name]
        if heading:
            group = parser.add_argument_group(heading)
        kind, mark = field_type(cls, field.name)
        default = field.default
        options = {"default": default, "help": text.replace("%", "%%")}
        if typing.get_origin(kind) is tuple:  # several paths
            options |= {"type": local_path, "nargs": "*"}
            default = " ".join(default)
        elif typing.get_origin(kind) is typing.Literal:
            options |= {"choices": kind.__args__, "metavar": "WHICH"}
            options["help"] += f"; {', '.join(kind.__args__)}"
        elif kind is bool:
            options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        else:
            options["type"] = local_path if mark == "path" else kind
            options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
        if default not in (None, False, ""):
            options["help"] += f" (default: {default})"
        if field.name == positional:
            options = {"nargs": "?"} | options | {"metavar": field.name.upper()}
            group.add_argument(field.name, **options)
        else:
            group.add_argument(f"--{field.name}", **options)
    arguments = sys.argv[1:] if argv is None else argv
    # after --, nothing is a flag
    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments = [*map(with_underscores, arguments[:end]), *arguments[end:]]
    if presets:
        chosen, _ = parser.parse_known_args(arguments)
        parser.set_defaults(**presets[chosen.preset])
    values = vars(parser.parse_args(arguments))
    config = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    check_bounds(config)
    return config


class Parser(argparse.ArgumentParser):
    """argparse, with messages that say what to write instead."""

    def error(self, message):
        script = os.path.basename(sys.argv[0]) or "this script"
        raise UserError(f"{self.explain(message)} (--help lists the flags of {script})")

    def explain(self, message: str) -> str:
        if switch := re.match(r"argument (\S+): ignored explicit argument", message):
            return f"a switch takes no value: write {switch[1].replace('/', ' or ')}"
        if gpu := re.match(r"argument --device: invalid choice: 'cuda:(\d+)'", message):
            return f"{message}: CUDA_VISIBLE_DEVICES={gpu[1]} with --device cuda chooses this GPU"
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if not unknown:
            return message
        word = unknown[1].partition("=")[0]
        if word.lower() in ("true", "false"):
            return f"unexpected argument {word}: a switch takes no value; --no-... turns it off"
        if not word.startswith("-"):
            return (
                f"unexpected argument {word}; quote prompts of several words and globs, as in"
                " '*.txt'"
            )
        if word == "--local_rank":
            return f"unknown flag {word}: start with torchrun, which gives it in the environment"
        near = difflib.get_close_matches(word, self._option_string_actions, n=1)
        return f"unknown flag {word}" + (f": did you mean {near[0]}?" if near else "")


def local_path(text: str) -> str:
    """Expand ~, and refuse a URL."""
    if "://" in text:
        message = f"{text} is a URL; give a path on this machine, or a name on the Hub"
        raise argparse.ArgumentTypeError(message)
    return os.path.expanduser(text)


def field_type(cls, name: str) -> tuple[type, str]:
    """(type, mark) of a dataclass's field: PositiveInt | None -> (int, "positive")."""
    kind = typing.get_type_hints(cls, include_extras=True)[name]
    if type(None) in typing.get_args(kind):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)
    return kind, ""


def check_bounds(config) -> None:
    """Raise UserError for a number of a dataclass that is out of its bounds (see the top of this
    file)."""
    for name, value in vars(config).items():
        kind, mark = field_type(type(config), name)
        if value is None or kind not in (int, float):
            continue
        positive = mark == "positive"
        if kind is int and value < int(positive):
            raise UserError(f"--{name} is {value}: it must be at least {int(positive)}")
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            bound = "above 0" if positive else "of at least 0"
            raise UserError(f"--{name} is {value}: it must be a number {bound}")


def field_comments(cls) -> dict[str, tuple[str, str]]:
    """{field: (heading of the group that starts here or "", help)} from the source of a
    dataclass."""
    # under a profiler or debugger __main__ is its own file, and sys.argv[0] still the script
    path = sys.argv[0] if cls.__module__ == "__main__" else inspect.getsourcefile(cls)
    source = Path(path).read_text(encoding="utf-8")
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    (node,) = [node for node in classes if node.name == cls.__name__]
    lines = source.splitlines()
    comments = {}
    end = node.lineno
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            above = "\n".join(lines[end : field.lineno - 1])
            beside = "\n".join(lines[field.lineno - 1 : field.end_lineno])
            heading = re.search(r"# (.+)", above)
            comments[field.target.id] = (
                heading[1] if heading else "",
                re.search("# (.+)", beside)[1],
            )
        end = field.end_lineno
    return comments


def with_underscores(argument: str) -> str:
    """--max-steps=5 -> --max_steps=5; --no-compile stays, it is argparse's own spelling."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    prefix = "--no-" if name.startswith("--no-") else "--"
    return prefix + name[len(prefix) :].replace("-", "_") + equals + value
