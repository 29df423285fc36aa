"""The card of a student: what it imitates, what it learned from, how wrong it is, and what it is for."""

from __future__ import annotations

from typing import Any

from longstride.training.labels import FRICTION_PER_PS, MASS_DA, TIMESTEP_PS

PURPOSE = """It is for the inner steps of multi-time-step dynamics, where the teacher corrects it every outer step. It is no
force field of its own: long dynamics on the student alone meets configurations that it was never shown. The license of the
teacher's weights may bind what was learned from them.
"""


def card(content: dict[str, Any], *, parameters: int, size_bytes: int) -> str:
    """Return model card and data card as Markdown.

    Args:
        content: of the stage's manifest.
        parameters: weights of the network.
        size_bytes: of the file.
    """
    shape, frames = content["architecture"], content["frames"]
    names = list(content["members"])
    rows = [
        ("imitates", content["teacher"]),
        ("systems", ", ".join(names)),
        ("kinds of atoms", ", ".join(content["environments"])),
        (
            "network",
            f"moments to degree 3, {shape['radial']} radial functions, {shape['channels']} channels, width {shape['hidden']}:"
            f" {parameters} weights, {size_bytes / 1e6:.2f} MB, cutoff {10 * shape['cutoff_nm']:g} Å",
        ),
        ("trained on, held out", f"{frames['train']} frames, {frames['held_out']} frames of other trajectories"),
        (
            "force error",
            f"{content['force_rmse']:.1f} kJ/mol/nm per component, {_percent(content['force_relative'])} of the force",
        ),
        ("force along bonds", _percent(content["bond_relative"])),
        ("stiffness of bonds", f"within {_percent(content['stiffness_max'])}"),
        ("Hessian-vector products", f"{_percent(content['hessian_relative'])} (random directions)"),
        ("energy", f"mean absolute error {content['energy_mae']:.2f} kJ/mol"),
        ("holes", _holes(content["rounds"])),
    ]
    lines = [f"# Student of {content['teacher']}", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]
    return "\n".join([*lines, "", PURPOSE, *_data(content), ""])


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _holes(rounds: list[dict[str, Any]]) -> str:
    if not rounds:
        return "not looked for"
    parts = [f"{one['holes']} of {one['frames']} (largest error {one['largest_error']:.0f} kJ/mol/nm)" for one in rounds]
    return f"frames of driven dynamics with too large an error, round by round: {'; '.join(parts)}"


def _data(content: dict[str, Any]) -> list[str]:
    labels = content["labels"]
    temperatures = ", ".join(f"{content['temperature_K'] * heat:.0f}" for heat in labels["heat"])
    head = (
        "system", "atoms", "reference trajectories", "frames, no student", "frames, driven", "teacher calls",
        "sd of energy (kJ/mol)", "rms force (kJ/mol/nm)", "largest force", "force error", "along bonds",
    )  # fmt: skip
    lines = [
        "## Data", "",
        f"Reference frames and Langevin chains on the teacher ({temperatures} K, all masses {MASS_DA:g} Da, steps of"
        f" {1000 * TIMESTEP_PS:g} fs, friction {FRICTION_PER_PS:g}/ps, one frame of {labels['stride']} kept), then frames to"
        " which multi-time-step dynamics with the student led. Held out: the last quarter of the trajectories, with all that"
        " descends from them.", "",
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}",
    ]  # fmt: skip
    for name, one in content["members"].items():
        data = one["data"]
        cells = (
            name, data["atoms"], data["reference_trajectories"], data["frames_without_student"],
            data["frames_of_driven_dynamics"], one["frames"]["teacher_calls"], f"{data['energy_sd_kJ_per_mol']:.1f}",
            f"{data['force_rms_kJ_per_mol_nm']:.0f}", f"{data['largest_force_kJ_per_mol_nm']:.0f}",
            _percent(one["force_relative"]), _percent(one["bond_relative"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines
