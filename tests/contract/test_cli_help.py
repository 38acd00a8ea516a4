"""What `simclr --help` says, and that every verb of the design is there."""

import re
import subprocess
import sys
import time

import pytest

import cli
from tests.command_line import ROOT, process

OPTIONS = {
    "demo": "--images --out --minutes --no-app --port",
    "pretrain": "--images --run --arch --width --image-size --batch-size --epochs --seed --resume",
    "evaluate": "--encoder --protocol --images --test --head --save --json",
    "fit-head": "--encoder --images --gallery --where --out --balanced --abstain --accuracy --json --confusion",
    "import-weights": "--weights --run --pixels --image-size",
    "distill": "--teacher --head --images --run --arch --width --temperature --resume",
    "export": "--run --module --weights --preprocess --repository --name --head --target --tensorrt --dali --precision "
    "--images --accept-loss --rollback --server",
    "triton": "--repository --host --http-port --grpc-port --metrics-port",
    "embed": "--encoder --images --out --engine --ray-address --workers",
    "gallery add": "GALLERY --images --encoder --quarantine",
    "gallery import": "GALLERY --vectors --items --encoder --name --new-ids",
    "gallery export": "GALLERY --out --where",
    "gallery reembed": "GALLERY --encoder --drop-unreadable",
    "gallery remove": "GALLERY --ids-from --where --json",
    "gallery duplicates": "GALLERY --threshold --where --exact --json --sheet --to-remove",
    "gallery relabel": "GALLERY --ids --where --label --identity --camera --time --extra --forget --json",
    "gallery copy": "GALLERY --json",
    "gallery info": "GALLERY",
    "gallery rebuild": "GALLERY",
    "gallery tune": "GALLERY --recall --latency-ms --memory-mb",
    "gallery verify": "GALLERY --repair --json",
    "search": "--gallery --image --like -k --where --threshold --offset --json --encoder",
    "reid evaluate": "--encoder --images --query --gallery --protocol --flip --rerank --transductive --vectors --seed --strict "
    "--per-query --json",
    "reid enrol": "GALLERY --images --image --identity --camera --time --encoder",
    "reid identify": "GALLERY --image --threshold-file --where -k --encoder --json",
    "reid calibrate": "GALLERY --probes --fpir --out --tracks --where --plot --encoder",
    "reid review": "GALLERY --limit --json",
    "reid rename": "GALLERY",
    "reid merge": "GALLERY --into",
    "reid split": "GALLERY --ids --where --into",
    "reid forget": "GALLERY",
    "reid track": "--threshold-file --encoder --gallery --evidence --memory-s --out",
    "api": "--encoder --head --gallery --threshold-file --keys --open --host --port --url-hosts --rate --burst --at-once "
    "--waiting --batches --max-bytes",
    "key": "NAME --scope --keys",
    "app": "--gallery --encoder --head --threshold-file --port",
    "bench serve": "URL --images --send --clients --rate --batch --seconds --warmup-s --timeout-s --metrics-url --out --json",
}
"""DESIGN.md, section 4: names that other programs rely on."""


def test_every_verb_of_the_design_is_there():
    assert set(cli.VERBS) == set(OPTIONS)


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_names_the_options(simclr, verb):
    code, out, err = simclr(*verb.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: simclr {verb}")
    for option in OPTIONS[verb].split():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", out), f"{verb} has no {option}"
    assert cli.VERBS[verb].__doc__.split(".")[0] in " ".join(out.split())


@pytest.mark.parametrize("group", ["", "gallery", "reid"])
def test_help_of_a_group_names_its_verbs(simclr, group):
    code, out, err = simclr(*group.split(), "--help")
    assert (code, err) == (0, "")
    for verb in OPTIONS:
        if verb.startswith(group):
            assert verb.removeprefix(group).strip() in out


def test_help_answers_at_once_because_it_imports_nothing_heavy():
    before = "import atexit; atexit.register(lambda: print('LOADED', *sys.modules))"
    started = time.monotonic()
    done = process("pretrain", "--help", before=before)
    assert time.monotonic() - started < 10
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(done.stdout.split("LOADED ")[1].split())
    assert not loaded & {"torch", "onnxruntime", "faiss", "gradio", "pyarrow", "onnx", "tritonclient"}


def test_the_script_itself_runs():
    done = subprocess.run(
        [sys.executable, "cli.py", "search", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--where" in done.stdout
