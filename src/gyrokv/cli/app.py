"""The typer application: its commands, its version, and how mistakes are reported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import GyroKVError
from . import generate, info, perplexity

# the root of what the parser raises; typer names it only in some versions, and the class differs between them
_ClickException = typer.BadParameter.__mro__[2]


class _OneLineErrors(TyperGroup):
    """A group of commands whose errors are one line on stderr and exit status 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            status = super().main(*args, standalone_mode=False, **extra)
        except _ClickException as error:
            status = _fail(error.format_message())
        except GyroKVError as error:
            status = _fail(str(error))
        except typer.Abort:
            status = 130
        status = status if isinstance(status, int) else 0
        if standalone_mode:
            sys.exit(status)
        return status


def _fail(message: str) -> int:
    # `gyrokv` without arguments shows the help, which is an error without a message
    if message:
        print("gyrokv: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gyrokv {__version__}")
        raise typer.Exit()


app = typer.Typer(
    name="gyrokv",
    cls=_OneLineErrors,
    help="Attention over rotated, quantised KV caches: what formats there are, what they cost, and text made with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("compare")(perplexity.compare)
app.command("ppl")(perplexity.ppl)
app.command("generate")(generate.generate)
app.command("formats")(info.formats)
app.command("explain")(info.explain)
app.command("env")(info.env)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the application and return its exit status."""
    return app(args=arguments, prog_name="gyrokv", standalone_mode=False)
