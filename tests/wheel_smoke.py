"""What `make wheel-test` runs by the installed wheel's Python: what is in the packages, and that it trains."""

import sys
import tarfile
import zipfile
from pathlib import Path

import torch

import metafast as mf
from metafast import _native

dist = Path(sys.argv[1])
(wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
files = zipfile.ZipFile(wheel).namelist()
(extension,) = [name for name in files if name.endswith(".so")]
strange = [name for name in files if name.split("/")[0] not in ("metafast", f"metafast-{mf.__version__}.dist-info")]
assert not strange, strange
assert {"metafast/py.typed", "metafast/_build_info.json", "metafast/cli/train.py"} <= set(files)
root = f"metafast-{mf.__version__}/"
with tarfile.open(source) as archive:
    sources = {name.removeprefix(root) for name in archive.getnames()}
assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/cpu/unroll.h", "csrc/simt/emulator.cpp"} <= sources
assert {name for name in files if name.endswith(".py")} <= sources

status = _native.status()
assert Path(mf.__file__).is_relative_to(sys.prefix), mf.__file__
assert status.available and status.backends == ("cpu",), status

torch.manual_seed(0)
maml = mf.MAML(mf.models.MLP(1, (20, 20), 1), lr=0.02, steps=2, loss="mse")
meta = torch.optim.Adam(maml.parameters(), lr=5e-3)
waves = mf.data.Sinusoid()
unseen = waves.sample(200, 10, 20, torch.Generator().manual_seed(9))
generator = torch.Generator().manual_seed(0)
with mf.use_backend("cpu"):
    before = maml(unseen).loss.item()
    for _ in range(300):
        meta.zero_grad()
        maml(waves.sample(16, 10, 10, generator)).loss.backward()
        meta.step()
    after = maml(unseen).loss.item()
assert after < 0.5 * before, (before, after)
print(f"{wheel.name}: {len(files)} files, {extension}; mse {before:.2f} -> {after:.2f} in 300 meta-steps")
