"""Make every file of this folder from run.toml: `python data/prinz/make.py` (some minutes).

    biased.npz                biased trajectories                        (simulate)
    umbrella.npz              umbrella windows                           (simulate)
    equilibrium.npz           weighted equilibrium frames                (reweight)
    equilibrium.safetensors   s_eq                                       (train)
    bopito.safetensors        BoPITO                                     (train)
    experiment.csv            autocorrelation of x with Gaussian noise   (exact transfer operator)
    SHA256SUMS                what `sha256sum --check` reads

The same seed gives the same files on the same kind of device.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from bopito_inverse import stages
from bopito_inverse.config import Config
from bopito_inverse.observables import Experiment
from bopito_inverse.stages.folder import sha256
from bopito_inverse.systems import TransferOperator

HERE = Path(__file__).resolve().parent
LAGS = np.arange(100, 1001, 100)
SIGMA = 0.02
SEED = 2026
PRODUCTS = {
    "simulate/biased.npz": "biased.npz",
    "simulate/umbrella.npz": "umbrella.npz",
    "reweight/frames.npz": "equilibrium.npz",
    "train/equilibrium.safetensors": "equilibrium.safetensors",
    "train/bopito.safetensors": "bopito.safetensors",
}


def measure(config: Config) -> Experiment:
    """The exact variance-normalised autocorrelation of x, with noise of known size."""
    exact = TransferOperator(config.system.build())
    values = exact.correlation(lambda x: x, None, LAGS, "variance")
    noise = np.random.default_rng(SEED).normal(0.0, SIGMA, len(LAGS))
    return Experiment(LAGS, values + noise, np.full(len(LAGS), SIGMA), observable="x")


def main() -> None:
    """Run the verbs in a temporary folder and copy what they make."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config.read(HERE / "run.toml", output=folder)
        for verb in (stages.simulate, stages.reweight, stages.train):
            verb(config, print, progress=True)
        for source, name in PRODUCTS.items():
            shutil.copyfile(Path(folder) / source, HERE / name)
    measure(config).write(HERE / "experiment.csv")
    names = sorted([*PRODUCTS.values(), "experiment.csv"])
    sums = "".join(f"{sha256(HERE / name)}  {name}\n" for name in names)
    (HERE / "SHA256SUMS").write_text(sums)
    print(sums, end="")
    print(f"{sum((HERE / name).stat().st_size for name in names) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
