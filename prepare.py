"""Prepare slices for training: import volumes, check a folder, write the demo brains, clean up.

python prepare.py import SCANS --out ROOT --table subjects.csv    # cut slices from volumes
python prepare.py check ROOT    # list the contents; look for leaks between train and test
python prepare.py demo ROOT     # write the synthetic demo brains
python prepare.py clean         # delete cached files that nothing has used for 30 days
"""

import re
import shutil
import time
from pathlib import Path

import tyro

from assets.demo_brains import write_demo
from config import Config, UserError
from dataset import visible_paths
from scans.checks import check
from scans.slicing import import_scans
from utils import delete_partials, ensure_writable, print_once, run_command, size_of, work_alone

# Names of cached files and folders
CACHED = re.compile(
    r"([0-9a-f]{16}-\d+|features-[a-z0-9]+-[0-9a-f]{16})\.npy(\.lock)?|compiled|demo-\d+"
    r"|check-[0-9a-f]{16}\.(txt|png)"
    r"|encoder\d*-[0-9a-f]{16}-\d+\.safetensors(\.lock)?|(fresh-\d+|twins)-\d+-\d+"
)


def demo(root: tyro.conf.Positional[Path], /) -> None:
    """Write the demo brains: synthetic, template-derived slices in the layout of the real set.

    Args:
        root: folder to write, which must be empty or not exist yet.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not empty")
    ensure_writable(root)
    write_demo(root)
    print_once(f"demo brains in {root}; {root / 'manifest.csv'} lists the drawn properties")


def clean(cache: Path = Config.cache, days: float = 30) -> None:
    """Delete the cached files that no command has used for some days.

    Args:
        cache: folder of decoded images, features, encoders and demo brains; all can be made again.
        days: a file is deleted if it has not been used for so many days; 0 deletes everything.
    """
    if not cache.is_dir():
        raise UserError(f"cache = {cache}: no such folder")
    delete_partials(cache)
    found = [path for path in visible_paths(cache) if CACHED.fullmatch(path.name)]
    old = sorted(p for p in found if p.stat().st_mtime <= time.time() - 86400 * days)
    freed = sum(map(size_of, old))
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    print_once(f"{cache}: {len(old)} of {len(found)} entries deleted, {freed / 1e6:.1f} MB")


def main() -> None:
    """Run the subcommand that the command line names."""
    work_alone()
    commands = {"import": import_scans, "check": check, "demo": demo, "clean": clean}
    tyro.extras.subcommand_cli_from_dict(commands)


if __name__ == "__main__":
    run_command(main)
