# One flow for every peptide: exact chains of the training peptides (round 0 with torsion moves alone, later rounds with the
# flow of the round before), then training on all of them, and on their reference dynamics where there are lags. Only where the
# configuration names training peptides.


rule chains:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        flow=earlier_flow,
    output:
        manifest="<run>/chains/round{round}/{system}/manifest.json",
    log:
        "<run>/logs/chains/round{round}/{system}.log",
    benchmark:
        "<run>/benchmarks/chains/round{round}/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("chains"),
        prepared=subpath(input.prepared, parent=True),
        flow=flag_of("--flow", "flow"),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("chains", "round{round}", "{system}"),
    message:
        "chains: exact chains of {wildcards.system}, round {wildcards.round}"
    shell:
        "exec longstride chains --config {params.config:q} --prepared {params.prepared:q} {params.flow:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"


rule train_transfer:
    input:
        training=peptide_folders("train"),
        validation=peptide_folders("validation"),
    output:
        manifest="<run>/transfer/round{round}/manifest.json",
    log:
        "<run>/logs/transfer/round{round}.log",
    benchmark:
        "<run>/benchmarks/transfer/round{round}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: TRANSFER.processes
    resources:
        mem_mb=8000 * TRANSFER.processes,
        runtime=1440,
    params:
        config=str(RUN.frozen),
        key=job_key("transfer"),
        launch=training_command(TRANSFER.processes),
        training=peptides_of("training"),
        validation=peptides_of("validation"),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("transfer", "round{round}"),
    message:
        "train-transfer: one flow for every peptide, round {wildcards.round}"
    shell:
        "exec {params.launch} train-transfer --config {params.config:q}"
        " --training {params.training:q} --held-out {params.validation:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"
