"""The command line: a frozen dataclass becomes flags and help, a UserError one line and an exit
code.

A field of the dataclass is a flag of the same name; the comment at its right is its help, and a
comment line of its own starts a group:

    @dataclass(frozen=True)
    class SampleConfig:
        # the text
        num_samples: PositiveInt = 4  # texts to write

A number is finite, not negative and below 2^63; one whose type is PositiveInt or PositiveFloat is
above 0 as well.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import sys
import textwrap
import time
import typing
from typing import Annotated

PositiveInt, PositiveFloat = Annotated[int, "positive"], Annotated[float, "positive"]


class UserError(Exception):
    """Something that the user can put right: printed as one message without a traceback.

    code: the exit code (2 bad input, 1 the run failed). alone: perhaps only this rank has met it,
    so it is printed whatever the rank; other errors are the same on every rank.
    """

    def __init__(self, message: str, code: int = 2, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


def command(main):
    """Decorate a script's `main(argv=None) -> int`: a UserError is printed on stderr and becomes
    the exit code.

    Under torchrun the first rank of each machine prints an error that all ranks have, and leaves;
    torchrun then ends the others, which wait for that at most 10 s.
    """

    @functools.wraps(main)
    def run(argv=None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                errors="replace"
            )  # a terminal that is not UTF-8 shows ? for what it lacks
        try:
            return main(argv) or 0
        except UserError as error:
            rank_here = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))
            if rank_here > 0 and not error.alone:
                time.sleep(10)
            else:
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


def exit_process(exit_code: int) -> typing.NoReturn:
    """End the process. Under torchrun at once: a thread of gloo that still frees a tensor can abort
    Python's normal shutdown (exit code -6), or hold it up for ever."""
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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown and not unknown[1].startswith("-"):
            message = (
                f"{unknown[1]} belongs to no flag: quote a text of several words, and a pattern, as"
                " in '*.txt'"
            )
        elif unknown:
            near = difflib.get_close_matches(
                unknown[1].split("=")[0], self._option_string_actions, n=1
            )
            message = f"unknown flag {unknown[1]}" + (f": did you mean {near[0]}?" if near else "")
        script = os.path.basename(sys.argv[0]) or "this script"
        raise UserError(f"{message} (--help lists the flags of {script})")


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
    comments, group = field_comments(cls), parser
    for field in dataclasses.fields(cls):
        heading, text = comments[field.name]
        if heading:
            group = parser.add_argument_group(heading)
        (kind, _), default = field_type(cls, field.name), field.default
        options = {"default": default, "help": text.replace("%", "%%")}
        if typing.get_origin(kind) is typing.Literal:
            options |= {"choices": kind.__args__, "metavar": "WHICH"}
            options["help"] += f"; {', '.join(kind.__args__)}"
        elif kind is bool:
            options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        if default not in (None, False, ""):
            options["help"] += f" (default: {default})"
        if field.name == positional:
            group.add_argument(
                field.name, **options | {"metavar": field.name.upper(), "nargs": "?"}
            )
        else:
            group.add_argument(f"--{field.name}", **options)
    arguments = sys.argv[1:] if argv is None else argv
    end = (
        arguments.index("--") if "--" in arguments else len(arguments)
    )  # behind it nothing is a flag
    arguments = [*map(with_underscores, arguments[:end]), *arguments[end:]]
    if presets:
        chosen, _ = parser.parse_known_args(arguments)
        parser.set_defaults(**presets[chosen.preset])
    config = cls(**vars(parser.parse_args(arguments)))
    check_bounds(config)
    return config


def field_type(cls, name: str) -> tuple[type, bool]:
    """(type, whether it must be above 0) of a dataclass's field: PositiveInt | None -> (int,
    True)."""
    kind = typing.get_type_hints(cls, include_extras=True)[name]
    if type(None) in typing.get_args(kind):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)[0], True
    return kind, False


def check_bounds(config) -> None:
    """Raise UserError for a number of a dataclass that is out of its bounds (see the top of this
    file)."""
    for name, value in vars(config).items():
        kind, positive = field_type(type(config), name)
        if value is None or kind not in (int, float):
            continue
        if kind is int and value < int(positive):
            raise UserError(f"--{name} is {value}: it must be at least {int(positive)}")
        if not (0 < value if positive else 0 <= value):
            bound = "above 0" if positive else "of at least 0"
            raise UserError(f"--{name} is {value}: it must be a number {bound}")
        if value >= 2**63:
            raise UserError(f"--{name} is {value}: it must be below 2^63")


def field_comments(cls) -> dict[str, tuple[str, str]]:
    """{field: (heading of the group that starts here or "", help)} from the source of a
    dataclass."""
    comments, heading = {}, ""
    for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
        if match := re.match(r"    # (.+)", line):
            heading = match[1]
        elif match := re.match(r"    (\w+): .*?  # (.+)", line):
            comments[match[1]] = heading, match[2]
            heading = ""
    return comments


def with_underscores(argument: str) -> str:
    """--max-steps=5 -> --max_steps=5; --no-compile stays, it is argparse's own spelling."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    prefix = "--no-" if name.startswith("--no-") else "--"
    return prefix + name[len(prefix) :].replace("-", "_") + equals + value
