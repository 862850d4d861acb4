import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from s2o_vllm import cli, kernels
from s2o_vllm.benchmarks.speed import profile
from s2o_vllm.cli.server_process import ServerError

GEMM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
FLASH = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...> > >"
CACHE = "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16>(...)"
NORM = "void vllm::rms_norm_kernel<c10::BFloat16>(...)"


def event(name, start, duration, category="kernel", stream=7):
    return {
        "ph": "X", "cat": category, "name": name, "pid": 0, "tid": stream,
        "ts": start, "dur": duration, "args": {"stream": stream},
    }  # fmt: skip


def trace():
    """Return 1 ms in which the GPU is busy from 1000 to 1600 and from 1700 to 2000 µs."""
    return {"schemaVersion": 1, "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        event("Memcpy HtoD (Pinned -> Device)", 100.0, 50.0, "gpu_memcpy"),  # before it begins
        event("cudaLaunchKernel", 990.0, 900.0, "cuda_runtime"),
        event("step", 1000.0, 1000.0, "gpu_user_annotation"),
        event("_score_kernel", 1300.0, 100.0),
        event(GEMM, 1000.0, 200.0), event(GEMM, 1150.0, 150.0, stream=13),  # side by side
        event(CACHE, 1300.0, 20.0, stream=13),
        event("_emit_kernel", 1400.0, 50.0), event("_attend_kernel", 1450.0, 150.0),
        event("Memset (Device)", 1700.0, 10.0, "gpu_memset"),
        event(FLASH, 1710.0, 190.0), event(NORM, 1900.0, 100.0),
        event("Memcpy DtoH (Device -> Pinned)", 1990.0, 500.0, "gpu_memcpy"),
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (GEMM, "linear layers"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "linear layers"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "linear layers"),
        (FLASH, "dense attention"),
        ("void flash::prepare_varlen_num_blocks_kernel<1, true>", "dense attention"),
        ("fmhaSm100Kernel_QkvBfloat16", "dense attention"),
        ("kernel_unified_attention_2d", "dense attention"),
        (CACHE, "cache write"),
        ("void flashinfer::sampling::TopKTopPSamplingFromProbKernel<512>", "other"),
        (NORM, "other"),
        ("triton_red_fused_score_kernel_0", "other"),
        ("my_score_kernel", "other"),
        ("_score_kernel_of_another", "other"),
        ("_attend_kernel", "attend"),
    ],
)
def test_a_kernel_belongs_to_one_part(name, part):
    assert profile.part_of(name) == part


def test_every_kernel_of_s2o_is_known():
    files = Path(kernels.__file__).parent.rglob("*.py")
    ours = {name for file in files for name in re.findall(r"def (_\w+_kernel)\(", file.read_text())}
    assert len(ours) >= 9
    parts = {name: profile.part_of(name) for name in ours}
    assert set(parts.values()) == {"rank", "select", "attend"}, parts


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(5, 7), (1, 2)], 3),
        ([(0, 10), (2, 3), (4, 12)], 12),
        ([(0, 1), (1, 2), (1, 2)], 2),
        ([(-3, -1), (-2, 0)], 3),
        ([(4, 1), (4, 6)], 2),
    ],
)
def test_what_intervals_cover(intervals, length):
    assert profile.covered(intervals) == length


def test_only_what_runs_on_the_gpu_is_read():
    events = profile.gpu_events(trace())
    assert len(events) == 11
    assert {one.category for one in events} == {"kernel", "gpu_memcpy", "gpu_memset"}
    assert profile.gpu_events({}) == []


def test_a_trace_is_summed_up_by_part():
    events = profile.gpu_events(trace())
    assert profile.span_of(events) == (1000, 2000)
    rows = profile.summarise(events)
    assert [(row["part"], row["ms"], row["launches"]) for row in rows] == [
        ("rank", 0.1, 1), ("select", 0.05, 1), ("attend", 0.15, 1), ("cache write", 0.02, 1),
        ("dense attention", 0.19, 1), ("linear layers", 0.35, 2), ("other", 0.66, 4),
        ("gaps", 0.1, 0),
    ]  # fmt: skip
    assert all(row["share"] == pytest.approx(row["ms"] / 1.0) for row in rows)


def test_the_longest_are_by_the_sum_of_a_name():
    found = profile.longest(profile.gpu_events(trace()), 2)
    assert found == [("Memcpy DtoH (Device -> Pinned)", 0.5, 1), (GEMM, 0.35, 2)]


def test_the_fullest_trace_is_taken_and_all_are_removed(tmp_path):
    (tmp_path / "rank0.1.pt.trace.json").write_text(json.dumps({"traceEvents": []}))
    (tmp_path / "rank1.2.pt.trace.json.gz").write_bytes(gzip.compress(json.dumps(trace()).encode()))
    assert len(profile.take(tmp_path)) == 11
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_an_incomplete_trace_is_waited_for(tmp_path, cut):
    whole = gzip.compress(json.dumps(trace()).encode())
    path = tmp_path / "rank0.1.pt.trace.json.gz"
    path.write_bytes(whole[:cut])
    with pytest.raises(ServerError, match="no trace that is complete"):
        profile.take(tmp_path, limit=0.1)
    later = threading.Timer(0.5, path.write_bytes, [whole])
    later.start()
    assert len(profile.take(tmp_path, limit=30)) == 11
    later.join()


@contextmanager
def profiled(monkeypatch, recorded):
    """Stand in for `vllm serve`; yield what was asked of it."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            calls.append((self.path, len(body.get("prompt", ()))))
            if self.path == "/stop_profile":
                config = calls[0][calls[0].index("--profiler-config") + 1]
                folder = Path(json.loads(config)["torch_profiler_dir"])
                folder.mkdir(exist_ok=True)
                (folder / f"rank0.{len(calls)}.pt.trace.json").write_text(json.dumps(recorded))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    @contextmanager
    def vllm_server(model, port, flags, log):
        calls.insert(0, flags)
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    monkeypatch.setattr(profile, "vllm_server", vllm_server)
    yield calls


def test_each_backend_and_context_is_recorded_by_itself(monkeypatch, tmp_path, capsys):
    out = tmp_path / "profile.json"
    with profiled(monkeypatch, trace()) as calls:
        assert profile.main(["--contexts", "16", "64", "--out", str(out)]) == 0
    stock, s2o = calls[:2]
    assert "s2o" in s2o
    assert "s2o" not in stock
    one = [[("/v1/completions", size), ("/start_profile", 0), ("/v1/completions", size),
            ("/stop_profile", 0)] for size in (16, 64)]  # fmt: skip
    assert calls[2:] == (one[0] + one[1]) * 2
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4 * 8
    assert list(rows[0]) == [
        "model", "context", "backend", "budget", "part", "ms", "share", "launches",
    ]  # fmt: skip
    assert {(row["backend"], row["context"], row["budget"]) for row in rows} == {
        ("s2o", 16, 0.05), ("s2o", 64, 0.05), ("stock", 16, 1.0), ("stock", 64, 1.0),
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "64 tokens, s2o, budget 0.05: 1.00 ms" in said
    assert GEMM in said


def test_a_trace_without_kernels_is_one_sentence(monkeypatch, tmp_path, capsys):
    out = tmp_path / "profile.json"
    nothing = {"traceEvents": [event("Memset (Device)", 0, 1, "gpu_memset")]}
    with profiled(monkeypatch, nothing):
        assert profile.main(["--contexts", "16", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said == "s2o bench profile: there are no GPU kernels in the profiler's trace\n"
    assert not out.exists()


def test_the_command_is_there(capsys):
    assert cli.COMMANDS["bench", "profile"].module == profile.__name__
    with pytest.raises(SystemExit) as end:
        profile.main(["--model", "nowhere"])
    assert end.value.code == 2
    assert "there is no model at nowhere" in capsys.readouterr().err


def test_vllm_takes_the_profilers_flags(tmp_path):
    config = pytest.importorskip("vllm.config")
    _, settings = profile.profiler_flags(tmp_path)
    made = config.ProfilerConfig(**json.loads(settings))
    assert made.profiler == "torch"
    assert made.torch_profiler_dir == str(tmp_path)
    assert made.torch_profiler_activities == ["CUDA"]
    assert not made.should_profile_frontend
