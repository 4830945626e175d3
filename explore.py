"""Explore a trained generator: what separates the classes, where real slices lie, what w does.

python explore.py counterfactual            # the same latents as each class, and their difference
python explore.py project SLICE... --class AD    # real slices in the latent space, class changed
python explore.py directions                # what moves along the axes of w
python explore.py interpolate --seeds 0 1 2      # a movie
python explore.py export --count 10000 --out DIR # a synthetic data set, or --onnx FILE
python explore.py page                      # one HTML file that draws in the browser

Each takes --checkpoint RUN (default: the newest run, or the demo generator) and writes into
RUN/explore or --out. A difference between classes is one of the model, never atrophy.
"""

from typing import Annotated

import tyro

from exploration import counterfactual, projection
from utils import print_once, run_command, work_alone

NoPrefix = tyro.conf.arg(name="")


def compare(options: Annotated[counterfactual.Options, NoPrefix]) -> None:
    """Draw the same latents as each class, and measure what changes with the class."""
    print_once(f"figures in {counterfactual.counterfactual(options)}")


def project(options: Annotated[projection.Options, NoPrefix]) -> None:
    """Find real slices in the latent space, and change their class."""
    print_once(f"figures in {projection.project_command(options)}")


def main() -> None:
    """Run the subcommand that the command line names."""
    work_alone()
    commands = {"counterfactual": compare, "project": project}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    run_command(main)
