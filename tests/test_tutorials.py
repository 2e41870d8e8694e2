"""Every tutorial runs from top to bottom in a fresh kernel, and what it concludes is true."""

import json
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from bopito_inverse.systems import Prinz, TransferOperator

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
NOTEBOOKS = sorted(path.name for path in TUTORIALS.glob("*.ipynb"))
CORRECTED, FIGURES, MOLECULE, OWN = (
    "01_correct_biased_kinetics.ipynb",
    "03_reproduce_the_figures.ipynb",
    "04_alanine_dipeptide.ipynb",
    "05_your_own_molecule.ipynb",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of the kernel's machinery, which is not ours
]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run side by side; threads of several kernels would wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@cache
def executed(name: str) -> NotebookNode:
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,  # of a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(TUTORIALS)}},
    )
    return client.execute()  # raises CellExecutionError with the traceback of the cell


def printed(notebook: NotebookNode) -> list[str]:
    """What each code cell printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in cells
    ]


def test_there_are_tutorials() -> None:
    assert {CORRECTED, FIGURES, MOLECULE, OWN} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", sorted({*NOTEBOOKS} - {CORRECTED, FIGURES, MOLECULE, OWN}))
def test_runs(name: str) -> None:
    """The others are executed by the tests of what they conclude."""
    executed(name)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_stored_with_outputs_and_without_places(name: str) -> None:
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in codes)
    text = "\n".join(printed(notebook))
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/|Traceback|Warning", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_somewhere(name: str) -> None:
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (TUTORIALS / link).exists()] == []


def test_what_is_seen_in_small_is_what_was_found() -> None:
    """Starts all over equilibrium, the prior, and the weights are worth what tutorial 3 says."""
    text = "\n".join(printed(executed(FIGURES)))

    def number(pattern: str) -> float:
        found = re.search(pattern + r"\s+(\d\.\d+)", text, re.MULTILINE)
        assert found is not None, pattern
        return float(found[1])

    exact, generator, structure = map(number, (r"^exact", r"^generator", r"^one structure"))
    assert abs(generator - exact) < 0.1 < 0.25 < abs(structure - exact)
    assert number(r"^BoPITO") < 0.5 * number(r"^ITO")
    kept = re.search(r"the weights keep (\d+)%", text)
    assert kept is not None
    assert int(kept[1]) > 85


def test_corrected_kinetics() -> None:
    """The exact timescale is in the HDI; the data, the side of x = 0 and mu agree with it."""
    said = json.loads(printed(executed(CORRECTED))[-1])
    exact = TransferOperator(Prinz()).timescales[0]
    low, high = said["timescale_hdi_94"]
    assert low < exact < high
    assert said["exact_timescale"] == pytest.approx(exact, abs=0.05)
    assert said["timescale"] == pytest.approx(exact, rel=0.1)
    assert said["status"] == "ok"
    assert said["total_variation"] < 0.05
    assert said["held_out_error_corrected"] < 0.05 < 0.5 < said["held_out_error_uncorrected"]


def test_a_molecule_is_corrected() -> None:
    """Nobody crosses in the data; the fitted step crosses as MD does, and frames are molecules."""
    said = json.loads(printed(executed(MOLECULE))[-1].splitlines()[-1])
    low, high = said["timescale_hdi_94"]
    assert low < said["md_timescale"] + 2 * said["md_error"]
    assert said["md_timescale"] - 2 * said["md_error"] < high
    assert said["status"] in ("ok", "mc_limited", "bound")  # few replicas
    assert 300 < said["timescale_median"] < 20_000
    still = said["still_on_the_right"]
    assert still["one step"] < 0.85 < still["one relaxation"]
    weighted, generated = said["median_energy"]
    assert generated == pytest.approx(weighted, abs=15)  # kJ/mol


def test_a_molecule_of_ones_own() -> None:
    """Each step of tutorial 5 says what it is worth: weights that are, a model that is not."""
    said = json.loads(printed(executed(OWN))[-1])
    assert said["reweighting"] == "ok"
    assert 0.03 < said["smallest_overlap"] < 0.5
    assert said["ess"] > 50
    # a side of psi1 that short trajectories from one structure hardly see
    assert said["extended"]["short"] < 0.15 < said["extended"]["mbar"] < 0.7
    assert said["mean_profile_error_kT"] < 0.6
    low, high = said["weight_hdi_94"]
    assert 0 < low < high < 1
    assert said["fit"] == ("mc_limited" if said["monte_carlo_share"] > 0.5 else "ok")
    energy = said["median_energy"]
    assert energy["generated"] > energy["equilibrium"] + 300  # as the text says
    assert energy["mended"] == pytest.approx(energy["equilibrium"], abs=60)
    assert said["frames_read"] == said["frames_written"] == 8 * 11
    assert 0 < said["rounding_nm"] < 0.00051
    assert set(said["checked"]) >= {"system", "experiment", "step", "simulate", "sample"}
