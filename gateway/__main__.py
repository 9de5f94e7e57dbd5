"""`python -m gateway` is the `gateway` command."""

from gateway.cli import app

# Engine cores and workers are spawned, and each child imports this module again.
if __name__ == "__main__":
    app()
