"""One HTML file that draws a generator's images in any browser, and a server for large generators.

The file holds the weights (float16 and float32, base64), the forward pass (generator.js, in a Web
Worker) and the sliders (page.js): it needs no server, no network and no installation. A generator
that is too large for that is served: the same page then asks this computer for each image.

References:
    [1] Lavin and Gray 2016, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308
"""

import base64
import html
import json
import re
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from torch import Tensor

import utils
from config import Config, UserError
from evaluation.samples import labels_of, latents
from modules import Generator, SynthesisLayer
from training.runs import training_data

FOLDER = Path(__file__).parent  # of page.html, page.js and generator.js
NUM_SEEDS = 256  # seeds 0 to 255 can be chosen
MAX_BYTES = 30_000_000  # of a page
MAX_SECONDS = 0.5  # an image may take in a browser, as estimated
PRODUCTS_PER_SECOND = 0.8e9  # of one core in plain JavaScript
DEVIATIONS = 3  # how far a slider moves along a direction, to each side
SCALES = (8, 16, 32, 64, 128)  # grey levels at the ends of the scale of a difference
MAX_QUERY = 500  # signs
NUMBER = re.compile(r"-?\d+(\.\d*)?(e-?\d+)?", re.ASCII)
LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII)

Directions = Sequence[tuple[str, Tensor]]


class Request(NamedTuple):
    """An image to draw, as the sliders tell it."""

    seed: float
    """0 to 255; between two seeds, w is interpolated."""
    from_class: int
    to_class: int
    mix: float
    """Weight of `to_class` in the label, 0 to 1."""
    psi: float
    position: float | None
    """Position in the scan, 0 to 1; None: the one of the seed."""
    shifts: tuple[float, ...]
    """Standard deviations to move along each direction, after truncation."""


@torch.no_grad()
def draw(G: Generator, directions: Directions, request: Request) -> np.ndarray:
    """The image of a request. -> uint8 [H, W]."""
    low, share = int(request.seed), request.seed % 1
    seeds = [low, low + 1] if share else [low]
    ends = request.from_class, request.to_class
    c = [labels_of(G, np.full(len(seeds), label), seeds, request.position) for label in ends]
    device = next(G.parameters()).device
    z, c = latents(seeds, G.z_dim).to(device), c[0].lerp(c[1], request.mix).to(device)
    ws = G.mapping(z, c, request.psi)
    ws = ws[:1].lerp(ws[-1:], share)
    for (_, vector), shift in zip(directions, request.shifts, strict=True):
        ws = ws + shift * vector.to(device)
    return utils.to_uint8(G.synthesis(ws, "const"))[0]


# The page


def products(G: Generator) -> int:
    """Multiplications of an image in generator.js: a quarter of those of plain convolutions [1]."""
    layers = [m for m in G.modules() if isinstance(m, SynthesisLayer)]
    sizes = [2 ** (i // 2 + 2) for i in range(1, len(layers) + 1)]  # 4, 8, 8, 16, 16, ...
    return sum(m.weight.numel() * R**2 // 4 for m, R in zip(layers, sizes, strict=True))


def pack(tensors: dict[str, Tensor]) -> tuple[list[tuple[str, list[int], int]], str]:
    """Tensors in base64, and the name, shape and bytes per value of each.

    Synthesis has float16. Eight layers of mapping would add its errors up to two grey levels, so
    what makes w has float32.
    """
    index, content = [], []
    for name, tensor in tensors.items():
        size = 2 if name.startswith("synthesis.") else 4
        index.append((name, list(tensor.shape), size))
        content.append(tensor.cpu().numpy().astype(f"<f{size}").tobytes())
    return index, base64.b64encode(b"".join(content)).decode()


def usual_difference(G: Generator, directions: Directions, classes: Sequence[str]) -> int:
    """The scale in grey levels that holds nearly all differences of the first two classes."""
    if len(classes) < 2:
        return SCALES[0]
    none = (0.0,) * len(directions)
    pairs = [
        [draw(G, directions, Request(seed, 0, 1, mix, 1, None, none)) for mix in (0.0, 1.0)]
        for seed in range(4)
    ]
    size = np.quantile(np.abs(np.subtract(*np.array(pairs, int).swapaxes(0, 1))), 0.995)
    return next((scale for scale in SCALES if scale >= size), SCALES[-1])


def about(G: Generator, config: Config, classes: Sequence[str], served: bool) -> list[str]:
    """What the reader must know of the images, a paragraph each."""
    size = f"{config.img_resolution} × {config.img_resolution} pixels"
    weights = sum(p.numel() for p in G.parameters())
    copies = " An image can resemble a training slice; evaluate.py measures how much."
    if config.data_root is None and config.init_from is None:
        copies = ""  # of the demo brains
    given = f"the class ({', '.join(classes)})" if G.c_dim and len(classes) > 1 else "no class"
    given += " and the position in the scan" if G.by_position else ""
    exact = "Images are computed by PyTorch on the computer that serves this page."
    if not served:
        exact = (
            "Images are computed in this browser, with weights of the synthesis rounded to 16 "
            "bits. In tests they differ from those of predict.py by one grey level of 255 at most."
        )
    use = "The images are for teaching and for research on the model, and not for diagnosis."
    if len(classes) > 1:
        use += (
            " A difference between classes is what the model has learned, with its errors: it is "
            "no finding and no measurement of disease. Here the label changes; `explore.py "
            "counterfactual` moves w in its place, which keeps more of the person."
        )
    return [
        f"A generative model (StyleGAN2) draws these slices of {size}. It has {weights:,} weights, "
        f"was trained on {training_data(config)}, and is given {given}.{copies}",
        use,
        exact,
    ]


def page(
    G: Generator, config: Config, classes: Sequence[str], directions: Directions, served: bool
) -> str:
    """The HTML of the page; if it is `served`, without weights."""
    seeds = list(range(NUM_SEEDS))
    settings = {
        "classes": list(classes),
        "resolution": config.img_resolution,
        "numSeeds": NUM_SEEDS,
        "positions": [np.random.default_rng(s).random() for s in seeds] if G.by_position else None,
        "numPositions": utils.NUM_POSITIONS,
        "directions": [name for name, _ in directions],
        "deviations": DEVIATIONS,
        "scales": SCALES,
        "scale": usual_difference(G, directions, classes),
        "about": about(G, config, classes, served),
        "served": served,
    }
    weights = ""
    if not served:
        tensors = G.state_dict() | {"latents": latents(seeds, G.z_dim)}
        if directions:
            tensors["directions"] = torch.stack([vector for _, vector in directions])
        settings["tensors"], weights = pack(tensors)
    parts = {
        "title": html.escape(utils.printable(f"Synthetic brain MRI: {', '.join(classes)}")),
        "settings": json.dumps(settings).replace("<", "\\u003c"),  # no </script> in a name
        "weights": weights,
        "generator": "" if served else read("generator.js"),
        "script": read("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], read("page.html"))


def read(name: str) -> str:
    """A file that becomes part of the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


def require_small(G: Generator, out: Path) -> None:
    """Raises UserError if a generator is too large for a browser, or `out` cannot be written."""
    seconds = products(G) / PRODUCTS_PER_SECOND
    numbers = sum(v.numel() for v in [*G.state_dict().values(), *G.mapping.state_dict().values()])
    size = numbers * 2 * 4 / 3  # bytes in base64; mapping has four of them, synthesis two
    advice = "show it with --serve"
    if size > MAX_BYTES:
        limit = f"more than {MAX_BYTES / 1e6:.0f}"
        raise UserError(f"out = {out}: the page would have {size / 1e6:.0f} MB, {limit}; {advice}")
    if seconds > MAX_SECONDS:
        limit = f"about {seconds:.1f} s an image, more than {MAX_SECONDS}"
        raise UserError(f"out = {out}: a browser would need {limit}; {advice}")
    utils.ensure_writable(out.parent)
    if out.is_dir():
        raise UserError(f"out = {out}: is a folder, must be a file")
    if out.exists() and b"<!doctype html" not in out.read_bytes()[:100].lower():
        raise UserError(f"out = {out}: exists and is no page; choose another name")


def write_page(
    G: Generator, config: Config, classes: Sequence[str], directions: Directions, out: Path
) -> None:
    """Write the page as one file. Raises UserError as `require_small`."""
    require_small(G, out)
    content = page(G, config, classes, directions, served=False)
    utils.write_atomically(out, lambda partial: partial.write_text(content, encoding="utf-8"))


# The server


def parse_query(text: str, num_classes: int, num_directions: int, by_position: bool) -> Request:
    """The request in a query such as seed=3&from=0&to=1&mix=0.5&psi=1&directions=0,1.5.

    Raises ValueError with one line if a part is missing, unknown, no number or out of range.
    """
    if len(text) > MAX_QUERY:
        raise ValueError(f"a query of more than {MAX_QUERY} signs")
    pairs = parse_qsl(text, keep_blank_values=True)
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a part of the query occurs twice")

    def number(name: str, text: str, low: float, high: float) -> float:
        if not NUMBER.fullmatch(text) or not low <= float(text) <= high:
            raise ValueError(f"{name} = {text[:40]!r}: must be a number from {low} to {high}")
        return float(text)

    def take(name: str, high: float) -> float:
        if name not in values:
            raise ValueError(f"the query has no {name}")
        return number(name, values.pop(name), 0, high)

    seed, mix, psi = take("seed", NUM_SEEDS - 1), take("mix", 1), take("psi", 1)
    labels = [take(name, num_classes - 1) for name in ("from", "to")]
    if any(label % 1 for label in labels):
        raise ValueError("from and to must be whole numbers")
    position = take("position", 1) if by_position and "position" in values else None
    shifts = [part for part in values.pop("directions", "").split(",") if part]
    if len(shifts) != num_directions:
        raise ValueError(f"directions: {len(shifts)} numbers, must be {num_directions}")
    if values:
        raise ValueError(f"unknown part of the query: {next(iter(values))[:40]!r}")
    shifts = [number("directions", part, -DEVIATIONS, DEVIATIONS) for part in shifts]
    return Request(seed, int(labels[0]), int(labels[1]), mix, psi, position, tuple(shifts))


class Handler(BaseHTTPRequestHandler):
    """Answers / with the page and /image?... with the bytes of an image.

    Only a page of this server may ask: a Host or Origin of another name is refused, so that no
    foreign site reads images, not even through a name of its own that leads to this computer.
    """

    server: "ImageServer"
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds, for a connection on which nothing comes

    def do_GET(self) -> None:
        """Answer a request for the page or an image."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not LOCAL_HOST.fullmatch(host) or origin not in (None, f"http://{host}"):
            return self.answer(403, "only pages of this computer may ask")
        parts = urlsplit(self.path)
        if parts.path == "/image":
            try:
                image = self.server.image(parts.query)
            except ValueError as error:
                return self.answer(400, str(error))
            return self.answer(200, image, "application/octet-stream")
        if parts.path != "/":
            return self.answer(404, "there is only / and /image")
        self.answer(200, self.server.content, "text/html")

    def answer(self, status: int, content: str | bytes, kind: str = "text/plain") -> None:
        """Send text, or bytes, with its kind."""
        if isinstance(content, str):
            content, kind = content.encode(), f"{kind}; charset=utf-8"
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "frame-ancestors 'none'",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request for a file, such as another method, in one line."""
        self.close_connection = True
        self.answer(code, f"{message or 'not understood'}")

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class ImageServer(ThreadingHTTPServer):
    """Serves the page of a generator on 127.0.0.1, whose images PyTorch draws one at a time."""

    daemon_threads = True

    def __init__(
        self, G: Generator, config: Config, classes: Sequence[str], directions: Directions,
        port: int,
    ) -> None:  # fmt: skip
        self.G, self.directions, self.num_classes = G, directions, len(classes)
        self.content = page(G, config, classes, directions, served=True)
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def image(self, query: str) -> bytes:
        """The grey levels of an image, row by row. Raises ValueError for a bad query."""
        request = parse_query(query, self.num_classes, len(self.directions), self.G.by_position)
        with self.lock:
            return draw(self.G, self.directions, request).tobytes()

    def handle_error(self, *_: object) -> None:
        """Print an error, but not of a browser that leaves before its answer."""
        if not isinstance(error := sys.exception(), OSError):
            utils.print_once(f"error: {utils.first_line(error)}")


def serve(
    G: Generator, config: Config, classes: Sequence[str], directions: Directions, port: int
) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C. Raises UserError if the port is taken."""
    try:
        server = ImageServer(G, config, classes, directions, port)
    except OSError as error:
        raise UserError(f"port = {port}: {error.strerror or error}; choose another") from error
    with server:
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            utils.print_once(f"{address} shows the page; Ctrl-C ends it")
            server.serve_forever()
        except KeyboardInterrupt:
            utils.print_once("stopped")
