"""Write both networks of a run on the demo brains to assets/demo_generator, in half precision.

    python -m assets.make_demo_generator RUN      # from the project's folder

It reads the newest checkpoint of the run.
"""

import sys
from dataclasses import replace
from pathlib import Path

from config import Config, UserError
from training.runs import (
    DEMO_GENERATOR,
    checkpoints,
    load_checkpoint,
    read_run_config,
    write_run_config,
)
from utils import print_once, run_command, write_safetensors


def share(run: Path, out: Path) -> None:
    """Write config.json, generator.safetensors and discriminator.safetensors into `out`.

    Raises UserError for a run without a checkpoint.
    """
    config, classes, data = read_run_config(run)
    if not (found := checkpoints(run)):
        raise UserError(f"{run} holds no checkpoint")
    state = load_checkpoint(found[-1])
    for name, part in (("generator", "G_ema"), ("discriminator", "D")):
        half = {k: v.half() for k, v in state[part].items()}
        write_safetensors(out / f"{name}.safetensors", half, state["cur_nimg"])
    config = replace(config, out=Config.out, cache=Config.cache, init_from=None)
    write_run_config(out, config, classes, data)
    (out / "paths.json").unlink()
    print_once(f"{out}: {state['cur_nimg']:,} images")


def main() -> None:
    """Command line of this module."""
    if len(sys.argv) != 2:
        raise UserError("one run folder is needed")
    run = Path(sys.argv[1])
    if (root := read_run_config(run)[0].data_root) is not None:
        raise UserError(f"{run} was trained on {root}, not on demo brains")
    share(run, DEMO_GENERATOR)


if __name__ == "__main__":
    run_command(main)
