"""The page of `explore.py page`: its pixels in a real browser, its server, its refusals.

Tests in a browser need playwright and Chromium, and are skipped without them.
"""

import http.client
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import explore
from config import CPU, Config, UserError
from exploration import page as pages
from exploration.directions import principal_axes, random_latents
from exploration.model import Model
from exploration.page import ImageServer, Request, draw, parse_query, write_page
from modules import Generator
from predict import Options, sample_class
from training import runs
from utils import NUM_POSITIONS, width_of_c

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SMALL = replace(
    Config(**CPU), img_resolution=16, z_dim=8, w_dim=8, channel_base=96, channel_max=16,
    mapping_layers=3, noise=True,
)  # fmt: skip
IDLE = "pixels && !running && !changed"
PIXELS = """(id) => {
    const { width, height } = element(id), context = element(id).getContext("2d");
    return Array.from(context.getImageData(0, 0, width, height).data);
}"""


def make(config: Config = SMALL, num_classes: int = 2, seed: int = 0) -> Generator:
    """A generator with random weights, in which every part of an image matters."""
    torch.manual_seed(seed)
    G = Generator(config, width_of_c(num_classes, config.condition_position))
    for name, p in G.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            p.data += (0.3 if name.endswith("bias") else 0.1) * torch.randn_like(p)
        if "torgb.weight" in name:
            p.data *= 0.3  # few pixels are clipped
    G.mapping.estimate_w_avg(100)
    return G.eval().requires_grad_(False)


def axes(G: Generator, count: int = 5) -> list[tuple[str, torch.Tensor]]:
    num_classes = len(G.mapping.w_avg) // (NUM_POSITIONS if G.by_position else 1)
    model = Model(G, SMALL, [str(i) for i in range(num_classes)], Path(), Path())
    return principal_axes(random_latents(model, 2048).inner, count)


def request(seed=0.0, mix=0.0, psi=1.0, shifts=(0.0,) * 5, labels=(0, 1), position=None) -> Request:
    return Request(seed, *labels, mix, psi, position, shifts)


def as_sliders(wanted: Request) -> dict:
    """A request as page.js writes it."""
    seed, first, second, mix, psi, position, shifts = wanted
    known = {"seed": seed, "from": first, "to": second, "mix": mix, "psi": psi}
    return known | {"position": position, "directions": list(shifts)}


def wait(view, expression: str = IDLE) -> None:
    """Ask until an expression holds: the page's policy allows no `wait_for_function`."""
    ends = time.monotonic() + 60
    while not view.evaluate(expression):
        assert time.monotonic() < ends, f"{expression} does not come true"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(browser) -> Iterator[Callable]:
    """Opens an address without a network; every error of the page fails the test."""
    problems, contexts = [], []

    def open_page(address: str | Path, **options):
        offline = isinstance(address, Path)
        context = browser.new_context(**{"offline": offline, "accept_downloads": True} | options)
        contexts.append(context)
        view = context.new_page()
        view.set_default_timeout(60_000)
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("console", lambda said: problems.extend([said.text] * (said.type == "error")))
        if offline:
            view.on("request", lambda sent: problems.append(sent.url))
            address = f"file://{address}"
        view.goto(address)
        wait(view, IDLE)
        return view

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in problems if not text.startswith(("file:", "blob:", "data:"))] == []


def grey(view, canvas: str = "image") -> np.ndarray:
    """What a canvas shows. -> [R, R], or [R, R, 3] for a picture in colours."""
    wait(view, IDLE)
    values = np.array(view.evaluate(PIXELS, canvas), int)
    size = round((len(values) / 4) ** 0.5)
    values = values.reshape(size, size, 4)
    assert (values[..., 3] == 255).all()
    return values[..., 0] if canvas == "image" else values[..., :3]


def computed(view, wanted: Request, size: int) -> np.ndarray:
    """The worker's image of a request."""
    image = view.evaluate("async (request) => Array.from(await ask(request))", as_sliders(wanted))
    return np.array(image).reshape(size, size)


KINDS = {  # settings and number of classes
    "as trained on a CPU": ({}, 2),
    "without noise": ({"noise": False, "img_resolution": 32}, 2),
    "with two layers of mapping": ({"mapping_layers": 2, "z_dim": 5, "w_dim": 7}, 2),
    "without classes": ({"conditional": False}, 1),
    "with three classes": ({"img_resolution": 64, "channel_base": 64 * 3}, 3),
    "with positions": ({"condition_position": True}, 2),
    "with positions alone": ({"condition_position": True, "w_dim": 3}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_generator_has_pytorchs_pixels(visit, tmp_path, kind):
    settings, num_classes = KINDS[kind]
    config = replace(SMALL, **settings)
    G = make(config, num_classes)
    directions, size = axes(G), config.img_resolution
    write_page(G, config, ["AD", "NC", "MCI"][:num_classes], directions, tmp_path / "page.html")
    view = visit(tmp_path / "page.html")
    shifts = (1.5, -3.0, 0.1, 0.0, 2.0)[: len(directions)]
    still, last = (0.0,) * len(directions), num_classes - 1
    wanted = [
        request(3, 0, 1, still, (last, 0)),
        request(200, 0.25, 0.5, shifts, (0, last)),
        request(17.75, 1, 0.7, still, (0, last)),
        request(255, 0.5, 0, shifts, (last, last)),
    ]
    if config.condition_position:
        wanted += [
            w._replace(position=p) for w, p in zip(wanted, (0.0, 0.3, 0.62, 1.0), strict=True)
        ]
    images = [draw(G, directions, w).astype(int) for w in wanted]
    assert np.std(images, axis=(1, 2)).min() > 10 and np.abs(images[0] - images[1]).mean() > 5
    for image, w in zip(images, wanted, strict=True):
        assert np.abs(computed(view, w, size) - image).max() <= 1, w
    assert view.locator("#difference").is_visible() == (num_classes > 1)
    assert view.locator("#position").count() == config.condition_position


def test_a_drawn_seed_is_the_image_of_predict():
    for classes, by_position in ((2, False), (3, True)):
        G = make(replace(SMALL, condition_position=by_position), classes)
        for seed, label, psi, position in ((4, 1, 1.0, None), (9, 0, 0.4, 0.3)):
            options = Options(truncation_psi=psi, position=position if by_position else None)
            expected = sample_class(G, label, [seed], options)[0]
            for mix, labels in ((0, (label, 0)), (1, (0, label))):
                wanted = Request(seed, *labels, mix, psi, options.position, ())
                assert np.abs(draw(G, [], wanted).astype(int) - expected).max() <= 1


@pytest.fixture(scope="module")
def demo() -> tuple[Generator, Config, list[str]]:
    return runs.load_generator(runs.DEMO_GENERATOR)


@pytest.fixture(scope="module")
def demo_page(demo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "demo.html"
    write_page(*demo, axes(demo[0]), out)
    return out


def test_the_demo_by_keyboard_by_link_and_as_a_file(visit, demo, demo_page, tmp_path):
    """A slider for a slider, the keys of a keyboard; then the address, the PNG, the difference."""
    G, directions = demo[0], axes(demo[0])
    assert demo_page.stat().st_size < 5_000_000
    view = visit(demo_page)
    assert np.abs(grey(view) - sample_class(G, 0, [0], Options())[0]).max() <= 1
    for name, keys in {
        "seed": ["End", "ArrowLeft", "ArrowLeft"],
        "mix": ["ArrowRight"] * 3,
        "psi": ["ArrowLeft"] * 2,
        "d2": ["End"],
        "d5": ["ArrowLeft"] * 4,
    }.items():
        view.focus(f"#{name}")
        for key in keys:
            view.keyboard.press(key)
    wanted = request(253, 0.03, 0.98, (0, 3, 0, 0, -0.4))
    image = draw(G, directions, wanted).astype(int)
    shown = grey(view)
    assert np.abs(shown - image).max() <= 1
    wait(view, "location.hash.includes('d5=')")
    hash = view.evaluate("location.hash")
    assert hash == "#seed=253&mix=0.03&psi=0.98&d2=3&d5=-0.4"

    assert (grey(visit(Path(f"{demo_page}{hash}"))) == shown).all()

    with view.expect_download() as download:
        view.click("#save")
    download.value.save_as(tmp_path / "saved.png")
    assert download.value.suggested_filename == "generated_seed253.png"
    saved = np.asarray(Image.open(tmp_path / "saved.png").convert("RGB"))
    assert (saved == shown[..., None]).all()

    other = draw(G, directions, wanted._replace(mix=1.0)).astype(int)
    red, _, blue = np.moveaxis(grey(view, "difference"), 2, 0)
    assert (red > blue)[image - other > 3].all() and (red < blue)[image - other < -3].all()
    assert view.inner_text("#versus") == "this mixture minus NC"
    assert (red + blue)[np.abs(image - other) <= 1].max() < 25
    view.focus("#mix")
    view.keyboard.press("End")  # compared with the other end from now on
    grey(view)
    assert view.inner_text("#versus") == "NC minus AD"


@pytest.mark.slow
def test_a_bad_address_shows_an_image_all_the_same(visit, tmp_path):
    G = make()
    write_page(G, SMALL, ["AD", "NC"], axes(G), tmp_path / "page.html")
    address = Path(f"{tmp_path / 'page.html'}#seed=9999&mix=NaN&psi=-4&d1=x&__proto__=1&=&scale=7")
    view = visit(address)
    expected = draw(G, axes(G), request(255, 0, 0)).astype(int)
    assert np.abs(grey(view) - expected).max() <= 1


@pytest.mark.slow
def test_only_the_newest_of_many_requests_is_drawn(visit, tmp_path):
    G = make()
    write_page(G, SMALL, ["AD", "NC"], [], tmp_path / "page.html")
    view = visit(tmp_path / "page.html")
    drawn = view.evaluate(
        """async () => {
            let results = 0;
            kept.set = (key, value) => (results++, Map.prototype.set.call(kept, key, value));
            for (let seed = 1; seed <= 60; seed++) change({ seed });
            await running;
            return results;
        }"""
    )
    assert drawn <= 4
    assert np.abs(grey(view) - draw(G, [], request(60, shifts=())).astype(int)).max() <= 1


@pytest.mark.slow
def test_play_moves_between_seeds_until_it_is_stopped(visit, tmp_path):
    G = make()
    write_page(G, SMALL, ["AD", "NC"], [], tmp_path / "page.html")
    view = visit(tmp_path / "page.html")
    view.click("#play")
    wait(view, "state.seed > 0.2")
    view.click("#play")
    wait(view, "!player && location.hash.length > 2")
    seed = view.evaluate("state.seed")
    expected = draw(G, [], request(seed, shifts=())).astype(int)
    assert np.abs(grey(view) - expected).max() <= 1
    assert f"#seed={seed}" == view.evaluate("location.hash")
    field = view.locator("input[type=number]")
    field.fill("77")
    field.press("Enter")  # sends no form
    assert np.abs(grey(view) - draw(G, [], request(77, shifts=())).astype(int)).max() <= 1
    wait(view, "location.hash === '#seed=77'")
    view.click("button[type=reset]")
    assert (np.abs(grey(view) - draw(G, [], request(0, shifts=())).astype(int)) <= 1).all()


NAMES = ["<b>&\"'</script>", "NC{{script}}", "${7*7}"]


@pytest.mark.slow
def test_names_are_shown_as_they_are(visit, tmp_path):
    config = replace(SMALL, data_root=Path("/private/<img src=x>"))
    G = make(config, 3)
    directions = [
        (f"{name}<!--", vector) for name, (_, vector) in zip(NAMES, axes(G), strict=False)
    ]
    write_page(G, config, NAMES, directions, tmp_path / "page.html")
    assert "/private" not in (tmp_path / "page.html").read_text()
    view = visit(tmp_path / "page.html")
    text = view.inner_text("body")
    assert all(name in text for name in (*NAMES[:2], "<img src=x>", f"{NAMES[0]}<!--"))
    assert view.locator("b b, img").count() == 0
    shown = [text.rstrip("\ufffd") for text in view.locator("#to option").all_inner_texts()]
    assert shown == [*NAMES[:2], "${7*7}"]  # the last sign is no Unicode
    assert NAMES[0] in view.title()
    view.select_option("#to", "2")
    view.focus("#mix")
    view.keyboard.press("End")
    expected = draw(G, directions, request(0, 1, 1, (0, 0, 0), (0, 2))).astype(int)
    assert np.abs(grey(view) - expected).max() <= 1


@pytest.mark.slow
def test_it_fits_a_phone_and_follows_light_and_dark(visit, tmp_path):
    G = make()
    write_page(G, SMALL, ["AD", "NC" * 40], axes(G), tmp_path / "page.html")
    papers = []
    for scheme, width in (("light", 340), ("dark", 340), ("dark", 1280)):
        size = {"width": width, "height": 700}
        view = visit(tmp_path / "page.html", viewport=size, color_scheme=scheme, has_touch=True)
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        papers.append(view.evaluate("getComputedStyle(document.body).backgroundColor"))
        view.mouse.wheel(0, 500)
        assert view.locator("#image").bounding_box()["y"] < 300  # stays in sight
    assert papers[0] != papers[1] == papers[2]
    for size in ({"width": 320, "height": 256}, {"width": 340, "height": 700}):  # 4 x enlarged
        view = visit(tmp_path / "page.html", viewport=size)
        for name in ("d3", "psi", "d1", "mix"):
            view.focus(f"#{name}")
            box = view.locator(f"#{name}").bounding_box()
            found = "([x, y]) => document.elementFromPoint(x, y)?.id"
            at = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
            assert view.evaluate(found, at) == name  # nothing covers it


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    G = make()
    with ImageServer(G, SMALL, ["AD", "NC"], axes(G), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_the_served_page_shows_the_same_pixels(visit, server):
    view = visit(f"http://localhost:{server.server_port}/#seed=5&psi=0.6")
    wanted = request(5, 0, 0.6)
    assert (grey(view) == draw(server.G, server.directions, wanted)).all()
    for key in ("ArrowRight", "ArrowRight"):
        view.locator("#seed").press(key)
    view.locator("#d1").press("Home")
    wanted = request(7, 0, 0.6, (-3, 0, 0, 0, 0))
    assert (grey(view) == draw(server.G, server.directions, wanted)).all()
    assert len(server.content) < 60_000


def ask(server: ImageServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


QUERY = "seed=3&from=0&to=1&mix=0.5&psi=1&directions=0,0,0,0,-1.5"


def test_only_pages_of_this_computer_get_an_answer(server):
    path, port = f"/image?{QUERY}", server.server_port
    image = draw(server.G, server.directions, request(3, 0.5, 1, (0, 0, 0, 0, -1.5))).tobytes()
    for host in ("localhost:8000", "127.0.0.1", "[::1]:9", f"127.0.0.1:{port}"):
        assert ask(server, path, Host=host, Origin=f"http://{host}") == (200, image)
    bad = ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "", "10.0.0.1:8000"]
    for host in bad:
        assert ask(server, path, Host=host)[0] == 403
        assert ask(server, "/", Host=host)[0] == 403
    for origin in ("null", "http://evil.example", f"http://localhost:{port + 1}", "https://x"):
        assert ask(server, path, Host=f"localhost:{port}", Origin=origin)[0] == 403


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/image?" + QUERY.replace("seed=3", "seed=nan"), 400, "seed = 'nan': must be a number"),
        ("/image?" + QUERY.replace("seed=3", "seed=256"), 400, "from 0 to 255"),
        ("/image?" + QUERY.replace("seed=3", "seed=inf"), 400, "seed = 'inf'"),
        ("/image?" + QUERY.replace("seed=3", "seed=%0Ax%1b"), 400, r"'\\nx\\x1b'"),
        ("/image?" + QUERY.replace("seed=3", "seed=1_0"), 400, "seed = '1_0'"),
        ("/image?" + QUERY.replace("seed=3", "seed=%D9%A3"), 400, "must be a number"),
        ("/image?" + QUERY.replace("seed=3&", ""), 400, "no seed"),
        ("/image?" + QUERY.replace("to=1", "to=2"), 400, "to = '2'"),
        ("/image?" + QUERY.replace("to=1", "to=0.5"), 400, "whole numbers"),
        ("/image?" + QUERY.replace("mix=0.5", "mix=-0.1"), 400, "mix = '-0.1'"),
        ("/image?" + QUERY.replace("psi=1", "psi=1.01"), 400, "psi = '1.01'"),
        ("/image?" + QUERY.replace(",-1.5", ""), 400, "4 numbers, must be 5"),
        ("/image?" + QUERY.replace("-1.5", "-3.5"), 400, "directions = '-3.5'"),
        ("/image?" + QUERY + "&psi=1", 400, "twice"),
        ("/image?" + QUERY + "&position=0.5", 400, "unknown part of the query: 'position'"),
        ("/image?" + QUERY + "&a=b", 400, "unknown part of the query: 'a'"),
        ("/image?" + QUERY + "0" * 500, 400, "more than 500 signs"),
        ("/image?", 400, "no seed"),
        ("/other", 404, "only / and /image"),
        ("/../config.json", 404, "only / and /image"),
    ],
)
def test_a_bad_query_is_refused_in_one_line(server, path, status, words):
    answer, text = ask(server, path)
    assert (answer, text.count(b"\n")) == (status, 0)
    assert re.search(words, text.decode()), text


def test_other_methods_are_refused(server):
    assert ask(server, "/", "POST")[0] == 501
    assert ask(server, "/")[1] == server.content.encode()


def test_a_position_may_be_asked_for():
    assert parse_query("seed=1&from=0&to=0&mix=0&psi=1&position=0.5", 1, 0, True).position == 0.5
    assert parse_query("seed=1&from=0&to=0&mix=0&psi=1&directions=", 1, 0, True).position is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("MAX_BYTES", 1000, "would have 0 MB.*--serve"), ("MAX_SECONDS", 1e-5, "s an image.*--serve")],
)
def test_what_is_too_large_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, name, value, words
):
    monkeypatch.setattr(pages, name, value)
    with pytest.raises(UserError, match=words):
        write_page(make(), SMALL, ["AD", "NC"], [], tmp_path / "new" / "page.html")
    assert not list(tmp_path.iterdir())


def test_large_generators_are_refused_as_they_are():
    """The default settings for a GPU: 256 pixels, 512 feature maps."""
    with torch.device("meta"):
        G = Generator(Config(), 2)
    with pytest.raises(UserError, match="--serve"):
        write_page(G, Config(), ["AD", "NC"], [], Path("nowhere/page.html"))
    assert not Path("nowhere").exists()


def test_the_command_writes_into_the_run(tmp_path, capsys):
    """A run trained in bfloat16 is written like any other."""
    config = replace(SMALL, out=tmp_path / "run", precision="bfloat16")
    G = make(config)
    runs.write_run_config(config.out, config, ["AD", "NC"], "data")
    runs.save_generator(config.out, G, 0)
    explore.write_page(config.out)
    out = config.out / "explore" / "explorer.html"
    assert capsys.readouterr().out.startswith(f"{out}: 0.")
    text = out.read_text("utf-8")
    assert not re.search(r"""(src|href)=["']?(?!["']?data:)|url\(|@import|https?://""", text)
    for options, words in (
        ({"out": tmp_path}, "is a folder"),
        ({"out": config.out / "config.json"}, "exists and is no page"),
        ({"out": out / "x.html"}, "is not a folder"),
        ({"port": 70000}, "port = 70000: must be int, 0 to 65535"),
    ):
        with pytest.raises(UserError, match=words):
            explore.write_page(config.out, **options)
    assert [p.name for p in out.parent.iterdir()] == ["explorer.html"]


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(UserError, match=f"port = {server.server_port}: .*choose another"):
        pages.serve(server.G, SMALL, ["AD", "NC"], [], server.server_port)


def test_the_shipped_page_is_of_these_sources_and_this_generator(demo):
    """After a change: python explore.py page --checkpoint assets/demo_generator --out ..."""
    text = (ROOT / "assets" / "explorer.html").read_text("utf-8")
    assert len(text) < 5_000_000
    assert pages.read("generator.js") in text and pages.read("page.js") in text
    assert pages.pack(demo[0].state_dict())[1][:2_000_000] in text


@pytest.mark.slow
def test_the_server_ends_by_ctrl_c():
    command = [sys.executable, ROOT / "explore.py", "page", "--serve", "--port", "0"]
    command += ["--checkpoint", runs.DEMO_GENERATOR]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert re.match(r"http://127\.0\.0\.1:\d+/ shows the page", line)
    process.send_signal(signal.SIGINT)
    said, bar = process.communicate(timeout=30)
    assert said == "stopped\n" and "Traceback" not in bar
    assert process.returncode == 0


@pytest.mark.slow
def test_the_demo_is_fast_enough_to_drag_a_slider(visit, demo_page):
    """Four images a second are asked for; a busy machine may take longer."""
    view = visit(demo_page)
    rate = view.evaluate(
        """async () => {
            let best = Infinity;
            for (let i = 0; i < 12; i++) {
                const started = performance.now();
                await ask(requestOf(i / 12));
                best = Math.min(best, performance.now() - started);
            }
            return 1000 / best;
        }"""
    )
    print(f"{rate:.1f} images a second")
    assert rate > 2
