#!/usr/bin/env bash
# Installs the libraries that `metafast bench --suite peers` compares with, and metafast itself, into an environment.
#
#     benchmarks/install_peers.sh [VENV_OR_PYTHON]
#
# VENV_OR_PYTHON: a folder, made a virtual environment if it is none (default: .venv-peers in the repository), or a
# Python to install into. May be run again: what is there is left. PYTHON (default: python3) makes the environment.
#
# higher, TorchOpt and JAX install as they are. learn2learn 0.2.0 does not: the C files of its data sets are
# of a Cython that knew no Python after 3.10, and importing it wants old versions of torchvision and gym. What it is
# timed for, its algorithms, is plain Python: they are installed from its sdist without the data sets, gym, text and
# vision, the rest as it is. easyfsl 1.5.0 imports torchvision, whose wheels on PyPI are for another build of torch than
# a CPU one, for the networks of three of its methods: it is installed without these three and without dependencies.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${1:-$root/.venv-peers}

if [[ -f $target && -x $target ]]; then
  python=$target
else
  python=$target/bin/python
  [[ -x $python ]] || "${PYTHON:-python3}" -m venv "$target"
fi
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
has() { "$python" -c "import importlib.metadata as m; raise SystemExit(m.version('$1') != '$2')" 2>/dev/null; }

pip install -c "$root/constraints.txt" setuptools wheel ninja torch numpy
pip install -c "$root/constraints.txt" typer rich matplotlib pytest pytest-benchmark
pip install -c "$root/constraints.txt" higher==0.2.1 torchopt==0.7.3 jax

if ! has learn2learn 0.2.0; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  pip download --no-binary :all: --no-deps --no-build-isolation --dest "$work" learn2learn==0.2.0
  tar -xzf "$work/learn2learn-0.2.0.tar.gz" -C "$work"
  source=$work/learn2learn-0.2.0
  rm -rf "$source"/learn2learn/{data,gym,text,vision} "$source/.eggs"
  sed -i -E '/^from \. import (data|gym|text|vision)$/d' "$source/learn2learn/__init__.py"
  sed -i -E 's/^( *)ext_modules=extensions,/\1ext_modules=[],/; /setup_requires=/d' "$source/setup.py"
  pip install --no-deps --no-build-isolation "$source"
fi

if ! has easyfsl 1.5.0; then
  pip install --no-deps easyfsl==1.5.0
  methods=$("$python" -I -c "import sysconfig; print(sysconfig.get_path('purelib'))")/easyfsl/methods
  sed -i -E '/^from \.(feat|matching_networks|relation_networks) import/d' "$methods/__init__.py"
fi

# Built against this environment's torch; editable, so that the benchmark runs the working tree. So it must be the same
# Python as .venv's, or that one's extension is replaced by another's.
pip install --no-build-isolation --no-deps -e "$root"

# -I: what is installed, not what lies in this folder.
"$python" -I - <<'PYTHON'
import importlib
from importlib.metadata import version

for name in ("metafast", "learn2learn", "easyfsl", "higher", "torchopt", "jax"):
    importlib.import_module("easyfsl.methods" if name == "easyfsl" else name)
    print(f"{name} {version(name)}")
PYTHON
