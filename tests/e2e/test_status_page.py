"""The status page of a real server, in a real browser."""

import re
import shutil
import subprocess

import pytest

from asking import ask
from models import write_model

pytestmark = pytest.mark.e2e

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = ("--attention-backend", "s2o", "--s2o-sparsity-budget", "0.2", "--s2o-min-context", "256",
         "--s2o-segment-size", "128", "--s2o-shadow-rate", "0.05", "--s2o-status-page")  # fmt: skip
LAYERS = 6


@pytest.fixture(scope="module")
def server(launch, tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("page"), num_hidden_layers=LAYERS)
    one = launch(model, page=FLAGS)["page"]
    for number in range(3):
        ask(one.url, [3 + (7 * i + number) % 500 for i in range(1500)], output_tokens=4)
    return one


def browse(server, *words, seconds=8):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--window-size=1100,1000", f"--virtual-time-budget={1000 * seconds}", *words,
        server.url + "/s2o",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.skipif(not BROWSER, reason="needs chromium")
def test_a_browser_shows_layers_settings_and_requests(server, tmp_path):
    server.settled(("s2o:shadow_rows",), [0])
    page = browse(server, "--dump-dom").stdout
    assert re.search(r"<b>\d+\.\d %</b><span>attention work done</span>", page)
    low, high = re.search(r'id="density-range">last (\S+) % to (\S+) %<', page).groups()
    assert 10 < float(low) <= float(high) < 40
    assert re.search(r'id="error-range">last \S+ % to \S+ %<', page)
    rows = re.search(r'<tbody id="requests">(.*?)</tbody>', page, re.S)[1].count("<tr>")
    assert rows == 3
    assert "<dt>sparsity_budget</dt><dd>0.2</dd>" in page
    assert re.search(r'id="density"[^>]*height="(\d+)"', page)[1] == str(12 * LAYERS)
    assert 'id="state" role="status"></span>' in page, "the server answered to the end"
    picture = tmp_path / "page.png"
    browse(server, f"--screenshot={picture}")
    from PIL import Image

    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
    warm = [count for count, (red, _, blue) in colours if red > blue + 60]
    assert sum(warm) > 500, "layers that were counted have a colour"


def test_the_page_says_what_metrics_say(server):
    import json

    from s2o_vllm.cli.server_process import metric, read

    server.settled(("s2o:shadow_rows",), [0])
    found = json.loads(read(server.url + "/s2o/data"))
    assert [layer["layer"] for layer in found["layers"]] == list(range(LAYERS))
    page = server.page()
    for name, key in (("visited", "visited"), ("eligible", "eligible")):
        total = metric(page, f"s2o:history_tokens_{name}_total")
        assert sum(layer[key] for layer in found["layers"]) == total > 0
    assert [one["prompt_tokens"] for one in found["requests"]] == [1500] * 3
    assert all(one["prefill_s"] > 0 for one in found["requests"])


def test_without_the_flag_there_is_no_page(stock_server):
    from s2o_vllm.cli.server_process import read

    assert read(stock_server.url + "/s2o") is None
