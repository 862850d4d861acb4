"""The load test on a recorded ``vllm bench serve`` result and a stand-in server."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from s2o_vllm.benchmarks.result_file import save
from s2o_vllm.loadtest import bench, cli, main, plot, report, server
from s2o_vllm.loadtest.arms import Arm, LoadTestError, parse_arm, parse_arms

RECORDED = Path(__file__).parent / "data" / "bench_serve.json"
ROW_KEYS = [
    "model", "trace", "backend", "budget", "rate", "concurrency", "context", "ttft_p50_ms",
    "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "goodput_rps", "output_tok_s", "failed",
]  # fmt: skip
HEADER_KEYS = ["device", "torch", "triton", "vllm", "commit", "date", "rows"]
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens
ABOUT = server.Server("/srv/small", "folder", 8192, "0.32.0")
METRICS = """\
s2o:history_tokens_visited_total 300.0
s2o:history_tokens_visited_total{engine="1"} 100.0
s2o:history_tokens_eligible_total 4000.0
"""
SYSTEM = {
    "torch_version": "2.13.0+cu130",
    "pip_packages": "numpy==2.3.5\ntriton==3.7.1",
    "nvidia_gpu_models": "GPU 0: NVIDIA H100 80GB HBM3\nGPU 1: NVIDIA H100 80GB HBM3",
}


class StandIn(ThreadingHTTPServer):
    """Answers what the load test asks of a vLLM server."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.sparse = True
        self.pages: dict[str, Any] = {
            "/health": "",
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [{"id": "small", "root": "folder", "max_model_len": 8192}]},
            "/metrics": METRICS,
        }


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def answer(self, status: int, page: Any) -> None:
        text = page if isinstance(page, str) else json.dumps(page)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path)
        self.answer(404 if page is None else 200, page if page is not None else "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        budget = body["vllm_xargs"]["s2o_sparsity_budget"]
        self.answer(400 if self.server.sparse and budget > 1 else 200, {})

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    httpd = StandIn()
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, recorded: dict[str, Any]) -> list[tuple]:
    """Let every measurement be the recorded one; return the list of those asked for."""
    calls: list[tuple] = []

    def measure(arm: Arm, *rest: Any) -> dict[str, Any]:
        calls.append((arm, *rest))
        return recorded

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(cli, "SETTLE", 0)
    return calls


def some_row(**changes: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(ROW_KEYS, 1.0) | {"context": 512, "failed": 0}
    numbers |= {"model": "small", "trace": "cold"}
    return numbers | {"backend": "s2o", "budget": 0.1, "concurrency": None} | changes


# -- arms -------------------------------------------------------------------------------------


def test_an_arm_is_a_name_a_server_and_perhaps_a_budget():
    assert parse_arm("stock=http://a:8000/v1/") == Arm("stock", "http://a:8000")
    assert parse_arm("s2o=https://a,budget=0.25") == Arm("s2o", "https://a", 0.25)


@pytest.mark.parametrize(
    "text",
    ["http://a:8000", "=http://a", "x=", "x=a:8000", "x=ftp://a", "x=http://a,budget=0",
     "x=http://a,budget=1.5", "x=http://a,budget=lots", "x=http://a,budget=nan",
     "x=http://a,budget", "x=http://a,rate=1"],
)  # fmt: skip
def test_an_arm_that_cannot_be_read_is_refused_in_one_sentence(text: str):
    with pytest.raises(LoadTestError) as refusal:
        parse_arm(text)
    assert repr(text) in str(refusal.value)
    assert "must be name=URL" in str(refusal.value)


def test_two_arms_that_rows_could_not_tell_apart_are_refused():
    with pytest.raises(LoadTestError, match="'a' is given twice"):
        parse_arms(["a=http://x", "a=http://y"])
    assert len(parse_arms(["a=http://x,budget=1", "a=http://x,budget=0.1"])) == 2


def test_requests_carry_the_budget_and_a_salt_of_their_own():
    assert Arm("stock", "u").request_body("s") == {"cache_salt": "s"}
    body = Arm("s2o", "u", 0.1).request_body("s")
    assert body == {"cache_salt": "s", "vllm_xargs": {"s2o_sparsity_budget": 0.1}}


# -- one measurement --------------------------------------------------------------------------


def test_the_command_is_one_that_vllm_accepts():
    arm = Arm("s2o", "http://a:8000", 0.1)
    about = server.Server("small", "folder", 8192, "0.32.0")
    command = bench.command(
        arm,
        about,
        bench.Load(512, 8, 3, 2, goodput=("ttft:2000", "tpot:50")),
        0.5,
        "salt",
        Path("/x/result.json"),
    )
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    check = (
        "import sys, json\n"
        "from vllm.benchmarks.serve import add_cli_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = FlexibleArgumentParser()\n"
        "add_cli_args(parser)\n"
        "args = parser.parse_args(sys.argv[1:])\n"
        "names = ['base_url', 'dataset_name', 'random_input_len', 'random_output_len',\n"
        "         'num_prompts', 'request_rate', 'max_concurrency', 'extra_body', 'save_result',\n"
        "         'result_dir', 'result_filename', 'seed', 'goodput']\n"
        "print('PARSED', json.dumps([getattr(args, name) for name in names]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, *command[5:]], capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PARSED")]
    assert json.loads(line.removeprefix("PARSED ")) == [
        "http://a:8000", "random", 512, 8, 3, 0.5, 2, arm.request_body("salt"), True,
        "/x", "result.json", 0, ["ttft:2000", "tpot:50"],
    ]  # fmt: skip


def test_a_row_is_what_vllm_measured(recorded: dict[str, Any]):
    row = bench.row(Arm("s2o", "u", 0.1), ABOUT, bench.Load(256, 4, 3), 4.0, recorded)
    assert list(row) == ROW_KEYS
    assert (row["model"], row["trace"]) == ("small", "cold")
    assert (row["backend"], row["budget"]) == ("s2o", 0.1)
    assert (row["rate"], row["concurrency"], row["context"]) == (4.0, None, 256)
    assert row["ttft_p50_ms"] == pytest.approx(recorded["median_ttft_ms"], abs=1e-3)
    assert row["ttft_p50_ms"] == pytest.approx(sorted(recorded["ttfts"])[1] * 1000, abs=1e-3)
    assert row["ttft_p99_ms"] >= row["ttft_p50_ms"]
    assert row["output_tok_s"] == pytest.approx(12 / recorded["duration"], abs=1e-3)
    assert (row["failed"], row["goodput_rps"]) == (0, None)
    recorded["request_goodput"] = 0.25
    again = bench.row(Arm("s2o", "u", 0.1), ABOUT, bench.Load(256, 4, 3), 4.0, recorded)
    assert again["goodput_rps"] == 0.25


def test_failed_requests_are_counted(recorded: dict[str, Any]):
    recorded |= {"completed": 1, "failed": 2, "errors": ["", "Traceback\nBad Request", "late"]}
    assert bench.row(Arm("a", "u"), ABOUT, bench.Load(256, 4, 3), 4.0, recorded)["failed"] == 2
    assert bench.first_error(recorded) == "Bad Request"


def test_without_an_answer_there_is_no_latency(recorded: dict[str, Any]):
    recorded |= {"completed": 0, "failed": 3, "p50_ttft_ms": 0.0, "p99_ttft_ms": 0.0}
    row = bench.row(Arm("a", "u"), ABOUT, bench.Load(256, 4, 3), 4.0, recorded)
    assert row["failed"] == 3
    assert {row[key] for key in ROW_KEYS[7:13]} == {None}


def test_a_measurement_without_a_result_says_why(monkeypatch: pytest.MonkeyPatch):
    failing = [sys.executable, "-c", "print('first'); raise SystemExit('no such tokenizer')"]
    monkeypatch.setattr(bench, "command", lambda *_: failing)
    about = server.Server("small", "folder", 8192, "0.32.0")
    with pytest.raises(LoadTestError, match="a: `vllm bench serve` ended with code 1: no such tok"):
        bench.measure(Arm("a", "u"), about, bench.Load(256, 4, 3), 4.0, "salt")


# -- the server -------------------------------------------------------------------------------


def test_the_server_is_asked_what_it_runs(stand_in: StandIn):
    arm = Arm("a", stand_in.url)
    assert server.inspect(arm) == server.Server("small", "folder", 8192, "0.32.0")
    stand_in.pages["/server_info?config_format=json"] = {"system_env": SYSTEM}
    about = server.inspect(arm)
    assert about.device == "2x NVIDIA H100 80GB HBM3"
    assert (about.torch, about.triton) == ("2.13.0+cu130", "3.7.1")


def test_a_cpu_server_names_its_cpu():
    lscpu = "CPU(s):                 2\nModel name:             AMD EPYC\n"
    assert server._device({"cpu_info": lscpu}) == "AMD EPYC, 2 cores"
    assert server._device({}) is None


def test_an_unknown_model_is_refused(stand_in: StandIn):
    with pytest.raises(LoadTestError, match="--model is 'large', must be one of small"):
        server.inspect(Arm("a", stand_in.url), "large")


def test_counters_are_summed_over_engines(stand_in: StandIn):
    counters = server.history_counters(Arm("a", stand_in.url))
    assert counters == {"visited": 400.0, "eligible": 4000.0}
    stand_in.pages["/metrics"] = "vllm:num_requests_running 0.0\n"
    assert server.history_counters(Arm("a", stand_in.url)) is None


def test_a_budget_that_the_server_would_ignore_is_refused(stand_in: StandIn):
    arm = Arm("s2o", stand_in.url, 0.1)
    about = server.inspect(arm)
    server.check_budget_is_honoured(arm, about)
    stand_in.sparse = False
    with pytest.raises(LoadTestError, match=r"ignores budget=0\.1"):
        server.check_budget_is_honoured(arm, about)
    server.check_budget_is_honoured(Arm("stock", stand_in.url, 1.0), about)


# -- the whole command ------------------------------------------------------------------------


def test_every_arm_and_rate_becomes_a_row(
    stand_in: StandIn, measured: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "results" / "load.json"
    code = main([
        "--arm", f"stock={stand_in.url},budget=1", "--arm", f"s2o={stand_in.url},budget=0.1",
        "--context", "256", "--output-tokens", "4", "--rates", "2,1", "--requests", "3",
        "--device", "a test", "--output", str(output),
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    result = json.loads(output.read_text())
    assert list(result) == HEADER_KEYS
    assert result["device"] == "a test"
    assert result["vllm"] == "0.32.0"
    assert [(row["backend"], row["budget"], row["rate"]) for row in result["rows"]] == [
        ("stock", 1.0, 1.0), ("stock", 1.0, 2.0), ("s2o", 0.1, 1.0), ("s2o", 0.1, 2.0),
    ]  # fmt: skip
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    loads = [tuple(rest) for _, _, *rest, _ in measured]
    assert loads[:3] == loads[3:], "both arms get the same load"
    assert len({salt for *_, salt in measured}) == 6, "no run finds its prompts cached by another"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arm", f"a={NOBODY}"], f"a: no server answers at {NOBODY}"),
        (["--arm", "a=nonsense"], "must be name=URL"),
        (["--arm", "a={url}"], "must be at most the server's 8192"),
        (["--arm", "a={url}", "--model", "large", "--context", "9"], "must be one of small"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_code_2(
    stand_in: StandIn,
    measured: list[tuple],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    sentence: str,
):
    output = tmp_path / "load.json"
    output.write_text("earlier results")
    filled = [part.format(url=stand_in.url) for part in arguments]
    assert main([*filled, "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.startswith("s2o loadtest: ")
    assert message.count("\n") == 1
    assert output.read_text() == "earlier results"
    assert not measured


def test_rows_survive_a_server_that_goes_away(
    stand_in: StandIn, measured: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch, recorded: dict[str, Any],
):  # fmt: skip
    def measure(*_: Any) -> dict[str, Any]:
        stand_in.pages["/health"] = None
        return recorded

    monkeypatch.setattr(bench, "measure", measure)
    output = tmp_path / "load.json"
    arguments = ["--arm", f"a={stand_in.url}", "--context", "256", "--rates", "1,2",
                 "--requests", "3", "--warmup", "0", "--output", str(output)]  # fmt: skip
    assert main(arguments) == 2
    assert "/health answered HTTP 404, must be 200" in capsys.readouterr().err
    assert [row["rate"] for row in json.loads(output.read_text())["rows"]] == [1.0]


def test_no_answer_at_all_is_code_1_and_still_a_row(
    stand_in: StandIn, measured: list[tuple], recorded: dict[str, Any], tmp_path: Path
):
    recorded |= {"completed": 0, "failed": 3}
    output = tmp_path / "load.json"
    arguments = ["--arm", f"a={stand_in.url}", "--context", "256", "--rates", "1",
                 "--requests", "3", "--output", str(output)]  # fmt: skip
    assert main(arguments) == 1
    assert json.loads(output.read_text())["rows"][0]["failed"] == 3


@pytest.mark.parametrize(
    "arguments",
    [["--rates", "1,x"], ["--rates", "0"], ["--rates", "inf"], ["--context", "0"],
     ["--requests", "many"], ["--concurrency", "-1"]],
)  # fmt: skip
def test_arguments_of_the_wrong_kind_are_refused(arguments: list[str], capsys: Any):
    with pytest.raises(SystemExit) as refusal:
        main(["--arm", f"a={NOBODY}", *arguments])
    assert refusal.value.code == 2
    assert f"is {arguments[1]!r}, must be" in capsys.readouterr().err


# -- the result file and the picture ----------------------------------------------------------


def test_append_keeps_other_rows_and_replaces_the_same_measurement(tmp_path: Path):
    path, head = tmp_path / "load.json", report.header([], "here")
    save(path, head, [some_row(failed=3), some_row(backend="stock")])
    rows = report.add_row(report.load_rows(path, head), some_row(failed=0))
    assert [(row["backend"], row["failed"]) for row in rows] == [("stock", 0), ("s2o", 0)]


def test_rows_of_earlier_versions_are_cold_ones_of_the_same_model(tmp_path: Path):
    old = some_row()
    del old["model"], old["trace"]
    assert report.add_row([old], some_row()) == [some_row()]
    assert report.add_row([old], some_row(trace="agent")) == [old, some_row(trace="agent")]


def test_the_estimate_counts_arrivals_or_prefill_whichever_is_longer():
    alone = {"p50_ttft_ms": 2000.0, "p50_itl_ms": 50.0, "duration": 5.0}
    load = bench.Load(256, 20, 10)
    each = 1.0 + 15.0 + cli.SETTLE  # answers, the program's start, the counters
    estimate = cli.minutes(alone, 20.0, load, [0.1, 5.0])
    assert estimate == pytest.approx((100 + 20 + 2 * each) / 60)


def test_append_refuses_results_of_another_machine(tmp_path: Path):
    path = tmp_path / "load.json"
    save(path, report.header([], "there"), [])
    with pytest.raises(LoadTestError, match="device 'there' and this is 'here'"):
        report.load_rows(path, report.header([], "here"))
    path.write_text("[]")
    with pytest.raises(LoadTestError, match="is not a load test's result file"):
        report.load_rows(path, report.header([], "here"))


def test_the_picture_shows_rates_at_which_nothing_was_answered(tmp_path: Path):
    rows = [some_row(), some_row(rate=2.0, ttft_p50_ms=None, ttft_p99_ms=None, failed=3),
            some_row(context=1024, backend="stock", concurrency=4)]  # fmt: skip
    picture = tmp_path / "load.png"
    plot.draw({"vllm": "0.32.0", "device": "here", "rows": rows}, picture)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("served", "name"), [("/srv/models/small", "small"), ("org/small", "org/small")]
)
def test_a_models_name_has_no_folder_of_the_server(served, name):
    assert server.Server(served, "folder", 512, None).name == name
