"""The commands of `hf_longattn_cli` under a name inside the package, and `python -m hf_longattn.cli.main`."""

from hf_longattn_cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
