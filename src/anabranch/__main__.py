"""`python -m anabranch`: the command line."""

from anabranch.cli.main import app

app()
