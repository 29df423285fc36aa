"""The run this workflow works on, what re-runs a job, and what happens around all jobs."""

import os

from snakemake.logging import logger

from longstride import runs, weights
from longstride.errors import LongstrideError


def or_exit(function, *arguments, **keywords):
    """Call, and end with one line instead of a traceback when the user can mend the cause."""
    try:
        return function(*arguments, **keywords)
    except LongstrideError as error:
        raise SystemExit(f"longstride: error: {error}") from None


RUN = or_exit(runs.open_run, config, in_job=not workflow.is_main_process)
SESSION = runs.Session(RUN)
SYSTEMS = [system.name for system in RUN.config.systems]
TRANSFER = RUN.config.transfer


def job_key(stage, **fixed):
    """Return the parameter that re-runs a job when its part of the configuration or its code changes."""
    return lambda wildcards: RUN.job_key(stage, **fixed, **dict(wildcards.items()))


def folders_of(name):
    """Return the folders of the files in the input of that name."""
    return lambda wildcards, input: [os.path.dirname(path) for path in input[name]]


def flag_of(flag, name):
    """Return the flag and the folder of the file in the input of that name, or nothing where there is none."""
    return lambda wildcards, input: [
        part for path in input[name] for part in (flag, os.path.dirname(path))
    ]


def earlier_flow(wildcards):
    """Return the flow of the round before, or nothing in the first round."""
    before = int(wildcards.round) - 1
    return [] if before < 0 else [f"{RUN.folder}/transfer/round{before}/manifest.json"]


def peptide_stages(round):
    """Return the folders of the stages of a peptide that a round of training reads; lags take its dynamics."""
    stages = ["prepare", f"chains/round{round}"]
    return [*stages, "reference"] if TRANSFER.lags_ps else stages


def peptide_folders(split):
    """Return the manifests of these stages of all peptides of a split, one peptide after another."""
    return lambda wildcards: [
        f"{RUN.folder}/{folder}/{name}/manifest.json"
        for name in getattr(TRANSFER, split)
        for folder in peptide_stages(wildcards.round)
    ]


def peptides_of(name):
    """Return the folders of the files in the input of that name, those of one peptide joined by colons."""

    def joined(wildcards, input):
        count = len(peptide_stages(wildcards.round))
        folders = [os.path.dirname(path) for path in input[name]]
        return [
            ":".join(folders[first : first + count])
            for first in range(0, len(folders), count)
        ]

    return joined


def training_command(processes):
    """Return how to start a command of the package that trains in one process or in several."""
    if processes == 1:
        return "longstride"
    return f"torchrun --standalone --nproc-per-node {processes} -m longstride.cli"


def flow_of(wildcards):
    """Return the flow that samples a system: the shipped one, the transferable one where one is trained, else its own."""
    if TRANSFER.shipped:
        return str(weights.PEPTIDES / "manifest.json")
    last = f"transfer/round{TRANSFER.rounds - 1}"
    folder = last if TRANSFER.train else f"flow/{wildcards.system}"
    return f"{RUN.folder}/{folder}/manifest.json"


# two lines per job that say nothing
logger.addFilter(
    lambda record: not str(record.msg).startswith(("Select jobs to", "Execute "))
)


pathvars:
    run=str(RUN.folder),


wildcard_constraints:
    system="|".join(dict.fromkeys([*SYSTEMS, *RUN.config.peptides])),
    seed=r"\d+",
    round=r"\d+",


localrules:
    all,
    summary,
    report,


onstart:
    or_exit(
        SESSION.start,
        jobs=sum(not job.rule.norun for job in workflow.dag.needrun_jobs()),
    )


onsuccess:
    SESSION.finish()


onerror:
    SESSION.fail()
