rule shard:
    input:
        reference="<run>/reference/{system}/manifest.json",
    output:
        manifest="<run>/shards/{system}/manifest.json",
    log:
        "<run>/logs/shards/{system}.log",
    benchmark:
        "<run>/benchmarks/shards/{system}.tsv"
    conda:
        "../../envs/longstride.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        config=str(RUN.frozen),
        key=job_key("shard"),
        reference=subpath(input.reference, parent=True),
        out=subpath(output.manifest, parent=True),
    message:
        "shard: lagged pairs of {wildcards.system}"
    shell:
        "exec longstride shard --config {params.config:q} --system {wildcards.system}"
        " --reference {params.reference:q} --out {params.out:q} > {log:q} 2>&1"
