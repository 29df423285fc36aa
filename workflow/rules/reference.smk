rule prepare:
    output:
        manifest="<run>/prepare/{system}/manifest.json",
    log:
        "<run>/logs/prepare/{system}.log",
    benchmark:
        "<run>/benchmarks/prepare/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        config=str(RUN.frozen),
        key=job_key("prepare"),
        out=subpath(output.manifest, parent=True),
    message:
        "prepare: topology and force field of {wildcards.system}"
    shell:
        "exec longstride prepare --config {params.config:q} --system {wildcards.system}"
        " --out {params.out:q} > {log:q} 2>&1"


rule reference:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
    output:
        manifest="<run>/reference/{system}/manifest.json",
    log:
        "<run>/logs/reference/{system}.log",
    benchmark:
        "<run>/benchmarks/reference/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 8
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("reference"),
        prepared=subpath(input.prepared, parent=True),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("reference", "{system}"),
    message:
        "reference: molecular dynamics of {wildcards.system}"
    shell:
        "exec longstride reference --config {params.config:q} --system {wildcards.system}"
        " --prepared {params.prepared:q} --out {params.out:q} --state {params.state:q}"
        " --threads {threads} > {log:q} 2>&1"
