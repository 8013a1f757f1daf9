"""The command line. A command's module is imported when the command is asked for: `anabranch plan` needs no torch."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# name: module and attribute, a command or a group of commands.
COMMANDS = {
    "train": ("train", "train"),
    "trace": ("train", "trace"),
    "plan": ("plan", "plan"),
    "calibrate": ("calibrate", "calibrate"),
    "simulate": ("simulate", "simulate"),
    "generate": ("generate", "generate"),
    "serve": ("serve", "serve"),
    "bench": ("bench", "bench"),
    "lab": ("lab", "lab"),
}


class Commands(TyperGroup):
    """The commands by name, loaded one by one. Its contexts and commands are of the click that typer carries within."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        found = getattr(import_module(f"anabranch.cli.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
            alone.command(cmd_name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Commands,
    help="Adaptive expert parallelism for Mixture-of-Experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def anabranch() -> None:
    """Adaptive expert parallelism for Mixture-of-Experts models."""


if __name__ == "__main__":
    app()
