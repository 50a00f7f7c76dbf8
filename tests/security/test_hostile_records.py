"""A record of others, and what a terminal or a page shows of names and captions."""

import copy
import io
import re
import subprocess
import sys
import urllib.parse

import pytest
import yaml

from cogvx import config as configuration
from cogvx import leaving
from cogvx.errors import UserError
from cogvx.files import read_json, read_json_lines
from cogvx.records import folders, pages, record, report
from cogvx.runs import translate

SECRET = "hf_a_token_of_somebody"


@pytest.fixture(scope="module")
def usual(compose):
    return compose()


@pytest.fixture
def recorded(usual, tmp_path, monkeypatch):
    """recorded(change): the folder of a record that `change` has changed, as a dict."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    folder = tmp_path / "run"
    folder.mkdir()

    def changed(change):
        values = yaml.safe_load(configuration.to_yaml(usual))
        change(values)
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        return folder

    return changed


def started(folder, tmp_path, *more):
    """What `--config-dir FOLDER` gives to Hydra."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    translate.translated(["--config-dir", str(folder), "--config-name", "config", *more], scratch)
    return yaml.safe_load((scratch / "config.yaml").read_text())


CALLS = [
    "${oc.env:HF_TOKEN}",
    "${oc.decode:${oc.env:HF_TOKEN}}",
    "a ${oc.env:HF_TOKEN} b",
    "${${train.resume}:HF_TOKEN}",
    "${oc.create:{a: 1}}",
    "${described:task}",
    "\\\\${oc.env:HF_TOKEN}",
    "\\${x} ${hydra:runtime.cwd}",
]


@pytest.mark.parametrize("text", CALLS)
def test_no_value_of_a_record_calls_anything(recorded, tmp_path, text):
    def change(values):
        values["data"]["id_token"] = text

    folder = recorded(change)
    for read in (
        lambda: configuration.read(folder / "config.yaml"),
        lambda: started(folder, tmp_path),
    ):
        with pytest.raises(UserError, match="which would call something here") as refused:
            read()
        assert SECRET not in str(refused.value) and "\n" not in str(refused.value)
    assert folders.recorded_settings(folder) == {"defaults": []}
    assert report.changed_settings((folder / "config.yaml").read_text()) == []


@pytest.mark.parametrize("text", ["${seed}", "\\${seed}", "\\\\${oc.env:HF_TOKEN}", "a\\", "$x {"])
def test_a_text_that_looks_like_a_call_is_a_text(usual, tmp_path, text):
    config = copy.deepcopy(usual)
    config.data.id_token = text
    path = tmp_path / "config.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    assert configuration.read(path).data.id_token == text


def test_another_settings_name_still_stands_for_its_value(recorded):
    def change(values):
        values["lora"]["lora_alpha"] = "${lora.rank}"

    assert configuration.read(recorded(change) / "config.yaml").lora.lora_alpha == 64


CLASSES = {
    "a callback": {"hydra": {"callbacks": {"x": {"_target_": "os.system"}}}},
    "a launcher": {"hydra": {"launcher": {"_target_": "os.system"}}},
    "a log's handler": {"hydra": {"job_logging": {"handlers": {"x": {"()": "os.system"}}}}},
    "at the top": {"_target_": "os.system"},
}


@pytest.mark.parametrize("what", CLASSES)
def test_no_class_of_a_record_is_made(recorded, tmp_path, what):
    folder = recorded(lambda values: values.update(CLASSES[what]))
    with pytest.raises(UserError, match=r"hydra|_target_"):
        started(folder, tmp_path)


def test_a_class_in_a_section_is_an_unknown_setting(recorded, tmp_path):
    folder = recorded(lambda values: values["optimizer"].update(_target_="os.system"))
    with pytest.raises(UserError, match=r"optimizer\._target_"):
        started(folder, tmp_path)


def test_the_list_of_defaults_names_options_alone(recorded, tmp_path):
    def change(values):
        values["defaults"] += [
            {"/../../tmp/evil@hydra.callbacks": "x"},
            {"override hydra/job_logging": "/tmp/evil"},
            "/tmp/evil",
        ]

    defaults = started(recorded(change), tmp_path)["defaults"]
    usual = yaml.safe_load((configuration.CONF / "config.yaml").read_text())["defaults"]
    hydras = [each for each in usual if "override hydra/" in str(each)]
    assert [each for each in defaults if "evil" in str(each)] == []
    assert defaults[-len(hydras) :] == hydras
    with pytest.raises(UserError, match="names no known option"):
        started(
            recorded(lambda values: values["defaults"].append({"model": "../../tmp/evil"})),
            tmp_path,
        )


FILES = {
    "tags of Python": "!!python/object/apply:os.system ['touch {ran}']",
    "a new object": "a: !!python/object/new:os.system ['touch {ran}']",
    "texts in texts": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "\n".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "brackets": "[" * 500,
    "a circle": "&a [*a]",
    "no text": "\x00\x01",
    "not UTF-8": b"\xff\xfe\xfa",
    "a list": "- 1",
    "a number": "5",
    "nothing": "",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_record_is_named_in_one_line(tmp_path, kind):
    ran, path, content = tmp_path / "ran", tmp_path / "config.yaml", FILES[kind]
    text = content if isinstance(content, bytes) else content.replace("{ran}", str(ran)).encode()
    path.write_bytes(text)
    for _ in range(2):
        with pytest.raises(UserError, match="is not the configuration of a run") as refused:
            configuration.read(path)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
    assert folders.recorded_settings(tmp_path) == {"defaults": []} and not ran.exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "NaN", "", "\x00", "{'a': 1}"])
def test_json_that_is_none_is_nothing(tmp_path, text):
    path = tmp_path / "summary.json"
    path.write_text(text)
    assert not read_json(path) or text == "NaN"
    assert read_json_lines(path) == []


def test_a_key_goes_to_no_server_that_only_a_record_names(compose, tmp_path, monkeypatch):
    url = "https://models.example.org/v1"
    folder = tmp_path / "run"
    asked = ["task=generate", "task.prompt=x", "task.enhancer=m", f"output_dir='{folder}'"]
    record.open_folder(compose(*asked, f"task.enhancer_url={url}"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert started(folder, tmp_path)["task"]["enhancer_url"] == url
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(UserError, match="this server would get your OPENAI_API_KEY") as refused:
        started(folder, tmp_path)
    assert SECRET not in str(refused.value)
    assert started(folder, tmp_path, f"task.enhancer_url={url}")["task"]["enhancer_url"] == url


def test_a_server_that_sends_on_does_not_pass_on_the_key(monkeypatch):
    from cogvx.inference import chat

    asked = []

    def urlopen(request, timeout):
        asked.append(request)
        return io.BytesIO(b'{"choices": [{"message": {"content": "yes"}}]}')

    monkeypatch.setattr(chat.urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    answer = chat.answer_of_server("m", "http://localhost:1", "task.enhancer", [])
    assert answer.text == "yes"
    [request] = asked
    assert request.get_header("Authorization") == f"Bearer {SECRET}"
    # urllib copies `headers` into the request of another address, and not the others.
    assert "Authorization" not in request.headers


# -- the terminal and the pages ----------------------------------------------------------------

HOSTILE = {
    "the window's title": "\x1b]0;owned\x07",
    "the clipboard": "\x1b]52;c;Y3VybA==\x07",
    "an answer on the keyboard": "\x1b[6n",
    "the screen": "\x1b[2J\x1b[H",
    "C1": "\x9b2J",
    "a line over this one": "\rerror: none",
    "backspace": "\x08" * 20,
}


def test_no_command_reaches_the_terminal():
    lines = "".join(f"{text} x\n" for text in HOSTILE.values())
    code = (
        "from cogvx import leaving; leaving.outlast_readers()\n"
        f"print({lines!r} + '\\x1b[31mred\\x1b[0m\\tü')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    text = ran.stdout.decode()
    assert text.endswith("\x1b[31mred\x1b[0m\tü\n"), ran.stderr.decode()
    assert not leaving.CONTROLS.search(text.replace("\x1b[31m", "").replace("\x1b[0m", ""))
    assert "\\x1b]0;owned\\x07 x\n" in text and "\\x0derror: none" in text


def test_errors_are_shown_without_commands(capsys):
    import launch

    assert launch.say(UserError("a clip called " + "".join(HOSTILE.values()))) == 2
    assert not leaving.CONTROLS.search(capsys.readouterr().err)


SCRIPT = "<script>alert(1)</script>'\"><img src=x onerror=alert(1)> {{ 7*7 }} javascript:alert(1)"


def test_a_page_shows_hostile_texts_and_obeys_none():
    templates = pages.templates()
    for place in ("<p>{{ text }}</p>", '<img alt="{{ text }}">', "<p title='{{ text }}'>"):
        shown = templates.from_string(place).render(text=SCRIPT)
        assert "<script" not in shown and "<img src=x" not in shown and "49" not in shown
        assert shown.count('"') == place.count('"') and shown.count("'") == place.count("'")
    shown = templates.from_string("<script>x = {{ text|tojson }}</script>").render(text=SCRIPT)
    assert shown.count("<") == 2
    # Nothing turns the escaping off, and no attribute stands without quotes.
    for path in pages.TEMPLATES.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "|safe" not in text.replace(" ", "") and "autoescape false" not in text, path
        assert not re.search(r"\w=\{\{", text), path


def test_a_folders_name_is_no_address_of_another_kind(tmp_path):
    names = ["javascript:alert(1)", "data:text,x", 'a"b', "a#b?c", "a b", "ü"]
    for name in names:
        shown = pages.address(tmp_path / name / "report.html", tmp_path)
        assert re.fullmatch(r"[\w%=,+@./()-]+", shown, re.ASCII), shown
        assert urllib.parse.unquote(shown) == f"{name}/report.html"
    usual = "lora.rank=4,seed=1/report.html"
    assert pages.address(tmp_path / usual, tmp_path) == usual


RISKY = re.compile(
    r"pickle\.load|shell=True|os\.system|os\.popen|allow_pickle=True|weights_only=False|"
    r"yaml\.(?:load|unsafe_load|full_load)\(|(?<![\w.])(?:eval|exec)\(|"
    r"trust_remote_code\W+True|extractall|\.extract\(|read_pickle|joblib|dill"
)
KNOWN_PLACES = {
    # Between two processes of this program.
    ("cogvx/data/decoder_process.py", "pickle.load"),
    ("cogvx/data/decoders.py", "pickle.load"),
    # A message says what is not done.
    ("cogvx/model/weight_files.py", "weights_only=False"),
}


def test_no_shell_no_code_of_models_and_no_pickle_of_others():
    """What could run something, in the whole of the code: each place is known."""
    project = configuration.PROJECT
    found = {
        (path.relative_to(project).as_posix(), hit)
        for path in [*project.glob("cogvx/**/*.py"), project / "launch.py"]
        for hit in RISKY.findall(path.read_text(encoding="utf-8"))
    }
    assert found == KNOWN_PLACES
