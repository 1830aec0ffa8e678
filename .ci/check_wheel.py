"""Check what a wheel ships: types marked, both packages, their templates, and nothing else."""

import sys
import zipfile
from pathlib import Path


def main() -> None:
    """Check the wheel that is named on the command line."""
    path = Path(sys.argv[1])
    names = zipfile.ZipFile(path).namelist()
    needed = ["conditioning/__init__.py", "conditioning/py.typed", "experiments/__main__.py"]
    # A module in the tree but not in the wheel is found by its absence at the user's.
    needed += [
        source.as_posix()
        for folder in ("conditioning", "experiments")
        for source in sorted(Path(folder).rglob("*.py"))
    ]
    needed += [source.as_posix() for source in sorted(Path("conditioning").glob("*/templates/*"))]
    missing = [name for name in needed if name not in names]
    stray = [
        name
        for name in names
        if name.split("/")[0] not in ("conditioning", "experiments") and ".dist-info/" not in name
    ]
    if missing or stray:
        sys.exit(f"{path.name}: missing {missing or 'nothing'}, stray {stray or 'nothing'}")
    print(f"{path.name}: {len(names)} files, types marked, nothing stray")


if __name__ == "__main__":
    main()
