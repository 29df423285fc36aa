rule train_flow:
    input:
        prepared="<run>/prepare/{system}/manifest.json",
        shards="<run>/shards/{system}/manifest.json",
    output:
        manifest="<run>/flow/{system}/manifest.json",
    log:
        "<run>/logs/flow/{system}.log",
    benchmark:
        "<run>/benchmarks/flow/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=6000,
        runtime=240,
    params:
        config=str(RUN.frozen),
        key=job_key("flow"),
        prepared=subpath(input.prepared, parent=True),
        shards=subpath(input.shards, parent=True),
        out=subpath(output.manifest, parent=True),
        state=RUN.state("flow", "{system}"),
    message:
        "train-flow: conditional flow of {wildcards.system}"
    shell:
        "exec longstride train-flow --config {params.config:q} --system {wildcards.system}"
        " --prepared {params.prepared:q} --shards {params.shards:q}"
        " --out {params.out:q} --state {params.state:q} --threads {threads} > {log:q} 2>&1"
