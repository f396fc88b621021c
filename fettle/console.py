"""What every command of `fettle` does alike: results, errors as one line, exit codes.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 could not do it, 2 wrong
usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from fettle.errors import FettleError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


class Commands(TyperGroup):
    """Turns every foreseen failure of any command into one clear line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            fail(error.message, WRONG_USAGE)
        except FettleError as error:
            fail(error.message, FAILED)
        except BrokenPipeError:
            # `fettle show | head`: the reader has seen enough.
            raise typer.Exit(FAILED) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", FAILED)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)


def checked(model: type[BaseModel], /, **values: Any) -> Any:
    """A configuration from the command line; what is wrong with it in one line."""
    from pydantic import ValidationError

    from fettle.family import describe_validation

    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(describe_validation(error)) from None


def print_json(value: Any) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def fail(message: str, status: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)
