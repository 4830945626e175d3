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

from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import Range, UserError, fits
from exploration import counterfactual, directions, export, model, movies, page, projection
from utils import print_once, run_command, work_alone

NoPrefix = tyro.conf.arg(name="")
PAGE_DIRECTIONS = 5


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


def write_page(
    checkpoint: Path | None = None,
    out: Path | None = None,
    serve: bool = False,
    port: int = 8000,
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",
) -> None:
    """Write an HTML file that draws the generator's images in any browser, without a server.

    Args:
        checkpoint: run folder, generator.safetensors or checkpoints/*.pt; None: the newest run, or
            the demo.
        out: file to write; None: RUN/explore/explorer.html.
        serve: write nothing, and serve the page on 127.0.0.1; for generators that are too large.
        port: port of the server, 0 to 65535; 0: a free one.
        device: where the server computes.
    """
    if not fits(port, Annotated[int, Range(0, 65535)]):
        raise UserError(f"port = {port}: must be int, 0 to 65535")
    options = model.Options(checkpoint, out and out.parent, device=device if serve else "cpu")
    shown = model.open_model(options, writes=not serve)
    what = shown.G, shown.config, shown.classes
    out = out or shown.out / "explorer.html"
    if not serve:
        page.require_small(shown.G, out)
    chosen = directions.find_directions(shown, axes=PAGE_DIRECTIONS, factors=0)[:PAGE_DIRECTIONS]
    if serve:
        return page.serve(*what, chosen, port)
    page.write_page(*what, chosen, out)
    print_once(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Run the subcommand that the command line names."""
    work_alone()
    commands = {
        "counterfactual": compare_classes,
        "project": project_slices,
        "directions": find_directions,
        "interpolate": make_movie,
        "export": export_images,
        "page": write_page,
    }
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    run_command(main)
