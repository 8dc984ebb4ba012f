"""The command `ringspan`: its subcommands, and the one place where an error becomes a line on stderr and exit status 2."""

from __future__ import annotations

import sys

import typer

from ringspan.cli.bench import command as bench
from ringspan.cli.doctor import command as doctor
from ringspan.cli.export import command as export
from ringspan.cli.leave import fail_unforeseen, leave
from ringspan.cli.show import command as show
from ringspan.cli.trace import command as trace
from ringspan.cli.train import command as train
from ringspan.cli.verify import command as verify
from ringspan.errors import RingspanError

app = typer.Typer(
    name="ringspan",
    help="Exact attention over sequences longer than one device holds.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train)
app.command("verify")(verify)
app.command("show")(show)
app.command("bench")(bench)
app.command("trace")(trace)
app.command("doctor")(doctor)
app.command("export")(export)


def main() -> None:
    """Runs the command line. Exit status 2 is the user's to put right: an unknown option, or a request that cannot be carried out."""
    try:
        app()
    except RingspanError as error:
        sys.exit(_fail(error))
    except OSError as error:
        if error.filename is None:
            raise
        # Only looking whether a file is there raises where one may not look, or where no file can have such a name.
        rule = "A file or folder that is named must be one that this user may read, or write"
        sys.exit(_fail(RingspanError(str(error.filename), str(error.strerror), rule, "another path, or other permissions")))


def _fail(error: RingspanError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def process() -> None:
    """`main`, and the end of the process, see `leave`."""
    try:
        main()
    except SystemExit as end:
        leave(end.code)
    except Exception:
        fail_unforeseen()


if __name__ == "__main__":
    process()
