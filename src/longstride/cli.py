"""The command line: `longstride <stage>`. Parse, load, call; the science is elsewhere and imported when needed."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from longstride import __version__
from longstride import config as cfg
from longstride.errors import ConfigError, LongstrideError
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. A user's mistake is one line on standard error, never a traceback."""
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except LongstrideError as error:
        print(f"longstride: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(
            f"longstride: error: {error.strerror}: {error.filename or 'while writing'}; finished work is kept", file=sys.stderr
        )
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("longstride: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="longstride", description="Accelerated molecular dynamics with learned long strides.")
    parser.add_argument("--version", action="version", version=f"longstride {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare = _command(
        commands, "prepare", _prepare, "sequence or structure file -> molecule with a force field", cfg.PhysicsConfig
    )
    _folders(prepare, "out")
    prepare.add_argument("--sequence", help="instead of --system: ACE-ALA-NME, AA, YLFP, ...")
    prepare.add_argument("--file", help="instead of --system: a PDB or mmCIF file")
    reference = _command(commands, "reference", _reference, "Langevin MD from several basins", cfg.ReferenceConfig)
    _folders(reference, "prepared", "out", "state")
    shard = _command(commands, "shard", _shard, "trajectories -> shards of lagged pairs", cfg.ShardConfig)
    _folders(shard, "reference", "out")
    flow = _command(commands, "train-flow", _train_flow, "shards -> conditional normalising flow", cfg.FlowConfig)
    _folders(flow, "prepared", "shards", "out", "state")
    distill = _command(commands, "distill", _distill, "teacher labels -> 3.5 Å student potential", cfg.DistillConfig)
    _folders(distill, "prepared", "reference", "out", "state")
    distill.add_argument(
        "--start", type=Path, metavar="DIR", help="folder of distill-family, whose student this one starts from (default: none)"
    )
    of_many = "teacher labels of several systems -> one student for all"
    family = _command(commands, "distill-family", _distill_family, of_many, cfg.DistillConfig)
    _folders(family, "out", "state")
    for stage in ("prepared", "reference"):
        folders = f"folders of the {stage.replace('prepared', 'prepare')} stage, of the systems in one order"
        family.add_argument(f"--{stage}", nargs="+", required=True, type=Path, metavar="DIR", help=folders)
    _add_transfer(commands)
    _add_sample(commands)
    umbrella = "independent free energy of phi: umbrella sampling and WHAM"
    free_energy = _command(commands, "free-energy", _free_energy, umbrella, cfg.FreeEnergyConfig)
    _folders(free_energy, "prepared", "out", "state")
    compare = _command(commands, "compare", _compare, "free energies, MSM, ESS of one system's samples", cfg.CompareConfig)
    _folders(compare, "prepared", "reference", "out")
    compare.add_argument("--free-energy", type=Path, metavar="DIR", help="folder of the free-energy stage, where there is one")
    compare.add_argument("--samples", nargs="+", required=True, type=Path, metavar="DIR", help="folders of the sample stage")
    _add_dynamics(commands)
    summary = _command(commands, "summary", _summary, "comparisons -> summary.csv", None)
    summary.add_argument("--compare", nargs="*", default=[], type=Path, metavar="DIR", help="folders of the compare stage")
    rest = "folders of the dynamics stage; they fill in for systems without a comparison"
    summary.add_argument("--dynamics", nargs="*", default=[], type=Path, metavar="DIR", help=rest)
    summary.add_argument("--out", required=True, type=Path, metavar="FILE", help="the CSV file to write")
    board = _command(commands, "leaderboard", _leaderboard, "run folders -> leaderboard.csv, methods within one target", None)
    board.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="results/<run>")
    board.add_argument("--out", required=True, type=Path, metavar="FILE", help="the CSV file to write")
    report = _command(commands, "report", _report, "run folder -> one self-contained HTML file", None)
    report.add_argument("--run-folder", required=True, type=Path, metavar="DIR", help="results/<run>")
    report.add_argument("--out", required=True, type=Path, metavar="FILE", help="the HTML file to write")
    _add_resonance(commands)
    _add_bench(commands)
    _add_import(commands)
    return parser


def _command(
    commands: Any,  # noqa: ANN401 - argparse keeps its subparser type private
    name: str,
    function: Callable[[argparse.Namespace], None],
    summary: str,
    section: type[BaseModel] | None,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=function)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration (default: built-in defaults)")
    parser.add_argument("--system", metavar="NAME", help="name of the system in the configuration (default: the only one)")
    parser.add_argument(
        "--threads", type=int, default=max(1, len(os.sched_getaffinity(0))), help="cores to use (default: %(default)s)"
    )
    if section is not None:
        _section_flags(parser, section)
    return parser


def _section_flags(parser: argparse.ArgumentParser, section: type[BaseModel]) -> None:
    """Give every plain field of a configuration section a flag; units are in the names, defaults in the help."""
    group = parser.add_argument_group(f"settings ({section.__name__}; they override the configuration)")
    for name, field in section.model_fields.items():
        default = field.get_default()
        if isinstance(default, BaseModel):
            continue
        text = f"{field.description} (default: {default})".replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"set_{name}", metavar="VALUE", help=text)


def _folders(parser: argparse.ArgumentParser, *names: str) -> None:
    meaning = {
        "prepared": "folder of the prepare stage",
        "reference": "folder of the reference stage",
        "shards": "folder of the shard stage",
        "out": "folder to write",
        "state": "folder for checkpoints (default: <out>/.state)",
    }
    for name in names:
        parser.add_argument(f"--{name}", required=name != "state", type=Path, metavar="DIR", help=meaning[name])


def _add_transfer(commands: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    summary = "exact chains of a peptide, with a transferable flow or torsion moves alone"
    chains = _command(commands, "chains", _chains, summary, cfg.ChainsConfig)
    _folders(chains, "prepared", "out", "state")
    chains.add_argument(
        "--flow", type=Path, metavar="DIR", help="folder of train-transfer (default: none, torsion moves alone)"
    )
    transfer = _command(
        commands,
        "train-transfer",
        _train_transfer,
        "exact chains (and dynamics) of peptides -> transferable flow",
        cfg.TransferConfig,
    )
    _folders(transfer, "out", "state")
    folders = "prepare, chains and, for time lags, reference folders, joined by colons: PREPARED:CHAINS[:REFERENCE]"
    transfer.add_argument("--training", nargs="+", required=True, metavar="FOLDERS", help=f"training peptides: {folders}")
    transfer.add_argument("--held-out", nargs="*", default=[], metavar="FOLDERS", help="held-out peptides, likewise")
    transfer.add_argument(
        "--start", type=Path, metavar="DIR", help="flow whose weights training starts from (default: random weights)"
    )


def _add_dynamics(commands: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    text = "multi-time-step against single-step samples of one system: what changed, what the student gains"
    dynamics = _command(commands, "dynamics", _dynamics, text, cfg.DynamicsConfig)
    _folders(dynamics, "prepared", "out", "state")
    for method in ("mts", "sts"):
        dynamics.add_argument(
            f"--{method}", nargs="+", required=True, type=Path, metavar="DIR", help=f"sample folders of method {method}"
        )


def _add_resonance(commands: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    text = "short multi-time-step runs at longer and longer outer steps until one blows up, beside T/2 and T/3 of stiff modes"
    scan = _command(commands, "resonance-scan", _resonance, text, None)
    _folders(scan, "prepared", "reference", "out", "state")
    scan.add_argument("--distill", required=True, type=Path, metavar="DIR", help="folder of the distill stage")
    steps = "outer steps in femtoseconds (default: 2 3 4 5 6 7 8)"
    scan.add_argument("--outer-fs", nargs="+", type=float, default=[2, 3, 4, 5, 6, 7, 8], metavar="FS", help=steps)
    numbers = {
        "inner-fs": (float, 1.0, "inner step in femtoseconds, of which every outer step is a multiple"),
        "hydrogen-mass-Da": (float, None, "mass of hydrogens, taken from their parents (default: 1.008)"),
        "friction-per-ps": (float, 1.0, "Langevin friction"),
        "replicas": (int, 4, "advanced together"),
        "steps": (int, 400, "outer steps of every run"),
        "settle-ps": (float, 0.2, "equilibration with the teacher alone, once"),
    }
    for name, (kind, default, meaning) in numbers.items():
        shown = meaning if default is None else f"{meaning} (default: %(default)s)"
        scan.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=shown)
    whose = "whose Hessian gives the stiff modes (auto: the teacher's up to 100 atoms)"
    scan.add_argument("--modes", choices=("auto", "teacher", "student"), default="auto", help=whose)


def _add_sample(commands: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    sample = _command(commands, "sample", _sample, "draw samples with one method", None)
    sample.add_argument(
        "--method",
        required=True,
        choices=cfg.METHODS,
        help="exact: timewarp, tempering; unadjusted: md, tuned-md, metadynamics, mts, sts; biased: explore",
    )
    sample.add_argument("--seed", type=int, default=0, metavar="K", help="repeat number (default: 0)")
    sample.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method, such as --set chains=64"
    )
    _folders(sample, "out", "state")
    sample.add_argument("--prepared", type=Path, metavar="DIR", help="folder of the prepare stage")
    sample.add_argument("--sequence", help="instead of --prepared: AV, YLFP, ACE-ALA-NME, ...; prepared in <out>/prepared")
    sample.add_argument(
        "--reference", type=Path, metavar="DIR", help="folder of the reference stage; a transferable flow can do without"
    )
    shipped = (
        "folder of a flow (timewarp, explore); with --sequence by default the flow for peptides that comes with the package"
    )
    sample.add_argument("--flow", type=Path, metavar="DIR", help=shipped)
    sample.add_argument("--distill", type=Path, metavar="DIR", help="folder of the distill stage (mts)")
    lines = []
    for method in cfg.METHODS:
        lines += [f"settings of {method}:"]
        fields = type(cfg.SampleConfig.model_fields[cfg.section_of(method)].default).model_fields
        lines += [f"  {key} (default: {field.get_default()})  {field.description}" for key, field in fields.items()]
    sample.epilog = "\n".join(lines)
    sample.formatter_class = argparse.RawDescriptionHelpFormatter


def _add_bench(commands: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    bench = commands.add_parser("bench", help="measure speed; ratios within one run, warm-up excluded")
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    energies = kinds.add_parser("energies", help="batched torch energies against OpenMM, with parity")
    energies.set_defaults(command=_bench_energies)
    energies.add_argument("--system", default="ACE-ALA-NME", metavar="SEQUENCE", help="peptide (default: %(default)s)")
    energies.add_argument("--batch", type=int, default=1024, help="configurations per call (default: %(default)s)")
    energies.add_argument(
        "--threads", type=int, default=max(1, len(os.sched_getaffinity(0))), help="cores (default: %(default)s)"
    )
    energies.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_bench_mcmc(kinds)
    _add_bench_flow(kinds)
    _add_bench_parity(kinds)
    _add_bench_mts(kinds)
    text = "cost of the student against the number of atoms, 22 to 5 184, with its exponent"
    student = kinds.add_parser("student", help=text, description=text)
    student.set_defaults(command=_bench_student)
    student.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    student.add_argument("--quick", action="store_true", help="two boxes, short windows")
    student.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_bench_mts(kinds: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    text = "multi-time-step dynamics over single steps with the same teacher: gains, cost of student and teacher calls"
    mts = kinds.add_parser("mts", help=text, description=text)
    mts.set_defaults(command=_bench_mts)
    mts.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration: systems, physics, teacher (distill)")
    mts.add_argument("--system", metavar="NAME", help="which of its systems (default: the only one)")
    mts.add_argument("--prepared", type=Path, metavar="DIR", help="folder of the prepare stage (default: prepared anew)")
    mts.add_argument(
        "--distill",
        type=Path,
        metavar="DIR",
        help="folder of the distill stage (default: the student that comes with the package)",
    )
    mts.add_argument(
        "--schemes",
        nargs="+",
        default=["4x1", "3x2@3.024"],
        metavar="SCHEME",
        help="inner steps x femtoseconds @ hydrogen mass (default: 4x1 3x2@3.024)",
    )
    mts.add_argument("--replicas", type=int, help="per process (default: as sample has them)")
    mts.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0))), help="cores (default: %(default)s)")
    mts.add_argument("--quick", action="store_true", help="few and short windows")
    mts.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_bench_mcmc(kinds: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    text = "flow proposals and complete exact steps: published model, a serial version of it, internal-coordinate flow"
    mcmc = kinds.add_parser("mcmc", help=text, description=text)
    mcmc.set_defaults(command=_bench_mcmc)
    mcmc.add_argument("--system", default="ACE-ALA-NME", metavar="SEQUENCE", help="peptide (default: %(default)s)")
    mcmc.add_argument("--preset", default="2aa", choices=("small", "ad", "2aa", "4aa"), help="sizes (default: %(default)s)")
    mcmc.add_argument("--batch", type=int, default=32, help="chains of the published model (default: %(default)s)")
    mcmc.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0))), help="cores (default: %(default)s)")
    mcmc.add_argument("--quick", action="store_true", help="leave out the dependence on batch size and number of atoms")
    mcmc.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_bench_flow(kinds: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    text = "transferable flow on one core: proposals and exact steps against chains and atoms, their parts, OpenMM beside them"
    flow = kinds.add_parser("flow", help=text, description=text)
    flow.set_defaults(command=_bench_flow)
    flow.add_argument("--system", default="ACE-ALA-NME", metavar="SEQUENCE", help="peptide (default: %(default)s)")
    flow.add_argument(
        "--flow",
        type=Path,
        metavar="DIR",
        help="folder of train-transfer (default: an untrained network, which costs the same)",
    )
    flow.add_argument("--quick", action="store_true", help="two numbers of chains and one other peptide, few repeats")
    flow.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_bench_parity(kinds: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    text = "parity of the batched force field with OpenMM: capped residues, dipeptides, tetrapeptides, implicit solvents"
    parity = kinds.add_parser("parity", help=text, description=f"{text}; exit status 2 where a bar is missed")
    parity.set_defaults(command=_bench_parity)
    parity.add_argument(
        "--list", type=Path, metavar="FILE", help="YAML file of lists of dipeptides, such as a split (default: all 400)"
    )
    parity.add_argument("--quick", action="store_true", help="only a few molecules of each kind")
    parity.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_import(commands: Any) -> None:  # noqa: ANN401 - argparse keeps its subparser type private
    text = (
        "Published Timewarp models and data for use here. The files are in the Hugging Face dataset microsoft/timewarp"
        " (https://huggingface.co/datasets/microsoft/timewarp): checkpoints 2aa_best_model.pt and 4aa_best_model.pt, and"
        " trajectories in its folders (2AA-1-large, 4AA-large, ...), a *-traj-arrays.npz with a *-traj-state0.pdb beside each."
    )
    parser = commands.add_parser("import-timewarp", help="published Timewarp files -> stage folders", description=text)
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    model = kinds.add_parser("checkpoint", help="*.pt -> folder of train-flow, for sample --flow", description=text)
    model.set_defaults(command=_import_checkpoint)
    model.add_argument("file", type=Path, metavar="FILE", help="the checkpoint; read as data, nothing in it is executed")
    _folders(model, "out")
    data = kinds.add_parser("trajectory", help="*-traj-arrays.npz -> folder of reference, for shard", description=text)
    data.set_defaults(command=_import_trajectories)
    data.add_argument("files", nargs="+", type=Path, metavar="FILE", help="trajectories of one molecule")
    _folders(data, "prepared", "out")
    data.add_argument("--structure", type=Path, metavar="PDB", help="its *-traj-state0.pdb (default: beside the first file)")
    data.add_argument("--segments", type=int, default=4, help="trajectories to cut each file into (default: %(default)s)")
    data.add_argument(
        "--recompute",
        action="store_true",
        help="store energies and forces anew, instead of refusing another force field",
    )


def _load(options: argparse.Namespace, section: str | None = None) -> cfg.Config:
    """Return the configuration with this command's flags applied to `section`."""
    config = cfg.load_config(options.config) if options.config else cfg.Config()
    changes = {key[4:]: _value(text) for key, text in vars(options).items() if key.startswith("set_") and text is not None}
    if not changes or section is None:
        return config
    values = config.model_dump(mode="json")
    target = values
    for part in section.split("."):
        target = target[part]
    target.update(changes)
    return cfg.validate(values, whole_run=False)


def _value(text: str) -> Any:  # noqa: ANN401 - whatever the user wrote; the configuration model checks it
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value {text!r}") from error


def _system_name(options: argparse.Namespace, config: cfg.Config) -> str:
    if options.system:
        return config.system(options.system).name
    if len(config.systems) > 1:
        raise ConfigError(f"say which system with --system; known: {', '.join(system.name for system in config.systems)}")
    return config.systems[0].name


def _state(options: argparse.Namespace) -> Path:
    return options.state or options.out / ".state"


def _folders_of(options: argparse.Namespace, *inputs: str) -> dict[str, Any]:
    """Return the folders a stage function takes: its inputs by name, `out` and `state`."""
    return {**{name: getattr(options, name) for name in inputs}, "out": options.out, "state": _state(options)}


def _once(
    options: argparse.Namespace, *, module: str, view: dict[str, Any], inputs: list[Path], make: Callable[[], None]
) -> bool:
    """Run `make` unless the same work is already complete in `options.out`; return whether it ran."""
    from longstride.data.checkpoint import fingerprint
    from longstride.data.manifest import identity
    from longstride.data.once import run_once
    from longstride.fingerprints import code_version

    key = fingerprint(module, view, [identity(folder) for folder in inputs], code_version(module))
    return run_once(make, out=options.out, state=_state(options), key=key)


def _seed(config: cfg.Config, *identity: str | int) -> int:
    return job_seed(config.run.seed, *identity)


def _prepare(options: argparse.Namespace) -> None:
    from longstride.stages import prepare

    config = _load(options, "physics")
    if options.sequence or options.file:
        name = options.system or options.sequence or Path(options.file).stem
        values = {
            **config.model_dump(mode="json"),
            "systems": [{"name": name, "sequence": options.sequence, "file": options.file}],
        }
        config = cfg.validate(values)
    prepare.run(config.system(_system_name(options, config)), physics=config.physics, out=options.out)


def _reference(options: argparse.Namespace) -> None:
    from longstride.stages import reference

    config = _load(options, "reference")
    name = _system_name(options, config)
    job = {**_folders_of(options, "prepared"), "seed": _seed(config, "reference", name), "threads": options.threads}
    make = partial(reference.run, config.reference, physics=config.physics, **job)
    view = cfg.stage_view(config, "reference", system=name)
    _once(options, module="reference", view=view, inputs=[options.prepared], make=make)


def _shard(options: argparse.Namespace) -> None:
    from longstride.stages import shard

    shard.run(_load(options, "shard").shard, reference=options.reference, out=options.out)


def _train_flow(options: argparse.Namespace) -> None:
    from longstride.stages import flow

    config = _load(options, "flow")
    name = _system_name(options, config)
    job = {**_folders_of(options, "prepared", "shards"), "seed": _seed(config, "flow", name), "threads": options.threads}
    make = partial(flow.run, config.flow, **job)
    view = cfg.stage_view(config, "flow", system=name)
    _once(options, module="flow", view=view, inputs=[options.prepared, options.shards], make=make)


def _distill(options: argparse.Namespace) -> None:
    from longstride.stages import distill

    config = _load(options, "distill")
    name = _system_name(options, config)
    job = {**_folders_of(options, "prepared", "reference"), "seed": _seed(config, "distill", name), "threads": options.threads}
    make = partial(distill.run, config.distill, **job, family=options.start)
    view = cfg.stage_view(config, "distill", system=name)
    inputs = [options.prepared, options.reference, *([options.start] if options.start else [])]
    _once(options, module="distill", view=view, inputs=inputs, make=make)


def _distill_family(options: argparse.Namespace) -> None:
    from longstride.stages import distill

    config = _load(options, "distill")
    job = {**_folders_of(options, "prepared", "reference"), "seed": _seed(config, "distill"), "threads": options.threads}
    make = partial(distill.run_family, config.distill, **job)
    view = {"family": True, **cfg.stage_view(config, "distill")}
    _once(options, module="distill", view=view, inputs=[*options.prepared, *options.reference], make=make)


def _chains(options: argparse.Namespace) -> None:
    from longstride.data.manifest import read_manifest
    from longstride.stages import chains

    config = _load(options, "chains")
    name = read_manifest(options.prepared, kind="prepare")["system"]
    job = {**_folders_of(options, "prepared"), "flow": options.flow, "threads": options.threads}
    job["seed"] = _seed(config, "chains", name)
    make = partial(chains.run_chains, config.chains, physics=config.physics, **job)
    folders = [folder for folder in (options.prepared, options.flow) if folder]
    _once(options, module="chains", view=cfg.stage_view(config, "chains"), inputs=folders, make=make)


def _train_transfer(options: argparse.Namespace) -> None:
    from longstride.stages import train_transfer
    from longstride.training.ranks import started_processes

    if (count := started_processes()) is not None:  # torchrun has the last word
        options.set_processes = str(count)
    config = _load(options, "transfer")
    training, validation = ([_peptide(text) for text in texts] for texts in (options.training, options.held_out))
    job = {"training": training, "validation": validation, "start": options.start, **_folders_of(options)}
    job["threads"] = options.threads
    view = {**cfg.stage_view(config, "transfer"), "held_out": len(validation)}
    folders = [folder for peptide in (*training, *validation) for folder in peptide]
    folders += [options.start] if options.start else []
    with train_transfer.together(config.transfer) as ranks:
        work = partial(train_transfer.run, config.transfer, **job, seed=_seed(config, "transfer"), ranks=ranks)
        ranks.once(lambda make: _once(options, module="train_transfer", view=view, inputs=folders, make=make), work)


def _peptide(text: str) -> tuple[Path, Path] | tuple[Path, Path, Path]:
    prepared, _, others = text.partition(":")
    chains, _, reference = others.partition(":")
    if not (prepared and chains) or ":" in reference:
        raise ConfigError(f"give PREPARED:CHAINS or PREPARED:CHAINS:REFERENCE, not {text!r}")
    return (Path(prepared), Path(chains), Path(reference)) if reference else (Path(prepared), Path(chains))


def _sample(options: argparse.Namespace) -> None:
    from longstride.runs import MODULES
    from longstride.stages import sample

    for item in options.set:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, not {item!r}")
        setattr(options, f"set_{key}", text)
    config = _load(options, f"sample.{cfg.section_of(options.method)}")
    if options.sequence:
        config = _prepared_here(options, config)
    elif not options.prepared:
        raise ConfigError("say which molecule: --prepared DIR, or --sequence such as AV")
    name = _system_name(options, config)
    seed = _seed(config, "sample", name, options.method, options.seed)
    inputs = sample.SampleInputs(
        prepared=options.prepared, reference=options.reference, flow=options.flow, distill=options.distill
    )
    job = {"inputs": inputs, "out": options.out, "state": _state(options), "seed": seed, "threads": options.threads}
    view = {**cfg.stage_view(config, "sample", system=name, method=options.method), "job_seed": seed}
    folders = [folder for folder in (options.prepared, options.reference, options.flow, options.distill) if folder]
    make = partial(sample.run, options.method, config, **job)
    _once(options, module=MODULES[options.method], view=view, inputs=folders, make=make)


def _prepared_here(options: argparse.Namespace, config: cfg.Config) -> cfg.Config:
    """Prepare the molecule of --sequence beside the samples, with the shipped flow where none is given."""
    from longstride import weights
    from longstride.stages import prepare

    if options.prepared:
        raise ConfigError("give either --prepared or --sequence")
    name = options.system or options.sequence
    values = {**config.model_dump(mode="json"), "systems": [{"name": name, "sequence": options.sequence}]}
    config = cfg.validate(values, whole_run=False)
    options.prepared, options.system = options.out / "prepared", name
    if options.method in ("timewarp", "explore"):
        options.flow = options.flow or weights.PEPTIDES
    prepare.run(config.system(name), physics=config.physics, out=options.prepared)
    return config


def _free_energy(options: argparse.Namespace) -> None:
    from longstride.stages import free_energy

    config = _load(options, "free_energy")
    name = _system_name(options, config)
    job = {**_folders_of(options, "prepared"), "seed": _seed(config, "free_energy", name), "threads": options.threads}
    make = partial(free_energy.run, config.free_energy, physics=config.physics, **job)
    view = cfg.stage_view(config, "free_energy", system=name)
    _once(options, module="free_energy", view=view, inputs=[options.prepared], make=make)


def _compare(options: argparse.Namespace) -> None:
    from longstride.stages import compare

    config = _load(options, "compare")
    compare.run(
        config.compare,
        prepared=options.prepared,
        reference=options.reference,
        samples=options.samples,
        free_energy=options.free_energy,
        out=options.out,
        seed=_seed(config, "compare", _system_name(options, config)),
        threads=options.threads,
    )


def _dynamics(options: argparse.Namespace) -> None:
    from longstride.potentials.teachers import TeacherSpec
    from longstride.stages import dynamics

    config = _load(options, "dynamics")
    dynamics.run(
        config.dynamics,
        **_folders_of(options, "prepared", "mts", "sts"),
        seed=_seed(config, "dynamics", _system_name(options, config)),
        threads=options.threads,
        teacher=TeacherSpec.of(config.distill),
    )


def _resonance(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from longstride.potentials.teachers import TeacherSpec
    from longstride.stages import resonance

    config = _load(options)
    settings = resonance.Settings(
        outer_fs=tuple(float(value) for value in options.outer_fs),
        inner_fs=options.inner_fs,
        hydrogen_mass_Da=options.hydrogen_mass_Da,
        friction_per_ps=options.friction_per_ps,
        replicas=options.replicas,
        steps=options.steps,
        settle_ps=options.settle_ps,
        modes=options.modes,
    )
    job = {**_folders_of(options, "prepared", "distill", "reference"), "threads": options.threads}
    job |= {"seed": _seed(config, "resonance", _system_name(options, config)), "teacher": TeacherSpec.of(config.distill)}
    view = {**cfg.stage_view(config, "resonance"), "teacher": asdict(job["teacher"]), "scan": asdict(settings)}
    inputs = [options.prepared, options.distill, options.reference]
    view["seed"] = job["seed"]
    _once(options, module="resonance", view=view, inputs=inputs, make=partial(resonance.run, settings, **job))


def _summary(options: argparse.Namespace) -> None:
    from longstride.stages import compare

    comparisons = [folder / "comparison.json" for folder in options.compare]
    compare.summarise(comparisons, options.out, dynamics_files=[folder / "dynamics.json" for folder in options.dynamics])


def _leaderboard(options: argparse.Namespace) -> None:
    from longstride.stages import compare

    compare.write_leaderboard(options.runs, options.out)


def _report(options: argparse.Namespace) -> None:
    from longstride.stages import report

    report.run(_load(options), run_folder=options.run_folder, out=options.out)


def _import_checkpoint(options: argparse.Namespace) -> None:
    from longstride.stages import import_timewarp

    import_timewarp.checkpoint(options.file, out=options.out)


def _import_trajectories(options: argparse.Namespace) -> None:
    from longstride.stages import import_timewarp

    if options.segments < 1:
        raise LongstrideError("--segments must be 1 or more")
    import_timewarp.trajectories(
        options.files,
        prepared=options.prepared,
        out=options.out,
        structure=options.structure,
        segments=options.segments,
        recompute=options.recompute,
    )


def _bench_energies(options: argparse.Namespace) -> None:
    import json

    from longstride.stages import bench

    result = bench.energies(sequence=options.system, batch=options.batch, threads=options.threads)
    print(json.dumps(result, indent=1) if options.json else bench.table(result))


def _bench_mcmc(options: argparse.Namespace) -> None:
    import json

    from longstride.stages import bench_mcmc

    settings = bench_mcmc.Settings(
        sequence=options.system,
        preset=options.preset,
        batch=options.batch,
        threads=options.threads,
        sequences=() if options.quick else bench_mcmc.SEQUENCES,
        batches=() if options.quick else bench_mcmc.BATCHES,
    )
    result = bench_mcmc.mcmc(settings)
    print(json.dumps(result, indent=1) if options.json else bench_mcmc.table(result))


def _bench_mts(options: argparse.Namespace) -> None:
    import json

    from longstride.stages import bench_mts

    config = _load(options)
    molecule = bench_mts.molecule_of(config, _system_name(options, config), options.prepared)
    settings = bench_mts.Settings.of(
        config,
        molecule,
        distill=options.distill,
        schemes=tuple(bench_mts.Scheme.parse(text) for text in options.schemes),
        threads=options.threads,
        replicas=options.replicas,
        quick=options.quick,
    )
    result = bench_mts.mts(molecule, settings)
    print(json.dumps(result, indent=1) if options.json else bench_mts.table(result))


def _bench_student(options: argparse.Namespace) -> None:
    import json

    from longstride.stages import bench_student

    quick: dict[str, Any] = {"edges": (4, 6), "rounds": 2, "window_s": 0.1} if options.quick else {}
    result = bench_student.student(bench_student.Settings(threads=options.threads, **quick))
    print(json.dumps(result, indent=1) if options.json else bench_student.table(result))


def _bench_flow(options: argparse.Namespace) -> None:
    import json
    from dataclasses import replace

    from longstride.stages import bench_flow

    settings = bench_flow.QUICK if options.quick else bench_flow.Settings()
    result = bench_flow.flow(replace(settings, sequence=options.system, flow=options.flow))
    print(json.dumps(result, indent=1) if options.json else bench_flow.table(result))


def _bench_parity(options: argparse.Namespace) -> None:
    import json

    from longstride.stages import bench_parity

    groups = bench_parity.all_groups(bench_parity.read_list(options.list)) if options.list else bench_parity.all_groups()
    result = bench_parity.compare(bench_parity.a_few(groups) if options.quick else groups)
    print(json.dumps(result, indent=1) if options.json else bench_parity.table(result))
    bench_parity.require(result)


if __name__ == "__main__":
    sys.exit(main())
