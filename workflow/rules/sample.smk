rule sample_baseline:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        reference="<run>/reference/{system}/manifest.json",
    output:
        manifest="<run>/sample/{system}/{method}/seed{seed}/manifest.json",
    log:
        "<run>/logs/sample/{system}/{method}/seed{seed}.log",
    benchmark:
        "<run>/benchmarks/sample/{system}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        method="md|tuned-md|metadynamics|tempering|sts",
    conda:
        "../../envs/longstride.yaml"
    threads: lambda wildcards: 1 if wildcards.method in ("tuned-md", "tempering") else 8
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("sample"),
        prepared=subpath(input.prepared, parent=True),
        reference=subpath(input.reference, parent=True),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("sample", "{system}", "{method}", "seed{seed}"),
    message:
        "sample: {wildcards.method} of {wildcards.system}, seed {wildcards.seed}"
    shell:
        "exec longstride sample --config {params.config:q} --system {wildcards.system}"
        " --method {wildcards.method} --seed {wildcards.seed}"
        " --prepared {params.prepared:q} --reference {params.reference:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"


rule sample_flow:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        reference="<run>/reference/{system}/manifest.json",
        flow=flow_of,
    output:
        manifest="<run>/sample/{system}/{method}/seed{seed}/manifest.json",
    log:
        "<run>/logs/sample/{system}/{method}/seed{seed}.log",
    benchmark:
        "<run>/benchmarks/sample/{system}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        method="timewarp|explore",
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("sample"),
        prepared=subpath(input.prepared, parent=True),
        reference=subpath(input.reference, parent=True),
        flow=subpath(input.flow, parent=True),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("sample", "{system}", "{method}", "seed{seed}"),
    message:
        "sample: {wildcards.method} of {wildcards.system}, seed {wildcards.seed}"
    shell:
        "exec longstride sample --config {params.config:q} --system {wildcards.system}"
        " --method {wildcards.method} --seed {wildcards.seed}"
        " --prepared {params.prepared:q} --reference {params.reference:q} --flow {params.flow:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"


rule sample_mts:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        reference="<run>/reference/{system}/manifest.json",
        distill="<run>/distill/{system}/manifest.json",
    output:
        manifest="<run>/sample/{system}/{method}/seed{seed}/manifest.json",
    log:
        "<run>/logs/sample/{system}/{method}/seed{seed}.log",
    benchmark:
        "<run>/benchmarks/sample/{system}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        method="mts",
    conda:
        "../../envs/longstride.yaml"
    threads: 8
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("sample"),
        prepared=subpath(input.prepared, parent=True),
        reference=subpath(input.reference, parent=True),
        distill=subpath(input.distill, parent=True),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("sample", "{system}", "{method}", "seed{seed}"),
    message:
        "sample: {wildcards.method} of {wildcards.system}, seed {wildcards.seed}"
    shell:
        "exec longstride sample --config {params.config:q} --system {wildcards.system}"
        " --method {wildcards.method} --seed {wildcards.seed}"
        " --prepared {params.prepared:q} --reference {params.reference:q} --distill {params.distill:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"
