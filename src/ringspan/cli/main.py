"""The command `ringspan`: its subcommands, and the one place where an error becomes a line on stderr and exit status 2."""

from __future__ import annotations

import sys

import typer

from ringspan.cli.export import command as export
from ringspan.cli.show import command as show
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
app.command("export")(export)


def main() -> None:
    """Runs the command line. Exit status 2 is the user's to put right: an unknown option, or a request that cannot be carried out."""
    try:
        app()
    except RingspanError as error:
        sys.exit(_fail(error))


def _fail(error: RingspanError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
