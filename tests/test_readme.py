"""The README's commands run as they stand there; the `test` preset stands in for the minutes that the real ones take."""
import os
import re
import shlex
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def commands():
    """Every `python ...` line of the README's shell blocks."""
    with open(os.path.join(ROOT, "README.md")) as f:
        blocks = re.findall(r"```sh\n(.*?)```", f.read(), re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("python ")]


def test_readme_commands_run(tmp_path):
    found = commands()
    assert "python run.py" in found and any(c.startswith("python ppo.py") for c in found)
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    for command in found:
        words = shlex.split(command)
        words[0] = sys.executable
        if {"--posts", "--text", "--comparisons", "summarize"} & set(words):
            continue  # needs the reader's own files; tests/test_pipeline.py, test_real.py and test_summarize.py make some
        if words[1] == "download.py":
            continue  # needs a network; tests/test_download.py has a server
        if words[1] == "run.py" and ("--preset" in words or words[2:3] in (["figures"], ["ablations"])):
            continue  # minutes to hours; their own tests run them small
        if words[1] == "run.py" and "--preset" not in words:
            words += ["--preset", "test", "--device", "cpu"]
            if "--out" not in words:
                seed = words[words.index("--seed") + 1] if "--seed" in words else "1"
                words += ["--out", f"out/tiny-seed{seed}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_readme_names_files_that_exist():
    with open(os.path.join(ROOT, "README.md")) as f:
        text = f.read()
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md))`", text):
        assert os.path.exists(os.path.join(ROOT, name)) or name.startswith(("out/", "report")), name
