import subprocess
import sys

import pytest

from s2o_vllm.benchmarks.research import tuned


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_constants_are_set_before_kernels_know_them_and_named_in_rows():
    done = run(
        "from s2o_vllm.benchmarks.research import tuned\n"
        "tuned.change(['SUMMARY_VARIANCE=1', 'COUNTED=4096', 'COVARIANCE_WEIGHT=0'])\n"
        "from s2o_vllm.kernels.attention import reference\n"
        "from s2o_vllm.kernels import tuning\n"
        "numbers = reference.COVARIANCE_WEIGHT, tuning.SUMMARY_VARIANCE, tuning.COUNTED\n"
        "print(*numbers, tuned.CHANGED)\n"
        "import s2o_vllm.kernels.prefill\n"
        "try: tuned.change(['SUMMARY_VARIANCE=0'])\n"
        "except RuntimeError as error: print(error)\n"
    )
    changed = {"SUMMARY_VARIANCE": 1.0, "COUNTED": 4096, "COVARIANCE_WEIGHT": 0.0}
    assert done.stdout.splitlines() == [
        f"0.0 1.0 4096 {changed}",
        "the kernels are imported already",
    ], done.stderr


def test_a_command_is_run_with_what_was_changed():
    done = run(
        "from s2o_vllm.benchmarks.research import answers, tuned\n"
        "answers.main = lambda words: print(words, tuned.CHANGED) or 3\n"
        "raise SystemExit(tuned.main(['SUMMARY_VARIANCE=0.25', 'answers', 'MODEL', '--seed=1']))"
    )
    assert done.stdout == "['MODEL', '--seed=1'] {'SUMMARY_VARIANCE': 0.25}\n", done.stderr
    assert done.returncode == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["SUMMARY_VARIANCE=1"], "NAME=NUMBER … COMMAND …, of answers, clusters"),
        (
            ["SUMMARY_VARIANCE=1", "ranking"],
            "NAME=NUMBER … COMMAND …, of answers, clusters",
        ),
        (["SUMMARY_VARIANC=1", "answers"], "'SUMMARY_VARIANC' is none of BUCKETS, "),
        (["BUCKETS=many", "answers"], "invalid literal for int() with base 10: 'many'"),
    ],
)
def test_what_cannot_be_done_is_said(words, said):
    done = run(f"from s2o_vllm.benchmarks.research import tuned\nexit(tuned.main({words}))")
    assert done.returncode == 2
    assert f"tuned: {said}" in done.stderr


def test_nothing_is_changed_unasked():
    assert tuned.CHANGED == {}
