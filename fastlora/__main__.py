"""`python -m fastlora` is the command `fastlora`."""

from fastlora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
