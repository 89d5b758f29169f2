"""Configs: parsing, checks with their exact lines, round trips, the command line, and every file under configs/."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from configs import base, schema
from configs.schema import describe, methods, overrides
from configs.schema.problems import ConfigError
from tools import config as tool

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "train/objectives/sft.py": 'BATCH = "lm"\ndef make(model): return Objective(loss, BATCH)',
    "train/objectives/dpo.py": """
BATCH = "pair"
def make(model, *, beta: float = 0.1, label_smoothing: float = 0.0):
    return Objective(loss, BATCH, {"policy": "train"})
""",
    "model/peft/lora.py": """
import module_that_does_not_exist
def make(*, rank: int = 16, alpha: float = 32.0, where: str = r".*", rslora: bool = False): ...
""",
    "model/peft/helper.py": "def not_a_method(): ...",
    "model/quant/int.py": """
def make(
    *, group: int | None = None, bits: Literal[4, 8], kind: Literal["nf4", "fp4"] = "nf4", skip: tuple[str, ...] = ()
): ...
""",
    "data/views/next.py": "def make(tokenizer, seq_len): ...",
    "data/views/mlm.py": "def make(tokenizer, seq_len, *, rate: float = 0.15): ...",
    "evals/tasks/arith.py": "def task(): ...",
    "x.py": """
from configs import base
def get_config(arg=""):
    c = base.get_config()
    c.model.shape = "tiny"
    c.eval_every = c.get_ref("steps") // 10
    return c
""",
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with two objectives, an adapter, a quantizer and a task; x.py is its config."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*argv, **flags):
    return schema.load(["--config=x.py", *argv], flags)


def lines(*argv):
    with pytest.raises(ConfigError) as e:
        load(*argv)
    return str(e.value).splitlines()[1:]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("1e3", "steps", 1000),
        ("1_000", "steps", 1000),
        ("2", "optim.lr", 2.0),
        ("3", "model.layers", 3),
        ("none", "model.layers", None),
        ("False", "data.shuffle", False),
        ("a:0.7,b:0.3", "data.source", "a:0.7,b:0.3"),
        ("q=a=b", "init", "q=a=b"),
        ("", "init", ""),
        ("none", "data.packing", "none"),
        ("arith", "evals", ("arith",)),
        ("arith,arith", "evals", ("arith", "arith")),
        ("(arith, arith)", "evals", ("arith", "arith")),
        ("()", "evals", ()),
        ("a/rows.csv:scorer=number:slices=x,arith", "evals", ("a/rows.csv:scorer=number:slices=x", "arith")),
        ("2+2=,3+3=", "samples", ("2+2=", "3+3=")),
        ("'one, two',three", "samples", ("one, two", "three")),
        ("(('embed/.*', 0.1),)", "optim.lr_scale", (("embed/.*", 0.1),)),
        ("(embed/.*, 0.1), (layers/(wq|wk), 2)", "optim.lr_scale", (("embed/.*", 0.1), ("layers/(wq|wk)", 2))),
        ("((embed/.*, 0.1), (a, 2))", "optim.lr_scale", (("embed/.*", 0.1), ("a", 2))),
    ],
)
def test_override(root, text, path, value):
    """Every key can be set from text, with the exact type."""
    loaded = load(f"--config.{path}={text}")
    assert loaded.overrides == {path: value}
    got = schema.flatten(loaded.config)[path]
    assert got == value and type(got) is type(value)


def test_every_key_can_be_overridden(root):
    texts = {"model.shape": "tiny", "objective.name": "dpo", "data.packing": "none", "data.format": "auto"}
    for path, key in schema.base_keys().items():
        text = texts.get(path, "none" if key.nullable else str(key.default))
        assert path in load(f"--config.{path}={text}", "--config.data.packing=none").overrides


def test_placeholder_can_be_set_and_reset(root):
    (root / "y.py").write_text(FILES["x.py"].replace("return", "c.model.layers = 3; return"))
    config = schema.load(["--config=y.py", "--config.model.layers=none"]).config
    assert config.model.layers is None
    with config.unlocked():
        config.model.layers = 4  # the placeholder kept its type
        with pytest.raises(TypeError):
            config.model.layers = "four"


def test_references_follow_overrides(root):
    assert load("--config.steps=200").config.eval_every == 20
    assert load("--config.steps=200", "--config.eval_every=7").config.eval_every == 7


def test_method_arguments(root):
    """Arguments that the file does not mention can be set, defaults are filled in, and a new name drops old ones."""
    config = load("--config.peft.name=lora", "--config.peft.alpha=8").config
    assert config.peft.to_dict() == {"name": "lora", "rank": 16, "alpha": 8.0, "where": ".*", "rslora": False}
    (root / "y.py").write_text(FILES["x.py"].replace("return", "c.peft = dict(name='lora', rank=4); return"))
    assert schema.load(["--config=y.py"]).config.peft.rank == 4
    assert schema.load(["--config=y.py", "--config.peft.name="]).config.peft.to_dict() == {"name": ""}
    quant = load("--config.quant.name=int", "--config.quant.bits=4", "--config.quant.skip=a,b").config.quant
    assert (quant.bits, quant.group, quant.kind, quant.skip) == (4, None, "nf4", ("a", "b"))


def test_locked(root):
    with pytest.raises(AttributeError):
        load().config.stepz = 1


def test_flags(root):
    loaded = load("--plan", "--n", "3", "--workdir", "w", plan=False, n=1, name="", rest=None)
    assert loaded.flags == {"plan": True, "n": 3, "name": "", "rest": None} and loaded.workdir == "w"
    assert load("--plan=false", "--rest=a", plan=True, rest=None).flags == {"plan": False, "rest": "a"}
    assert lines("--pla", "--n=x", "y", "--config.steps") == [
        "--pla · unknown option",
        "--n = x · unknown option",
        "y · unexpected argument · options are written --name=value",
        "--config.steps · needs a value · write --config.steps=VALUE",
    ]
    with pytest.raises(ConfigError) as e:
        load("--pla", "--n=x", plan=False, n=1)
    assert list(map(str, e.value.problems)) == [
        "--pla · unknown option · did you mean --plan?",
        "--n = x · must be an integer",
    ]


def test_config_is_required():
    with pytest.raises(ConfigError, match=r"--config · missing · write --config=configs/X.py"):
        schema.load([])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        # keys
        ("optim.lrr=1", "config.optim.lrr = 1 · unknown key · did you mean config.optim.lr?"),
        ("lr=1", "config.lr = 1 · unknown key · did you mean config.optim.lr?"),
        ("xyzzy=1", "config.xyzzy = 1 · unknown key · see --help"),
        ("mesh=2", "config.mesh = 2 · is a group, not a key · its keys: mesh.context, mesh.data, "
         "mesh.fsdp, mesh.tensor"),
        # types
        ("steps=many", "config.steps = many · must be an integer"),
        ("steps=1.5", "config.steps = 1.5 · must be an integer"),
        ("steps=true", "config.steps = true · must be an integer"),
        ("steps=inf", "config.steps = inf · must be an integer"),
        ("steps=none", "config.steps = none · must be an integer"),
        ("optim.lr=high", "config.optim.lr = high · must be a number"),
        ("data.shuffle=maybe", "config.data.shuffle = maybe · must be true or false"),
        ("model.layers=x", "config.model.layers = x · must be an integer or none"),
        ("samples=1", "config.samples = (1,) · must hold strings · quote each one"),
        # ranges and choices
        ("steps=0", "config.steps = 0 · must be in [1, inf)"),
        ("optim.lr=nan", "config.optim.lr = nan · must be in [0, inf)"),
        ("data.holdout=1", "config.data.holdout = 1.0 · must be in [0, 1)"),
        ("optim.b1=-0.1", "config.optim.b1 = -0.1 · must be in [0, 1)"),
        ("model.layers=0", "config.model.layers = 0 · must be in [1, inf)"),
        ("mesh.data=0", "config.mesh.data = 0 · must be at least 1, or -1 · -1 means all remaining devices"),
        ("optim.name=adamv", "config.optim.name = adamv · unknown choice · did you mean adamw?"),
        ("tracker=x", 'config.tracker = x · unknown choice · one of "", tensorboard, wandb'),
        ("allow=data,confg", "config.allow = ('data', 'confg') · unknown choice · did you mean config?"),
        ("optim.learning_rate=1", "config.optim.learning_rate = 1 · unknown key · did you mean config.optim.lr?"),
        ("seed=" + "x" * 5000, f"config.seed = {'x' * 500} ... {'x' * 500} · must be an integer"),
        ("trainable=(", "config.trainable = ( · is not a regular expression: "
         "missing ), unterminated subpattern at position 0"),
        ("optim.lr_scale=a,2", "config.optim.lr_scale = ('a', 2) · must be pairs of a regular expression and a "
         'factor · like (("embed/.*", 0.1),)'),
        ("optim.lr_scale=((')',1),)", "config.optim.lr_scale = ((')', 1),) · is not a regular expression: "
         "unbalanced parenthesis at position 0"),
        ("data.fields=prompt", "config.data.fields = prompt · must be NEW=OLD pairs separated by commas · "
         'like "prompt=question,completion=answer"'),
        # between keys
        ("accum=3", "config.data.batch_size = 8 · is not a multiple of accum 3 · "
         "micro-batches must be of equal size"),
        ("mesh.fsdp=3", "config.data.batch_size = 8 · 8 is not divisible by 3 devices x 1 "
         "micro-batches · use a multiple of 3, or fewer devices on config.mesh.data and config.mesh.fsdp"),
        ("mesh.fsdp=-1", "config.mesh.fsdp = -1 · only one axis may be -1, and data already is · set a number"),
        ("mesh.tensor=3", "config.mesh.tensor = 3 · does not divide heads 4 · heads cannot be split between devices"),
        ("model.shape=", 'config.model.shape = "" · the config names no model · '
         "set config.model.shape, or config.init for pretrained weights"),
        ("model.embed=65", "config.model.embed = 65 · embed 65 is not a multiple of heads 4 · "
         "the head size is embed / heads"),
        ("model.embed=12", "config.model.embed = 12 · the head size 12 / 4 is odd · "
         "rotary embeddings need an even size"),
        ("model.kv_heads=3", "config.model.kv_heads = 3 · heads 4 is not a multiple of kv_heads 3 · "
         "kv heads must share the heads equally"),
        ("optim.warmup=1000", "config.optim.warmup = 1000.0 · exceeds the 1000 steps of the run · "
         "a value below 1 is a fraction of the steps"),
        ("trainable=adapters", "config.trainable = adapters · there are no adapters · "
         "set config.peft.name, or config.trainable=all"),
        ("data.format=preference", "config.data.format = preference · makes batches of kind 'pair', but objective "
         "sft reads 'lm' · one of auto, text, messages, prompt_completion, alpaca, sharegpt, tagged, labelled, rated"),
        ("data.format=rated", "config.data.packing = best_fit · pairs, matches, groups and scored rows cannot be "
         "packed · set config.data.packing=none"),
        ("evals=arit", "config.evals = ('arit',) · no task 'arit' · did you mean arith?"),
        ("evals=xyzzy", "config.evals = ('xyzzy',) · no task 'xyzzy' · evals/tasks has arith"),
        # methods
        ("objective.name=dpoo", "config.objective.name = dpoo · no file train/objectives/dpoo.py with make() · "
         "did you mean dpo?"),
        ("objective.name=", 'config.objective.name = "" · no file train/objectives/.py with make() · '
         "train/objectives has dpo, sft"),
        ("peft.name=helper", "config.peft.name = helper · no file model/peft/helper.py with make() · "
         "model/peft has lora"),
        ("objective.beta=1", "config.objective.beta = 1 · not an argument of the chosen objective · it takes none"),
        ("peft.rank=1", "config.peft.rank = 1 · not an argument of the chosen peft · it takes none"),
        ("data.view.rate=0.1", "config.data.view.rate = 0.1 · not an argument of the chosen data.view · it takes none"),
        ("data.view.name=nexxt", "config.data.view.name = nexxt · no file data/views/nexxt.py with make() · "
         "did you mean next?"),
        ("quant.name=int", "config.quant.bits · missing; the chosen quant needs it · set config.quant.bits"),
    ],
)  # fmt: skip
def test_problem(root, argv, line):
    assert lines(f"--config.{argv}") == [line]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("peft.name=lora peft.rnk=1", "config.peft.rnk = 1 · not an argument of the chosen peft · did you mean rank?"),
        ("peft.name=lora peft.z=1", "config.peft.z = 1 · not an argument of the chosen peft · "
         "it takes rank, alpha, where, rslora"),
        ("peft.name=lora peft.rank=x", "config.peft.rank = x · must be an integer"),
        ("peft.name=lora peft.rank=0", "config.peft.rank = 0 · must be in [1, inf)"),
        ("peft.name=lora peft.where=[", "config.peft.where = [ · is not a regular expression: "
         "unterminated character set at position 0"),
        ("data.view.name=mlm data.view.rte=1",
         "config.data.view.rte = 1 · not an argument of the chosen data.view · did you mean rate?"),
        ("data.view.name=mlm data.view.rate=x", "config.data.view.rate = x · must be a number"),
        ("quant.name=int quant.bits=5", "config.quant.bits = 5 · unknown choice · one of 4, 8"),
        ("quant.name=int quant.bits=4 quant.kind=nf5",
         "config.quant.kind = nf5 · unknown choice · one of nf4, fp4"),
        ("objective.name=dpo data.packing=none data.format=text",
         "config.data.format = text · makes batches of kind 'lm', but objective dpo reads 'pair' · "
         "one of auto, preference"),
        ("objective.name=dpo", "config.data.packing = best_fit · pairs, matches, groups and scored rows cannot be "
         "packed · set config.data.packing=none"),
        ("model.shape= init=a model.layers=3",
         "config.model.layers = 3 · overrides a model shape, but none is named · set config.model.shape"),
        ("optim.schedule=wsd optim.warmup=0.5 optim.decay=0.6",
         "config.optim.decay = 0.6 · plus a warm-up of 0.5 exceeds 1 · both are fractions of the steps"),
    ],
)  # fmt: skip
def test_problem_of_several(root, argv, line):
    assert lines(*(f"--config.{a}" for a in argv.split(" "))) == [line]


def test_arguments_of_an_unknown_method_are_not_judged(root):
    assert len(lines("--config.peft.name=lorra", "--config.peft.anything=1")) == 1


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("c.stepz = 1", "config.stepz = 1 · unknown key · did you mean config.steps?"),
        ("c.steps = True", "config.steps = True · must be an integer"),
        ("c.model.layers = None; c.data.source = None", "config.data.source = None · must be a string"),
        ("c.objective.name = 'dpo'; c.objective.beta = 'x'; c.data.packing = 'none'",
         "config.objective.beta = x · must be a number"),
        ("del c.optim.lr", "config.optim.lr · missing · start from base.get_config()"),
        ("del c.mesh; c.mesh = 3", "config.mesh = 3 · is a group, not a key · its keys: "
         "mesh.context, mesh.data, mesh.fsdp, mesh.tensor"),
    ],
)  # fmt: skip
def test_problem_in_file(root, code, line):
    (root / "x.py").write_text(FILES["x.py"].replace("return", f"{code}; return"))
    assert lines() == [line]


def test_all_at_once(root):
    got = lines("--config.optim.lrr=1", "--config.steps=0", "--config.accum=3", "--config.evals=xyzzy", "--what")
    assert [line.partition(" ")[0] for line in got] == [
        "--what", "config.optim.lrr", "config.steps", "config.data.batch_size", "config.evals",
    ]  # fmt: skip


def test_table(root, monkeypatch):
    with pytest.raises(ConfigError) as e:
        load("--config.optim.lrr=1", "--config.steps=0")
    assert str(e.value).splitlines()[0] == "x.py · 2 problems · see --help for every key"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    table = str(e.value)
    assert "did you mean config.optim.lr?" in table and "must be in [1, inf)" in table


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "x = 1\nimport nothing_of_that_name\n",
            "y.py:2 · ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        ("def get_config(:\n", "y.py:1 · SyntaxError: invalid syntax (y.py, line 1)"),
        ("def get_config():\n    return 1 / 0\n", "y.py:2 · ZeroDivisionError: division by zero"),
        ("def get_config():\n    return {}\n", "y.py · get_config returned a dict, not a ConfigDict"),
        ("x = 1\n", "y.py · the file does not define get_config"),
    ],
)
def test_broken_file(root, text, line):
    (root / "y.py").write_text(text)
    with pytest.raises(UserError) as e:
        schema.load(["--config=y.py"])
    assert str(e.value) == line


def test_type_error_in_file_names_its_line(root):
    (root / "y.py").write_text(FILES["x.py"].replace('"tiny"', '"tiny"\n    c.steps = "many"'))
    with pytest.raises(UserError, match=r"^y.py:6 · TypeError: Could not override field 'steps'"):
        schema.load(["--config=y.py"])


def test_missing_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as e:
        schema.load(["--config=configs/sft/tinny.py"])
    assert str(e.value) == "configs/sft/tinny.py · no such config file · did you mean configs/sft/tiny.py?"


def test_parse_arg():
    arg = overrides.parse_arg("rank=1e1,full,name=a", rank=4, full=False, name="", lr=0.1, size=None)
    assert vars(arg) == {"rank": 10, "full": True, "name": "a", "lr": 0.1, "size": None}
    for text, line in {
        "rnk=1": "config file argument 'rnk=1' · unknown argument 'rnk' · did you mean rank?",
        "rank": "config file argument 'rank' · rank needs a value · write rank=VALUE",
        "rank=x": "config file argument 'rank=x' · rank must be an integer",
    }.items():
        with pytest.raises(UserError) as e:
            overrides.parse_arg(text, rank=4)
        assert str(e.value) == line


def test_arg_reaches_the_file(root):
    text = FILES["x.py"].replace('"tiny"', '"tiny"\n    c.seed = int(arg or 0)')
    (root / "x.py").write_text(text)
    assert schema.load(["--config=x.py:5"]).config.seed == 5
    (root / "x.py").write_text(text.replace('arg=""', "").replace("arg or", ""))
    with pytest.raises(UserError, match="get_config takes no argument, but was given '5'"):
        schema.load(["--config=x.py:5"])


def test_round_trip(root):
    config = load("--config.optim.lr_scale=((a,1),(b,2))", "--config.peft.name=lora").config
    data = json.loads(json.dumps(schema.to_dict(config)))
    assert list(data) == sorted(data) and data["optim"]["lr_scale"] == [["a", 1], ["b", 2]]
    again = schema.from_dict(data)
    assert schema.diff(config, again) == [] and schema.digest(config) == schema.digest(again)
    assert again.optim.lr_scale == (("a", 1), ("b", 2))
    assert schema.resolve(again)[0].to_dict() == config.to_dict()


def test_diff_and_digest(root):
    a, b = load().config, load("--config.optim.lr=1", "--config.peft.name=lora", "--config.peft.rank=4").config
    assert schema.diff(a, b) == [
        ("optim.lr", 3e-4, 1.0), ("peft.alpha", None, 32.0), ("peft.name", "", "lora"), ("peft.rank", None, 4),
        ("peft.rslora", None, False), ("peft.where", None, ".*"),
    ]  # fmt: skip
    assert schema.digest(a) != schema.digest(b) and len(schema.digest(a)) == 16


def test_resolve_does_not_touch_its_input(root):
    config = schema.read("x.py")
    resolved, values = schema.resolve(config, {"optim.lr": 0.5, "steps": "2e2"})  # a sweep gives values, or text
    assert (resolved.optim.lr, resolved.steps, resolved.eval_every) == (0.5, 200, 20)
    assert config.optim.lr == 3e-4 and not config.is_locked and values == {"optim.lr": 0.5, "steps": 200}


def test_a_method_in_a_group_brings_its_arguments(root):
    loaded = load("--config.data.view.name=mlm", "--config.data.view.rate=1")
    assert loaded.config.data.view.to_dict() == {"name": "mlm", "rate": 1.0}
    again = schema.resolve(schema.from_dict(schema.to_dict(loaded.config)), {"data.view.name": "next"})[0]
    assert again.data.view.to_dict() == {"name": "next"} and load().config.data.view.name == "next"


def test_a_config_of_an_earlier_version_gets_the_keys_that_came_since(root):
    old = schema.to_dict(load().config)
    del old["data"]["view"], old["optim"]["clip"]
    (root / "run").mkdir()
    (root / "run/config.json").write_text(json.dumps(old))
    assert schema.resolve(schema.read("run"))[0].to_dict() == load().config.to_dict()


def test_every_key_has_a_comment():
    assert list(describe.docs()) and set(describe.docs()) == set(schema.base_keys())
    assert [path for path, text in describe.docs().items() if not text] == []
    assert len(schema.base_keys()) <= 80


def test_the_table_names_existing_keys():
    from configs.schema import rules

    unknown = {path for path in rules.ALLOWED if path not in schema.base_keys()}
    found = ((kind, name) for kind, folder in methods.FOLDERS.items() for name in methods.names(folder, "make"))
    assert unknown <= {f"{kind}.{a}" for kind, name in found for a in methods.method(kind, name).arguments}


def test_base_is_right_but_for_its_model():
    with pytest.raises(ConfigError) as e:
        schema.resolve(base.get_config())
    assert [p.key for p in e.value.problems] == ["config.model.shape"]


def test_help(root, capsys):
    with pytest.raises(SystemExit) as e:
        load("--help", "--config.nonsense=1")
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith("python -m train.main --config=")
    assert "  steps=1000                          optimizer steps\n" in out
    assert "  peft.name=lora  rank=16 alpha=32.0 where=.* rslora=False\n" in out
    assert "  quant.name=int  group=None bits=REQUIRED kind=nf4 skip=()" in out


def experiments():
    return [str(path.relative_to(ROOT)) for path in tool.experiments()]


@pytest.mark.parametrize("path", experiments())
def test_experiment(path, monkeypatch):
    """Every file under configs/ is valid, says its command, and starts as a story should."""
    monkeypatch.chdir(ROOT)
    schema.resolve(schema.read(path))
    text = Path(path).read_text()
    assert text.startswith('"""') and f"--config={path}" in text and "Expected: " in text and "Hardware: " in text
    assert len(text.splitlines()) <= 50


def run(*argv):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_load_is_light():
    code = (
        "import sys, time; from configs import schema; schema.load(['--config=configs/sft/tiny.py'])\n"
        "assert time.process_time() < 1\n"
        "sys.exit(bool({'jax', 'flax', 'datasets', 'rich'} & set(sys.modules)))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_cli_show():
    done = run("-m", "tools.config", "show", "--config=configs/sft/smollm2_lora.py:rank=4", "--config.steps=7")
    assert done.returncode == 0, done.stderr
    assert "* steps=7                             optimizer steps" in done.stdout.splitlines()
    assert "* peft.rank=4" in done.stdout.splitlines() and "  accum=1 " in done.stdout


def test_cli_diff(root, capsys):
    run_folder = root / "runs" / "a"
    run_folder.mkdir(parents=True)
    (run_folder / "config.json").write_text(json.dumps(schema.to_dict(load("--config.steps=5").config)))
    assert tool.main(["diff", "x.py", str(run_folder)]) == 0
    assert capsys.readouterr().out == "eval_every: 100 -> 0\nsteps: 1000 -> 5\n"


def test_cli_check(root, capsys):
    (root / "bad.py").write_text(FILES["x.py"].replace("return", "c.steps = 0; return"))
    assert tool.main(["check", "x.py", "bad.py"]) == 2
    out = capsys.readouterr()
    assert out.out == "x.py · ok\n"
    assert out.err.splitlines() == [
        "bad.py · 1 problem · see --help for every key",
        "config.steps = 0 · must be in [1, inf)",
    ]


def test_cli_usage(capsys):
    assert tool.main([]) == 0 and "tools.config show" in capsys.readouterr().out
    assert tool.main(["sho"]) == 2
    assert capsys.readouterr().err == "tools.config · unknown verb 'sho' · one of show, diff, check\n"
    assert tool.main(["diff", "a"]) == 2
    assert capsys.readouterr().err == "tools.config diff · diff takes two config files or run folders · diff A B\n"


@pytest.mark.parametrize(
    "strange",
    [
        [], 7, None, "text", {"optim": 3}, {"optim": []}, {"steps": "many"}, {"steps": -1}, {"steps": [1]}, {"no": 1},
        {"optim": {"lr": float("nan")}}, {"optim": {"lr": float("inf")}}, {"optim": {"lr": {"a": 1}}}, {"a.b": 1},
        {"model": {"dtype": "float1"}}, {"peft": {"name": "../x"}}, {"peft": {"name": 3}}, {"peft": {"name": None}},
        {"data": {"view": {"name": ["next"]}}}, {"__class__": 1}, {"seed": 1 << 70},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_folder_s_config_is_checked(strange):
    whole = schema.to_dict(base.get_config())
    if isinstance(strange, dict):
        strange = whole | {k: whole.get(k, {}) | v if isinstance(v, dict) else v for k, v in strange.items()}
    with pytest.raises(UserError, match="here"):
        schema.recorded(strange, "here")
    assert schema.to_dict(schema.recorded(whole, "here")) == whole


def test_steps_of_a_command_line_count_more_than_epochs_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(schema.methods, "ROOT", Path(__file__).resolve().parents[1])
    (tmp_path / "x.py").write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.model.shape = 'tiny'\n"
        "    c.epochs = 3.0\n    return c\n"
    )
    load = lambda *more: schema.load([f"--config={tmp_path / 'x.py'}", *more]).config
    assert load().epochs == 3 and load("--config.steps=20").epochs == 0
    assert load("--config.steps=20", "--config.epochs=2").epochs == 2
