"""The replay of conversations against a stand-in server that streams and caches prefixes."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from s2o_vllm.loadtest import main
from s2o_vllm.loadtest.arms import Arm, LoadTestError
from s2o_vllm.loadtest.replay import report, run
from s2o_vllm.loadtest.replay.client import Answer, ask
from s2o_vllm.loadtest.replay.files import read_trace
from s2o_vllm.loadtest.replay.rounds import Load, Speed, seconds_of, send_round
from s2o_vllm.loadtest.replay.tokens import Tokenizer, prepare
from s2o_vllm.loadtest.replay.traces import (
    Piece,
    Session,
    Shape,
    Turn,
    generate,
    rounds,
    starts,
    work,
)  # fmt: skip
from s2o_vllm.loadtest.server import Server
from streaming import Streaming, answer_to, streaming

SMALL = Shape(
    sessions=6, lengths=(300, 1200), turns=4, new_tokens=(16, 200), shared_tokens=64,
    output_tokens=8, think_s=0.0, seed=1,
)  # fmt: skip
FLAGS = [
    "--lengths", "300,1200", "--turns", "4", "--new-tokens", "16,200", "--shared-tokens", "64",
    "--output-tokens", "8", "--think", "0", "--sessions", "4", "--device", "a test",
]  # fmt: skip


@pytest.fixture
def server():
    with streaming() as httpd:
        yield httpd


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "SETTLE", 0)


def words_of(url: str, *more: str, output: Path) -> list[str]:
    arms = ["--arm", f"stock={url},budget=1", "--arm", f"s2o={url}"]
    return [*arms, "--replay", "agent", *FLAGS, "--output", str(output), *more]


def log_lines(output: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in output.with_suffix(".requests.jsonl").read_text().splitlines()
    ]


# -- generated traces -------------------------------------------------------------------------


def test_an_agents_sessions_share_a_beginning_and_grow_within_their_lengths():
    sessions = generate("agent", SMALL)
    assert sessions == generate("agent", SMALL)
    assert [one.name for one in sessions] == [f"agent-{number}" for number in range(6)]
    for session in sessions:
        first, *later = session.turns
        assert first.pieces[0] == Piece("shared", 64)
        assert 300 <= first.new_tokens <= 900
        assert all(16 <= turn.new_tokens <= 200 for turn in later)
        assert all(4 <= turn.output_tokens <= 16 for turn in session.turns)
        assert session.longest <= 1200
        assert [length for length, _ in session.lengths()] == sorted(
            length for length, _ in session.lengths()
        )
    assert max(len(session.turns) for session in sessions) > 1
    assert len({session.turns[0].new_tokens for session in sessions}) == 6


def test_mixed_has_four_short_prompts_for_each_long_one():
    sessions = generate("mixed", Shape(10, (5000, 9000), 1, (1, 1), 0, 8, 0.0, 0))
    lengths = [session.turns[0].new_tokens for session in sessions]
    assert [length > 4096 for length in lengths] == [True, *[False] * 4] * 2
    assert all(256 <= length <= 2048 for length in lengths if length < 4096)
    assert all(session.longest <= 9000 for session in sessions)


def test_arrivals_keep_their_rate_and_seed():
    sessions = generate("mixed", Shape(400, (300, 900), 1, (1, 1), 0, 8, 0.0, 0))
    timed = starts(sessions, 2.0, 3)
    assert timed == starts(sessions, 2.0, 3) != starts(sessions, 2.0, 4)
    assert timed[0].start_s == 0.0
    assert timed[-1].start_s == pytest.approx(200, rel=0.15)


def test_rounds_are_parts_whose_clocks_begin_at_0():
    sessions = starts(generate("agent", SMALL), 1.0, 0)
    first, second = rounds(sessions, 2)
    assert [one.name for one in first + second] == [one.name for one in sessions]
    assert len(first) == len(second) == 3
    assert second[0].start_s == 0.0
    assert second[1].start_s == pytest.approx(sessions[4].start_s - sessions[3].start_s)
    assert len(rounds(sessions[:1], 2)) == 1


def test_work_counts_what_is_shared_once():
    shared = Piece("shared", 100)
    turns = (Turn((shared, Piece("a", 10)), 5), Turn((Piece("b", 20),), 6))
    assert work([Session("x", turns), Session("y", (Turn((shared,), 7),))]) == (130, 18)


def test_the_estimate_is_the_longer_of_arrivals_and_prefill():
    one = Session("x", (Turn((Piece("a", 1000),), 10, think_s=2.0),))
    two = Session("y", (Turn((Piece("b", 1000),), 10, think_s=2.0),))
    speed = Speed(prefill_s=0.01, decode_s=0.1)
    assert seconds_of([one, two], Load(None, 1), speed) == pytest.approx(20 + 2 * 3)
    assert seconds_of([one, two], Load(None, 2), speed) == pytest.approx(20 + 3)
    late = starts([one, two], 0.001, 0)
    assert late[1].start_s > 20
    expected = late[1].start_s + 3
    assert seconds_of(late, Load(0.001, None), speed) == pytest.approx(expected)


# -- traces in files --------------------------------------------------------------------------


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_mooncakes_requests_share_blocks_and_tell_their_turns(tmp_path: Path):
    path = write(
        tmp_path / "trace.jsonl",
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 500, "input_length": 600, "output_length": 5, "hash_ids": [1, 9]},
        {"timestamp": 27000, "input_length": 1600, "output_length": 6, "hash_ids": [1, 2, 4, 5]},
        {"timestamp": 30000, "input_length": 2100, "output_length": 6,
         "hash_ids": [1, 2, 4, 6, 7]},
    )  # fmt: skip
    sessions = read_trace(path, 64)
    assert [one.start_s for one in sessions] == [0.0, 0.5, 27.0, 30.0]
    assert [one.turns[0].new_tokens for one in sessions] == [1100, 600, 1600, 2100]
    assert sessions[0].turns[0].pieces == (
        Piece("block 1", 512), Piece("block 2", 512), Piece("block 3", 76),
    )  # fmt: skip
    assert [one.first_turn for one in sessions] == [1, 1, 2, 3]
    assert [one.turns[0].output_tokens for one in sessions] == [5, 5, 6, 6]
    assert len(read_trace(path, 64, limit=2)) == 2


def test_turns_of_a_session_are_gathered(tmp_path: Path):
    path = write(
        tmp_path / "turns.jsonl",
        {"session_id": "a", "timestamp": 100, "text_input": "read this", "output_length": 9},
        {"session_id": "b", "input_length": 50},
        {"session_id": "a", "delay": 1500, "input_length": 30},
    )
    first, second = read_trace(path, 64)
    assert (first.name, first.start_s, second.start_s) == ("a", 0.1, None)
    assert [turn.output_tokens for turn in first.turns] == [9, 64]
    assert first.turns[1].think_s == 1.5
    assert first.turns[0].pieces[0].text == "read this"
    assert second.turns[0].pieces == (Piece("b turn 0", 50),)


@pytest.mark.parametrize("as_array", [True, False])
def test_recorded_conversations_keep_their_answers_lengths(tmp_path: Path, as_array: bool):
    talk = [
        {"from": "system", "value": "be brief"}, {"from": "human", "value": "what?"},
        {"from": "gpt", "value": "x" * 400}, {"from": "human", "value": "why?"},
        {"from": "gpt", "value": "y" * 40}, {"from": "human", "value": "never answered"},
    ]  # fmt: skip
    openai = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "abcd"}]
    records = [{"id": "q", "conversations": talk}, {"messages": openai}]
    path = tmp_path / "share.json"
    if as_array:
        path.write_text(json.dumps(records))
    else:
        write(path, *records)
    first, second = read_trace(path, 64)
    assert [turn.pieces[0].text for turn in first.turns] == ["be brief\nwhat?", "why?"]
    assert [turn.output_tokens for turn in first.turns] == [100, 10]
    assert [turn.output_tokens for turn in second.turns] == [1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no turn"),
        ("{", "is no JSON"),
        ('{"prompt": "x"}', "record 1"),
        ('{"input_length": 5}\n{"input_length": 0}', "record 2"),
        ('{"session_id": 1, "input_length": 5, "delay": -1}', "must not be negative"),
        ('{"messages": [{"role": "user"}]}', "has no role or text"),
        ('[3]', "record 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_trace_is_one_sentence(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(LoadTestError) as refusal:
        read_trace(path, 64)
    assert problem in str(refusal.value)
    assert "must be lines of JSON with hash_ids" in str(refusal.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path):
    with pytest.raises(LoadTestError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl", 64)


# -- tokens -----------------------------------------------------------------------------------


def tokenizer_of(server: Streaming) -> Tokenizer:
    return Tokenizer(Arm("a", server.url), Server("small", "folder", None, None))


def test_a_piece_is_the_same_tokens_for_its_key(server: Streaming, tmp_path: Path):
    sessions, tokens = prepare(generate("agent", SMALL), tokenizer_of(server), None, 1)
    pieces = [piece for one in sessions for turn in one.turns for piece in turn.pieces]
    assert all(len(tokens.of(piece)) == piece.tokens for piece in pieces)
    assert tokens.of(pieces[0]) == tokens.of(Piece("shared", 64))
    assert tokens.of(pieces[0])[:16] != tokens.of(pieces[1])[:16]
    assert tokens.of(Piece("shared", 32)) == tokens.of(pieces[0])[:32]
    assert len(tokens.of(Piece("long", 2 * len(tokens.pool)))) == 2 * len(tokens.pool)


def test_text_is_counted_by_the_servers_tokenizer(server: Streaming):
    turn = Turn((Piece("text a bb", 0, "a bb ccc"),), 4)
    (session,), tokens = prepare([Session("x", (turn,))], tokenizer_of(server), None, 0)
    assert session.turns[0].new_tokens == 3
    assert tokens.of(session.turns[0].pieces[0]) == [529, 546, 563]


def test_without_a_tokenizer_an_id_stands_for_each_word(server: Streaming):
    server.tokenizer = False
    tokenizer = tokenizer_of(server)
    assert tokenizer.stands_in
    ids = tokenizer.encode("one two, one")
    assert len(ids) == 4
    assert ids[0] == ids[3] != ids[1]
    assert all(1000 <= token < 30000 for token in ids)


def test_a_text_of_one_word_is_refused(server: Streaming, tmp_path: Path):
    text = tmp_path / "same.txt"
    text.write_text("word " * 5000)
    with pytest.raises(LoadTestError, match="knows 1 tokens of it, must be at least 32"):
        prepare(generate("agent", SMALL), tokenizer_of(server), text, 1)


# -- a request and a round --------------------------------------------------------------------


def test_an_answer_has_its_tokens_and_times(server: Streaming):
    server.delay_s = 0.02
    answer = ask(Arm("s2o", server.url, 0.2), "small", [1, 2, 3], 4, "salt")
    assert answer.tokens == [7, 8, 9, 10]
    assert len(answer.gaps_s) == 3
    assert answer.ttft_s >= 0.02
    assert answer.tpot_s == pytest.approx(sum(answer.gaps_s) / 3)
    assert answer.end_s - answer.sent_s == pytest.approx(answer.ttft_s + sum(answer.gaps_s))
    (body,) = server.asked
    assert body["prompt"] == [1, 2, 3]
    assert (body["cache_salt"], body["vllm_xargs"]) == ("salt", {"s2o_sparsity_budget": 0.2})


def test_errors_are_in_the_answer(server: Streaming):
    server.fails = lambda body: True
    arm = Arm("a", server.url)
    assert ask(arm, "small", [1], 4, "salt").error == "HTTP 500: out of luck"
    nobody = ask(Arm("a", "http://127.0.0.1:9"), "small", [1], 4, "salt")
    assert "refused" in nobody.error
    assert nobody.ttft_s is None


def round_of(sessions: list[Session], tokens: Any, send: Any, load: Load) -> list[dict]:
    requests, seconds = send_round(sessions, load, send, tokens, lambda: None)
    assert seconds > 0
    return requests


def test_a_turn_goes_on_from_the_servers_own_answer(server: Streaming):
    sessions, tokens = prepare(generate("agent", SMALL), tokenizer_of(server), None, 1)
    arm = Arm("a", server.url)
    requests = round_of(
        sessions, tokens, lambda prompt, n: ask(arm, "small", prompt, n, "s"), Load(None, 2)
    )
    assert server.most_at_once == 2
    asked = {tuple(body["prompt"]): body for body in server.asked}
    session = max(sessions, key=lambda one: len(one.turns))
    history: list[int] = []
    for turn in session.turns:
        history += [token for piece in turn.pieces for token in tokens.of(piece)]
        history += answer_to(asked[tuple(history)])
    own = [one for one in requests if one["session"] == session.name]
    assert [one["turn"] for one in own] == [*range(1, len(session.turns) + 1)]
    assert [one["prompt_tokens"] for one in own] == [length for length, _ in session.lengths()]


def test_after_a_failed_turn_the_session_ends_and_the_rest_counts_as_failed(server: Streaming):
    turns = tuple(Turn((Piece(f"{number}", 40),), 4) for number in range(3))
    sessions, tokens = prepare([Session("x", turns)], tokenizer_of(server), None, 1)
    server.fails = lambda body: len(body["prompt"]) > 50
    arm = Arm("a", server.url)
    done: list[int] = []
    requests, _ = send_round(
        sessions, Load(None, 1), lambda prompt, n: ask(arm, "small", prompt, n, "s"), tokens,
        lambda: done.append(1),
    )  # fmt: skip
    assert [one["error"] for one in requests] == [
        None, "HTTP 500: out of luck", "after an earlier turn: HTTP 500: out of luck",
    ]  # fmt: skip
    assert len(done) == 3
    assert len(server.asked) == 1


def test_sessions_begin_at_their_times(server: Streaming):
    sessions = [
        Session(name, (Turn((Piece(name, 40),), 2),), start_s=start)
        for name, start in (("late", 0.3), ("early", 0.0))
    ]
    sessions, tokens = prepare(sessions, tokenizer_of(server), None, 1)
    sent: list[Answer] = []

    def send(prompt: Any, count: int) -> Answer:
        sent.append(ask(Arm("a", server.url), "small", prompt, count, "s"))
        return sent[-1]

    round_of(sessions, tokens, send, Load(1.0, None))
    assert sent[1].sent_s - sent[0].sent_s == pytest.approx(0.3, abs=0.15)
    assert server.asked[0]["prompt"] == tokens.of(Piece("early", 40))


# -- rows -------------------------------------------------------------------------------------


def request(**changes: Any) -> dict[str, Any]:
    usual = {
        "session": "x", "turn": 1, "prompt_tokens": 9000, "new_tokens": 9000, "output_tokens": 3,
        "ttft_ms": 100.0, "tpot_ms": 10.0, "e2e_ms": 120.0, "gaps_ms": [10.0, 10.0],
        "error": None,
    }  # fmt: skip
    return usual | changes


def test_a_row_has_latencies_by_turn_and_what_met_the_objective():
    one = {"seconds": 4.0, "prefix_hits": 30.0, "prefix_queries": 40.0, "visited": None,
           "eligible": None, "requests": [request(), request(turn=2, ttft_ms=300.0)]}  # fmt: skip
    two = {"seconds": 6.0, "prefix_hits": 10.0, "prefix_queries": 60.0, "visited": None,
           "eligible": None, "requests": [
               request(ttft_ms=200.0, prompt_tokens=500, tpot_ms=90.0),
               request(turn=2, ttft_ms=None, output_tokens=0, gaps_ms=[], error="lost"),
           ]}  # fmt: skip
    row = report.row({"backend": "a"}, [one, two], {"ttft": 250, "tpot": 50})
    assert row["turn_ttft_p50_ms"] == [150.0, 300.0]
    assert (row["ttft_p50_ms"], row["short_ttft_p50_ms"]) == (200.0, 200.0)
    assert (row["requests"], row["failed"]) == (4, 1)
    assert row["goodput_rps"] == 0.1, "one of four, in ten seconds"
    assert row["answered_rps"] == 0.3
    assert row["output_tok_s"] == 0.9
    assert row["prefix_hit_share"] == 0.4
    assert row["density"] is None
    assert row["itl_p50_ms"] == 10.0
    assert row["objective"] == "ttft:250 tpot:50"
    assert report.row({}, [one], {})["goodput_rps"] is None


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "first:3", "ttft:-1"])
def test_an_objective_that_cannot_be_read_is_refused(text: str):
    with pytest.raises(LoadTestError, match="must be ttft:MS, tpot:MS or e2el:MS"):
        report.parse_objectives([text])


# -- the whole command ------------------------------------------------------------------------


def test_arms_take_turns_and_become_rows_a_table_and_a_picture(
    server: Streaming, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "replay.json"
    code = main(words_of(server.url, "--concurrency", "1,2", "--goodput", "ttft:60000",
                         output=output))  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(output.read_text())
    rows = result["rows"]
    assert [(row["backend"], row["budget"], row["concurrency"]) for row in rows] == [
        ("stock", 1.0, 1), ("s2o", None, 1), ("stock", 1.0, 2), ("s2o", None, 2),
    ]  # fmt: skip
    assert {row["trace"] for row in rows} == {"agent"}
    assert all(row["failed"] == 0 and row["goodput_rps"] > 0 for row in rows)
    assert all(0.3 < row["prefix_hit_share"] < 1 for row in rows)
    first, *parts = log_lines(output)
    assert [(part["load"], part["round"], part["arm"]) for part in parts] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0),
    ]  # fmt: skip
    assert sum(len(part["requests"]) for part in parts) == sum(row["requests"] for row in rows)
    with output.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["ttft_p50_ms"]) for line in table] == [row["ttft_p50_ms"] for row in rows]
    assert json.loads(table[0]["turn_ttft_p50_ms"]) == rows[0]["turn_ttft_p50_ms"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert " min left" in printed.out
    assert first["plan"]["trace"] == "agent"
    salts = {(body["cache_salt"], str(body.get("vllm_xargs"))) for body in server.asked}
    assert len({salt for salt, _ in salts}) == len(salts) == 8, "probes and loads share no cache"


def test_an_interrupted_replay_goes_on_where_it_ended(server: Streaming, tmp_path: Path):
    output = tmp_path / "replay.json"
    assert main(words_of(server.url, output=output)) == 0
    path = output.with_suffix(".requests.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])
    asked = len(server.asked)
    assert main(words_of(server.url, "--resume", output=output)) == 0
    parts = log_lines(output)[1:]
    assert len(parts) == 4
    assert [json.dumps(part) for part in parts[:2]] == lines[1:3], "complete parts are kept"
    again = sum(len(part["requests"]) for part in parts[2:])
    assert len(server.asked) - asked == again + 4, "and each arm is asked twice to find its speed"
    with pytest.raises(SystemExit):
        main(words_of(server.url, "--resume", "--minutes", "soon", output=output))


def test_another_replay_is_not_gone_on_with(
    server: Streaming, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "replay.json"
    assert main(words_of(server.url, output=output)) == 0
    assert main(words_of(server.url, "--resume", "--seed", "5", output=output)) == 2
    assert "was measured with sessions" in capsys.readouterr().err
    output.with_suffix(".requests.jsonl").write_text("nothing\n")
    assert main(words_of(server.url, "--resume", output=output)) == 2
    assert "is no log of a replay" in capsys.readouterr().err


def test_minutes_end_a_replay_before_a_round(server: Streaming, tmp_path: Path, capsys: Any):
    output = tmp_path / "replay.json"
    assert main(words_of(server.url, "--minutes", "0", output=output)) == 3
    assert "go on with --resume" in capsys.readouterr().out
    assert len(log_lines(output)) == 1
    assert main(words_of(server.url, "--resume", output=output)) == 0


def test_a_trace_longer_than_the_server_takes_is_refused(
    server: Streaming, tmp_path: Path, capsys: Any
):
    server.longest = 500
    assert main(words_of(server.url, output=tmp_path / "replay.json")) == 2
    assert "must be at most the server's 500" in capsys.readouterr().err


def test_a_server_that_answers_nothing_is_one_sentence(
    server: Streaming, tmp_path: Path, capsys: Any
):
    server.fails = lambda body: bool(body.get("stream"))
    assert main(words_of(server.url, output=tmp_path / "replay.json")) == 2
    assert "stock: the first request failed: HTTP 500" in capsys.readouterr().err


def test_a_file_is_replayed_at_its_own_times(server: Streaming, tmp_path: Path):
    path = write(
        tmp_path / "toolagent.jsonl",
        *({"timestamp": 100 * number, "input_length": 600 + number, "output_length": 3,
           "hash_ids": [0, number + 1]} for number in range(4)),
    )  # fmt: skip
    output = tmp_path / "replay.json"
    arguments = ["--arm", f"a={server.url}", "--replay", str(path), "--rounds", "1",
                 "--device", "a test", "--output", str(output)]  # fmt: skip
    assert main(arguments) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["trace"], row["rate"], row["concurrency"]) == ("toolagent", None, None)
    assert row["requests"] == 4
    assert row["duration_s"] >= 0.3
    assert row["prefix_hit_share"] == pytest.approx(3 * 512 / sum(600 + n for n in range(4)), 0.01)


@pytest.mark.parametrize(
    "arguments", [["--lengths", "5"], ["--lengths", "9,5"], ["--concurrency", "1,x"]]
)
def test_arguments_of_the_wrong_kind_are_refused(arguments: list[str], capsys: Any):
    with pytest.raises(SystemExit) as refusal:
        main(["--arm", "a=http://127.0.0.1:9", *arguments])
    assert refusal.value.code == 2
    assert f"is {arguments[1]!r}, must be" in capsys.readouterr().err


def test_several_rates_and_several_concurrencies_are_refused(server: Streaming, tmp_path: Path,
                                                             capsys: Any):  # fmt: skip
    words = words_of(server.url, "--rates", "1", "--concurrency", "1,2", output=tmp_path / "x.json")
    assert main(words) == 2
    assert "must have one beside --rates" in capsys.readouterr().err
