"""The command line."""

import typer

from anabranch.cli.bench import bench
from anabranch.cli.generate import generate
from anabranch.cli.lab import lab
from anabranch.cli.serve import serve
from anabranch.cli.train import trace, train

app = typer.Typer(
    help="Adaptive expert parallelism for Mixture-of-Experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(train)
app.command()(trace)
app.command()(generate)
app.command()(serve)
app.add_typer(bench, name="bench")
app.add_typer(lab, name="lab")

if __name__ == "__main__":
    app()
