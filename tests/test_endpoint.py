"""Teachers behind an interface, against a small server on this machine."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("requests")

from stillhouse.cli import main
from stillhouse.data.readers import read_data
from stillhouse.data.text import pack_pairs
from stillhouse.errors import ConfigError, DataError, EndpointError, RoleError, UnknownNameError
from stillhouse.hub.endpoint import PROBE, CallableTeacher, Endpoint
from stillhouse.hub.models import resolve_model
from stillhouse.measures.projected import projected_topk_kl
from stillhouse.models.language import gpt2
from stillhouse.protocols import CausalLM, Classifier, TokenPairs, TopKTeacher

KEY = "sk-a-secret-that-must-not-leak"


def byte_tokenizer(reverse=False):
    """Bytes as tokens, in the way of GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<eos>", *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return gpt2(len(tokenizer), length=128, eos=0, pad=0).eval()


class Server:
    """The completions interface around a model. `script` holds what the next requests get instead: a status, headers
    and a body, or a number of seconds to wait."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.seen, self.headers, self.script, self.style, self.lock = [], [], [], "token_ids", threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.seen.append((self.path, body))
                    owner.headers.append(dict(self.headers))
                    step = owner.script.pop(0) if owner.script else None
                    if isinstance(step, float):
                        time.sleep(step)
                        step = None
                    status, headers, answer = step or (200, {}, owner.answer(self.path, body))
                content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(content))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except BrokenPipeError:
                    pass

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def word(self, i):
        if self.style == "token_ids":
            return f"token_id:{i}"
        return self.tokenizer.convert_ids_to_tokens(i) if self.style == "tokens" else self.tokenizer.decode([i])

    @torch.no_grad()
    def answer(self, path, body):
        if path == "/v1/chat/completions":
            return {"choices": [{"message": {"content": f"chat: {body['messages'][0]['content']}"}}]}
        prompt = body["prompt"]
        if "logprobs" not in body:
            return {"choices": [{"text": f" answer to {prompt}"}], "usage": {"total_tokens": 10}}
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        log_p = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        new = int(log_p[-1].argmax())
        top = log_p.topk(body["logprobs"]).indices.tolist()
        tops = [None, *({self.word(i): float(row[i]) for i in best} for row, best in zip(log_p, top, strict=True))]
        for place, token in enumerate(ids[1:], 1):  # some servers add the token itself to the likeliest
            tops[place].setdefault(self.word(token), float(log_p[place - 1, token]))
        return {"choices": [{"text": "", "logprobs": {"tokens": [self.word(i) for i in [*ids, new]],
                                                      "top_logprobs": tops}}], "usage": {"total_tokens": len(ids) + 1}}


@pytest.fixture
def server(model, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Server(model, tokenizer)
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def words(server, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return f"api:{server.base}:model=tiny,tokenizer={tmp_path / 'tokenizer'},timeout=5"


def texts(tokenizer, n=4):
    return pack_pairs([(f"what is {i}?", f"it is {'very ' * i}big") for i in range(n)], tokenizer, 64, 32)


def everything_written(folder):
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("style", ["token_ids", "tokens"])
def test_top_k_is_that_of_the_model_itself(server, words, tokenizer, model, style):
    server.style = style
    teacher, data = resolve_model(f"{words},top_k=6", TopKTeacher), texts(tokenizer)
    log_p, index = teacher.top_k(data.input_ids, data.attention_mask)
    real = data.attention_mask.bool()
    want = model(input_ids=data.input_ids, attention_mask=data.attention_mask).logits.log_softmax(-1).detach()
    assert teacher.vocabulary == 257 and log_p.shape == (*data.input_ids.shape, 6)
    torch.testing.assert_close(log_p[real], want.topk(6).values[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(want.gather(-1, index)[real], log_p[real], rtol=1e-4, atol=1e-4)
    assert (log_p[~real] == -torch.inf).all()


def test_texts_that_several_tokens_have_are_left_out(server, words, tokenizer, model):
    server.style = "decoded"
    data = texts(tokenizer)
    log_p, index = resolve_model(f"{words},top_k=6,token_ids=false", TopKTeacher).top_k(data.input_ids,
                                                                                       data.attention_mask)
    want = model(input_ids=data.input_ids, attention_mask=data.attention_mask).logits.log_softmax(-1).detach()
    known = log_p > -torch.inf
    assert known.any() and not known[data.attention_mask.bool()].all()
    torch.testing.assert_close(want.gather(-1, index)[known], log_p[known], rtol=1e-4, atol=1e-4)


def test_the_requests(server, words, tokenizer):
    data = texts(tokenizer, 2)
    resolve_model(f"{words},top_k=3", TopKTeacher).top_k(data.input_ids, data.attention_mask)
    assert {path for path, _ in server.seen} == {"/v1/completions"} and len(server.seen) == 3
    bodies = [body for _, body in server.seen]
    assert bodies[0]["prompt"] == PROBE
    ids = sorted(row[:n].tolist() for row, n in zip(data.input_ids, data.attention_mask.sum(1).tolist(), strict=True))
    assert sorted(b["prompt"] for b in bodies[1:]) == ids
    assert all(b["echo"] and b["logprobs"] == 3 and b["max_tokens"] == 1 and b["model"] == "tiny" for b in bodies)
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)


def test_a_resumed_run_asks_nothing_twice(server, words, tokenizer, tmp_path):
    data = texts(tokenizer)
    first = resolve_model(words, TopKTeacher).top_k(data.input_ids, data.attention_mask)
    asked = len(server.seen)
    again = resolve_model(words, TopKTeacher)
    second = again.top_k(data.input_ids, data.attention_mask)
    assert len(server.seen) == asked == 5 and again.sent == 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert KEY.encode() not in everything_written(tmp_path)


def test_errors_that_pass_are_tried_again(server):
    server.script = [(429, {"Retry-After": "0"}, "slow down"), (500, {}, "oops"), (503, {}, "oops")]
    teacher = Endpoint(server.base, "tiny", pause=0.01)
    assert teacher.complete(["a"]) == [" answer to a"]
    assert len(server.seen) == teacher.sent == 4


def test_retry_after_is_honoured(server):
    server.script = [(429, {"Retry-After": "0.4"}, "slow down")]
    start = time.perf_counter()
    Endpoint(server.base, "tiny", pause=0.0).complete(["a"])
    assert time.perf_counter() - start > 0.4


def test_trying_ends(server):
    server.script = [(500, {}, "oops")] * 9
    with pytest.raises(EndpointError, match="answered 500: oops; given up after 3 tries"):
        Endpoint(server.base, "tiny", pause=0.01, retries=2).complete(["a"])
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_what_will_not_pass_is_not_tried_again_and_names_no_key(server, status):
    server.script = [(status, {"Location": "http://example.invalid/"}, f"wrong key {KEY}")] * 3
    with pytest.raises(EndpointError, match=f"answered {status}: wrong key …") as caught:
        Endpoint(server.base, "tiny", pause=0.01).complete(["a"])
    assert len(server.seen) == 1 and KEY not in repr(caught.value) and caught.value.__cause__ is None


def test_a_slow_answer_is_asked_for_again(server):
    server.script = [0.6]
    assert Endpoint(server.base, "tiny", pause=0.01, timeout=0.3, retries=3).complete(["a"]) == [" answer to a"]
    assert len(server.seen) >= 2


def test_nobody_there(server):
    free = server.base
    server.http.shutdown()
    server.http.server_close()
    start = time.perf_counter()
    with pytest.raises(EndpointError, match=r"cannot be reached .*timeout 2 s.*Is the server running"):
        Endpoint(free, "tiny", timeout=2).complete(["a"])
    assert time.perf_counter() - start < 2.5


def test_the_budget_stops_with_everything_kept(server):
    prompts = [f"prompt {i}" for i in range(6)]
    with pytest.raises(EndpointError, match="budget of 4 requests is used up"):
        Endpoint(server.base, "tiny", budget=4, parallel=2).complete(prompts)
    assert len(server.seen) == 4
    assert len(Endpoint(server.base, "tiny", budget=2).complete(prompts)) == 6
    assert len(server.seen) == 6 and len({b["prompt"] for _, b in server.seen}) == 6
    with pytest.raises(EndpointError, match="20 tokens"):
        Endpoint(server.base, "tiny", tokens=20, parallel=1).complete(["x", "y", "z"])


@pytest.mark.parametrize("answer", [
    "no json", [], {}, {"choices": []}, {"choices": [{"text": None, "logprobs": None}]},
    {"choices": [{"text": "", "logprobs": {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": -1.0}]}}]},
    {"choices": [{"text": "", "logprobs": {"tokens": ["token_id:9", "token_id:9"], "top_logprobs": [None, None]}}]}])
def test_malformed_answers(server, words, tokenizer, answer, tmp_path):
    teacher = resolve_model(f"{words},retries=0", TopKTeacher)
    ids = torch.tensor([[40, 41]])
    teacher.top_k(ids[:, :1])
    before = len(list((tmp_path / "cache").rglob("*.json")))
    server.script = [(200, {}, answer)]
    with pytest.raises(EndpointError, match="gave an answer that"):
        teacher.top_k(ids)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == before
    assert (teacher.top_k(ids)[0] > -torch.inf).all()


def test_another_tokenizer_is_refused(server, tokenizer, tmp_path):
    byte_tokenizer(reverse=True).save_pretrained(tmp_path / "other")
    teacher = resolve_model(f"api:{server.base}:model=tiny,tokenizer={tmp_path / 'other'}", TopKTeacher)
    with pytest.raises(RoleError, match="splits a text into other tokens.*--answers"):
        teacher.top_k(torch.tensor([[4, 5]]))
    assert len(server.seen) == 1


def test_bad_words(server, words, tmp_path):
    with pytest.raises(ConfigError, match="not of the form api:BASE_URL"):
        resolve_model("api:localhost:8000", TopKTeacher)
    with pytest.raises(UnknownNameError, match="no option 'topk'"):
        resolve_model(f"{words},topk=3", TopKTeacher)
    with pytest.raises(ConfigError, match="budget is a number"):
        resolve_model(f"{words},budget=lots", TopKTeacher)
    with pytest.raises(ConfigError, match="top_k and parallel are at least 1"):
        resolve_model(f"{words},top_k=0", TopKTeacher)
    with pytest.raises(ConfigError, match="model is not named"):
        resolve_model(f"api:{server.base}:top_k=3", TopKTeacher)
    with pytest.raises(RoleError, match=r"needs a Classifier.*TopKTeacher"):
        resolve_model(words, Classifier)
    with pytest.raises(RoleError, match="no tokenizer in"):
        resolve_model(f"api:{server.base}:model=tiny,tokenizer={tmp_path / 'none'}", TopKTeacher)
    with pytest.raises(ConfigError, match="no password"):
        Endpoint("http://me:word@host/v1", "tiny")
    with pytest.raises(RoleError, match="TopKTeacher"):
        resolve_model(words, CausalLM)(torch.tensor([[1]]))
    with pytest.raises(RoleError, match="tokenizer=FOLDER"):
        Endpoint(server.base, "tiny").top_k(torch.tensor([[1]]))
    assert not server.seen


def test_one_step_of_distillation(server, words, tokenizer):
    teacher, data = resolve_model(f"{words},top_k=8", TopKTeacher), texts(tokenizer)
    torch.manual_seed(1)
    student = gpt2(len(tokenizer), length=128, eos=0, pad=0)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    log_p, index = teacher.top_k(data.input_ids, data.attention_mask)

    def loss():
        hidden = student.transformer(input_ids=data.input_ids, attention_mask=data.attention_mask).last_hidden_state
        return projected_topk_kl(log_p, index, hidden, student.lm_head.weight, "bucket",
                                 weight=data.attention_mask.float())

    before = loss()
    before.backward()
    optimizer.step()
    assert float(loss().detach()) < float(before.detach())


def test_still_run_distillm_with_an_endpoint_as_teacher(server, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {i}?", "response": f"it is {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = str(tmp_path / "tokenizer")
    main(["run", "distillm", "--teacher", f"{words},top_k=8", "--student", "gpt2:vocabulary=257,length=128,eos=0,pad=0",
          "--data", "pairs.jsonl", "--validation", "pairs.jsonl", "--tokenizer", folder, "--out", "done", "--quiet",
          "--config.steps", "3", "--config.batch", "2", "--config.fine-tuning", "0", "--config.max-new-tokens", "4",
          "--config.select", "last"])
    assert "stillhouse.load" in capsys.readouterr().out and len(server.seen) > 2
    assert KEY.encode() not in everything_written(tmp_path)


def test_still_cache_of_an_endpoint_and_its_use_without_it(server, words, tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {i}?", "response": f"it is {i}"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["cache", f"{words},top_k=4", "--data", "pairs.jsonl", "--out", "kept", "--top-k", "4", "--dtype", "uint8"])
    assert "use it as: --teacher cache:kept" in capsys.readouterr().out
    data = read_data("pairs.jsonl", TokenPairs, tokenizer=tokenizer)
    want = resolve_model(f"{words},top_k=4", TopKTeacher).top_k(data.input_ids, data.attention_mask)
    server.http.shutdown()
    log_p, index = resolve_model("cache:kept", TopKTeacher).top_k(data.input_ids, data.attention_mask)
    assert torch.equal(index, want[1])
    torch.testing.assert_close(log_p, want[0], rtol=0, atol=0.05)
    assert KEY.encode() not in everything_written(tmp_path)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_become_data(server, tmp_path, monkeypatch, capsys, chat):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    words = f"api:{server.base}/v1/:model=tiny,chat={str(chat).lower()}"
    main(["cache", words, "--data", "prompts.jsonl", "--out", "pairs.jsonl", "--answers"])
    assert "2 of 2 prompts" in capsys.readouterr().out
    data = read_data("pairs.jsonl")
    assert data.prompt == ["one", "two"]
    assert data.response == (["chat: one", "chat: two"] if chat else [" answer to one", " answer to two"])
    main(["cache", words, "--data", "prompts.jsonl", "--out", "pairs.jsonl", "--answers"])
    assert len(server.seen) == 2


def test_answers_with_bad_input(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "one"}\n{"question": "two"}\n')
    words = f"api:{server.base}:model=tiny"
    for given, said in (("bad.jsonl", "line 2"), ("none.jsonl", "no such file")):
        with pytest.raises(SystemExit):
            main(["cache", words, "--data", given, "--out", "pairs.jsonl", "--answers"])
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        main(["cache", "tiny-convnet", "--data", "digits", "--out", "pairs.jsonl", "--answers"])
    assert "asks an endpoint" in capsys.readouterr().err
    with pytest.raises(DataError, match="no prompts"):
        Endpoint(server.base, "tiny").complete([])
    assert not server.seen


def test_a_plain_function(tokenizer, model):
    def fn(input_ids, attention_mask=None):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits.log_softmax(-1).topk(3)

    ids = torch.tensor([[3, 4, 5]])
    log_p, index = CallableTeacher(fn, 257).top_k(ids)
    assert log_p.shape == index.shape == (1, 3, 3)
    for wrong, said in ((lambda i, m: (-torch.rand(1, 3), torch.zeros(1, 3)), "both are"),
                        (lambda i, m: (torch.rand(1, 3, 2) + 1, torch.zeros(1, 3, 2)), "no log-prob"),
                        (lambda i, m: (-torch.rand(1, 3, 2), torch.full((1, 3, 2), 257)), "outside")):
        with pytest.raises(RoleError, match=said):
            CallableTeacher(wrong, 257).top_k(ids)


def test_the_check_before_any_work_takes_a_teacher_that_cannot_be_called():
    from stillhouse.data.sets import TensorSet
    from stillhouse.protocols import TopKTeacher
    from stillhouse.run import Run

    class Known:
        vocabulary = 5

        def top_k(self, input_ids, attention_mask=None):
            return torch.zeros(*input_ids.shape, 2).log_softmax(-1), torch.zeros(*input_ids.shape, 2, dtype=torch.long)

    ids = torch.ones(3, 4, dtype=torch.long)
    data = TensorSet(input_ids=ids, attention_mask=torch.ones_like(ids), target_mask=torch.ones_like(ids))
    Run(quiet=True).check(TopKTeacher, data, teacher=Known())
    with pytest.raises(RoleError, match="must be a TopKTeacher"):
        Run(quiet=True).check(TopKTeacher, data, teacher=3)
