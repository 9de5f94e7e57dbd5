"""`gateway`, whose host dies by SIGKILL at the point of publishing that a file names.

    python -m tests.e2e.killed_host FILE serve ...

`tests/gateway/publishing_points.py` has the points. The file goes first, so the next host lives.
"""

# Cores and workers import this module again, and are not to run anything.
if __name__ == "__main__":
    import os
    import signal
    import sys
    from pathlib import Path

    import gateway.serve
    from gateway.cli import app

    file = Path(sys.argv.pop(1))
    names = vars(gateway.serve)
    configure_logging = names["configure_logging"]

    def reached(point: str) -> None:
        """Die, if it is this one."""
        if file.exists() and file.read_text() == point:
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_and_install() -> None:
        """What is patched may be imported once the environment is prepared."""
        from tests.gateway.publishing_points import install

        configure_logging()
        install(reached)

    names["configure_logging"] = configure_and_install
    app()
