"""Explore a trained generator: what separates the classes, where real slices lie, what w does.

python explore.py counterfactual                 # the same latents as each class
python explore.py project SLICE... --class AD    # real slices in the latent space
python explore.py directions                     # what an image does along the axes of w
python explore.py interpolate --seeds 0 1 2      # a movie
python explore.py export --count 10000 --out DIR # a synthetic data set; or --onnx FILE
python explore.py page                           # one HTML file that draws in the browser

Each takes --checkpoint RUN (default: the newest run, or the demo generator) and writes into
RUN/explore or --out. A difference between classes is one of the model, never atrophy.
"""

from typing import Annotated

import tyro

from exploration import counterfactual, directions, export, movies, projection
from utils import print_once, run_command, work_alone

NoPrefix = tyro.conf.arg(name="")


def compare_classes(options: Annotated[counterfactual.Options, NoPrefix]) -> None:
    """Draw the same latents as each class, and measure what changes with the class."""
    print_once(f"figures in {counterfactual.counterfactual(options)}")


def project_slices(options: Annotated[projection.Options, NoPrefix]) -> None:
    """Find real slices in the latent space, and change their class."""
    print_once(f"figures in {projection.project_command(options)}")


def find_directions(options: Annotated[directions.Options, NoPrefix]) -> None:
    """Find directions in w, and measure what an image does along each."""
    print_once(f"figures in {directions.explore_directions(options)}")


def make_movie(options: Annotated[movies.Options, NoPrefix]) -> None:
    """Write a movie between seeds, classes or positions, that ends where it begins."""
    print_once(f"movie in {movies.interpolate(options)}")


def export_images(options: Annotated[export.Options, NoPrefix]) -> None:
    """Write a synthetic data set with manifest and data card, or the generator as ONNX."""
    print_once(f"written: {export.export(options)}")


def main() -> None:
    """Run the subcommand that the command line names."""
    work_alone()
    commands = {
        "counterfactual": compare_classes,
        "project": project_slices,
        "directions": find_directions,
        "interpolate": make_movie,
        "export": export_images,
    }
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    run_command(main)
