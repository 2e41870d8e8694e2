"""The command line: one verb for each stage of a run, and `demo`, `check` and `run`.

User errors (a bad key, file or value) are one line on the standard error and exit code 2. What
needs torch is imported inside the verbs.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

if TYPE_CHECKING:
    from bopito_inverse.config import Config

USER_ERROR, INTERRUPTED = 2, 130
FIGURES = ("fit/correlation*", "fit/posterior", "sample/transition", "sample/ramachandran*")
HELD_OUT = ("x>0", "x^2", "x")


class _Verbs(TyperGroup):
    """Turns errors of the user into one line, and an interrupt into advice."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Invoke the verb."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except (KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, SystemExit) and not _interrupted(error):
                raise
            typer.echo("interrupted; run the same command again to resume", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _interrupted(error: BaseException) -> bool:
    """Whether a `SystemExit` is how Lightning passes an interrupt on."""
    return isinstance(error.__context__, KeyboardInterrupt)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.TOML", help="The run file.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda, instead of the run file's.")]
Output = Annotated[Path | None, typer.Option(help="Folder of results, instead of the run file's.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


@app.callback()
def _about() -> None:
    """Correct the kinetics of a generative MD model with measured correlation functions.

    Each verb reads a run file (TOML) and what the verbs before it wrote, and fills one folder:

    **simulate** -> **reweight** -> **train** -> **fit** -> **sample**

    A verb that was killed goes on when it is called again; one that has finished does nothing; and
    results of another configuration are never overwritten.

    Start with `bopito-inverse demo`, then copy its run file and change it.
    """


@app.command()
def demo(
    device: Device = None, output: Output = Path("results/demo"), quiet: Quiet = False
) -> None:
    """Fit and sample with the shipped model of the Prinz potential (about two minutes).

    The model has never seen a crossing of x = 0. A measured autocorrelation of x brings the slow
    process back; the table compares the result with the exact transfer operator.

    Writes results/demo/fit and results/demo/sample.
    """
    from bopito_inverse.config import Config
    from bopito_inverse.shipped import shipped_data

    config = Config.read(shipped_data() / "demo.toml", device, output)
    _run(config, ("fit", "sample"), quiet)


@app.command()
def check(run_file: RunFile, device: Device = None, output: Output = None) -> None:
    """Read the run file and every input that exists, and say what was found; compute nothing.

    Example: `bopito-inverse check run.toml`
    """
    from bopito_inverse import stages

    config = _read(run_file, device, output)
    table = Table("", box=None, header_style="bold")
    table.add_column("found", overflow="fold")
    table.add_column("where", overflow="fold", style="dim")
    for what, where, found in stages.inspect(config):
        table.add_row(what, escape(found), escape(where))
    Console().print(table)


@app.command()
def simulate(
    run_file: RunFile, device: Device = None, output: Output = None, quiet: Quiet = False
) -> None:
    """Simulate biased trajectories and umbrella windows.

    Reads [system] and [simulate]. Writes simulate/biased.npz (trajectories, which may be short, far
    from equilibrium, and confined by a barrier) and simulate/umbrella.npz or tempering.npz.

    Of a molecule, the folder simulate/biased/ holds the trajectories, in files that mdtraj, VMD and
    PyMOL read. A simulation that was killed goes on from what is complete.

    Example: `bopito-inverse simulate run.toml`
    """
    _run(_read(run_file, device, output), ("simulate",), quiet)


@app.command()
def reweight(
    run_file: RunFile, device: Device = None, output: Output = None, quiet: Quiet = False
) -> None:
    """Weigh umbrella windows, or a ladder of temperatures, to the unbiased equilibrium by MBAR.

    Reads umbrella.npz or tempering.npz, and [reweight]. Writes reweight/frames.npz, which holds
    weighted frames, and reweighting.json (overlap, free energies, effective sample size).

    Example: `bopito-inverse reweight run.toml`
    """
    _run(_read(run_file, device, output), ("reweight",), quiet)


@app.command()
def train(
    run_file: RunFile, device: Device = None, output: Output = None, quiet: Quiet = False
) -> None:
    """Train the equilibrium score on weighted frames, then the dynamic score on trajectories.

    Reads frames.npz, biased.npz (biased/ of a molecule) and [train]. Writes
    train/bopito.safetensors (both scores), equilibrium.safetensors, and the losses.

    Example: `bopito-inverse train run.toml --device cuda`
    """
    _run(_read(run_file, device, output), ("train",), quiet)


@app.command()
def fit(
    run_file: RunFile, device: Device = None, output: Output = None, quiet: Quiet = False
) -> None:
    """Fit N_int to the measured correlation functions, through the composite step.

    Reads bopito.safetensors, frames.npz, the experiment (CSV: observable,lag,value,sigma), [step],
    [observable] and [fit]. Writes fit/posterior.nc (ArviZ), summary.json and figures.

    Example: `bopito-inverse fit run.toml`
    """
    _run(_read(run_file, device, output), ("fit",), quiet)


@app.command()
def sample(
    run_file: RunFile, device: Device = None, output: Output = None, quiet: Quiet = False
) -> None:
    """Sample corrected trajectories and compare them with the truth, where it is known.

    Reads bopito.safetensors, frames.npz, fit/summary.json, [step] and [sample]. Writes
    sample/trajectories.npz, comparison.json and figures. The truth is the exact transfer operator;
    of a molecule, [data] reference, and the first trajectories are written as .xtc, too.

    Example: `bopito-inverse sample run.toml`
    """
    _run(_read(run_file, device, output), ("sample",), quiet)


@app.command()
def run(
    run_file: RunFile, device: Device = None, output: Output = None, quiet: Quiet = False
) -> None:
    """All verbs in order, without what is done and what [data] provides.

    Example: `bopito-inverse run run.toml --output results/second`
    """
    from bopito_inverse import stages

    config = _read(run_file, device, output)
    _run(config, tuple(stages.needed(config)), quiet)


def main() -> None:
    """The console script."""
    app()


def _read(run_file: Path, device: str | None, output: Path | None) -> "Config":
    from bopito_inverse.config import Config

    return Config.read(run_file, device, output)


def _run(config: "Config", verbs: tuple[str, ...], quiet: bool) -> None:
    """Run verbs, and end with a table of results where there are any."""
    from bopito_inverse import stages

    say: Callable[[str], object] = (lambda message: None) if quiet else typer.echo
    clock = time.perf_counter()
    for verb in verbs:
        getattr(stages, verb)(config, say, progress=not quiet)
    if not quiet and verbs[-2:] == ("fit", "sample"):
        _print_results(config, time.perf_counter() - clock)


def _print_results(config: "Config", seconds: float) -> None:
    summary = json.loads((config.output / "fit" / "summary.json").read_text())
    report = json.loads((config.output / "sample" / "comparison.json").read_text())
    console = Console()
    console.print()
    console.print(_posterior_table(summary, *_true_timescale(report)))
    console.print(f"status: {summary['status']}, {summary['message']}", highlight=False)
    console.print()
    table = _molecule_table if config.system.is_molecule else _comparison_table
    console.print(table(report))
    console.print()
    for pattern in FIGURES:
        for figure in sorted(config.output.glob(f"{pattern}.png")):
            typer.echo(f"figure   {figure}")
    typer.echo(f"results  {config.output} ({seconds:.0f} s)")


def _true_timescale(report: dict[str, Any]) -> tuple[str, float | None]:
    """Where the slowest timescale is known from, and what it is."""
    if "exact_timescale" in report:
        return "exact", report["exact_timescale"]
    reference = report.get("reference_timescale")
    return "MD", None if reference is None else reference["value"]


def _posterior_table(summary: dict[str, Any], source: str, true: float | None) -> Table:
    table = Table(title="Posterior", title_justify="left", title_style="bold")
    for name in ("", "mean", "sd", "median", "94 % HDI", *([] if true is None else [source])):
        table.add_column(name, justify="left" if not name else "right")
    labels = {"n_int": "N_int / frames", "weight": "w", "timescale": "timescale / frames"}
    for key, label in labels.items():
        part = summary[key]
        numbers = (part["mean"], part["sd"], part["median"], *part["hdi_94"])
        mean, sd, median, low, high = map(_from_json, numbers)
        truth = []
        if true is not None and key == "timescale":
            truth = [f"{true:.1f}, {'inside' if low <= true <= high else 'outside'}"]
        row = (f"{mean:.4g}", f"{sd:.2g}", f"{median:.4g}", f"{low:.4g} to {high:.4g}")
        table.add_row(label, *row, *truth)
    return table


def _from_json(value: float | None) -> float:
    """A number of a summary, in which None stands for infinity."""
    return math.inf if value is None else value


def _comparison_table(report: dict[str, Any]) -> Table:
    title = "Against the exact transfer operator, on what was not fitted"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "uncorrected", "corrected"):
        table.add_column(name, justify="left" if not name else "right")
    for name in HELD_OUT:
        lags = report["correlations"][name]["compared_lags"]
        if lags:
            error = report["correlations"][name]["mean_abs_error"]
            label = f"mean |error| of C(lag) of {name}, lags {lags[0]} to {lags[-1]}"
            table.add_row(label, f"{error['uncorrected']:.3f}", f"{error['corrected']:.3f}")
    variation = report["total_variation"]
    label = f"total variation (noise floor {variation['noise_floor']:.4f})"
    table.add_row(label, f"{variation['uncorrected']:.4f}", f"{variation['corrected']:.4f}")
    return table


def _molecule_table(report: dict[str, Any]) -> Table:
    against = ", against the reference" if report.get("jensen_shannon") else ""
    title = f"Before and after{against}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "uncorrected", "corrected"):
        table.add_column(name, justify="left" if not name else "right")
    for name, part in report.get("correlations", {}).items():
        if error := part["mean_abs_error"]:
            lags = part["compared_lags"]
            label = f"mean |error| of C(lag) of {name}, lags {lags[0]} to {lags[-1]}"
            table.add_row(label, *_numbers(error, ".3f"))
    for name, part in report.get("jensen_shannon", {}).items():
        if "reference_halves" in part:
            label = f"Jensen-Shannon divergence of {name} (noise floor)"
            floors = [part[f"{model}_noise_floor"] for model in ("uncorrected", "corrected")]
            cells = zip(_numbers(part, ".4f"), floors, strict=True)
            table.add_row(label, *(f"{value} ({floor:.4f})" for value, floor in cells))
    shares = dict(report.get("share_of_positive_phi", {}))
    low, high = shares.pop("interval_degrees", (0, 0))
    for name, part in shares.items():
        known = "reference" if "reference" in part else "equilibrium_frames"
        label = (
            f"share of {low:g} < {name} < {high:g} ({known.replace('_', ' ')} {part[known]:.4f})"
        )
        table.add_row(label, *_numbers(part, ".4f"))
    sources = ("equilibrium_frames", "uncorrected", "corrected")
    energy = {name: report["energy"][name]["median"] for name in sources}
    label = f"median energy / kJ/mol (equilibrium frames {energy['equilibrium_frames']:.4g})"
    table.add_row(label, *_numbers(energy, ".4g"))
    return table


def _numbers(part: dict[str, Any], form: str) -> list[str]:
    """Of the uncorrected and the corrected model; NaN where they have none."""
    values = (part["uncorrected"], part["corrected"])
    return [format(math.nan if value is None else value, form) for value in values]
