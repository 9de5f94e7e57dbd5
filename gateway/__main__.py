"""`python -m gateway` is the `gateway` command."""

# Engine cores and workers are spawned, and each child imports this module again: it
# must neither run the command there nor import what only the command needs.
if __name__ == "__main__":
    from gateway.cli import app

    app()
